"""The machine: device, precision, threads, memory layout, and copies to the device."""

import ctypes
import errno
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.distributed import Processes

LARGE_MAP = 100 * 2**20  # bytes
BYTES_PER_PIXEL = 64 * 2  # the largest feature maps have 64 channels of 16 bits


def keep_freed_memory(largest_weight: int = 0, pixels: int = 0) -> None:
    """Let glibc keep freed memory instead of returning it to the kernel at every step.

    By default large tensors are mapped and unmapped by the kernel at each use, and every page faults again.
    Call this once before the first large tensor, and again when the network is known. Does nothing with a C
    library other than glibc.

    Where feature maps exceed `LARGE_MAP` bytes, blocks larger than that and than the largest weight are still
    returned: kept memory has no holes of their size, and the heap would grow by a fifth. Weights stay below
    the threshold, because their gradients would be mapped again at every step.

    Args:
        largest_weight: size of the largest parameter in bytes; 0 before the network is built.
        pixels: pixels that are computed together (batch x height x width).
    """
    if sys.platform != "linux" or "MALLOC_CONF" in os.environ or "LD_PRELOAD" in os.environ:
        return  # another allocator may be in use
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return
    trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4  # constants of malloc.h
    mapped = 0
    if pixels * BYTES_PER_PIXEL > LARGE_MAP:  # older versions of glibc refuse a threshold this high: 0
        mapped = mallopt(mmap_threshold, min(max(LARGE_MAP, largest_weight + 2**20), 2**31 - 1))
    mallopt(mmap_max, 2**16 if mapped else 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)


def pick_device(name: str, processes: Processes = Processes()) -> torch.device:  # noqa: B008  (immutable)
    """Return the device `name`, and make it the current one if it is a GPU.

    Args:
        name: auto (a GPU if there is one, else the CPU), cpu, cuda, cuda:1, mps. Under torchrun, auto and
            cuda are the GPU whose number is the process's local rank.
        processes: this process among those of the run.

    Raises:
        ValueError: the device is not available, or one GPU is named for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", processes.local_rank)
        elif device.type == "cuda" and processes.world_size > 1:
            raise ValueError(
                f"device {name!r} names one GPU for {processes.world_size} processes. Use device 'cuda', "
                "which gives each process a GPU of its own"
            )
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} is not available: {reason}. Use device 'auto'") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """Return the dtype that convolutions compute in: float32, bfloat16 or float16."""
    if amp == "fp16" and device.type == "cpu":  # slow, and gradient scaling is not supported
        raise ValueError("amp fp16 needs a GPU; got device cpu. Use bf16 or auto")
    if amp == "tf32" and device.type != "cuda":
        raise ValueError(f"amp tf32 needs a CUDA GPU; got device {device.type}. Use off or auto")
    if amp == "auto":
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if has_bf16 else torch.float16
        return torch.bfloat16 if device.type == "cpu" and cpu_gains_by_bf16() else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)


def set_backends(deterministic: bool, amp: str, device: torch.device) -> None:
    """Set torch's global switches for determinism and for TF32 on a CUDA GPU.

    With `amp` off all is float32, as on a CPU; with any other value TF32 is allowed both in convolutions and
    in matrix products that autocast leaves in float32. (By default torch allows it in convolutions alone.)
    """
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it at first use
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = amp != "off"
        torch.set_float32_matmul_precision("highest" if amp == "off" else "high")


def cpu_gains_by_bf16() -> bool:
    """Return whether this CPU is faster in bfloat16 than in float32.

    The instruction set alone does not decide: Intel's avx512_bf16 without AMX ran convolutions at half the
    float32 rate where this was measured (Xeon, torch 2.15). With AMX, on AMD Zen 4 and later, and on Arm with
    bf16 matrix instructions, the vendors' rate is at least twice that of float32.
    """
    words = _cpu_words()
    return cpu_has_amx() or "bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words


def cpu_has_amx() -> bool:
    """Return whether this CPU has bfloat16 tile multiplication (AMX)."""
    return "amx_bf16" in _cpu_words()


def _cpu_words() -> set[str]:
    """Return all words of Linux's description of the CPU."""
    path = Path("/proc/cpuinfo")
    return set(path.read_text(encoding="ascii", errors="ignore").split()) if path.exists() else set()


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # respects taskset and container limits on cores
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(processes: Processes) -> None:
    """Give each process of a machine its share of the cores.

    torchrun sets OMP_NUM_THREADS to 1 unless the user has set it, so that every process would read and
    augment its images on one thread.
    """
    if processes.local_world_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, available_cores() // processes.local_world_size))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device, without making the host wait where that is safe.

    Only a copy from pinned memory to a CUDA GPU is asynchronous: torch keeps the pinned source until the
    copy is done. On mps the source could be freed and reused before (pytorch issues 139550 and 189690).
    """
    return tensor.to(device, non_blocking=device.type == "cuda" and tensor.is_pinned())


def memory_format(channels_last: bool, device: torch.device) -> torch.memory_format:
    """Return the memory format of weights and feature maps.

    On mps always contiguous: the channels_last backward is about 30 times slower there (pytorch issue
    193349).
    """
    return torch.channels_last if channels_last and device.type != "mps" else torch.contiguous_format


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Return a context of mixed precision; disabled for float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def counting_device(device: torch.device) -> torch.device:
    """Return where predictions are counted: on `device`, or on the CPU for mps, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def describe_device(device: torch.device) -> str:
    """Return the GPU's name and memory, or the CPU's number of threads, as text."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def is_busy(device: torch.device) -> bool:
    """Return whether a GPU still has queued work; a CPU has finished when a call returns."""
    return device.type == "cuda" and not torch.cuda.current_stream(device).query()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of the GPU or of the machine ran out; torch raises several types for it."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    )


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of the GPU's tensors, or of this process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def multiply_adds(model: nn.Module, images: Tensor) -> float:
    """Count the multiply-adds of a forward pass; on the meta device nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops() / 2
