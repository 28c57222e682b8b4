"""Reading image files: any user's file in, a plain uint8 array out, or an error that names it.

How values reach 0..255: 8-bit stays; 1-, 2- and 4-bit grey is spread over 0..255; integers above 8 bits are
divided by the range that preflight found over all images (`max_value`), or by 65535; floats are in 0..1. How
bands reach `in_channels`: equal counts stay; grey → 3 repeats; colour → 1 is ITU-R 601 luma; alpha is
composited on black, unless it is 0 everywhere and so means nothing; 3 → 4 adds an opaque alpha; any other
count only from `.npy` (H, W, C), a TIFF of as many bands, or a TIFF with one grey page per channel.

Pillow decodes what it decodes exactly; `tiff.py` and `png.py` decode the rest, or refuse it by name.
"""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import png, tiff
from .fitting import Box, fit, place
from .samples import DataError, Samples, to_bytes, to_image

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".apng", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".npy",
)  # fmt: skip
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")  # decoders that a file may reach, whatever its name
MAX_PIXELS = 2**30  # 32,768 x 32,768; above it a file is more likely an attack or an accident than an image


def read_image(path: str | Path, in_channels: int = 3, max_value: int | None = None) -> np.ndarray:
    """Read an image as uint8 (H, W, in_channels), rotated as its EXIF tag says.

    Args:
        path: the file.
        in_channels: number of channels to convert to; the module's docstring has the rules.
        max_value: value of integers above 8 bits that becomes 255, as in `DataReport`; None: 65535.

    Raises:
        DataError: unreadable, truncated, too large, or not convertible; the message names the file.
    """
    return load_image(path, in_channels, max_value=max_value)[0]


def load_image(
    path: str | Path,
    in_channels: int,
    reduce_to: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
    data: bytes | None = None,
    max_value: int | None = None,
) -> tuple[np.ndarray, tuple[int, int], int]:
    """As `read_image`, and the full (height, width) after EXIF, which a reduced JPEG no longer shows.

    Args:
        path: the file.
        in_channels: number of channels to convert to.
        reduce_to: function from the full (height, width) to the size that is enough; a JPEG may then come
            smaller (1/2, 1/4, 1/8, or exactly that size where these are not whole pixels), never below it,
            which its decoder does in a fraction of the time.
        data: the file's bytes, where they are at hand.
        max_value: see `read_image`.

    Returns:
        (array, (height, width), orientation): orientation is the EXIF number, 1 for none.
    """
    path = Path(path)
    with errors_naming(path):
        pixels, size, orientation = decode_image(path, data, reduce_to)
        return channels_of(pixels, in_channels, max_value), size, orientation


def decode_image(
    path: Path, data: bytes | None = None, reduce_to: Callable | None = None
) -> tuple[Image.Image | Samples, tuple[int, int], int]:
    """An image in the mode of its file, upright; its full (height, width) after EXIF; its orientation."""
    if path.suffix.lower() == ".npy":
        samples = _npy_samples(path, data)
        return samples, samples.array.shape[:2], 1
    image = open_image(path, data)
    if isinstance(image, Deferred):
        return image.decode(), image.size, image.orientation
    with image:
        orientation, size = orientation_of(image), None
        if reduce_to and image.format in ("JPEG", "MPO"):
            upright = 1 if orientation >= 5 else -1  # from (width, height) of the file, and back
            size = image.size[::upright]
            wanted = reduce_to(size)[::upright]
            drafted = image.draft(None, wanted)  # mode and crop box, or None
            if drafted and drafted[1][2:] != image.size:  # the last column or row lies partly outside
                image = image.resize(wanted, Image.Resampling.BILINEAR, drafted[1])
        image = with_plain_alpha(upright_image(image, orientation))
        image.load()
        return image, size or image.size[::-1], orientation


def load_fitted(
    path: str | Path,
    in_channels: int,
    image_size: tuple[int, int],
    resize: str,
    max_value: int | None = None,
) -> tuple[np.ndarray, Box, np.ndarray]:
    """An image as the network sees it, in training and in prediction.

    Returns:
        (uint8 (h, w, C); its position in that frame; the image as it was decoded, a JPEG perhaps reduced)
    """

    def content(size: tuple[int, int]) -> tuple[int, int]:
        box = place(size, tuple(image_size), resize)
        return box.height, box.width

    image, size, _ = load_image(path, in_channels, reduce_to=content, max_value=max_value)
    return *fit(image, image_size, resize, size), image


def wide_maximum(pixels: Image.Image | Samples) -> int | None:
    """The largest value of an image of integers above 8 bits; None for all other images."""
    if isinstance(pixels, Samples):
        return int(pixels.array.max()) if pixels.is_wide else None
    return int(np.asarray(pixels).max()) if pixels.mode.startswith("I") else None


def read_mask(path: str | Path, as_colours: bool = False) -> np.ndarray:
    """Read a mask as its raw values, (H, W) integers, or (H, W, 3) uint8 where the file holds colours.

    Args:
        path: the file.
        as_colours: read a palette mask as the colours that its palette shows, not as its indices.

    Raises:
        DataError: unreadable, truncated, too large or not integers; the message names the file.
    """
    return load_mask(path, as_colours)[0]


def load_mask(
    path: str | Path, as_colours: bool = False, data: bytes | None = None
) -> tuple[np.ndarray, list[int] | None, str]:
    """As `read_mask`, and what else preflight asks of the file; `data` are its bytes, where at hand.

    Returns:
        (raw, palette, damage): palette is a list of 0xRRGGBB for a palette of colours, else None;
        damage says what may have altered values, such as 'is a JPEG', or nothing.
    """
    path = Path(path)
    with errors_naming(path):
        if path.suffix.lower() == ".npy":
            return _npy_mask(path, data), None, ""
        image = open_image(path, data)
        if isinstance(image, Deferred):
            return mask_samples(image.decode()), None, ""
        with image:
            damage = mask_damage(image, path, data)
            mask = upright_mask(image)
            palette = palette_of(mask).tolist() if mask.mode == "P" else None
            return mask_values(mask, as_colours), palette, damage


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Errors about a file's content name the file."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise a dozen types on broken files, which all mean this
        raise DataError(f"{path}: cannot be read ({error}). Save it again, or remove it.") from error


class Deferred:
    """An image that Pillow does not read exactly: its size from the header, its samples by `decode`."""

    def __init__(self, size: tuple[int, int], orientation: int, decode: Callable[[], Samples]):
        self.orientation, self.decode = orientation, decode
        self.stored_size = size  # (height, width) before EXIF
        self.size = size[::-1] if orientation >= 5 else size


def open_image(path: Path, data: bytes | None = None) -> Image.Image | Deferred:
    """Open without decoding: allowed formats alone, our own pixel limit instead of the library's warning."""
    Image.MAX_IMAGE_PIXELS = None  # it warns or names no file; ours below is an error
    head = data[:32] if data is not None else _head(path)
    if not head:
        raise DataError("is empty (0 bytes). Copy it again, or remove it.")
    if head[:4] in tiff.MAGIC:
        content = _mapped(path) if data is None else data
        pages = tiff.read_pages(content)
        _check_pixels(pages[0].height, pages[0].width)
        if len(pages) > 1 or not pages[0].is_exact_in_pillow:
            return _defer_tiff(pages, content)
    source = path if data is None else BytesIO(data)
    try:
        image = Image.open(source, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise DataError(f"is not a {', '.join(FORMATS)} image, whatever its name says.") from None
    _check_pixels(image.height, image.width)
    if image.format == "BMP":  # of 32 bits, with a fourth byte that the format leaves undefined
        image.info["undeclared alpha"] = image.mode == "RGB" and head[28] == 32
    if image.format == "PNG":
        kind, depth = png.color_depth(head)
        if png.is_wide(image):
            orientation = orientation_of(image)
            image.close()
            return Deferred(image.size[::-1], orientation, lambda: png.decode(data or path, orientation))
        if kind == png.GREY and depth in (2, 4) and "transparency" in image.info:
            image.info["transparency"] *= 255 // (2**depth - 1)  # Pillow spreads the pixels, but not this
    return image


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(32)


def _mapped(path: Path) -> mmap.mmap:
    """A file as bytes of which only those that are used are read."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _defer_tiff(pages: list[tiff.Page], data: bytes | mmap.mmap) -> Deferred:
    first = pages[0]
    if len(pages) == 1:
        first.refuse_unreadable()
    else:
        _check_pixels(first.height * len(pages), first.width)

    def decode() -> Samples:
        if len(pages) == 1:
            return tiff.decode(first, data)
        if {(page.samples, page.height, page.width) for page in pages} != {(1, first.height, first.width)}:
            raise DataError(
                f"holds {len(pages)} pages that are not grey images of one size. Save each image alone."
            )
        if first.photometric == 3:
            raise DataError(f"holds {len(pages)} pages with palettes. Save each image alone.")
        bands = [tiff.decode(page, data) for page in pages]
        if len({(band.array.dtype, band.bits) for band in bands}) > 1:
            raise DataError(f"holds {len(pages)} pages of different types. Save it as .npy (H, W, C).")
        array = np.concatenate([band.array for band in bands], axis=2)
        return Samples(array, bands[0].bits, colors=0, pages=len(pages))

    return Deferred((first.height, first.width), first.orientation, decode)


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DataError(f"has {height} x {width} pixels; the limit is {MAX_PIXELS:,}. Cut it into tiles.")


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1..8."""
    value = image.getexif().get(0x0112, 1)
    return value if value in range(1, 9) else 1


def upright_image(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """The decoded image, rotated as EXIF says; `orientation` where it is known."""
    if (orientation or orientation_of(image)) == 1:
        return image
    return ImageOps.exif_transpose(image)


def with_plain_alpha(image: Image.Image) -> Image.Image:
    """The same with transparency as a band; without one that is 0 everywhere and so means nothing."""
    if "transparency" in image.info:
        image = (image.convert("L") if image.mode == "1" else image).convert("RGBA")
    if image.mode in ("LA", "RGBA") and not image.getchannel("A").getbbox():
        image = image.convert(image.mode[:-1])
    return image


def channels_of(pixels: Image.Image | Samples, in_channels: int, max_value: int | None = None) -> np.ndarray:
    """Convert any mode to uint8 (H, W, in_channels)."""
    if isinstance(pixels, Samples):
        pixels = to_image(pixels, in_channels, max_value)
        if isinstance(pixels, np.ndarray):
            return pixels
        pixels = with_plain_alpha(pixels)
    image = pixels
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(to_bytes(np.asarray(image), max_value=max_value))
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("P", "CMYK", "YCbCr", "RGBX"):
        image = image.convert("RGB")
    elif image.mode == "LA" and in_channels != 2:
        image = image.convert("RGBA")
    channels = len(image.getbands())
    if channels != in_channels:
        if in_channels not in (1, 3, 4):
            raise DataError(f"has {channels} channels, expected {in_channels}. Save it as .npy (H, W, C).")
        if in_channels == 4 and image.info.get("undeclared alpha"):
            raise DataError("is a BMP whose fourth channel has no declared meaning. Save it as PNG.")
        if image.mode == "RGBA":
            black = Image.new("RGB", image.size)
            black.paste(image, mask=image)
            image = black
        image = image.convert({1: "L", 3: "RGB", 4: "RGBA"}[in_channels])
    array = np.ascontiguousarray(image)
    return array if array.ndim == 3 else array[..., None]


def read_npy(path: Path, data: bytes | None = None) -> np.ndarray:
    """A .npy file of two or three dimensions; mapped where its bytes are not at hand."""
    source, mode = (path, "r") if data is None else (BytesIO(data), None)
    array = np.load(source, mmap_mode=mode, allow_pickle=False)
    if array.ndim not in (2, 3) or array.size == 0:
        raise DataError(f"has shape {array.shape}; expected (height, width) or (height, width, channels).")
    _check_pixels(*array.shape[:2])
    return array


def _npy_samples(path: Path, data: bytes | None) -> Samples:
    array = read_npy(path, data)
    array = array if array.ndim == 3 else array[..., None]
    if array.dtype.kind not in "bf" and array.dtype.name not in ("uint8", "uint16"):
        raise DataError(f"holds {array.dtype}; expected bool, uint8, uint16 or float. Convert it.")
    return Samples(array, 8 * array.dtype.itemsize, colors=0, is_npy=True)


def _npy_mask(path: Path, data: bytes | None) -> np.ndarray:
    array = np.asarray(read_npy(path, data))
    array = array[..., 0] if array.shape[2:] == (1,) else array
    if array.ndim == 3 and (array.shape[2] != 3 or array.dtype != np.uint8):
        raise DataError(f"is {array.dtype} of shape {array.shape}; a mask is (height, width) whole numbers.")
    return _whole_numbers(array)


def _whole_numbers(array: np.ndarray) -> np.ndarray:
    """A mask's numbers as uint8 where that is their size, else int64."""
    if array.dtype.name in ("bool", "uint8"):
        return array.astype(np.uint8, copy=False)
    with np.errstate(invalid="ignore"):
        whole = array.astype(np.int64)
    if not np.array_equal(whole, array):
        raise DataError("holds fractions or huge numbers; a mask is whole numbers. Save class ids as a PNG.")
    return whole


def mask_samples(samples: Samples) -> np.ndarray:
    """Raw mask values of a file that Pillow does not read exactly."""
    array, bands = samples.array, samples.array.shape[2]
    if samples.pages > 1:
        raise DataError(f"holds {samples.pages} pages; a mask is one page. Save the right page alone.")
    if samples.is_inverted and samples.bits > 1:
        raise DataError(
            "counts from white (WhiteIsZero), and readers disagree about its values. Save it as PNG."
        )
    if bands == 1:
        return _whole_numbers(array[..., 0])
    if samples.colors == 3 and bands == 3 and samples.bits == 8 and array.dtype == np.uint8:
        return array
    if samples.bits > 8:
        raise DataError(f"has {samples.bits} bits per channel; a mask has one channel, or colours of 8 bits.")
    raise DataError(f"has {bands} channels; a mask has one, or colours of 8 bits. Save it as PNG.")


def upright_mask(image: Image.Image) -> Image.Image:
    """The decoded mask, rotated as EXIF says; the transparency of single values or indices is ignored.

    A palette of greys alone, which PNG optimisers and GIF make of grey masks, is read by its greys.
    """
    image.info.pop("transparency", None)
    image = with_plain_alpha(upright_image(image))
    if image.mode == "P":
        colours = palette_of(image)
        if (colours == (colours & 255) * 0x010101).all():
            return image.convert("L")
    return image


def palette_of(image: Image.Image) -> np.ndarray:
    """The colours of a palette image by index, 0xRRGGBB."""
    return np.array(image.getpalette("RGB"), np.int64).reshape(-1, 3) @ (65536, 256, 1)


def mask_values(image: Image.Image, as_colours: bool) -> np.ndarray:
    """Raw values (H, W), or colours (H, W, 3), of a decoded mask."""
    if image.mode == "P" and as_colours:
        return np.asarray(image.convert("RGB"))
    if image.mode in ("L", "P", "RGB"):
        return np.asarray(image)
    if image.mode in ("1", "F") or image.mode.startswith("I"):
        return _whole_numbers(np.asarray(image))
    if image.mode == "LA":
        return channels_of(image, 1)[..., 0]
    return channels_of(image, 3)  # RGBA with its transparent pixels black, CMYK, ...


def mask_damage(image: Image.Image, path: Path, data: bytes | None = None) -> str:
    """What may have altered a mask's values unseen, as far as the file tells."""
    if image.format in ("JPEG", "MPO"):
        return "is a JPEG"
    if image.format == "WEBP" and b"VP8L" not in (data or path.read_bytes()):
        return "is a lossy WebP"
    for lossy in ("jpeg", "webp"):
        if lossy in str(image.info.get("compression")):
            return f"is a TIFF that holds a {lossy.upper()}"
    if "A" not in image.getbands():
        return ""
    *colours, alpha = image.split()
    lowest, highest = alpha.getextrema()
    if lowest < highest and not any(band.getbbox() for band in colours):
        return "is black, with its content in the alpha channel"
    return "is half transparent" if any(alpha.histogram()[1:255]) else ""
