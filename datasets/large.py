"""Pictures and masks too large to be arrays at once: decoded in Pillow's own memory, made arrays by strips.

Rows are those of `reading.read_image` and `read_mask` to the bit, since converting treats each pixel alone.
So are resized pictures where Pillow's own can be resized; else, being resized along rows first and then along
columns, they may differ by the rounding between the two.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from .reading import (
    MAX_PIXELS,
    _count_pages,
    _damage,
    _mask_values,
    _naming,
    _npy,
    _open,
    _orientation,
    _to_channels,
    read_fitted,
    read_image,
    read_mask,
)
from .transforms import Box, fit, place, resize_image

STEP = 64  # rows that are converted at a time
STRIP = 2**22  # pixels of a strip
TURNS = {  # EXIF orientation: how the picture is turned to stand upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def picture_size(path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of a picture, EXIF applied, from the file's head alone.

    Raises:
        DataError: unreadable or too large; the message names the file.
    """
    with _naming(path):
        if Path(path).suffix.lower() == ".npy":
            return _npy(Path(path), max_pixels, None).shape[:2]
        with _open(Path(path), max_pixels, None) as picture:
            return picture.size if _orientation(picture) >= 5 else picture.size[::-1]


class LargePicture:
    """A picture whose rows are converted when they are asked for; decoded within `with`.

    Memory while decoded: 4 bytes a pixel for colours, 1 for grey. Files of one page a channel, which are
    rare, are read whole.

    Args:
        path: the file.
        in_channels: number of channels to bring it to, by the rules of `reading`.
        max_pixels: larger pictures are refused.

    Attributes:
        size: height and width, EXIF applied; known within `with`.

    Raises:
        DataError: unreadable, truncated or too large, by any method; the message names the file.
    """

    def __init__(self, path, in_channels: int, max_pixels: int = MAX_PIXELS):
        self.path, self.in_channels, self.max_pixels = Path(path), in_channels, max_pixels
        self.size, self._turn = (0, 0), 1
        self._picture = self._array = None

    def __enter__(self):
        with _naming(self.path):
            pages = 1
            if self.path.suffix.lower() != ".npy":
                self._picture = _open(self.path, self.max_pixels, None)
                pages = _count_pages(self._picture)
            if self._picture is None or pages > 1:
                self._array = self._whole()
                self.size = self._array.shape[:2]
            else:
                if self._picture.format == "TIFF":
                    self._picture.load()  # which turns it, and forgets the orientation
                self._turn = _orientation(self._picture)
                self.size = self._picture.size if self._turn >= 5 else self._picture.size[::-1]
        return self

    def __exit__(self, *_):
        if self._picture is not None:
            self._picture.close()
        self._picture = self._array = None

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows from `top` up to `bottom`, uint8 (bottom - top, W, in_channels)."""
        if self._array is not None:
            return self._array[top:bottom]
        with _naming(self.path):
            steps = range(top, bottom, STEP)
            return np.concatenate([self._convert(self._cut(at, min(bottom, at + STEP))) for at in steps])

    def strips(self) -> Iterator[tuple[int, np.ndarray]]:
        """All rows from top to bottom: (top, rows), so many that their arrays stay small."""
        height, width = self.size
        step = max(1, STRIP // width)
        for top in range(0, height, step):
            yield top, self.rows(top, min(height, top + step))

    def _whole(self) -> np.ndarray:
        return read_image(self.path, self.in_channels, max_pixels=self.max_pixels)

    def _convert(self, part: Image.Image) -> np.ndarray:
        return _to_channels(part, self.in_channels)

    def _cut(self, top: int, bottom: int) -> Image.Image:
        height, width = self.size
        first, last = (height - bottom, height - top) if self._turn in (3, 4, 7, 8) else (top, bottom)
        if self._turn >= 5:  # rows of the upright picture are columns of the file
            part = self._picture.crop((first, 0, last, width))
        else:
            part = self._picture.crop((0, first, width, last))
        return part.transpose(TURNS[self._turn]) if self._turn != 1 else part

    @property
    def _plain(self) -> bool:
        """Whether resizing and converting may change places."""
        plain = self._turn == 1 and self._picture is not None and "transparency" not in self._picture.info
        return plain and (self._picture.mode, self.in_channels) in (("RGB", 3), ("L", 1), ("L", 3))

    def fitted(self, image_size, resize: str) -> tuple[np.ndarray, Box]:
        """As `reading.read_fitted` gives it: uint8 (h, w, C), and where the picture lies in it."""
        if self._picture is not None and self._picture.format in ("JPEG", "MPO"):  # decoded smaller
            return read_fitted(self.path, self.in_channels, image_size, resize)
        box, height = place(self.size, tuple(image_size), resize), self.size[0]
        if self._plain:
            small = self._picture.resize((box.width, box.height), Image.Resampling.BILINEAR)
            return fit(_to_channels(small, self.in_channels), image_size, resize, self.size)
        narrow = np.empty((height, box.width, self.in_channels), np.uint8)
        for top in range(0, height, STEP):
            strip = self.rows(top, min(height, top + STEP))
            narrow[top : top + STEP] = resize_image(strip, (len(strip), box.width))
        return fit(resize_image(narrow, (box.height, box.width)), image_size, resize, self.size)

    def reduced(self, side: int) -> np.ndarray:
        """The whole picture with neither side above `side`, uint8 (h, w) or (h, w, 3), to be looked at."""
        factor = max(1, -(-max(self.size) // side))
        step, bands = factor * STEP, slice(3) if self.in_channels >= 3 else 0
        strips = (self.rows(top, min(self.size[0], top + step)) for top in range(0, self.size[0], step))
        reduced = [np.asarray(Image.fromarray(strip[..., bands]).reduce(factor)) for strip in strips]
        return np.concatenate(reduced)


class LargeMask(LargePicture):
    """A mask likewise: `rows` gives raw values as `reading.read_mask` does, of one byte a pixel mostly.

    Args:
        path: the file.
        as_colours: read a palette mask as the colours its palette names, not as its indices.
        max_pixels: larger masks are refused.
    """

    def __init__(self, path, as_colours: bool = False, max_pixels: int = MAX_PIXELS):
        super().__init__(path, 0, max_pixels)
        self.as_colours, self.damage = as_colours, ""

    def __enter__(self):
        super().__enter__()
        if self._picture is not None:
            self.damage = _damage(self._picture, self.path, None)
        return self

    def _whole(self) -> np.ndarray:
        return read_mask(self.path, self.as_colours, self.max_pixels)

    def _convert(self, part: Image.Image) -> np.ndarray:
        return _mask_values(part, self.as_colours)
