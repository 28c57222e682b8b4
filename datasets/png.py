"""PNG: 16 bits per channel and transparent grey, which Pillow reads as 8 bits or not at all."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from .samples import Samples
from .tiff import orient

GREY, RGB, GREY_ALPHA, RGB_ALPHA = 0, 2, 4, 6  # colour types


def color_depth(head: bytes) -> tuple[int, int]:
    """(colour type, bits per sample) from a PNG's first 26 bytes."""
    return head[25], head[24]


def is_wide(image: Image.Image) -> bool:
    """True for a PNG that Pillow reduces from 16 bits per channel to 8, or whose transparency it loses."""
    rawmode = image.tile[0][3] if image.tile else ""
    return ";16B" in str(rawmode) and (not image.mode.startswith("I") or "transparency" in image.info)


def decode(source: Path | bytes, orientation: int) -> Samples:
    """The 16-bit samples of a PNG for which `is_wide` holds."""

    def decoded(rawmode: str) -> np.ndarray:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=("PNG",)) as image:
            image.tile = [image.tile[0]._replace(args=rawmode or image.tile[0].args)]
            return np.asarray(image)

    with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=("PNG",)) as image:
        rawmode, clear = image.tile[0].args, image.info.get("transparency")
    if rawmode == "I;16B":
        array = decoded("")[..., None]
    elif rawmode == "LA;16B":
        array = decoded("RGBA").view(">u2").astype(np.uint16)  # four bytes: both of grey, both of alpha
    else:  # high bytes, and low bytes: as if the file were little-endian
        high, low = decoded(rawmode), decoded(rawmode.replace("16B", "16L"))
        array = high.astype(np.uint16) << 8 | low
    if clear is not None:  # this value is transparent
        opaque = (array != np.array(clear, np.uint16)).any(axis=2, keepdims=True)
        array = np.concatenate([array, opaque * np.uint16(65535)], axis=2)
    bands = array.shape[2]
    return Samples(orient(array, orientation), 16, bands - (bands % 2 == 0), "straight" * (bands % 2 == 0))
