"""Doing what `transforms` drew: image and mask resampled once through the same coordinates, then the colours.

Fast on one thread for one uint8 sample at a time (0.7 ms at 256 x 256): small float copies that stay in the
cache, channels last into the resampler and planes out of it.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from .transforms import OUTSIDE, Move


def apply_move(
    image: np.ndarray, mask: np.ndarray, move: Move, out_image, out_mask, ignore_index: int
) -> None:
    """Apply one sample's move.

    Args:
        image: uint8 (H, W, C).
        mask: ids (H, W).
        move: what to do.
        out_image: uint8 tensor (C, h, w) to fill.
        out_mask: tensor (h, w) to fill.
        ignore_index: the id of what lies outside.
    """
    if move.window is not None:
        channels = out_image.permute(1, 2, 0).numpy()
        _copy_window(image, channels, move, OUTSIDE)
        _copy_window(mask, out_mask.numpy(), move, ignore_index)
        if move.colour:
            out_image.copy_(jitter(out_image.float(), *move.colour))
        return
    image, mask, matrix = _cut(image, mask, move.matrix, out_mask.shape)
    grid = _grid(matrix, mask.shape, tuple(out_mask.shape))
    pixels = (
        torch.from_numpy(image.astype(np.float32)).sub_(OUTSIDE).permute(2, 0, 1)[None]
    )  # what is outside is now 0
    pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0].add_(
        OUTSIDE
    )
    out_image.copy_(
        jitter(pixels, *move.colour) if move.colour else pixels.add_(0.5)
    )  # copying cuts the fraction off
    ids = torch.from_numpy(mask.astype(np.float32)).sub_(ignore_index)[
        None, None
    ]  # whole numbers, exact below 2**24
    ids = F.grid_sample(ids, grid, mode="nearest", padding_mode="zeros", align_corners=False)[0, 0]
    out_mask.copy_(ids.add_(ignore_index))


def jitter(pixels: torch.Tensor, brightness: float, contrast: float, saturation: float) -> torch.Tensor:
    """Change colours of float (C, h, w) in 0..255, in place; 0.5 too high, ready to be cut to whole numbers.

    Contrast is about mid grey; saturation, for three channels, fades to and from luma.
    """
    gain, offset = brightness * contrast, 127.5 * (1 - contrast) + 0.5
    if len(pixels) == 3:
        fade = gain * (1 - saturation)
        grey = (
            pixels[0]
            .mul(0.299 * fade)
            .add_(pixels[1], alpha=0.587 * fade)
            .add_(pixels[2], alpha=0.114 * fade)
        )
        return pixels.mul_(gain * saturation).add_(grey.add_(offset)).clamp_(0, 255)
    return pixels.mul_(gain).add_(offset).clamp_(0, 255)


def _copy_window(source: np.ndarray, out: np.ndarray, move: Move, fill: int) -> None:
    """Whole pixels from the window into `out`, flipped; `fill` where the window hangs over."""
    (top, left), (height, width) = move.window, out.shape[:2]
    target = out[:: -1 if move.flips[0] else 1, :: -1 if move.flips[1] else 1]
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(source.shape[0], top + height), min(source.shape[1], left + width)
    if (y1 - y0, x1 - x0) != (height, width):
        out[:] = fill
    target[y0 - top : y1 - top, x0 - left : x1 - left] = source[y0:y1, x0:x1]


def _cut(image: np.ndarray, mask: np.ndarray, matrix: np.ndarray, output):
    """The part of the source that a move can touch, and the matrix for it."""
    corners = np.array([[0, 0, 1], [output[1], 0, 1], [0, output[0], 1], [output[1], output[0], 1]], float)
    points = corners @ matrix.T
    last = np.array([mask.shape[1], mask.shape[0]]) - 1
    x0, y0 = np.clip(np.floor(points.min(0)).astype(int) - 1, 0, last)
    x1, y1 = np.clip(np.ceil(points.max(0)).astype(int) + 1, 1, last + 1)
    return image[y0:y1, x0:x1], mask[y0:y1, x0:x1], matrix - np.array([[0, 0, x0], [0, 0, y0]])


@lru_cache(maxsize=4)
def _centres(output: tuple[int, int]) -> torch.Tensor:
    """(h*w, 3): x, y, 1 of every output pixel's centre."""
    y, x = torch.meshgrid(torch.arange(output[0]) + 0.5, torch.arange(output[1]) + 0.5, indexing="ij")
    return torch.stack([x, y, torch.ones(output)], dim=2).view(-1, 3)


def _grid(matrix: np.ndarray, source: tuple[int, int], output: tuple[int, int]) -> torch.Tensor:
    """Where each output pixel comes from, in grid_sample's coordinates: -1..1 from edge to edge."""
    to_grid = matrix * np.array([[2 / source[1]], [2 / source[0]]])
    to_grid[:, 2] -= 1
    return (_centres(output) @ torch.from_numpy(to_grid.T.astype(np.float32))).view(1, *output, 2)
