"""Pictures and masks too large to be arrays at once: decoded in Pillow's own memory, made arrays by strips.

Rows are those of `reading.read_image` and `read_mask` to the bit, since converting treats each pixel alone.
So are resized pictures of colours or grey; of other modes they are resized along rows first and then along
columns, and may differ by the rounding between the two.
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
AS_IS = (("RGB", 3), ("L", 1), ("L", 3))  # mode and channels: resizing and converting may change places


def picture_size(path: str | Path, *, upright: bool = True) -> tuple[int, int]:
    """Height and width of a picture.

    Args:
        path: the file.
        upright: as EXIF turns it, for which a PNG is decoded; else as stored, from the file's head alone.

    Raises:
        DataError: unreadable or too large; the message names the file.
    """
    path = Path(path)
    with reading._naming(path):
        if path.suffix.lower() == ".npy":
            return reading._npy(path).shape[:2]
        with reading._open(path) as picture:
            turned = upright and picture.format != "TIFF"  # of which Pillow gives the turned size
            return picture.size if turned and reading._orientation(picture) >= 5 else picture.size[::-1]


class LargePicture:
    """A picture whose rows are converted when they are asked for; decoded within `with`.

    Memory while decoded: 4 bytes a pixel for colours, 1 for grey; twice that while EXIF turns it. Files of
    one page a channel, and .npy, are read whole.

    Args:
        path: the file.
        in_channels: number of channels to bring it to, by the rules of `reading`.

    Attributes:
        size: height and width, EXIF applied; known within `with`.

    Raises:
        DataError: unreadable, truncated or too large, by any method; the message names the file.
    """

    def __init__(self, path: str | Path, in_channels: int):
        self.path, self.in_channels = Path(path), in_channels
        self._picture = self._array = None

    def __enter__(self):
        with reading._naming(self.path):
            if self.path.suffix.lower() != ".npy":
                picture = reading._open(self.path)
                self._look_at(picture)
                if reading._count_pages(picture) == 1:
                    self._is_jpeg = picture.format in ("JPEG", "MPO")
                    self._picture = reading._upright(picture)
                    self.size = self._picture.size[::-1]
                    return self
            self._array = self._whole()
            self.size = self._array.shape[:2]
        return self

    def __exit__(self, *_: object):
        if self._picture:
            self._picture.close()
        self._picture = self._array = None

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows from `top` up to `bottom`, uint8 (bottom - top, W, in_channels)."""
        if self._array is not None:
            return self._array[top:bottom]
        cuts = [(0, at, self.size[1], min(bottom, at + STEP)) for at in range(top, bottom, STEP)]
        with reading._naming(self.path):
            return np.concatenate([self._convert(self._picture.crop(cut)) for cut in cuts])

    def strips(self, step: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """All rows from top to bottom: (top, rows), `step` or so many that their arrays stay small."""
        step = step or max(1, STRIP // self.size[1])
        for top in range(0, self.size[0], step):
            yield top, self.rows(top, min(self.size[0], top + step))

    def fitted(self, image_size: tuple[int, int], resize: str) -> tuple[np.ndarray, Box]:
        """As `reading.load_fitted` gives it: uint8 (h, w, C), and where the picture lies in it."""
        if self._picture and self._is_jpeg:  # decoded smaller
            return load_fitted(self.path, self.in_channels, image_size, resize)[:2]
        box = place(self.size, tuple(image_size), resize)
        picture = self._picture
        if picture and (picture.mode, self.in_channels) in AS_IS and "transparency" not in picture.info:
            resized = picture.resize((box.width, box.height), Image.Resampling.BILINEAR)
            small = reading._to_channels(resized, self.in_channels)
        else:
            narrow = [resize_image(strip, (len(strip), box.width)) for _, strip in self.strips()]
            small = resize_image(np.concatenate(narrow), (box.height, box.width))
        return fit(small, image_size, resize, self.size)

    def reduced(self, side: int) -> np.ndarray:
        """The whole picture with neither side above `side`, uint8 (h, w) or (h, w, 3), to be looked at."""
        factor = -(-max(self.size) // side)
        bands = slice(3) if self.in_channels >= 3 else 0
        step = factor * max(1, STRIP // (factor * self.size[1]))
        strips = (Image.fromarray(strip[..., bands]) for _, strip in self.strips(step))
        return np.concatenate([np.asarray(strip.reduce(factor)) for strip in strips])

    def _look_at(self, picture: Image.Image) -> None:
        """Note what is asked of a file before it is decoded."""

    def _whole(self) -> np.ndarray:
        return read_image(self.path, self.in_channels)

    def _convert(self, part: Image.Image) -> np.ndarray:
        return reading._to_channels(part, self.in_channels)


class LargeMask(LargePicture):
    """A mask likewise: `rows` gives raw values as `reading.read_mask` does, of one byte a pixel mostly.

    Args:
        path: the file.
        as_colours: read a palette mask as the colours its palette names, not as its indices.

    Attributes:
        damage: as `reading.load_mask` gives it; known within `with`.
    """

    def __init__(self, path: str | Path, as_colours: bool = False):
        super().__init__(path, 0)
        self.as_colours, self.damage = as_colours, ""

    def _look_at(self, picture: Image.Image) -> None:
        self.damage = reading._damage(picture, self.path)

    def _whole(self) -> np.ndarray:
        return read_mask(self.path, self.as_colours)

    def _convert(self, part: Image.Image) -> np.ndarray:
        return reading._mask_values(part, self.as_colours)
