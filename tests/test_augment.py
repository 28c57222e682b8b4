"""Image and mask stay aligned, and no mask gains a label, whatever the augmentation."""

import re
from dataclasses import fields

import numpy as np
import pytest
import torch

from config import Config
from datasets import Augmentation, fit
from datasets.augment import (
    AUGMENTATIONS,
    Transform,
    flip,
    gaussian_blur,
    generator_for,
    rotation,
    zoom,
)
from datasets.fitting import OUTSIDE, fit_mask, place, resize_mask
from datasets.warp import apply_transform, jitter

IGNORE = 255
GEOMETRY = {"hflip": 0.5, "vflip": 0.5, "scale": (0.5, 2.0), "rotate": 30}
EVERYTHING = Augmentation(**GEOMETRY, color_jitter=0.4, blur=2)


def apply(image, mask, transform, output, ignore_index=IGNORE):
    out_image, out_mask = np.empty((image.shape[2], *output), np.uint8), np.empty(output, mask.dtype)
    apply_transform(image, mask, transform, out_image, out_mask, ignore_index)
    return out_image.transpose(1, 2, 0), out_mask


def draw(augmentation, trial, source, output):
    return augmentation.draw(generator_for(0, 0, trial), source, output)


def random_sizes(trial):
    sides = np.random.default_rng(trial).integers(5, 60, 4).tolist()
    return tuple(sides[:2]), tuple(sides[2:])


@pytest.mark.parametrize("rotate", [0, 30])
def test_an_image_that_equals_its_mask_still_does_after_any_augmentation(rotate):
    """Ramps along both axes would show a shift between image and mask by a fraction of a pixel."""
    means = []
    for trial in range(150):
        source, output = (int(60 + trial % 7), int(70 - trial % 5)), (48, 56)
        y, x = np.indices(source)
        for ramp in (x, y):
            mask = (3 * ramp).astype(np.uint8)
            image = np.repeat(mask[..., None], 3, axis=2)
            transform = draw(Augmentation(**GEOMETRY | {"rotate": rotate}), trial, source, output)
            seen, ids = apply(image, mask, transform, output)
            inside = ids != IGNORE
            inside[1:-1, 1:-1] &= inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
            inside[[0, -1]] = inside[:, [0, -1]] = False  # the edge is blended with the outside
            error = (seen[..., 0].astype(int) - ids)[inside]
            assert error.size == 0 or np.abs(error).max() <= 2  # half a pixel is 1.5
            means += [error.mean()] if error.size > 200 else []
    assert len(means) > 100 and np.abs(np.median(means)) < 0.1


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "crop"])
def test_a_mask_gains_no_label_but_ignore(resize):
    for trial in range(120):
        source, output = random_sizes(trial)
        rng = np.random.default_rng(trial)
        labels = rng.choice(200, 4, replace=False)
        mask = rng.choice(labels, source).astype(np.uint8)
        image = rng.integers(0, 256, (*source, 3), np.uint8)
        fitted, box = fit(image, output, resize)
        ids = fit_mask(mask, output, resize, IGNORE)
        assert fitted.shape[:2] == ids.shape == (source if resize == "crop" else output)
        _, augmented = apply(fitted, ids, draw(EVERYTHING, trial, ids.shape, output), output)
        assert set(np.unique(augmented)) <= {*labels.tolist(), IGNORE}


@pytest.mark.parametrize("rotate", [0, 1e-9, 20])
def test_pixels_outside_the_image_are_ignored_and_grey_and_those_inside_are_not(rotate):
    mask, image = np.zeros((20, 20), np.uint8), np.full((20, 20, 3), 7, np.uint8)
    transform = draw(Augmentation(hflip=0, scale=(0.5, 0.5), rotate=rotate), 3, (20, 20), (20, 20))
    seen, ids = apply(image, mask, transform, (20, 20))
    assert abs((ids == 0).sum() - 100) <= 20 and (ids[ids != 0] == IGNORE).all()
    far = np.abs(seen[..., 0].astype(int) - OUTSIDE) <= 1
    assert (far | (ids == 0) | (seen[..., 0] < OUTSIDE)).all() and (seen[ids == 0] <= OUTSIDE).all()


def test_transforms_agree_with_numpy():
    rng = np.random.default_rng(1)
    image, mask = rng.integers(0, 256, (6, 8, 3), np.uint8), rng.integers(0, 9, (6, 8)).astype(np.uint8)
    shape = mask.shape
    box = (0, 0, *shape)
    for flips, axes in (((False, False), ()), ((False, True), 1), ((True, False), 0), ((True, True), (0, 1))):
        for matrix in (None, flip(flips, shape)[:2]):
            seen, ids = apply(image, mask, Transform(box, box, flips, matrix), shape)
            assert np.array_equal(seen, np.flip(image, axes)) and np.array_equal(ids, np.flip(mask, axes))
    square = rng.integers(0, 9, (7, 7)).astype(np.uint8)
    quarter = Transform((), (), matrix=rotation(np.pi / 2, (7, 7))[:2])
    assert np.array_equal(apply(np.zeros((7, 7, 3), np.uint8), square, quarter, (7, 7))[1], np.rot90(square))


@pytest.mark.parametrize("matrix", [None, zoom(2, (1, 2))[:2]], ids=["regions", "matrix"])
def test_zoom_by_two_shows_every_pixel_of_its_window_four_times(matrix):
    mask = np.arange(36, dtype=np.uint8).reshape(6, 6)
    transform = Transform((2, 1, 3, 4), (0, 0, 6, 8), matrix=matrix)
    _, ids = apply(np.zeros((6, 6, 3), np.uint8), mask, transform, (6, 8))
    assert np.array_equal(ids, mask[2:5, 1:5].repeat(2, 0).repeat(2, 1))


def test_crop_takes_a_window_of_whole_pixels_at_the_scale_of_the_image():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    mask = np.arange(2000).reshape(40, 50)
    corners = set()
    for trial in range(50):
        _, ids = apply(image, mask, draw(Augmentation(hflip=0), trial, mask.shape, (16, 16)), (16, 16))
        y, x = divmod(int(ids[0, 0]), 50)
        assert np.array_equal(ids, mask[y : y + 16, x : x + 16])
        corners.add((y, x))
    assert len(corners) > 40


def test_every_part_of_an_image_is_equally_likely_to_be_seen():
    seen = np.zeros((20, 20))
    for trial in range(600):
        _, ids = apply(
            np.zeros((20, 20, 3), np.uint8),
            np.arange(400).reshape(20, 20),
            draw(Augmentation(hflip=0.5, scale=(2, 2)), trial, (20, 20), (20, 20)),
            (20, 20),
        )
        seen.ravel()[np.unique(ids)] += 1
    assert seen[0].min() > 0 and abs(seen[:, :10].sum() / seen.sum() - 0.5) < 0.03


@pytest.mark.parametrize("ignore_index", [-(2**31), -100, -1, 11, 255, 1000, 2**31 - 1])
def test_any_ignore_index_survives_resampling(ignore_index):
    mask = np.random.default_rng(0).choice([0, 5, ignore_index], (30, 30))
    _, ids = apply(
        np.zeros((30, 30, 1), np.uint8),
        mask,
        draw(Augmentation(**GEOMETRY), 5, (30, 30), (30, 30)),
        (30, 30),
        ignore_index,
    )
    assert set(np.unique(ids)) == {0, 5, ignore_index}


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_any_number_of_channels_is_fitted_and_augmented(channels):
    image = np.random.default_rng(0).integers(0, 256, (33, 21, channels), np.uint8)
    fitted, box = fit(image, (32, 40), "letterbox")
    assert fitted.shape == (32, 40, channels) and box == place((33, 21), (32, 40), "letterbox")
    assert (fitted[:, : box.left] == OUTSIDE).all() and box.left == 10 and box.width == 20
    seen, _ = apply(fitted, np.zeros((32, 40), np.uint8), draw(EVERYTHING, 1, (32, 40), (16, 16)), (16, 16))
    assert seen.shape == (16, 16, channels)


def test_letterbox_keeps_the_aspect_ratio_and_labels_only_the_image():
    for trial in range(60):
        source, output = random_sizes(trial)
        box = place(source, output, "letterbox")
        assert box.height == output[0] or box.width == output[1]
        ids = fit_mask(np.zeros(source, np.uint8), output, "letterbox", IGNORE)
        content = ids[box.top : box.top + box.height, box.left : box.left + box.width]
        assert (content == 0).all() and (ids == 0).sum() == box.height * box.width


def test_masks_are_resized_by_the_value_under_each_centre():
    for trial in range(60):
        (old, _), (new, _) = random_sizes(trial)
        row = np.arange(old)[None]
        expected = [int((i + 0.5) * old / new) for i in range(new)]
        assert resize_mask(row, (1, new))[0].tolist() == expected


def test_jitter_by_1_changes_nothing_and_grey_stays_grey():
    pixels = torch.randint(0, 256, (3, 8, 8)).float()
    assert torch.equal(jitter(pixels.clone(), 1, 1, 1).byte(), pixels.byte())
    grey = torch.full((3, 2, 2), 90.0)
    assert torch.equal(jitter(grey.clone(), 1, 1, 0.3).byte(), grey.byte())
    assert jitter(grey.clone(), 1.2, 1, 1).byte().unique().tolist() == [108]
    assert jitter(pixels.clone(), 3, 3, 3).min() >= 0


SETTINGS = [field.name for cls in AUGMENTATIONS for field in fields(cls)]
OFF = {name: 0 if isinstance(getattr(Config, name), float) else getattr(Config, name) for name in SETTINGS}
ON = {  # the upper bound, or both bounds
    name: float(re.search(r"to (\S+)", Config.remarks()[name].bounds)[1]) for name in SETTINGS
} | {"scale": (0.1, 10.0)}


def test_every_setting_of_an_augmentation_is_one_of_config_with_the_same_default():
    settings = Config().augmentation_options
    assert sorted(settings) == sorted(SETTINGS)
    assert Augmentation(**settings).augmentations == Augmentation().augmentations


@pytest.mark.parametrize("name", SETTINGS)
def test_turning_one_augmentation_on_or_off_leaves_the_draws_of_the_others_alone(name):
    (changed,) = [cls for cls in AUGMENTATIONS if name in {field.name for field in fields(cls)}]
    for trial in range(20):
        for settings, change in ((ON, OFF), (OFF, ON)):
            parts = drawn(settings, trial), drawn(settings | {name: change[name]}, trial)
            assert all(
                same(*pair) for cls, *pair in zip(AUGMENTATIONS, *parts, strict=True) if cls != changed
            )


def drawn(settings, trial):
    """The part of each augmentation."""
    generator = generator_for(0, 0, trial)
    return [augmentation.draw(generator, (20, 20)) for augmentation in Augmentation(**settings).augmentations]


def same(one, other):
    if one is None or other is None:
        return one is other
    image = torch.arange(300.0).view(3, 10, 10)
    values = [(*part[:2], part.position, part.color, np.array(part.map)) for part in (one, other)]
    blurred = [part.filter(image) if part.filter else image for part in (one, other)]
    return repr(values[0]) == repr(values[1]) and torch.equal(*blurred)


@pytest.mark.parametrize(
    ("key", "regions", "color", "row"),
    [
        (
            (0, 0, 0),
            ((0, 0, 60, 50), (1, 10, 35, 29), (True, True)),
            1.178617717,
            (-1.713389161, 65.351021995),
        ),
        (
            (3, 5, 7),
            ((6, 0, 52, 50), (0, 8, 40, 38), (True, False)),
            1.036362302,
            (1.300824867, -9.733109635),
        ),
    ],
)
def test_seeds_keep_the_draws_that_they_had(key, regions, color, row):
    augmentation = Augmentation(hflip=0.5, vflip=0.5, scale=(0.5, 2.0), rotate=9, color_jitter=0.2, blur=1)
    transform = augmentation.draw(generator_for(*key), (60, 50), (40, 48))
    assert (transform.source, transform.target, transform.flips) == regions
    assert transform.color[0] == pytest.approx(color)
    assert (transform.matrix[0, 0], transform.matrix[0, 2]) == pytest.approx(row)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="no augmentation has 'flip'; the settings are hflip, vflip, scale"):
        Augmentation(flip=1)


def test_blur_is_a_gaussian_with_repeated_edges():
    image = torch.rand(2, 30, 24, dtype=torch.float64)
    sigma, radius = 1.7, 6
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    kernel = np.exp(-(x**2 + y**2) / (2 * sigma**2))
    padded = np.pad(image, ((0, 0), (radius, radius), (radius, radius)), mode="edge")
    expected = np.zeros_like(image)
    for row, column in np.ndindex(30, 24):
        window = padded[:, row : row + 2 * radius + 1, column : column + 2 * radius + 1]
        expected[:, row, column] = (window * kernel / kernel.sum()).sum((1, 2))
    assert np.allclose(gaussian_blur(image, sigma), expected, atol=1e-12)


@pytest.mark.parametrize("rotate", [0, 20])
def test_blur_smooths_the_image_and_leaves_the_mask_and_a_flat_image_alone(rotate):
    rng = np.random.default_rng(0)
    noise, flat = rng.integers(0, 256, (40, 40, 3), np.uint8), np.full((40, 40, 3), OUTSIDE, np.uint8)
    mask = rng.integers(0, 4, (40, 40)).astype(np.uint8)
    sharp, blurred = (
        draw(Augmentation(hflip=0, rotate=rotate, blur=blur), 3, (40, 40), (40, 40)) for blur in (0, 4)
    )
    assert apply(noise, mask, blurred, (40, 40))[0].std() < 0.5 * apply(noise, mask, sharp, (40, 40))[0].std()
    assert np.array_equal(apply(noise, mask, blurred, (40, 40))[1], apply(noise, mask, sharp, (40, 40))[1])
    assert (apply(flat, mask, blurred, (40, 40))[0] == OUTSIDE).all()


def test_slow_augmentations_are_told_from_fast_ones():
    assert not Augmentation(hflip=1, scale=(0.5, 2), color_jitter=0.3).slow
    assert Augmentation(rotate=1).slow and Augmentation(blur=1).slow


def test_generators_differ_by_seed_epoch_and_index_and_repeat():
    keys = [(seed, epoch, index) for seed in (0, 1, -5) for epoch in range(6) for index in range(6)]
    first = {generator_for(*key).random() for key in keys}
    assert len(first) == len(keys) and first == {generator_for(*key).random() for key in keys}
