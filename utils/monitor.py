"""Progress of a training run: progress bar, time by activity, ETA, loss, signals, and when to save."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils import distributed
from utils.device import is_busy

CHEAP_SAVE = 1.0  # seconds; a checkpoint that takes no longer is written after every epoch
SAVING_SHARE = 0.05  # of the time so far; larger checkpoints may take no more than this, but see `save_due`


def progress_bar(iterable: Iterable | None = None, total: int | None = None, description: str = "") -> tqdm:
    """Return a progress bar of the main process; silent where stderr is not a terminal."""
    silent = True if os.environ.get("RANK", "0") != "0" else None  # None: decided by the terminal
    return tqdm(iterable, description, total, leave=False, unit="img", dynamic_ncols=True, disable=silent)


@dataclass
class Progress:
    """Progress of a run, stored in `last.pt` beside weights, optimizer and schedule."""

    epoch: int = 0  # completed epochs
    step: int = 0  # completed steps of the current epoch
    sums: dict[str, float] = field(default_factory=dict)  # of the current epoch: each loss term x images
    best: float = -1.0  # best monitored score
    best_epoch: int = 0
    stalled: int = 0  # validations since the best score
    rows: list[dict[str, Any]] = field(default_factory=list)  # of log.csv

    def end_epoch(self, row: dict[str, Any], score: float | None) -> bool:
        """Count an epoch with its row of the log and its monitored score; return whether it is the best."""
        is_best = score is not None and score > self.best
        if is_best:
            self.best, self.best_epoch, self.stalled = score, self.epoch + 1, 0
        elif score is not None:
            self.stalled += 1
        self.rows.append(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        return is_best


@dataclass(frozen=True)
class Event:
    """Request to the training loop after a step."""

    save: bool = False  # write last.pt now
    signal: int = 0  # number of a signal that asks to stop; 0: none
    non_finite_step: int = -1  # the first step of this epoch whose loss is NaN or infinite; -1: none


class StopSignal:
    """SIGINT (Ctrl-C) and SIGTERM set `number`, which the loop reads after a step; a second ends at once.

    Signals within one second count as one: torchrun sends a Ctrl-C on to processes that have received it
    already. Outside the main thread, where Python allows no signal handlers, nothing is installed.

    Attributes:
        number: of the signal received so far; 0 for none. Several processes agree on it by
            `distributed.largest`.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.number = 0
        self._quiet = quiet  # another process prints
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if self.number and time.monotonic() - self._received_at < 1:
            return
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number, self._received_at = number, time.monotonic()
        if not self._quiet:  # not by print, which the signal may have interrupted on the same stream
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")


def format_time(seconds: float) -> str:
    """Return a duration as text: 40 s, 3 min, 5.5 h, 2.1 days."""
    for unit, length, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{max(1, seconds):.0f} s"


class Clock:
    """Wall time by activity, in seconds, and the pace of the steps."""

    def __init__(self) -> None:
        self.seconds = {"data": 0.0, "step": 0.0, "validation": 0.0, "saving": 0.0}
        self._first: tuple[int, float] | None = None
        self._estimated = False

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Add the time of the block to `activity`."""
        start = time.perf_counter()
        yield
        self.add(activity, start)

    def add(self, activity: str, start: float) -> None:
        """Add the time since `start`, a `time.perf_counter()`, to `activity`."""
        self.seconds[activity] += time.perf_counter() - start

    def since_first(self, steps: int) -> tuple[int, float]:
        """Return steps and seconds since the first call, which follows the first, slow step."""
        now = time.perf_counter()
        self._first = self._first or (steps, now)
        return steps - self._first[0], now - self._first[1]

    def eta(self, position: int, total: int) -> str:
        """Return how long the remaining steps will take; empty before the pace is known."""
        steps, seconds = self.since_first(position)
        return f", about {format_time((total - position) * seconds / steps)} left" if steps else ""

    def estimate(self, position: int, total: int, epoch_over: bool) -> str:
        """Return once, after ten steps or an epoch, how long the run will take; empty at other times."""
        steps, seconds = self.since_first(position)
        if self._estimated or not steps or (steps < 10 and not epoch_over):
            return ""
        self._estimated = True
        remaining = total - position + steps
        duration = format_time(remaining * seconds / steps)
        basis = f"measured over {steps} of them, without validation"
        return f"time       about {duration} for {remaining} steps, {basis}{self.advice()}"

    def share(self, activity: str) -> float:
        """Return the fraction of the time so far, 0 to 1."""
        return self.seconds[activity] / (sum(self.seconds.values()) or 1.0)

    def describe(self) -> str:
        """Return the shares in percent, with advice where the GPU waits for data."""
        return ", ".join(f"{name} {100 * self.share(name):.0f} %" for name in self.seconds) + self.advice()

    def advice(self) -> str:
        """Return what to try where over a tenth of the time is spent waiting for data; else empty."""
        share = self.share("data")
        advice = "try cache ram or disk, more num_workers, or smaller image files"
        return f". Waiting for data takes {100 * share:.0f} % of the time: {advice}" if share > 0.1 else ""


class Monitor:
    """Follows the steps of a run; the training loop calls `after_step` once per step.

    Args:
        progress: advanced by one step per call.
        schedule: of the learning rate; knows the position in the run and its length.
        device: where the run computes; values are read back from a GPU about twice a second, and when a
            checkpoint is written.
        processes: this process among those of the run.
        save_every_minutes: between two saves of `last.pt` within an epoch; 0 saves at its end only.
    """

    def __init__(
        self,
        progress: Progress,
        schedule: Any,
        device: torch.device,
        processes: distributed.Processes,
        save_every_minutes: float,
    ) -> None:
        self.progress, self.schedule, self.device, self.processes = progress, schedule, device, processes
        self.save_every_minutes = save_every_minutes
        self.clock, self.stop = Clock(), StopSignal(quiet=not processes.is_main)
        self.images_per_second = 0.0  # of the steps of the last epoch that this process took
        self._saved_at, self._save_seconds = time.monotonic(), 0.0

    @contextmanager
    def epoch(self, batch_sizes: list[int]) -> Iterator[None]:
        """Follow the remaining steps of the current epoch, whose batches have these numbers of images."""
        progress = self.progress
        self._sizes, self._shown_at, start = batch_sizes, 0.0, time.perf_counter()
        self._sums = {name: torch.tensor(value, device=self.device) for name, value in progress.sums.items()}
        self._bad_step = torch.tensor(-1, device=self.device)
        with progress_bar(total=sum(batch_sizes), description=f"Epoch {progress.epoch + 1}") as self._bar:
            self._bar.n = self._bar.initial = before = self._seen = sum(batch_sizes[: progress.step])
            yield
        self.images_per_second = (self._seen - before) / (time.perf_counter() - start)

    def load(self, batches: Iterable) -> Iterator[Any]:
        """Yield the batches; waiting for one counts as data, and as step while a GPU is still computing."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.clock.add("step" if is_busy(self.device) else "data", start)
            if batch is None:
                return
            self._step_start = time.perf_counter()
            yield batch

    def after_step(self, terms: dict[str, Tensor]) -> Event:
        """Count a step whose loss terms are scalars on the device, `loss` among them."""
        progress, size = self.progress, self._sizes[self.progress.step]
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * size
        is_first_bad = (self._bad_step < 0) & ~torch.isfinite(terms["loss"])
        self._bad_step = torch.where(is_first_bad, progress.step, self._bad_step)
        self._seen, progress.step = self._seen + size, progress.step + 1
        epoch_over = progress.step == len(self._sizes)
        number, late = distributed.largest([self.stop.number, self._is_late()])
        bad_step, now = -1, time.monotonic()
        if number or late or epoch_over or self.device.type == "cpu" or now - self._shown_at > 0.5:
            bad_step, self._shown_at = int(self._bad_step), now  # here, and in `totals`, the host waits
            if bad_step < 0:
                self._show(epoch_over)
        self.clock.add("step", self._step_start)
        self._bar.update(size)
        return Event(save=bool(number or late), signal=number, non_finite_step=bad_step)

    def totals(self) -> dict[str, float]:
        """Return each loss term's sum over the images so far of the epoch, from all processes."""
        totals = torch.stack(list(self._sums.values())) / self.processes.world_size
        distributed.sum_over(totals)
        return dict(zip(self._sums, totals.tolist(), strict=True))

    def save_due(self) -> bool:
        """Return whether `last.pt` should be written at the end of an epoch.

        A large checkpoint can take longer than an epoch of a small data set. It is then written as often as
        `SAVING_SHARE` of the time allows, and after `save_every_minutes`: a run that is killed repeats the
        steps since the last save, with the same result.
        """
        cheap = self._save_seconds < CHEAP_SAVE or self.clock.share("saving") < SAVING_SHARE
        return cheap or self._is_late()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the time that writing `last.pt` takes, in the block."""
        start = time.monotonic()
        yield
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - start

    def _is_late(self) -> bool:
        return 0 < self.save_every_minutes < (time.monotonic() - self._saved_at) / 60

    def _show(self, epoch_over: bool) -> None:
        mean_loss = float(self._sums["loss"]) / self._seen
        self._bar.set_postfix_str(f"loss {mean_loss:.4f}", refresh=False)
        line = self.clock.estimate(self.schedule.position, self.schedule.total_steps, epoch_over)
        if line:
            tqdm.write(line, file=sys.stdout)
