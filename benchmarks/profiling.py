"""Times of calls on a GPU or a CPU, their kernels by torch's profiler, and peak memory.

The same functions serve both devices: events on a GPU, the clock on a CPU.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from timing import resident

KINDS = {  # of kernels, by parts of their names; the first that fits
    "copies": ("memcpy", "memset", "copy", "fillfunctor", "catarray", "aten::cat"),
    "batch norm": ("batch_norm", "bn_fw", "bn_bw", "batchnorm"),
    "optimizer": ("multi_tensor_apply", "adam", "foreach"),
    "convolutions and matrix products": (
        *("conv", "gemm", "wgrad", "dgrad", "fprop", "cutlass", "nvjet", "xmma", "cudnn", "splitk", "bmm"),
        *("addmm", "aten::mm"),
    ),
    "resizing": ("upsample", "interpolate"),
    "pooling": ("pool",),
    "reductions": ("reduce", "softmax", "sum"),
    "elementwise": ("elementwise", "vectorized", "unrolled", "triton_poi", "pointwise"),
}
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
SHOWN = 8  # kernels


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def call_times(call: Callable[[], object], count: int, device: str) -> list[float]:
    """Return the milliseconds of each of `count` calls."""
    if not device.startswith("cuda"):
        marks = [time.perf_counter()]
        for _ in range(count):
            call()
            marks.append(time.perf_counter())
        return [1000 * (after - before) for before, after in zip(marks, marks[1:], strict=False)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in zip(events, events[1:], strict=False)]


def host_time(call: Callable[[], object], device: str) -> float:
    """Return the milliseconds that the host takes to issue one call to an idle GPU."""
    synchronize(device)
    start = time.perf_counter()
    call()
    milliseconds = 1000 * (time.perf_counter() - start)
    synchronize(device)
    return milliseconds


def warmed_up(
    call: Callable[[], object], device: str, seconds: float, calls: int = 5, timed: int = 20
) -> int:
    """Call up to `calls` times in up to a third of `seconds`; return how many of `timed` fit in the rest."""
    start, latest = time.perf_counter(), 0.0
    for number in range(calls):
        before = time.perf_counter()
        call()
        synchronize(device)
        now = time.perf_counter()
        latest = now - before
        if number and now - start + latest > seconds / 3:
            break
    rest = seconds - (time.perf_counter() - start)
    return max(1, min(timed, int(rest / 2 / max(latest, 1e-6))))


def in_turns(
    forms: dict[str, Callable[[], object]], device: str, seconds: float, rounds: int = 3, timed: int = 10
) -> dict[str, list[float]]:
    """Return the milliseconds of calls of each form, in rounds that alternate between the forms."""
    share = seconds / max(1, len(forms))
    counts = [warmed_up(call, device, share, 3, rounds * timed) for call in forms.values()]
    count = max(1, min(counts) // rounds)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds if min(counts) >= rounds else 1):
        for name, call in forms.items():
            times[name] += call_times(call, count, device)
    return times


def summary(times: list[float], images: int = 0) -> dict[str, float]:
    """Return median, lowest and highest of milliseconds, and images per second by the median."""
    middle = statistics.median(times)
    values = {"ms": middle, "ms_lowest": min(times), "ms_highest": max(times), "timed": len(times)}
    return values | ({"images_per_second": 1000 * images / middle} if images else {})


def compared(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians by form, and how many times faster the first is than each other."""
    medians = {name: summary(values)["ms"] for name, values in times.items()}
    first, *others = medians
    ratios = {f"{first} faster than {name}, times": medians[name] / medians[first] for name in others}
    return {f"{name}_ms": value for name, value in medians.items()} | ratios


def reset_peak(device: str) -> None:
    """Begin to measure the peak of the GPU's memory anew."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """Return the peak memory: of the GPU's tensors, or of this process, which cannot be reset."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resident("VmHWM") / 2**30


def profile(call: Callable[[], object], count: int, device: str) -> dict[str, Any]:
    """Return what `count` calls spend their time on, by torch's profiler; see `parse_trace`."""
    on_gpu = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(count):
            call()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    return parse_trace(trace, count, ON_GPU if on_gpu else ("cpu_op",))


def parse_trace(trace: dict[str, Any], count: int, categories: Iterable[str]) -> dict[str, Any]:
    """Summarise a Chrome trace of `count` calls, per call.

    Args:
        trace: as torch's profiler writes it; times are microseconds.
        count: calls.
        categories: of the events that count as work: `ON_GPU`, or the operators of a CPU (nested ones count
            again in `kernels` and `top`, not in `busy_ms`).

    Returns:
        `busy_ms` (at least one kernel runs), `kernels`, `launches`, `span_ms` (from the first kernel to the
        end of the last), `top` (name, ms, calls, share of the kernels' time) and `kinds` (share by kind).
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    work = [event for event in events if event.get("cat") in tuple(categories)]
    if not work:
        raise RuntimeError("the profiler recorded no kernel")
    starts = [(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in work]
    launches = sum("LaunchKernel" in str(event["name"]) for event in events)
    time_of, calls_of = Counter(), Counter()
    for event in work:
        time_of[event["name"]] += float(event["dur"]) / 1000 / count
        calls_of[event["name"]] += 1
    total = sum(time_of.values())
    kinds = Counter()
    for name, milliseconds in time_of.items():
        kinds[kind_of(name)] += milliseconds / max(total, 1e-9)
    return {
        "busy_ms": covered(starts) / 1000 / count,
        "span_ms": (max(end for _, end in starts) - min(start for start, _ in starts)) / 1000 / count,
        "kernels": len(work) / count,
        "launches": launches / count,
        "top": [
            {"name": name[:120], "ms": ms, "calls": calls_of[name] / count, "share": ms / max(total, 1e-9)}
            for name, ms in time_of.most_common(SHOWN)
        ],
        "kinds": dict(kinds.most_common()),
    }


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel, a key of `KINDS`, or other."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals (start, end)."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
