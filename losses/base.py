"""What all losses share: valid pixels, class weights, the denominator, and the choice of the fused form."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .fused import Factors, softmax_loss, split_masks, valid_pixels


class SegmentationLoss(nn.Module):
    """Base class of the losses. A subclass defines `formula`, or `forward` itself.

    Args:
        ignore_index: label of the pixels that do not count.
        class_weights: one number per class, or None for all ones.
        fused: compute in one pass, by `losses/fused.py`, if the loss has `factors`; False: by `formula`.

    Raises:
        ValueError: weights that are not finite, one below 0, or all 0.
    """

    factors: Factors | None = None  # this loss as a case of `softmax_loss`

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        class_weights: Sequence[float] | Tensor | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        weights = None
        if class_weights is not None:
            weights = torch.as_tensor(class_weights, dtype=torch.float32)
            if weights.ndim != 1 or not weights.isfinite().all() or weights.min() < 0 or weights.max() == 0:
                raise ValueError(
                    "class_weights must hold one finite number per class, none below 0 and not all 0; "
                    f"got {class_weights}. Correct the list, or leave it out."
                )
        self.ignore_index, self.fused = ignore_index, fused
        self.register_buffer("class_weights", weights, persistent=False)

    @property
    def name(self) -> str:
        """The name of this loss among the terms."""
        return type(self).__name__.lower()

    def formula(self, logits: Tensor, masks: Tensor, total: Tensor, fraction: Tensor) -> Tensor:
        """Return the scalar loss in plain torch.

        Args:
            logits: (N, C, H, W), float32 or float64.
            masks: (N, H, W), class ids or `ignore_index`.
            total: what a mean over pixels divides by.
            fraction: this batch's part of `total`, for a loss that is not a mean over pixels.
        """
        raise NotImplementedError

    def forward(self, logits: Tensor, masks: Tensor, denominator: Tensor | float | None = None) -> Tensor:
        """Return the scalar loss, float32 (float64 for float64 logits).

        Args:
            logits: (N, C, H, W), any float dtype, any memory format.
            masks: (N, H, W), int64 or uint8 class ids or `ignore_index`; never written to.
            denominator: the sum of `denominator(masks)` over all micro-batches (and processes) of a step;
                None where this batch is the whole step. The losses of the micro-batches then add up to that
                of the whole batch. Dice is not a mean over pixels: that of a micro-batch counts in proportion
                to its part of the denominator.

        Raises:
            ValueError: shapes that do not fit; on the CPU also a label that is not a class.
        """
        return self.with_terms(logits, masks, denominator)[0]

    def with_terms(
        self, logits: Tensor, masks: Tensor, denominator: Tensor | float | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and its terms by name as detached scalars, before their weights in the loss."""
        if type(self).forward is not SegmentationLoss.forward:
            loss = self(logits, masks, denominator)
        elif self.fused and self.factors:
            loss, _, _ = self.fused_terms(logits, masks, denominator)
        else:
            total, fraction = self.normalizers(logits, masks, denominator)
            with self.explained_labels(masks, logits), torch.autocast(logits.device.type, enabled=False):
                loss = self.formula(logits.to(total.dtype), masks, total, fraction)
        return loss, {self.name: loss.detach()}

    @torch.compiler.disable  # a graph break, in exchange for a gradient that is written once
    def fused_terms(
        self, logits: Tensor, masks: Tensor, denominator: Tensor | float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, its mean over pixels, and its Dice term, in one pass."""
        with self.explained_labels(masks, logits):
            total, fraction = self.normalizers(logits, masks, denominator)
            return softmax_loss(logits, masks, total, fraction, self.factors)

    def denominator(self, masks: Tensor) -> Tensor:
        """Return what a mean over pixels divides by: the sum of the class weights over the valid pixels."""
        if self.class_weights is None:
            return valid_pixels(masks, self.ignore_index).sum().float()
        valid, labels = self.split(masks)
        return (self.class_weights[labels] * valid).sum()

    def split(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return which pixels are valid, bool, and the labels, int64, with class 0 where they are not."""
        return split_masks(masks, self.ignore_index)

    def normalizers(
        self, logits: Tensor, masks: Tensor, denominator: Tensor | float | None
    ) -> tuple[Tensor, Tensor]:
        """Return `total` and `fraction` as `formula` takes them, after checking the shapes."""
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
        with self.explained_labels(masks, logits):
            own = self.denominator(masks).to(torch.promote_types(logits.dtype, torch.float32))
        total = own if denominator is None else torch.zeros_like(own) + denominator
        total = torch.where(total > 0, total, 1.0)
        return total, torch.ones_like(own) if denominator is None else own / total

    @contextmanager
    def explained_labels(self, masks: Tensor, logits: Tensor) -> Iterator[None]:
        """Turn torch's error for a label that is not a class, which it meets in passing, into a message."""
        try:
            yield
        except (IndexError, RuntimeError) as error:
            if not any(words in str(error) for words in ("out of bounds", "Class values")):
                raise
            raise ValueError(
                f"loss: masks must hold class ids 0..{logits.shape[1] - 1} or {self.ignore_index}; got ids "
                f"from {masks.min()} to {masks.max()}. Map the others, or raise num_classes."
            ) from error


def check_at_least_0(**options: float) -> None:
    """Raise ValueError for an option below 0."""
    for option, value in options.items():
        if not value >= 0:
            raise ValueError(f"{option} must be 0 or more; got {value}. Leave it out for the default.")


def label_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p_y, (N, H, W), of softmax probabilities p over (N, C, H, W) and labels y (N, H, W)."""
    return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
