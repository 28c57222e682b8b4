"""Which mask belongs to which image: by the stem, or by what differs between the stems of all files."""

import os
import unicodedata
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from .finding import list_images
from .labels import Encoding
from .large import LargeMask, read_size
from .layout import Group
from .samples import DataError

SHOWN = 5  # problems of one kind that are listed; the rest are counted
SEPARATORS = ("_", "-", ".", " ")


@dataclass(frozen=True)
class Pair:
    """One image and its mask; `height` and `width` of the image, EXIF applied."""

    image: Path
    mask: Path
    height: int
    width: int
    stamp: tuple = ()  # (size, mtime_ns) of both files: the key of a cached sample


@dataclass(frozen=True)
class Rule:
    """What stands before and behind the part of a stem that image and mask have in common."""

    image_prefix: str = ""
    image_suffix: str = ""
    mask_prefix: str = ""
    mask_suffix: str = ""

    def mask_stem(self, stem: str) -> str | None:
        """The stem of the mask of an image; None for an image that the rule does not fit."""
        core = _between(stem, self.image_prefix, self.image_suffix)
        return None if core is None else f"{self.mask_prefix}{core}{self.mask_suffix}"

    def image_stem(self, stem: str) -> str | None:
        """The stem of the image of a mask; None for a mask that the rule does not fit."""
        core = _between(stem, self.mask_prefix, self.mask_suffix)
        return None if core is None else f"{self.image_prefix}{core}{self.image_suffix}"

    @property
    def is_plain(self) -> bool:
        """True where the masks have the images' own names, with a suffix at most."""
        return not (self.image_prefix or self.image_suffix or self.mask_prefix)

    def describe(self) -> str:
        """The rule in words: '*_training with *_manual1'."""
        image = f"{self.image_prefix}*{self.image_suffix}"
        return f"{image} with {self.mask_prefix}*{self.mask_suffix}"

    def to_dict(self) -> dict[str, str]:
        """Plain values, for a checkpoint."""
        return asdict(self)


class Problems:
    """Everything wrong below a folder, in the order found, grouped by kind; warnings and notes beside it."""

    def __init__(self, root: Path):
        self.root = root
        self.warnings: list[str] = []
        self.notes: list[str] = []  # decisions that a user should know of, a line each
        self.rows: dict[str, list[tuple[str, str, str]]] = defaultdict(list)

    def add(self, kind: str, file: Path | str, finding: str, fix: str) -> None:
        """Note one problem."""
        self.rows[kind].append((str(file).removeprefix(f"{self.root}{os.sep}"), finding, fix))

    def raise_any(self) -> None:
        """Raise one DataError that lists all, and the warnings; do nothing where there are no problems."""
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
        raise DataError("\n".join(lines + [f"warning: {warning}" for warning in self.warnings]))


def find_rule(groups: list[Group], mask_suffix: str, problems: Problems) -> tuple[Rule, str]:
    """The one rule that pairs all files of all groups, and a line that says so where it was inferred.

    The images' stems with `mask_suffix` behind are tried first, then what differs between the stems.
    Masks that do not end with a given `mask_suffix` are dropped from the groups where that pairs all images.
    Without such a rule, the first one is returned, and candidates are noted as a problem.
    """
    plain, suffix = Rule(mask_suffix=mask_suffix), _spelling(mask_suffix)
    images, masks = ([g.image_files for g in groups], [g.mask_files for g in groups])
    if _pairs_all(plain, groups, images, masks):
        return plain, ""
    ending = [[path for path in files if _spelling(path.stem).endswith(suffix)] for files in masks]
    rule = _by_difference(images, ending)
    if rule and _pairs_all(rule, groups, images, ending):
        dropped = sum(map(len, masks)) - sum(map(len, ending))
        for group, files in zip(groups, ending, strict=True):
            group.mask_files = files
        rest = f"; left out {dropped} masks that do not end with {mask_suffix}" if dropped else ""
        if rule == plain:
            return rule, f"pairs: by name{rest}" if rest else ""
        example = f"{groups[0].image_files[0].name} with {_partner(rule, groups[0]).name}"
        return rule, f"pairs: {rule.describe()} ({example}){rest}"
    if not mask_suffix and any(images):
        candidates = _candidates(groups, images, masks)
        if candidates:
            several = "one of these" if len(candidates) > 1 else "this"
            fix = f"set {several}, or remove the others: " + ", ".join(
                f"--mask_suffix {c}" for c in candidates
            )
            finding = f"{sum(map(len, masks))} masks for {sum(map(len, images))} images"
            problems.add("several masks per image", groups[0].masks, finding, fix)
    return plain, ""


def match_group(group: Group, rule: Rule, problems: Problems) -> list[tuple[Path, Path]]:
    """(image, mask) for all files of a group; what has no partner, or two, is noted."""
    if not group.image_files or not group.mask_files:  # which is a problem of its own
        return []
    images = _by_stem(group, group.image_files, problems, "two images with one name")
    masks = _by_stem(group, group.mask_files, problems, "two masks with one name")
    pairs, lone = [], []
    for (folder, stem), path in images.items():
        mask = masks.get((folder, _spelling(rule.mask_stem(stem) or "")))
        if mask:
            pairs.append((path, mask))
        else:
            lone.append(path)
    used = {mask for _, mask in pairs}
    fix = "add the missing file, or remove this one"
    if lone and (suffix := _likely_suffix(images, masks, rule)) is not None:
        fix = f"set --mask_suffix {suffix}"
    for path in lone:
        stem = rule.mask_stem(_spelling(path.stem))
        expected = f"{stem}.*" if stem else f"file that fits {rule.describe()}"
        problems.add("no mask", path, f"no masks/{expected}", fix)
    for path in masks.values():
        if path not in used:
            stem = rule.image_stem(_spelling(path.stem))
            expected = f"{stem}.*" if stem else f"file that fits {rule.describe()}"
            problems.add("no image", path, f"no images/{expected}", fix)
    return pairs


def pair_targets(
    images: list[Path], folder: str | Path, mask_suffix: str, encoding: Encoding, pairing: dict | None = None
) -> list[Path]:
    """The mask of each image in `folder`, for scoring predictions.

    Args:
        images: the image files.
        folder: the masks; more than one per image may lie there.
        mask_suffix: the setting of the training run.
        encoding: of the training masks.
        pairing: `DataReport.pairing` of the training run; None for the names alone.

    Raises:
        FileNotFoundError: no such folder.
        DataError: lists all images without a mask or with two, all masks unreadable, not of `encoding`, or
            of another size than their image.
    """
    folder = Path(os.path.expanduser(folder))
    problems = Problems(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder. Give truth the folder of masks.")
    group = Group("all", folder, folder, images, list_images(folder))
    masks = {
        stem: path for (_, stem), path in _by_stem(group, group.mask_files, problems, "two masks").items()
    }
    _by_stem(group, images, problems, "two images with one mask")
    rules = [Rule(**pairing)] if pairing else []
    rules += [Rule(mask_suffix=mask_suffix), _by_difference([images], [group.mask_files]) or Rule()]
    stems = [_spelling(image.stem) for image in images]

    def partners(rule: Rule) -> list[Path | None]:
        return [masks.get(_spelling(rule.mask_stem(stem) or "")) for stem in stems]

    chosen = max(map(partners, rules), key=lambda found: sum(mask is not None for mask in found))
    for image, stem, mask in zip(images, stems, chosen, strict=True):
        if mask is None:
            expected = rules[0].mask_stem(stem) or stem
            problems.add("no mask", image, f"no {expected}.* in {folder}", "add it, or leave truth out")
    problems.raise_any()
    for image, mask in zip(images, chosen, strict=True):
        if finding := _target_problem(image, mask, encoding):
            problems.add("mask", mask, finding, "give the masks of these images, encoded as in training")
    problems.raise_any()
    return chosen


def _target_problem(image: Path, path: Path, encoding: Encoding) -> str | None:
    """Why a mask cannot be the target of an image; an image that cannot be read is not the mask's fault."""
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
    return None if size == mask.size else "is {} x {}, its image {} x {}".format(*mask.size, *size)


def _between(stem: str, prefix: str, suffix: str) -> str | None:
    fits = len(stem) >= len(prefix) + len(suffix) and stem.startswith(prefix) and stem.endswith(suffix)
    return stem[len(prefix) : len(stem) - len(suffix)] if fits else None


def _by_stem(group: Group, files: list[Path], problems: Problems, kind: str) -> dict[tuple[str, str], Path]:
    """Files by sub-folder and stem; a second file of a stem is a problem, not a choice."""
    stems: dict[tuple[str, str], Path] = {}
    for path in files:
        key = (group.key(path), _spelling(path.stem))
        if key in stems:
            problems.add(kind, path, f"{stems[key].name} has the same stem", "keep one of them")
        stems.setdefault(key, path)
    return stems


def _spelling(text: str) -> str:
    """One spelling of names that look alike: macOS may write an accent apart from its letter (NFD)."""
    return unicodedata.normalize("NFC", text)


def _pairs_all(rule: Rule, groups: list[Group], images: list[list[Path]], masks: list[list[Path]]) -> bool:
    """True where the rule pairs all files of all groups one to one."""
    for group, own_images, own_masks in zip(groups, images, masks, strict=True):
        expected = [
            (group.key(path), _spelling(rule.mask_stem(_spelling(path.stem)) or "")) for path in own_images
        ]
        given = [(group.key(path), _spelling(path.stem)) for path in own_masks]
        if len(set(given)) < len(given) or sorted(expected) != sorted(given):
            return False
    return True


def _partner(rule: Rule, group: Group) -> Path:
    """The mask of the first image of a group that the rule pairs."""
    image = group.image_files[0]
    stem = rule.mask_stem(_spelling(image.stem))
    return next(p for p in group.mask_files if (group.key(p), _spelling(p.stem)) == (group.key(image), stem))


def _by_difference(images: list[list[Path]], masks: list[list[Path]]) -> Rule | None:
    """The constant beginnings and endings of both sides, without what both have in common."""
    stems = [[_spelling(path.stem) for files in side for path in files] for side in (images, masks)]
    if min(map(len, stems)) < 2:  # one file alone has no constant part
        return None
    (image_prefix, image_suffix), (mask_prefix, mask_suffix) = map(_constant_ends, stems)
    if image_prefix == mask_prefix:
        image_prefix = mask_prefix = ""
    if image_suffix == mask_suffix:
        image_suffix = mask_suffix = ""
    shared = _common_suffix([image_prefix, mask_prefix])
    shared = shared[shared[:1] in SEPARATORS :]  # a separator stays with the prefixes
    image_prefix, mask_prefix = (text.removesuffix(shared) for text in (image_prefix, mask_prefix))
    shared = os.path.commonprefix([image_suffix, mask_suffix])
    shared = shared[: len(shared) - (shared[-1:] in SEPARATORS)]
    image_suffix, mask_suffix = (text.removeprefix(shared) for text in (image_suffix, mask_suffix))
    return Rule(image_prefix, image_suffix, mask_prefix, mask_suffix)


def _constant_ends(stems: list[str]) -> tuple[str, str]:
    prefix = os.path.commonprefix(stems)
    return prefix, _common_suffix([stem[len(prefix) :] for stem in stems])


def _common_suffix(texts: list[str]) -> str:
    return os.path.commonprefix([text[::-1] for text in texts])[::-1]


def _candidates(groups: list[Group], images: list[list[Path]], masks: list[list[Path]]) -> list[str]:
    """Endings of masks of which each alone pairs every image: what mask_suffix may be."""
    stems = [_spelling(path.stem) for files in masks for path in files]
    endings = {
        stem[i:] for stem in stems[:200] for i, letter in enumerate(stem) if letter in SEPARATORS and i
    }
    found: dict[tuple, str] = {}
    for ending in sorted(endings, key=len):
        kept = [[path for path in files if _spelling(path.stem).endswith(ending)] for files in masks]
        if sum(map(len, kept)) == sum(map(len, images)) < len(stems):
            rules = [Rule(mask_suffix=ending), _by_difference(images, kept)]
            if any(rule and _pairs_all(rule, groups, images, kept) for rule in rules):
                found[tuple(map(tuple, kept))] = ending  # of endings that keep the same files the longest
    return list(found.values())


def _likely_suffix(images: dict, masks: dict, rule: Rule) -> str | None:
    """The mask_suffix that would pair most images, judged by the first mask that found none."""
    expected = {(folder, rule.mask_stem(stem)) for folder, stem in images}
    folder, lone = next((key for key in masks if key not in expected), ("", ""))
    for cut in range(1, len(lone) + 1):
        suffix = lone[cut:]
        paired = sum((where, stem + suffix) in masks for where, stem in images)
        if (folder, lone[:cut]) in images and 2 * paired > len(images):
            return suffix if suffix != rule.mask_suffix else None
    return None
