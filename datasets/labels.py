"""Mask encodings: which raw value or colour in a mask file means which class, both ways.

An `Encoding` is one table from raw values to class ids. Values are the numbers of a grey mask or the indices
of a palette mask; colours are packed as 0xRRGGBB. `choose_encoding` finds the table by looking at all masks
of all splits together.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from PIL import Image

Colours = Sequence[tuple[int, int, int]]  # (r, g, b) a class

UNKNOWN = np.iinfo(np.int64).min  # class id of a raw value without one; colour of a value that is no grey
NEAR = 40  # how far damage (JPEG, smoothing) moves most of the values that it moves
RARE = 0.005  # of all pixels; what is far from every declared value and more common is no damage
MOST_COLOURS = 256  # in masks that are drawn; more are shades, made by damage
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
    table: dict[int, int | None] = {}
    parts = [part.strip() for part in rest.removeprefix("snap:").split(",") if part.strip()]
    for part in parts:
        match = re.fullmatch(r"(#[0-9a-f]{6}|-?\d+)\s*=\s*(\d+|ignore)", part)
        raw = match and int(match[1].lstrip("#"), 16 if part.startswith("#") else 10)
        if raw is None or not -65536 < raw < 2**24:
            raise ValueError(
                f"labels has '{part}'; wanted 'auto', 'snap', or a map such as '0=0,128=1,255=ignore' or "
                "'#000000=0,#ff0000=1'. Write VALUE=CLASS (values -65535 to 16777215) or #RRGGBB=CLASS."
            )
        if raw in table:
            raise ValueError(f"labels names {match[1]} twice. Give each value or colour one class.")
        table[raw] = None if match[2] == "ignore" else int(match[2])
    kinds = {part.startswith("#") for part in parts}
    if not kinds:
        raise ValueError("labels is empty; wanted 'auto', 'snap', or a map such as '0=0,255=1'.")
    if len(kinds) == 2:
        raise ValueError("labels mixes values and #colours. Use the one that the mask files hold.")
    return LabelMap(rest.startswith("snap:"), kinds.pop(), tuple(table.items()))


def write_labels(table: dict[int, int | None], colours: bool, snap: bool = False) -> str:
    """The setting `labels` that `parse_labels` reads as this table of raw values and their class ids."""
    ids = {raw: "ignore" if table[raw] is None else table[raw] for raw in sorted(table)}
    return "snap:" * snap + ",".join(f"{raw_name(raw, colours)}={ids[raw]}" for raw in ids)


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

    @property
    def dtype(self) -> np.dtype:
        """uint8 when every id and ignore_index fit, else int64."""
        return np.dtype(np.uint8 if self.num_classes <= 256 and 0 <= self.ignore_index <= 255 else np.int64)

    @property
    def as_colours(self) -> bool:
        """True when palette masks are to be read as colours."""
        return self.kind == "colours"

    @property
    def is_dense(self) -> bool:
        """True when raw values lie side by side: what damages one makes another of it, which nobody sees."""
        return not self.as_colours and bool((np.diff([raw for raw, _ in self.table]) == 1).any())

    def lookup(self, raws: np.ndarray) -> np.ndarray:
        """Class ids of raw values of any shape, int64; UNKNOWN for those that have none."""
        known, ids = np.array(self.table, np.int64).T
        if self.snap:
            values, inverse = np.unique(raws, return_inverse=True)
            raws = nearest(values, known, self.as_colours)[0][inverse].reshape(raws.shape)
        found = np.searchsorted(known, raws).clip(max=len(known) - 1)
        return np.where(known[found] == raws, ids[found], UNKNOWN)

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
        if keys.dtype == np.uint8:  # one byte a pixel all the way
            ids, unknown = ids.take(keys), unknown.take(keys)
        if unknown.any():
            strays = listing(Counter(keys[unknown].tolist()), self.as_colours)
            raise ValueError(f"holds {strays}; known are {self.describe()}.")
        return ids

    def decode(self, ids: np.ndarray) -> Image.Image:
        """The picture to save so that a file is encoded as the training masks were: the inverse of `encode`.

        Raises:
            ValueError: an id has no raw value, or the value fits no PNG.
        """
        inverse = {id_: raw for raw, id_ in reversed(self.table)}
        raws = replace(self, table=tuple(sorted(inverse.items())), snap=False).lookup(ids)
        if (missing := np.unique(ids[raws == UNKNOWN])).size:
            raise ValueError(f"class ids {missing} have no value in {self.describe()}. Use encoding index.")
        if self.as_colours:
            return Image.fromarray((raws[..., None] >> [16, 8, 0]).astype(np.uint8))
        own = [raw for raw, id_ in self.table if id_ != self.ignore_index]
        lowest, largest = own[0], own[-1]  # so that all files of a set are of one type
        if lowest < 0 or largest > 65535:
            raise ValueError(f"mask values {lowest}..{largest} fit no PNG (0..65535). Use encoding index.")
        picture = Image.fromarray(raws.astype(np.uint8 if largest <= 255 else np.uint16))
        if self.kind == "palette":
            picture.putpalette([raw >> s & 255 for raw in self.palette for s in (16, 8, 0)])
        return picture

    def to_dict(self) -> dict:
        """Plain values, for a checkpoint."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict) -> "Encoding":
        """Inverse of `to_dict`."""
        rows = {"table": tuple(map(tuple, values["table"])), "palette": tuple(values["palette"])}
        return cls(**{**values, **rows})

    def describe(self) -> str:
        """One line for the user."""
        if self.kind in ("indices", "palette"):
            what = "palette" if self.kind == "palette" else "class"
            line = f"{what} indices 0..{self.num_classes - 1}, {self.ignore_index} ignored"
        else:
            named = ((raw, "ignored" if id_ == self.ignore_index else id_) for raw, id_ in self.table)
            shown = [f"{raw_name(raw, self.as_colours)} → {id_}" for raw, id_ in named]
            line = f"{'colours' if self.as_colours else 'values'} {_some(shown)}"
        return line + (", strays to the nearest" if self.snap else "")


def pack(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 → int32 0xRRGGBB."""
    return rgb[..., 0].astype(np.int32) << 16 | rgb[..., 1].astype(np.int32) << 8 | rgb[..., 2]


def pack_all(colours: Colours | None) -> list[int]:
    """(r, g, b), ... or None, as 0xRRGGBB."""
    return pack(np.array(colours or [], np.uint8).reshape(-1, 3)).tolist()


def pack_greys(values: np.ndarray) -> np.ndarray:
    """Values → the greys that they show; UNKNOWN for what is no byte."""
    return np.where((values >= 0) & (values <= 255), values.astype(np.int64) * 0x010101, UNKNOWN)


def nearest(raws: np.ndarray, known: Iterable[int], colours: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each of raws (N,) the nearest known one, of equally near ones the first, and how far it is."""

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


def _some(names: list, most: int = SHOWN) -> str:
    return ", ".join(map(str, names[:most])) + f" and {len(names) - most} more" * (len(names) > most)


def listing(counts: Counter, colours: bool, total: int = 0) -> str:
    """'value 7 (12 px)' or, by their share of a total, 'values 7 (3.1%), 9 (0.2%) and 5 more'."""
    sizes = ((raw, f"{count / total:.1%}" if total else f"{count} px") for raw, count in counts.most_common())
    named = [f"{raw_name(raw, colours)} ({size})" for raw, size in sizes]
    return f"{'colour' if colours else 'value'}{'s' * (len(named) > 1)} {_some(named)}"


@dataclass
class MaskStats:
    """What was counted in one mask."""

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


def choose_encoding(
    masks: list[MaskStats],
    num_classes: int,
    ignore_index: int,
    labels: str = "auto",
    class_colors: Colours | None = None,
) -> tuple[Encoding, list[str]]:
    """The one encoding of all masks of all splits, and warnings about it.

    `masks` is what was counted in each mask; the other arguments are those of `preflight.check_data`.

    Raises:
        ValueError: no encoding fits; the message names what was found and a map to start from.
    """
    wanted = parse_labels(labels)
    if 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index is {ignore_index}, a class id (0..{num_classes - 1}). Take another.")
    colours = wanted.colours or any(mask.kind == "colour" for mask in masks)
    counts: Counter = Counter()
    for mask in masks:
        for key, count in zip(mask.read_as(colours), mask.counts, strict=True):
            counts[key] += count
    try:
        return _choose(masks, counts, colours, num_classes, ignore_index, wanted, pack_all(class_colors))
    except ValueError as error:
        is_rough, own = colours and _is_damaged(masks, counts), range(num_classes)
        groups = _join_shades(counts, num_classes + SHOWN) if is_rough else counts
        common = [raw for raw, _ in groups.most_common(num_classes + (4 if is_rough else SHOWN))]
        classes = own if not colours and set(own) <= set(counts) else sorted(common[:num_classes])
        table = dict.fromkeys(common) | {raw: i for i, raw in enumerate(classes)}
        held = listing(counts, colours, counts.total())
        start = write_labels(table, colours, wanted.snap or is_rough)
        message = f"{error} The masks hold {held}; a map to start from: labels '{start}'."
        raise ValueError(message) from None


def _choose(
    masks: list[MaskStats],
    counts: Counter,
    colours: bool,
    num_classes: int,
    ignore_index: int,
    wanted: LabelMap,
    declared: list[int],
) -> tuple[Encoding, list[str]]:
    """As `choose_encoding`; what is wrong is said without what the masks hold."""
    table, meant, warnings, palette = dict(wanted.table), {}, [], ()
    if colours and table and not wanted.colours:
        raise ValueError("labels maps values, but there are colours, which want to be mapped too.")
    if colours:
        kind, named = "colours", set(table.values())
        meant = {raw: i for i, raw in enumerate(declared) if i not in named and raw not in table}
        table |= meant
        if not table:
            raise ValueError("nothing says which class each colour is: set class_colors, or labels.")
    elif table:
        kind = "values"
    else:
        kind, table = _find_values(masks, counts, num_classes, ignore_index, wanted.snap)
        shown = {0: 0, 255: 0xFFFFFF} if kind == "binary" else _one_palette(masks)
        if kind == "indices" and shown:
            kind, palette = "palette", tuple(shown.get(i, 0) for i in range(max(shown) + 1))
        name = "value" if kind == "binary" else "palette index"
        own = {colour: id_ for id_, colour in enumerate(declared)}
        for raw, colour in shown.items():
            if table.get(raw) is not None and own.get(colour, table[raw]) != table[raw]:
                warnings.append(
                    f"{name} {raw} shows #{colour:06x}, which class_colors gives to class {own[colour]}; the "
                    f"{name} counts. If the colour should, map #colours in labels"
                )
    ids = set(table.values()) - {None, ignore_index}
    if beyond := ids - set(range(num_classes)):
        raise ValueError(f"labels names class {max(beyond)}; ids of num_classes {num_classes} end before it.")
    if missing := sorted(set(range(num_classes)) - ids):
        raise ValueError(
            f"nothing stands for class {_some(missing)}. Name its value or colour in labels (and each "
            "class's own in class_colors), or lower num_classes."
        )
    reach = NEAR if wanted.snap or _is_damaged(masks, counts) else 0
    if meant and (share := _share_beyond(reach, counts, table, meant)):
        raise ValueError(
            f"class_colors are not the colours that the masks hold: {share:.0%} of pixels show none of "
            "them. Set class_colors to what the masks hold, or map those colours in labels."
        )
    rows = sorted((raw, ignore_index if id_ is None else id_) for raw, id_ in table.items())
    snap = wanted.snap and kind not in ("indices", "palette")  # between ids that lie 1 apart nothing is near
    encoding = Encoding(kind, num_classes, ignore_index, tuple(rows), snap, palette)
    if snap:
        total = counts.total()
        common = np.array([raw for raw, count in counts.items() if count > RARE * total])
        far = common[nearest(common, dict(rows), colours)[1] > NEAR].tolist()
        if large := Counter({raw: counts[raw] for raw in far}):  # damage is near, or rare
            raise ValueError(
                f"{listing(large, colours, total)}: too common and too far from every declared "
                "value to be damage. Declare them in labels, as a class or ignore."
            )
    return encoding, warnings[:1]


def _is_damaged(masks: list[MaskStats], counts: Counter) -> bool:
    """True when a colour may be a shade of another: a file says so, or nobody draws with so many."""
    return any(mask.damage for mask in masks) or len(counts) > MOST_COLOURS


def _join_shades(counts: Counter, most: int) -> Counter:
    """The commonest colours, each with the pixels of those near it, which are left out as its shades."""
    left, groups = np.array([raw for raw, _ in counts.most_common()]), Counter()
    while left.size and len(groups) < most:
        is_near = nearest(left, left[:1], colours=True)[1] <= NEAR
        groups[int(left[0])] = sum(counts[raw] for raw in left[is_near].tolist())
        left = left[~is_near]
    return groups


def _share_beyond(reach: int, counts: Counter, known: dict, declared: dict) -> float:
    """The share of pixels of no known colour, where the declared ones must be another set's; else 0."""
    found, distance = nearest(np.array([*counts]), known, colours=True)
    pixels, is_known = np.array([*counts.values()]), distance <= reach
    strays, total = pixels[~is_known].sum(), pixels.sum()
    absent = set(declared) - set(found[is_known].tolist())
    if 2 * len(absent) >= len(declared):
        total -= pixels.max()  # black is the background nearly everywhere
    return strays / pixels.sum() if absent and 2 * strays > total else 0


def _find_values(
    masks: list[MaskStats], counts: Counter, num_classes: int, ignore_index: int, snap: bool
) -> tuple[str, dict]:
    """Class indices, or 0 and 255, from all values of all masks."""
    indices: dict[int, int | None] = {i: i for i in range(num_classes)}
    if ignore_index >= 0:
        indices[ignore_index] = None
    values, strays = set(counts), set(counts) - set(indices)
    only_ends = values == {0, 255}
    if values == {0, 1, 255} and not any({1, 255} <= set(mask.keys) for mask in masks):
        raise ValueError(
            "some masks hold 0 and 1, others 0 and 255, none all three: 255 may be a class or ignored. "
            "Say which: labels '0=0,1=1,255=1' or '0=0,1=1,255=ignore'."
        )
    if not strays and not only_ends:
        return "indices", indices
    ends = sum(count for value, count in counts.items() if min(abs(value), abs(value - 255)) <= NEAR)
    bright = any(abs(value - 255) <= NEAR for value in values)
    damaged = snap or only_ends or len(values) > 8 or any(mask.damage for mask in masks)
    if num_classes == 2 and bright and damaged and ends >= 0.8 * counts.total():
        return "binary", {0: 0, 255: 1}  # strays are snapped, or named file by file
    if snap:
        raise ValueError("labels is 'snap', but class ids lie 1 apart: name the values.")
    from_one = 0 not in values and num_classes in values
    if only_ends or from_one or (len(values) <= 64 and 2 * len(strays) >= len(values)):
        raise ValueError(
            f"num_classes {num_classes} wants ids 0..{num_classes - 1}, and {ignore_index} for ignored. "
            "Set num_classes right, or name the values."
        )
    return "indices", indices  # a few strays, which are named file by file


def _one_palette(masks: list[MaskStats]) -> dict[int, int]:
    """The colour of each palette index in use; an index of two colours may be two classes, and is refused."""
    seen = sorted({row for mask in masks for row in zip(mask.keys, mask.colours or [], strict=False)})
    for (index, colour), (again, other) in zip(seen, seen[1:], strict=False):
        if index == again:
            raise ValueError(
                f"palettes differ between masks: index {index} is #{colour:06x} in one and #{other:06x} in "
                "another. Map values in labels if the indices count, or #colours if the colours do."
            )
    return dict(seen)
