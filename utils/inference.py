"""From pictures to logits at a picture's own size: the one path of validation and of prediction.

Both doors go through `Network`, so that scoring saved predictions gives the digits that training reported.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from utils.device import autocast

TTA_SCALES = (0.75, 1.0, 1.25)


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], channels_last: bool = True
) -> Tensor:
    """Turn uint8 images (N, C, H, W) into float32, (x / 255 - mean) / std, on their own device."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    floats = images.to(torch.float32, memory_format=layout)
    shape = (1, -1, 1, 1)
    offset = torch.tensor(mean, device=images.device).mul_(255).view(shape)
    scale = torch.tensor(std, device=images.device).mul_(255).reciprocal_().view(shape)
    return floats.sub_(offset).mul_(scale)


class Network:
    """A model made ready to predict: a copy in eval mode, batch norm folded into the convolutions.

    Args:
        model: any model of `models/`; it is left as it is.
        weights: to use instead of the model's own.
        mean: of each channel, in 0..1, as in training.
        std: of each channel, in 0..1, as in training.
        device: where to compute.
        precision: float32, or the dtype of autocast.
        channels_last: memory layout of the convolutions.
        fold: False uses `model` itself, as it is, which is quicker to set up for a single picture.
        tta: test-time augmentation: `flip` averages the logits of the picture and its mirror image,
            `multiscale` those of both at three scales.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, Tensor] | None = None,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        precision: torch.dtype,
        channels_last: bool = True,
        fold: bool = True,
        tta: str = "none",
    ) -> None:
        self.mean, self.std, self.device, self.precision = mean, std, device, precision
        self.channels_last, self.tta = channels_last, tta
        self.model = model
        if fold:
            self.model = copy.deepcopy(model)
            if weights is not None:
                self.model.load_state_dict(weights)
            fold_batch_norm(self.model.to(device).eval().requires_grad_(False), len(mean))
            if channels_last:
                self.model.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Logits of uint8 images (N, C, H, W), float32 (N, num_classes, H, W), on the network's device."""
        images = normalize(images.to(self.device, non_blocking=True), self.mean, self.std, self.channels_last)
        if self.tta == "none":
            return self._forward(images)
        size, views = images.shape[-2:], []
        for factor in (1.0,) if self.tta == "flip" else TTA_SCALES:
            scaled = images
            if factor != 1:
                target = [max(32, round(side * factor)) for side in size]
                scaled = F.interpolate(images, size=target, mode="bilinear", align_corners=False)
            for flipped in (False, True):
                logits = self._forward(scaled.flip(-1) if flipped else scaled)
                logits = logits.flip(-1) if flipped else logits
                views.append(F.interpolate(logits, size=size, mode="bilinear", align_corners=False))
        return torch.stack(views).mean(0)

    def _forward(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.model(images).float()


def picture_logits(
    network: Network,
    images: Sequence[Tensor],
    boxes: Sequence[Any],
    window: tuple[int, int] | None = None,
    overlap: float = 0.25,
) -> list[Tensor]:
    """Logits (1, num_classes, H, W) of pictures at their own sizes.

    Args:
        network: what computes them.
        images: uint8 (C, h, w) each, as the network is to see them; of one shape where `window` is None.
        boxes: where each picture lies in its image, and its own size; see `restore`.
        window: slide a window of this size over each image instead of taking it whole.
        overlap: of neighbouring windows.
    """
    if window is None:
        logits = list(network.logits(torch.stack(list(images))).split(1))
    else:
        logits = [
            torch.cat([strip for _, strip in sliding_strips(network.logits, image, window, overlap)], dim=1)[
                None
            ]
            for image in images
        ]
    return [restore(*one) for one in zip(logits, boxes, strict=True)]


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
    size = (box.original_height, box.original_width)
    return (
        inner
        if inner.shape[-2:] == size
        else F.interpolate(inner, size=size, mode="bilinear", align_corners=False)
    )


def fold_batch_norm(model: nn.Module, in_channels: int) -> nn.Module:
    """Merge each batch norm into the convolution in front of it, in place: the same function, fewer passes.

    Which belongs to which is seen by running the model once: a norm whose input is a convolution's output.
    """
    made_by: dict[int, nn.Module] = {}
    alive: list[Tensor] = []  # an id may be given anew once its tensor is gone
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def watch_conv(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        made_by[id(output)] = module
        alive.append(output)

    def watch_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in made_by:
            pairs.append((made_by[id(inputs[0])], module))

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(watch_conv))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(watch_norm))
    with torch.no_grad():
        model(torch.zeros(1, in_channels, 64, 64, device=next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    replaced: dict[nn.Module, nn.Module] = {}
    for conv, norm in pairs:
        replaced[conv], replaced[norm] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child in replaced:
                setattr(module, name, replaced[child])
    return model


def sliding_strips(
    forward: Callable[[Tensor], Tensor],
    image: Tensor,
    window: tuple[int, int],
    overlap: float = 0.25,
    batch_size: int = 4,
) -> Iterator[tuple[int, Tensor]]:
    """Run a network over a picture of any size, window by window, and yield its logits from top to bottom.

    Windows overlap and are blended by weights that fall towards their edges. Memory holds one strip of
    windows across the picture, never the whole picture's logits.

    Args:
        forward: uint8 (N, C, h, w) to logits (N, num_classes, h, w).
        image: uint8 (C, H, W).
        window: height and width of a window; smaller where the picture is.
        overlap: share of a window that it has in common with its neighbour, 0 to 0.9.
        batch_size: windows that go through the network together.

    Yields:
        (top, logits (num_classes, rows, W)): rows from top on are done, in order, each once.
    """
    _, height, width = image.shape
    if min(height, width) < 32:  # no network takes less
        image = F.pad(image[None].float(), (0, max(0, 32 - width), 0, max(0, 32 - height)), mode="replicate")[
            0
        ]
        image = image.to(torch.uint8)
        done = 0
        for top, logits in sliding_strips(forward, image, window, overlap, batch_size):
            if top < height:
                yield top, logits[:, : height - top, :width]
            done = top
        return
    rows, columns = min(window[0], height), min(window[1], width)
    tops, lefts = _starts(height, rows, overlap), _starts(width, columns, overlap)
    if len(tops) == len(lefts) == 1:
        yield 0, forward(image[None])[0]
        return
    weights = _ramp(rows, overlap, image.device)[:, None] * _ramp(columns, overlap, image.device)
    sums = total = None
    for at, top in enumerate(tops):
        crops = [image[:, top : top + rows, left : left + columns] for left in lefts]
        for first in range(0, len(crops), batch_size):
            logits = forward(torch.stack(crops[first : first + batch_size]))
            if sums is None:
                sums = logits.new_zeros(logits.shape[1], rows, width)
                total = weights.new_zeros(rows, width).to(logits.device)
                weights = weights.to(logits.device)
            for left, one in zip(lefts[first : first + batch_size], logits, strict=True):
                sums[:, :, left : left + columns] += one * weights
                total[:, left : left + columns] += weights
        done = (tops[at + 1] if at + 1 < len(tops) else height) - top  # rows that no later window touches
        yield top, sums[:, :done] / total[:done]
        sums = torch.cat([sums[:, done:], torch.zeros_like(sums[:, :done])], dim=1)
        total = torch.cat([total[done:], torch.zeros_like(total[:done])])


def _starts(length: int, window: int, overlap: float) -> list[int]:
    """Evenly spaced window starts that cover all of `length` with at least the overlap asked for."""
    stride = max(1, int(window * (1 - overlap)))
    count = -(-(length - window) // stride) + 1
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]


def _ramp(length: int, overlap: float, device: torch.device) -> Tensor:
    """Weights along one side of a window: 1 in the middle, falling linearly over the overlap, never 0."""
    edge = max(1, int(length * overlap))
    distance = torch.arange(length, device=device, dtype=torch.float32)
    distance = torch.minimum(distance, distance.flip(0)) + 1
    return (distance / edge).clamp_(max=1.0)
