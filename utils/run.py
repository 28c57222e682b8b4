"""A run's folder and its log; the signal that stops it; where its time goes."""

import csv
import io
import math
import os
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from utils.checkpoint import write_text

LOGGED = (  # scores of the whole validation split that log.csv keeps
    "mean_iou",
    "mean_dice",
    "mean_iou_foreground",
    "mean_dice_foreground",
    "pixel_accuracy",
    "mean_accuracy",
    "frequency_weighted_iou",
    "picture_mean_iou",
    "picture_mean_dice",
    "baseline_iou",
)
END_MARK = "report.png"  # written last: a run that has it is finished


def try_output(output_dir: Path, setting: str = "output_dir") -> None:
    """Find out before the work whether files can be written to a folder that may not exist yet.

    Args:
        output_dir: the folder.
        setting: what the user names it by, for messages.

    Raises:
        OSError: they cannot; the message says what to do.
    """
    folder = output_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{setting} {output_dir}: {folder} is a file. Give another {setting}")
    probe = folder / f".writable.{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OSError(f"{setting} {output_dir} cannot be written: {error.strerror}. Give another") from error


def create_run(output_dir: Path, run_name: str | None, model: str) -> Path:
    """Make a run's folder, which no other run has or gets: `mkdir` is the lock between runs started at once.

    Raises:
        ValueError: `run_name` is taken.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    name = run_name or time.strftime(f"{model}_%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        folder = output_dir / (name if attempt == 1 else f"{name}_{attempt}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if run_name:
                break
    way = f"Go on with it by --resume {folder}" if (folder / "last.pt").exists() else "Remove it"
    raise ValueError(f"run_name {name!r} exists in {output_dir}. {way}, or give another name")


def find_run(resume: str, output_dir: Path) -> Path:
    """The folder to resume: the one named, or for `auto` the newest that has a checkpoint and no report yet.

    Raises:
        FileNotFoundError: there is none.
    """
    if resume != "auto":
        folder = Path(resume)
        folder = folder.parent if folder.name == "last.pt" else folder
        if not (folder / "last.pt").is_file():
            raise FileNotFoundError(
                f"no checkpoint at {folder / 'last.pt'}. Give resume an existing run, or leave it out"
            )
        return folder
    runs = [last.parent for last in output_dir.glob("*/last.pt") if not (last.parent / END_MARK).exists()]
    if not runs:
        raise FileNotFoundError(f"no unfinished run in {output_dir}. Leave resume out to start a new one")
    return max(runs, key=lambda folder: (folder / "last.pt").stat().st_mtime_ns)


def newest_weights(output_dir: Path) -> Path:
    """The best.pt that was written last.

    Raises:
        FileNotFoundError: no run has one.
    """
    found = list(output_dir.glob("*/best.pt"))
    if not found:
        raise FileNotFoundError(
            f"no {output_dir}/*/best.pt. Train first (python train.py), or give weights a checkpoint"
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def versions() -> dict[str, str]:
    """What this run is made with: Python, the system, and the packages that numbers depend on."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("torch", "torchvision", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows, one an epoch, under the union of their columns; what a row lacks, or NaN, is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _digits(value) for name, value in row.items()})
    write_text(path, text.getvalue())


def _digits(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}" if abs(value) < 1e-3 else f"{value:.6f}"
    return value


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns in plain text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        return "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()

    return "\n".join(map(line, [header, *rows]))


def score_columns(class_names: Sequence[str], scores: Any, loss: float) -> dict[str, float]:
    """The columns of `log.csv` that come from a validation; `scores` are those of a confusion matrix."""
    columns = {"val_loss": loss} | {name: getattr(scores, name) for name in LOGGED}
    for kind in ("iou", "dice"):
        values = getattr(scores, kind)
        columns |= {f"{kind} {name}": float(value) for name, value in zip(class_names, values, strict=True)}
    return columns


def class_table(class_names: Sequence[str], scores: Any) -> str:
    """IoU, Dice and accuracy of each class, and their means."""
    rows = [
        [
            "  " + name,
            *(format_score(float(values[c])) for values in (scores.iou, scores.dice, scores.accuracy)),
        ]
        for c, name in enumerate(class_names)
    ]
    rows.append(["  mean", *map(format_score, (scores.mean_iou, scores.mean_dice, scores.mean_accuracy))])
    return format_table(["  class", "IoU", "Dice", "accuracy"], rows)


def format_score(value: float) -> str:
    """Four digits, or n/a for what was neither there nor predicted."""
    return "n/a" if math.isnan(value) else f"{value:.4f}"


class StopSignal:
    """Ctrl-C and SIGTERM set a flag that the loop reads between steps; a second one, later, ends at once.

    What comes within a second is one: torchrun passes on a Ctrl-C that the processes have had already.

    Args:
        quiet: say nothing when a signal comes; another process of the run does.

    Attributes:
        number: of the signal that came, at any moment; 0 where none did. Several processes first agree on it.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.number = 0
        self._quiet = quiet
        self._came_at = 0.0

    def __enter__(self) -> "StopSignal":
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.number and time.monotonic() - self._came_at < 1:
            return
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number, self._came_at = number, time.monotonic()
        if not self._quiet:  # not by print, which may be at work on the same stream just now
            os.write(2, b"\nstopping after this step; once more to end at once\n")


def format_time(seconds: float) -> str:
    """A length of time as one says it: 40 s, 3 min, 5.5 h, 2.1 days."""
    for unit, length, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{max(1, seconds):.0f} s"


class Clock:
    """Seconds of wall time by what they went to, and the pace of the steps.

    Attributes:
        told: whether the run's length has been estimated.
    """

    def __init__(self) -> None:
        self.seconds = {"data": 0.0, "step": 0.0, "validation": 0.0, "saving": 0.0}
        self.told = False
        self._first: tuple[int, float] | None = None

    @contextmanager
    def to(self, what: str) -> Iterator[None]:
        """Count the time of the block towards `what`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, start)

    def add(self, what: str, start: float) -> None:
        """Count the time since `start` towards `what`."""
        self.seconds[what] += time.perf_counter() - start

    def since_first(self, steps: int) -> tuple[int, float]:
        """Steps and seconds since the first call, which comes when the first step, a slow one, is over."""
        now = time.perf_counter()
        self._first = self._first or (steps, now)
        return steps - self._first[0], now - self._first[1]

    def share(self, what: str) -> float:
        """Of the time counted so far, 0 to 1."""
        return self.seconds[what] / (sum(self.seconds.values()) or 1.0)

    def describe(self) -> str:
        """Shares in percent, with advice where the data is waited for."""
        return ", ".join(f"{what} {100 * self.share(what):.0f} %" for what in self.seconds) + self.advice()

    def advice(self) -> str:
        """What to try where over a tenth of the time so far went to waiting for data; empty elsewhere."""
        if self.share("data") <= 0.1:
            return ""
        return (
            f". Data is waited for in {100 * self.share('data'):.0f} % of the time: try cache ram or disk, "
            "more num_workers, or smaller picture files"
        )
