"""Decoded samples that Pillow has no mode for: bands of any number and type, and their way to uint8."""

from dataclasses import dataclass

import numpy as np
from PIL import Image


class DataError(ValueError):
    """Something in the user's data that the user can fix; the message is complete and ready to print."""


@dataclass
class Samples:
    """The numbers of an image file as they are stored."""

    array: np.ndarray  # (H, W, bands), EXIF orientation applied
    bits: int  # significant bits of an integer sample; the type's own for floats
    colors: int = 1  # leading bands that are a colour: 3 for red, green, blue; 1 for grey; 0 where undeclared
    alpha: str = ""  # of the band after these: straight, premultiplied, or none of both
    pages: int = 1  # of which each is a band
    is_inverted: bool = False  # stored with 0 for white
    is_npy: bool = False  # whose shape the user chose

    @property
    def is_wide(self) -> bool:
        """True for integers of more than 8 bits, whose range preflight finds."""
        return self.array.dtype.kind in "iu" and self.bits > 8


def to_bytes(array: np.ndarray, bits: int = 0, max_value: int | None = None) -> np.ndarray:
    """Scale to 0..255 by the declared range, never by the content of this image alone.

    Args:
        array: bool, integers of 0 or more, or floats in 0..1.
        bits: significant bits of an integer; 0 for all of its type's.
        max_value: value of integers above 8 bits that becomes 255, which preflight found over all images;
            None for the largest of `bits`, 65535 at most.

    Raises:
        DataError: values outside this range.
    """
    kind, bits = array.dtype.kind, bits or 8 * array.dtype.itemsize
    if array.dtype == np.uint8 and bits == 8:
        return array
    if array.dtype == np.int8:
        raise DataError("holds signed 8-bit integers. Save it as uint8.")
    top = 1 if kind in "bf" else 2 ** min(bits, 16) - 1
    if kind in "iu" and bits > 8 and max_value is not None:
        top = max_value
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= top):  # also catches NaN
        found = f"holds {low:.6g}..{high:.6g}"
        if top == max_value:
            raise DataError(f"{found}; the data set's own images of this kind end at {top}. Rescale it.")
        raise DataError(f"{found}; expected 0..{top} of {array.dtype}. Rescale it.")
    return (array * (255 / top) + 0.5).astype(np.uint8)


def to_image(samples: Samples, in_channels: int, max_value: int | None) -> np.ndarray | Image.Image:
    """Samples as uint8: an array (H, W, in_channels) where the bands are as many, else an image to convert.

    Raises:
        DataError: another number of bands that are neither grey nor colour, with or without alpha.
    """
    (height, _, bands), colors = samples.array.shape, samples.colors
    if samples.is_npy and bands != in_channels and (bands, in_channels) != (1, 3):
        fix = "transpose it to" if height == in_channels else "save it as"
        raise DataError(f"has shape {samples.array.shape}; {fix} (height, width, {in_channels} channels).")
    pixels = to_bytes(samples.array, samples.bits, max_value)
    if bands == in_channels:
        return np.ascontiguousarray(pixels)
    if samples.is_npy:
        return np.repeat(pixels, in_channels, axis=2)
    has_alpha = bands == colors + 1 and bool(samples.alpha)
    spare = colors == 3 and not samples.alpha and in_channels < 4  # readers of colours skip extra samples
    if not (colors and in_channels in (1, 3, 4) and (bands == colors or has_alpha or spare)):
        raise DataError(
            f"has {bands} bands, expected {in_channels}. Set in_channels {bands}, or save the bands that "
            "count as .npy (H, W, C)."
        )
    kept = colors + 1 if samples.alpha == "straight" else colors  # premultiplied colours are those on black
    pixels = np.ascontiguousarray(pixels[..., :kept])
    return Image.fromarray(pixels[..., 0] if kept == 1 else pixels)
