"""From pictures to logits at a picture's own size: the one path of validation and of prediction.

Both doors go through `Network`, so that scoring saved predictions gives the digits that training reported.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TTA_SCALES = (0.75, 1.0, 1.25)
CACHED = 2**24  # bytes of a map that a CPU's cache may hold beside others


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], channels_last: bool = True
) -> Tensor:
    """Turn uint8 images (N, C, H, W) into float32, (x / 255 - mean) / std, on their own device."""
    shape = (1, -1, 1, 1)  # constants made on a GPU have the host wait for it at every step
    offset = torch.tensor(mean).mul_(255).view(shape).to(images.device, non_blocking=True)
    scale = torch.tensor(std).mul_(255).reciprocal_().view(shape).to(images.device, non_blocking=True)
    floats = images.float().sub_(offset).mul_(scale)  # by planes: a number a channel is slow in channels_last
    return floats.contiguous(memory_format=torch.channels_last) if channels_last else floats


class Network:
    """A model with what prediction does around it: normalization, batches that fit a CPU's cache, averaging.

    Args:
        model: in eval mode, on `device`, in `precision`; `models.prepare_for_inference` makes one.
        mean: of each channel, in 0..1, as in training.
        std: of each channel, in 0..1, as in training.
        device: where to compute.
        precision: of weights and maps; logits are float32 whatever it is.
        channels_last: memory layout of the convolutions.
        tta: test-time augmentation: `flip` averages the logits of the picture and its mirror image,
            `multiscale` those of both at three scales.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        precision: torch.dtype,
        channels_last: bool = True,
        tta: str = "none",
    ) -> None:
        self.mean, self.std, self.device, self.precision = mean, std, device, precision
        self.channels_last, self.tta = channels_last, tta
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        self.widest = max(1, first.out_channels // math.prod(first.stride))  # numbers a pixel of a large map
        self.model = model

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Logits of uint8 images (N, C, H, W), float32 (N, num_classes, H, W), on the network's device."""
        images = normalize(images.to(self.device, non_blocking=True), self.mean, self.std, self.channels_last)
        if self.tta == "none":
            return self._forward(images)
        size, views = images.shape[-2:], []
        for factor in (1.0,) if self.tta == "flip" else TTA_SCALES:
            scaled = _resized(images, [max(32, round(side * factor)) for side in size])
            views.append(_resized(self._forward(scaled), size))
            views.append(_resized(self._forward(scaled.flip(-1)).flip(-1), size))
        return torch.stack(views).mean(0)

    def _forward(self, images: Tensor) -> Tensor:
        few = len(images)
        if self.device.type == "cpu":
            few = max(1, CACHED // (images[0, 0].numel() * self.widest * self.precision.itemsize))
        logits = [self.model(some.to(self.precision)).float() for some in images.split(few)]
        return torch.cat(logits) if len(logits) > 1 else logits[0]


def picture_logits(
    network: Network,
    images: Sequence[Tensor],
    boxes: Sequence[Any],
    window: tuple[int, int] | None = None,
    overlap: float = 0.25,
) -> Iterator[Tensor]:
    """Yield logits (1, num_classes, H, W) of pictures at their own sizes, one after the other.

    Args:
        network: what computes them.
        images: uint8 (C, h, w) each, as the network is to see them; of one shape where `window` is None.
        boxes: where each picture lies in its image, and its own size; see `restore`.
        window: slide a window of this size over each image instead of taking it whole.
        overlap: of neighbouring windows.
    """
    if window is None:
        each = network.logits(torch.stack(list(images))).split(1)
    else:
        each = (_slide(network, image, window, overlap) for image in images)
    for logits, box in zip(each, boxes, strict=True):
        yield restore(logits, box)


def _slide(network: Network, image: Tensor, window: tuple[int, int], overlap: float) -> Tensor:
    """Logits (1, num_classes, H, W) of one image (C, H, W), by windows."""
    size = image.shape[1:]
    blocks = sliding_blocks(network.logits, lambda top, bottom: image[:, top:bottom], size, window, overlap)
    return joined(blocks, size)[None]


def joined(blocks: Iterable[tuple[int, int, Tensor]], size: Sequence[int]) -> Tensor:
    """Blocks (top, left, tensor (..., rows, columns)) put together to (..., H, W)."""
    whole = None
    for top, left, block in blocks:
        rows, columns = block.shape[-2:]
        if whole is None:
            whole = block.new_empty(*block.shape[:-2], *size)
        whole[..., top : top + rows, left : left + columns] = block
    return whole


def restore(logits: Tensor, box: Any) -> Tensor:
    """Bring logits of what the network saw back to the picture's own size.

    Args:
        logits: (N, num_classes, h, w).
        box: the picture's place within what the network saw (`top`, `left`, `height`, `width`), and its own
            size (`original_height`, `original_width`), in pixels.

    Returns:
        (N, num_classes, original_height, original_width), bilinear between pixel centres.
    """
    inner = logits[..., box.top : box.top + box.height, box.left : box.left + box.width]
    return _resized(inner, (box.original_height, box.original_width))


def _resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images or logits (N, C, H, W) in another height and width; themselves where they have it."""
    if images.shape[-2:] == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def restored_strips(logits: Tensor, box: Any, elements: int = 2**22) -> Iterator[tuple[int, int, Tensor]]:
    """What `restore` gives, but for rounding, in strips of so many numbers from top to bottom.

    Yields:
        (top, 0, logits (num_classes, rows, original_width)), each row once.
    """
    inner = logits[0, :, box.top : box.top + box.height, box.left : box.left + box.width]
    height, width = box.original_height, box.original_width
    rows = max(1, elements // (len(inner) * width))
    for top in range(0, height, rows):
        at = torch.arange(top, min(height, top + rows), device=inner.device) + 0.5
        at = (at * (box.height / height) - 0.5).clamp_(0, box.height - 1)
        above = at.long()
        below = (above + 1).clamp_(max=box.height - 1)
        strip = torch.lerp(inner[:, above], inner[:, below], (at - above)[:, None])
        yield top, 0, _resized(strip[None], (len(at), width))[0]


def sliding_blocks(
    forward: Callable[[Tensor], Tensor],
    read: Callable[[int, int], Tensor],
    size: Sequence[int],
    window: tuple[int, int],
    overlap: float = 0.25,
    batch_size: int = 4,
) -> Iterator[tuple[int, int, Tensor]]:
    """Run a network over a picture of any size, window by window, and yield its logits block by block.

    Windows overlap and are blended by weights that fall towards their edges and sum to 1 at each pixel.
    Memory holds a few windows, and of the picture's width only the rows that two strips of windows share.

    Args:
        forward: uint8 (N, C, h, w) to logits (N, num_classes, h, w).
        read: rows of the picture from top to bottom, (top, bottom) to uint8 (C, bottom - top, W).
        size: height and width of the picture.
        window: height and width of a window; smaller where the picture is.
        overlap: share of a window that it has in common with its neighbour, 0 to 0.9.
        batch_size: windows that go through the network together.

    Yields:
        (top, left, logits (num_classes, rows, columns)), in reading order; each pixel is in one block.
    """
    height, width = size
    rows, columns = min(window[0], height), min(window[1], width)
    tops, lefts = _starts(height, rows, overlap), _starts(width, columns, overlap)
    down, across = _weights(tops, rows, overlap), _weights(lefts, columns, overlap)
    shared = [top + rows - following for top, following in pairwise(tops)]  # rows of a strip and the next
    carried = None  # weighted logits of these rows
    for top, fall, above, below in zip(tops, down, [0, *shared], [*shared, 0], strict=True):
        strip = read(top, top + rows)
        crops = [strip[:, :, left : left + columns] for left in lefts]
        batches = (torch.stack(crops[at : at + batch_size]) for at in range(0, len(crops), batch_size))
        logits = chain.from_iterable(forward(_enlarged(batch)) for batch in batches)
        beside = None  # weighted logits of the columns that the next window covers, too
        for one, weights, left, right in zip(logits, across, lefts, [*lefts[1:], width], strict=True):
            block = one[:, :rows, :columns] * (fall[:, None] * weights).to(one.device)
            if beside is not None:
                block[:, :, : beside.shape[2]] += beside
            block, beside = block[:, :, : right - left], block[:, :, right - left :]
            if carried is None:
                carried = block.new_empty(len(block), max(shared, default=0), width)
            block[:, :above] += carried[:, :above, left:right]
            carried[:, :below, left:right] = block[:, rows - below :]
            yield top, left, block[:, : rows - below]


def _starts(length: int, window: int, overlap: float) -> list[int]:
    """Evenly spaced window starts that cover all of `length` with at least the overlap asked for."""
    stride = max(1, int(window * (1 - overlap)))
    count = -(-(length - window) // stride) + 1
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]


def _weights(starts: Sequence[int], window: int, overlap: float) -> list[Tensor]:
    """Weights along one side of each window, falling over the overlap, which at each pixel sum to 1."""
    distance = torch.arange(window, dtype=torch.float32)
    distance = torch.minimum(distance, distance.flip(0)) + 1
    ramp = (distance / max(1, int(window * overlap))).clamp_(max=1.0)
    total = torch.zeros(starts[-1] + window)
    for start in starts:
        total[start : start + window] += ramp
    return [ramp / total[start : start + window] for start in starts]


def _enlarged(images: Tensor) -> Tensor:
    """Images (N, C, H, W), their last row and column repeated to the 32 that a network takes at least."""
    if min(images.shape[-2:]) >= 32:
        return images
    rows, columns = (torch.arange(max(32, side)).clamp_(max=side - 1) for side in images.shape[-2:])
    return images[:, :, rows][..., columns]
