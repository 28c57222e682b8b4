"""A run's folder, progress and log; the signal that stops it; where its time goes; what an error means."""

import csv
import io
import math
import os
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor, nn

from utils.checkpoint import write_text
from utils.cli import quoted
from utils.device import is_out_of_memory, peak_memory
from utils.distributed import is_lost

try:
    import fcntl
except ImportError:  # Windows, where no lock is taken
    fcntl = None

END_MARK = "report.png"  # written last: a run that has it is finished
LOCK = ".lock"  # held by the process that trains in the folder


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds beside weights, optimizer and schedule."""

    epoch: int = 0  # epochs that are over
    step: int = 0  # steps of the present epoch that are over
    sums: dict[str, float] = field(default_factory=dict)  # of the present epoch: each loss term x pictures
    best: float = -1.0  # monitored score
    best_epoch: int = 0
    stalled: int = 0  # validations since the best
    rows: list[dict[str, Any]] = field(default_factory=list)  # of log.csv


def try_output(output_dir: Path, setting: str = "output_dir") -> None:
    """Refuse by an OSError, before the work, a folder, there already or not, where nothing can be written.

    `setting` is what the user names it by.
    """
    place = output_dir.absolute()
    folder = next(one for one in (place, *place.parents) if one.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{setting} {output_dir}: {folder} is a file. Give another {setting}")
    try:
        TemporaryDirectory(prefix=".writable.", dir=folder).cleanup()
    except OSError as error:
        raise OSError(f"{setting} {output_dir} cannot be written: {error.strerror}. Give another") from error


def create_run(output_dir: Path, run_name: str | None, model: str) -> Path:
    """Make a run's folder, which no other run gets: `mkdir` is the lock between runs started at once."""
    output_dir.mkdir(parents=True, exist_ok=True)
    name = run_name or time.strftime(f"{model}_%Y-%m-%d_%H-%M-%S")
    for ending in [""] if run_name else ["", *(f"_{number}" for number in range(2, 1000))]:
        folder = output_dir / f"{name}{ending}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise taken(folder)


def taken(folder: Path) -> ValueError:
    """What to say where a run's folder exists."""
    unfinished = (folder / "last.pt").exists() and not (folder / END_MARK).exists()
    way = f", or go on with it by --resume {quoted(folder)}" if unfinished else ""
    return ValueError(f"run_name {folder.name!r} exists in {folder.parent}. Give another, or none{way}")


def find_run(resume: str, output_dir: Path) -> Path:
    """The folder to resume: the one named, or for `auto` the newest with a checkpoint and no report yet.

    One in which another process trains is refused, or passed over.
    """
    if resume == "auto":
        unfinished = [p for p in output_dir.glob("*/last.pt") if not (p.parent / END_MARK).exists()]
        free = [p for p in unfinished if not is_running(p.parent)]
        if not free:
            found = f"no unfinished run that is not running in {output_dir}"
            raise FileNotFoundError(f"{found}. Leave resume out to start a new one")
        return max(free, key=os.path.getmtime).parent
    last = Path(resume) if Path(resume).name == "last.pt" else Path(resume, "last.pt")
    if not last.is_file():
        raise FileNotFoundError(f"no checkpoint at {last}. Give resume an existing run, or leave it out")
    if is_running(last.parent):
        raise running(last.parent)
    return last.parent


def hold(folder: Path) -> ExitStack:
    """Have a run's folder for this process alone, until the stack is closed or the process ends, however."""
    stack, path = ExitStack(), folder / LOCK

    def remove() -> None:
        with suppress(OSError):
            path.unlink()

    if fcntl:
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: forked ones do not have it
        except BlockingIOError:
            raise running(folder) from None
        except OSError:  # a file system without locks
            pass
        stack.callback(remove)
    return stack


def is_running(folder: Path) -> bool:
    """Whether another process holds the folder; any number may ask at once, as the processes of a run do."""
    if fcntl:
        try:
            with open(folder / LOCK) as file:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:  # another: there is no such file, or no lock on this file system
            return isinstance(error, BlockingIOError)
    return False


def running(folder: Path) -> ValueError:
    """What to say where another process trains in a folder."""
    return ValueError(f"{folder} is being trained in by another process. Wait for its end, or stop it first")


def newest_weights(output_dir: Path) -> Path:
    """The best.pt that was written last."""
    found = list(output_dir.glob("*/best.pt"))
    if not found:
        train_first = "Train first (python train.py), or give weights a checkpoint"
        raise FileNotFoundError(f"no {output_dir}/*/best.pt. {train_first}")
    return max(found, key=os.path.getmtime)


def versions() -> dict[str, str]:
    """What this run is made with: Python, the system, and the packages that numbers depend on."""
    packages = {"torch": str(torch.__version__), "numpy": np.__version__, "pillow": PIL.__version__}
    return {"python": platform.python_version(), "system": platform.platform(), **packages}


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a CSV, under the union of their columns; what a row lacks, or NaN, is empty."""
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
    """The columns of `log.csv` that come from a validation; `scores` are those of a confusion matrix."""
    means = {name: value for name, value in vars(scores).items() if isinstance(value, float)}
    classes = {
        f"{kind} {name}": float(value)
        for kind in ("iou", "dice")
        for name, value in zip(class_names, getattr(scores, kind), strict=True)
    }
    return {"val_loss": loss, **means, **classes}


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns in plain text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in [header, *rows]:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def class_table(class_names: Sequence[str], scores: Any) -> str:
    """IoU, Dice and accuracy of each class, and their means."""
    table = [*zip(class_names, scores.iou, scores.dice, scores.accuracy, strict=True)]
    table.append(("mean", scores.mean_iou, scores.mean_dice, scores.mean_accuracy))
    rows = [[f"  {name}", *map(format_score, values)] for name, *values in table]
    return format_table(["  class", "IoU", "Dice", "accuracy"], rows)


def mean_scores(scores: Any) -> str:
    """The means of a confusion matrix's scores in words."""
    iou, dice, accuracy = map(format_score, (scores.mean_iou, scores.mean_dice, scores.pixel_accuracy))
    return f"mean IoU {iou}, mean Dice {dice}, pixel accuracy {accuracy}"


def format_score(value: float) -> str:
    """Four digits, or n/a for what was neither there nor predicted."""
    return "n/a" if math.isnan(value) else f"{value:.4f}"


class StopSignal:
    """Ctrl-C and SIGTERM set a flag that the loop reads between steps; a second one, later, ends at once.

    What comes within a second is one: torchrun passes on a Ctrl-C that the processes have had already.
    `number` is that of the signal that came, at any moment, and 0 where none did; several processes first
    agree on it. A `quiet` one leaves the words to another process.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.number = 0
        self._quiet = quiet
        self._came_at = 0.0

    def __enter__(self) -> "StopSignal":
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
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
    """Seconds of wall time by what they went to, and the pace of the steps."""

    def __init__(self) -> None:
        self.seconds = {"data": 0.0, "step": 0.0, "validation": 0.0, "saving": 0.0}
        self._first: tuple[int, float] | None = None
        self._estimated = False

    @contextmanager
    def to(self, what: str) -> Iterator[None]:
        """Count the time of the block towards `what`."""
        start = time.perf_counter()
        yield
        self.add(what, start)

    def add(self, what: str, start: float) -> None:
        """Count the time since `start` towards `what`."""
        self.seconds[what] += time.perf_counter() - start

    def since_first(self, steps: int) -> tuple[int, float]:
        """Steps and seconds since the first call, which comes when the first step, a slow one, is over."""
        now = time.perf_counter()
        self._first = self._first or (steps, now)
        return steps - self._first[0], now - self._first[1]

    def left(self, position: int, total: int) -> str:
        """How long the steps of the run that are left will take; empty before there is a pace."""
        steps, seconds = self.since_first(position)
        return f", about {format_time((total - position) * seconds / steps)} left" if steps else ""

    def estimate(self, position: int, total: int, epoch_over: bool) -> str:
        """Once, after ten steps or an epoch: how long the steps of the run will take; empty elsewhere."""
        steps, seconds = self.since_first(position)
        if self._estimated or not steps or (steps < 10 and not epoch_over):
            return ""
        self._estimated = True
        ahead = total - position + steps
        duration = format_time(ahead * seconds / steps)
        pace = f"by the pace of {steps} of them; validation comes on top"
        return f"time       about {duration} for {ahead} steps, {pace}{self.advice()}"

    def share(self, what: str) -> float:
        """Of the time counted so far, 0 to 1."""
        return self.seconds[what] / (sum(self.seconds.values()) or 1.0)

    def describe(self) -> str:
        """Shares in percent, with advice where the data is waited for."""
        return ", ".join(f"{what} {100 * self.share(what):.0f} %" for what in self.seconds) + self.advice()

    def advice(self) -> str:
        """What to try where over a tenth of the time so far went to waiting for data; empty elsewhere."""
        share = self.share("data")
        remedy = "try cache ram or disk, more num_workers, or smaller files"
        return f". Data is waited for in {100 * share:.0f} % of the time: {remedy}" if share > 0.1 else ""


def multiply_adds(model: nn.Module, picture: Tensor) -> float:
    """Multiply-adds of a picture's way through a model; on the meta device they are not computed."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(picture)
    return counter.get_total_flops() / 2


def explain(error: Exception, device: torch.device, folder: Path | None, memory_savers: str) -> str | None:
    """What to tell the user of an error that ended a run; None where it is a fault of this program."""
    saved = folder is not None and os.path.exists(folder / "last.pt")
    go_on = f"go on with --resume {quoted(folder)}" if saved else "start again: nothing was saved yet"
    first_line = str(error).split("\n")[0]
    if is_out_of_memory(error):
        weights = f" (from these weights: --init_from {quoted(folder / 'last.pt')})" if saved else ""
        peak = f"out of memory on {device}, with a peak of {peak_memory(device) / 2**30:.1f} GiB"
        return f"{peak}. Free some, then {go_on}; or start anew{weights} with {memory_savers}"
    if is_lost(error):
        reason = first_line.split("] ", 1)[-1].split(". ")[0]  # without gloo's file and its good wishes
        return f"another process of this run has ended, or is stuck: {reason}. Mend that, then {go_on}"
    if "DataLoader worker" in first_line:
        return f"{first_line}. Where memory ran out, take fewer num_workers; then {go_on}"
    return f"{error}. Mend that, then {go_on}" if isinstance(error, (ValueError, OSError)) else None
