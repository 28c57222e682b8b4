"""The check before training: every file is paired, opened and counted once, all problems are told.

What was learned of a file is kept by path, size and time, so that the next start only looks at what changed.
"""

import contextlib
import hashlib
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from .labels import (
    NEAR,
    RARE,
    SHOWN,
    UNKNOWN,
    Colours,
    Encoding,
    MaskStats,
    choose_encoding,
    listing,
    nearest,
    pack,
    pack_all,
    parse_labels,
    raw_name,
    write_labels,
)
from .pairing import Pair, Problems, pair_split
from .reading import load_image, load_mask
from .samples import DataError

SPLITS = ("train", "val")
VERSION = 3  # of what is remembered of a file; raise it when reading or counting changes
MANY_STRAYS = 8  # a mask with more near or rare values outside the classes is taken for a lossy one
MOST_KEYS = 512  # values remembered of one mask, or twice the classes; of more the commonest tell enough


@dataclass
class DataReport:
    """What the check found in data that can be trained on."""

    train: list[Pair]
    val: list[Pair]
    encoding: Encoding
    class_pixels: dict[str, np.ndarray]
    class_image_pixels: np.ndarray
    fingerprint: dict[str, str]  # what of the data changed when two runs differ
    warnings: list[str] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """What a user wants to see before a run: counts, sizes, encoding, class shares, imbalance."""
        lines = []
        for split, pairs in (("train", self.train), ("val", self.val)):
            sizes = sorted({(pair.height, pair.width) for pair in pairs}, key=math.prod)
            small, large = ("{} x {}".format(*size) for size in (sizes[0], sizes[-1]))
            size = small if len(sizes) == 1 else f"{len(sizes)} sizes from {small} to {large}"
            lines.append(f"{split}: {len(pairs)} pictures, {size}")
        lines.append(f"masks: {self.encoding.describe()}")
        train, val = (self.class_pixels[split] / max(1, self.class_pixels[split].sum()) for split in SPLITS)
        width = max(map(len, self.class_names))
        for name, in_train, in_val in zip(self.class_names, train, val, strict=True):
            lines.append(f"  {name:{width}}  train {in_train:7.2%}  val {in_val:7.2%}")
        rarest = np.argmin(np.where(train > 0, train, np.inf))
        if train.max() > 20 * train[rarest]:
            times = f"{train.max() / train[rarest]:.0f} times the pixels of {self.class_names[rarest]}"
            way = "loss joint or weighted_ce, or class_weights auto, help rare classes"
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
    cache_dir: str | Path | None = None,
    progress: Callable | None = None,
) -> DataReport:
    """Check root/{train,val}/{images,masks} whole.

    Args:
        root: the data folder.
        num_classes: number of classes, background included.
        ignore_index: the id of pixels that count nowhere; any int but a class id.
        class_names: one name a class, for messages.
        class_colors: one (r, g, b) a class, or None; what colours in masks mean.
        in_channels: channels that pictures must be convertible to.
        labels: the setting, see `labels.parse_labels`.
        mask_suffix: what a mask's stem has after its picture's: '_mask' for a.jpg and a_mask.png.
        cache_dir: folder to remember results in; None to remember nothing.
        progress: callable (iterable, total, description) → iterable, for a bar.

    Raises:
        DataError: the data cannot be trained on; the message lists every problem with its remedy.
        ValueError: a setting is not understood.
    """
    wanted = parse_labels(labels)
    root = Path(os.path.expanduser(root))
    if not root.is_dir():
        raise DataError(f"data_root {root} is not a folder. Give the folder that holds train/ and val/.")
    problems, warnings = Problems(root), []
    pairs = {split: pair_split(root / split, mask_suffix, problems, warnings) for split in SPLITS}
    declared = [raw for raw, _ in wanted.table if wanted.colours] + pack_all(class_colors)
    snap_to = sorted(set(declared)) if wanted.snap else []
    how = (in_channels, snap_to, max(MOST_KEYS, 2 * num_classes))  # files are looked at
    setup = hashlib.sha256(json.dumps([VERSION, str(root.resolve()), *how]).encode())
    memory = Path(cache_dir, f"check-{setup.hexdigest()[:16]}.json") if cache_dir else None
    files = [file for split in SPLITS for pair in pairs[split] for file in pair]
    found = _look_at(files, memory, how, progress)
    matched = {split: [_match(*pair, found, problems) for pair in pairs[split]] for split in SPLITS}
    good = {split: [pair for pair in matched[split] if pair] for split in SPLITS}
    masks = {pair.mask: MaskStats(**found[pair.mask]["stats"]) for split in SPLITS for pair in good[split]}
    if not masks:
        problems.raise_any()
    try:
        encoding, doubts = choose_encoding([*masks.values()], num_classes, ignore_index, labels, class_colors)
    except ValueError as error:
        finding = ". ".join(filter(None, [_mixture(masks), str(error)]))
        remedy = "correct the setting named, or set labels to that map, each value with its class"
        problems.add("mask values", root, finding, remedy)
        problems.raise_any()
    raws = np.array(list({raw for mask in masks.values() for raw in mask.read_as(encoding.as_colours)}))
    ids = dict(zip(raws.tolist(), encoding.lookup(raws).tolist(), strict=True))
    remedy = _remedy(masks, encoding, ids) if UNKNOWN in ids.values() else ""
    each = {mask: _count_classes(mask, masks[mask], encoding, ids, remedy, problems) for mask in masks}
    counts = {split: np.array([each[pair.mask] for pair in good[split]]) for split in SPLITS}
    problems.raise_any()
    if memory and not memory.exists():
        _remember(memory, found)
    class_names = list(class_names or (f"class {i}" for i in range(num_classes)))
    for split, does in zip(SPLITS, ("learned", "scored"), strict=True):
        absent = [class_names[i] for i in np.flatnonzero(counts[split].sum(0) == 0)]
        if absent:
            doubts.append(f"{split}: no pixel of {', '.join(absent)}; what never occurs cannot be {does}")
    in_train = counts["train"]
    return DataReport(
        *good.values(),
        encoding=encoding,
        class_pixels={split: counts[split].sum(0) for split in SPLITS},
        class_image_pixels=((in_train > 0) * in_train.sum(1, keepdims=True)).sum(0),
        fingerprint=_fingerprint(good, found, encoding),
        warnings=warnings + doubts + _doubtful_pictures(good, found),
        class_names=class_names,
    )


def _look_at(
    files: list[Path], memory: Path | None, how: tuple[int, list[int], int], progress: Callable | None
) -> dict[Path, dict]:
    """What there is to know of each file, from memory where size and time are as they were."""
    stamps = {file: _stamp(file) for file in files}
    known = _recall(memory)
    found = {file: known.get(_name(file), {}) for file in files}
    todo = [file for file in files if found[file].get("stamp") != stamps[file]]

    def look(file: Path) -> tuple[Path, dict]:
        return file, {"stamp": stamps[file], **_scan(file, *how)}

    if todo:
        with ThreadPool() as pool:
            results = pool.imap(look, todo)
            found.update(progress(results, len(todo), "checking data") if progress else results)
        if memory and memory.parent.exists():  # data that is refused makes no folder
            _remember(memory, found)
    return found


def _name(file: Path) -> str:
    """By which a file is known wherever the data lies: train/images/0.jpg."""
    return "/".join(file.parts[-3:])


def _stamp(file: Path) -> list[int]:
    status = file.stat() if file.exists() else file.lstat()  # a link that leads nowhere
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]  # the last shows a new name, where it can


def _recall(memory: Path | None) -> dict[str, dict]:
    """What was remembered; nothing where the file is missing or broken: then it is learned anew."""
    try:
        known = json.loads(memory.read_text(encoding="utf-8")) if memory else {}
        return {name: seen for name, seen in known.items() if "stamp" in seen}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(memory: Path, found: dict[Path, dict]) -> None:
    """Half a file is as good as none; without room or right to write, the next start only takes longer."""
    entries = {_name(file): seen for file, seen in found.items() if "error" not in seen}
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps(entries, separators=(",", ":")), encoding="utf-8")


def _scan(file: Path, in_channels: int, snap_to: list[int], most: int) -> dict:
    """What is worth knowing of a file, in plain values, or what is wrong with it."""
    try:
        data = file.read_bytes()
        seen = {"crc": zlib.crc32(data)}
        if file.parent.name == "masks":
            size, seen["stats"] = _count_mask(file, data, snap_to, most)
        else:
            _, size, seen["orientation"] = load_image(file, in_channels, lambda _: (1, 1), data)
        return {"size": list(size), **seen}
    except DataError as error:
        return {"error": str(error).removeprefix(f"{file}: ")}
    except OSError as error:
        return {"error": f"cannot be read ({error.strerror})"}


def _count_mask(file: Path, data: bytes, snap_to: list[int], most: int) -> tuple[tuple[int, int], dict]:
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
    if kind == "colour" and snap_to:  # of a JPEG's thousands of colours remember what they will become
        rare = counts <= RARE * raw.size
        keys[rare] = nearest(keys[rare], snap_to, colours=True)[0]
        keys, inverse = np.unique(keys, return_inverse=True)
        counts = np.bincount(inverse, counts).astype(np.int64)
    if len(keys) > most:
        common = np.sort(np.argsort(-counts, kind="stable")[:most])
        keys, counts = keys[common], counts[common]
    keys = keys.tolist()
    colours = palette and [palette[key] if key < len(palette) else 0 for key in keys]
    return raw.shape, dict(kind=kind, keys=keys, counts=counts.tolist(), colours=colours, damage=damage)


def _match(image: Path, mask: Path, found: dict, problems: Problems) -> Pair | None:
    """The pair, if both files are readable and of one size; what is wrong is noted."""
    broken = [file for file in (image, mask) if "error" in found[file]]
    for file in broken:
        problems.add("unreadable", file, found[file]["error"], "mend or remove it with its pair")
    if broken:
        return None
    size, other = found[image]["size"], found[mask]["size"]
    if size == other:
        return Pair(image, mask, *size, stamp=(*found[image]["stamp"], *found[mask]["stamp"]))
    finding, remedy = "mask {} x {}, picture {} x {}".format(*other, *size), "make them one size"
    if size == other[::-1]:
        by_tag = found[image]["orientation"] >= 5
        finding += ", which its EXIF tag turned" if by_tag else ": one of them is turned"
        remedy = "turn the mask as viewers show the picture" if by_tag else "turn one of them"
    problems.add("sizes differ", mask, finding, remedy)
    return None


def _mixture(masks: dict[Path, MaskStats]) -> str:
    """How many masks are in colour and how many are not, and which file to look at, where there are both."""
    groups = [[path for path in masks if (masks[path].kind == "colour") == is_] for is_ in (True, False)]
    if not all(groups):
        return ""
    (colour, other), odd = map(len, groups), _name(min(groups, key=len)[0])
    return f"masks in colour: {colour}, others: {other}; look at {odd} if all should be alike"


def _remedy(masks: dict[Path, MaskStats], encoding: Encoding, ids: dict) -> str:
    """What to do about the values that have no class; a setting that it names works as written."""
    strays, ways = {raw for raw, id_ in ids.items() if id_ == UNKNOWN}, []
    spoilt = [mask for mask in masks.values() if not strays.isdisjoint(mask.read_as(encoding.as_colours))]
    if (mixture := _mixture(masks)) and all(mask.kind != "colour" for mask in spoilt):  # ids, it seems
        return f"make all masks of one kind: {mixture}"
    if encoding.kind in ("indices", "palette") and len(strays) == 1 and encoding.ignore_index not in ids:
        ways.append(f"ignore_index {min(strays)}")
    if encoding.num_classes <= 12 and len(strays) <= SHOWN and UNKNOWN not in strays:
        ignored = {raw: None for raw, id_ in ids.items() if id_ in (UNKNOWN, encoding.ignore_index)}
        table = {raw: id_ for raw, id_ in encoding.table if id_ != encoding.ignore_index} | ignored
        ways.append(f"labels '{write_labels(table, encoding.as_colours)}'")
    if not ways:
        return "mend it, or map every value in labels, this one as a class or ignore"
    settings = f"set {' or '.join(ways)}"
    return f"{settings}, or mend the masks" if len(spoilt) > 1 else f"mend it, or {settings}"


def _count_classes(
    mask: Path, stats: MaskStats, encoding: Encoding, ids: dict, remedy: str, problems: Problems
) -> list[int]:
    """Pixels of each class in one mask; what has no class, or nothing but ignored pixels, is a problem."""
    counts, strays, colours = [0] * encoding.num_classes, Counter(), encoding.as_colours
    for raw, count in zip(stats.read_as(colours), stats.counts, strict=True):
        if ids[raw] == UNKNOWN:
            strays[raw] += count
        elif ids[raw] != encoding.ignore_index:
            counts[ids[raw]] += count
    if stats.damage and encoding.is_dense:
        finding = f"{stats.damage}, so that class ids may have changed unseen"
        problems.add("lossy masks", mask, finding, "export it again as an 8-bit PNG")
    elif strays:
        (raws, sizes), total = np.array(strays.most_common()).T, sum(stats.counts)
        known, distance = nearest(raws, dict(encoding.table), colours)
        is_faint = (distance <= NEAR * (not encoding.is_dense)) | (sizes <= RARE * total)
        share = strays.total() / total
        if stats.damage or is_faint.sum() > MANY_STRAYS:
            near = ", ".join(raw_name(raw, colours) for raw in [*dict.fromkeys(known.tolist())][:4])
            many = f"{len(strays)} or more" if len(stats.keys) >= MOST_KEYS else len(strays)
            finding = f"{many} stray values, {share:.2%} of pixels, near {near}: JPEG or smoothing"
            snap = "" if encoding.is_dense else ", or set labels to snap ('snap:' before a map)"
            remedy = f"export as PNG without smoothing{snap}"
            problems.add("lossy masks", mask, finding, remedy)
        else:
            finding = f"{listing(strays, colours)}, {share:.2%} of pixels"
            problems.add("values outside the classes", mask, finding, remedy)
    elif not any(counts):
        remedy = "remove the pair, or check ignore_index"
        problems.add("nothing to learn", mask, "all pixels are ignored", remedy)
    return counts


def _doubtful_pictures(good: dict, found: dict) -> list[str]:
    """Warnings of pictures in both splits, and of those that EXIF turns without a change of size."""
    warnings = []
    train, val = ([pair.image for pair in good[split]] for split in SPLITS)
    content = {image: (found[image]["stamp"][0], found[image]["crc"]) for image in train + val}
    known = {content[image]: image for image in train}
    both = [f"{_name(known[content[image]])} is {_name(image)}" for image in val if content[image] in known]
    if both:
        warnings.append(f"{len(both)} pictures are in train and val ({both[0]} ...); scores will be too good")
    turned = [image for image in train + val if found[image]["orientation"] != 1]
    hidden = [i for i in turned if found[i]["orientation"] < 5 or len(set(found[i]["size"])) == 1]
    if hidden:
        warnings.append(
            f"{len(hidden)} pictures carry an EXIF rotation that sizes do not show ({hidden[0].name}, ...); "
            "they are turned as viewers show them, and their masks must be drawn so"
        )
    return warnings


def _fingerprint(good: dict, found: dict, encoding: Encoding) -> dict[str, str]:
    """Changes with any name, content or meaning; not with the folder's place or the files' times."""
    parts = {"mask encoding": json.dumps(encoding.to_dict(), sort_keys=True)}
    for split, part in zip(SPLITS, ("training files", "validation files"), strict=True):
        files = [file for pair in good[split] for file in (pair.image, pair.mask)]
        lines = (f"{_name(file)}|{found[file]['stamp'][0]}|{found[file]['crc']}\n" for file in files)
        parts[part] = "".join(lines)
    return {part: hashlib.sha256(text.encode()).hexdigest()[:32] for part, text in parts.items()}
