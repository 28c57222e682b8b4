"""Whole parts of the program on a GPU: its tests, epochs with data, validation, prediction, training.

Each function is one measurement of gpu.py. It takes `report`, which receives a dict of values and may be
called several times, the `settings` of the command, and `seconds`, its share of the time: it takes fewer
steps where these would not fit.
"""

from __future__ import annotations

import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import worker
from children import ROOT, NotHere, Settings
from gpu_runs import Report, camvid_size, case_of, free_memory, noise, ready, street_scenes
from worker import IGNORED, NETWORKS

from config import Config
from utils.cli import Fail, make, read_settings

RECIPE = ROOT / "benchmarks" / "recipes" / "camvid_gpu.json"
MOVES = {"zoom, colour": {}, "zoom, colour, rotation": {"rotate": 10.0}}


def gpu_tests(report: Report, settings: Settings, seconds: float) -> None:
    """The tests marked gpu, without those that compile (marked slow)."""
    import pytest

    os.chdir(ROOT)
    files = [
        str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()
    ]
    options = ["-m", "gpu and not slow", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore"]
    basetemp = Path(settings.scratch) / "tests"
    outcomes = Outcomes(report)
    code = pytest.main([*files, *options, f"--basetemp={basetemp}"], plugins=[outcomes])
    report({**outcomes.counts, "failures": outcomes.failures, "exit_code": int(code)})
    if outcomes.failures or code:
        raise AssertionError(f"{len(outcomes.failures)} tests failed; pytest's exit code {int(code)}")
    if not settings.on_gpu:
        raise NotHere("not on this device: all of them need a CUDA device")


class Outcomes:
    """A pytest plugin that reports the counts, the failures and the slowest after each test."""

    def __init__(self, report: Report) -> None:
        self.report, self.counts = report, Counter(passed=0, failed=0, skipped=0)
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a phase of a test: its call, or a setup or teardown that did not pass."""
        name = report.nodeid.rpartition("/")[2]
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failures[name] = last_error_line(report.longreprtext)
        if report.when == "teardown":
            slowest = sorted(self.seconds.items(), key=lambda pair: -pair[1])[:5]
            self.report({**self.counts, "failures": dict(self.failures), "slowest": dict(slowest)})

    def pytest_collectreport(self, report: Any) -> None:
        """Count a file that cannot be imported as a failure."""
        if report.failed:
            self.counts["failed"] += 1
            self.failures[report.nodeid] = last_error_line(report.longreprtext)
            self.report({**self.counts, "failures": dict(self.failures)})


def last_error_line(text: str) -> str:
    """The last line of a failure that pytest marks as an error, or its last line."""
    lines = text.strip().splitlines() or [""]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or lines)[-1][:300]


def waits(report: Report, settings: Settings, seconds: float) -> None:
    """An epoch and a validation of train.py: where the host waits for the GPU."""
    if not settings.on_gpu:
        raise NotHere("not on this device: a CPU has nothing to wait for")
    data = noise(settings, 4 * settings.batch, settings.batch, settings.size)
    moves = {"scale": (0.5, 2.0), "color_jitter": 0.3, "rotate": 10.0, "ema_decay": 0.999, "clip_grad": 1.0}
    case = case_of(settings, "deeplabv3plus_resnet50", data=data, **moves)
    with ready(settings, case) as run:
        for part, call in (("epoch", worker.our_epoch), ("validation", worker.our_validation)):
            call(run)  # what comes once is over then
            found: Counter = Counter()
            with counted_waits(found):
                call(run)
            report({part: dict(found.most_common(20)), f"{part}_waits": sum(found.values())})
        report({"steps": 4, "images_validated": settings.batch})


@contextmanager
def counted_waits(found: Counter) -> Iterator[None]:
    """Count by file and line the calls within the block that make the host wait for the GPU."""

    def note(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            found[caller()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def caller() -> str:
    """File, line and function of the innermost frame in the project's own files, outside the benchmarks."""
    frame, here = sys._getframe(1), str(ROOT / "benchmarks")
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(ROOT)) and not name.startswith(here) and "site-packages" not in name:
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def epochs(
    report: Report,
    settings: Settings,
    seconds: float,
    network: str,
    moves: str,
    workers: int | None,
    half: bool,
    cache: str,
) -> None:
    """An epoch of train.py's loop: images per second, share of waiting; and the loader alone."""
    size = max(32, settings.size // 2) if half else settings.size
    more = {"scale": (0.5, 2.0), "color_jitter": 0.3, "num_workers": workers, "cache": cache, **MOVES[moves]}
    case = case_of(settings, network, size=size, data=street_scenes(settings), **more)
    with ready(settings, case) as run:
        start = time.perf_counter()
        worker.our_epoch(run)  # workers start, cuDNN chooses its kernels
        first = time.perf_counter() - start
        fits = int((0.6 * seconds - first) / max(first, 1e-6))
        found = [worker.our_epoch(run) for _ in range(max(1, min(3, fits)))]
        best = max(found, key=lambda one: one["rate"])
        report({"images_per_second": best["rate"], "waiting_share": best["waiting"], "epochs": len(found)})
        start = time.perf_counter()
        images = worker.our_loader(run, epoch=9)
        report({"loader_images_per_second": images / (time.perf_counter() - start)})


def validation(report: Report, settings: Settings, seconds: float) -> None:
    """Images per second of train.py's validation and of predict.py, alone and as a process."""
    import predict

    data, size = street_scenes(settings), camvid_size(settings)
    with ready(settings, case_of(settings, "deeplabv3plus_resnet50", size=size, data=data)) as run:
        for name in ("first_validation", "validation"):
            start = time.perf_counter()
            images, _ = worker.our_validation(run)
            report({f"{name}_images_per_second": images / (time.perf_counter() - start)})
        weights = worker.our_checkpoint(run)
        source, output = Path(data, "val", "images"), Path(settings.scratch) / "predictions"
        common = dict(weights=str(weights), input=str(source), device=settings.device)
        for name in ("first_prediction", "prediction"):
            start = time.perf_counter()
            predict.main(predict.Args(**common, output=f"{output}_{name}", overlay=False))
            report({f"{name}_images_per_second": images / (time.perf_counter() - start)})
        start = time.perf_counter()
        words = [word for name, value in common.items() for word in (f"--{name}", value)]
        command = [sys.executable, "predict.py", *words, "--no-overlay", "--output", f"{output}_process"]
        subprocess.run(command, cwd=ROOT, check=True, timeout=seconds)
        taken = time.perf_counter() - start
        report({"predict_process_seconds": taken, "predict_process_images_per_second": images / taken})


def camvid(report: Report, settings: Settings, seconds: float) -> None:
    """Train on CamVid for the time that there is, with a schedule that ends with it; the scores on val."""
    deadline = time.monotonic() + seconds - max(3.0, 0.04 * seconds)  # then SIGTERM; the rest is for saving
    report({"network": settings.network, "data": "CamVid" if settings.camvid else "generated images"})
    if settings.resume:
        folder = Path(settings.resume)
        config = Config(resume=str(folder), data_root=street_scenes(settings), device=settings.device)
    else:
        name = f"gpu-{settings.network}-{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        short = camvid_config(settings, f"{name}-short", epochs=5, val_every=2, output_dir=settings.scratch)
        costs = epoch_costs(train_for(short, deadline - time.monotonic())[0])
        report({f"{part}_seconds": value for part, value in costs.items()})
        epochs, every = planned_epochs(costs, deadline - time.monotonic())
        report({"planned_epochs": epochs, "val_every": every})
        deadline -= costs["end"]  # which is not interrupted
        folder = Path(settings.runs, name)
        config = camvid_config(settings, name, epochs=epochs, val_every=every)
    free_memory()
    started = time.monotonic()
    _, stopped = train_for(config, deadline - time.monotonic())
    report({"training_seconds": time.monotonic() - started, "run": folder.name})
    if stopped:
        report({"stopped": stopped})
    copy_results(folder, Path(settings.output), settings.network)
    report(scores_of(folder / "log.csv"))


def camvid_config(settings: Settings, run_name: str, **changes: Any) -> Config:
    """The recipe's settings for the network of the command."""
    values = read_settings(RECIPE, Config) | NETWORKS[settings.network]
    if values["model"] == "fcn":
        values["learning_rate"] = 0.0003  # the recipe's is too high for VGG
    if settings.camvid is None:  # generated masks have 12 classes
        for name in ("class_names", "class_colors"):
            values.pop(name)
        values |= {"num_classes": 12, "ignore_index": IGNORED}
    values |= {"data_root": street_scenes(settings), "output_dir": settings.runs, "run_name": run_name}
    values |= {"device": settings.device, "cache_dir": str(Path(settings.scratch) / "cache")}
    values |= {"image_size": camvid_size(settings)}
    return make(Config, values | {"batch_size": min(values["batch_size"], settings.batch)} | changes)


class TooLate(Exception):
    """The time is over before there is anything to save."""


def train_for(config: Config, seconds: float) -> tuple[list[float], str]:
    """Train, and stop by SIGTERM, with a checkpoint saved, when the seconds are over.

    Returns:
        When the run started, each epoch began, and all ended; why it stopped, if it did.
    """
    import train

    def too_late(*_: object) -> None:
        raise TooLate("stopped before the first step")

    before = signal.signal(signal.SIGTERM, too_late)
    timer = threading.Timer(max(0.1, seconds), os.kill, (os.getpid(), signal.SIGTERM))
    clock, start, stopped = EpochClock(sys.stdout), time.monotonic(), ""
    timer.start()
    try:
        with redirect_stdout(clock):
            train.main(config)
    except TooLate as error:
        stopped = str(error)
    except Fail as error:
        if error.code != 128 + signal.SIGTERM:
            raise
        stopped = str(error)
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    return [start, *clock.began, time.monotonic()], stopped


class EpochClock:
    """A stream that passes everything on, and notes when a line `Epoch n/m` begins."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.began = stream, []

    def write(self, text: str) -> int:
        """Pass text on."""
        self.began += [time.monotonic() for line in text.splitlines() if line.startswith("Epoch ")]
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def epoch_costs(moments: list[float]) -> dict[str, float]:
    """Seconds by part, from a run of five epochs that validates after the second, fourth and last.

    Args:
        moments: when it started, each of the five epochs began, and it ended.
    """
    if len(moments) != 7:
        raise TooLate(f"the run of 5 epochs that plans the long one had time for {len(moments) - 2}")
    start, first, second, third, fourth, fifth = (b - a for a, b in zip(moments, moments[1:], strict=False))
    epoch = max(third, 1e-3)
    validation = max(0.0, fourth - epoch)
    once = max(0.0, first - epoch) + max(0.0, second - fourth)  # what the first epoch and validation add
    return {
        "start": start + once,
        "epoch": epoch,
        "validation": validation,
        "end": max(0.0, fifth - epoch - validation),
    }


def planned_epochs(costs: dict[str, float], seconds: float, validations: int = 20) -> tuple[int, int]:
    """How many epochs fit in the seconds, with a margin of a twentieth, and how often to validate."""
    left = 0.95 * (seconds - costs["start"] - costs["end"])
    number = int((left - validations * costs["validation"]) / costs["epoch"])
    if number < 2 * validations:
        number = int(left / (costs["epoch"] + costs["validation"]))
    number = min(1000, max(1, number))
    return number, max(1, math.ceil(number / validations))


def scores_of(log: Path) -> dict[str, Any]:
    """Epochs, images per second, and the scores of the best validation, from a run's log.csv."""
    if not log.exists():
        return {"epochs": 0}
    with open(log, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rates = sorted(float(row["images_per_second"]) for row in rows)
    values: dict[str, Any] = {"epochs": len(rows), "images_per_second": rates[len(rates) // 2]}
    scored = [row for row in rows if row.get("mean_iou")]
    if scored:
        best = max(scored, key=lambda row: float(row["mean_iou"]))
        values |= {"best_epoch": int(best["epoch"]), "mean_iou": float(best["mean_iou"])}
        values["last_mean_iou"] = float(scored[-1]["mean_iou"])
        values["iou"] = {
            name.removeprefix("iou "): float(value) if value else None
            for name, value in best.items()
            if name.startswith("iou ")
        }
    return values


def copy_results(folder: Path, output: Path, network: str) -> None:
    """Copy the small files of a run beside the JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in ("log.csv", "scores.json", "report.png"):
        if (folder / name).exists():
            shutil.copy(folder / name, output.with_name(f"{output.stem}-{network}-{name}"))
