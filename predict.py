"""Predict masks for pictures: edit class Args, then run `python predict.py`. Every field is also a flag."""

import os
import sys
from dataclasses import dataclass
from typing import Literal

from config import Config, settings
from utils.cli import Fail, coerce, end_with, mendable, parse


@settings
class Args:
    """What to predict, with which checkpoint, and what to write."""

    # fmt: off

    # What
    weights: str | None = None  # a run's folder, best.pt or last.pt; None: the newest best.pt in runs/
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
        """Bring `window` to (height, width), take ~ as the home folder, and refuse what cannot be."""
        for name in ("weights", "input", "truth", "output", "export"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.path.expanduser(path))
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


if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag are answered at once
    PARSED = end_with(lambda: parse(Args, sys.argv[1:], __doc__))

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from datasets import Encoding, find_images, left_out, pair_targets, read_image
from datasets.large import LargeImage, LargeMask, read_size
from datasets.reading import load_fitted
from datasets.transforms import Box, fit, resize_mask
from metrics import ConfusionMatrix, predicted_ids
from models import load_model
from utils import visualize
from utils.checkpoint import write_atomic, write_image
from utils.device import describe_device, keep_freed_memory, pick_device, pick_precision
from utils.inference import Network, joined, picture_logits, restored_strips, sliding_blocks
from utils.run import class_table, format_table, mean_scores, newest_weights, try_output, write_log

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

    Raises:
        ValueError: `model` or `picture` is something else, or `picture` is empty.
    """
    if not hasattr(model, "info"):
        raise ValueError(
            f"segment takes a model of models.load_model; got a {type(model).__name__} without info. "
            "Load a run's best.pt, which knows how the pictures of its training were prepared."
        )
    channels = model.info.architecture["in_channels"]
    got = f"{getattr(picture, 'dtype', '')} {getattr(picture, 'shape', '')}".strip()
    fits = isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.size
    if not fits or picture.shape[2:] != (channels,):
        raise ValueError(
            f"segment takes a uint8 array of (H, W, {channels}); got {type(picture).__name__} {got}. "
            "datasets.read_image gives one of a file."
        )
    info, device = model.info, next(model.parameters()).device
    network = Network(model, mean=info.mean, std=info.std, device=device, precision=torch.float32, fold=False)
    image, box = fit(picture, info.image_size, info.resize)
    logits = picture_logits(network, [chw(image)], [box], window_of(info, None))
    return predicted_ids(next(logits))[0].cpu().numpy()


@dataclass(eq=False)
class Picture:
    """A picture to predict, and what came of it."""

    path: Path
    name: str  # of what is written, without ending
    truth: Path | None = None
    problem: str = ""  # why it, or something of it, is not written
    shares: dict[str, float] | None = None  # of each class; None where nothing is written
    scores: dict[str, float] | None = None  # of SCORES, against the truth
    matrix: ConfusionMatrix | None = None  # likewise, until it is merged: 8 MiB of 1000 classes


@dataclass(frozen=True)
class Work:
    """All pictures, and what is the same for each."""

    args: Args
    info: Any  # what the checkpoint knows
    network: Network
    window: tuple[int, int] | None  # that slides over each picture
    encoding: Encoding  # of the training masks
    pictures: list[Picture]


def main(args: Args) -> None:
    """Predict as `args` says.

    Raises:
        Fail: for all that the user can mend, before anything is written; code 1 where pictures were skipped.
    """
    with mendable():
        weights = Path(args.weights) if args.weights else newest_weights(default_runs())
        weights = weights / "best.pt" if weights.is_dir() else weights
        if args.export:
            return write_network(weights, Path(args.export))
        work = prepare(args, weights)
    started = time.perf_counter()
    try:
        total = predict_all(work)
    except OSError as error:  # the output's, or a truth's
        raise Fail(f"prediction cannot go on: {error}. What was written before is whole", 1) from error
    try:
        report(work, total, time.perf_counter() - started)
    except OSError as error:
        raise Fail(f"the tables cannot be written: {error}. The masks are whole", 1) from error
    problems = [one.problem for one in work.pictures if one.problem]
    if problems:
        rest = "" if len(problems) == len(work.pictures) else ", the others are written"
        heading = f"{len(problems)} of {len(work.pictures)} pictures had problems{rest}:"
        raise Fail("\n  ".join([heading, *problems]), 1)


def default_runs() -> Path:
    """The folder of runs that config.py names; its other settings may be half edited.

    Raises:
        Fail: it names none.
    """
    return Path(os.path.expanduser(coerce("output_dir", Config.output_dir, str)))


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
    for file in map(str, files):  # summary.csv names them all, and is UTF-8
        if (shown := file.encode("utf-8", "backslashreplace").decode()) != file:
            raise ValueError(f"{shown}: its name is no UTF-8: rename it")
    encoding = Encoding.from_dict(info.encoding)
    if args.encoding == "source":
        encoding.decode(np.arange(len(info.class_names))[None])  # refuses what no mask could be written as
    no_truths = [None] * len(files)
    pairing = getattr(info, "pairing", None)
    truths = no_truths
    if args.truth:
        truths = pair_targets(files, args.truth, info.mask_suffix, encoding, pairing)
    if others := left_out(args.input, args.recursive):
        print(f"left out {others}: not an ending that is read")
    output = Path(args.output)
    try_output(output, "output")
    if (output / SUMMARY).exists():
        print(f"{output} holds earlier predictions: those of the same pictures are replaced")
    elif (output / "masks").exists():
        raise FileExistsError(f"{output / 'masks'} exists and is not from a prediction. Give another output")
    network = Network(model, mean=info.mean, std=info.std, device=device, precision=precision, tta=args.tta)
    print(
        f"{weights}: {info.architecture['name']}, {len(info.class_names)} classes, epoch {info.epoch}; "
        f"{len(files)} pictures; {describe_device(device)}, {str(precision).removeprefix('torch.')}"
    )
    pictures = list(map(Picture, files, output_names(files, Path(args.input)), truths))
    return Work(args, info, network, window_of(info, args.window), encoding, pictures)


def predict_all(work: Work) -> ConfusionMatrix | None:
    """Predict and write every picture; each thread takes its own from file to file.

    On a CPU each has its share of the cores, so that none waits for another at every layer. Large pictures
    come last, one by one, on all cores.

    Returns:
        The confusion matrix of all where the truth is given.

    Raises:
        OSError: the output cannot be written.
    """
    args, pictures, classes = work.args, work.pictures, len(work.info.class_names)
    large = [one for one in pictures if is_large(one.path, classes)]
    small = [one for one in pictures if one not in large]
    if not large:  # else memory matters more than time
        keep_freed_memory()
    threads = torch.get_num_threads()
    workers = min(args.num_workers, len(pictures))
    if work.network.device.type == "cpu":
        workers = min(workers, threads)
    share = max(1, threads // workers)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,))

    def one_by_one() -> Iterator[Picture]:
        parts = batches(small, args.batch_size, 2 * workers)
        yield from chain.from_iterable(pool.map(partial(predict_batch, work), parts))
        torch.set_num_threads(threads)
        yield from (predict_large(work, one) for one in large)

    total = ConfusionMatrix(classes, work.info.ignore_index) if args.truth else None
    with pool, tqdm(total=len(pictures), unit="img", leave=False, disable=not sys.stderr.isatty()) as bar:
        for one in one_by_one():
            if one.matrix:
                total.merge(one.matrix)
                one.matrix = None
            bar.update()
            if one.problem:  # said at once, and again at the end
                print(f"problem: {one.problem}", file=sys.stderr)
    return total


def is_large(path: Path, classes: int) -> bool:
    """Whether a picture is to be taken in strips; what is no picture is told when it is read."""
    try:
        height, width = read_size(path, upright=False)
    except (ValueError, OSError):
        return False
    return height * width * max(4, classes) > LARGE


def batches(pictures: list[Picture], size: int, parts: int) -> Iterator[list[Picture]]:
    """`size` at a time, towards the end fewer, so that all threads end together."""
    while pictures:
        take = max(1, min(size, len(pictures) // parts))
        yield pictures[:take]
        pictures = pictures[take:]


def predict_batch(work: Work, batch: list[Picture]) -> list[Picture]:
    """Take some pictures all the way: read them, compute their classes, and write them."""
    read = []
    for one in batch:
        try:
            read.append((one, *read_picture(work, one.path)))
        except (ValueError, OSError) as error:
            one.problem = str(error)
    if read:
        pictures, images, boxes, canvases = zip(*read, strict=True)
        each = picture_logits(work.network, list(map(chw, images)), boxes, work.window, work.args.overlap)
        for one, canvas, (logits,) in zip(pictures, canvases, each, strict=True):
            probabilities = logits.softmax(0).half().cpu().numpy() if work.args.probabilities else None
            ids = ids_of(work, [(0, 0, logits)], logits.shape[1:])
            count(work, one, ids)
            save(work, one.name, ids, canvas, probabilities)
    return batch


def read_picture(work: Work, path: Path) -> tuple[np.ndarray, Box, np.ndarray | None]:
    """A picture as the network sees it, its place in that, and as it is drawn on."""
    max_value = getattr(work.info, "max_value", None)
    channels, resize = work.info.architecture["in_channels"], "crop" if work.window else work.info.resize
    image, box, picture = load_fitted(path, channels, work.info.image_size, resize, max_value)
    if not work.args.overlay:
        return image, box, None
    if picture.shape[:2] != (box.original_height, box.original_width):  # a JPEG that was decoded smaller
        picture = read_image(path, channels, max_value)
    return image, box, picture


def predict_large(work: Work, one: Picture) -> Picture:
    """Likewise for one whose logits are never in memory all at once; its pixels are decoded, not an array."""
    args, network = work.args, work.network
    try:
        max_value = getattr(work.info, "max_value", None)
        with LargeImage(one.path, work.info.architecture["in_channels"], max_value) as picture:
            canvas = picture.reduced(DRAWN) if args.overlay else None
            if work.window:
                batch = 1 if network.device.type == "cpu" else args.batch_size  # a CPU gains nothing by more

                def rows(top: int, bottom: int) -> Tensor:
                    return chw(picture.rows(top, bottom))

                blocks = sliding_blocks(network.logits, rows, picture.size, work.window, args.overlap, batch)
            else:
                image, box = picture.fitted(work.info.image_size, work.info.resize)
                blocks = restored_strips(network.logits(chw(image)[None]), box)
            ids = ids_of(work, blocks, picture.size)
    except (ValueError, OSError) as error:
        one.problem = str(error)
        return one
    count(work, one, ids)
    save(work, one.name, ids, canvas, None)
    if args.probabilities:
        one.problem = f"{one.path}: too large for probabilities, which were not written; its mask was"
    return one


def ids_of(work: Work, blocks: Iterable[tuple[int, int, Tensor]], size: Sequence[int]) -> np.ndarray:
    """Class ids (H, W) of logits that come in blocks: (top, left, logits (num_classes, rows, columns))."""
    threshold = work.args.threshold

    def ids(block: Tensor) -> Tensor:
        if threshold is None:
            return predicted_ids(block[None])[0].cpu()
        return (block.softmax(0)[1] >= threshold).to(torch.uint8).cpu()

    return joined(((top, left, ids(block)) for top, left, block in blocks), size).numpy()


def count(work: Work, one: Picture, ids: np.ndarray) -> None:
    """Count the pixels of each class, and compare them with the truth where it is given."""
    names, preds = work.info.class_names, torch.from_numpy(ids)
    parts = preds.split(max(1, STRIP // ids.shape[1]))
    counts = sum(torch.bincount(part.flatten(), minlength=len(names)) for part in parts)
    one.shares = dict(zip(names, (counts / ids.size).tolist(), strict=True))
    if one.truth:
        one.matrix = ConfusionMatrix(len(names), work.info.ignore_index)
        with LargeMask(one.truth, work.encoding.as_colours) as truth:
            for top, raw in truth.strips():
                target = torch.from_numpy(work.encoding.encode(raw))
                one.matrix.update(preds[top : top + len(raw)], target)
        one.matrix.join()
        scores = one.matrix.scores()
        one.scores = {name: getattr(scores, name) for name in SCORES}


def save(
    work: Work, name: str, ids: np.ndarray, canvas: np.ndarray | None, probabilities: np.ndarray | None
) -> None:
    """Write a mask (H, W), its overlay on a picture (h, w, C), and float16 probabilities (classes, H, W)."""
    info, base = work.info, Path(work.args.output)
    if (base / f"masks/{name}.png").exists():  # with it goes what was made beside it
        (base / f"overlays/{name}.png").unlink(missing_ok=True)
        (base / f"probabilities/{name}.npz").unlink(missing_ok=True)

    def place(file: str) -> Path:
        (base / file).parent.mkdir(parents=True, exist_ok=True)
        return base / file

    source = work.args.encoding == "source"
    mask = source_mask(ids, work.encoding) if source else visualize.mask_image(ids, info.palette)
    write_image(place(f"masks/{name}.png"), mask, compress_level=1)
    if canvas is not None:
        blended = visualize.overlay(canvas, resize_mask(ids, canvas.shape[:2]), info.palette)
        drawn = visualize.with_legend(blended, info.class_names, info.palette)
        write_image(place(f"overlays/{name}.png"), drawn, compress_level=1)
    if probabilities is not None:
        write = partial(np.savez_compressed, probabilities=probabilities)
        write_atomic(place(f"probabilities/{name}.npz"), write)


def source_mask(ids: np.ndarray, encoding: Encoding) -> Image.Image:
    """The mask in the training masks' own encoding, made in strips: a look-up takes 8 bytes a pixel."""
    nearest = Image.Resampling.NEAREST
    mask = encoding.decode(ids[:1]).resize(ids.shape[::-1], nearest)  # for its mode and palette
    step = max(1, STRIP // ids.shape[1])
    for top in range(0, len(ids), step):
        mask.paste(encoding.decode(ids[top : top + step]), (0, top))
    return mask


def report(work: Work, total: ConfusionMatrix | None, seconds: float) -> None:
    """Write summary.csv and, where there is a truth, scores.csv; print each class's share and scores."""
    done = [one for one in work.pictures if one.shares]
    if not done:
        return
    output, names = Path(work.args.output), work.info.class_names
    if not total and (output / SUMMARY).exists():  # an earlier prediction's
        (output / "scores.csv").unlink(missing_ok=True)
    write_log(output / SUMMARY, [{"picture": str(one.path)} | one.shares for one in done])
    table = []
    for name in names:
        found = [one.shares[name] for one in done]
        share = f"{100 * sum(found) / len(found):.2f} %"
        table.append([f"  {name}", share, str(sum(value > 0 for value in found))])
    print(format_table(["  class", "share", "pictures"], table))
    if total:
        rows = [{"picture": str(one.path)} | one.scores for one in done]
        rows.sort(key=lambda row: (math.isnan(row["mean_iou"]), row["mean_iou"]))  # the worst first
        write_log(output / "scores.csv", rows)
        scores = total.scores()
        print(f"against the truth: {mean_scores(scores)}")
        print(class_table(names, scores))
        absent = [name for name, pixels in zip(names, total.counts.sum(1), strict=True) if not pixels]
        if absent:  # as where a truth of 0 and 255 meets a network that learned 0 and 1
            nowhere = f"{work.info.ignore_index} in it counts nowhere, as in training"
            print(f"the truth has no pixel of {', '.join(absent)}; {nowhere}")
    overlays = f", overlays to {output / 'overlays'}" if work.args.overlay else ""
    print(f"wrote {len(done)} masks to {output / 'masks'}{overlays}; {len(done) / seconds:.1f} pictures/s")


def window_of(info: Any, window: tuple[int, int] | None) -> tuple[int, int] | None:
    """The sliding window: the one asked for, the training windows' size for resize crop, or none."""
    return window or (tuple(info.image_size) if info.resize == "crop" else None)


def chw(image: np.ndarray) -> Tensor:
    """uint8 (H, W, C) as a tensor (C, H, W), which shares its memory where that may be written to."""
    return torch.from_numpy(image if image.flags.writeable else image.copy()).permute(2, 0, 1)


def output_names(images: Sequence[Path], source: Path) -> list[str]:
    """A name without ending for each picture, with the input's sub-folders; never the same for two.

    Pictures that differ in their ending alone keep it: a.jpg and a.png become a_jpg and a_png.
    """
    base = source if source.is_dir() else Path(os.path.commonpath([image.parent for image in images]))
    names = [image.relative_to(base).with_suffix("").as_posix() for image in images]
    counts = Counter(map(str.lower, names))
    taken = {name for name, count in counts.items() if count == 1}
    for at, (image, name) in enumerate(zip(images, names, strict=True)):
        if counts[name.lower()] > 1:
            name += f"_{image.suffix[1:]}"
            while name.lower() in taken:
                name += "_"
            taken.add(name.lower())
            names[at] = name
    return names


def write_network(weights: Path, path: Path) -> None:
    """Export the network of a checkpoint, and say how the file's logits differ from its own.

    Raises:
        ValueError: as `check_target` and `load_model`.
        OSError: likewise, or the file cannot be written.
    """
    from utils.export import SIZES, SMALLEST, check_target, export  # slow to import

    check_target(path)
    model = load_model(weights)
    info = model.info
    about = {k: vars(info)[k] for k in ("class_names", "image_size", "resize", "palette", "epoch")}
    difference = export(model, path, mean=info.mean, std=info.std, about=about)
    channels, classes = info.architecture["in_channels"], info.architecture["num_classes"]
    least = f", {SMALLEST} pixels a side or more" if path.suffix == ".pt2" else ""
    pictures = f"pictures uint8 (N, {channels}, H, W){least}, as read"
    print(f"wrote {path}: {pictures}, to logits (N, {classes}, H, W)")
    if difference is None:
        print("not run: install onnxruntime to have it compared with the network")
    else:
        sizes = ", ".join(" x ".join(map(str, size)) for size in SIZES)
        print(f"its logits differ from the network's by {difference:.1e} of the largest, over {sizes}")


if __name__ == "__main__":
    end_with(lambda: main(PARSED.settings))
