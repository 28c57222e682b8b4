"""Predict masks for images: edit class Args, then run `python predict.py`. Every field is also a flag."""

import os
import signal
import sys
from typing import Literal

from config import Config, settings
from utils.cli import Fail, coerce, end_with, fixable, parse


@settings
class Args:
    """What to predict, with which checkpoint, and what to write."""

    # fmt: off

    # What
    weights: str | None = None  # a run's folder, best.pt or last.pt; None: the newest best.pt in runs/
    input: str = "mock_data/predict"  # an image, a folder of images, or a pattern such as "photos/*.jpg"
    recursive: bool = False  # include the images in the input's sub-folders
    truth: str | None = None  # folder of ground truth masks of the same names: score the predictions

    # How
    window: tuple[int, int] | int | None = None  # height and width of a window that slides over each image
    # at its own scale, for large images; None: as in training
    overlap: float = 0.25  # fraction of a window that it shares with its neighbor, 0 to 0.9
    tta: Literal["none", "flip", "multiscale"] = "none"  # average over the image and its mirror image, and
    # over three scales; slower, a little better
    threshold: float | None = None  # two classes: probability from which a pixel is class 1; None: 0.5
    batch_size: int = 4  # images, or windows, that are computed together
    num_workers: int | None = None  # threads that take images from file to mask; None: 2 on a CPU, whose
    # cores they share, up to 8 on a GPU
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda, cuda:1, mps
    amp: Literal["auto", "off", "tf32", "bf16", "fp16"] | None = None  # mixed precision; None: as in training

    # What to write
    output: str = "predictions"  # folder for masks/, overlays/ and summary.csv
    encoding: Literal["index", "source"] = "index"  # masks as class ids with a palette, or encoded as the
    # training masks were
    overlay: bool = True  # write each image with its classes over it and a legend
    probabilities: bool = False  # write each image's class probabilities, float16 (classes, height, width)
    export: str | None = None  # write the network to this file, .pt2 or .onnx, and predict nothing

    # fmt: on

    def __post_init__(self) -> None:
        """Make `window` a (height, width), expand ~ to the home folder, and refuse invalid values."""
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
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more; got {value}")
        if self.window and min(self.window) < 32:
            raise ValueError(f"window must be 32 pixels or more per side; got {self.window}")


if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag are answered at once
    PARSED = end_with(lambda: parse(Args, sys.argv[1:], __doc__))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import math
import time
from pathlib import Path

import numpy as np
import torch

from datasets import Encoding, find_images, left_out, pair_targets
from metrics import ConfusionMatrix
from models import fold_batch_norm, load_model
from utils.device import (
    available_cores,
    describe_device,
    is_out_of_memory,
    pick_device,
    pick_precision,
    set_backends,
)
from utils.prediction import (
    Job,
    Options,
    PredictedImage,
    load_predictor,
    output_names,
    predict_all,
    segment,
)
from utils.run_folder import newest_weights, try_output
from utils.tables import class_table, format_table, mean_scores, write_csv

__all__ = ["Args", "main", "segment"]

SUMMARY = "summary.csv"


def main(args: Args) -> None:
    """Predict as `args` says.

    Raises:
        Fail: something that the user can fix, before anything is written; code 1 if images were skipped.
    """
    with fixable():
        weights = Path(args.weights) if args.weights else newest_weights(default_runs())
        weights = weights / "best.pt" if weights.is_dir() else weights
        if args.export:
            return write_network(weights, Path(args.export))
        job = prepare(args, weights)
    started = time.perf_counter()
    try:
        total = predict_all(job)
    except (OSError, RuntimeError, MemoryError) as error:  # an OSError is the output's, or a ground truth's
        if is_out_of_memory(error):
            device = job.predictor.device
            advice = "Use a smaller batch_size or window, num_workers 1, or amp bf16"
            raise Fail(f"out of memory on {device}. {advice}; what was written is complete", 1) from error
        if not isinstance(error, OSError):
            raise
        raise Fail(f"prediction cannot go on: {error}. What was written before is complete", 1) from error
    try:
        report(job, total, time.perf_counter() - started)
    except OSError as error:
        raise Fail(f"the tables cannot be written: {error}. The masks are complete", 1) from error
    problems = [image.problem for image in job.images if image.problem]
    if problems:
        rest = "" if len(problems) == len(job.images) else ", the others are written"
        heading = f"{len(problems)} of {len(job.images)} images had problems{rest}:"
        raise Fail("\n  ".join([heading, *problems]), 1)


def default_runs() -> Path:
    """Return the folder of runs that config.py names; its other settings may be half edited.

    Raises:
        Fail: it names none.
    """
    return Path(os.path.expanduser(coerce("output_dir", Config.output_dir, str)))


def prepare(args: Args, weights: Path) -> Job:
    """Open the checkpoint, find the images, and check everything that could be wrong.

    Raises:
        ValueError: a wrong value, checkpoint, image or ground truth.
        OSError: something is missing, or in the way.
    """
    device = pick_device(args.device)
    model = load_model(weights, device)
    info = model.info
    if args.threshold is not None and len(info.class_names) != 2:
        raise ValueError(f"threshold is for two classes; {weights} has {len(info.class_names)}. Leave it out")
    precision = pick_precision(args.amp or info.amp, device)
    set_backends(False, args.amp or info.amp, device)
    files = find_images(args.input, args.recursive)
    for file in map(str, files):  # summary.csv names them all, and is UTF-8
        if (shown := file.encode("utf-8", "backslashreplace").decode()) != file:
            raise ValueError(f"{shown}: its name is not valid UTF-8. Rename it")
    encoding = Encoding.from_dict(info.encoding)
    if args.encoding == "source":
        encoding.decode(np.arange(len(info.class_names))[None])  # refuses what no mask could be written as
    targets = [None] * len(files)
    if args.truth:
        pairing = getattr(info, "pairing", None)  # early checkpoints have none
        targets = pair_targets(files, args.truth, info.mask_suffix, encoding, pairing)
    if others := left_out(args.input, args.recursive):
        print(f"left out {others}: not an ending that is read")
    output = Path(args.output)
    try_output(output, "output")
    if (output / SUMMARY).exists():
        print(f"{output} holds earlier predictions: those of the same images are replaced")
    elif (output / "masks").exists():
        raise FileExistsError(f"{output / 'masks'} exists and is not from a prediction. Give another output")
    predictor = load_predictor(model, device, precision, args.tta, args.batch_size)
    print(
        f"{weights}: {info.architecture['name']}, {len(info.class_names)} classes, epoch {info.epoch}; "
        f"{len(files)} images; {describe_device(device)}, {str(precision).removeprefix('torch.')}"
    )
    options = Options(
        output=output,
        window=args.window or (tuple(info.image_size) if info.resize == "crop" else None),
        overlap=args.overlap,
        threshold=args.threshold,
        batch_size=args.batch_size,
        num_workers=args.num_workers or default_workers(device),
        source_encoding=args.encoding == "source",
        overlay=args.overlay,
        probabilities=args.probabilities,
    )
    images = list(map(PredictedImage, files, output_names(files, Path(args.input)), targets))
    return Job(options, info, predictor, encoding, images)


def default_workers(device: torch.device) -> int:
    """Return how many threads take images from file to mask: a GPU needs more of them than a CPU."""
    return max(2, min(8, available_cores())) if device.type == "cuda" else 2


def report(job: Job, total: ConfusionMatrix | None, seconds: float) -> None:
    """Write summary.csv and, with ground truth, scores.csv; print each class's fraction and scores."""
    done = [image for image in job.images if image.fractions]
    if not done:
        return
    output, names = job.options.output, job.info.class_names
    if not total and (output / SUMMARY).exists():  # from an earlier prediction
        (output / "scores.csv").unlink(missing_ok=True)
    write_csv(output / SUMMARY, [{"image": str(image.path)} | image.fractions for image in done])
    table = []
    for name in names:
        fractions = [image.fractions[name] for image in done]
        percent = f"{100 * sum(fractions) / len(fractions):.2f} %"
        table.append([f"  {name}", percent, str(sum(value > 0 for value in fractions))])
    print(format_table(["  class", "pixels", "images"], table))
    if total:
        rows = [{"image": str(image.path)} | image.scores for image in done]
        rows.sort(key=lambda row: (math.isnan(row["mean_iou"]), row["mean_iou"]))  # the worst first
        write_csv(output / "scores.csv", rows)
        scores = total.scores()
        print(f"against the ground truth: {mean_scores(scores)}")
        print(class_table(names, scores))
        absent = [name for name, pixels in zip(names, total.counts.sum(1), strict=True) if not pixels]
        if absent:  # for example a ground truth of 0 and 255 and a network trained on 0 and 1
            ignored = f"{job.info.ignore_index} is ignored in it, as in training"
            print(f"the ground truth has no pixel of {', '.join(absent)}; {ignored}")
    overlays = f", overlays to {output / 'overlays'}" if job.options.overlay else ""
    print(f"wrote {len(done)} masks to {output / 'masks'}{overlays}; {len(done) / seconds:.1f} images/s")


def write_network(weights: Path, path: Path) -> None:
    """Export the network of a checkpoint, and print how the file's logits differ from its own.

    Raises:
        ValueError: see `check_target` and `load_model`.
        OSError: likewise, or the file cannot be written.
    """
    from utils.export import SIZES, SMALLEST, check_target, export  # slow to import

    check_target(path)
    model = load_model(weights)
    info = model.info
    extra = {name: vars(info)[name] for name in ("class_names", "image_size", "resize", "palette", "epoch")}
    difference = export(model, path, fold=fold_batch_norm, mean=info.mean, std=info.std, info=extra)
    channels, classes = info.architecture["in_channels"], info.architecture["num_classes"]
    smallest = f", {SMALLEST} or more pixels per side" if path.suffix == ".pt2" else ""
    images = f"uint8 images (N, {channels}, H, W){smallest}"
    print(f"wrote {path}: {images} to logits (N, {classes}, H, W)")
    if difference is None:
        print("not run: install onnxruntime to compare it with the network")
    else:
        sizes = ", ".join(" x ".join(map(str, size)) for size in SIZES)
        print(f"its logits differ from the network's by {difference:.1e} of the largest, over {sizes}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with(lambda: main(PARSED.settings))
