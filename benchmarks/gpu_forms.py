"""Two or more forms of one computation, compared: operators, loss, sums, memory layout.

Each function is one measurement of gpu.py. It takes `report`, which receives a dict of values and may be
called several times, the `settings` of the command, and `seconds`, its share of the time: it takes fewer
steps where these would not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import profiling
import torch
import torch.nn.functional as F
import worker
from children import NotHere, Settings
from gpu_runs import Report, case_of, ready
from torch import Tensor
from worker import IGNORED

RESIZE_FORMS = {  # values of ops.override
    "products": {"resize": True},
    "interpolate": {"resize": False, "resize_backward": False},
    "interpolate, gradient in one piece": {"resize": False, "resize_backward": True},
}


def form_of_step(report: Report, settings: Settings, seconds: float, network: str, op: str) -> None:
    """A step with the fast and with the plain form of an operator."""
    with worker.op_form(op, True):  # an unknown one is told before the network is built
        pass
    with ready(settings, case_of(settings, network)) as run:
        step = worker.our_step(run)

        def in_form(fast: bool) -> None:
            with worker.op_form(op, fast):
                step()

        forms = {"fast": lambda: in_form(True), "plain": lambda: in_form(False)}
        report(profiling.compared(profiling.in_turns(forms, settings.device, 0.5 * seconds)))


def layouts(report: Report, settings: Settings, seconds: float, network: str) -> None:
    """train.py's step in channels_last and in the contiguous layout."""
    with ExitStack() as stack:
        forms = {}
        for name, value in (("channels_last", True), ("contiguous", False)):
            case = case_of(settings, network, channels_last=value)
            forms[name] = worker.our_step(stack.enter_context(ready(settings, case)))
        report(profiling.compared(profiling.in_turns(forms, settings.device, 0.4 * seconds)))


def form_of_resize(
    report: Report, settings: Settings, seconds: float, channels: int, small: int, to: int
) -> None:
    """Bilinear resizing with its gradient in bf16: time, memory and error of each form against float64."""
    side, target = (max(2, length * settings.size // 512) for length in (small, to))
    x, weight = (
        torch.rand(settings.batch, channels, length, length, device=settings.device).to(
            torch.bfloat16, memory_format=torch.channels_last
        )
        for length in (side, target)
    )
    exact = resize_gradient(x.double(), weight.double(), exactly=True)
    calls = {}
    for name, forms in RESIZE_FORMS.items():

        def call(forms: dict[str, bool] = forms) -> tuple[Tensor, Tensor]:
            with ExitStack() as stack:
                for op, fast in forms.items():
                    stack.enter_context(worker.op_form(op, fast))
                return resize_gradient(x, weight)

        profiling.reset_peak(settings.device)
        errors = [relative_error(a, b) for a, b in zip(call(), exact, strict=True)]
        report({f"{name}: error": errors[0], f"{name}: gradient error": errors[1]})
        report({f"{name}: peak_gib": profiling.peak_gib(settings.device)})
        calls[name] = call
    report(profiling.compared(profiling.in_turns(calls, settings.device, 0.5 * seconds)))


def resize_gradient(x: Tensor, weight: Tensor, exactly: bool = False) -> tuple[Tensor, Tensor]:
    """Resize to the size of `weight`; the result, and the gradient of its sum weighted by `weight`."""
    x = x.detach().requires_grad_()
    size = tuple(weight.shape[-2:])
    out = F.interpolate(x, size, mode="bilinear") if exactly else worker.resized(x, size)
    out.backward(weight)
    return out.detach(), x.grad


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of the exact values."""
    return float((found.double() - exact).norm() / exact.norm())


def form_of_loss(report: Report, settings: Settings, seconds: float, classes: int) -> None:
    """The joint loss with its gradient on bf16 logits: time and peak memory of each form."""
    batch = min(settings.batch, max(1, settings.batch * 48 // classes))
    logits, masks = logits_of(settings, batch, classes)
    losses = {"ours": worker.our_loss(True), "torch": torch_joint_loss}
    try:
        losses["plain"] = worker.our_loss(False)
    except NotHere as note:
        report({"plain": str(note)})
    calls = {}
    for name, loss in losses.items():

        def call(loss: Callable = loss) -> None:
            logits.grad = None
            loss(logits, masks).backward()

        profiling.reset_peak(settings.device)
        call()
        report({f"{name}_peak_gib": profiling.peak_gib(settings.device)})
        calls[name] = call
    report({"batch": batch, "classes": classes})
    report(profiling.compared(profiling.in_turns(calls, settings.device, 0.6 * seconds)))


def logits_of(settings: Settings, batch: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits in bf16 and masks of random numbers."""
    shape = (batch, classes, settings.size, settings.size)
    logits = torch.randn(shape, device=settings.device)
    logits = logits.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    return logits, torch.randint(classes, (batch, *shape[2:]), device=settings.device)


def torch_joint_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Half cross entropy by torch, half soft Dice over softmax and one-hot, in float32."""
    logits = logits.float()
    cross_entropy = F.cross_entropy(logits, masks, ignore_index=IGNORED)
    probabilities = logits.softmax(1)
    targets = F.one_hot(masks, logits.shape[1]).permute(0, 3, 1, 2)
    overlap = (probabilities * targets).sum((0, 2, 3))
    total = probabilities.sum((0, 2, 3)) + targets.sum((0, 2, 3))
    return 0.5 * cross_entropy + 0.5 * (1 - ((2 * overlap + 1) / (total + 1)).mean())


def sums_by_label(report: Report, settings: Settings, seconds: float) -> None:
    """Forms of Dice's sum over the pixels of each label, at 12, 21 and 150 classes."""
    pixels = settings.batch * settings.size**2
    values = torch.rand(pixels, device=settings.device)
    for classes in (12, 21, 150):
        labels = torch.randint(classes, (pixels,), device=settings.device)
        forms = {name: partial(form, values, labels, classes) for name, form in LABEL_SUMS.items()}
        exact = _index_add(values.double(), labels, classes)
        errors = {f"{name}: error": relative_error(form(), exact) for name, form in forms.items()}
        found = profiling.compared(profiling.in_turns(forms, settings.device, seconds / 4))
        report({f"{classes} classes": found | errors})


def _compare(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    ids = torch.arange(classes, device=labels.device)[:, None]
    return torch.where(labels == ids, values, 0.0).sum(1)


def _index_add(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    return values.new_zeros(classes).index_add_(0, labels, values)


def _scatter_add(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    return values.new_zeros(classes).scatter_add_(0, labels, values)


def _scatter_rows(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Into 1024 rows of sums first, so that few additions meet at one address."""
    rows = 1024 if len(values) % 1024 == 0 else 1
    labels = labels + classes * torch.arange(rows, device=labels.device).repeat(len(labels) // rows)
    return values.new_zeros(rows * classes).scatter_add_(0, labels, values).view(rows, classes).sum(0)


LABEL_SUMS = {
    "compare": _compare,  # memory and time grow with the classes
    "index_add": _index_add,
    "scatter_add": _scatter_add,
    "scatter_add into 1024 rows": _scatter_rows,
}
