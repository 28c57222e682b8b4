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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from .fitting import Box, fit, place

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".npy")
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # decoders that a file may reach, whatever its name says
MAX_PIXELS = 2**30  # 32,768 x 32,768; above it a file is more likely an attack or an accident than a picture
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


class DataError(ValueError):
    """Something in the user's data that the user can mend; the message is complete and ready to print."""


def natural_key(text: str) -> list:
    """Sort key that puts img2 before img10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text.lower()))]


def is_hidden(path: Path) -> bool:
    """True for files that systems and editors leave in folders: .DS_Store, ._photo.jpg, Thumbs.db."""
    return path.name.startswith((".", "~$")) or path.name.lower() in SYSTEM_FILES


def _pictures(paths: Iterable[Path]) -> list[Path]:
    """Those that are named as pictures and not hidden, in natural order."""
    found = [path for path in paths if path.suffix.lower() in SUFFIXES and not is_hidden(path)]
    return sorted(found, key=lambda path: (natural_key(path.as_posix()), path))  # a.jpg and A.jpg tie


def list_pictures(folder: Path, recursive: bool = False) -> list[Path]:
    """Every picture file in `folder`, in natural order; hidden files and folders are left out.

    Links to folders are followed, after the folders beside them; none is searched twice, so that loops end.
    """
    paths, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        folders.sort(key=lambda name, parent=parent: (os.path.islink(os.path.join(parent, name)), name))
        paths += [Path(parent, name) for name in files]
    return _pictures(paths)


def find_images(path: str | Path, recursive: bool = False) -> list[Path]:
    """The pictures meant by a file, a folder, or a pattern such as 'photos/*.jpg', in natural order.

    Raises:
        FileNotFoundError: nothing is there.
        DataError: something is there, but no picture among it.
    """
    path = Path(os.path.expanduser(path))  # Path's own raises for a user that is not there
    known = next((each for each in (path, *path.parents) if each.exists()), path)
    unknown = str(path.relative_to(known))  # only in what does not exist are brackets a pattern
    if not path.exists() and not glob.has_magic(unknown):
        raise FileNotFoundError(f"{path}: there is no such file. Give a picture, a folder or a pattern.")
    if path.is_dir():
        found = list_pictures(path, recursive)
    else:
        pattern = os.path.join(glob.escape(str(known)), unknown)
        found = _pictures([path] if path.exists() else map(Path, glob.glob(pattern, recursive=True)))
    if not found:
        below = "" if recursive else " (folders below it are searched with recursive)"
        raise DataError(f"{path}: no picture found; looked for {' '.join(SUFFIXES)}{below}.")
    return found


def read_image(path: str | Path, in_channels: int = 3) -> np.ndarray:
    """Read a picture as uint8 (H, W, in_channels), turned as its EXIF tag says.

    Args:
        path: the file.
        in_channels: number of channels to bring it to; the module's docstring has the rules.

    Raises:
        DataError: unreadable, truncated, too large, or not convertible; the message names the file.
    """
    return load_image(path, in_channels)[0]


def load_image(
    path: str | Path,
    in_channels: int,
    reduce_to: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
    data: bytes | None = None,
) -> tuple[np.ndarray, tuple[int, int], int]:
    """As `read_image`, and the full (height, width) after EXIF, which a reduced JPEG no longer shows.

    Args:
        path: the file.
        in_channels: number of channels to bring it to.
        reduce_to: function from the full (height, width) to the one that will do; a JPEG may then come
            smaller (1/2, 1/4, 1/8, or just so where these are no whole pixels), never below it, which its
            decoder does in a fraction of the time.
        data: the file's bytes, where they are at hand.

    Returns:
        (array, (height, width), orientation): orientation is the EXIF number, 1 for none.
    """
    path = Path(path)
    with _naming(path):
        if path.suffix.lower() == ".npy":
            array = _npy_image(path, in_channels, data)
            return array, array.shape[:2], 1
        with _open(path, data) as picture:
            orientation, size = _orientation(picture), None
            if reduce_to and picture.format in ("JPEG", "MPO"):
                upright = 1 if orientation >= 5 else -1  # from (width, height) of the file, and back
                size = picture.size[::upright]
                wanted = reduce_to(size)[::upright]
                drafted = picture.draft(None, wanted)  # mode and box, or None
                if drafted and drafted[1][2:] != picture.size:  # the last column or row lies partly outside
                    picture = picture.resize(wanted, Image.Resampling.BILINEAR, drafted[1])
            if _count_pages(picture) > 1:
                array = _pages(picture, in_channels)
            else:
                array = np.ascontiguousarray(_to_channels(_upright(picture), in_channels))
            return array, size or array.shape[:2], orientation


def load_fitted(
    path: str | Path, in_channels: int, image_size: tuple[int, int], resize: str
) -> tuple[np.ndarray, Box, np.ndarray]:
    """A picture as the network sees it, in training and in prediction.

    Returns:
        (uint8 (h, w, C); where it lies; the picture as it was decoded, a JPEG perhaps smaller than it is)
    """

    def content(size: tuple[int, int]) -> tuple[int, int]:
        box = place(size, tuple(image_size), resize)
        return box.height, box.width

    picture, size, _ = load_image(path, in_channels, reduce_to=content)
    return *fit(picture, image_size, resize, size), picture


def read_mask(path: str | Path, as_colours: bool = False) -> np.ndarray:
    """Read a mask as its raw values, (H, W) integers, or (H, W, 3) uint8 where the file holds colours.

    Args:
        path: the file.
        as_colours: read a palette mask as the colours its palette names, not as its indices.

    Raises:
        DataError: unreadable, truncated, too large or not integers; the message names the file.
    """
    return load_mask(path, as_colours)[0]


def load_mask(
    path: str | Path, as_colours: bool = False, data: bytes | None = None
) -> tuple[np.ndarray, list[int] | None, str]:
    """As `read_mask`, and what else preflight asks of the file; `data` are its bytes, where at hand.

    Returns:
        (raw, palette, damage): palette is a list of 256 or fewer 0xRRGGBB for a palette mask, else None;
        damage says what may have altered values, such as 'is a JPEG', or nothing.
    """
    path = Path(path)
    with _naming(path):
        if path.suffix.lower() == ".npy":
            return _npy_mask(path, data), None, ""
        with _open(path, data) as picture:
            pages, palette = _count_pages(picture), None
            if pages > 1:
                raise DataError(f"holds {pages} pages; a mask is one page. Save the right page alone.")
            if picture.mode == "P":
                colours = np.array(picture.getpalette("RGB"), np.int64).reshape(-1, 3)
                palette = (colours @ (65536, 256, 1)).tolist()
            damage = _damage(picture, path, data)
            return _mask_values(_upright(picture), as_colours), palette, damage


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about a file's content name the file."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise a dozen types on broken files, which mean one thing
        raise DataError(f"{path}: cannot be read ({error}). Save it again, or remove it.") from error


def _open(path: Path, data: bytes | None = None) -> Image.Image:
    """Open without decoding: allowed formats alone, our own pixel limit instead of the library's warning."""
    Image.MAX_IMAGE_PIXELS = None  # it warns or names no file; ours below is an error
    if (path.stat().st_size if data is None else len(data)) == 0:
        raise DataError("is empty (0 bytes). Copy it again, or remove it.")
    try:
        picture = Image.open(path if data is None else BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise DataError(f"is not a {', '.join(FORMATS)} picture, whatever its name says.") from None
    _check_pixels(picture.height, picture.width)
    return picture


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DataError(f"has {height} x {width} pixels; the limit is {MAX_PIXELS:,}. Cut it into tiles.")


def _count_pages(picture: Image.Image) -> int:
    """Pages or frames; the second view that a phone puts behind its JPEG (MPO) is none."""
    return 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)


def _orientation(picture: Image.Image) -> int:
    value = picture.getexif().get(0x0112, 1)
    return value if value in range(1, 9) else 1


def _upright(picture: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(picture) if _orientation(picture) != 1 else picture


def _to_channels(picture: Image.Image, in_channels: int) -> np.ndarray:
    """Bring any mode to uint8 (H, W, in_channels)."""
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = Image.fromarray(_to_bytes(np.asarray(picture)))
    elif picture.mode == "1":
        picture = picture.convert("L")
    elif picture.mode in ("LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    elif picture.mode in ("P", "CMYK", "YCbCr", "LAB", "HSV"):
        picture = picture.convert("RGB")
    channels = len(picture.getbands())
    if channels != in_channels:
        if in_channels not in (1, 3, 4):
            raise DataError(f"has {channels} channels, wanted {in_channels}. Save it as .npy (H, W, C).")
        if picture.mode == "RGBA":
            black = Image.new("RGB", picture.size)
            black.paste(picture, mask=picture)
            picture = black
        picture = picture.convert({1: "L", 3: "RGB", 4: "RGBA"}[in_channels])
    array = np.asarray(picture)
    return array if array.ndim == 3 else array[..., None]


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """Scale to 0..255 by the type's range (16 bits, or 0..1 for bool and float), never by the content's."""
    if array.dtype == np.uint8:
        return array
    low, high, top = array.min(), array.max(), 65535 if array.dtype.kind in "iu" else 1
    if not (low >= 0 and high <= top):  # also catches NaN
        raise DataError(f"holds {low:.6g}..{high:.6g}; {array.dtype} pictures hold 0..{top}. Rescale it.")
    return (array * (255 / top) + 0.5).astype(np.uint8)


def _pages(picture: Image.Image, in_channels: int) -> np.ndarray:
    """A file with one grey page a channel."""
    if picture.n_frames != in_channels:
        raise DataError(f"holds {picture.n_frames} pages; wanted 1, or a grey one a channel ({in_channels}).")
    bands = [_to_bytes(np.asarray(page)) for page in ImageSequence.Iterator(picture)]
    if bands[0].ndim != 2 or len({band.shape for band in bands}) > 1:
        raise DataError("has pages that are not grey pictures of one size. Save each picture alone.")
    return np.stack(bands, axis=2)


def _npy(path: Path, data: bytes | None = None) -> np.ndarray:
    source, mode = (path, "r") if data is None else (BytesIO(data), None)
    array = np.load(source, mmap_mode=mode, allow_pickle=False)
    if array.ndim not in (2, 3) or array.size == 0:
        raise DataError(f"has shape {array.shape}; wanted (height, width) or (height, width, channels).")
    _check_pixels(*array.shape[:2])
    return array


def _npy_image(path: Path, in_channels: int, data: bytes | None) -> np.ndarray:
    array = _npy(path, data)
    array = array if array.ndim == 3 else array[..., None]
    if array.shape[2] != in_channels and (array.shape[2], in_channels) != (1, 3):
        fix = "transpose it to" if array.shape[0] == in_channels else "save it as"
        raise DataError(f"has shape {array.shape}; {fix} (height, width, {in_channels} channels).")
    if array.dtype.kind not in "bf" and array.dtype.name not in ("uint8", "uint16"):
        raise DataError(f"holds {array.dtype}; wanted bool, uint8, uint16 or float. Convert it.")
    return np.ascontiguousarray(np.broadcast_to(_to_bytes(array), (*array.shape[:2], in_channels)))


def _npy_mask(path: Path, data: bytes | None) -> np.ndarray:
    array = np.asarray(_npy(path, data))
    array = array[..., 0] if array.shape[2:] == (1,) else array
    if array.ndim == 3 and (array.shape[2] != 3 or array.dtype != np.uint8):
        raise DataError(f"is {array.dtype} of shape {array.shape}; a mask is (height, width) whole numbers.")
    return _whole(array)


def _whole(array: np.ndarray) -> np.ndarray:
    """A mask's numbers as uint8 where that is their size, else int64."""
    if array.dtype.name in ("bool", "uint8"):
        return array.astype(np.uint8, copy=False)
    with np.errstate(invalid="ignore"):
        whole = array.astype(np.int64)
    if not np.array_equal(whole, array):
        raise DataError("holds fractions or huge numbers; a mask is whole numbers. Save class ids as a PNG.")
    return whole


def _mask_values(picture: Image.Image, as_colours: bool) -> np.ndarray:
    if picture.mode == "P" and as_colours:
        picture.info.pop("transparency", None)
        return np.asarray(picture.convert("RGB"))
    if picture.mode in ("L", "P", "RGB"):
        return np.asarray(picture)
    if picture.mode in ("1", "F") or picture.mode.startswith("I"):
        return _whole(np.asarray(picture))
    if picture.mode == "LA":
        return _to_channels(picture, 1)[..., 0]
    return _to_channels(picture, 3)  # RGBA with its transparent pixels black, CMYK, ...


def _damage(picture: Image.Image, path: Path, data: bytes | None = None) -> str:
    """What may have altered a mask's values unseen, as far as the file tells."""
    if picture.format in ("JPEG", "MPO"):
        return "is a JPEG"
    if picture.format == "WEBP" and b"VP8L" not in (data or path.read_bytes()):
        return "is a lossy WebP"
    if "jpeg" in str(picture.info.get("compression")):
        return "is a TIFF that holds a JPEG"
    if ";16" in str(picture.tile) and not picture.mode.startswith("I"):
        return "has 16 bits a channel, of which 8 are read"
    if "A" in picture.getbands() and any(picture.getchannel("A").histogram()[1:255]):
        return "is half transparent"
    return ""
