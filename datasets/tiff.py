"""TIFF: what a file declares, and an exact decoder for layouts that Pillow lacks or reads wrongly.

Pillow drops extra bands, un-multiplies associated alpha, keeps 8 bits of 16-bit colours, and takes signed
bytes for unsigned ones. Files that it reads exactly (`Page.is_exact_in_pillow`) are left to it; `decode`
reads all other integers and floats of lossless compression; the rest is refused by name.
"""

import mmap
import zlib
from dataclasses import dataclass
from io import BytesIO
from struct import calcsize, error, pack, unpack_from

import numpy as np
from PIL import Image

from .samples import DataError, Samples

Buffer = bytes | mmap.mmap  # a file's content

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
COMPRESSIONS = {
    1: "none", 2: "CCITT", 3: "CCITT group 3", 4: "CCITT group 4", 5: "LZW", 6: "old JPEG", 7: "JPEG",
    8: "deflate", 32773: "PackBits", 32946: "deflate", 34712: "JPEG 2000", 34887: "LERC", 34925: "LZMA",
    50000: "Zstandard", 50001: "WebP",
}  # fmt: skip
PHOTOMETRICS = {
    0: "WhiteIsZero", 1: "BlackIsZero", 2: "RGB", 3: "palette", 4: "transparency mask", 5: "CMYK", 6: "YCbCr",
    8: "CIE L*a*b*", 9: "ICC L*a*b*", 10: "ITU L*a*b*", 32803: "colour filter array", 32844: "LogL",
    32845: "LogLuv", 34892: "linear raw",
}  # fmt: skip
LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)
BY_PILLOW = {  # (photometric, bits, samples, extra samples) of unsigned pixels in one plane
    (0, 1, 1, ()), *((photometric, bits, 1, ()) for photometric in (1, 3) for bits in (1, 2, 4, 8)),
    (1, 8, 2, (2,)), (2, 8, 3, ()), (2, 8, 4, (2,)), (5, 8, 4, ()), (6, 8, 3, ()),
}  # fmt: skip
WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
REDUCED, MASK = 1, 4  # bits of NewSubfileType: a smaller copy of a page, a transparency mask


@dataclass(frozen=True)
class Page:
    """One image of a TIFF file, as its tags declare it."""

    height: int
    width: int
    bits: int
    samples: int
    format: int  # 1 unsigned, 2 signed, 3 float
    photometric: int
    extra: tuple[int, ...]  # of each extra sample: 0 unspecified, 1 premultiplied alpha, 2 straight alpha
    compression: int
    planar: int  # 1: the samples of a pixel lie side by side; 2: each band is a plane
    predictor: int
    fill_order: int
    orientation: int
    block: tuple[int, int]  # height and width of a strip or tile
    offsets: tuple[int, ...]  # of each strip or tile
    counts: tuple[int, ...]  # bytes of each
    byte_order: str  # < or >
    is_tiled: bool
    is_big: bool  # BigTIFF

    @property
    def is_exact_in_pillow(self) -> bool:
        """True for layouts whose pixels Pillow gives as they are declared."""
        if (self.photometric, self.bits, self.samples, self.extra) not in BY_PILLOW or self.format != 1:
            return False
        if (self.planar == 2 and self.samples > 1) or (self.is_big and self.byte_order == ">"):
            return False
        if self.photometric == 6 or self.compression in (7, 50001):
            return self.bits == 8 and self.compression in (7, 50001) and self.photometric != 5
        if self.compression in (2, 3, 4):
            return self.bits == 1
        return self.compression in LOSSLESS and self.fill_order == 1

    def describe(self) -> str:
        """The layout in words."""
        kind = {1: "unsigned", 2: "signed", 3: "float"}.get(self.format, f"sample format {self.format}")
        photometric = PHOTOMETRICS.get(self.photometric, f"photometric {self.photometric}")
        compression = COMPRESSIONS.get(self.compression, f"compression {self.compression}")
        planes = ", one plane per band" * (self.planar == 2 and self.samples > 1)
        return f"{self.samples} x {self.bits}-bit {kind}, {photometric}, compression {compression}{planes}"

    def refuse_unreadable(self) -> None:
        """Raise DataError unless `decode` reads this layout exactly."""
        numbers = self.format in (1, 2) and self.bits in (*range(1, 17), 32, 64) and (
            self.format == 1 or self.bits in (8, 16, 32, 64)
        )  # fmt: skip
        floats = self.format == 3 and self.bits in (16, 32, 64)
        base = {0: 1, 1: 1, 2: 3}.get(self.photometric, 0)
        bands = base and self.samples >= base and len(self.extra) <= self.samples - base
        inverted = self.photometric != 0 or (self.samples == 1 and self.format == 1)
        predictor = self.predictor == 1 or (self.predictor == 2 and self.bits in (8, 16, 32, 64))
        predictor = predictor or (self.predictor == 3 and self.format == 3)
        fitting = bands and inverted and predictor and self.fill_order in (1, 2)
        if not (fitting and (numbers or floats) and self.planar in (1, 2) and self.compression in LOSSLESS):
            raise DataError(
                f"is a TIFF of a kind that is not read ({self.describe()}). Save it as .npy (H, W, C), or as "
                "a TIFF or PNG of 8 or 16 bits."
            )


def read_pages(data: Buffer) -> list[Page]:
    """The full images of a file, without the reduced copies and masks that stand beside them.

    Raises:
        DataError: no valid TIFF, or tags that are missing or contradict each other.
    """
    order, is_big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]
    pages, seen = [], set()
    try:
        (offset,) = unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)
        while offset and offset not in seen:
            seen.add(offset)
            tags, offset = _read_directory(data, offset, order, is_big)
            if not tags.get(254, (0,))[0] & (REDUCED | MASK) and tags.get(255, (1,))[0] == 1:
                pages.append(_page(tags, order, is_big))
    except (error, IndexError, OverflowError) as broken:
        raise DataError(f"is a TIFF whose directory cannot be read ({broken}). Save it again.") from broken
    if not pages:
        raise DataError("is a TIFF without a full image (reduced copies and masks alone). Save it again.")
    return pages


def _read_directory(data: Buffer, offset: int, order: str, is_big: bool) -> tuple[dict[int, tuple], int]:
    """The whole numbers of one directory by tag, and the offset of the next directory."""
    head, entry, room = ("Q", "HHQ", 8) if is_big else ("H", "HHI", 4)
    (count,) = unpack_from(order + head, data, offset)
    offset, tags = offset + calcsize(order + head), {}
    for _ in range(count):
        tag, kind, number = unpack_from(order + entry, data, offset)
        offset += calcsize(order + entry)
        if letter := WHOLE_NUMBERS.get(kind):
            form, start = f"{order}{number}{letter}", offset
            if calcsize(form) > room:
                (start,) = unpack_from(order + ("Q" if is_big else "I"), data, offset)
            tags[tag] = unpack_from(form, data, start)
        offset += room
    return tags, unpack_from(order + ("Q" if is_big else "I"), data, offset)[0]


def _page(tags: dict[int, tuple], byte_order: str, is_big: bool) -> Page:
    """A directory's tags with their defaults."""

    def one(tag: int, default: int) -> int:
        return tags.get(tag, (default,))[0]

    for tag, name in ((256, "width"), (257, "height"), (262, "photometric interpretation")):
        if tag not in tags:
            raise DataError(f"is a TIFF that lacks its {name}. Save it again.")
    samples = one(277, 1)
    bits, formats = tags.get(258, (1,)), tags.get(339, (1,))
    if len(set(bits)) > 1 or len(set(formats)) > 1:
        raise DataError(
            f"is a TIFF whose bands differ in bits {bits} or format {formats}. Save it as .npy (H, W, C)."
        )
    height, width = tags[257][0], tags[256][0]
    is_tiled = 322 in tags
    block = (tags[323][0], tags[322][0]) if is_tiled else (min(one(278, height), height), width)
    offsets, counts = (tags.get(tag, ()) for tag in ((324, 325) if is_tiled else (273, 279)))
    if not counts and one(259, 1) == 1 and len(offsets) == 1:
        counts = (2**40,)  # to the end
    if one(262, 1) == 3 and 0 < max(tags.get(320, (0,))) < 256:
        raise DataError("is a TIFF whose colour map holds 8-bit values; expected 16-bit. Save it as PNG.")
    if min(height, width, *block, samples) < 1:
        raise DataError("is a TIFF without pixels. Save it again.")
    return Page(
        height=height,
        width=width,
        bits=bits[0],
        samples=samples,
        format=1 if formats[0] == 4 else formats[0],  # 4: undefined, which readers take for unsigned
        photometric=one(262, 1),
        extra=tags.get(338, ()),
        compression=one(259, 1),
        planar=one(284, 1),
        predictor=one(317, 1),
        fill_order=one(266, 1),
        orientation=one(274, 1),
        block=block,
        offsets=offsets,
        counts=counts,
        byte_order=byte_order,
        is_tiled=is_tiled,
        is_big=is_big,
    )


def decode(page: Page, data: Buffer) -> Samples:
    """The samples of a page, exactly, as the file stores them.

    Raises:
        DataError: a layout that is not read, or fewer bytes than declared.
    """
    page.refuse_unreadable()
    (rows, columns), planes = page.block, page.samples if page.planar == 2 else 1
    down, across = -(-page.height // rows), -(-page.width // columns)
    if not len(page.offsets) == len(page.counts) == planes * down * across:
        raise DataError(f"is a TIFF with {len(page.offsets)} blocks, expected {planes * down * across}.")
    array = None
    for number, (offset, count) in enumerate(zip(page.offsets, page.counts, strict=True)):
        plane, position = divmod(number, down * across)
        top, left = position // across * rows, position % across * columns
        height = rows if page.is_tiled else min(rows, page.height - top)
        block = _decode_block(page, data[offset : offset + count], height, columns, page.samples // planes)
        if array is None:
            array = np.empty((page.height, page.width, page.samples), block.dtype)
        bands = slice(plane, plane + 1) if planes > 1 else slice(None)
        block = block[: page.height - top, : page.width - left]
        array[top : top + len(block), left : left + block.shape[1], bands] = block
    if page.photometric == 0:
        array = (2**page.bits - 1 - array).astype(array.dtype)
    base = {2: 3}.get(page.photometric, 1)
    if not page.extra and page.samples > base:
        base = 3 if base == 3 else 0  # bands without a meaning
    elif page.samples > base + 1 and base == 1:
        base = 0
    alpha = {1: "premultiplied", 2: "straight"}.get(page.extra[0], "") if page.extra and base else ""
    if base == 1 and page.samples == 2 and not alpha:
        base = 0
    inverted = page.photometric == 0
    return Samples(orient(array, page.orientation), page.bits, base, alpha, is_inverted=inverted)


def orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate or flip stored rows and columns as the EXIF orientation 1..8 says."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    down = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    right = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(array[down, right])


def _decode_block(page: Page, raw: bytes, rows: int, columns: int, samples: int) -> np.ndarray:
    """One strip or tile as (rows, columns, samples)."""
    row_bytes = -(-columns * samples * page.bits // 8)
    raw = raw.translate(REVERSED) if page.fill_order == 2 else raw
    if page.compression in (8, 32946):
        raw = zlib.decompressobj().decompress(raw, rows * row_bytes)
    elif page.compression != 1:
        raw = _by_libtiff(page.compression, raw, rows, row_bytes)
    if len(raw) < rows * row_bytes:
        raise DataError("is a TIFF that is truncated. Copy it again, or remove it.")
    content = np.frombuffer(raw, np.uint8, rows * row_bytes).reshape(rows, row_bytes)
    if page.bits not in (8, 16, 32, 64):
        places = np.unpackbits(content, axis=1)[:, : columns * samples * page.bits]
        weights = (1 << np.arange(page.bits)[::-1]).astype(np.uint16)
        return places.reshape(rows, columns, samples, page.bits) @ weights
    size, kind = page.bits // 8, {1: "u", 2: "i", 3: "f"}[page.format]
    if page.predictor == 3:  # differences of bytes; then all first bytes of a row, all second ones, ...
        content = np.cumsum(content.reshape(rows, columns * size, samples), axis=1, dtype=np.uint8)
        content = np.ascontiguousarray(content.reshape(rows, size, columns * samples).swapaxes(1, 2))
        return content.view(f">f{size}").astype(f"f{size}").reshape(rows, columns, samples)
    stored = content.view(f"{page.byte_order}u{size}").astype(f"u{size}").reshape(rows, columns, samples)
    if page.predictor == 2:
        stored = np.cumsum(stored, axis=1, dtype=stored.dtype)
    return stored.view(f"{kind}{size}")


def _by_libtiff(compression: int, raw: bytes, rows: int, row_bytes: int) -> bytes:
    """Decompress a block: libtiff reads it as a grey image with one pixel per byte."""
    tags = [
        (256, 4, row_bytes), (257, 4, rows), (258, 3, 8), (259, 3, compression), (262, 3, 1), (273, 4, 0),
        (277, 3, 1), (278, 4, rows), (279, 4, len(raw)),
    ]  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    tags[5] = (273, 4, start)
    entries = b"".join(pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    file = pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + pack("<I", 0) + raw
    with Image.open(BytesIO(file), formats=("TIFF",)) as image:
        return image.tobytes()
