"""Losses, class ids and the confusion matrix against those of well-known libraries: time and memory.

    python benchmarks/losses.py --rounds 5 --output benchmarks/results/losses.json

One loss is one forward and backward pass over float32 logits, 5 % of the pixels ignored, for two shapes and
both memory layouts. segmentation_models.pytorch and monai take part where they are installed (in an
environment of your own); MONAI's DiceCELoss knows no ignored pixels and gets none. The goals: joint at least
2.8 times faster than torch's cross entropy plus segmentation_models.pytorch's DiceLoss, 1.6 times faster than
MONAI's, within 1.5 times torch's cross entropy alone; its peak memory at most 2.5 times the logits' own; the
confusion matrix under 10 ms.

Memory is how far one step lifts the peak resident size of a fresh process (VmHWM, Linux alone) over its
resident size with logits and masks there, in multiples of the logits; nothing is timed there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from timing import interleave, machine, print_table, spread, write_json

from losses import LOSSES, build_loss
from metrics import ConfusionMatrix, predicted_ids

SHAPES = {"4x12x360x480": (4, 12, 360, 480), "8x21x512x512": (8, 21, 512, 512)}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
OURS = tuple(LOSSES)
TORCH, SMP, MONAI = "torch cross_entropy", "torch CE + SMP DiceLoss", "MONAI DiceCELoss"
GOALS = {TORCH: 1 / 1.5, SMP: 2.8, MONAI: 1.6}  # how many times faster joint must be


def tensors(shape, layout):
    n, c, h, w = shape
    logits = torch.empty(shape, memory_format=LAYOUTS[layout]).normal_().requires_grad_()
    masks = torch.randint(0, c, (n, h, w))
    masks[:, : h // 20] = 255
    return logits, masks


def loss_by_name(name, num_classes):
    """Return a function of logits and masks, or None where its library is not installed."""
    if name in OURS:
        return build_loss(name, class_weights=[1.0] * num_classes if name == "weighted_ce" else None)
    if name == TORCH:
        return lambda logits, masks: F.cross_entropy(logits, masks, ignore_index=255)
    try:
        if name == SMP:
            from segmentation_models_pytorch.losses import DiceLoss

            dice = DiceLoss("multiclass", ignore_index=255)
            return lambda logits, masks: (
                F.cross_entropy(logits, masks, ignore_index=255) + dice(logits, masks)
            )
        from monai.losses import DiceCELoss

        both = DiceCELoss(to_onehot_y=True, softmax=True)
        return lambda logits, masks: both(logits, (masks % num_classes)[:, None])
    except ImportError:
        return None


def step(loss_fn, logits, masks):
    logits.grad = None
    loss_fn(logits, masks).backward()
    if logits.is_cuda:
        torch.cuda.synchronize()


def resident(field):
    """Return VmRSS (now) or VmHWM (the peak so far) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def peak(name, shape, layout):
    """Print by how much one step lifts this process's peak resident size, in multiples of the logits."""
    loss_fn = loss_by_name(name, SHAPES[shape][1])
    step(loss_fn, *tensors((1, SHAPES[shape][1], 8, 8), layout))  # load what is loaded once
    logits, masks = tensors(SHAPES[shape], layout)
    before = resident("VmRSS")
    step(loss_fn, logits, masks)
    print((resident("VmHWM") - before) / (logits.numel() * logits.element_size()))


def measure_losses(shape, layout, rounds, device):
    logits, masks = tensors(SHAPES[shape], layout)
    logits, masks = logits.detach().to(device).requires_grad_(), masks.to(device)
    found = {name: loss_by_name(name, SHAPES[shape][1]) for name in (*OURS, TORCH, SMP, MONAI)}
    cases = {
        name: loss_fn.to(device) if name in OURS else loss_fn for name, loss_fn in found.items() if loss_fn
    }
    seconds = interleave(
        {name: lambda fn=loss_fn: step(fn, logits, masks) for name, loss_fn in cases.items()}, rounds
    )
    memory, rows = {}, []
    for name in seconds:
        if device == "cpu":
            command = [sys.executable, __file__, "--peak", name, shape, layout]
            memory[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        faster = [theirs / ours for theirs, ours in zip(seconds[name], seconds["joint"], strict=True)]
        goal = f" (goal {GOALS[name]:.2f})" if name in GOALS else ""
        times = spread([1e3 * value for value in seconds[name]], 1)
        rows.append([name, times, spread(faster, 2) + goal, f"{memory[name]:.2f}" if memory else "-"])
    print(f"\n{shape} {layout}, forward + backward")
    print_table(["loss", "ms", "its time / joint's", "peak memory / logits"], rows)
    return {"seconds": seconds, "peak_over_logits": memory}


def measure_metrics(shape, layout, rounds, device):
    logits, masks = (tensor.detach().to(device) for tensor in tensors(SHAPES[shape], layout))
    matrix, bytes_ = ConfusionMatrix(SHAPES[shape][1], device=device), masks.byte()
    ids = predicted_ids(logits)
    wide = ids.long()
    cases = {
        "predicted_ids": lambda: predicted_ids(logits),
        "argmax(1)": lambda: logits.argmax(1),
        "max(1)": lambda: logits.max(1)[1],
        "ConfusionMatrix.update, uint8": lambda: matrix.update(ids, bytes_),
        "ConfusionMatrix.update, int64": lambda: matrix.update(wide, masks),
    }

    def waited(case):
        case()
        if logits.is_cuda:
            torch.cuda.synchronize()

    seconds = interleave({name: lambda case=case: waited(case) for name, case in cases.items()}, rounds)
    print(f"\n{shape} {layout}, from logits to counts")
    rows = [[name, spread([1e3 * value for value in values], 1)] for name, values in seconds.items()]
    print_table(["what", "ms"], rows)
    return {"seconds": seconds}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="benchmarks/results/losses.json")
    parser.add_argument(
        "--peak", nargs=3, metavar=("LOSS", "SHAPE", "LAYOUT"), help="measure memory, print, end"
    )
    args = parser.parse_args()
    if args.peak:
        peak(*args.peak)
        return
    torch.manual_seed(0)
    results = {"machine": machine("segmentation_models_pytorch", "monai"), "losses": {}, "metrics": {}}
    for shape in args.shapes:
        for layout in LAYOUTS:
            key = f"{shape} {layout}"
            results["losses"][key] = measure_losses(shape, layout, args.rounds, args.device)
            results["metrics"][key] = measure_metrics(shape, layout, args.rounds, args.device)
    write_json(args.output, results)


if __name__ == "__main__":
    main()
