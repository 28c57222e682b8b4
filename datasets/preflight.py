"""The check before training: every file is paired, opened and counted once, all problems are told.

What was learned of a file is kept by path, size and time, so that the next start only looks at what changed.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .labels import (
    RARE,
    UNKNOWN,
    Encoding,
    LabelMap,
    MaskStats,
    choose_encoding,
    pack,
    pack_one,
    parse_labels,
    raw_name,
)
from .pairing import Pair, Problems, pair_split
from .reading import DataError, load_image, load_mask

SPLITS = ("train", "val")
VERSION = 1  # of what is remembered of a file; raise it when reading or counting changes
MANY_STRAYS = 8  # a mask with more values outside the classes is taken for a lossy one
MOST_KEYS = 4096  # raw values remembered of one mask; one with more is lossy, and the commonest tell enough


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
        for split in SPLITS:
            pairs = getattr(self, split)
            sizes = Counter((pair.height, pair.width) for pair in pairs)
            (height, width), _ = sizes.most_common(1)[0]
            if len(sizes) == 1:
                size = f"{height} x {width}"
            else:
                small, large = min(sizes, key=lambda s: s[0] * s[1]), max(sizes, key=lambda s: s[0] * s[1])
                size = f"{len(sizes)} sizes from {small[0]} x {small[1]} to {large[0]} x {large[1]}"
            lines.append(f"{split}: {len(pairs)} pictures, {size}")
        lines.append(f"masks: {self.encoding.describe()}")
        shares = {
            split: self.class_pixels[split] / max(1, self.class_pixels[split].sum()) for split in SPLITS
        }
        width = max(len(name) for name in self.class_names)
        for i, name in enumerate(self.class_names):
            lines.append(f"  {name:{width}}  train {shares['train'][i]:7.2%}  val {shares['val'][i]:7.2%}")
        present = shares["train"][shares["train"] > 0]
        if len(present) > 1 and present.max() > 20 * present.min():
            rare = self.class_names[int(np.argmin(np.where(shares["train"] > 0, shares["train"], 2)))]
            times = f"{present.max() / present.min():.0f} times"
            lines.append(
                f"hint: the commonest class has {times} the pixels of {rare}; loss joint or weighted_ce, or "
                "class_weights auto, help rare classes"
            )
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def check_data(
    root,
    *,
    num_classes: int,
    ignore_index: int = 255,
    class_names=None,
    class_colors=None,
    in_channels: int = 3,
    labels="auto",
    mask_suffix: str = "",
    num_workers: int | None = None,
    cache_dir=None,
    progress=None,
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
        num_workers: threads; None for one a core.
        cache_dir: folder to remember results in; None to remember nothing.
        progress: callable (iterable, total, description) → iterable, for a bar.

    Raises:
        DataError: the data cannot be trained on; the message lists every problem with its remedy.
        ValueError: a setting is not understood.
    """
    wanted = parse_labels(labels)
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"data_root {root} is not a folder. Give the folder that holds train/ and val/.")
    problems, warnings = Problems(root), []
    pairs = {split: pair_split(root / split, mask_suffix, problems, warnings) for split in SPLITS}
    snap_to = _snap_colours(wanted, class_colors)
    memory = _memory_of(root, in_channels, snap_to, cache_dir)
    found = _scan_all(pairs, memory, in_channels, snap_to, num_workers, progress)
    good = {split: _check_pairs(pairs[split], found, problems) for split in SPLITS}
    stats = {mask: _stats(found[mask]) for split in SPLITS for _, mask in good[split]}
    if not stats:
        problems.raise_any()
    try:
        encoding, more = choose_encoding(
            list(stats.values()), num_classes, ignore_index, wanted, class_colors
        )
    except ValueError as error:
        problems.add("mask values", root, str(error), "as said")
        problems.raise_any()
    names = list(class_names) if class_names else [f"class {i}" for i in range(num_classes)]
    totals, image_pixels = {}, np.zeros(num_classes, np.int64)
    for split in SPLITS:
        counts = [_count_classes(mask, stats[mask], encoding, problems) for _, mask in good[split]]
        totals[split] = np.sum(counts, axis=0) if counts else np.zeros(num_classes, np.int64)
        if split == "train":
            image_pixels = sum((np.where(count > 0, count.sum(), 0) for count in counts), image_pixels)
    problems.raise_any()
    if memory and not memory.exists():
        _remember(memory, pairs, found)
    for split, does in zip(SPLITS, ("learned", "scored"), strict=True):
        absent = [names[i] for i in np.flatnonzero(totals[split] == 0)]
        if absent:
            more.append(f"{split}: no pixel of {', '.join(absent)}; what never occurs cannot be {does}")
    return DataReport(
        *([_pair(image, mask, found) for image, mask in good[split]] for split in SPLITS),
        encoding=encoding,
        class_pixels=totals,
        class_image_pixels=image_pixels,
        fingerprint=_fingerprint(good, found, encoding),
        warnings=warnings + more + _leaks(root, good, found) + _hidden_turns(good, found),
        class_names=names,
    )


def _snap_colours(wanted: LabelMap, class_colors) -> list[int]:
    """The declared colours, when lossy colour masks are to be snapped."""
    declared = [raw for raw, _ in wanted.table] if wanted.colours else []
    return declared + [pack_one(colour) for colour in class_colors or []] if wanted.snap else []


def _memory_of(root: Path, in_channels: int, snap_to, cache_dir) -> Path | None:
    """The file that keeps what was found: one for each folder and way of reading it."""
    setup = json.dumps([VERSION, str(root.resolve()), in_channels, snap_to])
    name = f"check-{hashlib.sha256(setup.encode()).hexdigest()[:16]}.json"
    return Path(cache_dir) / name if cache_dir else None


def _scan_all(pairs, memory: Path | None, in_channels, snap_to, num_workers, progress) -> dict[Path, dict]:
    """What there is to know of each file, from memory where size and time are as they were."""
    masks = {mask for split in SPLITS for _, mask in pairs[split]}
    names = {file: name for split in SPLITS for file, name in _named(split, pairs[split])}
    files = list(names)
    stamps = {file: _stamp(file) for file in files}
    known = _recall(memory)
    found = {}
    for file, name in names.items():
        if name in known and known[name]["stamp"] == stamps[file]:
            found[file] = known[name]
    todo = [file for file in files if file not in found]

    def scan(file: Path) -> tuple[Path, dict]:
        try:
            seen = _scan_mask(file, snap_to) if file in masks else _scan_image(file, in_channels)
        except DataError as error:
            seen = {"error": str(error).removeprefix(f"{file}: ")}
        except OSError as error:
            seen = {"error": f"cannot be read ({error.strerror})"}
        return file, {"stamp": stamps[file], **seen}

    if todo:
        with ThreadPoolExecutor(num_workers or _cores()) as pool:
            results = _bounded_map(pool, scan, todo)
            found.update(progress(results, len(todo), "checking data") if progress else results)
        if memory and memory.parent.exists():  # data that is refused makes no folder
            _remember(memory, pairs, found)
    return found


def _named(split: str, pairs: list[tuple[Path, Path]]):
    """Every file with its name below the root, which is the same wherever that lies."""
    for image, mask in pairs:
        yield image, f"{split}/images/{image.name}"
        yield mask, f"{split}/masks/{mask.name}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bounded_map(pool: ThreadPoolExecutor, function, items: list, ahead: int = 64):
    """Results in order, with no more than `ahead` jobs under way, whatever the list's length."""
    jobs, items = [], iter(items)
    for item in items:
        jobs.append(pool.submit(function, item))
        if len(jobs) >= ahead:
            yield jobs.pop(0).result()
    for job in jobs:
        yield job.result()


def _stamp(file: Path) -> list[int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _recall(memory: Path | None) -> dict:
    """What was remembered; nothing where the file is missing or broken: then it is learned anew."""
    try:
        known = json.loads(memory.read_text(encoding="utf-8")) if memory else {}
    except (OSError, ValueError):
        return {}
    return (
        known
        if isinstance(known, dict) and all(isinstance(v, dict) and "stamp" in v for v in known.values())
        else {}
    )


def _remember(memory: Path, pairs, found: dict[Path, dict]) -> None:
    """Write aside, then rename; without room or right to write, the next start only takes longer."""
    names = {file: name for split in SPLITS for file, name in _named(split, pairs[split])}
    entries = {names[file]: entry for file, entry in found.items() if "error" not in entry}
    aside = memory.with_name(f".{memory.name}.{os.getpid()}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(entries, separators=(",", ":")), encoding="utf-8")
        os.replace(aside, memory)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()


def _scan_image(file: Path, in_channels: int) -> dict:
    data = file.read_bytes()
    _, (height, width), orientation = load_image(file, in_channels, reduce_to=(1, 1), data=data)
    return {"crc": zlib.crc32(data), "height": height, "width": width, "orientation": orientation}


def _scan_mask(file: Path, snap_to: list[int]) -> dict:
    data = file.read_bytes()
    raw, palette, lossy = load_mask(file, data=data)
    kind = "palette" if palette is not None else "grey" if raw.ndim == 2 else "colour"
    if kind == "colour" and (raw == raw[..., :1]).all():
        kind = "grey_rgb"
        keys, counts = _count(raw[..., 0])
        keys = keys * 0x010101
    else:
        keys, counts = _count(pack(raw) if raw.ndim == 3 else raw)
    if len(keys) > MOST_KEYS and kind == "colour" and snap_to:
        table = tuple((colour, i) for i, colour in enumerate(sorted(set(snap_to))))
        nearest = Encoding("colours", len(table), -1, table, snap=True)
        rare = counts <= RARE * raw[..., 0].size
        keys[rare] = np.array([colour for colour, _ in table])[nearest.lookup(keys[rare])]
        keys, inverse = np.unique(keys, return_inverse=True)
        counts = np.bincount(inverse, counts).astype(np.int64)
    if len(keys) > MOST_KEYS:
        common = np.sort(np.argsort(-counts, kind="stable")[:MOST_KEYS])
        keys, counts = keys[common], counts[common]
    seen = {
        "crc": zlib.crc32(data),
        "height": raw.shape[0],
        "width": raw.shape[1],
        "kind": kind,
        "lossy": lossy,
    }
    seen |= {"keys": keys.tolist(), "counts": counts.tolist()}
    if palette is not None:
        seen["colours"] = [palette[key] if key < len(palette) else 0 for key in seen["keys"]]
    return seen


def _count(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and how often each occurs."""
    if values.dtype == np.uint8:
        counts = np.bincount(values.ravel(), minlength=256)
        keys = np.flatnonzero(counts)
        return keys, counts[keys]
    return np.unique(values, return_counts=True)


def _stats(seen: dict) -> MaskStats:
    return MaskStats(seen["kind"], seen["keys"], seen["counts"], seen.get("colours"), seen["lossy"])


def _check_pairs(pairs: list, found: dict, problems: Problems) -> list[tuple[Path, Path]]:
    """The pairs whose files are readable and of one size."""
    good = []
    for image, mask in pairs:
        broken = [file for file in (image, mask) if "error" in found[file]]
        for file in broken:
            problems.add("unreadable", file, found[file]["error"], "mend or remove it with its pair")
        if broken:
            continue
        size, other = ((found[file]["height"], found[file]["width"]) for file in (image, mask))
        if size == other:
            good.append((image, mask))
            continue
        finding, remedy = f"mask {other[0]} x {other[1]}, picture {size[0]} x {size[1]}", "make them one size"
        if size == other[::-1]:
            by_tag = found[image]["orientation"] >= 5
            finding += ", which its EXIF tag turned" if by_tag else ": one of them is turned"
            remedy = "turn the mask as viewers show the picture" if by_tag else "turn one of them"
        problems.add("sizes differ", mask, finding, remedy)
    return good


def _count_classes(mask: Path, seen: MaskStats, encoding: Encoding, problems: Problems) -> np.ndarray:
    """Pixels of each class in one mask; what has no class, or nothing but ignored pixels, is a problem."""
    counts = np.zeros(encoding.num_classes, np.int64)
    keys, pixels = np.array(seen.read_as(encoding.as_colours), np.int64), np.array(seen.counts, np.int64)
    positions = encoding.lookup(keys)
    unknown = positions == UNKNOWN
    if seen.lossy and encoding.kind == "indices":  # ids lie too close together for damage to be seen
        problems.add(
            "lossy masks", mask, "is a JPEG, which alters class ids unseen", "export it again as PNG"
        )
    elif unknown.any():
        _explain_strays(mask, keys[unknown], pixels[unknown], pixels.sum(), seen.lossy, encoding, problems)
    else:
        ids = np.array([id_ for _, id_ in encoding.table])[positions]
        valid = ids != encoding.ignore_index
        np.add.at(counts, ids[valid], pixels[valid])
        if not counts.any():
            problems.add(
                "nothing to learn", mask, "all pixels are ignored", "remove the pair, or check ignore_index"
            )
    return counts


def _explain_strays(
    mask: Path, strays, pixels, total, lossy: bool, encoding: Encoding, problems: Problems
) -> None:
    """Values outside the classes: a class that nobody named, or the traces of JPEG and smoothing."""
    order = np.argsort(-pixels, kind="stable")
    strays, pixels, share = strays[order].tolist(), pixels[order], f"{pixels.sum() / total:.2%} of pixels"
    if lossy or len(strays) > MANY_STRAYS:
        near = dict.fromkeys(raw_name(encoding.nearest(raw), encoding.as_colours) for raw in strays[:64])
        finding = f"{len(strays)} stray values, {share}, near {', '.join([*near][:4])}: JPEG or smoothing"
        problems.add("lossy masks", mask, finding, "export as PNG without smoothing, or set labels to snap")
        return
    finding = f"{encoding.name_strays(list(zip(strays, pixels, strict=True)))}, {share}"
    remedy = f"mend it, or name it in labels ('{raw_name(strays[0], encoding.as_colours)}=ignore')"
    problems.add("values outside the classes", mask, finding, remedy)


def _leaks(root: Path, good: dict, found: dict) -> list[str]:
    """Pictures that are in both splits, by content."""
    identity = {(found[image]["stamp"][0], found[image]["crc"]): image for image, _ in good["train"]}
    both = [
        (identity[key], image)
        for image, _ in good["val"]
        if (key := (found[image]["stamp"][0], found[image]["crc"])) in identity
    ]
    if not both:
        return []
    first, second = (path.relative_to(root) for path in both[0])
    return [f"{len(both)} pictures are in train and val ({first} is {second}, ...); scores will be too good"]


def _hidden_turns(good: dict, found: dict) -> list[str]:
    """Pictures that EXIF turns without a change of size, so that a mask drawn the other way goes unseen."""
    turned = [image for split in SPLITS for image, _ in good[split] if found[image]["orientation"] != 1]
    seen = {image: found[image] for image in turned}
    hidden = [image for image, it in seen.items() if it["orientation"] < 5 or it["height"] == it["width"]]
    if not hidden:
        return []
    return [
        f"{len(hidden)} pictures carry an EXIF rotation that sizes do not show ({hidden[0].name}, ...); they "
        "are turned as viewers show them, and their masks must be drawn so"
    ]


def _pair(image: Path, mask: Path, found: dict) -> Pair:
    stamp = (*found[image]["stamp"], *found[mask]["stamp"])
    return Pair(image, mask, found[image]["height"], found[image]["width"], stamp)


def _fingerprint(good: dict, found: dict, encoding: Encoding) -> dict[str, str]:
    """Changes with any name, content or meaning; not with the folder's place or the files' times."""
    parts = {"mask encoding": hashlib.sha256(json.dumps(encoding.to_dict(), sort_keys=True).encode())}
    for split, part in zip(SPLITS, ("training files", "validation files"), strict=True):
        parts[part] = hashlib.sha256()
        for file, name in _named(split, good[split]):
            parts[part].update(f"{name}|{found[file]['stamp'][0]}|{found[file]['crc']}\n".encode())
    return {part: digest.hexdigest()[:32] for part, digest in parts.items()}
