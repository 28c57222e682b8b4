"""All losses in one pass: a softmax, a mean over pixels, a Dice term, and their common gradient.

With p = softmax(x) over the classes, labels y, class weights w, valid pixels V, and W = sum_V w_y:

    pixel term  L = sum_V w_y (1 - p_y)^gamma (-log p_y) / W
    Dice term   D = 1 - mean over present c of d_c,   d_c = (2 sum_V p_c [y = c] + s) / (sum_V p_c + n_c + s)

Both depend on the logits through p, so that the gradient at a pixel has one form. With a = dL / dlog p_y,
u_c = dD / d(sum_V p_c [y = c]), v_c = dD / d(sum_V p_c):

    dx_j = p_j (v_j - t) + [j = y] (u_y p_y + a),   t = sum_k p_k v_k + u_y p_y + a

The formulas in cross_entropy.py, focal.py, dice.py and joint.py keep five to seven arrays of the size of the
logits for autograd. Here the forward pass keeps two planes (log p_y and the log of the softmax's
denominator), and the backward pass computes p again in the memory that becomes the gradient. Both process the
batch in pieces that fit into the CPU's cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PIECE = {"cpu": 1 << 21, "cuda": 1 << 26}  # logits at a time: the CPU's cache, few launches on a GPU
_BUCKETS = 1024  # partial sums per class on a GPU, so that atomic additions seldom meet


@dataclass(frozen=True)
class Factors:
    """A loss as pixel * (pixel term) + dice * (Dice term)."""

    ignore_index: int
    class_weights: Tensor | None = None
    gamma: float = 0.0
    pixel: float = 1.0
    dice: float = 0.0
    smooth: float = 1.0


def softmax_loss(
    logits: Tensor, masks: Tensor, total: Tensor, fraction: Tensor, factors: Factors
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the pixel term and the Dice term; the first alone has a gradient.

    Args:
        logits: (N, C, H, W), any float dtype, any memory format.
        masks: (N, H, W), class ids or `ignore_index`.
        total: W, scalar; its dtype is that of the computation.
        fraction: factor of the Dice term, scalar.
        factors: which loss it is.
    """
    if not logits.is_contiguous(memory_format=torch.channels_last):
        logits = logits.contiguous()
    return _SoftmaxLoss.apply(logits, masks, total, fraction, factors)


def valid_pixels(masks: Tensor, ignore_index: int) -> Tensor:
    """Return which pixels count, bool."""
    if masks.dtype == torch.uint8 and not 0 <= ignore_index <= 255:  # torch would compare modulo 256
        return torch.ones_like(masks, dtype=torch.bool)
    return masks != ignore_index


def split_masks(masks: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return which pixels count, bool, and the labels, int64, with class 0 where they do not."""
    valid = valid_pixels(masks, ignore_index)
    return valid, masks.masked_fill(~valid, 0).long()


class _SoftmaxLoss(torch.autograd.Function):
    """`softmax_loss` of logits in one of the two memory formats."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, masks: Tensor, total: Tensor, fraction: Tensor, factors: Factors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum both terms piece by piece."""
        with torch.autocast(logits.device.type, enabled=False):
            x, y, c = logits.flatten(2), masks.flatten(1), logits.shape[1]
            dtype = total.dtype
            log_py, log_sum = torch.empty((2, *y.shape), dtype=dtype, device=x.device)
            overlap, mass, pixels = torch.zeros((3, c), dtype=dtype, device=x.device)
            pixel = torch.zeros((), dtype=dtype, device=x.device)
            for at, piece, valid, labels, scratch in _pieces(x, y, factors, dtype, buffers=1):
                log_p = _log_softmax(piece, scratch[0])
                log_py[at] = log_p.gather(1, labels[:, None])[:, 0]
                torch.sub(piece[:, 0], log_p[:, 0], out=log_sum[at])
                log_sum[at].masked_fill_(valid == 0, torch.inf)  # so that p is 0 in the backward pass
                if factors.pixel:
                    pixel += (_pixel_value(log_py[at], labels, factors) * valid).sum()
                if factors.dice:
                    overlap += _sum_by_label(log_py[at].exp().mul_(valid), labels, c)
                    pixels += _sum_by_label(valid, labels, c)
                    mass += _sum_over_pixels(log_p.exp_(), valid)
            pixel /= total
            below = (mass + pixels + factors.smooth).clamp(min=1e-12)  # 0 for an absent class if s is 0
            d = (2 * overlap + factors.smooth) / below
            present = (pixels > 0).to(dtype)
            parts = present * fraction / present.sum().clamp(min=1)  # of each class in the Dice term
            dice = ((1 - d) * parts).sum()
            to_overlap = -2 / below * parts * factors.dice
            to_mass = d / below * parts * factors.dice
            loss = factors.pixel * pixel + factors.dice * dice
        ctx.factors = factors
        ctx.save_for_backward(logits, masks, log_py, log_sum, to_overlap, to_mass, factors.pixel / total)
        ctx.mark_non_differentiable(pixel, dice)
        return loss, pixel, dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Write dx as in this file's docstring, piece by piece."""
        logits, masks, log_py, log_sum, *slopes = ctx.saved_tensors
        factors, dtype = ctx.factors, log_py.dtype
        with torch.autocast(logits.device.type, enabled=False):
            to_overlap, to_mass, to_pixel = (value * slope for value in slopes)
            grad = torch.empty_like(logits)
            x, y, dx = logits.flatten(2), masks.flatten(1), grad.flatten(2)
            for at, piece, valid, labels, scratch in _pieces(
                x, y, factors, dtype, buffers=1 + bool(factors.dice)
            ):
                out = dx[at[0], :, at[1]]
                p = out if out.dtype == dtype else _view(scratch[0], piece)
                torch.sub(piece, log_sum[at][:, None], out=p).exp_()
                at_label = _pixel_slope(log_py[at], labels, factors) * valid * to_pixel  # a
                if factors.dice:
                    at_label += log_py[at].exp() * valid * to_overlap[labels]  # a + u_y p_y
                    t = _sum_over_classes(p, to_mass).add_(at_label)
                    p.mul_(torch.sub(to_mass[:, None], t[:, None], out=_view(scratch[1], piece)))
                else:
                    p.mul_(at_label[:, None].neg())
                p.scatter_add_(1, labels[:, None], at_label[:, None])
                if p is not out:
                    out.copy_(p)
        return grad, None, None, None, None


def _pixel_value(log_py: Tensor, labels: Tensor, factors: Factors) -> Tensor:
    """Return w_y (1 - p_y)^gamma (-log p_y)."""
    value = -log_py
    if factors.gamma:
        value *= (-torch.expm1(log_py)) ** factors.gamma
    return value if factors.class_weights is None else value * factors.class_weights[labels]


def _pixel_slope(log_py: Tensor, labels: Tensor, factors: Factors) -> Tensor:
    """Return the derivative of `_pixel_value` with respect to log p_y."""
    gamma = factors.gamma
    if gamma:
        rest = (-torch.expm1(log_py)).clamp_(min=torch.finfo(log_py.dtype).tiny)  # 1 - p_y
        slope = rest ** (gamma - 1) * (gamma * log_py.exp() * log_py - rest)
    else:
        slope = torch.full_like(log_py, -1.0)
    return slope if factors.class_weights is None else slope * factors.class_weights[labels]


def _pieces(
    x: Tensor, y: Tensor, factors: Factors, dtype: torch.dtype, buffers: int
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor, Tensor, Tensor]]:
    """Cut logits (N, C, P) and masks (N, P) into pieces, on the CPU of one image each.

    Yields:
        The piece's slices (images, pixels); its logits; which pixels count, as 0 or 1; its labels; flat
        `buffers` of the size of the largest piece, the same for all.
    """
    n, c, p = x.shape
    size = max(1, _PIECE.get(x.device.type, 1 << 24) // c)  # pixels
    images, pixels = (1, size) if x.device.type == "cpu" else (max(1, size // p), p)
    scratch = torch.empty((buffers, min(images, n) * c * min(pixels, p)), dtype=dtype, device=x.device)
    for first in range(0, n, images):
        for left in range(0, p, pixels):
            at = slice(first, first + images), slice(left, left + pixels)
            valid, labels = split_masks(y[at], factors.ignore_index)
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
    return _sum_by_label_in_buckets(values, labels, num_classes)


def _sum_by_label_in_buckets(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """`_sum_by_label` for GPUs, where bincount would make the host wait.

    One atomic addition per pixel, into one of `_BUCKETS` sums per class; comparing each pixel with each class
    costs `num_classes` operations per pixel instead. Not measured on a GPU yet.
    """
    labels, values = labels.flatten(), values.flatten()
    bucket = torch.arange(len(labels), device=labels.device) % _BUCKETS
    sums = torch.zeros(_BUCKETS * num_classes, dtype=values.dtype, device=values.device)
    return sums.index_add_(0, labels * _BUCKETS + bucket, values).view(num_classes, _BUCKETS).sum(1)
