"""train.py's runs as gpu.py measures them: their device, settings, data and memory."""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import worker
from children import Settings
from worker import Case

Report = Callable[[dict[str, Any]], None]  # takes values by name, and may be called several times
CAMVID_SIZE = (360, 480)


def use(device: str) -> None:
    """Make a CUDA device the current one, and start CUDA, which counting memory needs."""
    if device.startswith("cuda"):
        if torch.device(device).index is not None:
            torch.cuda.set_device(device)
        torch.empty(1, device=device)


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


def camvid_size(settings: Settings) -> tuple[int, int]:
    """360 x 480 at size 512, smaller in proportion, 32 at least."""
    height, width = (max(32, side * settings.size // 512) for side in CAMVID_SIZE)
    return CAMVID_SIZE if settings.size >= 512 else (height, width)
