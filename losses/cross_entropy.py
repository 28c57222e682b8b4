"""Cross entropy over pixels, plain and class-weighted, and the class weights of SegNet's paper."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .base import SegmentationLoss, label_log_probability
from .fused import Factors


class CrossEntropy(SegmentationLoss):
    """L = sum_V -log p_y / |V|, the mean over the valid pixels V.

    Equals torch's `cross_entropy`, except that it is 0 (not NaN) where no pixel is valid, and that
    half-precision logits are summed in float32 (in float16 torch's sum overflows from some 240,000 pixels
    on).
    """

    name = "ce"

    def __init__(self, *, ignore_index: int = 255, fused: bool = True) -> None:
        super().__init__(ignore_index=ignore_index, fused=fused)
        self.factors = Factors(ignore_index)

    def formula(self, logits: Tensor, masks: Tensor, total: Tensor, fraction: Tensor) -> Tensor:
        """Return sum_V -log p_y / total."""
        valid, labels = self.split(masks)
        log_py = label_log_probability(logits, labels)
        return (-log_py * valid).sum() / total


class WeightedCrossEntropy(SegmentationLoss):
    """L = sum_V w_y (-log p_y) / sum_V w_y.

    Equals torch's `cross_entropy(weight=w)`. The Caffe code of SegNet divides by |V| instead, so that there
    the size of the loss, and with it the right learning rate, depends on the scale of the weights.

    `class_weights`, required, is one number per class, for example from `median_frequency_weights`.
    """

    name = "weighted_ce"

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        class_weights: Sequence[float] | Tensor | None = None,
        fused: bool = True,
    ) -> None:
        if class_weights is None:
            raise ValueError(
                "class_weights: 'weighted_ce' needs one number per class; got none. Give them, or use 'ce'."
            )
        super().__init__(ignore_index=ignore_index, class_weights=class_weights, fused=fused)

    @property
    def factors(self) -> Factors:
        """This loss as a case of `softmax_loss`."""
        return Factors(self.ignore_index, self.class_weights)

    def formula(self, logits: Tensor, masks: Tensor, total: Tensor, fraction: Tensor) -> Tensor:
        """Return sum_V w_y (-log p_y) / total."""
        valid, labels = self.split(masks)
        log_py = label_log_probability(logits, labels)
        weights = self.class_weights[labels] * valid
        return (weights * -log_py).sum() / total


def median_frequency_weights(
    class_pixels: Sequence[int] | np.ndarray, class_image_pixels: Sequence[int] | np.ndarray
) -> list[float]:
    """Return w_c = median(f) / f_c, f_c = pixels of class c / valid pixels of the images with class c.

    Papers: Eigen and Fergus, 2015, section 5.2, https://arxiv.org/abs/1411.4734; SegNet, Badrinarayanan et
    al., 2017, https://arxiv.org/abs/1511.00561. The constants in SegNet's published files differ: they cannot
    be computed from CamVid's published labels by this formula.

    The median is over the classes that occur; one that never occurs has weight 1, which no pixel uses.

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
