"""Soft Dice over the classes that the batch holds."""

from .softmax_loss import SegmentationLoss


class Dice(SegmentationLoss):
    """L = 1 - mean of d_c over the classes present among the batch's valid labels.

    d_c = (2 sum_V p_c [y = c] + s) / (sum_V p_c + n_c + s), n_c the pixels of class c, sums over the whole
    batch. After V-Net (Milletari et al., 2016), section 3, https://arxiv.org/abs/1606.04797, with plain sums
    in place of the squared ones below the line, which keep the gradient alive where p is small.

    Crops seldom hold all classes; an absent one would have d_c near 0 or 1 whatever the net does right, so it
    is left out, and its suppression is left to the cross entropy: hence `joint` as the usual choice.

    Differs from: segmentation_models.pytorch, which divides by C although absent classes add 0; MONAI, which
    takes a ratio per picture and counts absent classes; milesial and yassouali, which take one ratio over all
    classes together (the latter after writing another class over the ignored pixels of the masks). nnU-Net
    leaves out background.

    `dice_smooth` is s, in pixels, 0 or more; 1 matters only for classes of a few pixels.
    """

    def __init__(self, *, ignore_index: int = 255, dice_smooth: float = 1.0) -> None:
        super().__init__(ignore_index=ignore_index, dice_share=1.0, smooth=dice_smooth)
