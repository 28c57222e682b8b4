"""The data set: pairs of files in, samples out, each a function of (seed, epoch, index) alone."""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch
from torch.utils.data import get_worker_info

from .augment import Augmentation, generator_for
from .cache import SampleCache, open_cache
from .fitting import Box, fit_mask, place
from .labels import Encoding
from .pairing import Pair
from .reading import load_fitted, read_mask
from .samples import DataError
from .warp import apply_transform

VERSION = 3  # of cached samples; raise it when reading or fitting gives other bytes
# Pixels up to which a cached sample (half of it for slow augmentations) is operations of microseconds, in
# which two threads wait for each other (for Python's lock): one is faster.
SHORT_WORK = 100_000
NO_AUGMENTATION = Augmentation(hflip=0)


@dataclass(eq=False, repr=False)
class SegmentationDataset:
    """Images with masks.

    `dataset[index]` is a training sample: image uint8 (C, h, w), mask (h, w), uint8 if all ids and
    ignore_index fit, else int64. Its augmentation is a function of seed, epoch and index: set `dataset.epoch`
    before each epoch of a `torch.utils.data.DataLoader`, or name it, `dataset[(epoch, index)]`. Nothing is
    remembered between calls, so any process may make any sample, and samples with and without a cache are
    bit-equal.
    """

    pairs: list[Pair]
    _: KW_ONLY
    encoding: Encoding
    image_size: tuple[int, int]  # (height, width) of training samples
    resize: str = "stretch"  # or letterbox, crop; see `fitting.place`
    in_channels: int = 3
    ignore_index: int = 255  # the id of what lies outside a picture
    max_value: int | None = None  # of images above 8 bits: the value that becomes 255, see `DataReport`
    augmentation: Augmentation = NO_AUGMENTATION  # resize crop draws its window all the same
    seed: int = 0  # of the augmentation
    evaluation: bool = False  # made for `evaluation_item` alone, not for `batch`: masks keep their own size
    threads: int | None = None  # that make a batch; None: as many as torch uses; a loader's workers use one
    cache: SampleCache | None = field(default=None, init=False)
    epoch: int = field(default=0, init=False)  # of a sample whose key is an index alone

    def __post_init__(self):
        if self.resize not in ("stretch", "letterbox", "crop"):
            raise ValueError(f"resize must be stretch, letterbox or crop; got {self.resize!r}.")
        if not isinstance(self.image_size, tuple | list) or len(self.image_size) != 2:
            raise ValueError(f"image_size must be (height, width); got {self.image_size!r}.")
        ids = np.min_scalar_type(self.encoding.num_classes - 1), np.min_scalar_type(self.ignore_index)
        self._stored = np.promote_types(*ids)  # the smallest type that holds all

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def sample_bytes(self) -> int:
        """Size of a training sample."""
        return math.prod(self.image_size) * (self.in_channels + np.dtype(self.encoding.dtype).itemsize)

    @property
    def resamples(self) -> bool:
        """Whether making a cached sample is more work than a copy and a flip."""
        return self.augmentation.resamples

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        images, masks = self.batch([key if isinstance(key, tuple) else (self.epoch, range(len(self))[key])])
        return images[0], masks[0]

    def batch(self, keys: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Training samples of (epoch, index) keys: images (N, C, h, w) uint8, masks (N, h, w)."""
        assert not self.evaluation, "a data set with evaluation=True gives samples by evaluation_item(index)"
        size = self.image_size
        images = np.empty((len(keys), self.in_channels, *size), np.uint8)
        masks = np.empty((len(keys), *size), self.encoding.dtype)

        def make(position: int) -> None:
            epoch, index = keys[position]
            image, mask = self._source(index)
            transform = self.augmentation.draw(generator_for(self.seed, epoch, index), mask.shape, size)
            apply_transform(image, mask, transform, images[position], masks[position], self.ignore_index)

        short = math.prod(size) * (2 if self.augmentation.slow else 1) <= SHORT_WORK
        short = short and self.cache is not None and all(index in self.cache for _, index in keys)
        deque(self._map(make, range(len(keys)), 1 if short else self.threads), maxlen=0)
        return torch.from_numpy(images), torch.from_numpy(masks)

    def evaluation_item(self, index: int) -> tuple[torch.Tensor, Box, torch.Tensor]:
        """A whole picture for scoring.

        Returns:
            (image as the network sees it, uint8 (C, h, w); where it lies; ids (H, W) at the mask's own size)
        """
        assert self.evaluation
        image, mask = self._source(index)
        pair = self.pairs[index]
        box = place((pair.height, pair.width), self.image_size, self.resize)
        image = torch.from_numpy(np.moveaxis(image, 2, 0).copy())
        return image, box, torch.from_numpy(mask.astype(self.encoding.dtype))

    def use_cache(self, setting: str, cache_dir: str | Path | None) -> str:
        """Keep decoded samples as `cache.open_cache` decides; one line that says how."""
        fitted = [self.image_size, self.resize, self.in_channels, self.ignore_index, self.evaluation]
        fitted += [self.max_value] * (self.max_value is not None)
        files = [[str(pair.image.absolute()), str(pair.mask.absolute()), pair.stamp] for pair in self.pairs]
        known_by = json.dumps([VERSION, PIL.__version__, fitted, self.encoding.to_dict(), files])
        shapes = map(self._shapes, self.pairs)
        lengths = [math.prod(image) + math.prod(mask) * self._stored.itemsize for image, mask in shapes]
        key = hashlib.sha256(known_by.encode()).hexdigest()
        self.cache, line = open_cache(setting, cache_dir, key, lengths)
        return line

    def fill_cache(self, progress: Callable | None = None, rank: int = 0, world_size: int = 1) -> None:
        """Decode now, on all threads, what the cache lacks; what is not decoded now is when it is first used.

        Args:
            progress: callable (iterable, total, description) → iterable, for a bar.
            rank: this process, which fills its share.
            world_size: number of processes.
        """
        if self.cache is None:
            return
        missing = [index for index in range(len(self)) if index not in self.cache][rank::world_size]
        done = self._map(self._source, missing, self.threads)
        deque(progress(done, len(missing), "decoding images") if progress and missing else done, maxlen=0)

    def _shapes(self, pair: Pair) -> tuple[tuple, tuple]:
        """Shapes of image and mask as the cache keeps them."""
        native = (pair.height, pair.width)
        fitted = native if self.resize == "crop" else self.image_size
        return (*fitted, self.in_channels), native if self.evaluation else fitted

    def _source(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (h, w, C) and ids before the random moves, from the cache where it has them."""
        entry = self.cache.get(index) if self.cache is not None else None
        if entry is None:
            image, mask = self._read(index)
            if self.cache is not None:
                self.cache.put(index, [image, mask])
            return image, mask
        image, mask = self._shapes(self.pairs[index])
        cut = math.prod(image)
        return entry[:cut].reshape(image), entry[cut:].view(self._stored).reshape(mask)

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The same from the files."""
        pair = self.pairs[index]
        native = (pair.height, pair.width)
        image, box, _ = load_fitted(
            pair.image, self.in_channels, self.image_size, self.resize, self.max_value
        )
        mask = read_mask(pair.mask, self.encoding.as_colours)
        try:
            if (box.original_height, box.original_width) != native or mask.shape[:2] != native:
                raise ValueError(f"is {mask.shape}, its picture {box}; {native} wanted.")
            if self.evaluation:
                mask = self.encoding.encode(mask)
            else:
                mask = fit_mask(mask, self.image_size, self.resize, self.ignore_index, self.encoding.encode)
        except ValueError as error:
            raise DataError(f"{pair.mask}: {error} A file changed since the check; start again.") from None
        return image, mask.astype(self._stored)

    def _map(self, function: Callable, items: Sequence, threads: int | None) -> Iterator:
        """Lazy map over threads, in the order of `items`; each of torch's operations takes one core.

        The threads end with the map: as long as another thread that used OpenMP lives, OpenMP takes the
        processor for crowded and lets the network's threads sleep between their operations, each of which
        then costs some 40 microseconds more.
        """
        before = torch.get_num_threads()
        threads = 1 if get_worker_info() else min(threads or before, len(items))
        torch.set_num_threads(1)  # of this thread and of those that start now
        try:
            if threads <= 1:
                yield from map(function, items)
            else:
                with ThreadPoolExecutor(threads, thread_name_prefix="samples") as pool:
                    yield from pool.map(function, items)
        finally:
            torch.set_num_threads(before)
