"""Image and mask together: fitting to the network's input, and drawing the random moves of training.

All geometry of one sample (flips, scale, window, rotation) is one map, so that a picture is resampled
once and image and mask cannot come apart. Pixel (i, j) covers [i, i+1) x [j, j+1) and maps act on these
coordinates, which keeps the bilinear image and the nearest-neighbour mask aligned. What lies outside the
picture is `ignore_index` in the mask and a grey near the mean in the image: about 0 once normalised, as the
convolutions pad.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

Size = tuple[int, int]  # (height, width)

OUTSIDE = 116  # ImageNet's mean green; the other two means lie within 8


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


def place(original: tuple[int, int], image_size: tuple[int, int], resize: str) -> Box:
    """Where a picture of size `original` lies in the network's input; both sizes are (height, width).

    `resize` is stretch (fill image_size), letterbox (keep the shape, in the middle) or crop (leave as it is).
    """
    if resize == "stretch":
        return Box(0, 0, *image_size, *original)
    if resize == "crop":
        return Box(0, 0, *original, *original)
    scale = min(image_size[0] / original[0], image_size[1] / original[1])
    height, width = (max(1, round(side * scale)) for side in original)
    return Box((image_size[0] - height) // 2, (image_size[1] - width) // 2, height, width, *original)


def fit(
    image: np.ndarray, image_size: Size, resize: str, original: Size | None = None
) -> tuple[np.ndarray, Box]:
    """Bring a whole picture, uint8 (H, W, C), to the network's input: antialiased bilinear, padded.

    `original` is the file's (H, W) where `image` is a JPEG that was reduced while decoding.
    """
    box = place(tuple(original or image.shape[:2]), tuple(image_size), resize)
    return _frame(resize_image(image, (box.height, box.width)), box, image_size, resize, OUTSIDE), box


def fit_mask(
    mask: np.ndarray, image_size: Size, resize: str, ignore_index: int, encode: Callable | None = None
) -> np.ndarray:
    """Bring class ids (H, W) to the same frame as `fit` does the picture, by nearest neighbour.

    `encode` makes ids of raw values, here and not before: of a large mask few values are left to look up.
    """
    box = place(mask.shape[:2], tuple(image_size), resize)
    content = resize_mask(mask, (box.height, box.width))
    return _frame(encode(content) if encode else content, box, image_size, resize, ignore_index)


def _frame(content: np.ndarray, box: Box, image_size: Size, resize: str, fill: int) -> np.ndarray:
    if resize != "letterbox":
        return content
    framed = np.full((*image_size, *content.shape[2:]), fill, content.dtype)
    framed[box.top : box.top + box.height, box.left : box.left + box.width] = content
    return framed


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Antialiased bilinear, uint8 (H, W, C) → (*size, C)."""
    if image.shape[:2] == tuple(size):
        return image
    bands = [image] if image.shape[2] == 3 else [image[..., i].copy() for i in range(image.shape[2])]
    pictures = [Image.fromarray(band).resize(size[::-1], Image.Resampling.BILINEAR) for band in bands]
    return np.dstack(pictures)


def resize_mask(mask: np.ndarray, size: Size, flips: tuple[bool, bool] = (False, False)) -> np.ndarray:
    """The value under each new pixel's centre, then flipped (upside down, left to right)."""
    if mask.shape[:2] == tuple(size) and not any(flips):
        return mask
    rows, columns = (
        (2 * np.arange(new) + 1)[:: -1 if turned else 1] * old // (2 * new)
        for new, old, turned in zip(size, mask.shape, flips, strict=False)
    )
    if len(mask) > size[0]:
        return mask[rows].take(columns, axis=1)
    return mask.take(columns, axis=1)[rows]  # the fewer bytes are picked one by one, the others by rows


@dataclass(frozen=True)
class Move:
    """What happens to one sample: without a turn, a box of the source is resized to a box of the output."""

    source: tuple[int, int, int, int]  # (top, left, height, width), whole pixels
    target: tuple[int, int, int, int]  # the same in the output; smaller than the output where the source is
    flips: tuple[bool, bool] = (False, False)  # upside down, left to right
    matrix: np.ndarray | None = None  # of a turn: the whole move, (2, 3), output (x, y, 1) → source (x, y)
    colour: tuple[float, float, float] | None = None  # factors of brightness, contrast, saturation


@dataclass(frozen=True)
class Augmentation:
    """Random moves of training."""

    hflip: float = 0.5  # probability of a flip left to right
    vflip: float = 0.0  # and upside down
    scale: tuple[float, float] = (1.0, 1.0)  # (low, high) zoom, log-uniform; the window seen is drawn as well
    rotate: float = 0.0  # largest angle in degrees, either way, about the middle of the window
    color_jitter: float = 0.0  # largest change of brightness, contrast, saturation; 0.3: factors 0.7..1.3

    def draw(self, generator: np.random.Generator, source: tuple[int, int], output: tuple[int, int]) -> Move:
        """Draw the move of one sample, of (height, width) `output`, from a fitted picture of `source`.

        Each quantity has its own place in the draw, so that none shifts another.
        """
        u = generator.random(9).tolist()
        flips = u[1] < self.vflip, u[0] < self.hflip
        low, high = self.scale
        scale = low * (high / low) ** u[2]
        boxes = [_window(*sides, scale, at) for *sides, at in zip(source, output, (u[5], u[4]), strict=True)]
        (top, height, to_top, to_height), (left, width, to_left, to_width) = boxes
        matrix = None
        if self.rotate:
            corner = np.array(u[4:6]) * (np.array(source[::-1]) - np.array(output[::-1]) / scale)
            turn = rotation(np.deg2rad(self.rotate * (2 * u[3] - 1)), output)
            matrix = (zoom(scale, corner) @ turn @ flip(flips, output))[:2]
        spread = self.color_jitter
        colour = tuple(1 + spread * (2 * value - 1) for value in u[6:9]) if spread else None
        return Move((top, left, height, width), (to_top, to_left, to_height, to_width), flips, matrix, colour)


def _window(source: int, output: int, scale: float, at: float) -> tuple[int, int, int, int]:
    """Along one side: start and length of what is seen of the source, and of where it is in the output."""
    seen = max(1, round(output / scale))
    if seen <= source:
        return int(at * (source - seen + 1)), seen, 0, output
    shown = min(output, max(1, round(source * scale)))
    return 0, source, int(at * (output - shown + 1)), shown


def flip(flips: tuple[bool, bool], output: tuple[int, int]) -> np.ndarray:
    """3x3 matrix of a flip upside down, left to right, within the output."""
    x = [-1, 0, output[1]] if flips[1] else [1, 0, 0]
    y = [0, -1, output[0]] if flips[0] else [0, 1, 0]
    return np.array([x, y, [0, 0, 1]], float)


def rotation(angle: float, output: tuple[int, int]) -> np.ndarray:
    """3x3 matrix of a turn by `angle` radians about the output's middle."""
    cos, sin, x, y = np.cos(angle), np.sin(angle), output[1] / 2, output[0] / 2
    return np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y], [0, 0, 1]])


def zoom(scale: float, corner: Sequence[float]) -> np.ndarray:
    """3x3 matrix that looks through a window at `corner` (x, y) of the source, enlarged by `scale`."""
    return np.array([[1 / scale, 0, corner[0]], [0, 1 / scale, corner[1]], [0, 0, 1]])


def generator_for(seed: int, epoch: int, index: int) -> np.random.Generator:
    """A generator of one sample in one epoch: counter-based, so that making one costs microseconds."""
    return np.random.Generator(np.random.Philox(key=((seed % 2**64) << 64) + (epoch << 32) + index))
