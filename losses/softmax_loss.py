"""The one computation behind every loss: a softmax, a pixel term, a Dice term, and their common gradient.

With p = softmax(x) over the classes, y the labels, w the class weights, V the valid pixels, W = sum_V w_y:

    pixel term  L = sum_V w_y (1 - p_y)^gamma (-log p_y) / W
    Dice term   D = 1 - mean over present c of d_c,   d_c = (2 sum_V p_c [y = c] + s) / (sum_V p_c + n_c + s)

Both depend on the logits through p, so that the gradient at a pixel has one form. With a = dL / dlog p_y,
u_c = dD / d(sum_V p_c [y = c]), v_c = dD / d(sum_V p_c):

    dx_j = p_j (v_j - t) + [j = y] (u_y p_y + a),   t = sum_k p_k v_k + u_y p_y + a

Plain autograd would keep five to seven arrays as large as the logits. Here the forward pass keeps two planes
(log p_y and the log of the softmax's denominator), and the backward pass makes p again from them in the very
memory that becomes the gradient. Both go through the batch in pieces that stay in the processor's cache.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_PIECE = {"cpu": 1 << 21, "cuda": 1 << 26}  # logits at a time: the processor's cache, few launches on a GPU


def _pieces(
    x: Tensor, y: Tensor, spec: "SegmentationLoss", dtype: torch.dtype
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor, Tensor, Tensor]]:
    """Cut logits (N, C, P) and masks (N, P) into pieces, on the CPU of one picture.

    Yields:
        Where the piece lies (pictures, pixels); its logits; which pixels count, as 0 or 1; its labels; two
        flat buffers as large as the largest piece, the same for all.
    """
    n, c, p = x.shape
    size = max(1, _PIECE.get(x.device.type, 1 << 24) // c)  # pixels
    pictures, pixels = (1, size) if x.device.type == "cpu" else (max(1, size // p), p)
    scratch = torch.empty((2, min(pictures, n) * c * min(pixels, p)), dtype=dtype, device=x.device)
    for first in range(0, n, pictures):
        for left in range(0, p, pixels):
            at = slice(first, first + pictures), slice(left, left + pixels)
            valid, labels = spec.split(y[at])
            yield at, x[at[0], :, at[1]], valid.to(dtype), labels, scratch


def _view(buffer: Tensor, piece: Tensor) -> Tensor:
    """View the start of a flat buffer in the shape (k, C, P) and memory order of `piece`."""
    k, c, p = piece.shape
    flat = buffer[: piece.numel()]
    return flat.view(k, p, c).transpose(1, 2) if piece.stride(1) == 1 else flat.view(k, c, p)


def _log_softmax(piece: Tensor, buffer: Tensor) -> Tensor:
    """Return the log-softmax over the classes, in the start of a flat buffer."""
    if piece.stride(1) == 1 and piece.shape[1] < 16:  # torch does not vectorize it over a short last axis
        piece = piece.contiguous()
    out = _view(buffer, piece)
    axis = 2 if piece.stride(1) == 1 else 1  # a contiguous axis of classes must be the last
    torch.log_softmax(piece.transpose(1, axis), axis, dtype=out.dtype, out=out.transpose(1, axis))
    return out


def _sum_over_pixels(values: Tensor, weight: Tensor) -> Tensor:
    """(k, C, P), (k, P) → (C,)."""
    if values.device.type == "cpu":  # k = 1; on a GPU a matrix product might run in TF32
        return torch.mv(values[0], weight[0])
    return (values * weight[:, None]).sum((0, 2))


def _sum_over_classes(values: Tensor, weight: Tensor) -> Tensor:
    """(k, C, P), (C,) → (k, P)."""
    if values.device.type == "cpu":
        return torch.mv(values[0].t(), weight)[None]
    return (values * weight[:, None]).sum(1)


def _sum_by_label(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(k, P), (k, P) → (C,): the sum of `values` over the pixels of each label."""
    if values.device.type == "cpu":
        return torch.bincount(labels.flatten(), values.flatten(), num_classes).to(values.dtype)
    classes = torch.arange(num_classes, device=labels.device)[:, None]  # bincount would wait for the GPU
    return torch.where(labels[:, None] == classes, values[:, None], 0.0).sum((0, 2))


class _SoftmaxLoss(torch.autograd.Function):
    """(logits, masks, total) → (loss, pixel term, Dice term); only the first has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, masks: Tensor, total: Tensor, share: Tensor, spec: "SegmentationLoss"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum both terms piece by piece; `share` is this batch's part of `total`, for Dice."""
        with torch.autocast(logits.device.type, enabled=False):
            x, y, c = logits.flatten(2), masks.flatten(1), logits.shape[1]
            dtype = total.dtype
            log_py, log_sum = torch.empty((2, *y.shape), dtype=dtype, device=x.device)
            overlap, mass, pixels = torch.zeros((3, c), dtype=dtype, device=x.device)
            pixel = torch.zeros((), dtype=dtype, device=x.device)
            for at, piece, valid, labels, scratch in _pieces(x, y, spec, dtype):
                logp = _log_softmax(piece, scratch[0])
                log_py[at] = logp.gather(1, labels[:, None])[:, 0]
                torch.sub(piece[:, 0], logp[:, 0], out=log_sum[at])
                log_sum[at].masked_fill_(valid == 0, torch.inf)  # so that p is 0 in the backward pass
                if spec.pixel_share:
                    pixel += (spec.pixel_value(log_py[at], labels) * valid).sum()
                if spec.dice_share:
                    overlap += _sum_by_label(log_py[at].exp().mul_(valid), labels, c)
                    pixels += _sum_by_label(valid, labels, c)
                    mass += _sum_over_pixels(logp.exp_(), valid)
            pixel /= total
            below = (mass + pixels + spec.smooth).clamp(min=1e-12)  # 0 for an absent class without smoothing
            d = (2 * overlap + spec.smooth) / below
            present = (pixels > 0).to(dtype)
            each = present * share / present.sum().clamp(min=1)  # each present class's part of the Dice term
            dice = ((1 - d) * each).sum()
            to_overlap = -2 / below * each * spec.dice_share
            to_mass = d / below * each * spec.dice_share
            loss = spec.pixel_share * pixel + spec.dice_share * dice
        ctx.spec = spec
        ctx.save_for_backward(logits, masks, log_py, log_sum, to_overlap, to_mass, spec.pixel_share / total)
        ctx.mark_non_differentiable(pixel, dice)
        return loss, pixel, dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Write dx as in this file's docstring, piece by piece."""
        logits, masks, log_py, log_sum, *factors = ctx.saved_tensors
        spec, dtype = ctx.spec, log_py.dtype
        with torch.autocast(logits.device.type, enabled=False):
            to_overlap, to_mass, to_pixel = (factor * slope for factor in factors)
            grad = torch.empty_like(logits)
            x, y, dx = logits.flatten(2), masks.flatten(1), grad.flatten(2)
            for at, piece, valid, labels, scratch in _pieces(x, y, spec, dtype):
                out = dx[at[0], :, at[1]]
                p = out if out.dtype == dtype else _view(scratch[0], piece)
                torch.sub(piece, log_sum[at][:, None], out=p).exp_()
                at_label = spec.pixel_slope(log_py[at], labels) * valid * to_pixel  # a
                if spec.dice_share:
                    at_label += log_py[at].exp() * valid * to_overlap[labels]  # a + u_y p_y
                    t = _sum_over_classes(p, to_mass).add_(at_label)
                    p.mul_(torch.sub(to_mass[:, None], t[:, None], out=_view(scratch[1], piece)))
                else:
                    p.mul_(at_label[:, None].neg())
                p.scatter_add_(1, labels[:, None], at_label[:, None])
                if p is not out:
                    out.copy_(p)
        return grad, None, None, None, None


class SegmentationLoss(nn.Module):
    """loss = (1 - dice_share) * pixel term + dice_share * Dice term; the named losses are special cases.

    Args:
        ignore_index: label of the pixels that count for nothing.
        class_weights: one number a class, or None for all ones.
        gamma: focusing exponent of the pixel term; 0 is cross entropy.
        dice_share: factor on the Dice term, in 0..1.
        smooth: s in the Dice term, in pixels.
        pixel_name: what `terms` calls the pixel term.

    Raises:
        ValueError: weights that are not finite, one below 0 or all 0; another number out of range.

    Attributes:
        terms: after a call, the terms by name, before their factors: detached scalars on the device.
    """

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        class_weights: Sequence[float] | Tensor | None = None,
        gamma: float = 0.0,
        dice_share: float = 0.0,
        smooth: float = 1.0,
        pixel_name: str = "ce",
    ) -> None:
        super().__init__()
        weights = None
        if class_weights is not None:
            weights = torch.as_tensor(class_weights, dtype=torch.float32)
            if weights.ndim != 1 or not weights.isfinite().all() or weights.min() < 0 or weights.max() == 0:
                raise ValueError(
                    "class_weights must hold one finite number a class, none below 0 and not all 0; "
                    f"got {class_weights}. Correct the list, or leave it out."
                )
        if not 0 <= dice_share <= 1:
            raise ValueError(f"dice_weight must be in 0..1; got {dice_share}. Leave it out for the default.")
        for option, value in {"focal_gamma": gamma, "dice_smooth": smooth}.items():
            if not value >= 0:
                raise ValueError(f"{option} must be 0 or more; got {value}. Leave it out for the default.")
        self.ignore_index = ignore_index
        self.gamma, self.pixel_share, self.dice_share, self.smooth = gamma, 1 - dice_share, dice_share, smooth
        self.pixel_name = pixel_name
        self.terms: dict[str, Tensor] = {}
        self.register_buffer("class_weights", weights, persistent=False)

    def denominator(self, masks: Tensor) -> Tensor:
        """Return what the pixel term divides by: the sum of the class weights over the valid pixels."""
        if self.class_weights is None:
            return self.valid(masks).sum().float()
        valid, labels = self.split(masks)
        return (self.class_weights[labels] * valid).sum()

    @torch.compiler.disable  # a graph break, in exchange for a gradient that is written once
    def forward(self, logits: Tensor, masks: Tensor, denominator: Tensor | float | None = None) -> Tensor:
        """Return the scalar loss, float32 (float64 for float64 logits).

        Args:
            logits: (N, C, H, W), any float dtype, any memory format.
            masks: (N, H, W), int64 or uint8 class ids or `ignore_index`; never written to.
            denominator: the sum of `denominator(masks)` over all the micro-batches (and processes) of a
                step; None where this batch is the whole step. The sum of the micro-batches' pixel terms is
                then that of the whole batch. Dice is no sum over pixels: a micro-batch's own Dice enters in
                proportion to its part of the denominator.

        Raises:
            ValueError: shapes that do not fit; on the CPU also a label that is no class.
        """
        n, c, *size = logits.shape
        if logits.ndim != 4 or c < 2 or masks.shape != (n, *size):
            raise ValueError(
                "loss: logits must be (N, C, H, W) with C of 2 or more and masks (N, H, W); got "
                f"{tuple(logits.shape)} and {tuple(masks.shape)}. Two classes need two channels."
            )
        if self.class_weights is not None and len(self.class_weights) != c:
            raise ValueError(
                f"class_weights must hold one number for each of the {c} classes; got "
                f"{len(self.class_weights)}. Give background its weight too."
            )
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if not logits.is_contiguous(memory_format=torch.channels_last):
            logits = logits.contiguous()
        try:
            own = self.denominator(masks).to(dtype)
            total = own if denominator is None else torch.zeros_like(own).add_(denominator)
            total = torch.where(total > 0, total, 1.0)
            share = torch.ones_like(own) if denominator is None else own / total
            loss, pixel, dice = _SoftmaxLoss.apply(logits, masks, total, share, self)
        except (IndexError, RuntimeError) as error:  # torch looks at every label in passing
            if "out of bounds" not in str(error):
                raise
            raise ValueError(
                f"loss: masks must hold class ids 0..{c - 1} or {self.ignore_index}; got ids from "
                f"{masks.min()} to {masks.max()}. Map the others, or raise num_classes."
            ) from error
        self.terms = {self.pixel_name: pixel} if self.pixel_share else {}
        if self.dice_share:
            self.terms["dice"] = dice
        return loss

    def with_terms(self, logits, masks, denominator=None):
        loss = self(logits, masks, denominator)
        return loss, self.terms

    def valid(self, masks: Tensor) -> Tensor:
        """Return which pixels count, bool."""
        if masks.dtype == torch.uint8 and not 0 <= self.ignore_index <= 255:  # torch would compare modulo 256
            return torch.ones_like(masks, dtype=torch.bool)
        return masks != self.ignore_index

    def split(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return which pixels count, and the labels, int64, with class 0 in place of those that do not."""
        valid = self.valid(masks)
        return valid, masks.masked_fill(~valid, 0).long()

    def pixel_value(self, log_py: Tensor, labels: Tensor) -> Tensor:
        """Return w_y (1 - p_y)^gamma (-log p_y)."""
        value = -log_py
        if self.gamma:
            value *= (-torch.expm1(log_py)) ** self.gamma
        return value if self.class_weights is None else value * self.class_weights[labels]

    def pixel_slope(self, log_py: Tensor, labels: Tensor) -> Tensor:
        """Return the derivative of `pixel_value` by log p_y."""
        if self.gamma:
            rest = (-torch.expm1(log_py)).clamp_(min=torch.finfo(log_py.dtype).tiny)  # 1 - p_y
            slope = rest ** (self.gamma - 1) * (self.gamma * log_py.exp() * log_py - rest)
        else:
            slope = torch.full_like(log_py, -1.0)
        return slope if self.class_weights is None else slope * self.class_weights[labels]
