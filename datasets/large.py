"""Images and masks too large to be arrays at once: decoded in Pillow's own memory, converted in strips.

The rows equal those of `reading.read_image` and `read_mask` exactly, since conversion treats each pixel
alone. Resized images of colours or grey are equal too; images of other modes are resized along rows first and
then along columns, and may differ by the rounding between the two steps.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from . import reading
from .fitting import Box, fit, place, resize_image
from .reading import load_fitted, read_image, read_mask

STEP = 64  # rows that are converted at a time
STRIP = 2**22  # pixels of a strip
AS_IS = (("RGB", 3), ("L", 1), ("L", 3))  # mode and channels for which resizing and conversion commute


def read_size(path: str | Path, *, upright: bool = True) -> tuple[int, int]:
    """Height and width of an image.

    Args:
        path: the file.
        upright: as EXIF rotates it, for which a PNG is decoded; else as stored, from the file's header alone.

    Raises:
        DataError: unreadable or too large; the message names the file.
    """
    path = Path(path)
    with reading.errors_naming(path):
        if path.suffix.lower() == ".npy":
            return reading.read_npy(path).shape[:2]
        image = reading.open_image(path)
        if isinstance(image, reading.Deferred):
            return image.size if upright else image.stored_size
        with image:
            rotated = upright and image.format != "TIFF"  # for which Pillow gives the rotated size
            return image.size if rotated and reading.orientation_of(image) >= 5 else image.size[::-1]


class LargeImage:
    """An image whose rows are converted when they are asked for; decoded within `with`.

    Memory while decoded: 4 bytes per pixel for colours, 1 for grey; twice that while EXIF rotates it. Files
    that Pillow does not read exactly, and .npy, are read whole.

    Args:
        path: the file.
        in_channels: number of channels to convert to, by the rules of `reading`.
        max_value: value of integers above 8 bits that becomes 255, see `reading.read_image`.

    Attributes:
        size: height and width, EXIF applied; known within `with`.

    Raises:
        DataError: unreadable, truncated or too large, by any method; the message names the file.
    """

    def __init__(self, path: str | Path, in_channels: int, max_value: int | None = None):
        self.path, self.in_channels, self.max_value = Path(path), in_channels, max_value
        self._image = self._array = None

    def __enter__(self):
        with reading.errors_naming(self.path):
            if self.path.suffix.lower() != ".npy":
                image = reading.open_image(self.path)
                if not isinstance(image, reading.Deferred):
                    self._is_jpeg = image.format in ("JPEG", "MPO")
                    self._image = self._prepare(image)
                    self.size = self._image.size[::-1]
                    return self
            self._array = self._read_whole()
            self.size = self._array.shape[:2]
        return self

    def __exit__(self, *_: object):
        if self._image:
            self._image.close()
        self._image = self._array = None

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows from `top` up to `bottom`, uint8 (bottom - top, W, in_channels)."""
        if self._array is not None:
            return self._array[top:bottom]
        cuts = [(0, start, self.size[1], min(bottom, start + STEP)) for start in range(top, bottom, STEP)]
        with reading.errors_naming(self.path):
            return np.concatenate([self._convert(self._image.crop(cut)) for cut in cuts])

    def strips(self, step: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Yield all rows from top to bottom as (top, rows), `step` at a time; 0 chooses a small strip."""
        step = step or max(1, STRIP // self.size[1])
        for top in range(0, self.size[0], step):
            yield top, self.rows(top, min(self.size[0], top + step))

    def fitted(self, image_size: tuple[int, int], resize: str) -> tuple[np.ndarray, Box]:
        """As `reading.load_fitted` gives it: uint8 (h, w, C), and the image's position in it."""
        if self._image and self._is_jpeg:  # decoded at a smaller size
            return load_fitted(self.path, self.in_channels, image_size, resize)[:2]
        box = place(self.size, tuple(image_size), resize)
        image = self._image
        if image and (image.mode, self.in_channels) in AS_IS:
            resized = image.resize((box.width, box.height), Image.Resampling.BILINEAR)
            small = reading.channels_of(resized, self.in_channels)
        else:
            narrow = [resize_image(strip, (len(strip), box.width)) for _, strip in self.strips()]
            small = resize_image(np.concatenate(narrow), (box.height, box.width))
        return fit(small, image_size, resize, self.size)

    def reduced(self, side: int) -> np.ndarray:
        """The whole image with neither side above `side`, uint8 (h, w) or (h, w, 3), for display."""
        factor = -(-max(self.size) // side)
        bands = slice(3) if self.in_channels >= 3 else 0
        step = factor * max(1, STRIP // (factor * self.size[1]))
        strips = (Image.fromarray(strip[..., bands]) for _, strip in self.strips(step))
        return np.concatenate([np.asarray(strip.reduce(factor)) for strip in strips])

    def _prepare(self, image: Image.Image) -> Image.Image:
        """Decode, rotate, and settle what depends on the whole image."""
        return reading.with_plain_alpha(reading.upright_image(image))

    def _read_whole(self) -> np.ndarray:
        return read_image(self.path, self.in_channels, self.max_value)

    def _convert(self, part: Image.Image) -> np.ndarray:
        return reading.channels_of(part, self.in_channels, self.max_value)


class LargeMask(LargeImage):
    """A large mask: `rows` gives raw values as `reading.read_mask` does, mostly of one byte per pixel.

    Args:
        path: the file.
        as_colours: read a palette mask as the colours that its palette shows, not as its indices.

    Attributes:
        damage: as `reading.load_mask` gives it; known within `with`.
    """

    def __init__(self, path: str | Path, as_colours: bool = False):
        super().__init__(path, 0)
        self.as_colours, self.damage = as_colours, ""

    def _prepare(self, image: Image.Image) -> Image.Image:
        self.damage = reading.mask_damage(image, self.path)
        return reading.upright_mask(image)

    def _read_whole(self) -> np.ndarray:
        return read_mask(self.path, self.as_colours)

    def _convert(self, part: Image.Image) -> np.ndarray:
        return reading.mask_values(part, self.as_colours)
