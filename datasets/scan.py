"""Every file scanned once, in parallel; the findings are remembered by path, size and time."""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from .infer import RARE
from .labels import nearest, pack
from .reading import channels_of, decode_image, errors_naming, load_mask, wide_maximum
from .samples import DataError

VERSION = 4  # of what is remembered of a file; raise it when reading or counting changes
MOST_KEYS = 512  # values remembered of one mask, or twice the classes; of more, the commonest are enough
SAMPLED = 24  # rows and columns of an image whose values are counted


@dataclass(frozen=True)
class ScanOptions:
    """The settings that decide what is remembered of a file."""

    in_channels: int
    snap_to: tuple[int, ...]  # colours that rare ones become
    ranges: tuple[tuple[int, int, int], ...]  # (lowest, highest, id step) of mask values; step 0 joins them
    most_keys: int


def scan_files(
    root: Path,
    files: dict[Path, bool],
    options: ScanOptions,
    cache_dir: str | Path | None,
    progress: Callable | None,
) -> tuple[dict[Path, dict], Callable[[], None]]:
    """What there is to know of each file, from memory where size and time are unchanged.

    Args:
        root: the data folder.
        files: each with True for a mask.
        options: see there.
        cache_dir: folder to remember results in; None to remember nothing.
        progress: callable (iterable, total, description) → iterable, for a bar.

    Returns:
        (file → plain values; function that remembers them where `cache_dir` did not exist before)
    """
    setup = json.dumps([VERSION, str(root.resolve()), *vars(options).values()])
    key = hashlib.sha256(setup.encode()).hexdigest()[:16]
    memory = Path(cache_dir, f"check-{key}.json") if cache_dir else None
    stamps = {file: _stamp(file) for file in files}
    known = _recall(memory)
    seen = {file: known.get(relative_name(root, file), {}) for file in files}
    todo = [file for file in files if seen[file].get("stamp") != stamps[file]]

    def look(file: Path) -> tuple[Path, dict]:
        return file, {"stamp": stamps[file], **_scan(file, files[file], options)}

    def remember() -> None:
        if memory and not memory.exists():
            _remember(memory, root, seen)

    if todo:
        with ThreadPool() as pool:
            results = pool.imap(look, todo)
            seen.update(progress(results, len(todo), "checking data") if progress else results)
        if memory and memory.parent.exists():  # refused data make no folder
            _remember(memory, root, seen)
    return seen, remember


def relative_name(root: Path, file: Path) -> str:
    """The key of a file wherever the data lie: train/images/0.jpg."""
    return str(file).removeprefix(f"{root}{os.sep}").replace(os.sep, "/")


def _stamp(file: Path) -> list[int]:
    status = file.stat() if file.exists() else file.lstat()  # a link to nowhere
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]  # the last shows a renamed file


def _recall(memory: Path | None) -> dict[str, dict]:
    """What was remembered; nothing where the file is missing or broken: then it is learned anew."""
    try:
        known = json.loads(memory.read_text(encoding="utf-8")) if memory else {}
        return {name: seen for name, seen in known.items() if "stamp" in seen}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(memory: Path, root: Path, seen: dict[Path, dict]) -> None:
    """A half-written file counts as none; without room or right to write, the next start is only slower."""
    entries = {relative_name(root, file): each for file, each in seen.items() if "error" not in each}
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps(entries, separators=(",", ":")), encoding="utf-8")


def _scan(file: Path, is_mask: bool, options: ScanOptions) -> dict:
    """What is worth knowing of a file, in plain values, or what is wrong with it."""
    try:
        data = file.read_bytes()
        look = _look_at_mask if is_mask else _look_at_image
        with errors_naming(file):
            return {"crc": zlib.crc32(data), **look(file, data, options)}
    except DataError as error:
        text = str(error)
        while text.startswith(f"{file}: "):
            text = text.removeprefix(f"{file}: ")
        return {"error": text}
    except OSError as error:
        return {"error": f"cannot be read ({error.strerror})"}


def _look_at_image(file: Path, data: bytes, options: ScanOptions) -> dict:
    """Size, rotation, the range of integers above 8 bits, and how much one value fills."""
    pixels, size, orientation = decode_image(file, data, lambda size: (-(-size[0] // 8), -(-size[1] // 8)))
    wide = wide_maximum(pixels)
    array = channels_of(pixels, options.in_channels, None if wide is None or wide > 65535 else max(255, wide))
    down, right = (-(-side // SAMPLED) for side in array.shape[:2])
    sample = array[::down, ::right].ravel()
    counts = np.bincount(sample, minlength=256)
    top = int(counts.argmax())
    share = int(counts[top]) / sample.size
    is_constant = share * array.shape[2] > 0.99 and bool((array == array[0, 0]).all())
    top = [top, round(share, 4)]
    return {"size": list(size), "orientation": orientation, "wide": wide, "top": top,
            "constant": is_constant}  # fmt: skip


def _look_at_mask(file: Path, data: bytes, options: ScanOptions) -> dict:
    """Height and width of a mask, and its `MaskStats` as a dict."""
    raw, palette, damage = load_mask(file, data=data)
    kind = "grey" if palette is None else "palette"
    if raw.ndim == 3 and (raw == raw[..., :1]).all():
        raw = raw[..., 0]
    elif raw.ndim == 3:
        kind, raw = "colour", pack(raw)
    if raw.dtype == np.uint8:
        counts = np.bincount(raw.ravel())
        keys = np.flatnonzero(counts)
        counts = counts[keys]
    else:
        keys, counts = np.unique(raw, return_counts=True)
    if kind == "colour" and options.snap_to:  # of a JPEG's thousands of colours, what they will become
        rare = counts <= RARE * raw.size
        keys[rare] = nearest(keys[rare], options.snap_to, colours=True)[0]
        keys, counts = _joined(keys, counts)
    if kind == "grey" and len(keys) > options.most_keys:  # of instance ids as well
        for low, high, step in options.ranges:
            if not step:
                keys = np.where((keys > low) & (keys <= high), low, keys)
        keys, counts = _joined(keys, counts)
    if len(keys) > options.most_keys:
        common = np.sort(np.argsort(-counts, kind="stable")[: options.most_keys])
        keys, counts = keys[common], counts[common]
    keys = keys.tolist()
    stats = {"kind": kind, "keys": keys, "counts": counts.tolist(), "damage": damage}
    if palette is not None:
        stats["colours"] = [palette[key] if key < len(palette) else 0 for key in keys]
    return {"size": list(raw.shape), "stats": stats}


def _joined(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, ascending, with the sum of its counts."""
    keys, inverse = np.unique(keys, return_inverse=True)
    return keys, np.bincount(inverse, counts).astype(np.int64)
