"""Focal loss, in its multi-class softmax form."""

from collections.abc import Sequence

from torch import Tensor

from .softmax_loss import SegmentationLoss


class Focal(SegmentationLoss):
    """L = sum_V a_y (1 - p_y)^gamma (-log p_y) / sum_V a_y, a being the class weights or 1.

    Paper: Focal Loss for Dense Object Detection (Lin et al., 2017), equation 5,
    https://arxiv.org/abs/1708.02002, with the softmax's p_y for the sigmoid's p_t. With gamma 0 it is the
    (weighted) cross entropy, digit for digit.

    Differs from: MONAI, which divides by N C H W and so is C times smaller; segmentation_models.pytorch,
    whose multi-class mode is C one-against-rest sigmoid losses; yassouali/pytorch-segmentation, which takes
    p_y from the weighted cross entropy and whose mean counts ignored pixels.

    Args:
        ignore_index: label of the pixels that count for nothing.
        class_weights: one number a class, or None.
        focal_gamma: the exponent, 0 or more; the larger, the less well-classified pixels count.

    Raises:
        ValueError: `focal_gamma` below 0, or weights that `SegmentationLoss` refuses.
    """

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        class_weights: Sequence[float] | Tensor | None = None,
        focal_gamma: float = 2.0,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index, class_weights=class_weights, gamma=focal_gamma, pixel_name="focal"
        )
