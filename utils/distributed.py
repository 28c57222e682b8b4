"""Several processes as one run: `torchrun --nproc_per_node N train.py` starts them, this file joins them.

Each process has its share of every batch; DistributedDataParallel averages the gradients, counts are summed.
With one process everything here does nothing, so the loop is written once.
"""

import gc
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Of a wait for another process, which may be at work alone: data on a slow disk, a large checkpoint. One that
# has died is noticed at once, by gloo or by torchrun, which ends the others.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process's place among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine: which GPU

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0


ONE_PROCESS = Processes()


def read_processes() -> Processes:
    """What torchrun says in the environment; without it, one process. Silences all but the main one."""
    environment = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0} | dict(os.environ)
    processes = Processes(*(int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if not processes.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the life of the process)
    return processes


def join(processes: Processes, device: torch.device) -> None:
    """Meet the other processes; tensors on a GPU go by nccl, all else by gloo."""
    if processes.world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)


def leave() -> None:
    """Part from the others, where there are any, together.

    What `wrap` made must be out of use. It goes first: were it the group's last owner, it would wait under
    Python's lock for a thread of gloo's that may want that lock, to let go of the last tensors.
    """
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def wrap(model: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """The model, with its gradients averaged over the processes."""
    if processes.world_size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def averaging(model: nn.Module, now: bool) -> AbstractContextManager:
    """Around forward and backward: average the gradients only `now`, at the last part of a batch."""
    held = isinstance(model, DistributedDataParallel) and not now
    return model.no_sync() if held else nullcontext()


def sum_over(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def largest(numbers: list[int]) -> list[int]:
    """The largest of each number over the processes; goes by gloo, so that no GPU is waited for."""
    if not dist.is_initialized():
        return numbers
    tensor = torch.tensor(numbers)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def from_main(tensors: dict[str, Tensor]) -> None:
    """Overwrite the tensors by those of the main process: batch norm's statistics differ by process."""
    if dist.is_initialized():
        for tensor in tensors.values():
            dist.broadcast(tensor, src=0)


def told_by_main(value: Any) -> Any:
    """The main process's value."""
    told = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    return told[0]


def is_lost(error: BaseException) -> bool:
    """Whether another process is gone or silent: gloo's errors have no type of their own, but its name."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def wait_for_all() -> None:
    """Go on only when every process has come here."""
    if dist.is_initialized():
        dist.barrier()
