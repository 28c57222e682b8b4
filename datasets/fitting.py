"""Fitting images and masks to the network's input: stretched, letterboxed, or left for random windows.

Pixel (i, j) covers [i, i+1) x [j, j+1), which aligns the bilinear image and the nearest-neighbour mask.
Outside the image a mask is `ignore_index`, and the image is a grey near the mean: about 0 once normalized,
like the padding of convolutions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

Size = tuple[int, int]  # (height, width)

OUTSIDE = 116  # ImageNet's mean green; the other two means are within 8


@dataclass(frozen=True)
class Box:
    """The region of the network's input that an image fills, and the image's own size, in pixels."""

    top: int
    left: int
    height: int
    width: int
    original_height: int
    original_width: int


def mean_std(in_channels: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation in 0..1 units: ImageNet's for 3 channels, else 0.5 and 0.25."""
    if in_channels == 3:
        return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return [0.5] * in_channels, [0.25] * in_channels


def place(original: Size, image_size: Size, resize: str) -> Box:
    """Return the region of the network's input that an image of size `original` fills.

    `resize` is stretch (fill image_size), letterbox (keep the aspect ratio, centred) or crop (keep the size).
    """
    if resize == "stretch":
        return Box(0, 0, *image_size, *original)
    if resize == "crop":
        return Box(0, 0, *original, *original)
    scale = min(image_size[0] / original[0], image_size[1] / original[1])
    height, width = (max(1, round(side * scale)) for side in original)
    return Box((image_size[0] - height) // 2, (image_size[1] - width) // 2, height, width, *original)


def fit(
    image: np.ndarray, image_size: Size, resize: str, original: Size | None = None
) -> tuple[np.ndarray, Box]:
    """Fit an image, uint8 (H, W, C), to the network's input: antialiased bilinear, padded.

    `original` is the file's (H, W) if `image` is a JPEG that was reduced while decoding.
    """
    box = place(tuple(original or image.shape[:2]), tuple(image_size), resize)
    return _pad(resize_image(image, (box.height, box.width)), box, image_size, resize, OUTSIDE), box


def fit_mask(
    mask: np.ndarray, image_size: Size, resize: str, ignore_index: int, encode: Callable | None = None
) -> np.ndarray:
    """Fit a mask (H, W) as `fit` does the image, by nearest neighbour.

    `encode` maps raw values to class ids after resizing, where a large mask has fewer values to map.
    """
    box = place(mask.shape[:2], tuple(image_size), resize)
    content = resize_mask(mask, (box.height, box.width))
    return _pad(encode(content) if encode else content, box, image_size, resize, ignore_index)


def _pad(content: np.ndarray, box: Box, image_size: Size, resize: str, fill: int) -> np.ndarray:
    if resize != "letterbox":
        return content
    padded = np.full((*image_size, *content.shape[2:]), fill, content.dtype)
    padded[box.top : box.top + box.height, box.left : box.left + box.width] = content
    return padded


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """Resize uint8 (H, W, C) to (*size, C), antialiased bilinear."""
    if image.shape[:2] == tuple(size):
        return image
    bands = [image] if image.shape[2] == 3 else [image[..., i].copy() for i in range(image.shape[2])]
    resized = [Image.fromarray(band).resize(size[::-1], Image.Resampling.BILINEAR) for band in bands]
    return np.dstack(resized)


def resize_mask(mask: np.ndarray, size: Size, flips: tuple[bool, bool] = (False, False)) -> np.ndarray:
    """Take the value under each new pixel's centre, then flip (upside down, left to right)."""
    if mask.shape[:2] == tuple(size):
        return mask[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1]
    rows, columns = (
        (2 * np.arange(new) + 1)[:: -1 if flipped else 1] * old // (2 * new)
        for new, old, flipped in zip(size, mask.shape, flips, strict=False)
    )
    if len(mask) > size[0]:
        return mask[rows].take(columns, axis=1)
    return mask.take(columns, axis=1)[rows]  # whole rows are copied fast: the larger number is taken by rows
