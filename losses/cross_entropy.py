"""Cross entropy over pixels, plain and class-weighted, and the class weights of SegNet's paper."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .softmax_loss import SegmentationLoss


class CrossEntropy(SegmentationLoss):
    """L = sum_V -log p_y / |V|, the mean over the valid pixels V.

    Equals torch's `cross_entropy`, except that it is 0 (not NaN) where no pixel is valid, and that
    half-precision logits are summed in float32 (in float16 torch's sum overflows from some 240,000 pixels
    on).
    """

    def __init__(self, *, ignore_index: int = 255) -> None:
        super().__init__(ignore_index=ignore_index)


class WeightedCrossEntropy(SegmentationLoss):
    """L = sum_V w_y (-log p_y) / sum_V w_y.

    Equals torch's `cross_entropy(weight=w)`. The Caffe code of SegNet divides by |V| instead, so that there
    the size of the loss, and with it the right learning rate, depends on the weights' scale.

    `class_weights` is one number a class, for example from `median_frequency_weights`; it is needed.
    """

    def __init__(
        self, *, ignore_index: int = 255, class_weights: Sequence[float] | Tensor | None = None
    ) -> None:
        if class_weights is None:
            raise ValueError(
                "class_weights: 'weighted_ce' needs one number a class; got none. Give them, or use 'ce'."
            )
        super().__init__(ignore_index=ignore_index, class_weights=class_weights, pixel_name="weighted_ce")


def median_frequency_weights(
    class_pixels: Sequence[int] | np.ndarray, class_image_pixels: Sequence[int] | np.ndarray
) -> list[float]:
    """Return w_c = median(f) / f_c, f_c = pixels of class c / valid pixels of the images with class c.

    Papers: Eigen and Fergus, 2015, section 5.2, https://arxiv.org/abs/1411.4734; SegNet, Badrinarayanan et
    al., 2017, https://arxiv.org/abs/1511.00561. The constants in SegNet's published files differ: they cannot
    be computed from CamVid's published labels by this formula.

    The median is over the classes that occur; one that never occurs has weight 1, which no pixel asks for.

    Args:
        class_pixels: integers (C,): the pixels of each class over all training masks.
        class_image_pixels: integers (C,): the valid pixels of those images in which the class occurs.

    Example:
        >>> median_frequency_weights([600, 200], [800, 800])  # f = 0.75 and 0.25, median 0.5
        [0.6666666666666666, 2.0]
    """
    pixels = np.asarray(class_pixels, dtype=np.float64)
    image_pixels = np.asarray(class_image_pixels, dtype=np.float64)
    weights = np.ones_like(pixels)
    occurs = pixels > 0
    if occurs.any():
        frequency = pixels[occurs] / image_pixels[occurs]
        weights[occurs] = np.median(frequency) / frequency
    return weights.tolist()
