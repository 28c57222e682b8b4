"""What every benchmark here shares: interleaved rounds, the machine's description, tables, a JSON file.

Rounds are interleaved (A B C, B C A, ...), because other work on a machine comes and goes: a slow minute then
falls on all cases alike, and ratios taken round by round stay meaningful where single times do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path


def options(doc: str, name: str, rounds: int = 5) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has; `doc` is its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--output", default=f"benchmarks/results/{name}.json", help="every measurement is written here"
    )
    return parser


def machine(*packages: str) -> dict[str, object]:
    """Describe processor, accelerator, threads, and the versions of `packages` (None where not installed)."""
    import torch

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = {}
    for package in ("torch", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "load_before": os.getloadavg()[0],
    }


def rotation(names: Iterable[str], rounds: int) -> Iterator[tuple[int, list[str]]]:
    """Yield each round's number and order: A B C, B C A, ..."""
    names = list(names)
    for turn in range(rounds):
        shift = turn % len(names)
        yield turn, names[shift:] + names[:shift]


def interleave(
    cases: dict[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Time each case once a round, in an order that rotates; return seconds by case, warm-up left out."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn, names in rotation(cases, warmup + rounds):
        for name in names:
            start = time.perf_counter()
            cases[name]()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Divide round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def resident(field: str, process: int | str = "self") -> int:
    """Return VmRSS (now) or VmHWM (the peak so far) of a process, in bytes; Linux alone."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Write median, lowest and highest of `values`: '12 (11..15)'."""
    low, middle, high = (
        f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low}..{high})"


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


def print_goals(goals: Sequence[tuple]) -> None:
    """Print (what of whom, goal, values, whether the goal is the most allowed) with what was reached.

    The median decides.
    """
    rows = []
    for what, goal, values, at_most in goals:
        middle = statistics.median(values)
        met = middle <= goal if at_most else middle >= goal
        sign = "at most" if at_most else "at least"
        rows.append(
            (
                what,
                f"{sign} {round(goal, 2):g}",
                spread(values, 0 if goal >= 100 else 2),
                "yes" if met else "NO",
            )
        )
    if rows:
        print()
        print_table(("goal", "wanted", "reached", "met"), rows)


def save_json(path: str | Path, results: dict[str, object]) -> None:
    """Write `results` as JSON, so that at any moment the old or the new file is there, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def write_json(path: str | Path, results: dict[str, object]) -> None:
    """Write `results`, every single measurement included, as JSON, and say where."""
    save_json(path, results)
    print(f"written to {path}")
