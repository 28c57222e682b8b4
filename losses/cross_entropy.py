"""Cross entropy over pixels, plain and class-weighted, and the weights of SegNet's paper."""

import numpy as np

from .pixelwise import SegmentationLoss


class CrossEntropy(SegmentationLoss):
    """Mean over the valid pixels of -log p_y; equals torch's cross_entropy, but for 0 (not NaN) where none is valid."""

    def __init__(self, *, ignore_index: int = 255):
        super().__init__(ignore_index=ignore_index, name="ce")


class WeightedCrossEntropy(SegmentationLoss):
    """Sum over valid pixels of -w_y log p_y, divided by the sum of w_y: equals torch's cross_entropy(weight=w).

    Caffe's SegNet divides by the number of pixels instead, which makes the loss's size depend on the weights.
    """

    def __init__(self, *, ignore_index: int = 255, class_weights=None):
        if class_weights is None:
            raise ValueError(
                "loss 'weighted_ce' needs class_weights; got none. Give one number a class, or use 'ce'."
            )
        super().__init__(ignore_index=ignore_index, class_weights=class_weights, name="weighted_ce")


def median_frequency_weights(class_pixels, class_image_pixels) -> list[float]:
    """Return SegNet's median-frequency weights (Badrinarayanan et al., 2017, section 4.1; Eigen and Fergus, 2015).

    f_c = pixels of class c / valid pixels of all images in which c occurs; w_c = median(f) / f_c. The median
    is taken over the classes that occur. A class that never occurs gets weight 1: no pixel will ever ask for
    it.

    Args:
        class_pixels: integers (C,), the pixels of each class over the training masks.
        class_image_pixels: integers (C,), the valid pixels of the images in which the class occurs.
    """
    pixels = np.asarray(class_pixels, dtype=np.float64)
    image_pixels = np.asarray(class_image_pixels, dtype=np.float64)
    occurs = pixels > 0
    weights = np.ones_like(pixels)
    if occurs.any():
        frequency = pixels[occurs] / image_pixels[occurs]
        weights[occurs] = np.median(frequency) / frequency
    return [float(weight) for weight in weights]
