"""Mask encodings: which raw value or colour in a mask file means which class, both ways.

An `Encoding` is one table from raw values to class ids. Values are the numbers of a grey mask or the indices of a palette
mask; colours are packed as 0xRRGGBB. `choose_encoding` finds the table by looking at all masks of all splits together.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

KINDS = ("indices", "palette", "binary", "values", "colours")
UNKNOWN = -1  # position in the table of a raw value that is not in it
LARGEST_TABLE = 1 << 24  # every packed colour
LARGEST_STRAY_SHARE = (
    0.005  # one raw value over more of all pixels is a class that nobody declared, not damage
)
NEAR = 40  # how far damage moves most values of a 0/255 mask


@dataclass(frozen=True)
class LabelMap:
    """What the setting `labels` says: see `parse_labels`."""

    snap: bool = False
    colours: bool = False
    table: tuple = ()  # ((raw, class id, or None for ignored), ...); empty: to be found


def parse_labels(text: str) -> LabelMap:
    """Read the setting `labels`.

    Args:
        text: 'auto'; 'snap' (auto, and stray values of lossy masks go to the nearest declared one); a map of mask values
            '0=0,128=1,255=ignore' or of colours '#000000=0,#ff0000=1'; or 'snap:' and a map.

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
        """Look-up by raw value: (lowest, table); the first and last entry stand for all below and above."""
        lowest = int(self._raws[0]) - 1
        if self.kind != "colours":
            lowest = min(lowest, -1)
        count = int(self._raws[-1]) - lowest + 2
        if not self.snap or self.kind == "colours":
            found = np.full(count, UNKNOWN, np.int16 if len(self.table) < 2**15 else np.int32)
            found[self._raws - lowest] = np.arange(len(self.table))
            return lowest, found
        return lowest, self._nearest(np.arange(lowest, lowest + count))

    def __getstate__(self):
        """Leave the look-up tables behind when sent to another process."""
        return {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__}

    def _nearest(self, raws: np.ndarray) -> np.ndarray:
        """Position of the nearest entry: by value, or by squared distance of colours; ties go to the first."""
        entries, found = self._raws, np.empty(len(raws), np.int64)
        for start in range(0, len(raws), 65536):  # bounds the (raws, entries) matrix
            part = raws[start : start + 65536, None]
            if self.kind == "colours":
                distance = sum(((part >> s & 255) - (entries >> s & 255)) ** 2 for s in (16, 8, 0))
            else:
                distance = np.abs(part - entries)
            found[start : start + 65536] = distance.argmin(1)
        return found

    def lookup(self, raws: np.ndarray) -> np.ndarray:
        """Positions in the table of raw values of any shape; UNKNOWN where there is none."""
        if self.snap and self.kind == "colours":
            values, inverse = np.unique(raws, return_inverse=True)
            return self._nearest(values.astype(np.int64))[inverse].reshape(raws.shape)
        lowest, found = self._positions
        if raws.dtype == np.uint8 and lowest == -1:  # the common case, without widening the picture
            bytes_ = np.full(256, found[-1], found.dtype)
            bytes_[: min(256, len(found) - 1)] = found[1:257]
            return bytes_[raws]
        return found[np.clip(raws.astype(np.int64) - lowest, 0, len(found) - 1)]

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Class ids (H, W), uint8 or int64, of a raw mask as `read_mask` gives it.

        Raises:
            ValueError: the mask holds values that the table lacks; says which and how many.
        """
        keys = self.keys(raw)
        positions = self.lookup(keys)
        unknown = positions == UNKNOWN
        if unknown.any():
            strays = Counter(keys[unknown].tolist()).most_common()
            raise ValueError(f"holds {self.name_strays(strays)}, which {self.describe()} has no class for.")
        return self._ids[positions]

    def keys(self, raw: np.ndarray) -> np.ndarray:
        """Raw mask → one number a pixel: packed colours for kind colours, else values."""
        if self.kind == "colours":
            return pack(raw if raw.ndim == 3 else np.repeat(raw[..., None], 3, axis=2))
        if raw.ndim == 3:
            if not ((raw[..., 0] == raw[..., 1]) & (raw[..., 0] == raw[..., 2])).all():
                raise ValueError(f"holds colours, but the masks are read as {self.describe()}.")
            return raw[..., 0]
        return raw

    def name(self, raw: int) -> str:
        """A raw value as the user writes it in `labels`."""
        return f"#{raw:06x}" if self.kind == "colours" else str(raw)

    def name_strays(self, strays, most: int = 4) -> str:
        """'values 7 (12 px), 9 (3 px) and 5 more' from (raw, count) pairs."""
        word = "colours" if self.kind == "colours" else "values"
        named = ", ".join(f"{self.name(int(raw))} ({int(count)} px)" for raw, count in strays[:most])
        more = f" and {len(strays) - most} more" if len(strays) > most else ""
        return f"{word if len(strays) > 1 else word[:-1]} {named}{more}"

    def decode(self, ids: np.ndarray) -> Image.Image:
        """The picture to save so that the file is encoded as the training masks were: the exact inverse of `encode`.

        Raises:
            ValueError: an id has no raw value, or the value fits no PNG.
        """
        inverse: dict[int, int] = {}
        for raw, id_ in self.table:
            inverse.setdefault(id_, raw)
        present = np.unique(ids)
        missing = [int(id_) for id_ in present if int(id_) not in inverse]
        if missing:
            raise ValueError(
                f"class ids {missing} have no mask value in {self.describe()}. Use encoding index."
            )
        raws = np.array([inverse[int(id_)] for id_ in present], np.int64)[np.searchsorted(present, ids)]
        if self.kind == "colours":
            return Image.fromarray(np.stack([raws >> s & 255 for s in (16, 8, 0)], axis=2).astype(np.uint8))
        if raws.size and (raws.min() < 0 or raws.max() > 65535):
            raise ValueError(
                f"mask values {raws.min()}..{raws.max()} fit no PNG (0..65535). Use encoding index."
            )
        largest = max(
            raw for raw, _ in self.table
        )  # of the table, so that all files of a set are of one type
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
        ends = f"0..{self.num_classes - 1}"
        if self.kind in ("indices", "palette"):
            what = "palette indices" if self.kind == "palette" else "class indices"
            line = f"{what} {ends}, {self.ignore_index} ignored"
        else:
            shown = ", ".join(
                f"{self.name(raw)} → {'ignored' if id_ == self.ignore_index else id_}"
                for raw, id_ in self.table[:12]
            )
            more = f" and {len(self.table) - 12} more" if len(self.table) > 12 else ""
            line = f"{'values' if self.kind == 'binary' else self.kind} {shown}{more}"
        return line + (", strays to the nearest" if self.snap else "")


def pack(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 → int32 0xRRGGBB."""
    packed = rgb[..., 0].astype(np.int32) << 16
    packed |= rgb[..., 1].astype(np.int32) << 8
    packed |= rgb[..., 2]
    return packed


@dataclass
class MaskStats:
    """What preflight counted in one mask.

    Attributes:
        kind: grey, palette, or colour; `grey_rgb` for an RGB file that shows greys alone.
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
        """The keys as values, or as packed colours."""
        if colours:
            if self.kind == "palette":
                return self.colours
            return (
                [key * 0x010101 if 0 <= key <= 255 else -1 for key in self.keys]
                if self.kind == "grey"
                else self.keys
            )
        return [key & 255 for key in self.keys] if self.kind == "grey_rgb" else self.keys


def choose_encoding(
    masks: list[MaskStats], num_classes: int, ignore_index: int, labels="auto", class_colors=None
):
    """The one encoding of all masks of all splits.

    Args:
        masks: what was counted in each mask.
        num_classes: number of classes.
        ignore_index: the id of ignored pixels.
        labels: the setting, see `parse_labels`.
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
    rgb = [mask for mask in masks if mask.kind == "colour"]
    if wanted.table and not wanted.colours and rgb:
        raise ValueError(
            f"labels maps values, but {len(rgb)} of {len(masks)} masks hold colours "
            f"({_list_colours(rgb)}). Map colours: '#000000=0,...'."
        )
    if wanted.colours or rgb:
        return _colours_encoding(masks, rgb, num_classes, ignore_index, wanted, class_colors), []
    kind, table, warnings = "values", dict(wanted.table), []
    used_palette = any(mask.kind == "palette" for mask in masks)
    palette = _merge_palettes(masks) if used_palette else {}
    if not table:
        kind, table = _find_values(masks, num_classes, ignore_index, wanted.snap)
        if kind == "indices" and used_palette:
            _refuse_conflicting_palettes(masks)
            kind = "palette"
            warnings += _palette_warning(palette, class_colors, num_classes)
    full = ()
    if kind == "palette":
        full = tuple(palette.get(index, 0) for index in range(max(*palette, *table, 0) + 1))
    table = _finish_table(table, num_classes, ignore_index)
    return Encoding(kind, num_classes, ignore_index, table, wanted.snap, full), warnings


def _finish_table(table: dict, num_classes: int, ignore_index: int) -> tuple:
    """Check a map's classes and put the ignored id in; ascending by raw."""
    ids = {id_ for id_ in table.values() if id_ is not None and id_ != ignore_index}
    if ids and max(ids) >= num_classes:
        raise ValueError(
            f"labels names class {max(ids)}; num_classes is {num_classes}, so ids are 0..{num_classes - 1}."
        )
    missing = sorted(set(range(num_classes)) - ids)
    if missing:
        raise ValueError(f"labels names no value for class {_some(missing)}. Add it, or lower num_classes.")
    return tuple(sorted((raw, ignore_index if id_ is None else id_) for raw, id_ in table.items()))


def _colours_encoding(masks, rgb, num_classes, ignore_index, wanted: LabelMap, class_colors) -> Encoding:
    table = dict(wanted.table)
    if class_colors:
        packed = [int(pack(np.array(colour, np.uint8))) for colour in class_colors]
        twice = [f"#{colour:06x}" for colour, count in Counter(packed).items() if count > 1]
        if twice and not wanted.table:
            raise ValueError(f"class_colors gives {twice[0]} to two classes; colour masks need one each.")
        named = set(table.values())
        table.update({colour: i for i, colour in enumerate(packed) if i not in named and colour not in table})
    if not table:
        raise ValueError(
            f"{len(rgb)} of {len(masks)} masks hold colours, and nothing says which class each is: {_list_colours(rgb)}. "
            f"Set class_colors, or labels, for example '{_suggest_colours(rgb, num_classes)}'."
        )
    table = _finish_table(table, num_classes, ignore_index)
    return Encoding("colours", num_classes, ignore_index, table, wanted.snap)


def _find_values(masks: list[MaskStats], num_classes: int, ignore_index: int, snap: bool) -> tuple[str, dict]:
    """Class indices or 0/255, from all values of all masks."""
    counts: Counter = Counter()
    for mask in masks:
        counts.update(dict(zip(mask.read_as(False), mask.counts, strict=True)))
    indices = {**{i: i for i in range(num_classes)}, **({ignore_index: None} if ignore_index >= 0 else {})}
    binary, values, total = {0: 0, 255: 1}, set(counts), max(1, sum(counts.values()))
    if num_classes == 2 and values == {0, 255}:
        return "binary", binary
    if values <= set(indices):
        if num_classes == 2 and ignore_index == 255 and values == {0, 1, 255}:
            _refuse_mixed_binary(masks)
        return "indices", indices
    near = sum(count for value, count in counts.items() if min(abs(value), abs(value - 255)) <= NEAR)
    bright = sum(count for value, count in counts.items() if abs(value - 255) <= NEAR)
    if num_classes == 2 and near >= 0.8 * total and bright and not {0, 1, 255} >= values:
        strays = {value for value in values - {0, 255} if counts[value] > LARGEST_STRAY_SHARE * total}
        if snap or len(values) > 8 or not strays:
            return "binary", binary  # the strays are then named file by file, or snapped
    if snap:
        raise ValueError(
            f"labels is 'snap', but class ids lie 1 apart and the masks hold values {_some(sorted(values), 12)}. "
            f"Name the values: labels 'snap:{_suggest(counts, num_classes)}'."
        )
    outside = sorted(values - set(indices))
    found = Counter({value: counts[value] for value in counts})
    if len(values) <= 64 and len(outside) >= len(values) / 2 or _shifted(values, num_classes):
        raise ValueError(
            f"the masks hold values {_some(sorted(values), 16)}; num_classes {num_classes} wants ids "
            f"0..{num_classes - 1} and {ignore_index} for ignored. Set num_classes to the number of classes, or name "
            f"the values: labels '{_suggest(found, num_classes)}'."
        )
    return "indices", indices  # a few strays: named file by file


def _shifted(values: set, num_classes: int) -> bool:
    """Ids counted from 1."""
    return 0 not in values and num_classes in values


def _refuse_mixed_binary(masks: list[MaskStats]) -> None:
    sets = [set(mask.read_as(False)) for mask in masks]
    ones, brights = sum(1 in s and 255 not in s for s in sets), sum(255 in s and 1 not in s for s in sets)
    if ones and brights and not any({1, 255} <= s for s in sets):
        raise ValueError(
            f"{ones} masks hold 0 and 1, {brights} hold 0 and 255, none both: 255 may be a class or ignored. "
            "Say which: labels '0=0,1=1,255=1' or '0=0,1=1,255=ignore'."
        )


def _merge_palettes(masks: list[MaskStats]) -> dict[int, int]:
    merged: dict[int, int] = {}
    for mask in masks:
        if mask.colours:
            for key, colour in zip(mask.keys, mask.colours, strict=True):
                merged.setdefault(key, colour)
    return merged


def _refuse_conflicting_palettes(masks: list[MaskStats]) -> None:
    """An index that is two colours in two files may be two classes."""
    merged = _merge_palettes(masks)
    for mask in masks:
        for key, colour in zip(mask.keys, mask.colours or [], strict=False):
            if merged[key] != colour:
                raise ValueError(
                    f"palettes differ between mask files: index {key} is #{merged[key]:06x} in one and #{colour:06x} in "
                    "another, so indices may not mean the same class. If they do, say so with labels '0=0,1=1,...'; if "
                    "the colours count, with labels '#000000=0,...'."
                )


def _palette_warning(palette: dict[int, int], class_colors, num_classes: int) -> list[str]:
    if not class_colors:
        return []
    packed = [int(pack(np.array(colour, np.uint8))) for colour in class_colors]
    for index, colour in sorted(palette.items()):
        if index < num_classes and colour in packed and packed[index] != colour:
            return [
                f"palette index {index} shows #{colour:06x}, which class_colors gives to class {packed.index(colour)}; "
                "the index counts. If the colour should, set labels to a map of #colours."
            ]
    return []


def _some(values: list, most: int = 8) -> str:
    return ", ".join(map(str, values[:most])) + (
        f" and {len(values) - most} more" if len(values) > most else ""
    )


def _suggest(counts: Counter, num_classes: int) -> str:
    """A map to start from: the commonest values, ascending."""
    common = sorted(value for value, _ in counts.most_common(num_classes))
    extra = sorted(set(counts) - set(common))[:4]
    return ",".join(
        [f"{value}={i}" for i, value in enumerate(common)] + [f"{value}=ignore" for value in extra]
    )


def _count_colours(rgb: list[MaskStats]) -> Counter:
    counts: Counter = Counter()
    for mask in rgb:
        counts.update(dict(zip(mask.keys, mask.counts, strict=True)))
    return counts


def _list_colours(rgb: list[MaskStats], most: int = 16) -> str:
    counts = _count_colours(rgb)
    total = sum(counts.values())
    listed = ", ".join(f"#{key:06x} ({count / total:.1%})" for key, count in counts.most_common(most))
    return listed + (f" and {len(counts) - most} more" if len(counts) > most else "")


def _suggest_colours(rgb: list[MaskStats], num_classes: int) -> str:
    common = [key for key, _ in _count_colours(rgb).most_common(num_classes)]
    return ",".join(f"#{key:06x}={i}" for i, key in enumerate(common))
