"""The data set: pairs of files in, samples out, each a function of (seed, epoch, index) alone."""

import numpy as np
import torch

from .labels import Encoding
from .preflight import Pair
from .reading import DataError, load_image, load_mask
from .transforms import Augmentation, Box, apply_moves, content_size, fit, fit_mask, generator_for


def read_fitted(path, in_channels: int, image_size, resize: str) -> tuple[np.ndarray, Box]:
    """A picture as the network sees it: uint8 (h, w, C), and where it lies. Training, validation and prediction use this."""
    reduce_to = None
    if resize == "stretch":
        reduce_to = image_size
    elif resize == "letterbox":
        size = load_image(path, in_channels, reduce_to=(1, 1))[1]
        reduce_to = content_size(size, image_size, resize)
    image, original, _ = load_image(path, in_channels, reduce_to)
    return fit(image, image_size, resize, original)


class SegmentationDataset:
    """Pictures with masks.

    `dataset[(epoch, index)]` is a training sample: image uint8 (C, h, w), mask (h, w), uint8 when all ids and
    ignore_index fit, else int64. Nothing is remembered between calls, so any process may make any sample.

    Args:
        pairs: what preflight found.
        encoding: from raw mask values to class ids.
        image_size: (height, width) of training samples.
        resize: stretch, letterbox or crop; see `transforms.fit`.
        in_channels: channels of the images.
        ignore_index: the id of what lies outside a picture.
        augmentation: random moves; None for none (resize crop then takes the window in the middle).
        seed: of the moves.
        cache: a `cache.SampleCache` of these pairs, or None.
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
        cache=None,
    ):
        self.pairs = list(pairs)
        self.encoding = encoding
        self.image_size = tuple(image_size)
        self.resize = resize
        self.in_channels = in_channels
        self.ignore_index = ignore_index
        self.augmentation = augmentation
        self.seed = seed
        self.cache = cache

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
        sources = [self._fitted(index) for _, index in keys]
        moves = [
            self._augmentation.draw(generator_for(self.seed, epoch, index), image.shape[:2], self.image_size)
            for (epoch, index), (image, _) in zip(keys, sources, strict=True)
        ]
        images, masks = zip(*sources, strict=True)
        return apply_moves(images, masks, moves, self.image_size, self.ignore_index, self.resize == "crop")

    def evaluation_item(self, index: int) -> tuple[torch.Tensor, Box, torch.Tensor]:
        """A whole picture as the network sees it, uint8 (C, h, w), where it lies, and the ids (H, W) at the mask's size."""
        image, box = read_fitted(self.pairs[index].image, self.in_channels, self.image_size, self.resize)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), box, torch.from_numpy(self.truth(index))

    def truth(self, index: int) -> np.ndarray:
        """Class ids (H, W) of a mask at its own size."""
        path = self.pairs[index].mask
        raw = load_mask(path, self.encoding.as_colours)[0]
        try:
            return self.encoding.encode(raw)
        except ValueError as error:
            raise DataError(f"{path}: {error} The file changed since it was checked.") from None

    @property
    def _augmentation(self) -> Augmentation:
        return self.augmentation or Augmentation(hflip=0)

    def _fitted(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (h, w, C) and mask (h, w) before the random moves: what a cache keeps."""
        image, _ = read_fitted(self.pairs[index].image, self.in_channels, self.image_size, self.resize)
        return image, fit_mask(self.truth(index), self.image_size, self.resize, self.ignore_index)
