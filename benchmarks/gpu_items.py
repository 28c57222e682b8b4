"""The measurements of gpu.py: each runs in a child process and reports values as it has them.

Each function takes `report`, which receives a dict of values and may be called several times, the `settings`
of the command and `seconds`, its share of the time: it takes fewer steps where these would not fit.
"""

from __future__ import annotations

import csv
import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import profiling
import torch
import torch.nn.functional as F
import worker
from children import ROOT, NotHere, Settings, reason
from timing import machine
from torch import Tensor
from worker import IGNORED, NETWORKS, Case

from config import Config
from utils.cli import Fail, make, read_settings
from utils.device import is_out_of_memory

Report = Callable[[dict[str, Any]], None]
CAMVID_SIZE = (360, 480)
SIZES = {True: 2**30, False: 2**24}  # bytes that are copied, on a GPU and on a CPU
RECIPE = ROOT / "benchmarks" / "recipes" / "camvid_gpu.json"
DRIVER = "name,driver_version,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm,temperature.gpu,memory.total"


def use(device: str) -> None:
    """Make a CUDA device the current one, and start CUDA, which counting memory needs."""
    if device.startswith("cuda"):
        if torch.device(device).index is not None:
            torch.cuda.set_device(device)
        torch.empty(1, device=device)


def describe(report: Report, settings: Settings, seconds: float) -> None:
    """The machine; fails where the device cannot be used."""
    torch.ones(8, device=settings.device).sum().item()
    report({"machine": machine("torchvision", "numpy", "triton")})


# --- limits


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


# --- tests


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


# --- waits


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


# --- training steps


def case_of(settings: Settings, network: str, **more: Any) -> Case:
    """A case of train.py's own step in bf16; `more` are fields of `Case`, or settings of Config."""
    fields = {name: more.pop(name) for name in ("size", "batch", "data", "compile_mode") if name in more}
    options = {"amp": "bf16", "cache_dir": str(Path(settings.scratch) / "cache"), **more}
    sizes = {"size": settings.size, "batch": settings.batch, **fields}
    return Case(network, device=settings.device, settings=options, **sizes)


@contextmanager
def ready(settings: Settings, case: Case) -> Iterator[Any]:
    """train.py's run of a case, on shared data; its memory is freed after the block."""
    if case.data is None:
        case = replace(case, data=noise(settings, max(16, case.batch), 2, case.size))
    torch.manual_seed(0)
    run = worker.our_run(case, Path(tempfile.mkdtemp(dir=settings.scratch)))
    try:
        yield run
    finally:
        worker.end_run(run)
        del run
        free_memory()


def free_memory() -> None:
    """Give unused memory back, so that the next network finds it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def noise(settings: Settings, train: int, val: int, size: int | tuple[int, int]) -> str:
    """A folder of generated images of 12 classes, written once."""
    height, width = (size, size) if isinstance(size, int) else size
    folder = Path(settings.scratch) / f"noise_{train}_{val}_{height}_{width}"
    if not folder.exists():
        part = Path(tempfile.mkdtemp(dir=settings.scratch))
        worker.write_pictures(part, train, val, (height, width), 12, "jpg")
        part.rename(folder)
    return str(folder)


def street_scenes(settings: Settings) -> str:
    """CamVid, where it is given (on a CPU a part of it), else generated images of its size."""
    train, val = (256, 64) if settings.on_gpu else (4, 2)
    if settings.camvid is None:
        return noise(settings, train, val, CAMVID_SIZE)
    if settings.on_gpu:
        return settings.camvid
    folder = Path(settings.scratch) / "camvid"
    if not folder.exists():
        part = Path(tempfile.mkdtemp(dir=settings.scratch))
        for split, count in (("train", train), ("val", val)):
            for kind in ("images", "masks"):
                (part / split / kind).mkdir(parents=True)
                for path in sorted(Path(settings.camvid, split, kind).iterdir())[:count]:
                    shutil.copy(path, part / split / kind)
        part.rename(folder)
    return str(folder)


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


def kernels(step: Callable[[], object], settings: Settings, milliseconds: float) -> dict[str, Any]:
    """What a step of so many milliseconds spends its time on; a profiler that fails is a value."""
    try:
        found = profiling.profile(step, 3 if settings.on_gpu else 1, settings.device)
    except Exception as error:  # the profiler is not available on every machine
        return {"profiler": reason(error)}
    return {"idle_share": 1 - found["busy_ms"] / milliseconds, **found} if settings.on_gpu else found


# --- peer


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


# --- A/B


def form_of_step(report: Report, settings: Settings, seconds: float, network: str, op: str) -> None:
    """A step with the fast and with the plain form of an operator."""
    with worker.op_form(op, True):  # an unknown one is told before the network is built
        pass
    with ready(settings, case_of(settings, network)) as run:
        step = worker.our_step(run)

        def in_form(fast: bool) -> None:
            with worker.op_form(op, fast):
                step()

        forms = {"fast": lambda: in_form(True), "plain": lambda: in_form(False)}
        report(compared(profiling.in_turns(forms, settings.device, 0.5 * seconds)))


def compared(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians by form, and how many times faster the first is than each other."""
    medians = {name: profiling.summary(values)["ms"] for name, values in times.items()}
    first, *others = medians
    ratios = {f"{first} faster than {name}, times": medians[name] / medians[first] for name in others}
    return {f"{name}_ms": value for name, value in medians.items()} | ratios


RESIZE_FORMS = {  # values of ops.override
    "products": {"resize": True},
    "interpolate": {"resize": False, "resize_backward": False},
    "interpolate, gradient in one piece": {"resize": False, "resize_backward": True},
}


def form_of_resize(
    report: Report, settings: Settings, seconds: float, channels: int, small: int, to: int
) -> None:
    """Bilinear resizing with its gradient in bf16: time, memory and error of each form against float64."""
    side, target = (max(2, length * settings.size // 512) for length in (small, to))
    x, weight = (
        torch.rand(settings.batch, channels, length, length, device=settings.device).to(
            torch.bfloat16, memory_format=torch.channels_last
        )
        for length in (side, target)
    )
    exact = resize_gradient(x.double(), weight.double(), exactly=True)
    calls = {}
    for name, forms in RESIZE_FORMS.items():

        def call(forms: dict[str, bool] = forms) -> tuple[Tensor, Tensor]:
            with ExitStack() as stack:
                for op, fast in forms.items():
                    stack.enter_context(worker.op_form(op, fast))
                return resize_gradient(x, weight)

        profiling.reset_peak(settings.device)
        errors = [relative_error(a, b) for a, b in zip(call(), exact, strict=True)]
        report({f"{name}: error": errors[0], f"{name}: gradient error": errors[1]})
        report({f"{name}: peak_gib": profiling.peak_gib(settings.device)})
        calls[name] = call
    report(compared(profiling.in_turns(calls, settings.device, 0.5 * seconds)))


def resize_gradient(x: Tensor, weight: Tensor, exactly: bool = False) -> tuple[Tensor, Tensor]:
    """Resize to the size of `weight`; the result, and the gradient of its sum weighted by `weight`."""
    x = x.detach().requires_grad_()
    size = tuple(weight.shape[-2:])
    out = F.interpolate(x, size, mode="bilinear") if exactly else worker.resized(x, size)
    out.backward(weight)
    return out.detach(), x.grad


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of the exact values."""
    return float((found.double() - exact).norm() / exact.norm())


def form_of_loss(report: Report, settings: Settings, seconds: float, classes: int) -> None:
    """The joint loss with its gradient on bf16 logits: time and peak memory of each form."""
    batch = max(1, settings.batch * 12 // classes)
    logits, masks = logits_of(settings, batch, classes)
    losses = {"ours": worker.our_loss(True), "torch": torch_joint_loss}
    try:
        losses["plain"] = worker.our_loss(False)
    except NotHere as note:
        report({"plain": str(note)})
    calls = {}
    for name, loss in losses.items():

        def call(loss: Callable = loss) -> None:
            logits.grad = None
            loss(logits, masks).backward()

        profiling.reset_peak(settings.device)
        call()
        report({f"{name}_peak_gib": profiling.peak_gib(settings.device)})
        calls[name] = call
    report({"batch": batch, "classes": classes})
    report(compared(profiling.in_turns(calls, settings.device, 0.6 * seconds)))


def logits_of(settings: Settings, batch: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits in bf16 and masks of random numbers."""
    shape = (batch, classes, settings.size, settings.size)
    logits = torch.randn(shape, device=settings.device)
    logits = logits.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    return logits, torch.randint(classes, (batch, *shape[2:]), device=settings.device)


def torch_joint_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Half cross entropy by torch, half soft Dice over softmax and one-hot, in float32."""
    logits = logits.float()
    cross_entropy = F.cross_entropy(logits, masks, ignore_index=IGNORED)
    probabilities = logits.softmax(1)
    targets = F.one_hot(masks, logits.shape[1]).permute(0, 3, 1, 2)
    overlap = (probabilities * targets).sum((0, 2, 3))
    total = probabilities.sum((0, 2, 3)) + targets.sum((0, 2, 3))
    return 0.5 * cross_entropy + 0.5 * (1 - ((2 * overlap + 1) / (total + 1)).mean())


def sums_by_label(report: Report, settings: Settings, seconds: float) -> None:
    """Forms of Dice's sum over the pixels of each label, at 12, 21 and 150 classes."""
    pixels = settings.batch * settings.size**2
    values = torch.rand(pixels, device=settings.device)
    for classes in (12, 21, 150):
        labels = torch.randint(classes, (pixels,), device=settings.device)
        forms = {name: partial(form, values, labels, classes) for name, form in LABEL_SUMS.items()}
        exact = _index_add(values.double(), labels, classes)
        errors = {f"{name}: error": relative_error(form(), exact) for name, form in forms.items()}
        found = compared(profiling.in_turns(forms, settings.device, seconds / 4))
        report({f"{classes} classes": found | errors})


def _index_add(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    return values.new_zeros(classes).index_add_(0, labels, values)


def _scatter_add(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    return values.new_zeros(classes).scatter_add_(0, labels, values)


def _scatter_rows(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Into 1024 rows of sums first, so that few additions meet at one address."""
    rows = 1024 if len(values) % 1024 == 0 else 1
    labels = labels + classes * torch.arange(rows, device=labels.device).repeat(len(labels) // rows)
    return values.new_zeros(rows * classes).scatter_add_(0, labels, values).view(rows, classes).sum(0)


def _compare(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    ids = torch.arange(classes, device=labels.device)[:, None]
    return torch.where(labels == ids, values, 0.0).sum(1)


LABEL_SUMS = {
    "compare": _compare,  # memory and time grow with the classes
    "index_add": _index_add,
    "scatter_add": _scatter_add,
    "scatter_add into 1024 rows": _scatter_rows,
}


def ema_cost(report: Report, settings: Settings, seconds: float, network: str) -> None:
    """The moving average of the weights: time on the GPU and on the host per update."""
    with ready(settings, case_of(settings, network, ema_decay=0.999)) as run:
        update = worker.our_ema(run)
        timed = profiling.warmed_up(update, settings.device, seconds / 4)
        report(profiling.summary(profiling.call_times(update, timed, settings.device)))
        report({"host_ms": profiling.host_time(update, settings.device)})


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


def layouts(report: Report, settings: Settings, seconds: float, network: str) -> None:
    """train.py's step in channels_last and in the contiguous layout."""
    with ExitStack() as stack:
        forms = {}
        for name, value in (("channels_last", True), ("contiguous", False)):
            case = case_of(settings, network, channels_last=value)
            forms[name] = worker.our_step(stack.enter_context(ready(settings, case)))
        report(compared(profiling.in_turns(forms, settings.device, 0.4 * seconds)))


# --- compile


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


# --- data


MOVES = {"zoom, colour": {}, "zoom, colour, rotation": {"rotate": 10.0}}


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


# --- validation and prediction


def validation(report: Report, settings: Settings, seconds: float) -> None:
    """Images per second of train.py's validation and of predict.py, alone and as a process."""
    data = street_scenes(settings)
    size = camvid_size(settings)
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
            predict_once({**common, "output": f"{output}_{name}", "overlay": False})
            report({f"{name}_images_per_second": images / (time.perf_counter() - start)})
        start = time.perf_counter()
        words = [word for name, value in common.items() for word in (f"--{name}", value)]
        command = [sys.executable, "predict.py", *words, "--no-overlay", "--output", f"{output}_process"]
        subprocess.run(command, cwd=ROOT, check=True, timeout=seconds)
        taken = time.perf_counter() - start
        report({"predict_process_seconds": taken, "predict_process_images_per_second": images / taken})


def predict_once(given: dict[str, Any]) -> None:
    """predict.py's main."""
    import predict

    predict.main(predict.Args(**given))


# --- CamVid


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


def camvid_size(settings: Settings) -> tuple[int, int]:
    """360 x 480 at size 512, smaller in proportion, 32 at least."""
    height, width = (max(32, side * settings.size // 512) for side in CAMVID_SIZE)
    return CAMVID_SIZE if settings.size >= 512 else (height, width)


def camvid_config(settings: Settings, run_name: str, **changes: Any) -> Config:
    """The recipe's settings for the network of the command."""
    model = {"model": "deeplabv3plus", "backbone": "resnet50"} | NETWORKS[settings.network]
    if "backbone" not in NETWORKS[settings.network]:
        del model["backbone"]
    values = read_settings(RECIPE, Config) | model | {"image_size": camvid_size(settings)}
    if settings.camvid is None:  # generated masks have 12 classes
        for name in ("class_names", "class_colors"):
            values.pop(name)
        values |= {"num_classes": 12, "ignore_index": IGNORED}
    values |= {"data_root": street_scenes(settings), "output_dir": settings.runs, "run_name": run_name}
    values |= {"device": settings.device, "cache_dir": str(Path(settings.scratch) / "cache")}
    return make(Config, values | {"batch_size": min(values["batch_size"], settings.batch)} | changes)


def train_for(config: Config, seconds: float) -> tuple[Path | None, list[float], str]:
    """Train, and stop by SIGTERM, with a checkpoint saved, when the seconds are over.

    Returns:
        The run's folder, None where there is none yet; when the run started, each epoch began, and all
        ended; why it stopped, if it did.
    """
    import train

    def too_late(*_: object) -> None:
        raise TimeoutError("stopped before the first step")

    before = signal.signal(signal.SIGTERM, too_late)
    timer = threading.Timer(max(0.1, seconds), os.kill, (os.getpid(), signal.SIGTERM))
    clock, start, stopped, folder = EpochClock(sys.stdout), time.monotonic(), "", None
    timer.start()
    try:
        with redirect_stdout(clock):
            folder = train.main(config)
    except (TimeoutError, Fail) as error:
        if not isinstance(error, TimeoutError) and error.code != 128 + signal.SIGTERM:
            raise
        stopped = str(error)
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    return folder, [start, *clock.began, time.monotonic()], stopped


def epoch_costs(moments: list[float]) -> dict[str, float]:
    """Seconds by part, from a run of five epochs that validates after the second, fourth and last.

    Args:
        moments: when it started, each of the five epochs began, and it ended.
    """
    if len(moments) != 7:
        raise TimeoutError(f"the run of 5 epochs that plans the long one had time for {len(moments) - 2}")
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
    """How many epochs fit in the seconds, with a margin of a tenth, and how often to validate."""
    left = 0.9 * (seconds - costs["start"] - costs["end"])
    number = int((left - validations * costs["validation"]) / costs["epoch"])
    if number < 2 * validations:
        number = int(left / (costs["epoch"] + costs["validation"]))
    number = min(1000, max(1, number))
    return number, max(1, math.ceil(number / validations))


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
        costs = epoch_costs(train_for(short, deadline - time.monotonic())[1])
        report({f"{part}_seconds": value for part, value in costs.items()})
        deadline -= costs["end"]  # drawing is not interrupted
        epochs, every = planned_epochs(costs, deadline - time.monotonic())
        report({"planned_epochs": epochs, "val_every": every})
        folder = Path(settings.runs, name)
        config = camvid_config(settings, name, epochs=epochs, val_every=every)
    free_memory()
    started = time.monotonic()
    _, _, stopped = train_for(config, deadline - time.monotonic())
    report({"training_seconds": time.monotonic() - started, "folder": str(folder)})
    if stopped:
        report({"stopped": stopped})
    copy_results(folder, Path(settings.output), settings.network)
    report(scores_of(folder / "log.csv"))


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
