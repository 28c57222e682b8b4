"""What masks may mean where no detector knows them: readings to choose from, each tried before it is offered.

A reading is a change of settings with its reason. It is listed only after it was applied to the counted masks
and left none of their values without a class, so that following it literally works.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .infer import NEAR, RARE, EncodingError, MaskSet, infer, one_palette
from .labels import (
    SHOWN,
    UNKNOWN,
    Encoding,
    MaskStats,
    listing,
    nearest,
    parse_labels,
    raw_name,
    shorten,
    write_labels,
)

MOST_CLASSES = 1024  # of a reading that makes every value a class
MOST_READINGS = 4


def choose_encoding(
    masks: list[MaskStats],
    num_classes: int,
    ignore_index: int,
    labels: str = "auto",
    class_colors: list[int] | None = None,
    class_names: list[str] | None = None,
) -> tuple[Encoding, list[str]]:
    """The one encoding of all masks of all splits, and warnings about it.

    Args:
        masks: the counts of each mask.
        num_classes: see `preflight.check_data`, as for the others.
        ignore_index: see there.
        labels: see there.
        class_colors: packed as 0xRRGGBB.
        class_names: names that the user gave, which a change of num_classes would contradict.

    Raises:
        EncodingError: no encoding fits.
    """
    mask_set = MaskSet(masks, num_classes, ignore_index, parse_labels(labels), list(class_colors or []))
    try:
        return infer(mask_set), mask_set.warnings
    except EncodingError:
        raise
    except ValueError as error:
        colours = mask_set.has_colours or palettes_differ(mask_set)
        counts = mask_set.count(colours)
        held = listing(counts, colours, counts.total())
        fix = describe_readings(mask_set, bool(class_names))
        raise EncodingError(f"{error} The masks hold {held}.", fix) from None


@dataclass(frozen=True)
class Reading:
    """A change of settings under which every value of the masks has a class."""

    reason: str
    labels: str | None = None
    num_classes: int | None = None
    ignore_index: int | None = None

    def settings(self, masks: MaskSet) -> MaskSet:
        """The masks under these settings."""
        changed = {
            "num_classes": self.num_classes or masks.num_classes,
            "ignore_index": masks.ignore_index if self.ignore_index is None else self.ignore_index,
            "label_map": parse_labels(self.labels) if self.labels else masks.label_map,
            "declared": [] if self.num_classes else masks.declared,
        }
        return MaskSet(masks.masks, **changed)

    def flags(self, masks: MaskSet, has_names: bool = False) -> str:
        """As a command line takes it; names and colours of another number of classes are dropped."""
        parts = []
        if self.num_classes:
            parts.append(f"--num_classes {self.num_classes}")
            parts += ["--class_names none"] * has_names + ["--class_colors none"] * bool(masks.declared)
        if self.ignore_index is not None:
            parts.append(f"--ignore_index {self.ignore_index}")
        if self.labels:
            parts.append(f"--labels '{self.labels}'")
        return " ".join(parts)


def class_shares(masks: MaskSet) -> list[float] | None:
    """The fraction of pixels of each class; None where a value would have no class, or an id be damaged."""
    try:
        encoding = infer(masks)
    except ValueError:
        return None
    counts = masks.count(encoding.as_colours)
    ids = encoding.lookup(np.array([*counts]))
    if (ids == UNKNOWN).any() or (encoding.is_dense and any(mask.damage for mask in masks.masks)):
        return None
    pixels = np.array([*counts.values()])
    classes = [int(pixels[ids == i].sum()) for i in range(masks.num_classes)]
    return [count / sum(classes) for count in classes] if sum(classes) else None


def describe_readings(masks: MaskSet, has_names: bool = False) -> str:
    """The readings that work, one per line with its class shares, or what to write where none is known."""
    lines, known = [], set()
    for reading in readings(masks):
        flags = reading.flags(masks, has_names)
        shares = None if {flags, reading.reason} & known else class_shares(reading.settings(masks))
        if shares and len(lines) < MOST_READINGS:
            known |= {flags, reading.reason}
            shown = shorten([f"{share:.1%}" for share in shares], 8)
            lines.append(f"\n      {flags}   ({reading.reason}; class shares {shown})")
    kind = "#RRGGBB" if masks.has_colours or palettes_differ(masks) else "VALUE"
    own = f"map each in labels, {kind}=CLASS or {kind}=ignore"
    if not lines:
        return own
    several = "one of these, the one that is right" if len(lines) > 1 else "this, if it is right"
    return f"{own}; or set {several}:" + "".join(lines)


def readings(masks: MaskSet) -> Iterator[Reading]:
    """Everything that the masks may mean, the likeliest first; some may not work."""
    if masks.has_colours or palettes_differ(masks):
        yield from colour_readings(masks)
    else:
        yield from value_readings(masks)


def palettes_differ(masks: MaskSet) -> bool:
    """True where an index means one colour in one mask and another in the next."""
    try:
        one_palette(masks.masks)
    except ValueError:
        return True
    return False


def stray_readings(
    masks: MaskSet, strays: set[int], table: dict[int, int | None], colours: bool
) -> list[Reading]:
    """Values outside a table of classes as ignored ones."""
    found = []
    reason = f"{shorten([raw_name(raw, colours) for raw in sorted(strays)], 4)} ignored"
    is_ignored = masks.ignore_index in masks.counts or None in table.values() and not _is_ids(masks, table)
    if len(strays) == 1 and not colours and _is_ids(masks, table) and not is_ignored:
        (stray,) = strays
        found.append(Reading(reason, ignore_index=stray))
    if len(strays) <= SHOWN and UNKNOWN not in strays:
        present = {raw: id_ for raw, id_ in table.items() if id_ is not None or raw in masks.counts}
        own = write_labels(present | dict.fromkeys(strays), colours, masks.label_map.snap)
        found.append(Reading(reason, labels=own))
    return found


def _is_ids(masks: MaskSet, table: dict[int, int | None]) -> bool:
    return all(id_ in (None, raw) for raw, id_ in table.items()) and masks.label_map.is_auto


def value_readings(masks: MaskSet) -> Iterator[Reading]:
    """What grey values or palette indices may mean."""
    counts = masks.counts
    if set(counts) == {0, 1, 255}:
        yield Reading("255 is class 1", labels="0=0,1=1,255=1")
        yield Reading("255 is ignored", labels="0=0,1=1,255=ignore")
    if set(counts) == {0, 255}:
        yield Reading("black and white are two classes", num_classes=2)
    if masks.is_damaged and masks.label_map.is_auto:
        yield Reading("each stray value as the nearest declared one", labels="snap")
    ids = sorted(value for value in counts if value != masks.ignore_index)
    if ids and ids[0] in (0, 1) and 2 * len(ids) > ids[-1]:
        yield from id_readings(masks, ids)
    else:
        yield from sparse_readings(masks, ids)


def id_readings(masks: MaskSet, ids: list[int]) -> Iterator[Reading]:
    """What values that lie side by side may mean, from 0 or 1 on."""
    counts, classes, void = masks.counts, masks.num_classes, masks.ignore_index
    ignored = {void: None} if void in counts else {}
    given = dict(masks.label_map.table)
    if given and set(range(classes)) <= set(counts):  # ids, and what the map says beside
        table = {i: i for i in range(classes)} | given
        own = table | dict.fromkeys(set(counts) - set(table))
        yield Reading("ids as they are, others ignored", labels=write_labels(own, False))
    if ids[-1] == classes:
        shifted = {0: None} if ids[0] == 0 else {}
        shifted |= {i: i - 1 for i in range(1, classes + 1)} | ignored
        yield Reading("ids count from 1" + ", 0 is void" * (ids[0] == 0), labels=write_labels(shifted, False))
    strays = {value for value in ids if value >= classes}
    if strays and not masks.is_damaged and (len(strays) == 1 or classes > 2):
        yield from stray_readings(masks, strays, {i: i for i in range(classes)} | ignored, False)
    if classes == 2 and len(ids) > 2 and ids[0] == 0:
        is_void = void in counts and not {void - 1, void + 1} & set(counts)
        own = "0=0,1-65535=1" + f",{void}=ignore" * (is_void and void > 0)
        yield Reading("0 against all else, as for instance ids", labels=own)
    if classes != ids[-1] + 1 <= MOST_CLASSES and ids[-1] > 0:
        most = ids[-1] + 1
        moved = None if not 0 <= void < most else 255 if most <= 255 else -1
        yield Reading("every value is a class", num_classes=most, ignore_index=moved)


def sparse_readings(masks: MaskSet, raws: list[int]) -> Iterator[Reading]:
    """What values with gaps may mean."""
    classes = masks.num_classes
    ignored = {masks.ignore_index: None} if masks.ignore_index in masks.counts else {}

    def by_rank(raws: list[int], is_damaged: bool = False, **settings: int) -> Reading:
        table = {raw: i for i, raw in enumerate(sorted(raws))} | ignored
        snap = is_damaged or (masks.label_map.snap and bool((np.diff(sorted(table)) > 1).all()))
        which = "the commonest values" if is_damaged else "each value a class"
        return Reading(f"{which}, in ascending order", labels=write_labels(table, False, snap), **settings)

    strays = {value for value in raws if value not in range(classes)}
    if len(raws) == classes and masks.label_map.is_auto:
        yield by_rank(raws)
    if masks.is_damaged:
        yield by_rank([*join_shades(masks.counts, classes, colours=False)], is_damaged=True)
        return
    if classes == 2 and len(raws) > 3 and raws[0] == 0:
        yield Reading("0 against all else, as for instance ids", labels="0=0,1-65535=1")
    if strays and (len(strays) == 1 or set(range(classes)) <= set(raws)):
        yield from stray_readings(masks, strays, {i: i for i in range(classes)} | ignored, False)
    if len(raws) == classes + 1:
        yield from void_readings(masks, raws, ignored, False)
    if 2 <= len(raws) != classes and len(raws) <= 64:
        yield by_rank(raws, num_classes=len(raws))


def void_readings(masks: MaskSet, raws: list[int], ignored: dict, colours: bool) -> Iterator[Reading]:
    """One value more than classes: the lowest may be void, or the rarest."""
    snap = masks.label_map.snap or (colours and masks.is_damaged)
    rarest = min(raws, key=lambda raw: masks.counts[raw])
    for void in dict.fromkeys([raws[0], rarest]):
        others = [raw for raw in raws if raw != void]
        table = {raw: i for i, raw in enumerate(others)} | {void: None} | ignored
        which = "the rarest" if void == rarest else "the lowest"
        reason = f"{raw_name(void, colours)}, {which}, is void; the others are classes in ascending order"
        yield Reading(reason, labels=write_labels(table, colours, snap))


def colour_readings(masks: MaskSet) -> Iterator[Reading]:
    """What the colours of masks may mean; the order of classes among colours is the user's to say."""
    counts, classes = masks.count(colours=True), masks.num_classes
    is_rough = masks.is_damaged
    groups = join_shades(counts, classes + SHOWN) if is_rough else counts
    snap = masks.label_map.snap or is_rough
    table = {raw: id_ for raw, id_ in masks.label_map.table} if masks.label_map.colours else {}
    raws = sorted(raw for raw in groups if raw not in table and raw != UNKNOWN)
    if is_rough:  # what is left of damage is rare
        raws = [raw for raw in raws if groups[raw] > 2 * RARE * groups.total()]
    missing = [i for i in range(classes) if i not in table.values()]
    if set(counts) <= set(masks.declared) and len(masks.declared) == classes and not table:
        own = {raw: i for i, raw in enumerate(masks.declared)}
        yield Reading("the colours of class_colors", labels=write_labels(own, True, snap))
    channel = next((s for s in (16, 8, 0) if all(raw & ~(255 << s) == 0 for raw in raws)), None)
    if channel is not None and raws and max(raws) >> channel < classes:
        own = {i << channel: i for i in range(classes)}
        yield Reading("ids in one channel", labels=write_labels(own, True, snap))
    if len(raws) == len(missing):
        own = table | dict(zip(raws, missing, strict=True))
        order = "colours in ascending order; put the class ids in your order"
        yield Reading(order, labels=write_labels(own, True, snap))
    if len(raws) == classes + 1 and not table:
        yield from void_readings(masks, raws, {}, True)
    if 2 <= len(raws) <= 64 and len(raws) != classes and not table:
        own = {raw: i for i, raw in enumerate(raws)}
        reason = "each colour a class, in ascending order"
        yield Reading(reason, labels=write_labels(own, True, snap), num_classes=len(raws))
    if table and not missing and raws:
        own = write_labels(table | dict.fromkeys(raws), True, snap)
        yield Reading("colours that the map lacks are ignored", labels=own)


def join_shades(counts: Counter, most: int, colours: bool = True) -> Counter:
    """The commonest colours, each with the pixels of those near it, which are left out as its shades."""
    left, groups = np.array([raw for raw, _ in counts.most_common()]), Counter()
    while left.size and len(groups) < most:
        is_near = nearest(left, left[:1], colours)[1] <= NEAR
        groups[int(left[0])] = sum(counts[raw] for raw in left[is_near].tolist())
        left = left[~is_near]
    return groups
