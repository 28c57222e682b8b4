"""Soft Dice loss over the classes that the batch holds."""

from .pixelwise import SegmentationLoss


class Dice(SegmentationLoss):
    """One minus the mean soft Dice of the classes present in the batch."""

    def __init__(self, *, ignore_index: int = 255, dice_smooth: float = 1.0):
        super().__init__(
            ignore_index=ignore_index, pixel_share=0.0, dice_share=1.0, smooth=float(dice_smooth)
        )
