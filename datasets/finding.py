"""Finding image files: in folders, by patterns, in natural order, and saying what is left out."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .reading import SUFFIXES
from .samples import DataError

SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


def natural_key(text: str) -> list:
    """Sort key that puts img2 before img10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text.lower()))]


def is_hidden(path: Path) -> bool:
    """True for files that systems and editors leave in folders: .DS_Store, ._photo.jpg, Thumbs.db."""
    return path.name.startswith((".", "~$")) or path.name.lower() in SYSTEM_FILES


def is_image(path: Path) -> bool:
    """True for a name with the ending of a format that is read, whatever the file holds."""
    return path.suffix.lower() in SUFFIXES and not is_hidden(path)


def in_natural_order(paths: Iterable[Path]) -> list[Path]:
    """Sorted so that img2 comes before img10, in the same order on every system."""
    return sorted(paths, key=lambda path: (natural_key(path.as_posix()), path))  # a.jpg and A.jpg tie


def list_files(folder: Path, recursive: bool = False) -> list[Path]:
    """Every file in `folder`, unsorted; hidden folders are left out.

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
    return paths


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """Every image file in `folder`, in natural order; hidden files and folders are left out."""
    return in_natural_order(filter(is_image, list_files(folder, recursive)))


def describe_left_out(files: Iterable[Path]) -> str:
    """The files that are not read, counted by ending: '3 files (2 .heic, 1 .avif)'; empty for none."""
    others = [path for path in files if not is_image(path) and not is_hidden(path)]
    endings = Counter(path.suffix.lower() or "no ending" for path in others)
    counts = ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items()))
    return f"{len(others)} file{'s' * (len(others) > 1)} ({counts})" if others else ""


def find_images(path: str | Path, recursive: bool = False) -> list[Path]:
    """The images meant by a file, a folder, or a pattern such as 'photos/*.jpg', in natural order.

    Raises:
        FileNotFoundError: nothing is there.
        DataError: something is there, but no image among it.
    """
    files = _files(path, recursive)
    found = in_natural_order(filter(is_image, files))
    if not found:
        below = "" if recursive else " (folders below it are searched with recursive)"
        others = describe_left_out(files)
        holds = f"; it has {others}" if others else ""
        raise DataError(f"{path}: no image found{holds}; looked for {' '.join(SUFFIXES)}{below}.")
    return found


def left_out(path: str | Path, recursive: bool = False) -> str:
    """The files that `find_images` passes over because of their ending, in words; empty for none."""
    return describe_left_out(_files(path, recursive))


def _files(path: str | Path, recursive: bool) -> list[Path]:
    """The files meant by a file, a folder or a pattern."""
    path = Path(os.path.expanduser(path))  # Path's own raises for a user that does not exist
    known = next((parent for parent in (path, *path.parents) if parent.exists()), path)
    unknown = str(path.relative_to(known))  # brackets are a pattern only in the part that does not exist
    if not path.exists() and not glob.has_magic(unknown):
        raise FileNotFoundError(f"{path}: there is no such file. Give an image, a folder or a pattern.")
    if path.is_dir():
        return list_files(path, recursive)
    if path.exists():
        return [path]
    pattern = os.path.join(glob.escape(str(known)), unknown)
    return [found for found in map(Path, glob.glob(pattern, recursive=True)) if not found.is_dir()]
