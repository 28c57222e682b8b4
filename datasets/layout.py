"""Where a data folder keeps its images and masks: which layouts are read, and how a flat one is split."""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from .finding import SUFFIXES, describe_left_out, in_natural_order, is_hidden, is_image, list_files

SPLITS = ("train", "val")
VAL_SHARE = 0.2  # fraction of a flat folder's pairs that validate
LAYOUTS = (
    "{train,val}/{images,masks}, or {images,masks}/{train,val}, or images/ and masks/, which are split by "
    "train.txt and val.txt or by val_share"
)


@dataclass
class Group:
    """The images and masks that are paired with each other: of a split, or of all of a flat folder."""

    name: str  # train, val, or all
    images: Path  # folder
    masks: Path
    image_files: list[Path] = field(default_factory=list)
    mask_files: list[Path] = field(default_factory=list)
    is_nested: bool = False  # both have sub-folders

    def key(self, path: Path) -> str:
        """The sub-folder of a file under images/ or masks/, as text; empty directly below them."""
        if not self.is_nested:
            return ""
        base = self.images if self.images in path.parents else self.masks
        return path.parent.relative_to(base).as_posix().removeprefix(".")


def find_groups(root: Path) -> list[Group]:
    """The folders of a data root, in whichever layout it has."""
    if not any((root / split).is_dir() for split in SPLITS):
        if any((root / kind / split).is_dir() for kind in ("images", "masks") for split in SPLITS):
            return [Group(split, root / "images" / split, root / "masks" / split) for split in SPLITS]
        if (root / "images").is_dir() and (root / "masks").is_dir():
            return [Group("all", root / "images", root / "masks")]
    return [Group(split, root / split / "images", root / split / "masks") for split in SPLITS]


def list_group(group: Group, warnings: list[str]) -> list[tuple[str, Path, str, str]]:
    """Fill a group's files; return its problems as (kind, file, finding, fix)."""
    problems, found = [], {}
    for folder in (group.images, group.masks):
        if not folder.is_dir():
            problems.append(("no such folder", folder, "is not a folder", f"data_root is {LAYOUTS}"))
            continue
        base = len(str(folder)) + 1
        found[folder] = [(path, os.sep in str(path)[base:]) for path in list_files(folder, recursive=True)]
    if problems:
        return problems
    nested = {f: any(below and is_image(path) for path, below in files) for f, files in found.items()}
    both = group.is_nested = all(nested.values())
    if any(nested.values()) and not both:
        deep, flat = sorted(nested, key=nested.get, reverse=True)
        finding = f"has sub-folders with images, {os.path.join(flat.parent.name, flat.name)} has none"
        problems.append(("sub-folders", deep, finding, "give both the same sub-folders, or neither"))
    for folder, files in found.items():
        kept = [path for path, below in files if both or not below]
        others = [path for path in kept if not is_image(path) and not is_hidden(path)]
        if others:
            example = in_natural_order(others)[0].name
            warnings.append(f"{folder}: left out {describe_left_out(kept)}, such as {example}")
        images = in_natural_order(filter(is_image, kept))
        if not images and not nested[folder]:
            problems.append(("empty", folder, "holds no image", f"put {' '.join(SUFFIXES)} files there"))
        for path in images:
            if re.search("[\ud800-\udfff]", path.name):  # bytes that are not text
                problems.append(("names", path, "its name is not UTF-8", "rename it"))
        setattr(group, "image_files" if folder == group.images else "mask_files", images)
    return problems


def read_list(path: Path) -> list[str]:
    """The names in a train.txt or val.txt, one per line, a mask's name behind it being allowed."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def split_by_lists(root: Path, pairs: list, group: Group) -> tuple[dict[str, list], list, list[str]]:
    """Split pairs by root/train.txt and root/val.txt.

    Returns:
        (pairs by split; (list, name) of names without an image; names that are on both lists)
    """
    by_name = {}
    for pair in pairs:
        path = pair[0].relative_to(group.images)
        for name in (path.as_posix(), path.with_suffix("").as_posix(), path.name, path.stem):
            by_name.setdefault(name, pair)
    splits: dict[str, list] = {}
    missing = []
    for split in SPLITS:
        chosen = {}
        for line in read_list(root / f"{split}.txt"):
            names = [line, *line.split()[:1]]
            names += [name.replace("\\", "/").removeprefix("./").removeprefix("images/") for name in names]
            pair = next((by_name[name] for name in names if name in by_name), None)
            if pair is None:
                missing.append((root / f"{split}.txt", line))
            else:
                chosen[pair[0]] = pair
        splits[split] = list(chosen.values())
    train = {pair[0] for pair in splits["train"]}
    return splits, missing, [pair[0].name for pair in splits["val"] if pair[0] in train]


def split_by_share(pairs: list, group: Group, val_share: float, seed: int) -> dict[str, list]:
    """Split pairs by the hash of seed and name: another file does not change the others' order."""

    def draw(pair: tuple) -> str:
        name = pair[0].relative_to(group.images).as_posix()
        return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()

    count = min(max(1, round(len(pairs) * val_share)), len(pairs) - 1)
    chosen = {pair[0] for pair in sorted(pairs, key=draw)[:count]}
    train = [pair for pair in pairs if pair[0] not in chosen]
    return {"train": train, "val": [pair for pair in pairs if pair[0] in chosen]}
