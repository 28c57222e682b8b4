"""Finding and reading picture files: any user's file in, a plain uint8 array out, or an error that names it.

How values reach 0..255: 8-bit stays; 16-bit grey is divided by 257 (65535 → 255, never clipped, never
stretched by its own content); `.npy` may be bool (×255), uint8, uint16 (÷257) or float in 0..1 (×255). How
bands reach `in_channels`: equal counts stay; grey → 3 repeats; colour → 1 is ITU-R 601 luma; alpha is
composited on black; 3 → 4 adds an opaque alpha; any other count only from `.npy` (H, W, C) or a TIFF with one
grey page a channel.
"""

import glob
import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .transforms import Box, fit, place

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".npy")
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # decoders that a file may reach, whatever its name says
MAX_PIXELS = 2**30  # 32,768 x 32,768; above it a file is more likely an attack or an accident than a picture
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


class DataError(ValueError):
    """Something in the user's data that the user can mend; the message is complete and ready to print."""


def natural_key(text: str) -> list:
    """Sort key that puts img2 before img10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text.lower())
    ]


def is_hidden(path: Path) -> bool:
    """True for files that systems and editors leave in folders: .DS_Store, ._photo.jpg, Thumbs.db."""
    return path.name.startswith((".", "~$")) or path.name.lower() in SYSTEM_FILES


def list_pictures(folder: Path, recursive: bool = False) -> list[Path]:
    """Every picture file in `folder`, in natural order; hidden files and folders are left out."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        paths = (Path(parent, name) for name in files)
        found += [path for path in paths if path.suffix.lower() in SUFFIXES and not is_hidden(path)]
    return sorted(found, key=lambda path: natural_key(str(path)))


def find_images(path, recursive: bool = False) -> list[Path]:
    """The pictures meant by a file, a folder, or a pattern such as 'photos/*.jpg', in natural order.

    Raises:
        FileNotFoundError: nothing is there.
        DataError: something is there, but no picture among it.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = list_pictures(path, recursive)
    elif path.exists():
        found = [path] if path.suffix.lower() in SUFFIXES else []
    elif glob.has_magic(str(path)):
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))
        found = [match for match in matches if match.suffix.lower() in SUFFIXES and not is_hidden(match)]
        found.sort(key=lambda match: natural_key(match.as_posix()))
    else:
        raise FileNotFoundError(
            f"{path}: there is no such file or folder. Give a picture, a folder or a pattern."
        )
    if not found:
        below = "" if recursive else " (folders below it are searched with recursive)"
        raise DataError(f"{path}: no picture found; looked for {' '.join(SUFFIXES)}{below}.")
    return found


def read_image(path, in_channels: int = 3, reduce_to=None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a picture as uint8 (H, W, in_channels), turned as its EXIF tag says.

    Args:
        path: the file.
        in_channels: number of channels to bring it to; the module's docstring has the rules.
        reduce_to: (height, width) that will do, or a function of the full one; a JPEG may then come smaller
            (1/2, 1/4, 1/8), never below it, which its decoder does in a fraction of the time.
        max_pixels: larger pictures are refused.

    Raises:
        DataError: unreadable, truncated, too large, or not convertible; the message names the file.
    """
    return load_image(path, in_channels, reduce_to, max_pixels)[0]


def load_image(
    path, in_channels: int, reduce_to=None, max_pixels: int = MAX_PIXELS, data: bytes | None = None
):
    """As `read_image`, and the full (height, width) after EXIF, which a reduced JPEG no longer shows.

    Returns:
        (array, (height, width), orientation): orientation is the EXIF number, 1 for none.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            array = _npy_image(path, in_channels, max_pixels, data)
            return array, array.shape[:2], 1
        with _open(path, max_pixels, data) as picture:
            orientation = _orientation(picture)
            size = None  # the array's, but for a reduced JPEG
            pages = getattr(picture, "n_frames", 1)
            if pages > 1 and picture.format != "MPO":  # MPO: a phone's JPEG with a second view behind it
                array = _pages(picture, pages, in_channels)
                return array, array.shape[:2], orientation
            if reduce_to is not None and picture.format in ("JPEG", "MPO"):
                width, height = picture.size if orientation < 5 else picture.size[::-1]
                size = (height, width)
                reduce_to = reduce_to((height, width)) if callable(reduce_to) else reduce_to
                box = reduce_to if orientation < 5 else reduce_to[::-1]
                picture.draft(None, (max(1, box[1]), max(1, box[0])))
            if orientation != 1:
                picture = ImageOps.exif_transpose(picture)
            array = np.ascontiguousarray(_to_channels(picture, in_channels))
            return array, size or array.shape[:2], orientation
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise
    except (
        Exception
    ) as error:  # decoders raise a dozen types on broken files; each means the same to the user
        raise DataError(
            f"{path}: cannot be read ({error}). Save it again, or remove it with its pair."
        ) from error


def read_fitted(path, in_channels: int, image_size, resize: str) -> tuple[np.ndarray, Box]:
    """A picture as the network sees it, uint8 (h, w, C), and where it lies; in training and prediction."""
    return load_fitted(path, in_channels, image_size, resize)[:2]


def load_fitted(path, in_channels: int, image_size, resize: str):
    """As `read_fitted`, and the picture as it was decoded, a JPEG perhaps smaller than it is."""

    def content(size: tuple[int, int]) -> tuple[int, int]:
        box = place(size, tuple(image_size), resize)
        return box.height, box.width

    picture, size, _ = load_image(path, in_channels, reduce_to=content)
    return *fit(picture, image_size, resize, size), picture


def read_mask(path, as_colours: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a mask as its raw values, (H, W) integers, or (H, W, 3) uint8 where the file holds colours.

    Args:
        path: the file.
        as_colours: read a palette mask as the colours its palette names, not as its indices.
        max_pixels: larger masks are refused.

    Raises:
        DataError: unreadable, truncated or not integers; the message names the file.
    """
    return load_mask(path, as_colours, max_pixels)[0]


def load_mask(path, as_colours: bool = False, max_pixels: int = MAX_PIXELS, data: bytes | None = None):
    """As `read_mask`, and what else preflight asks of the file.

    Returns:
        (raw, palette, lossy): palette is a list of 256 or fewer 0xRRGGBB for a palette mask, else None; lossy
        is True for a format that does not keep values.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            return _npy_mask(path, max_pixels, data), None, False
        with _open(path, max_pixels, data) as picture:
            lossy = picture.format in ("JPEG", "MPO") or (
                picture.format == "WEBP" and b"VP8 " in (data or b"")[:64]
            )
            if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
                raise DataError(
                    f"holds {picture.n_frames} pages; a mask is one page. Save the right page alone."
                )
            palette = None
            if picture.mode == "P":
                flat = np.array(picture.getpalette("RGB"), np.int64).reshape(-1, 3)
                palette = (flat @ (65536, 256, 1)).tolist()
            if _orientation(picture) != 1:
                picture = ImageOps.exif_transpose(picture)
            return _mask_values(picture, as_colours), palette, lossy
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise
    except Exception as error:  # as above
        raise DataError(
            f"{path}: cannot be read ({error}). Save it again, or remove it with its pair."
        ) from error


def _open(path: Path, max_pixels: int, data: bytes | None) -> Image.Image:
    """Open without decoding: allowed formats alone, our own pixel limit instead of the library's warning."""
    Image.MAX_IMAGE_PIXELS = (
        None  # its limit warns on a global channel or names no file; ours below is an error
    )
    if (len(data) if data is not None else path.stat().st_size) == 0:
        raise DataError("is empty (0 bytes). Copy it again, or remove it with its pair.")
    try:
        picture = Image.open(BytesIO(data) if data is not None else path, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise DataError(
            f"is not a {', '.join(FORMATS)} picture, whatever its name says. Convert it."
        ) from None
    _check_pixels(picture.height, picture.width, max_pixels)
    return picture


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DataError(
            f"has {height} x {width} pixels; the limit is {max_pixels:,} pixels. Cut it into tiles."
        )


def _orientation(picture: Image.Image) -> int:
    value = picture.getexif().get(0x0112, 1)
    return value if value in range(1, 9) else 1


def _to_channels(picture: Image.Image, in_channels: int) -> np.ndarray:
    """Bring any mode to uint8 (H, W, in_channels)."""
    mode = picture.mode
    if mode.startswith("I") or mode == "F":
        grey = _to_bytes(np.asarray(picture))
        picture = Image.fromarray(grey)
    elif mode == "1":
        picture = picture.convert("L")
    elif mode in ("P", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA" if mode == "PA" or "transparency" in picture.info else "RGB")
    elif mode in ("La", "RGBa", "YCbCr", "LAB", "HSV"):
        picture = picture.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, "RGB"))
    if len(picture.getbands()) == in_channels and picture.mode != "LA":
        array = np.asarray(picture)
        return array if array.ndim == 3 else array[..., None]
    if in_channels not in (1, 3, 4):
        raise DataError(
            f"has {len(picture.getbands())} channels; in_channels is {in_channels}. "
            "Save pictures of that many channels as .npy (height, width, channels)."
        )
    if in_channels == 4:
        return np.asarray(picture.convert("RGBA"))
    if picture.mode in ("LA", "RGBA"):
        alpha = picture.getchannel("A")
        solid = Image.new(picture.mode[:-1], picture.size)  # black
        solid.paste(picture.convert(picture.mode[:-1]), mask=alpha)
        picture = solid
    array = np.asarray(picture.convert("RGB" if in_channels == 3 else "L"))
    return array if array.ndim == 3 else array[..., None]


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """Scale whatever number type to 0..255 by a rule of the type, never by the picture's own range."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if array.dtype.kind in "iu":
        if low < 0 or high > 65535:
            raise DataError(f"holds values {low}..{high}; 16-bit pictures hold 0..65535. Rescale it.")
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise DataError(
                f"holds numbers {low:.4g}..{high:.4g}; floats must lie in 0..1. Rescale, or save as uint8."
            )
        return (array * 255 + 0.5).astype(np.uint8)
    raise DataError(f"holds {array.dtype}; wanted bool, uint8, uint16 or float.")


def _pages(picture: Image.Image, pages: int, in_channels: int) -> np.ndarray:
    """A file with one grey page a channel."""
    if pages != in_channels:
        raise DataError(
            f"holds {pages} pages; wanted one picture, or one grey page for each of {in_channels} channels."
        )
    bands = []
    for page in range(pages):
        picture.seek(page)
        band = np.asarray(picture)
        if band.ndim != 2 or band.shape != (bands[0].shape if bands else band.shape):
            raise DataError("has pages that are not grey pictures of one size. Save each picture alone.")
        bands.append(_to_bytes(band))
    return np.stack(bands, axis=2)


def _npy(path: Path, max_pixels: int, data: bytes | None) -> np.ndarray:
    if data is None:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
        array = np.load(BytesIO(data), allow_pickle=False)
    if array.ndim not in (2, 3) or array.size == 0:
        raise DataError(f"has shape {array.shape}; wanted (height, width) or (height, width, channels).")
    _check_pixels(array.shape[0], array.shape[1], max_pixels)
    return array


def _npy_image(path: Path, in_channels: int, max_pixels: int, data: bytes | None) -> np.ndarray:
    array = _npy(path, max_pixels, data)
    array = array if array.ndim == 3 else array[..., None]
    if array.shape[2] != in_channels and (array.shape[2], in_channels) != (1, 3):
        turned = (
            " It looks like (channels, height, width): transpose it." if array.shape[0] == in_channels else ""
        )
        raise DataError(
            f"has shape {array.shape}, the last being channels; in_channels is {in_channels}.{turned}"
        )
    array = _to_bytes(np.asarray(array))
    return (
        np.repeat(array, in_channels, axis=2)
        if array.shape[2] != in_channels
        else np.ascontiguousarray(array)
    )


def _npy_mask(path: Path, max_pixels: int, data: bytes | None) -> np.ndarray:
    array = _npy(path, max_pixels, data)
    array = np.array(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    if array.dtype.kind == "f" and np.array_equal(array, np.trunc(array)):
        array = array.astype(np.int64)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    colour = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if array.dtype.kind not in "iu" or not (array.ndim == 2 or colour):
        raise DataError(f"is {array.dtype} of shape {array.shape}; a mask is (height, width) whole numbers.")
    return array


def _mask_values(picture: Image.Image, as_colours: bool) -> np.ndarray:
    mode = picture.mode
    if mode == "P" and as_colours:
        picture.info.pop("transparency", None)
        return np.asarray(picture.convert("RGB"))
    if mode in ("L", "P", "RGB"):
        return np.asarray(picture)
    if mode == "1":
        return np.asarray(picture).astype(np.uint8)
    if mode.startswith("I"):
        array = np.asarray(picture)
        return array if array.dtype == np.int32 else array.astype(np.uint16)
    if mode == "F":
        array = np.asarray(picture)
        if not np.array_equal(array, np.trunc(array)):
            raise DataError("holds fractions; a mask is whole numbers. Save class ids as an 8-bit PNG.")
        return array.astype(np.int64)
    if mode == "LA":
        return _to_channels(picture, 1)[..., 0]
    return _to_channels(picture, 3)  # RGBA with its transparent pixels black, CMYK, ...
