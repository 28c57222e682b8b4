"""Mask encodings: which raw value or colour in a mask file means which class, both ways.

An `Encoding` is one table from raw values to class ids. Values are the numbers of a grey mask or the indices
of a palette mask; colours are packed as 0xRRGGBB. `choose_encoding` finds the table by looking at all masks
of all splits together.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

UNKNOWN = -1  # position in the table of a raw value that is not in it
NEAR = 40  # how far damage (JPEG, smoothing) moves most of the values that it moves
RARE = 0.005  # of all pixels; what is far from every declared value and more common is no damage
SHOWN = 16  # raw values that a message lists


@dataclass(frozen=True)
class LabelMap:
    """What the setting `labels` says: see `parse_labels`."""

    snap: bool = False
    colours: bool = False
    table: tuple = ()  # ((raw, class id, or None for ignored), ...); empty: to be found


def parse_labels(text: str) -> LabelMap:
    """Read the setting `labels`.

    Args:
        text: 'auto'; 'snap' (auto, and stray values of lossy masks go to the nearest declared one); a map of
            mask values '0=0,128=1,255=ignore' or of colours '#000000=0,#ff0000=1'; or 'snap:' and a map.

    Raises:
        ValueError: not of that form.
    """
    rest = text.strip().lower()
    if rest in ("auto", "snap"):
        return LabelMap(snap=rest == "snap")
    snap = rest.startswith("snap:")
    table: dict[int, int | None] = {}
    kinds = set()
    for part in filter(None, (part.strip() for part in rest.removeprefix("snap:").split(","))):
        match = re.fullmatch(r"(#[0-9a-f]{6}|-?\d+)\s*=\s*(\d+|ignore)", part)
        if not match:
            raise ValueError(
                f"labels has '{part}'; wanted 'auto', 'snap', or a map such as '0=0,128=1,255=ignore' "
                "or '#000000=0,#ff0000=1'. Write each part as VALUE=CLASS or #RRGGBB=CLASS."
            )
        kinds.add(match[1].startswith("#"))
        raw = int(match[1][1:], 16) if match[1].startswith("#") else int(match[1])
        if not -65536 < raw < 2**24:
            raise ValueError(f"labels has the value {raw}; mask values are -65535 to 16777215.")
        if raw in table:
            raise ValueError(f"labels names {match[1]} twice. Give each value or colour one class.")
        table[raw] = None if match[2] == "ignore" else int(match[2])
    if not table:
        raise ValueError("labels is empty; wanted 'auto', 'snap', or a map such as '0=0,255=1'.")
    if len(kinds) == 2:
        raise ValueError("labels mixes values and #colours. Use the one that the mask files hold.")
    return LabelMap(snap=snap, colours=kinds.pop(), table=tuple(table.items()))


@dataclass(frozen=True)
class Encoding:
    """One table from raw mask values to class ids.

    Attributes:
        kind: indices (value = class), palette (indices of palette PNGs), binary (0 and 255), values, colours.
        num_classes: class ids are 0..num_classes-1.
        ignore_index: the id of pixels that count nowhere; any int that is no class id.
        table: ((raw, id), ...), ascending by raw; the first raw of an id is what `decode` writes.
        snap: a raw value outside the table becomes the nearest one in it.
        palette: for kind palette, 0xRRGGBB by index, to save masks with the same colours.
    """

    kind: str
    num_classes: int
    ignore_index: int
    table: tuple[tuple[int, int], ...]
    snap: bool = False
    palette: tuple[int, ...] = field(default=(), repr=False)

    @property
    def dtype(self) -> np.dtype:
        """uint8 when every id and ignore_index fit, else int64."""
        return np.dtype(np.uint8 if self.num_classes <= 256 and 0 <= self.ignore_index <= 255 else np.int64)

    @property
    def as_colours(self) -> bool:
        """True when palette masks are to be read as colours."""
        return self.kind == "colours"

    @cached_property
    def _raws(self) -> np.ndarray:
        return np.array([raw for raw, _ in self.table], np.int64)

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.array([id_ for _, id_ in self.table], self.dtype)

    @cached_property
    def _positions(self) -> tuple[int, np.ndarray]:
        """Positions by raw value from `lowest` on; the first and last entry stand for all below and above."""
        lowest = min(int(self._raws[0]), 0) - 1
        count = max(int(self._raws[-1]), 255) - lowest + 2
        if self.snap and not self.as_colours:
            return lowest, self._nearest(np.arange(lowest, lowest + count))
        found = np.full(count, UNKNOWN, np.int16 if len(self.table) < 2**15 else np.int32)
        found[self._raws - lowest] = np.arange(len(self.table))
        return lowest, found

    def __getstate__(self):
        """Leave the look-up tables behind when sent to another process."""
        return {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__}

    def _distances(self, raws: np.ndarray) -> np.ndarray:
        """(raws, entries): difference of values, or of colours as points."""
        if not self.as_colours:
            return np.abs(raws[:, None] - self._raws)
        squares = (((raws[:, None] >> s & 255) - (self._raws >> s & 255)) ** 2 for s in (16, 8, 0))
        return np.sqrt(sum(squares))

    def _nearest(self, raws: np.ndarray) -> np.ndarray:
        """Position of the nearest entry; of equally near ones the first."""
        parts = [self._distances(raws[i : i + 65536]).argmin(1) for i in range(0, len(raws), 65536)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def distance(self, raws: np.ndarray) -> np.ndarray:
        """How far raw values lie from the nearest in the table."""
        parts = [self._distances(raws[i : i + 65536]).min(1) for i in range(0, len(raws), 65536)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def nearest(self, raw: int) -> int:
        """The raw value of the table that lies nearest."""
        return self.table[int(self._nearest(np.array([raw]))[0])][0]

    def lookup(self, raws: np.ndarray) -> np.ndarray:
        """Positions in the table of raw values of any shape; UNKNOWN where there is none."""
        if self.snap and self.as_colours:
            values, inverse = np.unique(raws, return_inverse=True)
            return self._nearest(values.astype(np.int64))[inverse].reshape(raws.shape)
        lowest, found = self._positions
        return found[np.clip(raws.astype(np.int64) - lowest, 0, len(found) - 1)]

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Class ids (H, W), uint8 or int64, of a raw mask as `read_mask` gives it.

        Raises:
            ValueError: the mask holds values that the table lacks; says which and how many.
        """
        keys = raw
        if self.as_colours:
            keys = pack(raw if raw.ndim == 3 else np.repeat(raw[..., None], 3, axis=2))
        elif raw.ndim == 3:
            if (raw != raw[..., :1]).any():
                raise ValueError(f"holds colours, but the masks are read as {self.describe()}.")
            keys = raw[..., 0]
        if keys.dtype == np.uint8:  # one byte a pixel all the way
            positions = self.lookup(np.arange(256))
            ids, unknown = self._ids[positions].take(keys), (positions == UNKNOWN).take(keys)
        else:
            positions = self.lookup(keys)
            ids, unknown = self._ids[positions], positions == UNKNOWN
        if unknown.any():
            strays = Counter(keys[unknown].tolist()).most_common()
            raise ValueError(f"holds {self.name_strays(strays)}; known are {self.describe()}.")
        return ids

    def name_strays(self, strays, most: int = 4) -> str:
        """'values 7 (12 px), 9 (3 px) and 5 more' from (raw, count) pairs."""
        word = ("colour" if self.as_colours else "value") + ("s" if len(strays) > 1 else "")
        named = [f"{raw_name(int(raw), self.as_colours)} ({int(count)} px)" for raw, count in strays]
        return f"{word} {_some(named, most)}"

    def decode(self, ids: np.ndarray) -> Image.Image:
        """The picture to save so that a file is encoded as the training masks were: the inverse of `encode`.

        Raises:
            ValueError: an id has no raw value, or the value fits no PNG.
        """
        inverse: dict[int, int] = {}
        for raw, id_ in self.table:
            inverse.setdefault(id_, raw)
        present = np.unique(ids)
        missing = [int(id_) for id_ in present if int(id_) not in inverse]
        if missing:
            raise ValueError(f"class ids {missing} have no value in {self.describe()}. Use encoding index.")
        raws = np.array([inverse[int(id_)] for id_ in present], np.int64)[np.searchsorted(present, ids)]
        if self.as_colours:
            return Image.fromarray(np.stack([raws >> s & 255 for s in (16, 8, 0)], axis=2).astype(np.uint8))
        lowest, largest = self._raws.min(), self._raws.max()  # so that all files of a set are of one type
        if lowest < 0 or largest > 65535:
            raise ValueError(f"mask values {lowest}..{largest} fit no PNG (0..65535). Use encoding index.")
        picture = Image.fromarray(raws.astype(np.uint8 if largest <= 255 else np.uint16))
        if self.kind == "palette":
            picture.putpalette([raw >> s & 255 for raw in self.palette for s in (16, 8, 0)])
        return picture

    def to_dict(self) -> dict:
        """Plain values, for a checkpoint."""
        return {
            "kind": self.kind,
            "num_classes": self.num_classes,
            "ignore_index": self.ignore_index,
            "table": [list(row) for row in self.table],
            "snap": self.snap,
            "palette": list(self.palette),
        }

    @classmethod
    def from_dict(cls, values: dict) -> "Encoding":
        """Inverse of `to_dict`."""
        table = tuple((int(raw), int(id_)) for raw, id_ in values["table"])
        return cls(**{**values, "table": table, "palette": tuple(values["palette"])})

    def describe(self) -> str:
        """One line for the user."""
        if self.kind in ("indices", "palette"):
            what = "palette indices" if self.kind == "palette" else "class indices"
            line = f"{what} 0..{self.num_classes - 1}, {self.ignore_index} ignored"
        else:
            named = ((raw, "ignored" if id_ == self.ignore_index else id_) for raw, id_ in self.table)
            shown = [f"{raw_name(raw, self.as_colours)} → {id_}" for raw, id_ in named]
            line = f"{'colours' if self.as_colours else 'values'} {_some(shown, SHOWN)}"
        return line + (", strays to the nearest" if self.snap else "")


def pack(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 → int32 0xRRGGBB."""
    packed = rgb[..., 0].astype(np.int32) << 16
    packed |= rgb[..., 1].astype(np.int32) << 8
    packed |= rgb[..., 2]
    return packed


def pack_one(colour) -> int:
    """(r, g, b) → 0xRRGGBB."""
    return int(pack(np.array(colour, np.uint8)))


def raw_name(raw: int, colours: bool) -> str:
    """A raw value as the user writes it in `labels`."""
    return f"#{raw:06x}" if colours else str(raw)


@dataclass
class MaskStats:
    """What was counted in one mask.

    Attributes:
        kind: grey, palette, colour, or grey_rgb for an RGB file that shows greys alone.
        keys: the raw values (packed colours for colour and grey_rgb), ascending.
        counts: pixels of each.
        colours: for palette, the packed colour of each key.
        lossy: the file format does not keep values.
    """

    kind: str
    keys: list[int]
    counts: list[int]
    colours: list[int] | None = None
    lossy: bool = False

    def read_as(self, colours: bool) -> list[int]:
        """The keys as packed colours, or as values."""
        if not colours:
            return [key & 255 for key in self.keys] if self.kind == "grey_rgb" else self.keys
        if self.kind == "palette":
            return self.colours
        if self.kind == "grey":
            return [key * 0x010101 if 0 <= key <= 255 else UNKNOWN for key in self.keys]
        return self.keys


def choose_encoding(
    masks: list[MaskStats], num_classes: int, ignore_index: int, labels="auto", class_colors=None
) -> tuple[Encoding, list[str]]:
    """The one encoding of all masks of all splits.

    Args:
        masks: what was counted in each mask.
        num_classes: number of classes.
        ignore_index: the id of ignored pixels.
        labels: the setting, see `parse_labels`, or what that made of it.
        class_colors: ((r, g, b), ...) one a class, or None.

    Returns:
        (Encoding, warnings)

    Raises:
        ValueError: no encoding fits; the message names what was found and a map to start from.
    """
    wanted = parse_labels(labels) if isinstance(labels, str) else labels
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index is {ignore_index}, a class id (0..{num_classes - 1}). Take another number."
        )
    declared = [pack_one(colour) for colour in class_colors or []]
    rgb = [mask for mask in masks if mask.kind == "colour"]
    colours = wanted.colours or bool(rgb)
    counts = _total(masks, colours)
    if wanted.table and not wanted.colours and rgb:
        raise ValueError(
            f"labels maps values, but {len(rgb)} of {len(masks)} masks hold colours: "
            f"{_listing(_total(rgb, True), True)}. Map colours: '{_suggest(counts, num_classes, True)}'."
        )
    table, palette, warnings = dict(wanted.table), (), []
    if colours:
        kind = "colours"
        named = set(table.values())
        table.update({raw: i for i, raw in enumerate(declared) if i not in named and raw not in table})
        if not table:
            raise ValueError(
                f"{len(rgb)} of {len(masks)} masks hold colours and nothing says which class each is: "
                f"{_listing(counts, True)}. Set class_colors, or name them: "
                f"labels '{_suggest(counts, num_classes, True)}'."
            )
    elif table:
        kind = "values"
    else:
        kind, table = _find_values(masks, counts, num_classes, ignore_index, wanted.snap)
        if kind == "indices" and any(mask.kind == "palette" for mask in masks):
            kind, shown = "palette", _one_palette(masks)
            palette = tuple(shown.get(index, 0) for index in range(max(*shown, *table) + 1))
            warnings = _palette_warning(shown, declared)
    table = _checked(table, num_classes, ignore_index)
    encoding = Encoding(kind, num_classes, ignore_index, table, wanted.snap, palette)
    if wanted.snap:
        _refuse_large_strays(encoding, counts)
    return encoding, warnings


def _checked(table: dict, num_classes: int, ignore_index: int) -> tuple:
    """A table with the ignored id put in, ascending by raw, if it names every class and no other."""
    ids = {id_ for id_ in table.values() if id_ not in (None, ignore_index)}
    if ids and max(ids) >= num_classes:
        raise ValueError(
            f"labels names class {max(ids)}; num_classes is {num_classes}, so ids are 0..{num_classes - 1}."
        )
    missing = sorted(set(range(num_classes)) - ids)
    if missing:
        raise ValueError(
            f"nothing stands for class {_some(missing)}. Name its value or colour in labels (and each "
            "class's own in class_colors), or lower num_classes."
        )
    return tuple(sorted((raw, ignore_index if id_ is None else id_) for raw, id_ in table.items()))


def _find_values(masks, counts: Counter, num_classes: int, ignore_index: int, snap: bool) -> tuple[str, dict]:
    """Class indices, or 0 and 255, from all values of all masks."""
    indices: dict[int, int | None] = {i: i for i in range(num_classes)}
    if ignore_index >= 0:
        indices[ignore_index] = None
    values = set(counts)
    if num_classes == 2 and values == {0, 255}:
        return "binary", {0: 0, 255: 1}
    if values <= set(indices):
        if values == {0, 1, 255}:
            _refuse_mixed_binary(masks)
        return "indices", indices
    ends = sum(count for value, count in counts.items() if min(abs(value), abs(value - 255)) <= NEAR)
    bright = any(abs(value - 255) <= NEAR for value in values)
    damaged = len(values) > 8 or any(mask.lossy for mask in masks)
    if num_classes == 2 and bright and ends >= 0.8 * counts.total() and (snap or damaged):
        return "binary", {0: 0, 255: 1}  # the strays are snapped, or named file by file
    if snap:
        raise ValueError(
            f"labels is 'snap', but class ids lie 1 apart and the masks hold {_listing(counts, False)}. "
            f"Name the values: labels 'snap:{_suggest(counts, num_classes, False)}'."
        )
    strays = values - set(indices)
    from_one = 0 not in values and num_classes in values
    if from_one or (len(values) <= 64 and 2 * len(strays) >= len(values)):
        raise ValueError(
            f"the masks hold values {_listing(counts, False)}; num_classes {num_classes} wants ids "
            f"0..{num_classes - 1}, and {ignore_index} for ignored. Set num_classes right, or "
            f"name the values: labels '{_suggest(counts, num_classes, False)}'."
        )
    return "indices", indices  # a few strays, which are named file by file


def _refuse_mixed_binary(masks: list[MaskStats]) -> None:
    sets = [set(mask.read_as(False)) for mask in masks]
    ones, brights = (sum(a in s and b not in s for s in sets) for a, b in ((1, 255), (255, 1)))
    if ones and brights and not any({1, 255} <= s for s in sets):
        raise ValueError(
            f"{ones} masks hold 0 and 1, {brights} hold 0 and 255, none all three: 255 may be a class or "
            "ignored. Say which: labels '0=0,1=1,255=1' or '0=0,1=1,255=ignore'."
        )


def _one_palette(masks: list[MaskStats]) -> dict[int, int]:
    """The colour of each index in use; an index of two colours may be two classes, and is refused."""
    palette: dict[int, int] = {}
    for mask in masks:
        for key, colour in zip(mask.keys, mask.colours or [], strict=False):
            if palette.setdefault(key, colour) != colour:
                raise ValueError(
                    f"palettes differ between masks: index {key} is #{palette[key]:06x} in one and "
                    f"#{colour:06x} in another. If the indices count, say labels '0=0,1=1,...'; if the "
                    "colours do, labels '#000000=0,...'."
                )
    return palette


def _palette_warning(palette: dict[int, int], declared: list[int]) -> list[str]:
    for index, colour in sorted(palette.items()):
        if index < len(declared) and colour in declared and declared[index] != colour:
            return [
                f"palette index {index} shows #{colour:06x}, which class_colors gives to class "
                f"{declared.index(colour)}; the index counts. If the colour should, map #colours in labels"
            ]
    return []


def _refuse_large_strays(encoding: Encoding, counts: Counter) -> None:
    """What is far from every declared value and common is a class that nobody declared, not damage."""
    raws = np.array(sorted(counts), np.int64)
    far = raws[encoding.distance(raws) > NEAR]
    large = Counter({raw: counts[raw] for raw in far.tolist() if counts[raw] > RARE * counts.total()})
    if large:
        raise ValueError(
            f"{_listing(large, encoding.as_colours, counts.total())} are too common and too far from every "
            "declared value to be damage. Declare them in labels, as a class or ignore."
        )


def _total(masks: list[MaskStats], colours: bool) -> Counter:
    counts: Counter = Counter()
    for mask in masks:
        for key, count in zip(mask.read_as(colours), mask.counts, strict=True):
            counts[key] += count
    return counts


def _some(values: list, most: int = 8) -> str:
    return ", ".join(map(str, values[:most])) + (
        f" and {len(values) - most} more" if len(values) > most else ""
    )


def _listing(counts: Counter, colours: bool, total: int = 0) -> str:
    total = total or counts.total()
    listed = [f"{raw_name(raw, colours)} ({count / total:.1%})" for raw, count in counts.most_common(SHOWN)]
    return _some(listed + [""] * (len(counts) - len(listed)), len(listed))


def _suggest(counts: Counter, num_classes: int, colours: bool) -> str:
    """A map to start from: the commonest raw values, ascending."""
    common = sorted(raw for raw, _ in counts.most_common(num_classes))
    others = sorted(set(counts) - set(common))[:4]
    pairs = [*((raw, i) for i, raw in enumerate(common)), *((raw, "ignore") for raw in others)]
    return ",".join(f"{raw_name(raw, colours)}={id_}" for raw, id_ in pairs)
