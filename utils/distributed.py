"""Several processes as one run, started by `torchrun --nproc_per_node N train.py`.

Each process takes its part of every batch; DistributedDataParallel averages the gradients, and counts are
summed. With one process every function here does nothing, so that the training loop is written once.
"""

import gc
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# How long one process waits for another, which may be reading from a slow disk or writing a checkpoint. A
# process that has died is noticed at once, by gloo or by torchrun, which ends the others.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine; the number of the GPU
    local_world_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes."""
        return self.rank == 0


def read_processes() -> Processes:
    """Read this process's ranks from torchrun's environment variables; silence all but the main process."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    processes = Processes(*(int(os.environ.get(name, default)) for name, default in names.items()))
    if not processes.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the life of the process)
    return processes


@contextmanager
def reported_once(processes: Processes) -> Iterator[None]:
    """Around what every process does alike before `join`: only the main process reports an error of it."""
    try:
        yield
    except (ValueError, OSError):
        if processes.is_main:
            raise
        sys.exit(2)


def join(processes: Processes, device: torch.device) -> None:
    """Join the process group; tensors on a GPU are sent by nccl, all others by gloo."""
    if processes.world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)


def leave() -> None:
    """Leave the process group together with the other processes.

    The wrapper that `wrap` returns must be out of use. It is collected first: as the group's last owner it
    would wait, holding Python's lock, for a gloo thread that may need that lock to free its tensors.
    """
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def wrap(model: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """Return the model, wrapped so that its gradients are averaged over the processes.

    Buffers are not broadcast before each forward pass: batch norm statistics are those of each process, and
    `from_main` makes them equal before a validation.
    """
    if processes.world_size == 1:
        return model
    options: dict[str, Any] = {"device_ids": [device.index]} if device.type == "cuda" else {}
    known = inspect.signature(DistributedDataParallel).parameters
    name = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # before torch 2.14
    return DistributedDataParallel(model, **options, **{name: False}, gradient_as_bucket_view=True)


def averaging(model: nn.Module, enabled: bool) -> AbstractContextManager:
    """Average gradients in this forward and backward pass only if `enabled`: in the last part of a batch."""
    skip = isinstance(model, DistributedDataParallel) and not enabled
    return model.no_sync() if skip else nullcontext()


def sum_over(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def largest(numbers: list[int]) -> list[int]:
    """Return the largest of each number over the processes, by gloo, so that no GPU is waited for."""
    if not dist.is_initialized():
        return numbers
    tensor = torch.tensor(numbers)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def from_main(tensors: dict[str, Tensor]) -> None:
    """Overwrite the tensors by those of the main process."""
    if dist.is_initialized():
        for tensor in tensors.values():
            dist.broadcast(tensor, src=0)


def value_of_main(value: Any) -> Any:
    """Return the main process's value."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def is_lost(error: BaseException) -> bool:
    """Return whether another process is gone or silent; gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def wait_for_all() -> None:
    """Wait until every process has reached this call."""
    if dist.is_initialized():
        dist.barrier()
