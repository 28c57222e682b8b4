"""Images of masks and of training: palette, overlays, legends, panels, curves and the final report.

Arrays and plain values in, a `PIL.Image` out; nothing here touches the disk. Images are uint8 (H, W) or
(H, W, C): one channel is shown as grey, of more than three the first three. Class ids are integers (H, W);
`ignore_index`, and ids that are no class, are drawn in the grey `IGNORED`. Overlays do not draw a class
whose color is black, so that a background leaves the image as it is.
"""

import colorsys
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

Palette = Sequence[Sequence[int]]  # one color per class: red, green, blue, 0 to 255
Rows = Sequence[Mapping[str, float]]  # of log.csv, one per epoch; missing and NaN values are gaps
Plan = Sequence[tuple[float, float]]  # (epoch, learning rate) points of the whole schedule
Sample = tuple[np.ndarray, np.ndarray, np.ndarray, str]  # image, mask, prediction, caption


class Classes(NamedTuple):
    """Names and colors of the classes."""

    names: Sequence[str]
    palette: Palette
    ignore_index: int | None = None


IGNORED = (160, 160, 160)
WRONG = (213, 50, 40)
DARK, FAINT = "#262a30", "#70767e"  # text colors
TRAIN_COLOR, VAL_COLOR = "#3778b8", "#d1662a"
WIDTH = 1280  # of the report, pixels
GAP = 8

# Distinct for the color-blind too: seven of Okabe and Ito (2008), then four of Paul Tol's muted scheme.
FIRST_COLORS = [
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167), (136, 34, 85), (153, 153, 51), (51, 34, 136), (221, 221, 221),
]  # fmt: skip

CURVES = {  # title of a plot: {column of log.csv: label of its line}
    "Loss": {"train_loss": "train", "val_loss": "validation"},
    "Validation scores": {"mean_iou": "mean IoU", "mean_dice": "mean Dice"},
    "Learning rate": {"learning_rate": "used"},
}


def default_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Return `num_classes` distinct (r, g, b): black for class 0, then a fixed sequence."""
    colors = dict.fromkeys([(0, 0, 0), *FIRST_COLORS])  # in order, each once
    step = 0
    while len(colors) < num_classes:  # hues by the golden ratio, so that neighbours in the list lie far apart
        light, strength = (0.92, 0.68, 0.45)[step % 3], (0.85, 0.50)[step // 3 % 2]
        color = colorsys.hsv_to_rgb(step * 0.618034 % 1, strength * 0.98 ** (step // 2000), light)
        colors[tuple(round(255 * value) for value in color)] = None
        step += 1
    return list(colors)[:num_classes]


def colorize(ids: np.ndarray, palette: Palette, ignore_index: int | None = None) -> np.ndarray:
    """Return class ids (H, W) in the palette's colors, uint8 (H, W, 3)."""
    known = _counted(ids, palette, ignore_index)
    image = np.array(palette, dtype=np.uint8)[np.where(known, ids, 0)]
    image[~known] = IGNORED
    return image


def mask_image(ids: np.ndarray, palette: Palette) -> Image.Image:
    """Return the image to save as a PNG: ids as palette indices up to 256 classes, as 16-bit grey above.

    Raises:
        ValueError: an id does not fit, and would be read back as another class.
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
    image = Image.fromarray(ids.astype(np.uint8))
    # All 256 entries, so that PNG keeps eight bits per pixel and ids beyond the classes survive.
    colors = [*palette, *[IGNORED] * (256 - len(palette))]
    image.putpalette(np.array(colors, dtype=np.uint8).tobytes())
    return image


def overlay(
    image: np.ndarray, ids: np.ndarray, palette: Palette, ignore_index: int | None = None
) -> Image.Image:
    """Blend the classes' colors over an image, with a line of full color where two classes meet."""
    canvas = _rgb(image)
    line = max(1, round(min(ids.shape) / 400))
    strength = np.full(ids.shape, 128, dtype=np.uint16)  # of 256
    for near, far in ((np.s_[:, :-line], np.s_[:, line:]), (np.s_[:-line], np.s_[line:])):
        meets = ids[near] != ids[far]
        strength[near][meets] = strength[far][meets] = 256
    result = np.empty_like(canvas)
    for top in range(0, len(ids), 512):  # in strips: the products need four times the image's memory
        rows = slice(top, top + 512)
        color = colorize(ids[rows], palette, ignore_index)
        share = (strength[rows] * color.any(-1))[..., None]
        result[rows] = (canvas[rows] * (256 - share) + color * share) >> 8
    return Image.fromarray(result)


def with_legend(image: Image.Image, class_names: Sequence[str], palette: Palette) -> Image.Image:
    """Add a strip with a swatch and a name per class below an image."""
    size = min(64, max(13, round(max(image.size) / 55)))
    legend = _legend(Classes(class_names, palette), max(image.width, 15 * size), size)
    return _join([image.convert("RGB"), legend], gap=0)


def spread(total: int, count: int) -> list[int]:
    """Return at most `count` of `total` indices, evenly spaced: neighbors are often frames of one video."""
    count = min(count, total)
    return [total * place // count for place in range(count)]


def sample_panels(
    rows: Sequence[Sample], classes: Classes, tile_width: int | None = None, legend: bool = True
) -> Image.Image:
    """Show images beside their masks and predictions, one row per sample.

    Args:
        rows: arrays of one size within a row.
        classes: names, colors and ignore_index.
        tile_width: of each image in the panel, pixels; None takes it from the widest image, within limits.
        legend: add the classes' colors and names.
    """
    tile_width = tile_width or min(300, max(180, *(image.shape[1] for image, *_ in rows)))
    lines = [_heads(["image", "ground truth", "prediction", "errors"], tile_width)]
    for image, mask, preds, caption in rows:
        counted = _counted(mask, classes.palette, classes.ignore_index)
        errors = (_rgb(image).mean(-1, keepdims=True) * 0.25 + 190).astype(np.uint8).repeat(3, -1)
        errors[counted & (mask != preds)] = WRONG
        errors[~counted] = IGNORED
        masks = [colorize(ids, classes.palette, classes.ignore_index) for ids in (mask, preds)]
        lines.append(_tiles([_rgb(image), *masks, errors], tile_width))
        lines.append(_line(caption, lines[0].width, 12, FAINT))
    if legend:
        lines.append(_legend(classes, lines[0].width, 14, [mask for _, mask, *_ in rows]))
    return _join(lines, margin=(GAP, GAP))


def augmented_panel(images: np.ndarray, masks: np.ndarray, classes: Classes) -> Image.Image:
    """Show a batch as the network sees it, each image beside its overlay, two pairs per line.

    Images are uint8 (N, H, W, C), after augmentation and before normalisation, masks class ids (N, H, W).
    """
    tiles = []
    for image, mask in zip(images, masks, strict=True):
        drawn = overlay(image, mask, classes.palette, ignore_index=classes.ignore_index)
        tiles += [_rgb(image), np.asarray(drawn)]
    tile_width = min(300, max(180, images.shape[2]))
    lines = [_heads(["image", "with mask"] * min(2, len(images)), tile_width)]
    lines += [_tiles(tiles[first : first + 4], tile_width) for first in range(0, len(tiles), 4)]
    lines.append(_legend(classes, lines[0].width, 14, masks))
    return _join(lines, margin=(GAP, GAP))


def draw_curves(rows: Rows, plan: Plan = ()) -> Image.Image:
    """Draw loss, scores and learning rate over the epochs, the planned rate as a faint line."""
    return _render(WIDTH, 380, lambda figure: _draw_lines(figure, rows, plan))


def draw_report(
    rows: Rows,
    plan: Plan,
    classes: Classes,
    scores: Any,
    counts: np.ndarray,
    samples: Sequence[Sample],
    title: str,
    subtitle: str = "",
) -> Image.Image:
    """Draw a run as one page: scores, curves, a bar per class, confusion matrix, best and worst images.

    Args:
        rows: of log.csv.
        plan: (epoch, learning rate) points.
        classes: names, colors and ignore_index.
        scores: a `metrics.Scores` of `counts`.
        counts: confusion matrix (C, C) in pixels; rows are the target, columns the prediction.
        samples: the first two are the best images, the others the worst.
        title: the run's name.
        subtitle: model and data.
    """
    height = min(780, max(430, 110 + 20 * len(counts)))  # of bars and matrix, below the curves' 300

    def draw(figure: Any) -> None:
        above, below = figure.subfigures(2, 1, height_ratios=(300, height))
        _draw_lines(above, rows, plan)
        bars, matrix = below.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_bars(bars, classes, scores.iou, scores.dice)
        _draw_matrix(matrix, classes.names, counts)

    parts = [_heading(title, subtitle, scores), _render(WIDTH, 300 + height, draw)]
    halves = []
    for words, half in (("Best", samples[:2]), ("Worst", samples[2:])):
        if half:
            heading = _join([_line(f"{words} validation images", 584, 16, bold=True)], margin=(GAP, GAP))
            halves.append(_join([heading, sample_panels(half, classes, 140, legend=False)], gap=0))
    if halves:
        legend = _legend(classes, WIDTH - 48, 15, [mask for _, mask, *_ in samples])
        parts.append(_join([_join(halves, across=True, gap=32), legend], margin=(24, 0)))
    return _join(parts, gap=4)


# --- drawing with matplotlib; imported late, since it takes half a second ---


@contextmanager
def _without_backend() -> Iterator[None]:
    """Hide MPLBACKEND, for example of a notebook: matplotlib refuses a backend that is not installed."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def _render(width: int, height: int, draw: Callable) -> Image.Image:
    """Let `draw(figure)` fill a white page of this size in pixels; without pyplot and its global state."""
    with _without_backend():
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    style = {
        "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": DARK, "text.parse_math": False,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 9,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#c4c8cd",
        "axes.labelcolor": FAINT, "axes.axisbelow": True, "grid.color": "#e8eaed", "legend.frameon": False,
        "xtick.color": FAINT, "ytick.color": FAINT,
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class name in a script the font lacks
        figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
        figure.set_layout_engine("constrained", w_pad=0.18, h_pad=0.14)
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _draw_lines(figure: Any, rows: Rows, plan: Plan) -> None:
    """Draw the plots of CURVES over the epochs, side by side."""
    from matplotlib.ticker import MaxNLocator

    for axes, (title, lines) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        if plan and title == "Learning rate":
            axes.plot(*zip(*plan, strict=True), color="#c9ced4", linewidth=3, label="planned")
        for (column, label), color in zip(lines.items(), (TRAIN_COLOR, VAL_COLOR), strict=False):
            points = [(row["epoch"], row[column]) for row in rows if math.isfinite(row.get(column, math.nan))]
            if points and column.startswith("mean"):
                epoch, best = max(points, key=lambda point: point[1])
                axes.plot(epoch, best, "o", color=color, markersize=7, markerfacecolor="white", zorder=4)
                label += f", best {best:.3f} (epoch {epoch:g})"
            style = "o-" if len(points) <= 40 else "-"
            axes.plot(*np.reshape(points, (-1, 2)).T, style, color=color, markersize=3.2, label=label)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter("{x:g}")  # 2e-05, not by a factor that covers the title
        axes.set(title=title, xlabel="epoch", xlim=(0, None))
        axes.set_ylim(0, 1.02 if title == "Validation scores" else 1.04 * axes.get_ylim()[1])
        axes.legend()


def _draw_bars(axes: Any, classes: Classes, iou: np.ndarray, dice: np.ndarray) -> None:
    """Draw IoU and Dice of each class; of more than 40 classes the 40 lowest."""
    order, title = np.arange(len(iou)), "Scores by class"
    if len(iou) > 40:
        order = np.argsort(np.nan_to_num(iou, nan=2))[:40]
        title += f": the 40 lowest of {len(iou)}"
    place, size = np.arange(len(order)), 9.5 if len(order) <= 20 else 8.5
    for offset, label, values, color in ((-0.18, "IoU", iou, TRAIN_COLOR), (0.18, "Dice", dice, "#bcd3e8")):
        axes.barh(place + offset, np.nan_to_num(values[order]), 0.36, color=color, label=label)
    for y, i in enumerate(order):
        words = "n/a" if math.isnan(iou[i]) else f"{iou[i]:.3f}  {dice[i]:.3f}"
        axes.text(1.02, y, words, va="center", fontsize=size)
    colors = np.array(classes.palette)[order] / 255
    swatches = {"s": 3.5 * size, "marker": "s", "edgecolor": "#888888", "linewidth": 0.4, "clip_on": False}
    axes.scatter(np.full(len(order), -0.035), place, color=colors, **swatches)
    labels = [_fitted(classes.names[i], _font(13), 150) for i in order]
    axes.set_yticks(place, labels, fontsize=size, color=DARK)
    axes.tick_params(axis="y", length=0, pad=20)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, 1), ylim=(len(order) - 0.4, -0.6), xticks=[0, 0.25, 0.5, 0.75, 1], title=title)
    axes.grid(axis="x")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1.25, 1))


def _draw_matrix(axes: Any, class_names: Sequence[str], counts: np.ndarray) -> None:
    """Draw the confusion matrix in percent of each target class; numbers up to 30 classes, names up to 40."""
    totals, classes = counts.sum(1, keepdims=True), len(counts)
    share = 100 * counts / np.where(totals > 0, totals, np.nan)
    axes.set_facecolor("#f1f2f4")  # shows through where a class is absent
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    if classes <= 30:
        place = {"ha": "center", "va": "center", "fontsize": min(10, 190 / classes)}
        for row, column in np.argwhere(share >= 0.5):
            value = share[row, column]
            axes.text(column, row, f"{value:.0f}", color="white" if value > 55 else DARK, **place)
    if classes <= 40:
        labels, size = [_fitted(name, _font(13), 95) for name in class_names], min(9.5, 260 / classes)
        slant = {"rotation": 40, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        axes.set_xticks(range(classes), labels, fontsize=size, **slant)
        axes.set_yticks(range(classes), labels, fontsize=size)
    axes.tick_params(length=0)
    axes.set_anchor("N")
    axes.spines[:].set_visible(False)
    axes.set(title="Confusion matrix, % of each true class", xlabel="predicted", ylabel="true")


# --- drawing with Pillow ---


@lru_cache(maxsize=64)
def _font(size: int, bold: bool = False) -> Any:
    """Return DejaVu Sans from matplotlib's files (Latin, Greek, Cyrillic and more), without importing it."""
    folder = importlib.util.find_spec("matplotlib").submodule_search_locations[0]
    path = Path(folder, "mpl-data", "fonts", "ttf", f"DejaVuSans{'-Bold' * bold}.ttf")
    return ImageFont.truetype(str(path), size)


def _fitted(text: str, font: Any, width: float) -> str:
    """Cut a text to one line of this width in pixels, with an ellipsis where it was longer."""
    text = whole = " ".join(text.split())
    while font.getlength(text) > width and text != "…":
        whole = whole[:-1]
        text = whole + "…"
    return text


def _line(text: str, width: int, size: int, color: Any = DARK, bold: bool = False) -> Image.Image:
    """Return a strip of this width with one line of text."""
    strip, font = Image.new("RGB", (width, round(1.5 * size)), "white"), _font(size, bold)
    ImageDraw.Draw(strip).text((0, 0.75 * size), _fitted(text, font, width), color, font, anchor="lm")
    return strip


def _heads(words: Sequence[str], tile_width: int) -> Image.Image:
    """Return the headings of a panel's columns."""
    return _join([_line(text, tile_width, 15, bold=True) for text in words], across=True)


def _tiles(images: Sequence[np.ndarray], tile_width: int) -> Image.Image:
    """Return images of one size side by side, in tiles of this width and at most 1.4 times that height."""
    height, width = images[0].shape[:2]
    scale = min(tile_width / width, 1.4 * tile_width / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    border = (0, 0, tile_width - size[0], 0)
    fitted = [Image.fromarray(image).resize(size, Image.Resampling.BOX) for image in images]
    return _join([ImageOps.expand(image, border, "white") for image in fitted], across=True)


def _legend(classes: Classes, width: int, size: int, masks: Sequence[np.ndarray] = ()) -> Image.Image:
    """Return swatches and names in columns of equal width; with `IGNORED` if a mask has ignored pixels."""
    entries = list(zip(classes.names, classes.palette, strict=False))
    if not all(_counted(mask, classes.palette, classes.ignore_index).all() for mask in masks):
        entries.append(("ignored", IGNORED))
    font, margin, row = _font(size), round(0.7 * size), round(1.75 * size)
    room = width - 2 * margin
    longest = max(font.getlength(_fitted(name, font, math.inf)) for name, _ in entries)
    column = min(room, round(longest + 3.2 * size))
    columns = room // column
    strip = Image.new("RGB", (width, 2 * margin + row * math.ceil(len(entries) / columns)), "white")
    draw = ImageDraw.Draw(strip)
    for i, (name, color) in enumerate(entries):
        x, y = margin + i % columns * column, margin + (i // columns + 0.2) * row
        edge = tuple(int(0.7 * value) for value in color)
        draw.rounded_rectangle((x, y, x + size, y + size), size * 0.18, tuple(color), edge)
        text = _fitted(name, font, column - 2 * size)
        draw.text((x + 1.5 * size, y + size / 2), text, DARK, font, anchor="lm")
    return strip


def _heading(title: str, subtitle: str, scores: Any) -> Image.Image:
    """Return the report's head: its title, and the scores in large figures at the right."""
    parts = [_join([_line(title, WIDTH - 574, 32, bold=True), _line(subtitle, WIDTH - 574, 15, FAINT)])]
    for name in ("mean IoU", "mean Dice", "pixel accuracy"):
        value = getattr(scores, name.lower().replace(" ", "_"))
        figure = "n/a" if math.isnan(value) else f"{value:.3f}"
        parts.append(_join([_line(figure, 162, 32, bold=True), _line(name, 162, 15, FAINT)]))
    return _join(parts, across=True, margin=(32, 16))


def _join(
    images: Sequence[Image.Image], across: bool = False, gap: int = GAP, margin: tuple[int, int] = (0, 0)
) -> Image.Image:
    """Return images below one another, or side by side, on a white page."""
    widths, heights = zip(*(image.size for image in images), strict=True)
    gaps, (x, y) = gap * (len(images) - 1), margin
    width, height = (sum(widths) + gaps, max(heights)) if across else (max(widths), sum(heights) + gaps)
    page = Image.new("RGB", (width + 2 * x, height + 2 * y), "white")
    for image in images:
        page.paste(image, (x, y))
        x, y = (x + image.width + gap, y) if across else (x, y + image.height + gap)
    return page


def _rgb(image: np.ndarray) -> np.ndarray:
    """Return any uint8 image as (H, W, 3)."""
    image = np.atleast_3d(image)
    return image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, -1)


def _counted(ids: np.ndarray, palette: Palette, ignore_index: int | None) -> np.ndarray:
    """Return where ids are classes that are not ignored."""
    return (ids >= 0) & (ids < len(palette)) & (ids != ignore_index)
