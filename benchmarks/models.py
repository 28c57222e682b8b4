"""A training step of each network in eager float32, against torchvision's and segmentation_models.pytorch's.

    python benchmarks/models.py --rounds 5 --size 256 --only deeplabv3plus

A step is forward, cross-entropy, backward and SGD with momentum, on random pictures. Two questions:
- Does each network reach torchvision deeplabv3_resnet50's rate of multiply-adds? (last column)
- Is the separable DeepLabv3+ no slower than segmentation_models.pytorch's of the same backbone? Install that
  one in an environment of your own (`pip install segmentation-models-pytorch`); without it its row says so.
Multiply-adds are the forward pass's by torch.utils.flop_counter, times three for the step: its count of the
backward pass is several times too high for depthwise convolutions. On a busy machine set OMP_NUM_THREADS to
the number of free cores: threads that wait for one another make every figure useless.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from timing import interleave, machine, print_table, spread, write_json
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from models.layers import AtrousConv2d

CLASSES = 21
REFERENCE = "torchvision deeplabv3_resnet50"
PEER = "smp DeepLabV3Plus resnet50"


def torchvision_deeplab() -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_resnet50

    return deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)


def smp_deeplab() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.DeepLabV3Plus("resnet50", encoder_weights=None, classes=CLASSES)


CASES: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: build_model("unet", CLASSES),
    "deeplabv3plus": lambda: build_model("deeplabv3plus", CLASSES),
    "deeplabv3plus separable": lambda: build_model("deeplabv3plus", CLASSES, separable=True),
    "pspnet": lambda: build_model("pspnet", CLASSES, aux=True),
    "fcn": lambda: build_model("fcn", CLASSES),
    "segnet": lambda: build_model("segnet", CLASSES),
    REFERENCE: torchvision_deeplab,
    PEER: smp_deeplab,
}


def logits_of(output: object) -> list[torch.Tensor]:
    if isinstance(output, dict):  # torchvision
        return list(output.values())
    return list(output) if isinstance(output, tuple) else [output]


def multiply_adds(build: Callable[[], nn.Module], batch: int, size: int) -> int:
    """Count those of a training step, without computing it; taps that see padding count, for all alike."""
    whole = mock.patch.object(AtrousConv2d, "forward", nn.Conv2d.forward)
    with whole, torch.device("meta"), FlopCounterMode(display=False) as counter:
        build()(torch.empty(batch, 3, size, size))
    return 3 * counter.get_total_flops() // 2


def training_step(
    build: Callable[[], nn.Module], batch: int, size: int, layout: torch.memory_format
) -> Callable:
    torch.manual_seed(0)
    model = build().to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.rand(batch, 3, size, size).to(memory_format=layout)
    masks = torch.randint(0, CLASSES, (batch, size, size))

    def step() -> None:
        optimizer.zero_grad()
        sum(F.cross_entropy(logits, masks) for logits in logits_of(model(images))).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="height and width of the pictures, pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layout", choices=("channels_last", "contiguous_format"), default="channels_last")
    parser.add_argument(
        "--only", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; the reference always runs"
    )
    parser.add_argument("--output", default="benchmarks/results/models.json")
    args = parser.parse_args()

    steps, counts, absent = {}, {}, []
    for name, build in CASES.items():
        if args.only and name not in (*args.only, REFERENCE):
            continue
        try:
            counts[name] = multiply_adds(build, args.batch, args.size)
            steps[name] = training_step(build, args.batch, args.size, getattr(torch, args.layout))
        except ImportError as error:
            absent.append((name, f"not measured: {error.name} is not installed"))
    description = machine("torchvision", "segmentation-models-pytorch")
    seconds = interleave(steps, args.rounds)

    reference = seconds[REFERENCE]
    rows = []
    for name, times in seconds.items():
        gain = counts[name] / counts[REFERENCE]
        relative = [gain * theirs / ours for ours, theirs in zip(times, reference, strict=True)]
        rows.append(
            (
                name,
                f"{counts[name] / 3 / args.batch / 1e9:.1f}",
                spread([1000 * value for value in times]),
                f"{counts[name] / statistics.median(times) / 1e9:.0f}",
                spread(relative, 2),
            )
        )
    rows += [(name, "", reason, "", "") for name, reason in absent]
    print(f"batch {args.batch}, {args.size} pixels, {args.layout}, float32, {args.rounds} rounds")
    print_table(("network", "GMAC a picture", "ms a step", "GMAC/s", "rate / torchvision"), rows)
    write_json(
        args.output,
        {"settings": vars(args), "machine": description, "multiply_adds": counts, "seconds": seconds},
    )


if __name__ == "__main__":
    main()
