"""What the machine offers: which device, which precision, how many threads, and memory that is kept."""

import ctypes
import errno
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch

MAPPED = 100 * 2**20  # bytes
MAP = 64 * 2  # bytes a pixel: the finest maps have 64 channels of 16 bits


def keep_freed_memory(largest_weight: int = 0, pixels: int = 0) -> None:
    """Let glibc keep freed memory instead of handing it back and faulting it in again at every step.

    Large tensors are otherwise mapped and unmapped by the kernel at each use. To be called before the first
    large tensor; does nothing where the C library is another one. Once the network is there, it is told the
    bytes of its largest weight and the pixels that are computed together. Where these have maps above
    `MAPPED`, what is above it and above the weight goes back to the kernel: of such maps the kept memory has
    no holes of their size, so that the heap grows by a fifth. A weight stays below, as its gradient would be
    mapped anew at every step; and with fewer pixels so does all else, as oneDNN's room for its sums.
    """
    if sys.platform != "linux" or "MALLOC_CONF" in os.environ or "LD_PRELOAD" in os.environ:
        return  # another allocator may be in charge
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return
    trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4  # names in malloc.h
    mapped = 0
    if pixels * MAP > MAPPED:  # older versions refuse so high a threshold: 0
        mapped = mallopt(mmap_threshold, min(max(MAPPED, largest_weight + 2**20), 2**31 - 1))
    mallopt(mmap_max, 2**16 if mapped else 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name: auto (a GPU, or the CPU), cpu, cuda (GPU number `local_rank`), cuda:1, mps."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} is not to be had here: {why}. auto finds one") from error
    return device


def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """The dtype that convolutions compute in: float32, bfloat16 or float16."""
    if amp == "fp16" and device.type == "cpu":  # slow, and without gradient scaling to speak of
        raise ValueError("amp fp16 needs a GPU; got device cpu. Use bf16 or auto")
    if amp == "auto":
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if has_bf16 else torch.float16
        return torch.bfloat16 if device.type == "cpu" and cpu_gains_by_bf16() else torch.float32
    return {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def cpu_gains_by_bf16() -> bool:
    """Whether this CPU computes faster in bfloat16 than in float32.

    The instructions alone do not say so: Intel's avx512_bf16 without AMX tiles ran convolutions at half the
    rate of float32 where this was measured (Xeon, torch 2.15). With AMX, on AMD's Zen 4 and later, and on Arm
    with bf16 matrix instructions the vendors' rate is twice that of float32 or more.
    """
    words = _cpu_words()
    return cpu_has_amx() or "bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words


def cpu_has_amx() -> bool:
    """Whether this CPU multiplies tiles of bfloat16."""
    return "amx_bf16" in _cpu_words()


def _cpu_words() -> set[str]:
    """All words of Linux's description of the CPU."""
    path = Path("/proc/cpuinfo")
    return set(path.read_text(encoding="ascii", errors="ignore").split()) if path.exists() else set()


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Mixed precision in `precision`; off for float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def counting_device(device: torch.device) -> torch.device:
    """Where predictions made on a device are counted: there, or on the CPU for mps, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def describe_device(device: torch.device) -> str:
    """The device in words: the GPU's name and memory, or the CPU's threads."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def is_busy(device: torch.device) -> bool:
    """Whether a GPU still has work; a CPU has done it all when the call returns."""
    return device.type == "cuda" and not torch.cuda.current_stream(device).query()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the GPU or of the machine, for which torch has no exception of its own."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    )


def peak_memory(device: torch.device) -> int:
    """Largest memory in use so far, in bytes: the GPU's tensors, or this process; 0 where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
