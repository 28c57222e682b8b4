"""Image and mask together: fitting to the network's input, and the random moves of training.

All geometry of one sample (flips, scale, window, rotation) is one affine map, so that a picture is resampled once and
image and mask cannot come apart. Pixel (i, j) covers [i, i+1) x [j, j+1); maps act on these coordinates, which is how
both the bilinear image and the nearest-neighbour mask stay aligned. What lies outside the picture is `ignore_index` in
the mask and the mean colour in the image, which is 0 once normalised: what the convolutions pad with.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

RESIZES = ("stretch", "letterbox", "crop")
GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, what colour jitter fades to and from


@dataclass(frozen=True)
class Box:
    """Where a picture lies in the network's input, and how large it was; in pixels."""

    top: int
    left: int
    height: int
    width: int
    original_height: int
    original_width: int


def mean_std(in_channels: int) -> tuple[list[float], list[float]]:
    """Normalisation in 0..1 units: ImageNet's for 3 channels, 0.5 and 0.25 for any other number."""
    if in_channels == 3:
        return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return [0.5] * in_channels, [0.25] * in_channels


def fill_colour(in_channels: int) -> np.ndarray:
    """The uint8 colour of what lies outside a picture."""
    return np.round(np.array(mean_std(in_channels)[0]) * 255).astype(np.uint8)


def content_size(original: tuple[int, int], image_size: tuple[int, int], resize: str) -> tuple[int, int]:
    """(height, width) that a picture of size `original` takes inside the network's input."""
    if resize == "stretch":
        return tuple(image_size)
    if resize == "crop":
        return tuple(original)
    scale = min(image_size[0] / original[0], image_size[1] / original[1])
    return tuple(
        max(1, min(size, round(side * scale))) for side, size in zip(original, image_size, strict=True)
    )


def fit(image: np.ndarray, image_size, resize: str, original=None) -> tuple[np.ndarray, Box]:
    """Bring a whole picture to the network's input, for validation and prediction and as the start of training.

    Args:
        image: uint8 (H, W, C); may be a reduced JPEG of at least the content's size.
        image_size: (height, width) of the input.
        resize: stretch (to image_size), letterbox (keep the shape, pad around) or crop (leave as it is).
        original: (H, W) of the file, where `image` is reduced.

    Returns:
        (uint8 (h, w, C), Box)
    """
    original = tuple(original or image.shape[:2])
    height, width = content_size(original, image_size, resize)
    content = resize_image(image, (height, width))
    if resize != "letterbox":
        return content, Box(0, 0, height, width, *original)
    top, left = (image_size[0] - height) // 2, (image_size[1] - width) // 2
    framed = np.empty((*image_size, image.shape[2]), np.uint8)
    framed[:] = fill_colour(image.shape[2])
    framed[top : top + height, left : left + width] = content
    return framed, Box(top, left, height, width, *original)


def fit_mask(mask: np.ndarray, image_size, resize: str, ignore_index: int) -> np.ndarray:
    """Bring class ids (H, W) to the same frame as `fit` does the picture, by nearest neighbour."""
    height, width = content_size(mask.shape, image_size, resize)
    content = resize_mask(mask, (height, width))
    if resize != "letterbox":
        return content
    top, left = (image_size[0] - height) // 2, (image_size[1] - width) // 2
    framed = np.full(tuple(image_size), ignore_index, mask.dtype)
    framed[top : top + height, left : left + width] = content
    return framed


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with antialiasing; uint8 (H, W, C) → (*size, C)."""
    if image.shape[:2] == tuple(size):
        return image
    if image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    bands = [Image.fromarray(np.ascontiguousarray(image[..., i])) for i in range(image.shape[2])]
    return np.stack(
        [np.asarray(band.resize(size[::-1], Image.Resampling.BILINEAR)) for band in bands], axis=2
    )


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The value under each new pixel's centre."""
    if mask.shape == tuple(size):
        return mask
    rows, columns = (
        (np.arange(new) * 2 + 1) * old // (2 * new) for new, old in zip(size, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


@dataclass(frozen=True)
class Move:
    """What is done to one sample: where output pixels come from, and what happens to their colours."""

    matrix: np.ndarray  # (2, 3): output (x, y, 1) → source (x, y), pixels
    exact: bool  # flips and a window on whole pixels: copied, not resampled
    window: tuple[int, int]  # exact: source (top, left) of the output before flips
    flips: tuple[bool, bool]  # exact: vertical, horizontal
    colour: tuple[float, float, float] | None  # factors of brightness, contrast, saturation


@dataclass(frozen=True)
class Augmentation:
    """Random moves of training.

    Args:
        hflip: probability of a left-right flip.
        vflip: probability of an upside-down flip.
        scale: (low, high) factor of the content; the window is then drawn at random. Log-uniform. (1, 1) is off.
        rotate: largest angle in degrees, either way, about the window's centre.
        color_jitter: largest change of brightness, contrast and saturation, as a fraction (0.3: factors 0.7..1.3).
    """

    hflip: float = 0.5
    vflip: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    rotate: float = 0.0
    color_jitter: float = 0.0

    def draw(self, generator: np.random.Generator, source: tuple[int, int], output: tuple[int, int]) -> Move:
        """Draw one sample's move; every quantity has its own place in the draw, so that none shifts another.

        Args:
            generator: of this sample alone.
            source: (height, width) of the fitted picture.
            output: (height, width) of the sample.
        """
        u = generator.random(9)
        flip_x, flip_y = bool(u[0] < self.hflip), bool(u[1] < self.vflip)
        low, high = self.scale
        scale = float(low * (high / low) ** u[2])
        angle = np.deg2rad(self.rotate * (2 * u[3] - 1))
        size = np.array([output[1], output[0]]) / scale  # the window in the source, (x, y)
        corner = np.array([u[4], u[5]]) * (
            np.array([source[1], source[0]]) - size
        )  # inside, or around a smaller source
        exact = scale == 1 and angle == 0
        if exact:
            corner = np.floor(corner + 0.5)
        matrix = _window(corner, scale) @ _rotation(angle, output) @ _flip(flip_x, flip_y, output)
        colour = None
        if self.color_jitter:
            colour = tuple(float(1 + self.color_jitter * (2 * value - 1)) for value in u[6:9])
        return Move(matrix[:2], exact, (int(corner[1]), int(corner[0])), (flip_y, flip_x), colour)


def _flip(flip_x: bool, flip_y: bool, output) -> np.ndarray:
    x = [-1, 0, output[1]] if flip_x else [1, 0, 0]
    y = [0, -1, output[0]] if flip_y else [0, 1, 0]
    return np.array([x, y, [0, 0, 1]], float)


def _rotation(angle: float, output) -> np.ndarray:
    """About the output's centre."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = output[1] / 2, output[0] / 2
    return np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y], [0, 0, 1]])


def _window(corner: np.ndarray, scale: float) -> np.ndarray:
    return np.array([[1 / scale, 0, corner[0]], [0, 1 / scale, corner[1]], [0, 0, 1]])


def apply_moves(images: list, masks: list, moves: list[Move], output, ignore_index: int, by_window: bool):
    """Apply each sample's move.

    Args:
        images: uint8 (H, W, C) arrays.
        masks: their ids (H, W).
        moves: one a sample.
        output: (height, width) of the samples.
        ignore_index: the id of what lies outside.
        by_window: resample from the part of the source under the window (large sources), not from the whole of it.

    Returns:
        (images (N, C, h, w) uint8 in channels-last memory, masks (N, h, w) of the masks' dtype)
    """
    channels = images[0].shape[2]
    fill = fill_colour(channels)
    out_images = np.empty((len(images), *output, channels), np.uint8)
    out_masks = np.empty((len(images), *output), masks[0].dtype)
    resampled = []
    for i, move in enumerate(moves):
        if move.exact:
            _copy_window(images[i], out_images[i], move, fill)
            _copy_window(masks[i], out_masks[i], move, ignore_index)
        else:
            resampled.append(i)
    out_images, out_masks = torch.from_numpy(out_images), torch.from_numpy(out_masks)
    group = 1 if by_window else max(1, 2**20 // (output[0] * output[1]))  # bounds the float copies
    for start in range(0, len(resampled), group):
        chosen = resampled[start : start + group]
        matrices = np.stack([moves[i].matrix for i in chosen])
        sources, ids = [images[i] for i in chosen], [masks[i] for i in chosen]
        if by_window:
            sources[0], ids[0], matrices = _cut(sources[0], ids[0], matrices, output)
        warped, ids = _warp(np.stack(sources), np.stack(ids), matrices, output, fill, ignore_index)
        for i, image, mask in zip(chosen, warped, ids, strict=True):
            out_images[i], out_masks[i] = image, mask
    for i, move in enumerate(moves):
        if move.colour:
            out_images[i] = jitter(out_images[i], *move.colour)
    return out_images.permute(0, 3, 1, 2), out_masks


def _copy_window(source: np.ndarray, out: np.ndarray, move: Move, fill) -> None:
    """Whole pixels from the window into `out`, flipped; `fill` where the window hangs over."""
    (top, left), (height, width) = move.window, out.shape[:2]
    target = out[:: -1 if move.flips[0] else 1, :: -1 if move.flips[1] else 1]
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(source.shape[0], top + height), min(source.shape[1], left + width)
    if (y1 - y0, x1 - x0) != (height, width):
        out[:] = fill
    target[y0 - top : y1 - top, x0 - left : x1 - left] = source[y0:y1, x0:x1]


def _cut(image: np.ndarray, mask: np.ndarray, matrices: np.ndarray, output):
    """The part of a source that a move can touch, and the matrix for it."""
    corners = np.array([[0, 0, 1], [output[1], 0, 1], [0, output[0], 1], [output[1], output[0], 1]], float)
    points = corners @ matrices[0].T
    x0, y0 = np.maximum(np.floor(points.min(0)).astype(int) - 1, 0)
    x1, y1 = np.ceil(points.max(0)).astype(int) + 1
    x0, y0 = min(x0, image.shape[1] - 1), min(y0, image.shape[0] - 1)
    cut = (slice(y0, max(y0 + 1, y1)), slice(x0, max(x0 + 1, x1)))
    return image[cut], mask[cut], matrices - np.array([[0, 0, x0], [0, 0, y0]])


def _warp(images: np.ndarray, masks: np.ndarray, matrices: np.ndarray, output, fill, ignore_index: int):
    """Resample (N, H, W, C) uint8 bilinearly and (N, H, W) ids by nearest neighbour, through the same coordinates."""
    height, width = images.shape[1:3]
    to_grid = matrices * np.array([[[2 / width], [2 / height]]])
    to_grid[:, :, 2] -= 1  # grid_sample's coordinates: -1..1 from edge to edge
    a = torch.from_numpy(to_grid).float()[..., None, None]  # (N, 2, 3, 1, 1)
    xs, ys = torch.arange(output[1]) + 0.5, (torch.arange(output[0]) + 0.5)[:, None]
    grid = torch.empty(len(images), *output, 2)
    for axis in (0, 1):
        torch.add(a[:, axis, 0] * xs, a[:, axis, 1] * ys + a[:, axis, 2], out=grid[..., axis])
    shift = torch.from_numpy(fill.astype(np.float32))
    floats = (torch.from_numpy(images).float() - shift).permute(
        0, 3, 1, 2
    )  # channels-last memory: 2.6 times as fast
    warped = F.grid_sample(floats, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    warped = (warped.permute(0, 2, 3, 1) + (shift + 0.5)).clamp_(0, 255).to(torch.uint8)
    ids = torch.from_numpy(masks).float()[:, None] - ignore_index  # exact below 2**24
    ids = (
        F.grid_sample(ids, grid, mode="nearest", padding_mode="zeros", align_corners=False)[:, 0]
        + ignore_index
    )
    return warped, ids.to(torch.from_numpy(masks[:0]).dtype)


def jitter(image: torch.Tensor, brightness: float, contrast: float, saturation: float) -> torch.Tensor:
    """Change the colours of a uint8 (h, w, C) image: contrast about mid grey; saturation for three channels only."""
    x = image.float()
    gain, offset = brightness * contrast, 127.5 * (1 - contrast) + 0.5
    if image.shape[2] == 3:
        r, g, b = x.unbind(2)
        grey = (r * GREY[0] + g * GREY[1] + b * GREY[2]) * (gain * (1 - saturation)) + offset
        x = x.mul_(gain * saturation).add_(grey[..., None])
    else:
        x = x.mul_(gain).add_(offset)
    return x.clamp_(0, 255).to(torch.uint8)


def generator_for(seed: int, epoch: int, index: int) -> np.random.Generator:
    """A generator that belongs to one sample of one epoch; counter-based, so that making one costs microseconds."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, (epoch << 32) + index]))
