"""The check before training: every file is paired, opened and counted once, all problems are told.

What was learned of a file is kept by path, size and time, so that the next start only looks at what changed.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections import Counter, defaultdict
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
from .reading import SUFFIXES, DataError, is_hidden, list_pictures, load_image, load_mask

SPLITS = ("train", "val")
VERSION = 1  # of what is remembered of a file; raise it when reading or counting changes
SHOWN = 5  # problems of one kind that are listed; the rest are counted
MANY_STRAYS = 8  # a mask with more values outside the classes is taken for a lossy one
MOST_KEYS = (
    4096  # raw values remembered of one mask; a mask with more is lossy, and then the commonest tell enough
)


@dataclass(frozen=True)
class Pair:
    """One picture and its mask; `height` and `width` of the picture, EXIF applied."""

    image: Path
    mask: Path
    height: int
    width: int
    stamp: tuple = ()  # (size, mtime_ns) of both files: what a cached sample is known by


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


class Problems:
    """Everything wrong, in the order found, grouped by kind."""

    def __init__(self):
        self.rows: dict[str, list[tuple[str, str, str]]] = defaultdict(list)

    def add(self, kind: str, file, finding: str, remedy: str) -> None:
        """Note one problem."""
        self.rows[kind].append((str(file), finding, remedy))

    def raise_any(self, root: Path) -> None:
        """Raise one DataError that lists all; do nothing where there are none."""
        if not self.rows:
            return
        count = sum(map(len, self.rows.values()))
        lines = [f"{root}: {count} problem{'s' if count > 1 else ''} found; nothing was trained or written."]
        for kind, rows in self.rows.items():
            lines.append(f"{kind} ({len(rows)}):")
            shown = rows[:SHOWN]
            wide = [min(60, max(len(row[i]) for row in shown)) for i in (0, 1)]
            lines += [
                f"  {file:{wide[0]}} | {finding:{wide[1]}} | {remedy}" for file, finding, remedy in shown
            ]
            if len(rows) > SHOWN:
                lines.append(f"  ... and {len(rows) - SHOWN} more of this kind")
        raise DataError("\n".join(lines))


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
    problems, warnings = Problems(), []
    pairs = {split: _pair_split(root, split, mask_suffix, problems, warnings) for split in SPLITS}
    files = [
        file for split in SPLITS for pair in pairs[split] for file in pair
    ]  # picture, mask, picture, ...
    snap_to = _snap_colours(wanted, class_colors)
    found = _scan_all(files, root, in_channels, snap_to, num_workers, cache_dir, progress)
    good = {split: _check_pairs(root, pairs[split], found, problems) for split in SPLITS}
    stats = {mask: _stats(found[mask]) for split in SPLITS for _, mask in good[split]}
    if not stats:
        problems.raise_any(root)
    try:
        encoding, more = choose_encoding(
            list(stats.values()), num_classes, ignore_index, wanted, class_colors
        )
    except ValueError as error:
        problems.add("mask values", root, str(error), "see there")
        problems.raise_any(root)
    warnings += more
    names = list(class_names) if class_names else [f"class {i}" for i in range(num_classes)]
    totals, image_pixels = {}, np.zeros(num_classes, np.int64)
    _check_lossy(root, stats, encoding, problems)
    for split in SPLITS:
        totals[split] = np.zeros(num_classes, np.int64)
        for _, mask in good[split]:
            counts = _count_classes(root, mask, stats[mask], encoding, problems)
            totals[split] += counts
            if split == "train":
                image_pixels += np.where(counts > 0, counts.sum(), 0)
    problems.raise_any(root)
    for split in SPLITS:
        absent = [names[i] for i in np.flatnonzero(totals[split] == 0)]
        if absent:
            does = "cannot be learned" if split == "train" else "cannot be scored"
            warnings.append(f"{split}: no pixel of {', '.join(absent)}; what never occurs {does}")
    warnings += _leaks(root, good, found) + _rotation_warning(good, found)
    report_pairs = {split: [_pair(image, mask, found) for image, mask in good[split]] for split in SPLITS}
    return DataReport(
        train=report_pairs["train"],
        val=report_pairs["val"],
        encoding=encoding,
        class_pixels=totals,
        class_image_pixels=image_pixels,
        fingerprint=_fingerprint(root, good, found, encoding),
        warnings=warnings,
        class_names=names,
    )


def pair_truth(images: list[Path], truth_folder, mask_suffix: str, encoding: Encoding) -> list[Path]:
    """The mask of each picture in `truth_folder`, by stem, for scoring predictions.

    Raises:
        FileNotFoundError: no such folder.
        DataError: pictures without a mask, or with two, or a mask that is unreadable or not of `encoding`;
            lists all.
    """
    folder, problems = Path(truth_folder).expanduser(), Problems()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder. Give truth the folder of masks.")
    masks = _by_stem(folder, list_pictures(folder), problems, "two masks of one picture")
    for image in images:
        if image.stem + mask_suffix not in masks:
            problems.add(
                "no mask", image, f"no {image.stem}{mask_suffix}.* in {folder}", "add it, or leave truth out"
            )
    problems.raise_any(folder)
    chosen = [masks[image.stem + mask_suffix] for image in images]
    for mask in chosen:
        try:
            encoding.encode(load_mask(mask, encoding.as_colours)[0])
        except ValueError as error:
            problems.add(
                "mask", mask, str(error).removeprefix(f"{mask}: "), "score masks of the training's encoding"
            )
    problems.raise_any(folder)
    return chosen


def _pair_split(root: Path, split: str, mask_suffix: str, problems: Problems, warnings: list) -> list[tuple]:
    """Pictures and masks of one split, paired by stem."""
    folders = [root / split / "images", root / split / "masks"]
    missing = [folder for folder in folders if not folder.is_dir()]
    for folder in missing:
        problems.add(
            "no such folder", folder, "is not a folder", "the layout is data_root/{train,val}/{images,masks}"
        )
    if missing:
        return []
    listed = [list_pictures(folder) for folder in folders]
    for folder, files in zip(folders, listed, strict=True):
        others = [
            path.name
            for path in folder.iterdir()
            if not is_hidden(path) and path.suffix.lower() not in SUFFIXES
        ]
        if others:
            some = ", ".join(sorted(others)[:3])
            warnings.append(f"{folder}: {len(others)} entries are no pictures and are left out ({some})")
        if not files:
            problems.add("empty", folder, "holds no picture", f"put {' '.join(SUFFIXES)} files there")
    images = _by_stem(root, listed[0], problems, "two pictures of one name")
    masks = _by_stem(root, listed[1], problems, "two masks of one name")
    wanted = {stem + mask_suffix: path for stem, path in images.items()}
    for stem in [stem for stem in wanted if stem not in masks]:
        name = wanted[stem].relative_to(root)
        problems.add("no mask", name, f"no {split}/masks/{stem}.*", "add the mask, or remove the picture")
    for stem in [stem for stem in masks if stem not in wanted]:
        hint = f"no {split}/images/{stem.removesuffix(mask_suffix) if mask_suffix else stem}.*"
        lone = next((image for image in images if stem.startswith(image) and stem != image), None)
        remedy = (
            f"set mask_suffix to '{stem.removeprefix(lone)}'"
            if lone
            else "add the picture, or remove the mask"
        )
        problems.add("no picture", masks[stem].relative_to(root), hint, remedy)
    return [(wanted[stem], masks[stem]) for stem in wanted if stem in masks]


def _by_stem(root: Path, files: list[Path], problems: Problems, kind: str) -> dict[str, Path]:
    """Files by stem; a second file of a stem is a problem, not a choice."""
    stems: dict[str, Path] = {}
    for path in files:
        if path.stem in stems:
            problems.add(
                kind, path.relative_to(root), f"{stems[path.stem].name} has the same stem", "keep one of them"
            )
        else:
            stems[path.stem] = path
    return stems


def _snap_colours(wanted: LabelMap, class_colors) -> list[int]:
    """The declared colours, when lossy colour masks are to be snapped."""
    declared = [raw for raw, _ in wanted.table] if wanted.colours else []
    return declared + [pack_one(colour) for colour in class_colors or []] if wanted.snap else []


def _scan_all(files, root, in_channels, snap_to, num_workers, cache_dir, progress) -> dict:
    """What there is to know of each file, from memory where size and time are as they were."""
    setup = json.dumps([VERSION, str(root.resolve()), in_channels, snap_to])
    memory = (
        Path(cache_dir) / f"check-{hashlib.sha256(setup.encode()).hexdigest()[:16]}.json"
        if cache_dir
        else None
    )
    known = _recall(memory)
    stamps = {file: _stamp(file) for file in files}
    names = {file: os.path.relpath(file, root) for file in files}
    found = {}
    for file in files:
        entry = known.get(names[file])
        if entry and stamps[file] and entry["stamp"] == stamps[file]:
            found[file] = entry
    todo = [file for file in files if file not in found]
    masks = {file for i, file in enumerate(files) if i % 2}

    def scan(file):
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
            for file, entry in progress(results, len(todo), "checking data") if progress else results:
                found[file] = entry
        _remember(memory, {names[file]: entry for file, entry in found.items() if "error" not in entry})
    return found


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


def _remember(memory: Path | None, entries: dict) -> None:
    """Write aside, then rename; without room or right to write, the next start only takes longer."""
    if memory is None:
        return
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


def _check_pairs(root: Path, pairs, found: dict, problems: Problems) -> list[tuple]:
    """The pairs whose files are readable and of one size."""
    good = []
    for image, mask in pairs:
        broken = [file for file in (image, mask) if "error" in found[file]]
        for file in broken:
            problems.add(
                "unreadable", file.relative_to(root), found[file]["error"], "mend or remove it with its pair"
            )
        if broken:
            continue
        a, b = found[image], found[mask]
        if (a["height"], a["width"]) != (b["height"], b["width"]):
            finding = f"mask is {b['height']} x {b['width']}, picture {a['height']} x {a['width']}"
            remedy = "make them one size"
            if (a["height"], a["width"]) == (b["width"], b["height"]):
                turned = a["orientation"] >= 5
                finding += " after its EXIF tag turned it" if turned else ": one of them is turned"
                remedy = "turn the mask as viewers show the picture" if turned else "turn one of them"
            problems.add("sizes differ", mask.relative_to(root), finding, remedy)
            continue
        good.append((image, mask))
    return good


def _check_lossy(root: Path, stats: dict, encoding: Encoding, problems: Problems) -> None:
    """Class ids in a JPEG lie too close together for damage to be seen."""
    for mask, seen in stats.items():
        if seen.lossy and encoding.kind == "indices":
            finding = "is a JPEG, which alters class ids unseen"
            problems.add("lossy masks", mask.relative_to(root), finding, "export the masks again as PNG")


def _count_classes(
    root: Path, mask: Path, seen: MaskStats, encoding: Encoding, problems: Problems
) -> np.ndarray:
    """Pixels of each class in one mask; what has no class, or nothing but ignored pixels, is a problem."""
    counts = np.zeros(encoding.num_classes, np.int64)
    name = mask.relative_to(root)
    keys, pixels = np.array(seen.read_as(encoding.as_colours), np.int64), np.array(seen.counts, np.int64)
    positions = encoding.lookup(keys)
    unknown = positions == UNKNOWN
    if unknown.any():
        order = np.argsort(-pixels[unknown], kind="stable")
        strays, sizes = keys[unknown][order], pixels[unknown][order]
        share = f"{sizes.sum() / pixels.sum():.2%} of pixels"
        if seen.lossy or len(strays) > MANY_STRAYS:
            near = dict.fromkeys(
                raw_name(encoding.nearest(raw), encoding.as_colours) for raw in strays[:64].tolist()
            )
            finding = (
                f"{len(strays)} stray values, {share}, near {', '.join(list(near)[:4])}: JPEG or smoothing"
            )
            problems.add(
                "lossy masks", name, finding, "export as PNG without smoothing, or set labels to snap"
            )
        else:
            finding = f"{encoding.name_strays(list(zip(strays, sizes, strict=True)))}, {share}"
            first = raw_name(int(strays[0]), encoding.as_colours)
            remedy = f"mend the mask, or name it in labels ('{first}=ignore')"
            problems.add("values outside the classes", name, finding, remedy)
        return counts
    ids = np.array([id_ for _, id_ in encoding.table])[positions]
    valid = ids != encoding.ignore_index
    np.add.at(counts, ids[valid], pixels[valid])
    if not counts.any():
        problems.add(
            "nothing to learn", name, "every pixel is ignored", "remove the pair, or check ignore_index"
        )
    return counts


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


def _rotation_warning(good: dict, found: dict) -> list[str]:
    turned = [image for split in SPLITS for image, _ in good[split] if found[image]["orientation"] != 1]
    hidden = [
        image
        for image in turned
        if found[image]["orientation"] < 5 or found[image]["height"] == found[image]["width"]
    ]
    if not hidden:
        return []
    return [
        f"{len(hidden)} pictures carry an EXIF rotation that sizes do not show ({hidden[0].name}, ...); "
        "they are turned as viewers show them, and their masks must be drawn so"
    ]


def _pair(image: Path, mask: Path, found: dict) -> Pair:
    stamp = (*found[image]["stamp"], *found[mask]["stamp"])
    return Pair(image, mask, found[image]["height"], found[image]["width"], stamp)


def _fingerprint(root: Path, good: dict, found: dict, encoding: Encoding) -> dict[str, str]:
    """Changes with any name, content or meaning; not with the folder's place or the files' times."""
    parts = {"mask encoding": hashlib.sha256(json.dumps(encoding.to_dict(), sort_keys=True).encode())}
    for split, part in zip(SPLITS, ("training files", "validation files"), strict=True):
        parts[part] = hashlib.sha256()
        for file in (file for pair in good[split] for file in pair):
            name = file.relative_to(root).as_posix()
            parts[part].update(f"{name}|{found[file]['stamp'][0]}|{found[file]['crc']}\n".encode())
    return {part: digest.hexdigest()[:32] for part, digest in parts.items()}
