"""Losses, class ids and the confusion matrix against those of well-known libraries: time and memory.

    python benchmarks/losses.py --rounds 5 --output benchmarks/results/losses.json

One loss is one forward and backward pass over float32 logits, 5 % of the pixels ignored, for two shapes and
both memory layouts; joint also by its formula in plain torch. segmentation_models.pytorch and monai are
compared if they are installed; MONAI's DiceCELoss has no ignored pixels and gets none. The goals: joint at
least 2.8 times faster than torch's cross entropy plus segmentation_models.pytorch's DiceLoss, 1.6 times
faster than MONAI's, within 1.5 times torch's cross entropy alone; its peak memory at most 2.5 times the
logits' own; the confusion matrix under 10 ms.

Memory is by how much one step raises the peak resident size of a new process (VmHWM, Linux only) above its
size with logits and masks, in multiples of the logits; nothing is timed in that process.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from timing import (
    interleave,
    machine,
    options,
    print_goals,
    print_table,
    ratios,
    resident,
    spread,
    write_json,
)
from worker import CONTEXT

from losses import LOSSES, build_loss
from metrics import ConfusionMatrix, predicted_ids

SHAPES = ("4x12x360x480", "8x21x512x512")
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
OURS = tuple(LOSSES)
FORMULA = "joint by its formula"  # in plain torch: fused=False
TORCH, SMP, MONAI = "torch cross_entropy", "torch CE + SMP DiceLoss", "MONAI DiceCELoss"
GOALS = {TORCH: 1 / 1.5, SMP: 2.8, MONAI: 1.6}  # how many times faster joint must be


def tensors(shape, layout):
    n, c, h, w = shape = tuple(map(int, shape.split("x")))
    logits = torch.empty(shape, memory_format=LAYOUTS[layout]).normal_().requires_grad_()
    masks = torch.randint(0, c, (n, h, w))
    masks[:, : h // 20] = 255
    return logits, masks


def classes_of(shape):
    return int(shape.split("x")[1])


def loss_by_name(name, num_classes):
    """Return a function of logits and masks, or None where its library is not installed."""
    if name in OURS:
        return build_loss(name, class_weights=[1.0] * num_classes if name == "weighted_ce" else None)
    if name == FORMULA:
        return build_loss("joint", fused=False)
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


def peak(name, shape, layout):
    """Return by how much one step lifts this process's peak resident size, in multiples of the logits."""
    loss_fn = loss_by_name(name, classes_of(shape))
    step(loss_fn, *tensors(f"1x{classes_of(shape)}x8x8", layout))  # load what is loaded once
    logits, masks = tensors(shape, layout)
    before = resident("VmRSS")
    step(loss_fn, logits, masks)
    return (resident("VmHWM") - before) / (logits.numel() * logits.element_size())


def measure_losses(shape, layout, args):
    """Return what was measured, and the goals."""
    logits, masks = tensors(shape, layout)
    logits, masks = logits.detach().to(args.device).requires_grad_(), masks.to(args.device)
    cases = {name: loss_by_name(name, classes_of(shape)) for name in args.losses}
    cases = {name: fn.to(args.device) if name in OURS else fn for name, fn in cases.items() if fn}
    seconds = interleave(
        {name: lambda fn=fn: step(fn, logits, masks) for name, fn in cases.items()}, args.rounds
    )
    memory, rows, goals = {}, [], []
    for name in seconds:
        if args.device == "cpu":
            with CONTEXT.Pool(1) as new_process:
                memory[name] = new_process.apply(peak, (name, shape, layout))
        faster = ratios(seconds[name], seconds["joint"]) if "joint" in seconds else []
        if faster and name in GOALS:
            goals.append((f"{shape} {layout}: {name}'s time / joint's", GOALS[name], faster, False))
        times = spread([1e3 * value for value in seconds[name]], 1)
        kept = f"{memory[name]:.2f}" if memory else "-"
        rows.append([name, times, spread(faster, 2) if faster else "", kept])
    if "joint" in memory:
        goals.append((f"{shape} {layout}: joint's peak / logits", 2.5, [memory["joint"]], True))
    absent = [name for name in args.losses if name not in cases]
    rows += [[name, "not measured: its library is not installed", "", ""] for name in absent]
    print(f"\n{shape} {layout}, forward + backward")
    print_table(["loss", "ms", "its time / joint's", "peak memory / logits"], rows)
    return {"seconds": seconds, "peak_over_logits": memory}, goals


def measure_metrics(shape, layout, args):
    """Return what was measured, and the goals."""
    logits, masks = (tensor.detach().to(args.device) for tensor in tensors(shape, layout))
    matrix, bytes_ = ConfusionMatrix(classes_of(shape), device=args.device), masks.byte()
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

    seconds = interleave({name: lambda case=case: waited(case) for name, case in cases.items()}, args.rounds)
    print(f"\n{shape} {layout}, from logits to counts")
    times = {name: [1e3 * value for value in values] for name, values in seconds.items()}
    print_table(["what", "ms"], [[name, spread(values, 1)] for name, values in times.items()])
    goals = [
        (f"{shape} {layout}: {name}, ms", 10, times[name], True) for name in cases if "Confusion" in name
    ]
    return {"seconds": seconds}, goals


def main():
    parser = options(__doc__, "losses")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), metavar="NxCxHxW")
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    every = (*OURS, FORMULA, TORCH, SMP, MONAI)
    parser.add_argument("--losses", nargs="*", choices=every, default=every, metavar="NAME")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    description = machine("segmentation_models_pytorch", "monai")
    results = {"settings": vars(args), "machine": description, "losses": {}, "metrics": {}}
    goals = []
    for shape in args.shapes:
        for layout in args.layouts:
            key = f"{shape} {layout}"
            results["losses"][key], more = measure_losses(shape, layout, args)
            results["metrics"][key], and_more = measure_metrics(shape, layout, args)
            goals += more + and_more
    print_goals(goals)
    write_json(args.output, results)


if __name__ == "__main__":
    main()
