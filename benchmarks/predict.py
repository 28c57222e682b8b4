"""Prediction against a plain loop in the manner of the usual scripts: pictures per second, and agreement.

    python benchmarks/predict.py --data camvid/val --weights runs/unet/best.pt runs/deeplab/best.pt --rounds 3

The plain loop takes one picture at a time in float32 and the default memory layout, each convolution computed
whole; Pillow opens, resizes and saves in line, and decodes a JPEG at half its size where that will do, as
ours: the networks see the same pixels. Ours is predict.py as it is, without overlays, with amp auto, in
float32 and in bf16. Both load the same weights and write palette masks at the pictures' own sizes. Each run
is a process of its own; its clock starts when all is imported and ends with the last file. Goals: 2.5 times
the plain loop for UNet and 3 times for DeepLabv3+ ResNet18, in float32 1.5 times; with trained weights 99.5 %
of the pixels equal in bf16 and 99.99 % in float32. Without --weights, networks of random weights are made;
their agreement says nothing of trained ones.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timing import interleave, machine, print_table, spread, write_json
from worker import compute_whole

import predict
from datasets import find_images
from models import build_model, load_model
from models.checkpoint import FORMAT
from utils.checkpoint import plain_weights, save_atomic

RANDOM = {
    "unet": {"base_channels": 64},
    "deeplabv3plus": {"backbone": "resnet18"},
}
CASES = {  # amp of predict.py
    "plain loop": None,
    "ours": "auto",
    "ours, float32": "off",
    "ours, bf16": "bf16",
}


def plain_loop(weights: Path, source: Path, output: Path) -> None:
    compute_whole()
    model = load_model(weights)
    info = model.info
    height, width = info.image_size
    palette = [value for color in info.palette for value in color]
    output.mkdir(parents=True)
    for path in find_images(source):
        picture = Image.open(path)
        size = picture.size[::-1]
        picture.draft("RGB", (width, height))
        picture = picture.convert("RGB")
        pixels = np.array(picture.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        pixels = (pixels - np.array(info.mean, np.float32)) / np.array(info.std, np.float32)
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()[None]
        with torch.no_grad():
            logits = model(image)
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        mask = Image.fromarray(logits.argmax(1)[0].numpy().astype(np.uint8))
        mask.putpalette(palette)
        mask.save(output / f"{path.stem}.png")


def timed(case: str, weights: Path, source: Path, output: Path) -> float:
    """Seconds of one run; to be called in a process of its own."""
    start = time.perf_counter()
    if CASES[case] is None:
        plain_loop(weights, source, output / "masks")
    else:
        given = dict(weights=str(weights), input=str(source), output=str(output))
        with redirect_stdout(sys.stderr):
            predict.main(predict.Args(**given, overlay=False, amp=CASES[case], device="cpu"))
    return time.perf_counter() - start


def random_checkpoint(folder: Path, name: str, size: int) -> Path:
    torch.manual_seed(0)
    classes, options = 12, RANDOM[name]
    table = [[value, value] for value in range(classes)]
    info = {
        "class_names": [f"class_{number}" for number in range(classes)],
        "palette": [[20 * number] * 3 for number in range(classes)],
        "image_size": [size, size],
        "resize": "stretch",
        "ignore_index": 255,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "encoding": dict(
            kind="indices", num_classes=classes, ignore_index=255, table=table, snap=False, palette=[]
        ),
        "mask_suffix": "",
        "amp": "auto",
        "epoch": 0,
    }
    architecture = {"name": name, "num_classes": classes, "in_channels": 3, "options": options}
    weights = plain_weights(build_model(name, classes, **options))
    path = folder / f"{name}.pt"
    save_atomic({"format": FORMAT, "model": weights, "architecture": architecture, "info": info}, path)
    return path


def agreement(first: Path, second: Path) -> float:
    """Share of equal pixels over all masks of two folders."""
    equal = total = 0
    for path in first.iterdir():
        one, other = np.array(Image.open(path)), np.array(Image.open(second / path.name))
        equal, total = equal + int((one == other).sum()), total + one.size
    return equal / total


def measure(weights: Path, source: Path, rounds: int, folder: Path) -> tuple[dict, dict]:
    """Seconds by case and round, and each case's agreement with the plain loop."""
    seconds: dict[str, list[float]] = {case: [] for case in CASES}

    def run(case: str) -> None:
        output = folder / case
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, __file__, "--run", case, str(weights), str(source), str(output)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds[case].append(float(done.stdout))

    interleave({case: lambda case=case: run(case) for case in CASES}, rounds, warmup=0)
    plain = folder / "plain loop" / "masks"
    return seconds, {case: agreement(plain, folder / case / "masks") for case in CASES}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="mock_data/val", help="folder with images/")
    parser.add_argument("--weights", nargs="*", type=Path, help="checkpoints; none: random ones")
    parser.add_argument("--pictures", type=int, help="take the first so many")
    parser.add_argument("--size", type=int, default=256, help="of the networks of random weights, pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="benchmarks/results/predict.json")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(timed(args.run[0], *map(Path, args.run[1:])))
        return

    rows, results, description = [], {}, machine("numpy", "Pillow")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "pictures").mkdir()
        pictures = find_images(Path(args.data) / "images")[: args.pictures]
        for picture in pictures:
            shutil.copy(picture, folder / "pictures")
        for weights in args.weights or [random_checkpoint(folder, name, args.size) for name in RANDOM]:
            seconds, same = measure(weights, folder / "pictures", args.rounds, folder)
            info = load_model(weights).info
            name = f"{info.architecture['name']}, {info.image_size[0]} x {info.image_size[1]}"
            results[str(weights)] = {"network": info.architecture, "seconds": seconds, "agreement": same}
            for case, times in seconds.items():
                faster = [theirs / own for own, theirs in zip(times, seconds["plain loop"], strict=True)]
                rows.append(
                    (
                        name,
                        case,
                        spread([len(pictures) / value for value in times], 2),
                        spread(faster, 2),
                        f"{statistics.median(times):.1f}",
                        f"{100 * same[case]:.3f} %",
                    )
                )
    print(f"{len(pictures)} pictures, {args.rounds} rounds, {description['threads']} threads")
    print_table(("network", "case", "pictures/s", "times the plain loop", "seconds", "pixels equal"), rows)
    settings = {**vars(args), "weights": [str(path) for path in args.weights or []]}
    write_json(args.output, {"settings": settings, "machine": description, "results": results})


if __name__ == "__main__":
    main()
