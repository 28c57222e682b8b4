"""What the device can do, and how fast train.py's step is on it.

Each function is one measurement of gpu.py. It takes `report`, which receives a dict of values and may be
called several times, the `settings` of the command, and `seconds`, its share of the time: it takes fewer
steps where these would not fit.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import profiling
import torch
import worker
from children import NotHere, Settings, reason
from gpu_runs import Report, case_of, free_memory, ready
from timing import machine
from worker import Case

from utils.device import is_out_of_memory

SIZES = {True: 2**30, False: 2**24}  # bytes that are copied, on a GPU and on a CPU
DRIVER = "name,driver_version,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm,temperature.gpu,memory.total"


def describe(report: Report, settings: Settings, seconds: float) -> None:
    """The machine; fails where the device cannot be used."""
    torch.ones(8, device=settings.device).sum().item()
    report({"machine": machine("torchvision", "numpy", "triton")})


def limits(report: Report, settings: Settings, seconds: float) -> None:
    """Versions, and what the device can do: matrix products, copies, launches."""
    report({"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()})
    if settings.on_gpu:
        report(card())
    report(launch_costs(settings))
    report(product_rates(settings))
    report(copy_rates(settings))


def card() -> dict[str, Any]:
    """The card's properties and, where nvidia-smi answers, its driver, power limit and clocks."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    values: dict[str, Any] = {
        "card": found.name,
        "memory_gib": found.total_memory / 2**30,
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
    }
    try:
        command = ["nvidia-smi", f"--query-gpu={DRIVER}", "--format=csv,noheader"]
        line = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        return values | dict(
            zip(DRIVER.split(","), map(str.strip, line.splitlines()[0].split(",")), strict=True)
        )
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        return values | {"nvidia_smi": reason(error)}


def product_rates(settings: Settings, repeat: int = 10) -> dict[str, float]:
    """TFLOP/s of a product of square matrices of random numbers, by precision."""
    rates = {}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        rates[f"mm_{name}_tflops"] = product_rate(settings, dtype, repeat)
    return rates


def product_rate(settings: Settings, dtype: torch.dtype, repeat: int = 10) -> float:
    """TFLOP/s of torch.mm in one dtype."""
    a, b = (
        torch.randn(settings.product, settings.product, device=settings.device).to(dtype) for _ in range(2)
    )
    out = torch.mm(a, b)
    profiling.call_times(lambda: torch.mm(a, b, out=out), 3, settings.device)
    times = profiling.call_times(lambda: torch.mm(a, b, out=out), repeat, settings.device)
    return 2 * settings.product**3 / (profiling.summary(times)["ms"] / 1000) / 1e12


def copy_rates(settings: Settings) -> dict[str, float]:
    """GB/s of copies: within the device (bytes read and written), and from and to the host."""
    size = SIZES[settings.on_gpu]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    copies = {"device_copy": (2, lambda: target.copy_(source))}
    if settings.on_gpu:
        host = torch.empty(size // 4, dtype=torch.uint8)
        pinned, part = host.pin_memory(), target[: size // 4]
        copies["pinned_to_device"] = (0.25, lambda: part.copy_(pinned, non_blocking=True))
        copies["device_to_pinned"] = (0.25, lambda: pinned.copy_(part, non_blocking=True))
        copies["pageable_to_device"] = (0.25, lambda: part.copy_(host))
    rates = {}
    for name, (passes, copy) in copies.items():
        profiling.call_times(copy, 2, settings.device)
        times = profiling.call_times(copy, 10, settings.device)
        rates[f"{name}_gb_per_s"] = passes * size / profiling.summary(times)["ms"] / 1e6
    return rates


def launch_costs(settings: Settings, count: int = 2000) -> dict[str, float]:
    """Microseconds per tiny kernel: issued and done, one after the other."""
    x = torch.zeros(1, device=settings.device)
    times = profiling.call_times(lambda: [x.add_(1) for _ in range(count)], 3, settings.device)
    return {"us_per_tiny_kernel": 1000 * min(times) / count}


def steps(report: Report, settings: Settings, seconds: float, network: str) -> None:
    """train.py's step of one network: time, share of the device's rate, kernels, memory."""

    def measure(batch: int) -> None:
        case = case_of(settings, network, batch=batch)
        with ready(settings, case) as run:
            step = worker.our_step(run)
            timed = profiling.warmed_up(step, settings.device, 0.6 * seconds, timed=settings.steps)
            profiling.reset_peak(settings.device)  # without what cuDNN's search for kernels took
            values = profiling.summary(profiling.call_times(step, timed, settings.device), batch)
            work = worker.floating_point_work(case)
            values |= {"batch": batch, "gflop_per_step": work / 1e9, "tflops": work / values["ms"] / 1e9}
            values |= {"peak_gib": profiling.peak_gib(settings.device)}
            values |= {"host_ms": profiling.host_time(step, settings.device)}
            rate = product_rate(settings, torch.bfloat16, 5)
            report(values | {"mm_bf16_tflops": rate, "share_of_mm": values["tflops"] / rate})
            report(kernels(step, settings, values["ms"]))

    with_half_the_batch(report, settings.batch, measure)


def with_half_the_batch(report: Report, batch: int, measure: Callable[[int], None]) -> None:
    """Call `measure(batch)`; where memory runs out, again with half the batch, and say so."""
    while True:
        try:
            return measure(batch)
        except Exception as error:
            if not is_out_of_memory(error) or batch == 1:
                raise
            report({f"batch_{batch}": reason(error)})
        batch //= 2  # outside the handler, which keeps the frames and their tensors alive
        free_memory()


def kernels(step: Callable[[], object], settings: Settings, milliseconds: float) -> dict[str, Any]:
    """What a step of so many milliseconds spends its time on; a profiler that fails is a value."""
    try:
        found = profiling.profile(step, 3 if settings.on_gpu else 1, settings.device)
    except Exception as error:  # the profiler is not available on every machine
        return {"profiler": reason(error)}
    return {"idle_share": 1 - found["busy_ms"] / milliseconds, **found} if settings.on_gpu else found


def peer(report: Report, settings: Settings, seconds: float, way: str) -> None:
    """Images per second of a loop: torchvision's or our network in a plain one, or train.py's own step."""
    network = "deeplabv3plus_resnet50"

    def measure(batch: int) -> None:
        with ExitStack() as stack:
            if way == "train.py":
                case = case_of(settings, network, batch=batch)
                step = worker.our_step(stack.enter_context(ready(settings, case)))
            else:
                case = plain_case(settings, network, batch, way)
                step, _ = worker.plain_step(case)
            timed = profiling.warmed_up(step, settings.device, seconds, timed=settings.steps)
            profiling.reset_peak(settings.device)
            values = profiling.summary(profiling.call_times(step, timed, settings.device), batch)
            work = worker.floating_point_work(case)
            values |= {
                "batch": batch,
                "gflop_per_image": work / batch / 1e9,
                "tflops": work / values["ms"] / 1e9,
            }
            report(values | {"peak_gib": profiling.peak_gib(settings.device)})

    with_half_the_batch(report, settings.batch, measure)


def plain_case(settings: Settings, network: str, batch: int, maker: str) -> Case:
    """A plain loop with the flags of train.py: bf16, channels_last, fused Adam, cross entropy."""
    way = dict(maker=maker, trainer=torch.bfloat16, channels_last=True, bare=True, fused_adam=True)
    return Case(network, size=settings.size, batch=batch, device=settings.device, **way)


def batches(report: Report, settings: Settings, seconds: float, network: str, half: bool) -> None:
    """Images per second of train.py's step at a quarter of the batch, the batch, and four times it."""
    size = max(32, settings.size // 2) if half else settings.size
    for batch in (max(1, settings.batch // 4), settings.batch, 4 * settings.batch):
        try:
            with ready(settings, case_of(settings, network, size=size, batch=batch)) as run:
                step = worker.our_step(run)
                timed = profiling.warmed_up(step, settings.device, seconds / 8)
                profiling.reset_peak(settings.device)
                times = profiling.call_times(step, timed, settings.device)
            found = profiling.summary(times, batch) | {"peak_gib": profiling.peak_gib(settings.device)}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found = {"failed": reason(error)}
        report({f"batch {batch}": found})
        free_memory()


def ema_cost(report: Report, settings: Settings, seconds: float, network: str) -> None:
    """The moving average of the weights: time on the GPU and on the host per update."""
    with ready(settings, case_of(settings, network, ema_decay=0.999)) as run:
        update = worker.our_ema(run)
        timed = profiling.warmed_up(update, settings.device, seconds / 4)
        report(profiling.summary(profiling.call_times(update, timed, settings.device)))
        report({"host_ms": profiling.host_time(update, settings.device)})


def compiled(
    report: Report, settings: Settings, seconds: float, network: str, mode: str | None = None
) -> None:
    """train.py's step compiled: seconds until it runs, time per step, recompilations.

    `mode` None is the setting `compile`; else torch.compile's mode, at a quarter of the batch.
    """
    if not settings.on_gpu:
        raise NotHere("not on this device: compiling is for GPUs")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(settings.scratch) / "inductor")  # empty at first
    batch = settings.batch if mode is None else max(1, settings.batch // 4)
    with ready(settings, case_of(settings, network, batch=batch)) as run:
        step = worker.our_step(run)
        timed = profiling.warmed_up(step, settings.device, 10.0)
        eager = profiling.summary(profiling.call_times(step, timed, settings.device))["ms"]
    report({"batch": batch, "eager_ms": eager})
    more = {"compile": True} if mode is None else {"compile_mode": mode}
    with ready(settings, case_of(settings, network, batch=batch, **more)) as run:
        step = worker.our_step(run)
        report({"seconds_to_compile": 1e-3 * profiling.call_times(step, 1, settings.device)[0]})
        report(compilations())
        timed = profiling.warmed_up(step, settings.device, 10.0)
        profiling.reset_peak(settings.device)
        values = profiling.summary(profiling.call_times(step, timed, settings.device), batch)
        values |= {"times_faster": eager / values["ms"], "peak_gib": profiling.peak_gib(settings.device)}
        report(values | {"host_ms": profiling.host_time(step, settings.device)})
        before = compilations()
        smaller = worker.our_step(run, max(1, batch - 1))
        report({"smaller_batch_seconds": 1e-3 * profiling.call_times(smaller, 1, settings.device)[0]})
        report({f"{name}_smaller": value - before[name] for name, value in compilations().items()})
        back = profiling.call_times(step, 5, settings.device)
        report({"ms_after_smaller": profiling.summary(back)["ms"]})


def compilations() -> dict[str, int]:
    """Graphs compiled so far in this process, and breaks between them."""
    from torch._dynamo.utils import counters

    breaks = sum(counters["graph_break"].values())
    return {"graphs": int(counters["stats"]["unique_graphs"]), "graph_breaks": int(breaks)}
