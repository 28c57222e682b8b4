"""Draw the mock data set anew: berries, leaves and flowers lying on the ground, with their masks.

`python mock_data/make.py` rewrites `train/`, `val/` and `predict/` beside this file, the same every time.
Shape and relief decide the class, colour hardly leans: the three share one table of colours, the ground's
stains and twigs take theirs from it too, and things overlap, vary in size and lie in varying light. A table
from colours to classes reaches a mean IoU of 0.38 (tests/test_mock_data.py holds it below 0.45); a small
network that sees shapes gets well past twice that in half a minute.

Every draw comes from (seed, split, number), so one picture can be changed without touching the others.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

CLASS_NAMES = ("background", "berry", "leaf", "flower")
CLASS_COLORS = ((0, 0, 0), (204, 51, 102), (68, 170, 119), (238, 187, 68))
SPLITS = {"train": 40, "val": 10, "predict": 3}
SEED = 7
FINE = 3  # pictures are drawn so many times too large and averaged down; masks take the middle sample

THING_COLORS = np.array([  # red, orange, yellow, green, blue, violet, pink, cream
    (0.78, 0.13, 0.16), (0.90, 0.45, 0.12), (0.93, 0.78, 0.22), (0.32, 0.55, 0.20),
    (0.22, 0.33, 0.66), (0.48, 0.24, 0.58), (0.92, 0.55, 0.68), (0.93, 0.90, 0.82),
])  # fmt: skip
GROUND_COLORS = np.array([  # soil, moss, sand, slate, bark
    (0.36, 0.28, 0.21), (0.38, 0.44, 0.26), (0.72, 0.63, 0.48), (0.45, 0.48, 0.52), (0.56, 0.40, 0.27),
])  # fmt: skip


def smooth_noise(rng, height, width, cell):
    """(height, width) noise within about -1..1 that varies over `cell` pixels."""
    grid = rng.uniform(-1, 1, (max(2, height // cell + 2), max(2, width // cell + 2))).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def turned(angle, y, x):
    """Coordinates along and across a direction."""
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def draw_ground(rng, height, width):
    """(height, width, 3) of earth, moss, sand, slate or bark, with its grain and stains."""
    unit = min(height, width)
    kind = rng.integers(len(GROUND_COLORS))
    base = GROUND_COLORS[kind] * rng.uniform(0.85, 1.15)
    scales = ((0.10, unit // 3), (0.09, unit // 12), (0.12, 9))  # strength, cell
    relief = sum(strength * smooth_noise(rng, height, width, cell) for strength, cell in scales)
    if kind in (2, 4):  # ripples of sand, grain of bark
        along, _ = turned(rng.uniform(0, np.pi), *np.mgrid[:height, :width] / unit)
        bend = 1.2 * smooth_noise(rng, height, width, unit // 2)
        relief += 0.10 * np.sin(rng.uniform(25, 45) * along + 3 * bend)
    ground = base * (1 + relief[..., None])
    for _ in range(rng.integers(1, 4)):
        stain = np.clip(smooth_noise(rng, height, width, unit // 4) * 2 - 0.9, 0, 1)[..., None]
        color = THING_COLORS[rng.integers(len(THING_COLORS))]
        ground = ground * (1 - 0.22 * stain) + color * (1 + relief[..., None]) * 0.22 * stain
    return ground


def berry(rng, u, v):
    """A shaded ball: its outline (positive inside) and its brightness."""
    rho = np.hypot(u, v)
    height = np.sqrt(np.clip(1 - rho**2, 0, 1))
    shine = np.exp(-((u + 0.35) ** 2 + (v + 0.35) ** 2) / 0.03)
    return 1 - rho, 0.30 + 0.78 * height - 0.15 * (u + v) + 0.55 * shine


def leaf(rng, u, v):
    """A pointed oval with a midrib and side veins, a little bent."""
    v = v + rng.uniform(-0.25, 0.25) * (u**2 - 0.5)
    half = rng.uniform(0.42, 0.56) * np.clip(1 - u**2, 0, 1) ** rng.uniform(0.8, 1.05)
    veins = np.abs(np.sin(11 * (u - 0.8 * np.abs(v)))) < 0.3
    bright = 0.74 + 0.14 * np.sign(v) * np.minimum(np.abs(v) * 4, 1) + 0.34 * veins + 0.4 * (np.abs(v) < 0.05)
    return half - np.abs(v), bright


def flower(rng, u, v):
    """Five to seven petals around an eye; dark between the petals."""
    rho, theta = np.hypot(u, v), np.arctan2(v, u)
    petals = np.abs(np.cos(theta * rng.integers(5, 8) / 2))
    edge = 0.45 + 0.55 * petals ** rng.uniform(0.45, 0.7)
    return edge - rho, 0.35 + 0.8 * petals * (0.5 + 0.5 * rho)


THINGS = {  # class: how to draw it, its stretch (so that all cover as much), its weights of THING_COLORS
    1: (berry, 0.85, (3, 2, 2, 2, 3, 2, 2, 1)),
    2: (leaf, 1.35, (2, 2, 2, 4, 2, 2, 1, 1)),
    3: (flower, 1.1, (2, 2, 2, 1, 2, 2, 3, 3)),
}


def place_thing(rng, picture, ids, label, center, radius):
    """Draw one thing with its shadow into `picture`, and its class into `ids`, both at the fine scale."""
    draw, stretch, weights = THINGS[label]
    radius = float(radius * stretch)
    reach = int(radius * 1.3)
    window = tuple(slice(max(0, middle - reach), middle + reach) for middle in center)
    y, x = (places[window] for places in np.indices(ids.shape))
    angle, squash = rng.uniform(0, 2 * np.pi), rng.uniform(0.75 if label == 3 else 0.9, 1)
    angle *= label != 1  # the light comes from the upper left, however a ball lies
    u, v = turned(angle, (y - center[0]) / radius, (x - center[1]) / radius)
    v = v / squash
    outline, bright = draw(rng, u, v)
    inside = outline > 0

    color = THING_COLORS[rng.choice(len(THING_COLORS), p=np.array(weights) / sum(weights))]
    color = np.clip(color * rng.uniform(0.8, 1.15) + rng.uniform(-0.05, 0.05, 3), 0, 1)
    surface = color * bright[..., None] * (1 + 0.03 * smooth_noise(rng, *inside.shape, 12)[..., None])
    if label == 3:
        eye = (np.hypot(u, v) < rng.uniform(0.2, 0.28))[..., None]
        surface = np.where(eye, THING_COLORS[rng.choice([0, 1, 2, 4])] * (0.8 + 0.3 * rng.random()), surface)

    offset = max(1, int(radius * 0.12))
    soft = Image.fromarray(np.uint8(inside * 255)).filter(ImageFilter.GaussianBlur(radius * 0.10))
    shadow = np.pad(np.float32(soft) / 255, ((offset, 0), (offset, 0)), mode="edge")
    ground = picture[window] * (1 - 0.5 * shadow[:-offset, :-offset, None])
    picture[window] = np.where(inside[..., None], surface, ground)
    ids[window][inside] = label


def place_twig(rng, picture, ids):
    """A thin twig or blade in one of the things' colours: ground, though it may lie across a thing's edge."""
    height, width = ids.shape
    unit = min(height, width)
    y, x = np.mgrid[:height, :width]
    angle = rng.uniform(0, np.pi)
    along, across = turned(angle, y - rng.uniform(0, height), x - rng.uniform(0, width))
    across = across + rng.uniform(-0.6, 0.6) * along**2 / unit
    half = unit * rng.uniform(0.008, 0.016)
    inside = (np.abs(across) < half) & (np.abs(along) < unit * rng.uniform(0.15, 0.4))
    color = THING_COLORS[rng.choice([1, 2, 3, 3, 5, 7])] * 0.75
    picture[inside] = color * (1 - 0.35 * across[inside] / half)[..., None]


def draw_scene(rng, height, width):
    """One picture (height, width, 3) uint8 and its class ids (height, width) uint8."""
    tall, wide = height * FINE, width * FINE
    unit = min(tall, wide)
    picture, ids = draw_ground(rng, tall, wide), np.zeros((tall, wide), np.uint8)
    for _ in range(rng.integers(0, 3)):
        place_twig(rng, picture, ids)
    count = int(rng.integers(5, 9) * max(tall, wide) / unit)
    radii = np.sort(unit * np.exp(rng.uniform(np.log(0.14), np.log(0.28), count)))[::-1]
    labels = rng.permutation(np.arange(count) % 3 + 1)  # as many of each, the large ones first
    placed = []
    for label, radius in zip(labels.tolist(), radii, strict=True):
        for _ in range(40):  # a place that leaves at least two thirds of the earlier things in sight
            center = int(rng.uniform(0, tall)), int(rng.uniform(0, wide))
            if all(np.hypot(center[0] - a, center[1] - b) > 0.75 * (radius + r) for a, b, r in placed):
                place_thing(rng, picture, ids, label, center, radius)
                placed.append((*center, radius))
                break

    y, x = np.mgrid[-1 : 1 : tall * 1j, -1 : 1 : wide * 1j]
    slope = rng.uniform(-0.22, 0.22, 2)
    light = rng.uniform(0.9, 1.1) + slope[0] * y + slope[1] * x - 0.08 * (x**2 + y**2)
    picture = picture * light[..., None] * rng.uniform(0.94, 1.06, 3)
    picture = picture.reshape(height, FINE, width, FINE, 3).mean((1, 3))
    picture = picture + rng.normal(0, rng.uniform(0.008, 0.025), (height, width, 1))
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8), ids[FINE // 2 :: FINE, FINE // 2 :: FINE]


def draw_picture(split, number):
    """The picture and mask of one number of a split, always the same; portrait, landscape and square."""
    rng = np.random.default_rng((SEED, list(SPLITS).index(split), number))
    short, ratio = rng.integers(128, 185), rng.uniform(1, 1.45)
    size = int(short), int(short * ratio)
    return draw_scene(rng, *(size if number % 3 else size[::-1]))


def write(root, counts=SPLITS):
    """Write the first `counts` pictures of each split under `root`: every fourth a PNG, the others JPEGs."""
    for split, count in counts.items():
        masked = split != "predict"
        pictures, masks = root / split / ("images" if masked else ""), root / split / "masks"
        pictures.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture, mask = map(Image.fromarray, draw_picture(split, number))
            ending = ".jpg" if (number + 1) % 4 else ".png"
            picture.save(pictures / f"{number:02}{ending}", quality=90, optimize=ending == ".png")
            if masked:
                masks.mkdir(exist_ok=True)
                mask.putpalette([value for color in CLASS_COLORS for value in color])
                mask.save(masks / f"{number:02}.png", optimize=True)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
