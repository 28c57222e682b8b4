"""Dice and a cross entropy together, over one softmax."""

from .pixelwise import SegmentationLoss


class Joint(SegmentationLoss):
    """dice_weight * Dice + (1 - dice_weight) * CE, CE being ``joint_ce``: ce, weighted_ce or focal."""

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        class_weights=None,
        dice_weight: float = 0.5,
        joint_ce: str = "ce",
        focal_gamma: float | None = None,
        dice_smooth: float = 1.0,
    ):
        super().__init__(
            ignore_index=ignore_index,
            class_weights=class_weights,
            gamma=(2.0 if focal_gamma is None else float(focal_gamma)) if joint_ce == "focal" else 0.0,
            pixel_share=1.0 - dice_weight,
            dice_share=dice_weight,
            smooth=float(dice_smooth),
            name=joint_ce,
        )
