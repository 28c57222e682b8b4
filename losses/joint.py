"""Dice together with a loss that is a mean over pixels."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from .base import SegmentationLoss
from .dice import Dice
from .fused import Factors


class Joint(SegmentationLoss):
    """L = dice_weight * Dice + (1 - dice_weight) * pixel loss, each as its own class defines it.

    nnU-Net (Isensee et al., 2021) adds Dice and cross entropy with weights 1 and 1; the default here has half
    the size of that.

    Args:
        ignore_index: label of the pixels that do not count.
        class_weights: one number per class, for a pixel loss that takes them.
        dice_weight: in 0..1.
        joint_ce: the pixel loss, a name in `LOSSES`: ce, weighted_ce, focal or one of your own.
        dice_smooth: s of Dice, in pixels.
        fused: compute both in one pass where the pixel loss has a fused form.
        **options: those of the pixel loss, e.g. `focal_gamma`.

    Raises:
        ValueError: `joint_ce` is not a loss over pixels; an option or weights that it does not take; a value
            out of range.
    """

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        class_weights: Sequence[float] | Tensor | None = None,
        dice_weight: float = 0.5,
        joint_ce: str = "ce",
        dice_smooth: float = 1.0,
        fused: bool = True,
        **options: object,
    ) -> None:
        from . import LOSSES, build_loss  # which import this file

        choices = [name for name in LOSSES if name not in ("dice", "joint")]
        if joint_ce not in choices:
            raise ValueError(f"joint_ce must be one of {', '.join(choices)}; got {joint_ce!r}. Choose one.")
        if not 0 <= dice_weight <= 1:
            raise ValueError(f"dice_weight must be in 0..1; got {dice_weight}. Leave it out for the default.")
        super().__init__(ignore_index=ignore_index, fused=fused)
        self.pixel_loss = build_loss(joint_ce, ignore_index, class_weights, fused=fused, **options)
        self.dice = Dice(ignore_index=ignore_index, dice_smooth=dice_smooth, fused=fused)
        self.dice_weight = dice_weight

    @property
    def factors(self) -> Factors | None:
        """This loss as a case of `softmax_loss`, if the pixel loss is one."""
        weights = {"pixel": 1 - self.dice_weight, "dice": self.dice_weight, "smooth": self.dice.smooth}
        return self.pixel_loss.factors and replace(self.pixel_loss.factors, **weights)

    def denominator(self, masks: Tensor) -> Tensor:
        """Return that of the pixel loss."""
        return self.pixel_loss.denominator(masks)

    def normalizers(
        self, logits: Tensor, masks: Tensor, denominator: Tensor | float | None
    ) -> tuple[Tensor, Tensor]:
        """Return those of the pixel loss."""
        return self.pixel_loss.normalizers(logits, masks, denominator)

    def with_terms(
        self, logits: Tensor, masks: Tensor, denominator: Tensor | float | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and the pixel loss and Dice by name, detached; one of weight 0 is left out."""
        if self.fused and self.factors:
            loss, pixel, dice = self.fused_terms(logits, masks, denominator)
        else:
            _, fraction = self.normalizers(logits, masks, denominator)
            pixel = self.pixel_loss(logits, masks, denominator)
            dice = fraction * self.dice(logits, masks)
            loss = (1 - self.dice_weight) * pixel + self.dice_weight * dice
        terms = {self.pixel_loss.name: pixel} if self.dice_weight < 1 else {}
        terms |= {"dice": dice} if self.dice_weight > 0 else {}
        return loss, {name: term.detach() for name, term in terms.items()}
