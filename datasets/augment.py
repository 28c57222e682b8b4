"""Random augmentation of training samples: a few small classes, each with its own settings.

The augmentations of a sample draw one after another from its generator, each as many numbers whether it is on
or off. So no setting changes what the others draw, and neither does a new augmentation, which draws last.
Their parts are composed to one `Transform`: image and mask are resampled once and cannot come apart.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.random import Generator, Philox

from .fitting import Size

if TYPE_CHECKING:
    from torch import Tensor

Filter = Callable[["Tensor"], "Tensor"]  # of a resampled image, float (C, h, w) in 0..255


class Part(NamedTuple):
    """What one augmentation does to a sample."""

    flips: tuple[bool, bool] | None = None  # upside down, left to right
    scale: float = 1.0  # zoom
    map: np.ndarray | None = None  # any other affine map, (3, 3), from output to output, such as a rotation
    position: tuple[float, float] | None = None  # of the window (x, y), 0..1
    color: tuple[float, float, float] | None = None  # factors of brightness, contrast, saturation
    filter: Filter | None = None


@dataclass(frozen=True)
class Flip:
    """Flips, each with its probability: left to right, and upside down."""

    hflip: float = 0.5
    vflip: float = 0.0

    def draw(self, generator: Generator, output: Size) -> Part | None:
        """Draw two numbers."""
        horizontal, vertical = generator.random() < self.hflip, generator.random() < self.vflip
        return Part(flips=(vertical, horizontal)) if horizontal or vertical else None


@dataclass(frozen=True)
class Zoom:
    """Zoom between a low and a high factor, log-uniform."""

    scale: tuple[float, float] = (1.0, 1.0)

    def draw(self, generator: Generator, output: Size) -> Part | None:
        """Draw one number."""
        (low, high), value = self.scale, generator.random()
        return Part(scale=low * (high / low) ** value) if (low, high) != (1, 1) else None


@dataclass(frozen=True)
class Rotate:
    """Rotation about the middle of the output by up to `rotate` degrees, either way."""

    rotate: float = 0.0
    slow = True

    def draw(self, generator: Generator, output: Size) -> Part | None:
        """Draw one number."""
        angle = self.rotate * (2 * generator.random() - 1)
        return Part(map=rotation(np.deg2rad(angle), output)) if self.rotate else None


@dataclass(frozen=True)
class Crop:
    """The window of the source that is seen; also without zoom, where images are larger than the output."""

    def draw(self, generator: Generator, output: Size) -> Part | None:
        """Draw two numbers."""
        return Part(position=(generator.random(), generator.random()))


@dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast and saturation; 0.3: factors of 0.7 to 1.3."""

    color_jitter: float = 0.0

    def draw(self, generator: Generator, output: Size) -> Part | None:
        """Draw three numbers."""
        values = generator.random(3).tolist()
        factors = (1 + self.color_jitter * (2 * value - 1) for value in values)
        return Part(color=tuple(factors)) if self.color_jitter else None


@dataclass(frozen=True)
class Blur:
    """Gaussian blur with a standard deviation of 0 to `blur` pixels."""

    blur: float = 0.0
    slow = True

    def draw(self, generator: Generator, output: Size) -> Part | None:
        """Draw one number."""
        sigma = self.blur * generator.random()
        return Part(filter=lambda image: gaussian_blur(image, sigma)) if sigma else None


AUGMENTATIONS = (Flip, Zoom, Rotate, Crop, ColorJitter, Blur)  # in the order in which they draw


class Transform(NamedTuple):
    """What happens to one sample: a region of the source is resized to a region of the output."""

    source: tuple[int, int, int, int]  # (top, left, height, width) in whole pixels
    target: tuple[int, int, int, int]  # the same in the output; smaller than it where the source is
    flips: tuple[bool, bool] = (False, False)  # upside down, left to right
    matrix: np.ndarray | None = None  # instead of these three: an affine map (2, 3), output → source
    color: tuple[float, float, float] | None = None  # factors of brightness, contrast, saturation
    filters: tuple[Filter, ...] = ()


class Augmentation:
    """All augmentations.

    Args:
        **settings: of the classes in `AUGMENTATIONS`, e.g. `hflip=0.5`, `scale=(0.5, 2.0)`.

    Attributes:
        slow: an augmentation is on that takes several times as long as the others.
        resamples: one is on that does more than to flip and to crop.

    Raises:
        ValueError: an unknown setting.
    """

    def __init__(self, **settings: Any) -> None:
        known = {field.name: cls for cls in AUGMENTATIONS for field in fields(cls)}
        for name in settings:
            if name not in known:
                raise ValueError(f"no augmentation has {name!r}; the settings are {', '.join(known)}")
        own = {
            cls: {name: settings[name] for name in settings if known[name] is cls} for cls in AUGMENTATIONS
        }
        self.augmentations = [cls(**options) for cls, options in own.items()]
        self.resamples = any(a != type(a)() for a in self.augmentations if not isinstance(a, Flip))
        self.slow = any(hasattr(a, "slow") and any(vars(a).values()) for a in self.augmentations)

    def draw(self, generator: Generator, source: Size, output: Size) -> Transform:
        """Draw the transform of one sample from a fitted image of size `source` to `output`."""
        parts = [augmentation.draw(generator, output) for augmentation in self.augmentations]
        return compose(filter(None, parts), source, output)


def compose(parts: Iterable[Part], source: Size, output: Size) -> Transform:
    """Compose the parts of one sample to its transform."""
    scale, flips, x, y, color, maps, filters = 1.0, (False, False), 0.5, 0.5, None, [], ()
    for part in parts:
        scale *= part.scale
        flips, color = part.flips or flips, part.color or color
        x, y = part.position or (x, y)
        if part.map is not None:
            maps.append(part.map)
        if part.filter:
            filters += (part.filter,)
    left, width, to_left, to_width = _window(source[1], output[1], scale, x)
    top, height, to_top, to_height = _window(source[0], output[0], scale, y)
    matrix = None
    if maps:
        corner = np.array((x, y)) * (np.array(source[::-1]) - np.array(output[::-1]) / scale)
        matrix = reduce(np.matmul, [zoom(scale, corner), *maps, flip(flips, output)])[:2]
    regions = (top, left, height, width), (to_top, to_left, to_height, to_width)
    return Transform(*regions, flips, matrix, color, filters)


def _window(source: int, output: int, scale: float, at: float) -> tuple[int, int, int, int]:
    """Return start and length of the window along one side, in the source and in the output."""
    seen = max(1, round(output / scale))
    if seen <= source:
        return int(at * (source - seen + 1)), seen, 0, output
    shown = min(output, max(1, round(source * scale)))
    return 0, source, int(at * (output - shown + 1)), shown


def flip(flips: tuple[bool, bool], output: Size) -> np.ndarray:
    """Return the (3, 3) matrix of flips (upside down, left to right) within the output."""
    x = [-1, 0, output[1]] if flips[1] else [1, 0, 0]
    y = [0, -1, output[0]] if flips[0] else [0, 1, 0]
    return np.array([x, y, [0, 0, 1]], float)


def rotation(angle: float, output: Size) -> np.ndarray:
    """Return the (3, 3) matrix of a rotation by `angle` radians about the middle of the output."""
    cos, sin, x, y = np.cos(angle), np.sin(angle), output[1] / 2, output[0] / 2
    return np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y], [0, 0, 1]])


def zoom(scale: float, corner: np.ndarray) -> np.ndarray:
    """Return the (3, 3) matrix of a window at `corner` (x, y) of the source, enlarged by `scale`."""
    return np.array([[1 / scale, 0, corner[0]], [0, 1 / scale, corner[1]], [0, 0, 1]])


def gaussian_blur(image: "Tensor", sigma: float) -> "Tensor":
    """Convolve float (C, h, w) with a Gaussian along both axes; edges are repeated.

    By sums of shifted images, which take a fourth of the time of `conv2d` on one CPU thread.
    """
    from torch.nn.functional import pad

    radius = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(-radius, radius + 1)]
    image = pad(image[None], [radius] * 4, mode="replicate")[0]
    for axis in (1, 2):
        size = image.shape[axis] - 2 * radius
        total = image.narrow(axis, 0, size) * (weights[0] / sum(weights))
        for start, weight in enumerate(weights[1:], start=1):
            total.add_(image.narrow(axis, start, size), alpha=weight / sum(weights))
        image = total
    return image


def generator_for(seed: int, epoch: int, index: int) -> Generator:
    """Return the generator of one sample in one epoch; counter-based, it is made in microseconds."""
    return Generator(Philox(key=((seed % 2**64) << 64) + (epoch << 32) + index))
