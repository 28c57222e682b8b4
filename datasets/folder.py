"""The data set: pairs of files in, samples out, each a function of (seed, epoch, index) alone."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import numpy as np
import PIL
import torch
from torch.utils.data import get_worker_info

from .cache import open_cache
from .labels import Encoding
from .pairing import Pair
from .reading import DataError, load_mask, read_fitted
from .transforms import Augmentation, Box, fit_mask, generator_for, place
from .warp import apply_move

VERSION = 1  # of cached samples; raise it when reading or fitting gives other bytes
SHORT_WORK = 100_000  # pixels of a cached sample, counted twice where it is turned: up to here one thread is
# faster than two, which wait for each other (for Python's lock) between operations of microseconds


class SegmentationDataset:
    """Pictures with masks.

    `dataset[(epoch, index)]` is a training sample: image uint8 (C, h, w), mask (h, w), uint8 when all ids and
    ignore_index fit, else int64. Nothing is remembered between calls, so any process may make any sample, and
    samples with and without a cache are equal to the bit.

    Args:
        pairs: what preflight found.
        encoding: from raw mask values to class ids.
        image_size: (height, width) of training samples.
        resize: stretch, letterbox or crop; see `transforms.place`.
        in_channels: channels of the images.
        ignore_index: the id of what lies outside a picture.
        augmentation: random moves; None for none (resize crop still draws its window).
        seed: of the moves.
        evaluation: made for `evaluation_item`: a cache keeps masks at their own size.
        threads: that make a batch; None for as many as torch uses. Workers of a loader use one.
    """

    def __init__(
        self,
        pairs: list[Pair],
        *,
        encoding: Encoding,
        image_size: tuple[int, int],
        resize: str = "stretch",
        in_channels: int = 3,
        ignore_index: int = 255,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        evaluation: bool = False,
        threads: int | None = None,
    ):
        self.pairs = list(pairs)
        self.encoding = encoding
        self.image_size = tuple(image_size)
        self.resize = resize
        self.in_channels = in_channels
        self.ignore_index = ignore_index
        self.augmentation = augmentation or Augmentation(hflip=0)
        self.seed = seed
        self.evaluation = evaluation
        self.threads = threads
        self.cache = None
        self._stored = np.promote_types(  # the smallest type that holds all ids
            np.min_scalar_type(encoding.num_classes - 1), np.min_scalar_type(ignore_index)
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        images, masks = self.batch([key])
        return images[0], masks[0]

    def __getitems__(self, keys):
        """What a DataLoader asks for: a whole batch at once."""
        return self.batch(keys)

    def batch(self, keys) -> tuple[torch.Tensor, torch.Tensor]:
        """Training samples of (epoch, index) keys: images (N, C, h, w) uint8, masks (N, h, w)."""
        images = torch.empty(len(keys), self.in_channels, *self.image_size, dtype=torch.uint8)
        masks = torch.empty(
            len(keys), *self.image_size, dtype=torch.from_numpy(np.empty(0, self.encoding.dtype)).dtype
        )

        def make(position: int) -> None:
            epoch, index = keys[position]
            image, mask = self._source(index)
            if self.evaluation:
                mask = fit_mask(mask, self.image_size, self.resize, self.ignore_index)
            move = self.augmentation.draw(generator_for(self.seed, epoch, index), mask.shape, self.image_size)
            apply_move(image, mask, move, images[position], masks[position], self.ignore_index)

        if self._is_short_work(keys):
            with _one_thread():
                list(map(make, range(len(keys))))
        else:
            list(self._map(make, range(len(keys))))
        return images, masks

    def _is_short_work(self, keys) -> bool:
        """Whether these samples are made sooner one after the other than on threads."""
        pixels = self.image_size[0] * self.image_size[1] * (2 if self.augmentation.rotate else 1)
        return (
            pixels <= SHORT_WORK and self.cache is not None and all(index in self.cache for _, index in keys)
        )

    def evaluation_item(self, index: int) -> tuple[torch.Tensor, Box, torch.Tensor]:
        """A whole picture for scoring.

        Returns:
            (image as the network sees it, uint8 (C, h, w); where it lies; ids (H, W) at the mask's own size)
        """
        image, mask = self._source(index) if self.evaluation else self._read(index, evaluation=True)
        pair = self.pairs[index]
        box = place((pair.height, pair.width), self.image_size, self.resize)
        image = torch.from_numpy(np.moveaxis(image, 2, 0).copy())
        return image, box, torch.from_numpy(mask.astype(self.encoding.dtype))

    def use_cache(self, setting: str, cache_dir) -> str:
        """Keep decoded samples as `cache.open_cache` decides; one line that says how."""
        settings = [
            VERSION,
            PIL.__version__,
            self.image_size,
            self.resize,
            self.in_channels,
            self.ignore_index,
        ]
        files = [[str(pair.image.absolute()), str(pair.mask.absolute()), pair.stamp] for pair in self.pairs]
        known_by = json.dumps([settings, self.evaluation, self.encoding.to_dict(), files])
        lengths = []
        for pair in self.pairs:
            image, mask = self._shapes(pair)
            lengths.append(int(np.prod(image)) + int(np.prod(mask)) * self._stored.itemsize)
        self.cache, line = open_cache(
            setting, cache_dir, hashlib.sha256(known_by.encode()).hexdigest(), lengths
        )
        return line

    def fill_cache(self, progress=None, rank: int = 0, world_size: int = 1) -> None:
        """Decode now, on all threads, what the cache lacks; what is not decoded now is when it is first used.

        Args:
            progress: callable (iterable, total, description) → iterable, for a bar.
            rank: this process, which fills its share.
            world_size: number of processes.
        """
        if self.cache is None:
            return
        missing = [index for index in range(len(self)) if index not in self.cache][rank::world_size]
        done = self._map(self._fill, missing)
        for _ in progress(done, len(missing), "decoding pictures") if progress and missing else done:
            pass

    def _fill(self, index: int) -> None:
        self._source(index)

    def _shapes(self, pair: Pair) -> tuple[tuple, tuple]:
        """Shapes of image and mask as the cache keeps them."""
        native = (pair.height, pair.width)
        fitted = native if self.resize == "crop" else self.image_size
        return (*fitted, self.in_channels), native if self.evaluation else fitted

    def _source(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (h, w, C) and ids before the random moves, from the cache where it has them."""
        entry = self.cache.get(index) if self.cache is not None else None
        if entry is None:
            image, mask = self._read(index, self.evaluation)
            if self.cache is not None:
                self.cache.put(index, [image, mask])
            return image, mask
        image, mask = self._shapes(self.pairs[index])
        cut = int(np.prod(image))
        return entry[:cut].reshape(image), entry[cut:].view(self._stored).reshape(mask)

    def _read(self, index: int, evaluation: bool) -> tuple[np.ndarray, np.ndarray]:
        """The same from the files."""
        pair = self.pairs[index]
        native = (pair.height, pair.width)
        image, box = read_fitted(pair.image, self.in_channels, self.image_size, self.resize)
        mask = load_mask(pair.mask, self.encoding.as_colours)[0]
        try:
            if (box.original_height, box.original_width) != native or mask.shape[:2] != native:
                raise ValueError(f"is {mask.shape}, its picture {box}; {native} wanted.")
            if evaluation:
                mask = self.encoding.encode(mask)
            else:
                mask = fit_mask(mask, self.image_size, self.resize, self.ignore_index, self.encoding.encode)
        except ValueError as error:
            raise DataError(
                f"{pair.mask}: {error} A file changed since it was checked; start again."
            ) from None
        return image, mask.astype(self._stored)

    def _map(self, function, items):
        """Lazy map over this data set's threads; in the order of `items`.

        The threads end with the map: as long as another thread that used OpenMP lives, OpenMP takes the
        processor for crowded and lets the network's threads sleep between their operations, each of which
        then costs some 40 microseconds more.
        """
        threads = min(self.threads or torch.get_num_threads(), len(items))
        if threads <= 1 or get_worker_info() is not None:
            yield from map(function, items)
            return
        with _single_threaded_pool(threads) as pool:
            yield from pool.map(function, items)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on this thread alone: operations of microseconds are not worth sharing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """Threads whose own torch calls use one core each: many samples at once, not many cores on one."""
    before, barrier = torch.get_num_threads(), Barrier(threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="samples")

    def settle():
        torch.set_num_threads(1)  # of this thread, and the default of threads still to come
        barrier.wait()

    for job in [pool.submit(settle) for _ in range(threads)]:
        job.result()
    torch.set_num_threads(before)
    return pool
