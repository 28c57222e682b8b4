"""The one encoding of all masks, found by detectors that are tried in order."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from .labels import (
    Encoding,
    LabelMap,
    MaskStats,
    listing,
    nearest,
    shorten,
)

NEAR = 40  # how far damage (JPEG, smoothing) moves most of the values that it moves
RARE = 0.005  # fraction of all pixels; values far from every declared one and more common are not damage
MOST_COLOURS = 256  # colours in drawn masks; more are shades, made by damage


@dataclass
class MaskSet:
    """The counted masks of all splits, with the settings that say how to read them."""

    masks: list[MaskStats]
    num_classes: int
    ignore_index: int
    label_map: LabelMap = field(default_factory=LabelMap)
    declared: list[int] = field(default_factory=list)  # class_colors, packed
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def has_colours(self) -> bool:
        """True where masks are read as colours."""
        return self.label_map.colours or any(mask.kind == "colour" for mask in self.masks)

    def count(self, colours: bool) -> Counter:
        """Pixels of each raw value, or of each packed colour, over all masks."""
        counts: Counter = Counter()
        for mask in self.masks:
            for key, count in zip(mask.read_as(colours), mask.counts, strict=True):
                counts[key] += count
        return counts

    @cached_property
    def counts(self) -> Counter:
        """Pixels of each raw value, or colour where masks are read as colours."""
        return self.count(self.has_colours)

    @property
    def is_damaged(self) -> bool:
        """True when a colour may be a shade of another: a file says so, or there are too many."""
        is_shaded = self.has_colours and len(self.counts) > MOST_COLOURS
        return is_shaded or any(mask.damage for mask in self.masks)

    def encoding(self, kind: str, table: dict, palette: tuple = (), ranges: tuple = ()) -> Encoding:
        """An encoding of these settings; None in the table stands for ignored."""
        own = [(raw, self.ignore_index if id_ is None else id_) for raw, id_ in table.items()]
        ranges = tuple((*row[:2], self.ignore_index if row[2] is None else row[2], row[3]) for row in ranges)
        snap = self.label_map.snap and kind not in ("indices", "palette")  # between ids nothing is near
        names = (kind, self.num_classes, self.ignore_index)
        return Encoding(*names, tuple(sorted(own)), snap, palette, ranges)


class EncodingError(ValueError):
    """No encoding fits: what was found in the masks, and the readings that work."""

    def __init__(self, finding: str, fix: str):
        super().__init__(f"{finding} To fix it, {fix}")
        self.finding, self.fix = finding, fix


def infer(masks: MaskSet) -> Encoding:
    """The encoding of the first detector that knows the masks.

    Raises:
        ValueError: the masks contradict the settings, or each other.
    """
    if not 0 <= masks.ignore_index < masks.num_classes:
        for detect in DETECTORS:
            encoding = detect(masks)
            if encoding:
                refuse_incomplete(masks, encoding)
                refuse_far_values(masks, encoding)
                return encoding
        raise ValueError(
            f"num_classes {masks.num_classes} expects ids 0..{masks.num_classes - 1}, and "
            f"{masks.ignore_index} for ignored pixels."
        )
    raise ValueError(
        f"ignore_index is {masks.ignore_index}, a class id (0..{masks.num_classes - 1}). Take another."
    )


# Detectors: (masks) → Encoding, or None where another is to be tried


def by_alpha(masks: MaskSet) -> None:
    """Refuse masks that are black, with their content in the alpha channel."""
    if set(masks.counts) == {0} and any("alpha" in mask.damage for mask in masks.masks):
        finding = "the masks are black everywhere; their content is in the alpha channel"
        raise EncodingError(finding, "save the alpha channel alone, as a grey PNG")


def by_value_map(masks: MaskSet) -> Encoding | None:
    """The map of values in `labels`."""
    labels = masks.label_map
    if labels.is_auto or labels.colours:
        return None
    if masks.has_colours:
        raise ValueError("labels maps values, but the masks also hold colours. Map the colours.")
    return masks.encoding("values", dict(labels.table), ranges=labels.ranges)


def by_colours(masks: MaskSet) -> Encoding | None:
    """The map of colours in `labels`, completed by class_colors; for masks in colour."""
    if not masks.has_colours:
        return None
    table = dict(masks.label_map.table)
    named = set(table.values())
    declared = {raw: i for i, raw in enumerate(masks.declared) if i not in named and raw not in table}
    if not table | declared:
        raise ValueError("nothing says which class each colour is: set class_colors, or labels.")
    encoding = masks.encoding("colours", table | declared)
    reach = NEAR if masks.label_map.snap or masks.is_damaged else 0
    refuse_incomplete(masks, encoding)
    if declared and (share := _share_beyond(reach, masks.counts, table | declared, declared)):
        raise ValueError(
            f"class_colors are not the colours that the masks hold: {share:.0%} of pixels show none of "
            "them. Set class_colors to those of the masks, or map those in labels."
        )
    return encoding


def by_palette_colours(masks: MaskSet) -> Encoding | None:
    """Palettes that differ from file to file, whose colours are those of class_colors."""
    try:
        one_palette(masks.masks)
    except ValueError:
        as_colours = replace(masks, label_map=replace(masks.label_map, colours=True))
        if masks.declared and set(as_colours.counts) <= set(masks.declared):
            return by_colours(as_colours)
        raise
    return None


def by_class_ids(masks: MaskSet) -> Encoding | None:
    """Class indices, where every value is one or is ignored."""
    values, ids = set(masks.counts), _ids(masks)
    if values == {0, 1, 255} and not any({1, 255} <= set(mask.keys) for mask in masks.masks):
        raise ValueError(
            "some masks hold 0 and 1, others 0 and 255, none all three: 255 may be a class or ignored."
        )
    return _index_encoding(masks) if values <= set(ids) and values != {0, 255} else None


def by_black_and_white(masks: MaskSet) -> Encoding | None:
    """0 and 255 for two classes, with the values near them that damage makes."""
    values, counts = set(masks.counts), masks.counts
    ends = sum(count for value, count in counts.items() if min(abs(value), abs(value - 255)) <= NEAR)
    has_white = any(abs(value - 255) <= NEAR for value in values)
    is_smooth = len(values) > 8 and any(255 - NEAR <= value < 255 for value in values)  # no instance ids
    is_damaged = masks.label_map.snap or values == {0, 255} or is_smooth or masks.is_damaged
    if masks.num_classes == 2 and has_white and is_damaged and ends >= 0.8 * counts.total():
        encoding = masks.encoding("binary", {0: 0, 255: 1})  # strays are snapped, or named file by file
        _warn_of_other_colours(masks, encoding, {0: 0, 255: 0xFFFFFF}, "value")
        return encoding
    return None


def by_class_ids_with_strays(masks: MaskSet) -> Encoding | None:
    """Class indices and a few values outside, which are then named file by file."""
    if masks.label_map.snap:
        raise ValueError("labels is 'snap', but class ids lie 1 apart: name the values.")
    values, last = set(masks.counts), masks.num_classes
    strays = values - set(_ids(masks))
    is_shifted = last in values  # ids from 1, 0 for void, or one class more
    is_other = len(values) <= 64 and 2 * len(strays) >= len(values)
    is_instances = last == 2 and len(strays) > 2 and 0 in values and not masks.is_damaged
    if values == {0, 255} or is_shifted or is_other or is_instances:
        return None
    return _index_encoding(masks)


DETECTORS: tuple[Callable[[MaskSet], Encoding | None], ...] = (
    by_alpha,
    by_value_map,
    by_colours,
    by_palette_colours,
    by_class_ids,
    by_black_and_white,
    by_class_ids_with_strays,
)


def _ids(masks: MaskSet) -> dict[int, int | None]:
    return {i: i for i in range(masks.num_classes)} | {masks.ignore_index: None}


def _index_encoding(masks: MaskSet) -> Encoding:
    shown = one_palette(masks.masks)
    palette = tuple(shown.get(i, 0) for i in range(max(shown) + 1)) if shown else ()
    encoding = masks.encoding("palette" if shown else "indices", _ids(masks), palette)
    _warn_of_other_colours(masks, encoding, shown, "palette index")
    return encoding


def _warn_of_other_colours(masks: MaskSet, encoding: Encoding, shown: dict[int, int], name: str) -> None:
    """Warn where class_colors give the colour that a value shows to another class."""
    own = {colour: id_ for id_, colour in enumerate(masks.declared)}
    for raw, colour in shown.items():
        id_ = dict(encoding.table).get(raw, masks.ignore_index)
        if id_ != masks.ignore_index and own.get(colour, id_) != id_:
            masks.warnings.append(
                f"{name} {raw} shows #{colour:06x}, which class_colors gives to class {own[colour]}; the "
                f"{name} counts. If the colour should, map #colours in labels"
            )
            return


def refuse_incomplete(masks: MaskSet, encoding: Encoding) -> None:
    """Raise ValueError where the encoding lacks a class or has one too many."""
    ids = {id_ for _, id_ in encoding.table}
    for low, high, first, step in encoding.ranges:
        ids |= set(range(first, first + step * (high - low) + 1))
    ids -= {masks.ignore_index}
    classes = range(masks.num_classes)
    if beyond := ids - set(classes):
        raise ValueError(
            f"labels names class {max(beyond)}; ids of num_classes {len(classes)} end before it."
        )
    if missing := sorted(set(classes) - ids):
        raise ValueError(
            f"nothing stands for class {shorten(missing)}. Name its value or colour in labels (and a "
            "different one per class in class_colors), or lower num_classes."
        )


def refuse_far_values(masks: MaskSet, encoding: Encoding) -> None:
    """Raise ValueError where the encoding snaps values that damage cannot explain."""
    if encoding.snap:
        counts, colours = masks.counts, encoding.as_colours
        common = np.array([raw for raw, count in counts.items() if count > RARE * counts.total()])
        far = common[nearest(common, dict(encoding.table), colours)[1] > NEAR].tolist()
        if large := Counter({raw: counts[raw] for raw in far}):  # damage is near, or rare
            raise ValueError(
                f"{listing(large, colours, counts.total())}: too common and too far from every declared "
                "value to be damage. Declare them in labels, as a class or ignore."
            )


def _share_beyond(reach: int, counts: Counter, known: dict, declared: dict) -> float:
    """The fraction of pixels of no known colour, where the declared ones must be another set's; else 0."""
    found, distance = nearest(np.array([*counts]), known, colours=True)
    pixels, is_known = np.array([*counts.values()]), distance <= reach
    strays, total = pixels[~is_known].sum(), pixels.sum()
    absent = set(declared) - set(found[is_known].tolist())
    if 2 * len(absent) >= len(declared):
        total -= pixels.max()  # black is the background nearly everywhere
    return strays / pixels.sum() if absent and 2 * strays > total else 0


def _shown(mask: MaskStats) -> Iterator[tuple[int, int]]:
    """(key, colour) of a palette mask."""
    return zip(mask.keys, mask.colours or [], strict=False)


def one_palette(masks: list[MaskStats]) -> dict[int, int]:
    """The colour of each palette index in use.

    Raises:
        ValueError: an index has two colours, or a colour two indices that no mask holds together.
    """
    by_index: dict[int, int] = {}
    by_colour: dict[int, int] = {}
    together = {frozenset(mask.keys) for mask in masks if mask.kind == "palette"}
    hint = "Map values in labels if the indices count, or #colours if the colours do."
    for index, colour in sorted({row for mask in masks for row in _shown(mask)}):
        if by_index.setdefault(index, colour) != colour:
            raise ValueError(
                f"palettes differ between masks: index {index} is #{by_index[index]:06x} in one and "
                f"#{colour:06x} in another. {hint}"
            )
        first = by_colour.setdefault(colour, index)
        if first != index and not any({first, index} <= keys for keys in together):
            raise ValueError(
                f"palettes differ between masks: #{colour:06x} is index {first} in one and {index} in "
                f"another. {hint}"
            )
    return by_index
