"""Pictures of masks and of training: palette, overlays, legends, panels, curves and the final report.

Arrays and plain values in, a `PIL.Image` out; nothing here touches the disk. Pictures are uint8 (H, W) or
(H, W, C): one channel is shown as grey, of more than three the first three. Class ids are integers (H, W);
an id that is `ignore_index`, or no class at all, is drawn in the grey `IGNORED`. A class whose colour is
black is not painted by overlays, so that a background leaves the picture as it is.
"""

import colorsys
import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]  # red, green, blue, 0 to 255
Palette = Sequence[Sequence[int]]  # one such colour a class
Sample = tuple[np.ndarray, np.ndarray, np.ndarray, str]  # picture, truth, prediction, caption

IGNORED = (160, 160, 160)
WRONG = (213, 50, 40)
PAGE, INK, FAINT = (255, 255, 255), (38, 42, 48), (112, 118, 126)
TRAIN_COLOR, VAL_COLOR = "#3778b8", "#d1662a"
WIDTH = 1280  # of the report, in pixels
GAP = 8

# Distinct for the colour-blind too: seven of Okabe and Ito (2008), then four of Paul Tol's muted scheme.
FIRST_COLORS: list[Color] = [
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167), (136, 34, 85), (153, 153, 51), (51, 34, 136), (221, 221, 221),
]  # fmt: skip


# --- palette and masks ---


def default_palette(num_classes: int) -> list[Color]:
    """Give `num_classes` distinct (r, g, b): black for class 0, then a fixed sequence."""
    colors = [(0, 0, 0), *FIRST_COLORS]
    known = {*colors, IGNORED}
    step = 0
    while len(colors) < num_classes:  # hues by the golden ratio, so that neighbours in the list lie far apart
        light, strength = (0.92, 0.68, 0.45)[step % 3], (0.85, 0.50)[step // 3 % 2]
        color = colorsys.hsv_to_rgb(step * 0.618034 % 1, strength * 0.98 ** (step // 2000), light)
        color = tuple(round(255 * value) for value in color)
        if color not in known:
            known.add(color)
            colors.append(color)
        step += 1
    return colors[:num_classes]


def colorize(ids: np.ndarray, palette: Palette, ignore_index: int | None = None) -> np.ndarray:
    """Paint class ids (H, W) in the palette's colours, uint8 (H, W, 3)."""
    known = (ids >= 0) & (ids < len(palette))
    if ignore_index is not None:
        known &= ids != ignore_index
    picture = np.array(palette, dtype=np.uint8)[np.where(known, ids, 0)]
    picture[~known] = IGNORED
    return picture


def mask_image(ids: np.ndarray, palette: Palette) -> Image.Image:
    """Make the picture to save as a PNG: ids as palette indices up to 256 classes, as 16-bit grey above.

    Raises:
        ValueError: if an id does not fit, which would otherwise come back as another class.
    """
    wide = len(palette) > 256
    limit = 65535 if wide else 255
    if ids.size and (ids.min() < 0 or ids.max() > limit):
        raise ValueError(
            f"a mask of {len(palette)} classes holds ids 0..{limit}; got {ids.min()}..{ids.max()}. "
            "Map ids outside the classes to ignore_index before saving."
        )
    if wide:
        return Image.fromarray(ids.astype(np.uint16))
    picture = Image.fromarray(ids.astype(np.uint8))
    # All 256 entries, so that PNG keeps eight bits a pixel and ids beyond the classes survive.
    colors = [*palette, *[IGNORED] * (256 - len(palette))]
    picture.putpalette([value for color in colors for value in color])
    return picture


def overlay(
    image: np.ndarray,
    ids: np.ndarray,
    palette: Palette,
    alpha: float = 0.5,
    ignore_index: int | None = None,
) -> Image.Image:
    """Lay the classes' colours over a picture, with a line of full colour where two classes meet.

    Args:
        image: uint8 (H, W) or (H, W, C).
        ids: class ids (H, W).
        palette: one (r, g, b) a class; a black class is not painted.
        alpha: share of the colour, 0 to 1.
        ignore_index: id that is no class, drawn in grey.
    """
    picture = _rgb(image)
    line = max(1, round(min(ids.shape) / 400))
    strength = np.full(ids.shape, round(256 * alpha), dtype=np.uint16)
    for near, far in (
        (np.s_[:, :-line], np.s_[:, line:]),
        (np.s_[:-line], np.s_[line:]),
    ):
        meets = ids[near] != ids[far]
        strength[near][meets] = 256
        strength[far][meets] = 256
    result = np.empty_like(picture)
    for top in range(0, len(ids), 512):  # in strips: the products need four times the picture's memory
        rows = slice(top, top + 512)
        color = colorize(ids[rows], palette, ignore_index)
        share = (strength[rows] * color.any(-1))[..., None]
        result[rows] = (picture[rows] * (256 - share) + color * share) >> 8
    return Image.fromarray(result)


def with_legend(
    picture: Image.Image,
    class_names: Sequence[str],
    palette: Palette,
    shares: Sequence[float] | None = None,
) -> Image.Image:
    """Put a strip with a swatch and a name a class under a picture.

    Args:
        picture: a `PIL.Image` of any size.
        class_names: the names to list.
        palette: one (r, g, b) a name.
        shares: fraction of the pixels a name, printed as a percentage; names with none are left out.
    """
    entries = [(str(name), color) for name, color in zip(class_names, palette, strict=False)]
    if shares is not None:
        entries = [
            (f"{name} {100 * share:.1f} %", color)
            for (name, color), share in zip(entries, shares, strict=True)
            if share > 0
        ]
    size = min(64, max(13, round(max(picture.size) / 55)))
    return _stack([picture.convert("RGB"), _legend(entries, max(picture.width, 15 * size), size)], gap=0)


# --- panels ---


def sample_panels(
    rows: Sequence[Sample],
    class_names: Sequence[str],
    palette: Palette,
    ignore_index: int | None = None,
    tile_width: int | None = None,
    legend: bool = True,
) -> Image.Image:
    """Show pictures beside what they hold and what was found: picture, truth, prediction, errors.

    Args:
        rows: (image, truth ids, predicted ids, caption) each; all of one size within a row.
        class_names: names for the legend.
        palette: one (r, g, b) a class.
        ignore_index: id of pixels that do not count, grey in truth and errors.
        tile_width: width of each picture in the panel; None takes it from the widest picture, within limits.
        legend: whether to add the legend.
    """
    tile_width = tile_width or min(300, max(180, *(image.shape[1] for image, *_ in rows)))
    lines = [_captions(["picture", "truth", "prediction", "errors"], tile_width, 15, INK)]
    ignored = False
    for image, truth, preds, caption in rows:
        counted = (truth >= 0) & (truth < len(palette))
        if ignore_index is not None:
            counted &= truth != ignore_index
        ignored |= not counted.all()
        errors = (_rgb(image).mean(-1, keepdims=True) * 0.35 + 160).astype(np.uint8).repeat(3, -1)
        errors[counted & (truth != preds)] = WRONG
        errors[~counted] = IGNORED
        tiles = [_rgb(image), *(colorize(ids, palette, ignore_index) for ids in (truth, preds)), errors]
        lines.append(_tile_row(tiles, tile_width))
        lines.append(_captions([caption], 4 * (tile_width + GAP) - GAP, 12, FAINT))
    if legend:
        lines.append(_legend(_legend_entries(class_names, palette, ignored), lines[0].width, 14))
    return _stack(lines, margin=GAP)


def augmented_panel(
    images: np.ndarray,
    masks: np.ndarray,
    class_names: Sequence[str],
    palette: Palette,
    ignore_index: int | None = None,
    limit: int = 8,
) -> Image.Image:
    """Show a batch as the network sees it, each picture beside its overlay, two pairs a line.

    Args:
        images: uint8 (N, H, W, C), after augmentation, before normalisation.
        masks: class ids (N, H, W).
        class_names: names for the legend.
        palette: one (r, g, b) a class.
        ignore_index: id of pixels that do not count.
        limit: show at most so many pictures.
    """
    pairs = list(zip(images, masks, strict=True))[:limit]
    tile_width = min(300, max(180, images[0].shape[1]))
    lines = [_captions(["picture", "with mask"] * min(2, len(pairs)), tile_width, 15, INK)]
    for first in range(0, len(pairs), 2):
        tiles = []
        for image, mask in pairs[first : first + 2]:
            tiles += [_rgb(image), np.asarray(overlay(image, mask, palette, ignore_index=ignore_index))]
        lines.append(_tile_row(tiles, tile_width))
    ignored = ignore_index is not None and any((mask == ignore_index).any() for _, mask in pairs)
    lines.append(_legend(_legend_entries(class_names, palette, ignored), lines[0].width, 14))
    return _stack(lines, margin=GAP)


# --- curves and report ---


def draw_curves(
    rows: Sequence[Mapping[str, Any]], lr_plan: Sequence[Sequence[float]] | None = None
) -> Image.Image:
    """Draw loss, mean IoU, mean Dice and learning rate over the epochs.

    Args:
        rows: one dict an epoch, as `csv.DictReader` gives it; empty, missing and NaN values are gaps.
        lr_plan: (epoch, learning rate) points of the whole schedule, drawn as a faint line.
    """

    def draw(figure):
        axes = figure.subplots(2, 2)
        _draw_lines(axes[0, 0], rows, "Loss", {"train": "train_loss", "validation": "val_loss"})
        _draw_lines(axes[0, 1], rows, "Mean IoU", {"validation": "mean_iou"})
        _draw_lines(axes[1, 0], rows, "Mean Dice", {"validation": "mean_dice"})
        _draw_lines(axes[1, 1], rows, "Learning rate", {"used": "learning_rate"}, lr_plan)

    margins = {"left": 0.055, "right": 0.985, "top": 0.95, "bottom": 0.075, "hspace": 0.34, "wspace": 0.16}
    return _render(1100, 760, draw, margins)


def draw_report(
    rows: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    palette: Palette,
    iou: Sequence[float],
    dice: Sequence[float],
    counts: np.ndarray,
    best_rows: Sequence[Sample],
    worst_rows: Sequence[Sample],
    title: str,
    subtitle: str = "",
    ignore_index: int | None = None,
    lr_plan: Sequence[Sequence[float]] | None = None,
) -> Image.Image:
    """Draw a run as one page: scores, curves, a bar a class, confusion matrix, best and worst pictures.

    Args:
        rows: one dict an epoch, as for `draw_curves`.
        class_names: one name a class.
        palette: one (r, g, b) a class.
        iou: (C,) with NaN where a class is neither present nor predicted.
        dice: (C,) likewise.
        counts: the confusion matrix (C, C), truth down, prediction across, in pixels.
        best_rows: (image, truth ids, predicted ids, caption) each, as for `sample_panels`; may be empty.
        worst_rows: likewise.
        title: the run's name.
        subtitle: one line of what ran.
        ignore_index: id of pixels that do not count.
        lr_plan: as for `draw_curves`.
    """
    counts = np.asarray(counts, dtype=np.float64)
    names = [" ".join(str(name).split()) for name in class_names]
    accuracy = counts.trace() / counts.sum() if counts.sum() else math.nan
    scores = {"mean IoU": _mean(iou), "mean Dice": _mean(dice), "pixel accuracy": accuracy}

    def draw_training(figure):
        axes = figure.subplots(1, 3)
        _draw_lines(axes[0], rows, "Loss", {"train": "train_loss", "validation": "val_loss"})
        _draw_lines(axes[1], rows, "Validation scores", {"mean IoU": "mean_iou", "mean Dice": "mean_dice"})
        _draw_lines(axes[2], rows, "Learning rate", {"used": "learning_rate"}, lr_plan)

    def draw_classes(figure):
        bars, matrix = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_bars(bars, names, palette, np.asarray(iou, dtype=float), np.asarray(dice, dtype=float))
        _draw_matrix(matrix, names, counts)

    margins = {"left": 0.045, "right": 0.985, "top": 0.88, "bottom": 0.18, "wspace": 0.2}
    parts = [
        _heading(title, subtitle, scores),
        _render(WIDTH, 300, draw_training, margins),
        _render(WIDTH, min(900, max(430, 110 + 20 * len(names))), draw_classes),
    ]
    halves, ignored = [], False
    for words, samples in (
        ("Best validation pictures", best_rows),
        ("Worst validation pictures", worst_rows),
    ):
        if samples:
            heading = _captions([words], WIDTH // 2 - 64, 16, INK, GAP)
            halves.append(
                _stack([heading, sample_panels(samples, names, palette, ignore_index, 142, legend=False)])
            )
            ignored |= any(
                (truth >= len(names)).any() or (truth == ignore_index).any() for _, truth, *_ in samples
            )
    if halves:
        samples = Image.new("RGB", (WIDTH, max(half.height for half in halves)), PAGE)
        for half, left in zip(halves, (20, WIDTH // 2 + 18), strict=False):
            samples.paste(half, (left, 0))
        parts += [samples, _legend(_legend_entries(names, palette, ignored), WIDTH, 15, 28)]
    return _stack(parts, gap=4)


# --- drawing with matplotlib; imported late, since it takes half a second ---


def _render(
    width: int, height: int, draw: Callable[[Any], None], margins: dict[str, float] | None = None
) -> Image.Image:
    """Let `draw(figure)` fill a white page of so many pixels; no pyplot, hence no global state.

    Margins are measured unless given: measuring doubles the time, and only long names need it.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    faint = _hex(FAINT)
    style = {
        "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": _hex(INK), "axes.labelcolor": faint,
        "axes.edgecolor": "#c4c8cd", "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 9,
        "axes.grid": False, "grid.color": "#e8eaed", "axes.axisbelow": True,
        "xtick.color": "#c4c8cd", "xtick.labelcolor": faint,
        "ytick.color": "#c4c8cd", "ytick.labelcolor": faint,
        "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.8, "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class name in a script the font lacks
        figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
        if margins:
            figure.subplots_adjust(**margins)
        else:
            figure.set_layout_engine("constrained", w_pad=0.18, h_pad=0.14)
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _draw_lines(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    title: str,
    keys: dict[str, str],
    plan: Sequence[Sequence[float]] | None = None,
) -> None:
    """Draw one panel of values over epochs; `keys` maps a line's label to its column."""
    from matplotlib.ticker import MaxNLocator

    if title == "Learning rate":
        axes.yaxis.set_major_formatter("{x:g}")  # small ones as 2e-05, not by a factor that covers the title
    if plan:
        axes.plot(*zip(*plan, strict=True), color="#c9ced4", linewidth=3, label="planned")
    scores = title not in ("Loss", "Learning rate")
    colors = [VAL_COLOR] if list(keys) == ["validation"] else [TRAIN_COLOR, VAL_COLOR]
    for (label, key), color in zip(keys.items(), colors, strict=False):
        points = [(_number(row.get("epoch")), _number(row.get(key))) for row in rows]
        points = [point for point in points if all(map(math.isfinite, point))]
        if not points:
            continue
        if scores:
            epoch, best = max(points, key=lambda point: point[1])
            axes.plot(epoch, best, "o", color=color, markersize=7, markerfacecolor="white", zorder=4)
            label = f"{label}, best {best:.3f} (epoch {epoch:g})"
        style = "o-" if len(points) <= 40 else "-"
        axes.plot(*zip(*points, strict=True), style, color=color, markersize=3.2, label=label)
    axes.set_title(title)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.03)
    axes.set_xlabel("epoch")
    if axes.lines:
        low, high = axes.get_xlim()
        if high - low < 1:  # a single epoch
            axes.set_xlim(math.floor(low), math.ceil(high))
        axes.set_ylim(0, 1.02 if scores else 1.04 * axes.get_ylim()[1])
        axes.legend(loc="best")
    else:
        axes.text(0.5, 0.5, "not measured yet", transform=axes.transAxes, ha="center", color="#9aa0a6")


def _draw_bars(axes: Any, names: list[str], palette: Palette, iou: np.ndarray, dice: np.ndarray) -> None:
    """Draw IoU and Dice of each class; of more than 40 classes the 40 lowest."""
    order, title = np.arange(len(names)), "Scores by class"
    if len(names) > 40:
        order = np.argsort(np.nan_to_num(iou, nan=2))[:40]
        title = f"Scores by class: the 40 lowest of {len(names)}"
    size = 9.5 if len(order) <= 20 else 8.5
    place, thick = np.arange(len(order)), 0.09 * min(4, len(order))
    axes.barh(place + thick / 2, np.nan_to_num(dice[order]), thick, color="#bcd3e8", label="Dice")
    axes.barh(place - thick / 2, np.nan_to_num(iou[order]), thick, color=TRAIN_COLOR, label="IoU")
    for y, i in zip(place, order, strict=True):
        absent = math.isnan(iou[i])
        words = "n/a" if absent else f"{iou[i]:.3f}" if len(order) > 20 else f"{iou[i]:.3f}  {dice[i]:.3f}"
        axes.text(1.02, y, words, va="center", fontsize=size, color="#9aa0a6" if absent else None)
        swatch = axes.scatter(-0.035, y, s=16 if len(order) > 20 else 46, marker="s", clip_on=False)
        swatch.set(color=[np.array(palette[i]) / 255], edgecolor="#888888", linewidth=0.4)
    labels = [_shorten(names[i], 22) for i in order]
    axes.set_yticks(place, labels, fontsize=size, color=_hex(INK))
    axes.tick_params(axis="y", length=0, pad=20)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, 1), ylim=(len(order) - 0.4, -0.6))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="x")
    axes.set_title(title)
    axes.legend(*[part[::-1] for part in axes.get_legend_handles_labels()], ncols=2, loc="upper right",
                bbox_to_anchor=(1.25, 1.13 if len(order) < 20 else 1.07))  # fmt: skip


def _draw_matrix(axes: Any, names: list[str], counts: np.ndarray) -> None:
    """Draw the confusion matrix in per cent of each true class; numbers up to 30 classes, names up to 40."""
    totals = counts.sum(1, keepdims=True)
    share = np.divide(100 * counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    axes.set_facecolor("#f1f2f4")  # shows through where a class is absent
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    classes = len(names)
    if classes <= 30:
        size = min(10, 190 / classes)
        for row, column in zip(*np.nonzero(np.nan_to_num(share) >= 0.5), strict=True):
            value = share[row, column]
            color = "white" if value > 55 else _hex(INK)
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=size, color=color)
    if classes <= 40:
        labels = [_shorten(name, 14) for name in names]
        size = min(9.5, 260 / classes)
        slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if classes > 3 else {}
        axes.set_xticks(range(classes), labels, fontsize=size, **slant)
        axes.set_yticks(range(classes), labels, fontsize=size)
    axes.tick_params(length=0)
    axes.set_anchor("N")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("Confusion matrix, % of each true class")
    axes.set(xlabel="predicted", ylabel="true")


# --- drawing with Pillow ---


@lru_cache(maxsize=64)
def _font(size: int, bold: bool = False) -> Any:
    """DejaVu Sans as matplotlib brings it (Latin, Greek, Cyrillic and more), found without importing that."""
    spec = importlib.util.find_spec("matplotlib")
    for folder in spec.submodule_search_locations if spec else []:
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / f"DejaVuSans{'-Bold' * bold}.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)


def _fitted(text: str, font: Any, width: float) -> str:
    """Cut a text to one line of so many pixels, with an ellipsis where it was longer."""
    text = " ".join(str(text).split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _legend(
    entries: Sequence[tuple[str, Sequence[int]]], width: int, size: int, pad: int | None = None
) -> Image.Image:
    """Lay (name, colour) entries out in columns of equal width on a strip."""
    font, pad, row = _font(size), pad or round(0.7 * size), round(1.75 * size)
    room = width - 2 * pad
    longest = max((font.getlength(" ".join(name.split())) for name, _ in entries), default=0)
    column = min(room, round(longest + 3.2 * size))
    columns = max(1, min(len(entries), room // column))
    strip = Image.new("RGB", (width, 2 * pad + row * math.ceil(len(entries) / columns)), PAGE)
    draw = ImageDraw.Draw(strip)
    for i, (name, color) in enumerate(entries):
        x, y = pad + i % columns * column, pad + i // columns * row
        edge = tuple(int(0.7 * value) for value in color)
        draw.rounded_rectangle(
            (x, y + row * 0.2, x + size, y + row * 0.2 + size), size * 0.18, tuple(color), edge
        )
        text = _fitted(name, font, column - 2 * size)
        draw.text((x + 1.5 * size, y + row * 0.2 + size / 2), text, INK, font, anchor="lm")
    return strip


def _legend_entries(
    class_names: Sequence[str], palette: Palette, ignored: bool
) -> list[tuple[str, Sequence[int]]]:
    entries = [(str(name), color) for name, color in zip(class_names, palette, strict=False)]
    return [*entries, ("ignored", IGNORED)] if ignored else entries


def _captions(texts: Sequence[str], tile_width: int, size: int, color: Color, left: int = 0) -> Image.Image:
    """One line of texts, each at the left edge of its tile."""
    strip = Image.new("RGB", (left + len(texts) * (tile_width + GAP) - GAP, round(1.5 * size)), PAGE)
    for i, text in enumerate(texts):
        font = _font(size, color == INK)
        place = (left + i * (tile_width + GAP), 0.75 * size)
        ImageDraw.Draw(strip).text(place, _fitted(text, font, tile_width), color, font, anchor="lm")
    return strip


def _tile_row(tiles: Sequence[np.ndarray], tile_width: int) -> Image.Image:
    """Pictures of one size side by side, fitted into tiles of this width and at most 1.4 times its height."""
    height, width = tiles[0].shape[:2]
    scale = min(tile_width / width, 1.4 * tile_width / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    strip = Image.new("RGB", (len(tiles) * (tile_width + GAP) - GAP, size[1]), PAGE)
    for i, tile in enumerate(tiles):
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
        strip.paste(Image.fromarray(tile).resize(size, how), (i * (tile_width + GAP), 0))
    return strip


def _heading(title: str, subtitle: str, scores: dict[str, float]) -> Image.Image:
    """The report's head: its title, and the scores in large figures at the right."""
    page = Image.new("RGB", (WIDTH, 104), PAGE)
    draw = ImageDraw.Draw(page)
    room = WIDTH - 64 - 170 * len(scores)
    draw.text((32, 46), _fitted(title, _font(30, True), room), INK, _font(30, True), anchor="lm")
    draw.text((32, 82), _fitted(subtitle, _font(15), room), FAINT, _font(15), anchor="lm")
    for i, (name, value) in enumerate(reversed(scores.items())):
        x = WIDTH - 32 - 170 * i
        draw.text((x, 46), "n/a" if math.isnan(value) else f"{value:.3f}", INK, _font(34, True), anchor="rm")
        draw.text((x, 82), name, FAINT, _font(15), anchor="rm")
    return page


def _stack(pictures: Sequence[Image.Image], gap: int = GAP, margin: int = 0) -> Image.Image:
    """Pictures under one another, at the left, on a white page."""
    width = max(picture.width for picture in pictures)
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    page = Image.new("RGB", (width + 2 * margin, height + 2 * margin), PAGE)
    top = margin
    for picture in pictures:
        page.paste(picture, (margin, top))
        top += picture.height + gap
    return page


def _rgb(image: np.ndarray) -> np.ndarray:
    """Any uint8 picture as (H, W, 3)."""
    image = image[..., None] if image.ndim == 2 else image
    return image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, -1)


def _hex(color: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _number(value: Any) -> float:
    """A cell of log.csv as a float; NaN where it is empty or missing."""
    return math.nan if value in (None, "") else float(value)


def _mean(values: Sequence[float]) -> float:
    values = np.asarray(values, dtype=float)
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
