"""Dice and a form of cross entropy together, over one softmax."""

from collections.abc import Sequence

from torch import Tensor

from .softmax_loss import SegmentationLoss


class Joint(SegmentationLoss):
    """L = dice_weight * Dice + (1 - dice_weight) * CE, each term as its own loss defines it.

    nnU-Net (Isensee et al., 2021) adds the two with weights 1 and 1; the default here has half the size of
    that.

    Args:
        ignore_index: label of the pixels that count for nothing.
        class_weights: one number a class, for weighted_ce (needed) and focal.
        dice_weight: in 0..1.
        joint_ce: the form of cross entropy: ce, weighted_ce or focal.
        focal_gamma: exponent of focal; 2 if None.
        dice_smooth: s of Dice, in pixels.

    Raises:
        ValueError: an option or weights that do not go with `joint_ce`, or a value out of range.
    """

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        class_weights: Sequence[float] | Tensor | None = None,
        dice_weight: float = 0.5,
        joint_ce: str = "ce",
        focal_gamma: float | None = None,
        dice_smooth: float = 1.0,
    ) -> None:
        if joint_ce not in ("ce", "weighted_ce", "focal"):
            raise ValueError(
                f"joint_ce must be ce, weighted_ce or focal; got {joint_ce!r}. Choose one of the three."
            )
        if joint_ce != "focal" and (joint_ce == "weighted_ce") != (class_weights is not None):
            raise ValueError(
                "class_weights belong to weighted_ce (always) and focal (if wished); got joint_ce "
                f"{joint_ce!r} with class_weights {class_weights}. Set joint_ce accordingly."
            )
        if joint_ce != "focal" and focal_gamma is not None:
            raise ValueError(
                f"focal_gamma applies to joint_ce 'focal'; got {focal_gamma} with joint_ce {joint_ce!r}. "
                "Leave focal_gamma out."
            )
        if focal_gamma is None:
            focal_gamma = 2.0 if joint_ce == "focal" else 0.0
        super().__init__(
            ignore_index=ignore_index,
            class_weights=class_weights,
            gamma=focal_gamma,
            dice_share=dice_weight,
            smooth=dice_smooth,
            pixel_name=joint_ce,
        )
