"""Mask encodings: which raw value or colour in a mask file means which class, in both directions.

An `Encoding` is one table from raw values to class ids. Values are the numbers of a grey mask or the indices
of a palette mask; colours are packed as 0xRRGGBB. `infer.py` finds the table from all masks of all splits.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from PIL import Image

Colours = Sequence[tuple[int, int, int]]  # (r, g, b) per class

UNKNOWN = np.iinfo(np.int64).min  # class id of a raw value without one; colour of a value that is no grey
SHOWN = 16  # raw values that a message lists


@dataclass(frozen=True)
class LabelMap:
    """The parsed setting `labels`: see `parse_labels`."""

    snap: bool = False
    colours: bool = False
    table: tuple = ()  # ((raw, class id, or None for ignored), ...)
    # ((lowest raw, highest raw, class id of the lowest or None, id step: 1 where ids count up, else 0), ...)
    ranges: tuple = ()

    @property
    def is_auto(self) -> bool:
        """True where the table is to be inferred."""
        return not self.table and not self.ranges


def parse_labels(text: str) -> LabelMap:
    """Read the setting `labels`.

    Args:
        text: 'auto'; 'snap' (auto, and stray values of lossy masks go to the nearest declared one); a map of
            mask values '0=0,128=1,255=ignore', in which a range may stand for many ('1-65535=1', or
            '1-150=0-149', which counts up), or of colours '#000000=0,#ff0000=1'; or 'snap:' and a map. A
            value of its own takes precedence over a range around it.

    Raises:
        ValueError: not of that form.
    """
    rest = text.strip().lower()
    if rest in ("auto", "snap"):
        return LabelMap(snap=rest == "snap")
    table: dict[int, int | None] = {}
    ranges: list[tuple] = []
    is_snap = rest.startswith("snap:")
    parts = [part.strip() for part in rest.removeprefix("snap:").split(",") if part.strip()]
    for part in parts:
        low, high, first, last = _parse_entry(part)
        if low != high:
            if is_snap:
                raise ValueError(
                    f"labels has 'snap:' and the range '{part}'. Name single values, or drop snap."
                )
            if any(low <= other[1] and other[0] <= high for other in ranges):
                raise ValueError(
                    f"labels has the range '{part}', which overlaps another. Give each value once."
                )
            ranges.append((low, high, first, int(last != first)))
        elif low in table:
            raise ValueError(f"labels names {part.split('=')[0].strip()} twice. Give each value one class.")
        else:
            table[low] = first
    kinds = {part.startswith("#") for part in parts}
    if not kinds:
        raise ValueError("labels is empty; expected 'auto', 'snap', or a map such as '0=0,255=1'.")
    if len(kinds) == 2:
        raise ValueError("labels mixes values and #colours. Use the kind that the mask files hold.")
    return LabelMap(is_snap, kinds.pop(), tuple(table.items()), tuple(sorted(ranges)))


def _parse_entry(part: str) -> tuple[int, int, int | None, int | None]:
    """Lowest and highest raw value of one entry of a map, and the class ids of both; None for ignored."""
    match = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?\s*=\s*(?:(\d+)(?:-(\d+))?|ignore)", part)
    colour = re.fullmatch(r"#([0-9a-f]{6})\s*=\s*(?:(\d+)|ignore)", part)
    if colour:
        raw, id_ = int(colour[1], 16), None if colour[2] is None else int(colour[2])
        return raw, raw, id_, id_
    if match:
        low, first = int(match[1]), None if match[3] is None else int(match[3])
        high = low if match[2] is None else int(match[2])
        last = first if match[4] is None else int(match[4])
        counts_up = match[4] is not None
        if -65536 < low <= high < 2**24 and (not counts_up or last - first == high - low):
            return low, high, first, last
    raise ValueError(
        f"labels has '{part}'; expected 'auto', 'snap', or a map such as '0=0,128=1,255=ignore', "
        "'0=0,1-65535=1' or '#000000=0,#ff0000=1'. Write VALUE=CLASS (values -65535 to 16777215), "
        "LOW-HIGH=CLASS, LOW-HIGH=FIRST-LAST (as many classes as values) or #RRGGBB=CLASS."
    )


def write_labels(table: dict[int, int | None], colours: bool, snap: bool = False) -> str:
    """The setting `labels` that `parse_labels` reads as this table of raw values and their class ids.

    Values that count up with their ids are written as a range where there are many.
    """
    entries, raws = [], sorted(table)
    while raws:
        first, length = raws[0], 1
        while not colours and table[first] is not None and len(table) > SHOWN and length < len(raws):
            if raws[length] != first + length or table[raws[length]] != table[first] + length:
                break
            length += 1
        id_ = "ignore" if table[first] is None else table[first]
        if length > 2:
            entries.append(f"{first}-{first + length - 1}={id_}-{id_ + length - 1}")
        else:
            length = 1
            entries.append(f"{raw_name(first, colours)}={id_}")
        raws = raws[length:]
    return "snap:" * snap + ",".join(entries)


@dataclass(frozen=True)
class Encoding:
    """One table from raw mask values to class ids."""

    # indices (value = class), palette (indices of palette PNGs), binary (0 and 255), values, colours
    kind: str
    num_classes: int
    ignore_index: int  # the id of pixels that count nowhere; any int that is no class id
    table: tuple[tuple[int, int], ...]  # (raw, id), ascending; the first raw of an id is what `decode` writes
    snap: bool = False  # a raw value outside the table becomes the nearest one in it
    # of kind palette: 0xRRGGBB by index, for `decode`
    palette: tuple[int, ...] = field(default=(), repr=False)
    ranges: tuple[tuple[int, int, int, int], ...] = ()  # (lowest raw, highest raw, id of the lowest, id step)

    @property
    def dtype(self) -> np.dtype:
        """uint8 when every id and ignore_index fit, else int64."""
        return np.dtype(np.uint8 if self.num_classes <= 256 and 0 <= self.ignore_index <= 255 else np.int64)

    @property
    def as_colours(self) -> bool:
        """True when palette masks are to be read as the colours that they show."""
        return self.kind == "colours"

    @property
    def is_dense(self) -> bool:
        """True when raw values lie side by side: damage turns one into another, which nobody notices."""
        if self.as_colours:
            return False
        return bool(self.ranges) or bool((np.diff([raw for raw, _ in self.table]) == 1).any())

    def lookup(self, raws: np.ndarray) -> np.ndarray:
        """Class ids of raw values of any shape, int64; UNKNOWN for those that have none."""
        raws, ids = np.asarray(raws), np.full(np.shape(raws), UNKNOWN)
        if self.table:
            known, own = np.array(self.table, np.int64).T
            if self.snap:
                values, inverse = np.unique(raws, return_inverse=True)
                raws = nearest(values, known, self.as_colours)[0][inverse].reshape(raws.shape)
            found = np.searchsorted(known, raws).clip(max=len(known) - 1)
            ids = np.where(known[found] == raws, own[found], UNKNOWN)
        for low, high, first, step in self.ranges:
            inside = (ids == UNKNOWN) & (raws >= low) & (raws <= high)
            ids = np.where(inside, first + step * (raws.astype(np.int64) - low), ids)
        return ids

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Class ids (H, W), uint8 or int64, of a raw mask as `read_mask` gives it.

        Raises:
            ValueError: the mask holds values that the table lacks; says which and how many.
        """
        if self.as_colours:
            keys = pack(raw) if raw.ndim == 3 else pack_greys(raw)
        elif raw.ndim == 2 or (raw == raw[..., :1]).all():
            keys = raw if raw.ndim == 2 else raw[..., 0]
        else:
            raise ValueError(f"holds colours, but the masks are read as {self.describe()}.")
        ids = self.lookup(np.arange(256) if keys.dtype == np.uint8 else keys)
        ids, unknown = ids.astype(self.dtype), ids == UNKNOWN
        if keys.dtype == np.uint8:  # one byte per pixel throughout
            ids, unknown = ids.take(keys), unknown.take(keys)
        if unknown.any():
            strays = listing(Counter(keys[unknown].tolist()), self.as_colours)
            raise ValueError(f"holds {strays}; known are {self.describe()}.")
        return ids

    def decode(self, ids: np.ndarray) -> Image.Image:
        """The image to save so that a file is encoded as the training masks were: the inverse of `encode`.

        Raises:
            ValueError: an id has no raw value, or the value fits no PNG.
        """
        inverse = {}
        for low, high, first, step in reversed(self.ranges):
            inverse |= {first + step * i: low + i for i in range(high - low + 1 if step else 1)}
        inverse |= {id_: raw for raw, id_ in reversed(self.table)}
        reverse = Encoding("values", self.num_classes, self.ignore_index, tuple(sorted(inverse.items())))
        raws = reverse.lookup(ids)
        if (missing := np.unique(ids[raws == UNKNOWN])).size:
            raise ValueError(f"class ids {missing} have no value in {self.describe()}. Use encoding index.")
        if self.as_colours:
            return Image.fromarray((raws[..., None] >> [16, 8, 0]).astype(np.uint8))
        own = [raw for id_, raw in inverse.items() if id_ != self.ignore_index]
        lowest, largest = min(own), max(own)  # so that all files of a set are of one type
        if lowest < 0 or largest > 65535:
            raise ValueError(f"mask values {lowest}..{largest} fit no PNG (0..65535). Use encoding index.")
        mask = Image.fromarray(raws.astype(np.uint8 if largest <= 255 else np.uint16))
        if self.kind == "palette":
            mask.putpalette([raw >> s & 255 for raw in self.palette for s in (16, 8, 0)])
        return mask

    def to_dict(self) -> dict:
        """Plain values, for a checkpoint."""
        values = json.loads(json.dumps(asdict(self)))
        if not self.ranges:  # so that runs without them keep their fingerprint
            del values["ranges"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "Encoding":
        """Inverse of `to_dict`."""
        rows = {name: tuple(map(tuple, values.get(name, ()))) for name in ("table", "ranges")}
        return cls(**{**values, **rows, "palette": tuple(values["palette"])})

    def describe(self) -> str:
        """One line for the user."""
        if self.kind in ("indices", "palette"):
            name = "palette" if self.kind == "palette" else "class"
            line = f"{name} indices 0..{self.num_classes - 1}, {self.ignore_index} ignored"
        else:
            named = [(raw_name(raw, self.as_colours), id_, id_) for raw, id_ in self.table]
            named += [
                (f"{low}-{high}", id_, id_ + step * (high - low)) for low, high, id_, step in self.ranges
            ]
            shown = [f"{name} → {self._id_name(first, last)}" for name, first, last in named]
            line = f"{'colours' if self.kind == 'colours' else 'values'} {shorten(shown)}"
        return line + (", strays to the nearest" if self.snap else "")

    def _id_name(self, first: int, last: int) -> str:
        return "ignored" if first == self.ignore_index else f"{first}-{last}" if first != last else str(first)


def pack(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 → int32 0xRRGGBB."""
    return rgb[..., 0].astype(np.int32) << 16 | rgb[..., 1].astype(np.int32) << 8 | rgb[..., 2]


def pack_all(colours: Colours | None) -> list[int]:
    """(r, g, b), ... or None, as 0xRRGGBB."""
    return pack(np.array(colours or [], np.uint8).reshape(-1, 3)).tolist()


def pack_greys(values: np.ndarray) -> np.ndarray:
    """Values → the greys that they show; UNKNOWN for a value that is not a byte."""
    return np.where((values >= 0) & (values <= 255), values.astype(np.int64) * 0x010101, UNKNOWN)


def nearest(raws: np.ndarray, known: Iterable[int], colours: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each of raws (N,) the nearest known one, the first of equally near ones, and its distance."""

    def points(raws: np.ndarray) -> np.ndarray:
        return raws[:, None] >> [16, 8, 0] & 255 if colours else raws[:, None]

    raws, known = raws.astype(np.int64), np.array(list(known), np.int64)
    found, distance = raws.copy(), np.full(len(raws), np.inf)
    for raw, point in zip(known, points(known), strict=True):  # one at a time: raws may be millions
        apart = np.linalg.norm(points(raws) - point, axis=1)
        found[apart < distance] = raw
        distance = np.minimum(distance, apart)
    return np.where(raws == UNKNOWN, raws, found), distance


def raw_name(raw: int, colours: bool) -> str:
    """A raw value as the user writes it in `labels`."""
    return str(raw) if not colours else f"#{raw:06x}" if raw >= 0 else "beyond 0..255"


def shorten(names: list, most: int = SHOWN) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(map(str, names[:most])) + f" and {len(names) - most} more" * (len(names) > most)


def listing(counts: Counter, colours: bool, total: int = 0) -> str:
    """'value 7 (12 px)' or, as fractions of a total, 'values 7 (3.1%), 9 (0.2%) and 5 more'."""
    sizes = ((raw, f"{count / total:.1%}" if total else f"{count} px") for raw, count in counts.most_common())
    named = [f"{raw_name(raw, colours)} ({size})" for raw, size in sizes]
    return f"{'colour' if colours else 'value'}{'s' * (len(named) > 1)} {shorten(named)}"


@dataclass
class MaskStats:
    """The values of one mask, counted."""

    kind: str  # grey (an RGB file that shows greys alone is one), palette or colour
    keys: list[int]  # the raw values (packed colours for colour), ascending
    counts: list[int]  # pixels of each
    colours: list[int] | None = None  # of a palette: the packed colour of each key
    damage: str = ""  # what may have altered values unseen, see `reading.load_mask`

    def read_as(self, colours: bool) -> list[int]:
        """The keys as packed colours, or as values."""
        if colours and self.kind == "grey":
            return pack_greys(np.array(self.keys)).tolist()
        return self.colours if colours and self.kind == "palette" else self.keys
