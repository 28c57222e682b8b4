"""Scores as text tables and as the columns of a CSV file."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.checkpoint import write_text


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows under the union of their columns; missing values and NaN are empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    write_text(path, text.getvalue())


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}" if abs(value) < 1e-3 else f"{value:.6f}"


def score_columns(class_names: Sequence[str], scores: Any, loss: float) -> dict[str, float]:
    """Return the columns of `log.csv` that come from a validation.

    Args:
        class_names: one per class.
        scores: a `metrics.Scores`.
        loss: mean validation loss.
    """
    means = {name: value for name, value in vars(scores).items() if isinstance(value, float)}
    per_class = {
        f"{kind} {name}": float(value)
        for kind in ("iou", "dice")
        for name, value in zip(class_names, getattr(scores, kind), strict=True)
    }
    return {"val_loss": loss, **means, **per_class}


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Return columns of plain text: the first aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in [header, *rows]:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def class_table(class_names: Sequence[str], scores: Any) -> str:
    """Return a table of IoU, Dice and accuracy of each class, and their means."""
    table = [*zip(class_names, scores.iou, scores.dice, scores.accuracy, strict=True)]
    table.append(("mean", scores.mean_iou, scores.mean_dice, scores.mean_accuracy))
    rows = [[f"  {name}", *map(format_score, values)] for name, *values in table]
    return format_table(["  class", "IoU", "Dice", "accuracy"], rows)


def mean_scores(scores: Any) -> str:
    """Return the mean IoU, mean Dice and pixel accuracy as text."""
    iou, dice, accuracy = map(format_score, (scores.mean_iou, scores.mean_dice, scores.pixel_accuracy))
    return f"mean IoU {iou}, mean Dice {dice}, pixel accuracy {accuracy}"


def format_score(value: float) -> str:
    """Return four decimals, or n/a for NaN: a class that is neither present nor predicted."""
    return "n/a" if math.isnan(value) else f"{value:.4f}"
