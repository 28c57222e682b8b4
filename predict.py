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
    batch_size: int = 8  # pictures, or windows, that are computed together
    num_workers: int = 2  # threads that read and write pictures beside the network
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from config import Config
from datasets import Encoding, find_images, pair_truth, read_image, read_mask
from datasets.large import LargePicture, count_pixels
from datasets.reading import load_image
from datasets.transforms import Box, fit, place, resize_mask
from metrics import ConfusionMatrix, predicted_ids
from models import load_model
from utils import visualize
from utils.checkpoint import write_atomic, write_image, write_text
from utils.device import describe_device, keep_freed_memory, pick_device, pick_precision
from utils.inference import Network, picture_logits, restored_strips, sliding_blocks
from utils.run import class_table, format_score, format_table, newest_weights, try_output

SUMMARY = "summary.csv"
LARGE = 2**28  # numbers in a picture's logits from which it is predicted strip by strip
DRAWN = 4096  # pixels of the longer side of such a picture's overlay


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


def main(args: Args) -> int:
    """Predict as `args` says; returns the number of pictures that could not be read.

    Raises:
        Fail: for all that the user can mend, before anything is written; code 1 where pictures were skipped.
    """
    with mendable():
        weights = Path(args.weights) if args.weights else newest_weights(Path(Config().output_dir))
        device = pick_device(args.device)
        if args.export:
            return write_network(weights, Path(args.export))
        model = load_model(weights, device)
        info = model.info
        num_classes = info.architecture["num_classes"]
        if args.threshold is not None and num_classes != 2:
            raise ValueError(f"threshold is for two classes; {weights} has {num_classes}. Leave it out")
        precision = pick_precision(args.amp or info.amp, device)
        files = find_images(args.input, args.recursive)
        encoding = Encoding.from_dict(info.encoding)
        truths = pair_truth(files, args.truth, info.mask_suffix, encoding) if args.truth else []
        output = Path(args.output)
        try_output(output)
        refuse_foreign_output(output)
    if not any(is_large(path, num_classes) for path in files):  # else memory matters more than time
        keep_freed_memory()
    network = Network(model, mean=info.mean, std=info.std, device=device, precision=precision, tta=args.tta)
    names = output_names(files, Path(args.input))
    print(
        f"{weights}: {info.architecture['name']}, {num_classes} classes, epoch {info.epoch}; "
        f"{len(files)} pictures; {describe_device(device)}, {str(precision).removeprefix('torch.')}"
    )
    total = ConfusionMatrix(num_classes, info.ignore_index)
    rows, failed, saving, started = [], [], [], time.perf_counter()
    with ThreadPoolExecutor(args.num_workers) as threads:
        reader = read_ahead(threads, files, 2 * args.batch_size, partial(read, args, info))
        for index, found in predictions(args, info, network, batches_of(reader, args.batch_size, failed)):
            if isinstance(found, Exception):
                note(found, failed)
                continue
            row = {"picture": str(files[index]), **shares(found.ids, info.class_names)}
            if truths:
                row |= score(found.ids, truths[index], encoding, info, total)
            rows.append(row)
            if found.large and args.probabilities:
                note(
                    f"{files[index]}: too large for probabilities, which were not written; its mask was",
                    failed,
                )
            saving.append(threads.submit(save, args, info, encoding, names[index], found))
            saving = wait_for(saving, keep=0 if found.large else 2 * args.batch_size)
            del found  # before the next is decoded
        wait_for(saving, keep=0)
    seconds = time.perf_counter() - started
    write_rows(output / SUMMARY, rows)
    print_shares(rows, info.class_names)
    if args.truth:
        print_scores(output, rows, total, info.class_names)
    print(
        f"wrote {len(rows)} masks to {output / 'masks'}"
        + (f", overlays to {output / 'overlays'}" if args.overlay else "")
        + f"; {len(rows) / seconds:.1f} pictures/s"
    )
    if failed:
        lines = "\n".join(f"  {message}" for message in failed)
        raise Fail(
            f"{len(failed)} of {len(files)} pictures had problems, the others are written:\n{lines}", 1
        )
    return 0


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


@dataclass
class Found:
    """A picture that was read, and what was made of it."""

    image: np.ndarray | None = None  # uint8 (h, w, C), as the network sees it
    box: Box | None = None
    picture: np.ndarray | None = None  # uint8 (H, W, C), to draw on; of a large one, reduced
    large: LargePicture | None = None
    ids: np.ndarray | None = None  # (H, W)
    probabilities: np.ndarray | None = None  # float16 (num_classes, H, W)


def is_large(path: Path, num_classes: int) -> bool:
    """Whether a picture is to be predicted strip by strip; what is no picture is told when it is read."""
    try:
        return count_pixels(path) * num_classes > LARGE
    except (ValueError, OSError):
        return False


def read(args: Args, info: Any, path: Path) -> Found | ValueError | OSError:
    """Read one picture, decoding it once if that will do; a large one is left for later, errors returned."""
    in_channels, image_size = info.architecture["in_channels"], tuple(info.image_size)
    resize = "crop" if window_of(info, args.window) else info.resize

    def content(size: tuple[int, int]) -> tuple[int, int]:
        box = place(size, image_size, resize)
        return box.height, box.width

    try:
        if is_large(path, info.architecture["num_classes"]):
            return Found(large=LargePicture(path, in_channels))
        picture, size, _ = load_image(path, in_channels, reduce_to=content)
        image, box = fit(picture, image_size, resize, size)
        if not args.overlay:
            return Found(image, box)
        if picture.shape[:2] != tuple(size):  # a JPEG that was decoded smaller
            picture = read_image(path, in_channels)
        return Found(image, box, picture)
    except (ValueError, OSError) as error:
        return error


def read_ahead(
    threads: ThreadPoolExecutor, files: Sequence[Path], ahead: int, read: Callable[[Path], Any]
) -> Iterator[tuple[int, Any]]:
    """Yield (index, what `read` returns) in order, `ahead` pictures being read by threads meanwhile."""
    pending: deque[Future] = deque()
    with tqdm(total=len(files), unit="img", leave=False, disable=not sys.stderr.isatty()) as bar:
        for index in range(len(files) + ahead):
            if index < len(files):
                pending.append(threads.submit(read, files[index]))
            if index >= ahead:
                yield index - ahead, pending.popleft().result()
                bar.update()


def batches_of(
    reader: Iterator[tuple[int, Found | ValueError | OSError]], batch_size: int, failed: list[str]
) -> Iterator[list[tuple[int, Found]]]:
    """Gather what was read into batches, large pictures alone; messages of what was not go to `failed`."""
    batch = []
    for index, found in reader:
        if isinstance(found, Exception):
            note(found, failed)
            continue
        if batch and (found.large or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append((index, found))
        if found.large:
            yield batch
            batch = []
    if batch:
        yield batch


def note(problem: Any, failed: list[str]) -> None:
    """Say at once what went wrong with a picture, and keep it for the end."""
    failed.append(str(problem))
    print(f"problem: {problem}", file=sys.stderr)


def predictions(
    args: Args, info: Any, network: Network, batches: Iterator[list[tuple[int, Found]]]
) -> Iterator[tuple[int, Found | ValueError | OSError]]:
    """Yield each picture with its class ids, in order; a large one that is broken inside gives its error."""
    window = window_of(info, args.window)
    decide = predicted_ids if args.threshold is None else partial(above, threshold=args.threshold)
    for batch in batches:
        if batch[0][1].large:
            index, found = batch.pop()
            try:
                with found.large as picture:
                    found.ids = large_ids(network, picture, decide, info, window, args.overlap)
                    found.picture = picture.reduced(DRAWN) if args.overlay else None
            except (ValueError, OSError) as error:
                found = error
            yield index, found
            continue
        images, boxes = [chw(found.image) for _, found in batch], [found.box for _, found in batch]
        logits = picture_logits(network, images, boxes, window, args.overlap)
        for (index, found), one in zip(batch, logits, strict=True):
            found.ids = decide(one)[0].cpu().numpy()
            if args.probabilities:
                found.probabilities = one[0].softmax(0).half().cpu().numpy()
            yield index, found


def large_ids(
    network: Network,
    picture: LargePicture,
    decide: Callable[[Tensor], Tensor],
    info: Any,
    window: tuple[int, int] | None,
    overlap: float,
) -> np.ndarray:
    """Class ids (H, W) of a picture whose logits are never in memory all at once."""
    if window:
        blocks = sliding_blocks(
            network.logits, lambda *rows: chw(picture.rows(*rows)), picture.size, window, overlap
        )
    else:
        image, box = picture.fitted(info.image_size, info.resize)
        blocks = restored_strips(network.logits(chw(image)[None]), box)
    ids = None
    for top, left, block in blocks:
        found = decide(block[None])[0].cpu().numpy()
        if ids is None:
            ids = np.empty(picture.size, found.dtype)
        ids[top : top + found.shape[0], left : left + found.shape[1]] = found
    return ids


def above(logits: Tensor, threshold: float) -> Tensor:
    """Class 1 where its probability is at least `threshold`; logits (N, 2, H, W)."""
    return (logits.softmax(1)[:, 1] >= threshold).to(torch.uint8)


def shares(ids: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """Each class's share of the picture's pixels, by name."""
    counts = torch.bincount(torch.from_numpy(ids).flatten(), minlength=len(class_names))
    return {name: count / ids.size for name, count in zip(class_names, counts.tolist(), strict=True)}


def score(
    ids: np.ndarray, truth: Path, encoding: Encoding, info: Any, total: ConfusionMatrix
) -> dict[str, float]:
    """Count a prediction against its mask, in `total` and alone; the columns of scores.csv."""
    own = ConfusionMatrix(len(info.class_names), info.ignore_index)
    with mendable():
        raw = read_mask(truth, encoding.as_colours)
        target = np.concatenate([encoding.encode(raw[at : at + 2048]) for at in range(0, len(raw), 2048)])
        if target.shape != ids.shape:
            size, other = (" x ".join(map(str, found.shape)) for found in (target, ids))
            raise ValueError(
                f"{truth} is {size}, its picture {other}. Give truth the masks of these pictures"
            )
        own.update(torch.from_numpy(ids), torch.from_numpy(target))
    total.merge(own)
    scores = own.scores()
    return {
        "mean_iou": scores.mean_iou,
        "mean_dice": scores.mean_dice,
        "pixel_accuracy": scores.pixel_accuracy,
    }


def save(args: Args, info: Any, encoding: Encoding, name: str, found: Found) -> None:
    """Write one picture's mask, and its overlay and probabilities where asked for."""
    output = Path(args.output)

    def place(folder: str, ending: str) -> Path:
        path = output / folder / f"{name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    mask = source_mask(found.ids, encoding) if args.encoding == "source" else None
    mask = mask or visualize.mask_image(found.ids, info.palette)
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


def source_mask(ids: np.ndarray, encoding: Encoding, step: int = 2048) -> Image.Image:
    """The mask in the training masks' own encoding, made in strips: a look-up takes 8 bytes a pixel."""
    strips = (encoding.decode(ids[top : top + step]) for top in range(0, len(ids), step))
    mask = next(strips)
    if mask.height < len(ids):
        first, mask = mask, Image.new(mask.mode, ids.shape[::-1])
        if first.mode == "P":
            mask.putpalette(first.getpalette())
        mask.paste(first, (0, 0))
        for number, strip in enumerate(strips, 1):
            mask.paste(strip, (0, number * step))
    return mask


def wait_for(saving: list[Future], keep: int) -> list[Future]:
    """Wait for the oldest writes until `keep` are left, so that memory stays bounded and errors are seen.

    Raises:
        Fail: the disk is full or cannot be written.
    """
    while len(saving) > keep:
        try:
            saving.pop(0).result()
        except OSError as error:
            raise Fail(
                f"predictions cannot be written: {error}. What was written before is whole", 1
            ) from error
    return saving


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
    scored = [
        {"picture": row["picture"], **{k: row[k] for k in ("mean_iou", "mean_dice", "pixel_accuracy")}}
        for row in rows
    ]
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
