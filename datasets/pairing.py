"""Which mask belongs to which picture: by the name before the dot, across file types; never by a pattern."""

import os
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from .finding import SUFFIXES, is_hidden, list_images
from .labels import Encoding
from .large import LargeMask, read_size
from .samples import DataError

SHOWN = 5  # problems of one kind that are listed; the rest are counted


@dataclass(frozen=True)
class Pair:
    """One picture and its mask; `height` and `width` of the picture, EXIF applied."""

    image: Path
    mask: Path
    height: int
    width: int
    stamp: tuple = ()  # (size, mtime_ns) of both files: what a cached sample is known by


class Problems:
    """Everything wrong below a folder, in the order found, grouped by kind."""

    def __init__(self, root: Path):
        self.root = root
        self.rows: dict[str, list[tuple[str, str, str]]] = defaultdict(list)

    def add(self, kind: str, file: Path | str, finding: str, remedy: str) -> None:
        """Note one problem."""
        self.rows[kind].append((str(file).removeprefix(f"{self.root}{os.sep}"), finding, remedy))

    def raise_any(self) -> None:
        """Raise one DataError that lists all; do nothing where there are none."""
        if not self.rows:
            return
        count = sum(map(len, self.rows.values()))
        lines = [f"{self.root}: {count} problem{'s' * (count > 1)} found; nothing was written."]
        for kind, rows in self.rows.items():
            shown = rows[:SHOWN]
            name, found = (min(60, max(len(row[i]) for row in shown)) for i in (0, 1))
            lines.append(f"{kind} ({len(rows)}):")
            lines += [f"  {row[0]:{name}} | {row[1]:{found}} | {row[2]}" for row in shown]
            if len(rows) > SHOWN:
                lines.append(f"  ... and {len(rows) - SHOWN} more of this kind")
        raise DataError("\n".join(lines))


def pair_split(
    folder: Path, mask_suffix: str, problems: Problems, warnings: list[str]
) -> list[tuple[Path, Path]]:
    """(picture, mask) of all that `folder`/images and `folder`/masks hold."""
    stems = []
    for each in (folder / "images", folder / "masks"):
        if not each.is_dir():
            remedy = "the layout is data_root/{train,val}/{images,masks}"
            problems.add("no such folder", each, "is not a folder", remedy)
            continue
        files = list_images(each)
        if not files:
            problems.add("empty", each, "holds no picture", f"put {' '.join(SUFFIXES)} files there")
        for path in files:
            if re.search("[\ud800-\udfff]", path.name):  # how Python shows bytes that are no text
                problems.add("names", path, "its name is no UTF-8", "rename it")
        others = [path for path in each.iterdir() if path.suffix.lower() not in SUFFIXES]
        others = sorted(path.name for path in others if not is_hidden(path))
        if others:
            warnings.append(f"{each}: left out {len(others)} entries that are no pictures ({others[0]}, ...)")
        stems.append(_by_stem(files, problems, f"two {each.name} of one name"))
    if len(stems) < 2:
        return []
    images, masks = stems
    wanted = {_spelling(stem + mask_suffix): path for stem, path in images.items()}
    suffix = _likely_suffix(images, masks, wanted)
    remedy = "add the missing file, or remove this one"
    if suffix is not None:
        remedy = f"set mask_suffix to '{suffix}'"
    for stem in [stem for stem in wanted if stem not in masks]:
        problems.add("no mask", wanted[stem], f"no masks/{stem}.*", remedy)
    for stem in [stem for stem in masks if stem not in wanted]:
        problems.add("no picture", masks[stem], f"no images/{stem.removesuffix(mask_suffix)}.*", remedy)
    return [(image, masks[stem]) for stem, image in wanted.items() if stem in masks]


def pair_truth(
    images: list[Path], truth_folder: str | Path, mask_suffix: str, encoding: Encoding
) -> list[Path]:
    """The mask of each picture in `truth_folder`, by stem, for scoring predictions.

    Raises:
        FileNotFoundError: no such folder.
        DataError: lists all pictures without a mask or with two, all masks unreadable, not of `encoding`, or
            of another size than their picture.
    """
    folder = Path(os.path.expanduser(truth_folder))
    problems = Problems(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder. Give truth the folder of masks.")
    masks = _by_stem(list_images(folder), problems, "two masks of one picture")
    _by_stem(images, problems, "two pictures of one mask")
    wanted = [_spelling(image.stem + mask_suffix) for image in images]
    for stem, image in zip(wanted, images, strict=True):
        if stem not in masks:
            problems.add("no mask", image, f"no {stem}.* in {folder}", "add it, or leave truth out")
    problems.raise_any()
    chosen = [masks[stem] for stem in wanted]
    for image, mask in zip(images, chosen, strict=True):
        if finding := _truth_problem(image, mask, encoding):
            problems.add("mask", mask, finding, "give the masks of these pictures, encoded as in training")
    problems.raise_any()
    return chosen


def _truth_problem(image: Path, path: Path, encoding: Encoding) -> str | None:
    """What makes a mask no truth for a picture; a picture that cannot be read is not its fault."""
    try:
        with LargeMask(path, encoding.as_colours) as mask:
            for _, raw in mask.strips():
                encoding.encode(raw)
            if mask.damage and encoding.is_dense:
                return f"{mask.damage}, so that class ids may have changed unseen"
    except ValueError as error:
        return str(error).removeprefix(f"{path}: ")
    try:
        size = read_size(image)
    except (DataError, OSError):
        return None
    return None if size == mask.size else "is {} x {}, its picture {} x {}".format(*mask.size, *size)


def _by_stem(files: list[Path], problems: Problems, kind: str) -> dict[str, Path]:
    """Files by stem; a second file of a stem is a problem, not a choice."""
    stems: dict[str, Path] = {}
    for path in files:
        stem = _spelling(path.stem)
        if stem in stems:
            problems.add(kind, path, f"{stems[stem].name} has the same stem", "keep one of them")
        stems.setdefault(stem, path)
    return stems


def _spelling(text: str) -> str:
    """One spelling of what looks alike: macOS may write an accent apart from its letter (NFD)."""
    return unicodedata.normalize("NFC", text)


def _likely_suffix(images: dict, masks: dict, wanted: dict) -> str | None:
    """The mask_suffix that would pair most pictures, judged by the first mask that found none."""
    lone = next((stem for stem in masks if stem not in wanted), "")
    for cut in range(1, len(lone) + 1):
        suffix = lone[cut:]
        if lone[:cut] in images and 2 * sum(stem + suffix in masks for stem in images) > len(images):
            return suffix
    return None
