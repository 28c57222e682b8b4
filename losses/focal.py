"""Focal loss, in its multi-class softmax form."""

from .pixelwise import SegmentationLoss


class Focal(SegmentationLoss):
    """Sum over valid pixels of -a_y (1 - p_y)^gamma log p_y, divided by the sum of a_y."""

    def __init__(self, *, ignore_index: int = 255, class_weights=None, focal_gamma: float = 2.0):
        if not focal_gamma >= 0:
            raise ValueError(f"focal_gamma must be 0 or more; got {focal_gamma}. The paper's choice is 2.")
        super().__init__(
            ignore_index=ignore_index, class_weights=class_weights, gamma=float(focal_gamma), name="focal"
        )
