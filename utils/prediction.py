"""From image files to mask files: what predict.py does with each image, and `segment` for other code.

One of two modules of `utils` that import other packages (with evaluation.py): it is the path through
datasets, models and metrics that both predict.py and a user's own code take.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from datasets import Box, Encoding, fit, read_image
from datasets.fitting import resize_mask
from datasets.large import LargeImage, LargeMask, read_size
from datasets.reading import load_fitted
from metrics import ConfusionMatrix, predicted_ids
from models import prepare_for_inference
from utils import visualize
from utils.checkpoint import flush_to_disk, write_atomic, write_image
from utils.device import keep_freed_memory, memory_format, to_device
from utils.inference import Block, Predictor, image_logits, join_blocks, restored_strips, sliding_blocks

SCORES = ("mean_iou", "mean_dice", "pixel_accuracy")  # of an image whose ground truth is given
LARGE = 2**26  # values in an image's logits, of four classes at least, from which it is predicted in strips
OVERLAY_SIDE = 4096  # pixels of the longer side of such an image's overlay
STRIP = 2**22  # pixels of a mask that are processed together


def segment(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """Return the class ids of one image at its own size.

    Args:
        model: from `models.load_model`; it computes on the device where the model is.
        image: uint8 (H, W, C) with the channels that the model was trained on, as `datasets.read_image`
            returns it.

    Returns:
        uint8 (H, W), int16 above 256 classes.

    Raises:
        ValueError: `model` or `image` is something else, or `image` is empty.
    """
    if not hasattr(model, "info"):
        raise ValueError(
            f"segment needs a model from models.load_model; got a {type(model).__name__} without info. "
            "Load a run's best.pt, which knows how the training images were prepared."
        )
    channels = model.info.architecture["in_channels"]
    got = f"{getattr(image, 'dtype', '')} {getattr(image, 'shape', '')}".strip()
    fits = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size
    if not fits or image.shape[2:] != (channels,):
        raise ValueError(
            f"segment needs a uint8 array (H, W, {channels}); got {type(image).__name__} {got}. "
            "datasets.read_image returns one from a file."
        )
    info = model.info
    layout = memory_format(True, next(model.parameters()).device)
    predictor = Predictor(model, mean=info.mean, std=info.std, memory_format=layout)
    fitted, box = fit(image, info.image_size, info.resize)
    window = info.image_size if info.resize == "crop" else None
    logits = next(image_logits(predictor, [chw(fitted)], [box], window))
    return predicted_ids(logits)[0].cpu().numpy()


@dataclass(frozen=True)
class Options:
    """Options of a prediction: fields of predict.py's Args."""

    output: Path
    window: tuple[int, int] | None  # height and width of a window that slides over each image
    overlap: float
    threshold: float | None
    batch_size: int
    num_workers: int
    source_encoding: bool  # masks as the training masks were encoded, instead of class ids with a palette
    overlay: bool
    probabilities: bool


@dataclass(eq=False)
class PredictedImage:
    """An image to predict, and its results."""

    path: Path
    name: str  # of what is written, without ending
    target: Path | None = None  # ground truth mask
    problem: str = ""  # error message; empty if everything was written
    fractions: dict[str, float] | None = None  # of its pixels by class; None where nothing was written
    scores: dict[str, float] | None = None  # SCORES, against the ground truth
    matrix: ConfusionMatrix | None = None  # until it is merged: 8 MiB for 1000 classes


@dataclass(frozen=True)
class Job:
    """All images, and what is the same for each."""

    options: Options
    info: Any  # what the checkpoint knows
    predictor: Predictor
    encoding: Encoding  # of the training masks
    images: list[PredictedImage]
    target_encoding: Encoding | None = None  # of the ground truth
    written: list[Path] = field(default_factory=list)


def predict_all(job: Job) -> ConfusionMatrix | None:
    """Predict and write every image; each thread reads, predicts and writes its own images.

    On a CPU each thread has its share of the cores, so that none waits for another at every layer. Large
    images come last, one by one, on all cores.

    Returns:
        The confusion matrix of all images if the ground truth is given.

    Raises:
        OSError: the output cannot be written.
    """
    options, images, classes = job.options, job.images, len(job.info.class_names)
    large = [image for image in images if is_large(image.path, classes)]
    small = [image for image in images if image not in large]
    if not large:  # otherwise memory matters more than time
        keep_freed_memory()
    threads = torch.get_num_threads()
    workers = min(options.num_workers, len(images))
    if job.predictor.device.type == "cpu":
        workers = min(workers, threads)
    pool = ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),)
    )

    def one_by_one() -> Iterator[PredictedImage]:
        parts = batches(small, options.batch_size, 2 * workers)
        yield from chain.from_iterable(pool.map(partial(predict_batch, job), parts))
        torch.set_num_threads(threads)
        yield from (predict_large(job, image) for image in large)

    scored = any(image.target for image in images)
    total = ConfusionMatrix(classes, job.info.ignore_index) if scored else None
    with pool, tqdm(total=len(images), unit="img", leave=False, disable=not sys.stderr.isatty()) as bar:
        for image in one_by_one():
            if image.matrix:
                total.merge(image.matrix)
                image.matrix = None
            bar.update()
            if image.problem:  # printed at once, and again at the end
                print(f"problem: {image.problem}", file=sys.stderr)
    flush_to_disk(job.written)
    return total


def is_large(path: Path, classes: int) -> bool:
    """Return whether an image is predicted in strips; an unreadable file is reported when it is read."""
    try:
        height, width = read_size(path, upright=False)
    except (ValueError, OSError):
        return False
    return height * width * max(4, classes) > LARGE


def batches(images: list[PredictedImage], size: int, parts: int) -> Iterator[list[PredictedImage]]:
    """Yield `size` images at a time, fewer towards the end, so that all threads end together."""
    while images:
        take = max(1, min(size, len(images) // parts))
        yield images[:take]
        images = images[take:]


def predict_batch(job: Job, batch: list[PredictedImage]) -> list[PredictedImage]:
    """Read some images, compute their classes, and write the results."""
    options, pin = job.options, job.predictor.device.type == "cuda"
    loaded = []
    for image in batch:
        try:
            loaded.append((image, *read_for_network(job, image.path)))
        except (ValueError, OSError) as error:
            image.problem = str(error)
    if loaded:
        images, pixels, boxes, canvases = zip(*loaded, strict=True)
        tensors = [chw(array).pin_memory() if pin else chw(array) for array in pixels]
        each = image_logits(job.predictor, tensors, boxes, options.window, options.overlap)
        for image, canvas, (logits,) in zip(images, canvases, each, strict=True):
            probabilities = logits.softmax(0).half().cpu().numpy() if options.probabilities else None
            ids = ids_of(job, [(0, 0, logits)], logits.shape[1:])
            count(job, image, ids)
            save(job, image.name, ids, canvas, probabilities)
    return batch


def read_for_network(job: Job, path: Path) -> tuple[np.ndarray, Box, np.ndarray | None]:
    """Return an image as the network sees it, its region in that, and the image that is drawn on."""
    channels = job.info.architecture["in_channels"]
    resize = "crop" if job.options.window else job.info.resize
    max_value = getattr(job.info, "max_value", None)  # early checkpoints have none
    fitted, box, whole = load_fitted(path, channels, job.info.image_size, resize, max_value)
    if not job.options.overlay:
        return fitted, box, None
    if whole.shape[:2] != (box.original_height, box.original_width):  # a JPEG that was decoded smaller
        whole = read_image(path, channels, max_value)
    return fitted, box, whole


def predict_large(job: Job, image: PredictedImage) -> PredictedImage:
    """Predict an image whose logits are never in memory at once; the decoded image is read in strips."""
    options, predictor = job.options, job.predictor
    try:
        max_value = getattr(job.info, "max_value", None)
        with LargeImage(image.path, job.info.architecture["in_channels"], max_value) as large:
            canvas = large.reduced(OVERLAY_SIDE) if options.overlay else None
            if options.window:
                batch = 1 if predictor.device.type == "cpu" else options.batch_size  # a CPU gains nothing

                def read(top: int, bottom: int) -> Tensor:
                    return to_device(chw(large.rows(top, bottom)), predictor.device)

                window, overlap = options.window, options.overlap
                blocks = sliding_blocks(predictor.logits, read, large.size, window, overlap, batch)
            else:
                fitted, box = large.fitted(job.info.image_size, job.info.resize)
                blocks = restored_strips(predictor.logits(chw(fitted)[None]), box)
            ids = ids_of(job, blocks, large.size)
    except (ValueError, OSError) as error:
        image.problem = str(error)
        return image
    count(job, image, ids)
    save(job, image.name, ids, canvas, None)
    if options.probabilities:
        image.problem = f"{image.path}: too large for probabilities; only its mask was written"
    return image


def ids_of(job: Job, blocks: Iterable[Block], size: Sequence[int]) -> np.ndarray:
    """Return the class ids (H, W) of logits that come in blocks (num_classes, rows, columns)."""
    threshold = job.options.threshold

    def ids(block: Tensor) -> Tensor:
        if threshold is None:
            return predicted_ids(block[None])[0].cpu()
        return (block.softmax(0)[1] >= threshold).to(torch.uint8).cpu()

    return join_blocks(((top, left, ids(block)) for top, left, block in blocks), size).numpy()


def count(job: Job, image: PredictedImage, ids: np.ndarray) -> None:
    """Count the pixels of each class, and compare them with the ground truth if it is given."""
    names, preds = job.info.class_names, torch.from_numpy(ids)
    parts = preds.split(max(1, STRIP // ids.shape[1]))
    counts = sum(torch.bincount(part.flatten(), minlength=len(names)) for part in parts)
    image.fractions = dict(zip(names, (counts / ids.size).tolist(), strict=True))
    if image.target:
        encoding = job.target_encoding or job.encoding
        image.matrix = ConfusionMatrix(len(names), job.info.ignore_index)
        with LargeMask(image.target, encoding.as_colours) as target:
            for top, raw in target.strips():
                masks = torch.from_numpy(encoding.encode(raw))
                image.matrix.update(preds[top : top + len(raw)], masks)
        image.matrix.join()
        scores = image.matrix.scores()
        image.scores = {name: getattr(scores, name) for name in SCORES}


def save(
    job: Job, name: str, ids: np.ndarray, canvas: np.ndarray | None, probabilities: np.ndarray | None
) -> None:
    """Write a mask (H, W), its overlay on an image (h, w, C), and float16 probabilities (classes, H, W)."""
    info, output = job.info, job.options.output
    if (output / f"masks/{name}.png").exists():  # what was made beside it is replaced too
        (output / f"overlays/{name}.png").unlink(missing_ok=True)
        (output / f"probabilities/{name}.npz").unlink(missing_ok=True)

    def make_path(file: str) -> Path:
        path = output / file
        path.parent.mkdir(parents=True, exist_ok=True)
        job.written.append(path)
        return path

    source = job.options.source_encoding
    mask = source_mask(ids, job.encoding) if source else visualize.mask_image(ids, info.palette)
    write_image(make_path(f"masks/{name}.png"), mask, sync=False, compress_level=1)
    if canvas is not None:
        blended = visualize.overlay(canvas, resize_mask(ids, canvas.shape[:2]), info.palette)
        drawn = visualize.with_legend(blended, info.class_names, info.palette)
        write_image(make_path(f"overlays/{name}.png"), drawn, sync=False, compress_level=1)
    if probabilities is not None:
        write = partial(np.savez_compressed, probabilities=probabilities)
        write_atomic(make_path(f"probabilities/{name}.npz"), write, sync=False)


def source_mask(ids: np.ndarray, encoding: Encoding) -> Image.Image:
    """Return the mask in the training masks' encoding, made in strips: a look-up takes 8 bytes per pixel."""
    nearest = Image.Resampling.NEAREST
    mask = encoding.decode(ids[:1]).resize(ids.shape[::-1], nearest)  # for its mode and palette
    step = max(1, STRIP // ids.shape[1])
    for top in range(0, len(ids), step):
        mask.paste(encoding.decode(ids[top : top + step]), (0, top))
    return mask


def chw(image: np.ndarray) -> Tensor:
    """Return uint8 (H, W, C) as a tensor (C, H, W), which shares its memory if that is writable."""
    return torch.from_numpy(image if image.flags.writeable else image.copy()).permute(2, 0, 1)


def output_names(images: Sequence[Path], source: Path) -> list[str]:
    """Return a different name without ending for each image, with the input's sub-folders.

    Images that differ in their ending alone keep it: a.jpg and a.png become a_jpg and a_png.
    """
    base = source if source.is_dir() else Path(os.path.commonpath([image.parent for image in images]))
    names = [image.relative_to(base).with_suffix("").as_posix() for image in images]
    counts = Counter(map(str.lower, names))
    used = {name for name, number in counts.items() if number == 1}
    for at, (image, name) in enumerate(zip(images, names, strict=True)):
        if counts[name.lower()] > 1:
            name += f"_{image.suffix[1:]}"
            while name.lower() in used:
                name += "_"
            used.add(name.lower())
            names[at] = name
    return names


def load_predictor(
    model: nn.Module, device: torch.device, dtype: torch.dtype, tta: str, batch_size: int
) -> Predictor:
    """Return a predictor of a model from `models.load_model`."""
    layout = memory_format(True, device)
    channels_last = layout == torch.channels_last
    prepared = prepare_for_inference(model, device=device, dtype=dtype, channels_last=channels_last)
    options = {"mean": model.info.mean, "std": model.info.std, "memory_format": layout}
    return Predictor(prepared, **options, tta=tta, batch_size=batch_size)
