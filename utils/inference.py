"""From images to logits at each image's own size: the one path of validation and of prediction.

Both scripts use `Predictor`, so that scoring saved predictions gives the digits that training reported.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.device import to_device

TTA_SCALES = (0.75, 1.0, 1.25)
CACHE_BYTES = 2**24  # of one feature map; a CPU's cache holds a map of this size beside others
SMALLEST_SIDE = 32  # pixels; the networks take no smaller images

Block = tuple[int, int, Tensor]  # top, left, values (..., rows, columns)


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], memory_format: torch.memory_format
) -> Tensor:
    """Return (images / 255 - mean) / std of uint8 images (N, C, H, W), float32 on their device."""
    make = _normalization if not torch.compiler.is_compiling() else _normalization.__wrapped__
    offset, scale = make(tuple(mean), tuple(std), images.device)
    floats = images.float().sub_(offset).mul_(scale)  # before the conversion, which makes this slower
    return floats.contiguous(memory_format=memory_format)


@lru_cache(maxsize=8)
def _normalization(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return offset and scale, (1, C, 1, 1) each, made once: making them on a GPU makes the host wait."""
    with torch.inference_mode(False):
        offset = torch.tensor(mean).mul_(255).view(1, -1, 1, 1)
        scale = torch.tensor(std).mul_(255).reciprocal_().view(1, -1, 1, 1)
        return offset.to(device), scale.to(device)


class Predictor:
    """Computes logits of uint8 images with a network that `models.prepare_for_inference` has prepared.

    Args:
        model: in eval mode, on `device`; its weights have the dtype that it computes in.
        mean: of each channel, in 0..1, as in training.
        std: of each channel, in 0..1, as in training.
        memory_format: of the network's convolutions.
        tta: test-time augmentation: `flip` averages the logits of the image and its mirror image,
            `multiscale` those of both at three scales.
        batch_size: windows that are computed together where a window slides over an image.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        memory_format: torch.memory_format = torch.channels_last,
        tta: str = "none",
        batch_size: int = 4,
    ) -> None:
        self.model, self.mean, self.std = model, mean, std
        self.memory_format, self.tta, self.batch_size = memory_format, tta, batch_size
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        self.device, self.dtype = first.weight.device, first.weight.dtype
        self._values_per_pixel = max(1, first.out_channels // math.prod(first.stride))  # of a large map

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Return float32 logits (N, num_classes, H, W) of uint8 images (N, C, H, W), on the device."""
        images = normalize(to_device(images, self.device), self.mean, self.std, self.memory_format)
        if self.tta == "none":
            return self._forward(images)
        size, views = images.shape[-2:], []
        for factor in (1.0,) if self.tta == "flip" else TTA_SCALES:
            scaled = _resize(images, [max(SMALLEST_SIDE, round(side * factor)) for side in size])
            views.append(_resize(self._forward(scaled), size))
            views.append(_resize(self._forward(scaled.flip(-1)).flip(-1), size))
        return torch.stack(views).mean(0)

    def _forward(self, images: Tensor) -> Tensor:
        """Run the network; on a CPU over as many images at a time as its cache holds."""
        number = len(images)
        if self.device.type == "cpu":
            map_bytes = images[0, 0].numel() * self._values_per_pixel * self.dtype.itemsize
            number = max(1, CACHE_BYTES // map_bytes)
        logits = [self.model(part.to(self.dtype)).float() for part in images.split(number)]
        return torch.cat(logits) if len(logits) > 1 else logits[0]


def image_logits(
    predictor: Predictor,
    images: Sequence[Tensor],
    boxes: Sequence[Any],
    window: tuple[int, int] | None = None,
    overlap: float = 0.25,
) -> Iterator[Tensor]:
    """Yield float32 logits (1, num_classes, H, W) of images at their own sizes, in order.

    Args:
        predictor: computes them.
        images: uint8 (C, h, w) each, as the network is to see them; of one shape where `window` is None.
        boxes: for each image its region in the network's input, and its own size; see `restore`.
        window: slide a window of this (height, width) over each image instead of taking it whole.
        overlap: of neighboring windows, as a fraction of the window.
    """
    images = [to_device(image, predictor.device) for image in images]
    if window is None:
        each: Iterable[Tensor] = predictor.logits(torch.stack(images)).split(1)
    else:
        each = (_slide(predictor, image, window, overlap) for image in images)
    for logits, box in zip(each, boxes, strict=True):
        yield restore(logits, box)


def _slide(predictor: Predictor, image: Tensor, window: tuple[int, int], overlap: float) -> Tensor:
    """Return the logits (1, num_classes, H, W) of an image (C, H, W), window by window."""
    size = image.shape[1:]
    options = {"window": window, "overlap": overlap, "batch_size": predictor.batch_size}
    return join_blocks(
        sliding_blocks(predictor.logits, lambda top, bottom: image[:, top:bottom], size, **options), size
    )[None]


def join_blocks(blocks: Iterable[Block], size: Sequence[int]) -> Tensor:
    """Return blocks (top, left, values (..., rows, columns)) as one tensor (..., H, W)."""
    whole = None
    for top, left, block in blocks:
        rows, columns = block.shape[-2:]
        if whole is None:
            whole = block.new_empty(*block.shape[:-2], *size)
        whole[..., top : top + rows, left : left + columns] = block
    return whole


def restore(logits: Tensor, box: Any) -> Tensor:
    """Resize logits from the network's input back to the image's own size.

    Args:
        logits: (N, num_classes, h, w).
        box: the image's region in the network's input (`top`, `left`, `height`, `width`), and its own size
            (`original_height`, `original_width`), in pixels.

    Returns:
        (N, num_classes, original_height, original_width), bilinear between pixel centers.
    """
    inner = logits[..., box.top : box.top + box.height, box.left : box.left + box.width]
    return _resize(inner, (box.original_height, box.original_width))


def _resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """Resize images or logits (N, C, H, W) bilinearly; return them unchanged if they have that size."""
    if images.shape[-2:] == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def restored_strips(logits: Tensor, box: Any, elements: int = 2**22) -> Iterator[Block]:
    """Yield what `restore` returns, except for rounding, in strips of about `elements` values.

    Args:
        logits: (1, num_classes, h, w).
        box: as in `restore`.
        elements: values in a strip.

    Yields:
        (top, 0, logits (num_classes, rows, original_width)), from top to bottom.
    """
    inner = logits[0, :, box.top : box.top + box.height, box.left : box.left + box.width]
    height, width = box.original_height, box.original_width
    rows = max(1, elements // (len(inner) * width))
    for top in range(0, height, rows):
        position = torch.arange(top, min(height, top + rows), device=inner.device) + 0.5
        position = (position * (box.height / height) - 0.5).clamp_(0, box.height - 1)
        above = position.long()
        below = (above + 1).clamp_(max=box.height - 1)
        strip = torch.lerp(inner[:, above], inner[:, below], (position - above)[:, None])
        yield top, 0, _resize(strip[None], (len(position), width))[0]


def sliding_blocks(
    forward: Callable[[Tensor], Tensor],
    read: Callable[[int, int], Tensor],
    size: Sequence[int],
    window: tuple[int, int],
    overlap: float = 0.25,
    batch_size: int = 4,
) -> Iterator[Block]:
    """Run a network over an image of any size, window by window, and yield its logits block by block.

    Windows overlap and are blended by weights that fall towards their edges and sum to 1 at each pixel. First
    the windows of one row are blended from left to right, then the rows of windows from top to bottom. Memory
    holds a few windows, and the logits of the image rows that two rows of windows share.

    Args:
        forward: maps uint8 (N, C, h, w) to logits (N, num_classes, h, w).
        read: returns the rows from top to bottom, uint8 (C, bottom - top, W).
        size: height and width of the image.
        window: height and width of a window; smaller where the image is.
        overlap: fraction of a window that it shares with its neighbor, 0 to 0.9.
        batch_size: windows that are computed together.

    Yields:
        (top, left, logits (num_classes, rows, columns)) in reading order; each pixel is in one block.
    """
    height, width = size
    rows, columns = min(window[0], height), min(window[1], width)
    tops, lefts = _starts(height, rows, overlap), _starts(width, columns, overlap)
    blend_down = _BlendDown(tops, rows, width)
    for row, top in enumerate(tops):
        strip = read(top, top + rows)
        crops = [strip[:, :, left : left + columns] for left in lefts]
        batches = (torch.stack(crops[at : at + batch_size]) for at in range(0, len(crops), batch_size))
        logits = chain.from_iterable(forward(_pad_to_smallest(batch)) for batch in batches)

        def weighted(column: int, window: Tensor, row: int = row) -> Tensor:
            down = _weights(tops, rows, overlap, window.device)[row]
            across = _weights(lefts, columns, overlap, window.device)[column]
            return window[:, :rows, :columns] * (down[:, None] * across)

        windows = (weighted(column, window) for column, window in enumerate(logits))
        for left, block in _blend_across(windows, lefts, width):
            yield top, left, blend_down.add(row, left, block)


def _blend_across(
    windows: Iterable[Tensor], lefts: Sequence[int], width: int
) -> Iterator[tuple[int, Tensor]]:
    """Add up one row of weighted windows (C, rows, columns); yield (left, block), each column once."""
    carried = None  # the columns that the next window covers too
    for window, left, next_left in zip(windows, lefts, [*lefts[1:], width], strict=True):
        if carried is not None:
            window[..., : carried.shape[-1]] += carried
        block, carried = window[..., : next_left - left], window[..., next_left - left :]
        yield left, block


class _BlendDown:
    """Adds up the rows of windows from top to bottom; keeps the image rows that two of them share."""

    def __init__(self, tops: Sequence[int], rows: int, width: int) -> None:
        self._shared = [0, *(top + rows - following for top, following in pairwise(tops)), 0]
        self._width = width
        self._carried: Tensor | None = None  # (C, shared rows, W)

    def add(self, row: int, left: int, block: Tensor) -> Tensor:
        """Return the image rows of a block (C, rows, columns) that no later window covers."""
        above, below = self._shared[row : row + 2]
        columns, finished = slice(left, left + block.shape[-1]), block.shape[1] - below
        if self._carried is None:
            self._carried = block.new_empty(len(block), max(self._shared), self._width)
        block[:, :above] += self._carried[:, :above, columns]
        self._carried[:, :below, columns] = block[:, finished:]
        return block[:, :finished]


def _starts(length: int, window: int, overlap: float) -> tuple[int, ...]:
    """Return evenly spaced window starts that cover `length` with at least the given overlap."""
    stride = max(1, int(window * (1 - overlap)))
    count = -(-(length - window) // stride) + 1
    return tuple(round(i * (length - window) / max(1, count - 1)) for i in range(count))


@lru_cache(maxsize=64)
def _weights(starts: tuple[int, ...], window: int, overlap: float, device: torch.device) -> list[Tensor]:
    """Return the weights along one side of each window; they fall over the overlap and sum to 1."""
    distance = torch.arange(window, dtype=torch.float32, device=device)
    distance = torch.minimum(distance, distance.flip(0)) + 1
    ramp = (distance / max(1, int(window * overlap))).clamp_(max=1.0)
    total = torch.zeros(starts[-1] + window, device=device)
    for start in starts:
        total[start : start + window] += ramp
    return [ramp / total[start : start + window] for start in starts]


def _pad_to_smallest(images: Tensor) -> Tensor:
    """Repeat the last row and column of images (N, C, H, W) up to the smallest side that a network takes."""
    if min(images.shape[-2:]) >= SMALLEST_SIDE:
        return images
    rows, columns = (
        torch.arange(max(SMALLEST_SIDE, side), device=images.device).clamp_(max=side - 1)
        for side in images.shape[-2:]
    )
    return images[:, :, rows][..., columns]
