"""The check before training: every file is paired, opened and counted once; all problems are listed at once.

Its steps: find the files, pair them, scan each, match sizes, infer the encoding, count the classes.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .infer import NEAR, RARE, EncodingError, MaskSet
from .labels import (
    SHOWN,
    UNKNOWN,
    Colours,
    Encoding,
    LabelMap,
    MaskStats,
    listing,
    nearest,
    pack_all,
    parse_labels,
    raw_name,
    write_labels,
)
from .layout import LAYOUTS, SPLITS, VAL_SHARE, Group, find_groups, list_group, split_by_lists, split_by_share
from .pairing import Pair, Problems, Rule, find_rule, match_group
from .readings import Reading, choose_encoding, class_shares, stray_readings
from .samples import DataError
from .scan import MOST_KEYS, ScanOptions, relative_name, scan_files

MANY_STRAYS = 8  # a mask with more near or rare values outside the classes is taken for a lossy one
MONOTONE = 0.99  # fraction of all pixels of an image set above which one value is warned of


@dataclass
class Split:
    """One split: its pairs, and what was found in them."""

    name: str  # train or val
    paths: list[tuple[Path, Path]]
    pairs: list[Pair] = field(default_factory=list)
    counts: np.ndarray | None = None  # (pairs, classes) pixels
    empty: list[Path] = field(default_factory=list)  # masks in which all pixels are ignored

    @property
    def class_pixels(self) -> np.ndarray:
        """Pixels of each class."""
        return self.counts.sum(0)


@dataclass
class DataReport:
    """What the check found in data that can be trained on."""

    train: list[Pair]
    val: list[Pair]
    encoding: Encoding
    class_pixels: dict[str, np.ndarray]
    class_image_pixels: np.ndarray
    fingerprint: dict[str, str]  # by part of the data, so that a difference can be named
    warnings: list[str] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # decisions that a user should know of, a line each
    max_value: int | None = None  # of integer images above 8 bits: the value that becomes 255
    pairing: dict[str, str] = field(default_factory=dict)  # the `Rule` that paired the files

    def describe(self) -> str:
        """Counts, sizes, encoding, class shares and imbalance, for the user before a run."""
        lines = list(self.notes)
        for split, pairs in (("train", self.train), ("val", self.val)):
            sizes = sorted({(pair.height, pair.width) for pair in pairs}, key=math.prod)
            small, large = ("{} x {}".format(*size) for size in (sizes[0], sizes[-1]))
            size = small if len(sizes) == 1 else f"{len(sizes)} sizes from {small} to {large}"
            lines.append(f"{split}: {len(pairs)} images, {size}")
        lines.append(f"masks: {self.encoding.describe()}")
        train, val = (self.class_pixels[split] / max(1, self.class_pixels[split].sum()) for split in SPLITS)
        width = max(map(len, self.class_names))
        for name, in_train, in_val in zip(self.class_names, train, val, strict=True):
            lines.append(f"  {name:{width}}  train {in_train:7.2%}  val {in_val:7.2%}")
        rarest = np.argmin(np.where(train > 0, train, np.inf))
        if train.max() > 20 * train[rarest]:
            times = f"{train.max() / train[rarest]:.0f} times the pixels of {self.class_names[rarest]}"
            way = (
                "to weight rare ones more, set --joint_ce weighted_ce (with loss joint) or --loss weighted_ce"
            )
            lines.append(f"hint: the commonest class has {times}; {way}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def check_data(
    root: str | Path,
    *,
    num_classes: int,
    ignore_index: int = 255,
    class_names: Sequence[str] | None = None,
    class_colors: Colours | None = None,
    in_channels: int = 3,
    labels: str = "auto",
    mask_suffix: str = "",
    val_share: float = VAL_SHARE,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: Callable | None = None,
) -> DataReport:
    """Check a whole data folder, in any of `layout.LAYOUTS`.

    Args:
        root: the data folder.
        num_classes: number of classes, background included.
        ignore_index: the id of pixels that count nowhere; any int but a class id.
        class_names: one name per class, for messages.
        class_colors: one (r, g, b) per class, or None; what colours in masks mean.
        in_channels: channels that images must be convertible to.
        labels: the setting, see `labels.parse_labels`.
        mask_suffix: what a mask's stem has after its image's: '_mask' for a.jpg and a_mask.png.
        val_share: fraction of the pairs that validate, in a folder without train and val.
        seed: of that split.
        cache_dir: folder to remember results in; None to remember nothing.
        progress: callable (iterable, total, description) → iterable, for a bar.

    Raises:
        DataError: the data cannot be trained on; the message lists every problem with its fix.
        ValueError: a setting is not understood.
    """
    label_map, declared = parse_labels(labels), pack_all(class_colors)
    names = list(class_names or (f"class {i}" for i in range(num_classes)))
    refuse_control_characters(names)
    root = Path(os.path.expanduser(root))
    if not root.is_dir():
        raise DataError(f"data_root {root} is not a folder. Give the folder that holds {LAYOUTS}.")
    problems = Problems(root)
    splits, rule = find_pairs(root, mask_suffix, val_share, seed, problems)
    files = {file: file == mask for split in splits for image, mask in split.paths for file in (image, mask)}
    options = scan_options(in_channels, label_map, declared, num_classes)
    seen, remember = scan_files(root, files, options, cache_dir, progress)
    for split in splits:
        split.pairs = [pair for paths in split.paths if (pair := match_sizes(*paths, seen, problems))]
    problems.warnings += doubtful_images(splits, seen)
    masks = {pair.mask: MaskStats(**seen[pair.mask]["stats"]) for split in splits for pair in split.pairs}
    if not masks:
        problems.raise_any()
    settings = (num_classes, ignore_index, labels, declared, _own_names(names))
    encoding = infer_encoding(masks, settings, problems)
    count_classes(splits, masks, encoding, labels, declared, problems)
    problems.warnings += absent_classes(splits, names) + leave_out_empty(splits, problems)
    problems.raise_any()
    remember()
    return _report(splits, seen, encoding, names, rule, problems)


def _report(
    splits: list[Split], seen: dict, encoding: Encoding, names: list[str], rule: Rule, problems: Problems
) -> DataReport:
    """The report of data without problems."""
    max_value, line = wide_range(splits, seen)
    train, val = splits
    return DataReport(
        train.pairs,
        val.pairs,
        encoding=encoding,
        class_pixels={split.name: split.class_pixels for split in splits},
        class_image_pixels=((train.counts > 0) * train.counts.sum(1, keepdims=True)).sum(0),
        fingerprint=_fingerprint(problems.root, splits, seen, encoding),
        warnings=problems.warnings,
        class_names=names,
        notes=problems.notes + line,
        max_value=max_value,
        pairing=rule.to_dict(),
    )


def refuse_control_characters(names: Sequence[str]) -> None:
    """Raise ValueError for a class name that would break a line of a table, a log or a terminal."""
    for name in names:
        if not name.isprintable():
            raise ValueError(f"class_names has {name!r}, with a character that cannot be shown. Remove it.")


def _own_names(names: list[str]) -> list[str]:
    """The class names where the user gave some."""
    default = [[f"class{joint}{i}" for i in range(len(names))] for joint in " _"]
    return names if names not in default else []


# Steps


def find_pairs(
    root: Path, mask_suffix: str, val_share: float, seed: int, problems: Problems
) -> tuple[list[Split], Rule]:
    """The files of each split, paired by one rule."""
    groups = find_groups(root)
    for group in groups:
        for problem in list_group(group, problems.warnings):
            problems.add(*problem)
    rule, line = find_rule(groups, mask_suffix, problems)
    problems.notes += [line] if line else []
    if "several masks per image" in problems.rows:
        problems.raise_any()
    pairs = {group.name: match_group(group, rule, problems) for group in groups}
    if groups[0].name == "all":
        pairs = split_flat(groups[0], pairs["all"], val_share, seed, problems)
    elif val_share != VAL_SHARE:
        raise ValueError(f"val_share {val_share} is for a data_root without train and val. Leave it out.")
    return [Split(name, pairs[name]) for name in SPLITS], rule


def split_flat(group: Group, pairs: list, val_share: float, seed: int, problems: Problems) -> dict[str, list]:
    """The pairs of a folder without train and val, split by its lists of names or by val_share."""
    root = problems.root
    lists = [root / f"{name}.txt" for name in SPLITS]
    if all(path.is_file() for path in lists):
        splits, missing, both = split_by_lists(root, pairs, group)
        for path, name in missing:
            problems.add(
                "lists", path, f"names {name}, which has no pair", "remove the line, or add the files"
            )
        if both:
            problems.warnings.append(f"{len(both)} names are in train.txt and val.txt ({both[0]}, ...)")
        for name in SPLITS:
            if not splits[name] and not missing:
                problems.add(
                    "lists", root / f"{name}.txt", "names no image", "name images in it, one per line"
                )
        unused = len(pairs) - len({pair[0] for name in SPLITS for pair in splits[name]})
        left = f"; {unused} on neither list are left out" if unused else ""
        problems.notes.append(f"split: by train.txt and val.txt{left}")
        return splits
    if any(path.is_file() for path in lists):
        there, lacking = sorted(lists, key=lambda path: not path.is_file())
        problems.add("lists", there, f"stands without {lacking.name}", "add it, or remove this one")
    if len(pairs) < 2:
        if not problems.rows:
            problems.add("too few", root, "one pair cannot be split", "add pairs")
        return {name: pairs for name in SPLITS}
    splits = split_by_share(pairs, group, val_share, seed)
    counts = f"{len(splits['train'])} to train, {len(splits['val'])} to validate"
    problems.notes.append(f"split: {counts}, drawn by val_share {val_share:g} and seed {seed}")
    return splits


def scan_options(in_channels: int, labels: LabelMap, declared: list[int], num_classes: int) -> ScanOptions:
    """What is to be remembered of each file under these settings."""
    colours = [raw for raw, _ in labels.table if labels.colours] + declared
    return ScanOptions(
        in_channels,
        tuple(sorted(set(colours))) if labels.snap else (),
        tuple((low, high, step) for low, high, _, step in labels.ranges),
        max(MOST_KEYS, 2 * num_classes),
    )


def match_sizes(image: Path, mask: Path, seen: dict, problems: Problems) -> Pair | None:
    """The pair, if both files are readable and of one size; otherwise the problem is noted."""
    broken = [file for file in (image, mask) if "error" in seen[file]]
    for file in broken:
        problems.add("unreadable", file, seen[file]["error"], "fix it, or remove it with its pair")
    if broken:
        return None
    size, other = seen[image]["size"], seen[mask]["size"]
    if size == other:
        return Pair(image, mask, *size, stamp=(*seen[image]["stamp"], *seen[mask]["stamp"]))
    finding, fix = "mask {} x {}, image {} x {}".format(*other, *size), "make them one size"
    if size == other[::-1]:
        by_tag = seen[image]["orientation"] >= 5
        finding += ", which its EXIF tag rotated" if by_tag else ": one of them is rotated"
        fix = "rotate the mask as viewers show the image" if by_tag else "rotate one of them"
    problems.add("sizes differ", mask, finding, fix)
    return None


def infer_encoding(masks: dict[Path, MaskStats], settings: tuple, problems: Problems) -> Encoding:
    """The encoding of all masks; a refusal ends the check with all problems so far."""
    try:
        encoding, warnings = choose_encoding([*masks.values()], *settings)
    except EncodingError as error:
        finding = ". ".join(filter(None, [_mixture(problems.root, masks), error.finding]))
        problems.add("mask values", "all masks", finding, error.fix)
        problems.raise_any()
        raise
    problems.warnings += warnings
    return encoding


def count_classes(
    splits: list[Split],
    masks: dict[Path, MaskStats],
    encoding: Encoding,
    labels: str,
    declared: list[int],
    problems: Problems,
) -> None:
    """Fill `counts` and `empty` of each split; note values without a class and ids that may be damaged."""
    colours = encoding.as_colours
    mask_set = MaskSet(
        [*masks.values()], encoding.num_classes, encoding.ignore_index, parse_labels(labels), declared
    )
    raws = np.array([*mask_set.count(colours)])
    ids = dict(zip(raws.tolist(), encoding.lookup(raws).tolist(), strict=True))
    fix = _stray_fix(problems.root, masks, mask_set, encoding, ids) if UNKNOWN in ids.values() else ""
    snap = _snap_fix(mask_set, encoding)
    for split in splits:
        counts = []
        for pair in split.pairs:
            counted = _count_mask(pair.mask, masks[pair.mask], encoding, ids, (fix, snap), problems)
            counts.append(counted)
            if counted is not None and not any(counted):
                split.empty.append(pair.mask)
        none = [0] * encoding.num_classes
        split.counts = np.array([none if each is None else each for each in counts], np.int64)
        split.counts = split.counts.reshape(len(split.pairs), encoding.num_classes)


def _count_mask(
    mask: Path, stats: MaskStats, encoding: Encoding, ids: dict, fixes: tuple[str, str], problems: Problems
) -> list[int] | None:
    """Pixels of each class in one mask; None where it has a problem, which is noted."""
    counts, strays, colours = [0] * encoding.num_classes, Counter(), encoding.as_colours
    for raw, count in zip(stats.read_as(colours), stats.counts, strict=True):
        if ids[raw] == UNKNOWN:
            strays[raw] += count
        elif ids[raw] != encoding.ignore_index:
            counts[ids[raw]] += count
    if stats.damage and encoding.is_dense:
        finding = f"{stats.damage}, so that class ids may have changed unseen"
        problems.add("lossy masks", mask, finding, "export it again as an 8-bit PNG")
        return None
    if not strays:
        return counts
    (raws, sizes), total = np.array(strays.most_common()).T, sum(stats.counts)
    known, distance = nearest(raws, dict(encoding.table), colours)
    is_faint = (distance <= NEAR * (not encoding.is_dense)) | (sizes <= RARE * total)
    share = strays.total() / total
    if stats.damage or is_faint.sum() > MANY_STRAYS:
        near = ", ".join(raw_name(raw, colours) for raw in [*dict.fromkeys(known.tolist())][:4])
        many = f"{len(strays)} or more" if len(stats.keys) >= MOST_KEYS else len(strays)
        finding = f"{many} stray values, {share:.2%} of pixels, near {near}: JPEG or smoothing"
        problems.add("lossy masks", mask, finding, f"export as PNG without smoothing{fixes[1]}")
    else:
        finding = f"{listing(strays, colours)}, {share:.2%} of pixels"
        problems.add("values outside the classes", mask, finding, fixes[0])
    return None


def leave_out_empty(splits: list[Split], problems: Problems) -> list[str]:
    """Drop pairs whose mask is ignored everywhere from training; a split of such masks alone is a problem."""
    warnings = []
    for split in splits:
        if split.pairs and len(split.empty) == len(split.pairs):
            fix = "add masks with classes, or check ignore_index and labels"
            problems.add("nothing to learn", split.empty[0], f"all pixels of {split.name} are ignored", fix)
        elif split.empty:
            names = f"({split.empty[0].name}{', ...' * (len(split.empty) > 1)})"
            which = (
                f"{split.name}: {len(split.empty)} of {len(split.pairs)} masks are ignored everywhere {names}"
            )
            if split.name == "train":
                kept = [i for i, pair in enumerate(split.pairs) if pair.mask not in set(split.empty)]
                split.pairs, split.counts = [split.pairs[i] for i in kept], split.counts[kept]
                which += "; their pairs are left out"
            warnings.append(which)
    return warnings


def absent_classes(splits: list[Split], names: list[str]) -> list[str]:
    """A warning per split in which a class never occurs."""
    warnings = []
    for split, does in zip(splits, ("learned", "scored"), strict=True):
        absent = [names[i] for i in np.flatnonzero(split.class_pixels == 0)]
        if absent and split.class_pixels.any():
            which = f"{split.name}: no pixel of {', '.join(absent)}"
            warnings.append(f"{which}; a class that never occurs cannot be {does}")
    return warnings


def wide_range(splits: list[Split], seen: dict) -> tuple[int | None, list[str]]:
    """The value that becomes 255 in integer images above 8 bits of all splits, and a line about it."""
    images = [pair.image for split in splits for pair in split.pairs]
    wide = [seen[image]["wide"] for image in images if seen[image]["wide"] is not None]
    if not wide:
        return None, []
    bits = max(8, max(wide).bit_length())
    top = 2**bits - 1
    if top >= 65535:
        return 65535, []
    which = "all" if len(wide) == len(images) else f"{len(wide)} of {len(images)}"
    spread = f"0..{top} ({bits} bits) becomes 0..255"
    return top, [f"images: {which} hold integers above 8 bits, up to {max(wide)}; {spread}"]


def doubtful_images(splits: list[Split], seen: dict) -> list[str]:
    """Warnings of images with nothing to see, in both splits, or rotated by EXIF without a change of size."""
    train, val = ([pair.image for pair in split.pairs] for split in splits)
    return [
        *_monotone_images(train + val, seen),
        *_shared_images(train, val, seen),
        *_hidden_rotations(train + val, seen),
    ]


def _monotone_images(images: list[Path], seen: dict) -> list[str]:
    if not images:
        return []
    look = f"look at {images[0].name}; alpha, bit depth or exposure may have been lost on export"
    if all(seen[image]["constant"] for image in images):
        return [f"all {len(images)} images are constant: each shows one value everywhere; {look}"]
    shares: Counter = Counter()
    for image in images:
        value, share = seen[image]["top"]
        shares[value] += share / len(images)
    value, share = max(shares.items(), key=lambda row: row[1])
    if share > MONOTONE:
        return [f"one value ({value}) fills {share:.1%} of all images; {look}"]
    return []


def _shared_images(train: list[Path], val: list[Path], seen: dict) -> list[str]:
    content = {image: (seen[image]["stamp"][0], seen[image]["crc"]) for image in train + val}
    known = {content[image]: image for image in train}
    both = [image for image in val if content[image] in known]
    if not both:
        return []
    example = f"{known[content[both[0]]].name} is {both[0].name}"
    return [f"{len(both)} images are in train and val ({example}, ...); scores will be too good"]


def _hidden_rotations(images: list[Path], seen: dict) -> list[str]:
    rotated = [image for image in images if seen[image]["orientation"] != 1]
    hidden = [i for i in rotated if seen[i]["orientation"] < 5 or len(set(seen[i]["size"])) == 1]
    if not hidden:
        return []
    return [
        f"{len(hidden)} images carry an EXIF rotation that sizes do not show ({hidden[0].name}, ...); they "
        "are rotated as viewers show them, and their masks must be drawn that way"
    ]


def _mixture(root: Path, masks: dict[Path, MaskStats]) -> str:
    """How many masks are in colour and how many are not, and which file is odd, where there are both."""
    groups = [[path for path in masks if (masks[path].kind == "colour") == is_] for is_ in (True, False)]
    if not all(groups):
        return ""
    (colour, other), odd = map(len, groups), relative_name(root, min(groups, key=len)[0])
    return f"masks in colour: {colour}, others: {other}; look at {odd} if all should be alike"


def _stray_fix(
    root: Path, masks: dict[Path, MaskStats], mask_set: MaskSet, encoding: Encoding, ids: dict
) -> str:
    """What to do about values without a class; each setting that it names was tried on the counts."""
    colours = encoding.as_colours
    strays = {raw for raw, id_ in ids.items() if id_ == UNKNOWN}
    spoilt = [mask for mask in masks.values() if not strays.isdisjoint(mask.read_as(colours))]
    if (mixture := _mixture(root, masks)) and all(mask.kind != "colour" for mask in spoilt):  # ids, it seems
        return f"make all masks of one kind: {mixture}"
    table = {raw: None if id_ == encoding.ignore_index else id_ for raw, id_ in encoding.table}
    ways = []
    if encoding.num_classes <= 12 or len(strays) == 1:
        found = [] if encoding.ranges else stray_readings(mask_set, strays, table, colours)
        if encoding.num_classes > 12:
            found = [reading for reading in found if reading.labels is None]
        ways = [reading.flags(mask_set) for reading in found if class_shares(reading.settings(mask_set))]
    if not ways:
        return "fix it, or map every value in labels, this one as a class or ignore"
    settings = f"set {' or '.join(ways)}"
    return f"{settings}, or fix the masks" if len(spoilt) > 1 else f"fix it, or {settings}"


def _snap_fix(mask_set: MaskSet, encoding: Encoding) -> str:
    """The setting that takes stray values to the nearest declared one, where it was tried and works."""
    colours, labels = encoding.as_colours, "snap"
    if not mask_set.label_map.is_auto:
        table = {raw: None if id_ == encoding.ignore_index else id_ for raw, id_ in encoding.table}
        labels = write_labels(table, colours, snap=True)
    reading = Reading("", labels=labels)
    works = not encoding.is_dense and not encoding.ranges and len(encoding.table) <= SHOWN
    return f", or set {reading.flags(mask_set)}" if works and class_shares(reading.settings(mask_set)) else ""


def _fingerprint(root: Path, splits: list[Split], seen: dict, encoding: Encoding) -> dict[str, str]:
    """Changes with any name, content or meaning; not with the folder's path or the files' times."""
    parts = {"mask encoding": json.dumps(encoding.to_dict(), sort_keys=True)}
    for split, part in zip(splits, ("training files", "validation files"), strict=True):
        files = [file for pair in split.pairs for file in (pair.image, pair.mask)]
        lines = (
            f"{relative_name(root, file)}|{seen[file]['stamp'][0]}|{seen[file]['crc']}\n" for file in files
        )
        parts[part] = "".join(lines)
    return {part: hashlib.sha256(text.encode()).hexdigest()[:32] for part, text in parts.items()}
