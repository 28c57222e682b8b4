"""Order, shards and batches: which samples come when, on which process; a function of (seed, epoch) alone."""

import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import generator_for

Batch = tuple[Tensor, Tensor]  # images, masks

ORDER = 2**32 - 1  # the place of the order among an epoch's generators, which samples never reach


def epoch_batches(
    num_samples: int, batch_size: int, seed: int, epoch: int, world_size: int = 1
) -> list[list[int]]:
    """The batches of one epoch over all processes: every sample once, in an order that these share.

    A last batch of less than half a batch is a poor gradient and starves batch normalisation: it shares the
    samples of the last two batches evenly instead. Where that still leaves fewer samples than processes, it
    joins the batch before.

    Process `rank` takes `batch[rank::world_size]` of each, which is at least one sample.

    Raises:
        ValueError: fewer samples, or a smaller batch, than processes.
    """
    if min(num_samples, batch_size) < world_size:
        raise ValueError(
            f"{num_samples} samples in batches of {batch_size} cannot be shared by {world_size} processes; "
            "each needs one a step. Start fewer processes, or raise batch_size."
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


class Loader:
    """Batches of a data set, made here or by worker processes that live from epoch to epoch.

    A worker is told (epoch, index) with each sample and remembers nothing, so the batches are the same for
    any number of workers and from any step on.

    Args:
        dataset: answers `batch(keys)`, and `[key]` in workers.
        num_workers: processes; 0 makes the batches in this one, which is fastest for cached data.
        pin_memory: for a GPU: batches lie where it copies from without waiting, and the next ones are made
            beside the current step. (On a CPU that would only take the step's cores.)
    """

    def __init__(self, dataset: Dataset, num_workers: int = 0, pin_memory: bool = False):
        self.dataset = dataset
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._keys: list[list[tuple[int, int]]] = []  # of this epoch; only the main process reads them
        self._workers = None

    def epoch(self, batches: list[list[int]], epoch: int, start_step: int = 0) -> Iterator[tuple]:
        """Yield (images, masks, indices) for each batch from `start_step` on."""
        todo = batches[start_step:]
        keys = [[(epoch, index) for index in batch] for batch in todo]
        if self.num_workers:
            made = self._from_workers(keys)
        else:
            made = self._ahead(keys) if self.pin_memory else map(self.dataset.batch, keys)
        for indices, (images, masks) in zip(todo, made, strict=True):
            yield images, masks, indices

    def close(self) -> None:
        """End the workers, which heed no signal but that of death."""
        iterator, self._workers = getattr(self._workers, "_iterator", None), None
        if iterator is not None:
            iterator._shutdown_workers()  # asks them and waits
            for worker in iterator._workers:
                worker.kill()  # one that hangs; Python would wait for it at its end

    def _ahead(self, keys: list[list[tuple[int, int]]]) -> Iterator[Batch]:
        """Batches made by a thread, two of them before they are asked for."""

        def make(batch: list[tuple[int, int]]) -> Batch:
            images, masks = self.dataset.batch(batch)
            return images.pin_memory(), masks.pin_memory()

        maker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            jobs = deque()
            for batch in keys:
                jobs.append(maker.submit(make, batch))
                if len(jobs) > 2:
                    yield jobs.popleft().result()
            while jobs:
                yield jobs.popleft().result()
        finally:
            maker.shutdown(cancel_futures=True)

    def _from_workers(self, keys: list[list[tuple[int, int]]]) -> Iterator[Batch]:
        self._keys[:] = keys
        if self._workers is None:
            self._workers = DataLoader(
                self.dataset,
                batch_sampler=self._keys,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                persistent_workers=True,
                worker_init_fn=_ignore_signals,
            )
        return iter(self._workers)


def _ignore_signals(_worker: int) -> None:
    """Ctrl-C and a group's SIGTERM reach all, but the main process decides; its workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
