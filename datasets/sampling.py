"""Order, batches and loading: which samples come when, a function of (seed, epoch) alone."""

import math
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import generator_for

Batch = tuple[Tensor, Tensor]  # images, masks

ORDER = 2**32 - 1  # index of the order among an epoch's generators; samples never reach it
AHEAD = 2  # batches that are made before they are asked for, in all or per worker process
MOST_WORKERS = 16
SHARED_MEMORY = "/dev/shm"  # where worker processes put their batches, on Linux
FORK = "fork" if sys.platform == "linux" else None  # None: the system's own way to start processes


def epoch_batches(
    num_samples: int, batch_size: int, seed: int, epoch: int, world_size: int = 1
) -> list[list[int]]:
    """Return the batches of one epoch over all processes: every sample once, in a shared random order.

    A last batch of less than half a batch is a poor gradient and has too few values for batch norm: it shares
    the samples of the last two batches evenly instead. Where that still leaves fewer samples than processes,
    it joins the batch before.

    Process `rank` takes `batch[rank::world_size]` of each batch, which is at least one sample.

    Raises:
        ValueError: fewer samples, or a smaller batch, than processes.
    """
    if min(num_samples, batch_size) < world_size:
        raise ValueError(
            f"{num_samples} samples in batches of {batch_size} cannot be shared by {world_size} processes; "
            "each needs one per step. Start fewer processes, or raise batch_size."
        )
    order = generator_for(seed, epoch, ORDER).permutation(num_samples).tolist()
    ends = [*range(batch_size, num_samples, batch_size), num_samples]
    if len(ends) > 1:
        tail = num_samples - ends[-2]
        if 2 * tail < batch_size:
            tail = (batch_size + tail) // 2
            ends[-2] = num_samples - tail
        if tail < world_size:
            del ends[-2]
    return [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def prefetch(make: Callable[[Any], Any], items: Iterable, threads: int, ahead: int) -> Iterator[Any]:
    """Yield `make(item)` for each item in order, up to `ahead` of them made before they are asked for.

    Args:
        make: called by the threads.
        items: its arguments.
        threads: that call it; 0 calls it here, when a result is asked for.
        ahead: results that are ready or being made, 1 or more.
    """
    if not threads:
        yield from map(make, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        jobs = deque()
        for item in items:
            jobs.append(pool.submit(make, item))
            if len(jobs) > ahead:
                yield jobs.popleft().result()
        while jobs:
            yield jobs.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Loader:
    """Batches of a data set, made in this process or by worker processes that live from epoch to epoch.

    A worker receives (epoch, index) with each sample and remembers nothing, so that the batches are the same
    for any number of workers and from any step on.

    Args:
        dataset: answers `batch(keys)`, and `[key]` in workers.
        num_workers: processes; 0 makes the batches in this process.
        pin_memory: for a GPU: put batches where it can copy from without waiting, and make the next ones
            during the current step. (On a CPU that would only take the step's cores.)
    """

    def __init__(self, dataset: Dataset, num_workers: int = 0, pin_memory: bool = False) -> None:
        self.dataset = dataset
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._keys: list[list[tuple[int, int]]] = []  # of this epoch; only the main process reads them
        self._workers = None

    def epoch(self, batches: list[list[int]], epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield (images, masks) for each batch from `start_step` on."""
        keys = [[(epoch, index) for index in batch] for batch in batches[start_step:]]
        if self.num_workers:
            return self._from_workers(keys)
        if self.pin_memory:
            return prefetch(self._pinned_batch, keys, threads=1, ahead=AHEAD)
        return map(self.dataset.batch, keys)

    def close(self) -> None:
        """End the workers, which ignore every signal but SIGKILL."""
        iterator, self._workers = getattr(self._workers, "_iterator", None), None
        if iterator is not None:
            iterator._shutdown_workers()  # asks them to end and waits
            for worker in iterator._workers:
                worker.kill()  # one that hangs; Python would wait for it at its end

    def _pinned_batch(self, keys: list[tuple[int, int]]) -> Batch:
        images, masks = self.dataset.batch(keys)
        return images.pin_memory(), masks.pin_memory()

    def _from_workers(self, keys: list[list[tuple[int, int]]]) -> Iterator[Batch]:
        self._keys[:] = keys
        if self._workers is None:
            self._workers = DataLoader(
                self.dataset,
                batch_sampler=self._keys,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                persistent_workers=True,
                prefetch_factor=AHEAD,
                multiprocessing_context=FORK,  # forked workers share a cache in memory
                worker_init_fn=_set_up_worker,
            )
        return iter(self._workers)


def _set_up_worker(_worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which reach the whole process group: the main process ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def make_loader(
    dataset: Dataset, num_workers: int | None, batch_size: int, device_type: str, cores: int
) -> Loader:
    """Return the loader of training batches for a device.

    Args:
        dataset: a `SegmentationDataset`.
        num_workers: None chooses: 0 on a CPU, where training needs the cores, and on a GPU if cached samples
            are only flipped. Otherwise cores - 1, at most 16 and what shared memory allows: decoding or
            rotating a 512 x 512 image takes several milliseconds, and threads would delay the thread that
            feeds the GPU. Where workers are not forked, they cannot see a cache in memory, and None is 0.
        batch_size: of this process.
        device_type: where training computes: cpu, cuda, mps.
        cores: of this process.

    Raises:
        ValueError: shared memory is too small for the batches of `num_workers` processes.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else math.inf
    needed = (AHEAD + 1) * batch_size * dataset.sample_bytes  # by each worker
    workers = num_workers
    if workers is None:
        in_process = device_type == "cpu" or (dataset.cache is not None and not dataset.resamples)
        in_process = in_process or (FORK is None and getattr(dataset.cache, "folder", ".") is None)
        most = MOST_WORKERS if math.isinf(free) else int(free // needed)
        workers = 0 if in_process else min(MOST_WORKERS, max(1, cores - 1), most)
    if workers * needed > free:
        raise ValueError(
            f"num_workers {workers} needs {workers * needed / 2**20:.0f} MiB of shared memory for its "
            f"batches; {SHARED_MEMORY} has {free / 2**20:.0f} MiB free. Use num_workers 0, which needs none, "
            "or enlarge it (for example docker run --shm-size 8g)"
        )
    return Loader(dataset, workers, pin_memory=device_type == "cuda")


def evaluation_items(
    dataset: Any, batches: Sequence[Sequence[int]], threads: int = 0, pin_memory: bool = False
) -> Iterator[list[tuple]]:
    """Yield the list of `dataset.evaluation_item(index)` of each batch of indices.

    Args:
        dataset: a `SegmentationDataset` made for evaluation.
        batches: indices; a batch may be empty.
        threads: that read images ahead; 0 reads them when they are asked for.
        pin_memory: put images and masks where a GPU copies from without waiting.
    """

    def load(index: int) -> tuple:
        image, box, mask = dataset.evaluation_item(index)
        return (image.pin_memory(), box, mask.pin_memory()) if pin_memory else (image, box, mask)

    ahead = 2 * max(threads, *map(len, batches), 1)
    items = prefetch(load, (index for batch in batches for index in batch), threads, ahead)
    for batch in batches:
        yield [next(items) for _ in batch]
