"""Predict masks for pictures: edit class Args, then run `python predict.py`. Every field is also a flag."""

import sys
from dataclasses import dataclass
from typing import Literal

from utils.cli import Fail, Parsed, end_with, mendable, parse


@dataclass(frozen=True)
class Args:
    """What to predict, with which checkpoint, and what to write."""

    # fmt: off

    # What
    weights: str | None = None  # a run's best.pt or last.pt; None: the newest best.pt in runs/
    input: str = "mock_data/predict"  # a picture, a folder of pictures, or a pattern such as "photos/*.jpg"
    recursive: bool = False  # take the pictures in the input's sub-folders, too
    truth: str | None = None  # folder of masks of the same names: score the predictions

    # How
    window: tuple[int, int] | int | None = None  # height and width of a window that slides over each picture
    # at its own scale, for large ones; None: as in training
    overlap: float = 0.25  # share of a window in common with its neighbour, 0 to 0.9
    tta: Literal["none", "flip", "multiscale"] = "none"  # average over the picture and its mirror image, and
    # over three scales; slower, a little better
    threshold: float | None = None  # two classes: probability from which a pixel is class 1; None: 0.5
    batch_size: int = 4  # pictures, or windows, that are computed together
    num_workers: int = 2  # threads that take pictures from file to mask; on a CPU they share its cores
    device: str = "auto"  # auto (a GPU where there is one), cpu, cuda, cuda:1, mps
    amp: Literal["auto", "off", "bf16", "fp16"] | None = None  # mixed precision; None: as in training

    # What to write
    output: str = "predictions"  # folder for masks/, overlays/ and summary.csv
    encoding: Literal["index", "source"] = "index"  # masks as class ids with a palette, or encoded as the
    # training masks were
    overlay: bool = True  # write each picture with its classes over it and a legend
    probabilities: bool = False  # write each picture's class probabilities, float16 (classes, height, width)
    export: str | None = None  # write the network to this file, .pt2 or .onnx, and predict nothing

    # fmt: on

    def __post_init__(self) -> None:
        """Bring `window` to (height, width) and refuse what cannot be."""
        if isinstance(self.window, int):
            object.__setattr__(self, "window", (self.window, self.window))
        for name, low, high in (("overlap", 0, 0.9), ("threshold", 0, 1)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be {low} to {high}; got {value}")
        for name in ("batch_size", "num_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}")
        if self.window and min(self.window) < 32:
            raise ValueError(f"window must be 32 pixels or more a side; got {self.window}")


PARSED: Parsed | None = None
if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag are answered at once
    PARSED = end_with(lambda: parse(Args, sys.argv[1:], __doc__))

import csv
import io
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from config import Config
from datasets import Encoding, find_images, pair_truth, read_image
from datasets.large import LargeMask, LargePicture, picture_size
from datasets.reading import load_fitted
from datasets.transforms import Box, fit, resize_mask
from metrics import ConfusionMatrix, predicted_ids
from models import load_model
from utils import visualize
from utils.checkpoint import write_atomic, write_image, write_text
from utils.device import describe_device, keep_freed_memory, pick_device, pick_precision
from utils.inference import Network, picture_logits, restored_strips, sliding_blocks
from utils.run import class_table, format_score, format_table, newest_weights, try_output

SUMMARY = "summary.csv"
SCORES = ("mean_iou", "mean_dice", "pixel_accuracy")  # of a picture, where the truth is given
LARGE = 2**26  # numbers in a picture's logits, of four classes at least, from which it is taken in strips
DRAWN = 4096  # pixels of the longer side of such a picture's overlay
STRIP = 2**22  # pixels of a mask that are looked at together


def segment(model: nn.Module, picture: np.ndarray) -> np.ndarray:
    """Class ids of one picture, at its own size.

    Args:
        model: from `models.load_model`.
        picture: uint8 (H, W, C) with the channels that the model was trained on, as `datasets.read_image`
            gives it.

    Returns:
        uint8 (H, W), int16 above 256 classes.
    """
    info, device = model.info, next(model.parameters()).device
    network = Network(model, mean=info.mean, std=info.std, device=device, precision=torch.float32, fold=False)
    image, box = fit(picture, info.image_size, info.resize)
    logits = picture_logits(network, [chw(image)], [box], window_of(info, None))
    return predicted_ids(next(logits))[0].cpu().numpy()


@dataclass(frozen=True)
class Work:
    """What is the same for all pictures."""

    args: Args
    info: Any  # what the checkpoint knows
    network: Network
    encoding: Encoding  # of the training masks
    files: list[Path]
    names: list[str]  # of what is written, without ending
    truths: list[Path]  # one a picture, or none at all

    @property
    def window(self) -> tuple[int, int] | None:
        """The size of the sliding window, or none."""
        return window_of(self.info, self.args.window)

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.info.class_names)

    def is_large(self, index: int) -> bool:
        """Whether a picture is to be taken in strips; what is no picture is told when it is read."""
        try:
            height, width = picture_size(self.files[index])
        except (ValueError, OSError):
            return False
        return height * width * max(4, self.classes) > LARGE


@dataclass
class Found:
    """A picture and what was made of it; the arrays go once it is saved."""

    index: int
    problem: str = ""  # why it, or something of it, is not written
    image: np.ndarray | None = None  # uint8 (h, w, C), as the network sees it
    box: Box | None = None
    picture: np.ndarray | None = None  # uint8 (H, W, C), to draw on; of a large one, reduced
    ids: np.ndarray | None = None  # (H, W)
    probabilities: np.ndarray | None = None  # float16 (num_classes, H, W)
    shares: list[float] | None = None  # of each class
    matrix: ConfusionMatrix | None = None  # against the truth
    saved: Future | None = None


def main(args: Args) -> int:
    """Predict as `args` says.

    Raises:
        Fail: for all that the user can mend, before anything is written; code 1 where pictures were skipped.
    """
    with mendable():
        weights = Path(args.weights) if args.weights else newest_weights(Path(Config().output_dir))
        if args.export:
            return write_network(weights, Path(args.export))
        work = prepare(args, weights)
    started = time.perf_counter()
    rows, total, failed = predict_all(work)
    seconds, output = time.perf_counter() - started, Path(args.output)
    write_rows(output / SUMMARY, rows)
    print_shares(rows, work.info.class_names)
    if args.truth:
        print_scores(output, rows, total, work.info.class_names)
    print(
        f"wrote {len(rows)} masks to {output / 'masks'}"
        + (f", overlays to {output / 'overlays'}" if args.overlay else "")
        + f"; {len(rows) / seconds:.1f} pictures/s"
    )
    if failed:
        lines = "\n".join(f"  {message}" for message in failed)
        raise Fail(
            f"{len(failed)} of {len(work.files)} pictures had problems, the others are written:\n{lines}", 1
        )
    return 0


def prepare(args: Args, weights: Path) -> Work:
    """Open the checkpoint, find the pictures, and look at all that could be wrong.

    Raises:
        ValueError: a wrong value, checkpoint, picture or truth.
        OSError: something is missing, or in the way.
    """
    device = pick_device(args.device)
    model = load_model(weights, device)
    info = model.info
    if args.threshold is not None and len(info.class_names) != 2:
        raise ValueError(f"threshold is for two classes; {weights} has {len(info.class_names)}. Leave it out")
    precision = pick_precision(args.amp or info.amp, device)
    files = find_images(args.input, args.recursive)
    encoding = Encoding.from_dict(info.encoding)
    truths = pair_truth(files, args.truth, info.mask_suffix, encoding) if args.truth else []
    output = Path(args.output)
    try_output(output)
    refuse_foreign_output(output)
    network = Network(model, mean=info.mean, std=info.std, device=device, precision=precision, tta=args.tta)
    print(
        f"{weights}: {info.architecture['name']}, {len(info.class_names)} classes, epoch {info.epoch}; "
        f"{len(files)} pictures; {describe_device(device)}, {str(precision).removeprefix('torch.')}"
    )
    return Work(args, info, network, encoding, files, output_names(files, Path(args.input)), truths)


def predict_all(work: Work) -> tuple[list[dict[str, Any]], ConfusionMatrix, list[str]]:
    """Predict and write every picture.

    Returns:
        Rows of summary.csv and scores.csv, the counts of all pictures, and what went wrong.

    Raises:
        Fail: the output cannot be written.
    """
    large = {index for index in range(len(work.files)) if work.is_large(index)}
    if not large:  # else memory matters more than time
        keep_freed_memory()
    total, rows, failed = ConfusionMatrix(work.classes, work.info.ignore_index), [], []
    bar = tqdm(total=len(work.files), unit="img", leave=False, disable=not sys.stderr.isatty())
    with bar, ThreadPoolExecutor(work.args.num_workers) as writers:
        for found in in_order(work, large, writers):
            bar.update()
            if found.saved:
                wait_for(found.saved)
                rows.append({"picture": str(work.files[found.index]), **row_of(found, work.info.class_names)})
                if found.matrix:
                    total.merge(found.matrix)
            if found.problem:  # said at once, and again at the end
                failed.append(found.problem)
                print(f"problem: {found.problem}", file=sys.stderr)
    return rows, total, failed


def in_order(work: Work, large: set[int], writers: Executor) -> Iterator[Found]:
    """All pictures as they were found, while the next ones are read and computed by threads.

    On a CPU each thread has its share of the cores and takes its own pictures through the network, so that
    no core waits for another at every layer. Large pictures are taken alone, on all cores.
    """
    threads = torch.get_num_threads()
    workers = min(work.args.num_workers, len(work.files))
    if work.network.device.type == "cpu":
        workers = min(workers, threads)
    share = max(1, threads // workers)
    pending: deque[Future] = deque()
    try:
        with ThreadPoolExecutor(workers, "network", torch.set_num_threads, (share,)) as pool:
            for batch in batches(len(work.files), large, work.args.batch_size, 2 * workers):
                if batch[0] in large:
                    while pending:
                        yield from pending.popleft().result()
                    yield predict_large(work, writers, batch[0])
                    continue
                pending.append(pool.submit(predict_batch, work, writers, batch))
                if len(pending) > workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    finally:
        torch.set_num_threads(threads)  # which the threads have changed for those that are still to come


def batches(count: int, alone: set[int], size: int, parts: int) -> Iterator[list[int]]:
    """Numbers below `count`, `size` at a time, towards the end fewer, so that all threads end together."""
    batch: list[int] = []
    for index in range(count):
        if batch and index in alone:
            yield batch
            batch = []
        batch.append(index)
        if index in alone or len(batch) >= min(size, (count - batch[0]) // parts):
            yield batch
            batch = []
    if batch:
        yield batch


def write_network(weights: Path, path: Path) -> int:
    """Export the network of a checkpoint, and say how the file's logits differ from its own.

    Raises:
        ValueError: as `check_target` and `load_model`.
        OSError: likewise, or the file cannot be written.
    """
    from utils.export import SIZES, check_target, export  # slow to import

    check_target(path)
    model = load_model(weights)
    info = model.info
    about = {
        name: getattr(info, name) for name in ("class_names", "image_size", "resize", "palette", "epoch")
    }
    difference = export(model, path, mean=info.mean, std=info.std, about=about)
    sizes = ", ".join(f"{count} x {height} x {width}" for count, height, width in SIZES)
    print(
        f"wrote {path}: images uint8 (N, {info.architecture['in_channels']}, H, W), as read from a picture, "
        f"to logits (N, {info.architecture['num_classes']}, H, W)\n"
        + (
            f"its logits differ from the network's by {difference:.1e} of the largest, over {sizes}"
            if difference is not None
            else "not run: install onnxruntime to have it compared with the network"
        )
    )
    return 0


def window_of(info: Any, window: tuple[int, int] | None) -> tuple[int, int] | None:
    """The sliding window: the one asked for, the training windows' size for resize crop, or none."""
    return window or (tuple(info.image_size) if info.resize == "crop" else None)


def chw(image: np.ndarray) -> Tensor:
    """uint8 (H, W, C) as a tensor (C, H, W), which shares its memory where that may be written to."""
    return torch.from_numpy(image if image.flags.writeable else image.copy()).permute(2, 0, 1)


def refuse_foreign_output(output: Path) -> None:
    """Earlier predictions may be replaced, somebody else's masks not.

    Raises:
        FileExistsError: `output` has a masks folder that no prediction wrote.
    """
    if (output / "masks").exists() and not (output / SUMMARY).exists():
        raise FileExistsError(f"{output / 'masks'} exists and is not from a prediction. Give another output")
    if (output / SUMMARY).exists():
        print(f"{output} holds earlier predictions: those of the same pictures are replaced")


def output_names(images: Sequence[Path], source: Path) -> list[str]:
    """A name without ending for each picture, with the input's sub-folders; never the same for two.

    Pictures that differ in their ending alone keep it: a.jpg and a.png become a_jpg and a_png.
    """
    base = source if source.is_dir() else Path(os.path.commonpath([image.parent for image in images]))
    plain = [image.relative_to(base).with_suffix("").as_posix() for image in images]
    taken = {name.lower() for name in plain if plain.count(name) == 1}
    names = []
    for image, name in zip(images, plain, strict=True):
        if plain.count(name) > 1:
            name = f"{name}_{image.suffix[1:]}"
            while name.lower() in taken:
                name += "_"
            taken.add(name.lower())
        names.append(name)
    return names


def predict_batch(work: Work, writers: Executor, batch: Sequence[int]) -> list[Found]:
    """Take some pictures all the way: read them, compute their classes, and hand them to be written."""
    found = [read(work, index) for index in batch]
    readable = [one for one in found if not one.problem]
    if readable:
        images, boxes = [chw(one.image) for one in readable], [one.box for one in readable]
        logits = picture_logits(work.network, images, boxes, work.window, work.args.overlap)
        for one, whole in zip(readable, logits, strict=True):
            if work.args.probabilities:
                one.probabilities = whole[0].softmax(0).half().cpu().numpy()
            one.ids = ids_of(work, [(0, 0, whole[0])], whole.shape[2:])
            count(work, one)
            one.saved = writers.submit(save, work, one)
    return found


def read(work: Work, index: int) -> Found:
    """Read one picture, decoding it once if that will do."""
    path, in_channels = work.files[index], work.info.architecture["in_channels"]
    try:
        resize = "crop" if work.window else work.info.resize
        image, box, picture = load_fitted(path, in_channels, tuple(work.info.image_size), resize)
        if not work.args.overlay:
            picture = None
        elif picture.shape[:2] != (
            box.original_height,
            box.original_width,
        ):  # a JPEG that was decoded smaller
            picture = read_image(path, in_channels)
        return Found(index, image=image, box=box, picture=picture)
    except (ValueError, OSError) as error:
        return Found(index, problem=str(error))


def predict_large(work: Work, writers: Executor, index: int) -> Found:
    """Likewise for a picture whose logits are never in memory all at once, nor its pixels beside its mask."""
    found, path = Found(index), work.files[index]
    try:
        with LargePicture(path, work.info.architecture["in_channels"]) as picture:
            if work.args.overlay:
                found.picture = picture.reduced(DRAWN)
            if work.window:
                found.ids = ids_of(work, windows(work, picture), picture.size)
            else:
                found.image, found.box = picture.fitted(work.info.image_size, work.info.resize)
        if not work.window:
            logits = work.network.logits(chw(found.image)[None])
            found.ids = ids_of(work, restored_strips(logits, found.box), picture.size)
        count(work, found)
    except (ValueError, OSError) as error:
        return Found(index, problem=str(error))
    if work.args.probabilities:
        found.problem = f"{path}: too large for probabilities, which were not written; its mask was"
    found.saved = writers.submit(save, work, found)
    return found


def windows(work: Work, picture: LargePicture) -> Iterator[tuple[int, int, Tensor]]:
    """Logits of a large picture, block by block."""
    return sliding_blocks(
        work.network.logits,
        lambda *rows: chw(picture.rows(*rows)),
        picture.size,
        work.window,
        work.args.overlap,
        work.args.batch_size,
    )


def ids_of(work: Work, blocks: Iterable[tuple[int, int, Tensor]], size: Sequence[int]) -> np.ndarray:
    """Class ids (H, W) of logits that come in blocks: (top, left, logits (num_classes, rows, columns))."""
    threshold, ids = work.args.threshold, None
    for top, left, block in blocks:
        found = predicted_ids(block[None]) if threshold is None else above(block[None], threshold)
        if ids is None:
            ids = torch.empty(*size, dtype=found.dtype)
        ids[top : top + found.shape[1], left : left + found.shape[2]] = found[0]
    return ids.numpy()


def above(logits: Tensor, threshold: float) -> Tensor:
    """Class 1 where its probability is at least `threshold`; logits (N, 2, H, W)."""
    return (logits.softmax(1)[:, 1] >= threshold).to(torch.uint8)


def count(work: Work, found: Found) -> None:
    """Count the pixels of each class and, where the truth is given, compare with it.

    Raises:
        ValueError: the mask is no truth for this picture any more.
    """
    ids, step = torch.from_numpy(found.ids), max(1, STRIP // found.ids.shape[1])
    counts = sum(torch.bincount(part.flatten(), minlength=work.classes) for part in ids.split(step))
    found.shares = (counts / ids.numel()).tolist()
    if work.truths:
        found.matrix = ConfusionMatrix(work.classes, work.info.ignore_index)
        with LargeMask(work.truths[found.index], work.encoding.as_colours) as truth:
            for top, raw in truth.strips():
                target = torch.from_numpy(work.encoding.encode(raw))
                found.matrix.update(ids[top : top + len(raw)], target)
        found.matrix.join()


def row_of(found: Found, class_names: Sequence[str]) -> dict[str, float]:
    """The columns of summary.csv, and of scores.csv where there is a truth."""
    row = dict(zip(class_names, found.shares, strict=True))
    if found.matrix:
        scores = found.matrix.scores()
        row |= {name: getattr(scores, name) for name in SCORES}
    return row


def save(work: Work, found: Found) -> None:
    """Write one picture's mask, and its overlay and probabilities where asked for; then forget them."""
    info = work.info

    def place(folder: str, ending: str) -> Path:
        path = Path(work.args.output) / folder / f"{work.names[found.index]}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    if work.args.encoding == "source":
        mask = source_mask(found.ids, work.encoding)
    else:
        mask = visualize.mask_image(found.ids, info.palette)
    write_image(place("masks", ".png"), mask, compress_level=1)
    if found.picture is not None:
        ids = resize_mask(found.ids, found.picture.shape[:2])
        blended = visualize.overlay(found.picture, ids, info.palette)
        drawn = visualize.with_legend(blended, info.class_names, info.palette)
        write_image(place("overlays", ".png"), drawn, compress_level=1)
    if found.probabilities is not None:
        write_atomic(
            place("probabilities", ".npz"),
            lambda file: np.savez_compressed(file, probabilities=found.probabilities),
        )
    found.image = found.picture = found.ids = found.probabilities = None


def source_mask(ids: np.ndarray, encoding: Encoding) -> Image.Image:
    """The mask in the training masks' own encoding, made in strips: a look-up takes 8 bytes a pixel."""
    step = max(1, STRIP // ids.shape[1])
    mask = encoding.decode(ids[:step])
    if len(ids) > step:
        first, mask = mask, Image.new(mask.mode, ids.shape[::-1])
        if first.mode == "P":
            mask.putpalette(first.getpalette())
        for top in range(0, len(ids), step):
            mask.paste(encoding.decode(ids[top : top + step]), (0, top))
    return mask


def wait_for(saved: Future) -> None:
    """Wait until a picture is written.

    Raises:
        Fail: the disk is full or cannot be written.
    """
    try:
        saved.result()
    except OSError as error:
        raise Fail(f"predictions cannot be written: {error}. What was written before is whole", 1) from error


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV of the rows, four digits a number."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{v:.6f}" if isinstance(v, float) else v for name, v in row.items()})
    write_text(path, text.getvalue())


def print_shares(rows: list[dict[str, Any]], class_names: Sequence[str]) -> None:
    """Each class's share of all pictures, and in how many of them it occurs."""
    table = []
    for name in class_names:
        values = [row[name] for row in rows]
        table.append(
            ["  " + name, f"{100 * sum(values) / max(1, len(values)):.2f} %", str(sum(v > 0 for v in values))]
        )
    print(format_table(["  class", "share", "pictures"], table))


def print_scores(
    output: Path, rows: list[dict[str, Any]], total: ConfusionMatrix, class_names: Sequence[str]
) -> None:
    """Write scores.csv, worst picture first, and print the table of the whole set."""
    scored = [{"picture": row["picture"], **{name: row[name] for name in SCORES}} for row in rows]
    write_rows(output / "scores.csv", sorted(scored, key=lambda row: row["mean_iou"]))
    scores = total.scores()
    print(
        f"against the truth: mean IoU {format_score(scores.mean_iou)}, "
        f"mean Dice {format_score(scores.mean_dice)}, pixel accuracy {format_score(scores.pixel_accuracy)}"
    )
    print(class_table(class_names, scores))


if __name__ == "__main__":
    assert PARSED is not None
    end_with(lambda: main(PARSED.settings))
