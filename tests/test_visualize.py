"""Pictures: colours are exact, ids survive, and panels are drawn for few and many classes."""

import numpy as np
import pytest
import torch
from PIL import Image

from metrics import ConfusionMatrix
from utils import visualize
from utils.visualize import IGNORED, Classes, colorize, default_palette, mask_image, overlay, with_legend

NAMES = ["background", "Zähne $x$", "葉", "a very long name of a class " * 4]


def names(count):
    return [NAMES[i] if i < len(NAMES) else f"class {i}" for i in range(count)]


def classes_of(count):
    return Classes(names(count), default_palette(count), ignore_index=255)


def scores_of(counts):
    matrix = ConfusionMatrix(len(counts))
    matrix.counts.copy_(torch.from_numpy(counts))
    return matrix.scores()


def sample(rng, classes, height=40, width=50, channels=3):
    image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    truth, preds = rng.integers(0, classes, (2, height, width))
    return image, truth, preds, "0001.jpg  IoU 0.50"


def colors_of(picture):
    return {color for _, color in picture.getcolors(1 << 24)}


def log(epochs):
    """Rows of a run with scores every second epoch and one NaN."""
    rows = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "train_loss": 1 / epoch, "learning_rate": 2e-5}
        if epoch % 2:
            row |= {"val_loss": float("nan") if epoch == 3 else 0.5, "mean_iou": 0.4, "mean_dice": 0.6}
        rows.append(row)
    return rows


@pytest.mark.parametrize("count", [2, 11, 40, 256, 1000])
def test_palette_colors_differ_and_do_not_depend_on_how_many_are_asked_for(count):
    palette = default_palette(count)
    assert len(set(palette)) == len(palette) == count
    assert palette[0] == (0, 0, 0) and IGNORED not in palette
    assert palette == default_palette(2000)[:count]
    assert all(type(value) is int and 0 <= value <= 255 for color in palette for value in color)


def test_palette_ends_for_as_many_classes_as_a_run_may_have():
    assert len(set(default_palette(65535))) == 65535


def test_colorize_paints_each_class_and_leaves_grey_what_is_none():
    ids = np.array([[0, 1, 2], [255, -1, 3]])
    picture = colorize(ids, [(1, 2, 3), (4, 5, 6), (7, 8, 9)], ignore_index=2)
    assert picture.dtype == np.uint8
    assert picture.tolist() == [[[1, 2, 3], [4, 5, 6], [*IGNORED]], [[*IGNORED]] * 3]


@pytest.mark.parametrize("count", [2, 3, 5, 17, 255, 256, 257, 1000])
def test_a_saved_mask_gives_every_id_back(count, tmp_path):
    ids = np.arange(count).repeat(2).reshape(2, -1)
    mask_image(ids, default_palette(count)).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.mode == ("P" if count <= 256 else "I;16")
        assert np.array_equal(np.asarray(mask), ids)


def test_a_mask_keeps_ids_beyond_the_classes_and_refuses_what_does_not_fit(tmp_path):
    mask_image(np.array([[0, 1, 255]]), default_palette(2)).save(tmp_path / "mask.png")
    assert np.asarray(Image.open(tmp_path / "mask.png")).tolist() == [[0, 1, 255]]
    for wrong in (256, -1):
        with pytest.raises(ValueError, match=r"holds ids 0\.\.255; got .*ignore_index"):
            mask_image(np.array([[0, wrong]]), default_palette(2))


def test_overlay_mixes_colors_marks_borders_and_leaves_black_classes_alone():
    image = np.full((8, 12, 3), 100, dtype=np.uint8)
    ids = np.repeat([[0, 1, 2]], 4, axis=1).repeat(8, axis=0)
    picture = np.asarray(overlay(image, ids, [(0, 0, 0), (200, 0, 0), (0, 0, 200)]))
    assert (picture[:, :4] == 100).all()
    assert (picture[:, 5:7] == (150, 50, 50)).all()
    assert (picture[:, 4] == (200, 0, 0)).all() and (picture[:, 8] == (0, 0, 200)).all()
    assert (image == 100).all()


def test_overlay_of_a_tall_picture_is_that_of_its_parts():
    rng = np.random.default_rng(0)
    image, ids, *_ = sample(rng, 3, 1100, 5)
    whole = np.asarray(overlay(image, ids, default_palette(3)))
    assert np.array_equal(whole[:99], np.asarray(overlay(image[:100], ids[:100], default_palette(3)))[:99])
    assert np.array_equal(whole[1001:], np.asarray(overlay(image[1000:], ids[1000:], default_palette(3)))[1:])


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4, 7])
def test_pictures_of_any_number_of_channels_are_shown(channels):
    shape = (6, 5) if channels is None else (6, 5, channels)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    shown = np.asarray(overlay(image, np.zeros((6, 5), int), [(0, 0, 0)]))
    wanted = image if channels is None else image[..., :3] if channels >= 3 else image[..., 0]
    assert np.array_equal(shown if shown.shape == wanted.shape else shown[..., 0], wanted)


@pytest.mark.parametrize("size", [(1, 1), (90, 30), (2000, 900)])
@pytest.mark.parametrize("count", [2, 40])
def test_legend_keeps_the_picture_and_shows_every_color_below(size, count):
    picture = Image.new("RGB", size, (9, 9, 9))
    palette = default_palette(count)
    drawn = with_legend(picture, names(count), palette)
    assert drawn.crop((0, 0, *size)).tobytes() == picture.tobytes()
    assert set(palette) <= colors_of(drawn.crop((0, size[1], *drawn.size)))


@pytest.mark.parametrize("classes", [2, 40])
def test_panels_show_errors_in_red_and_ignored_pixels_in_grey(classes):
    rng = np.random.default_rng(0)
    image, truth, _, caption = sample(rng, classes)
    preds = truth.copy()
    clean = visualize.sample_panels([(image, truth, preds, caption)], classes_of(classes))
    preds[10:20, 10:20] = (preds[10:20, 10:20] + 1) % classes
    truth = np.where(np.arange(50) < 5, 255, truth)
    found = visualize.sample_panels([(image, truth, preds, caption)], classes_of(classes))
    for panel, there in ((clean, False), (found, True)):
        colors = colors_of(panel)
        assert (visualize.WRONG in colors) is there and (IGNORED in colors) is there


def test_augmented_panel_takes_batches_of_one_and_puts_two_in_a_line():
    rng = np.random.default_rng(0)
    images, masks, *_ = (np.stack(part) for part in zip(*(sample(rng, 3) for _ in range(3)), strict=True))
    one, two, three = (visualize.augmented_panel(images[:n], masks[:n], classes_of(3)) for n in (1, 2, 3))
    assert two.width > one.width
    assert three.height > two.height


@pytest.mark.parametrize("epochs", [0, 1, 5])
def test_curves_are_drawn_from_no_row_one_row_and_rows_with_gaps(epochs):
    picture = visualize.draw_curves(log(epochs), [(0, 1e-3), (5, 0)] if epochs else [])
    assert picture.mode == "RGB" and picture.width > 800
    assert len(colors_of(picture)) > 2


@pytest.mark.parametrize("classes", [2, 11, 45])
def test_report_is_drawn_for_few_and_many_classes_with_absent_ones(classes):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (classes, classes))
    counts[-1], counts[:, -1] = 0, 0
    rows = [sample(rng, classes), sample(rng, classes, 20, 300)]
    looks, plan, scores = classes_of(classes), [(0, 1e-3), (3, 0)], scores_of(counts)
    report = visualize.draw_report(log(3), plan, looks, scores, counts, [*rows, rows[0]], "a run", "settings")
    none = 0 * counts
    bare = visualize.draw_report(log(1), [], looks, scores_of(none), none, [], "long title " * 30)
    assert report.width == bare.width == visualize.WIDTH and report.height > bare.height


def test_drawing_warns_of_nothing_and_leaves_matplotlib_as_it_was(recwarn):
    import matplotlib

    before = dict(matplotlib.rcParams)
    counts = np.eye(4, dtype=int)
    visualize.draw_report(log(2), [], classes_of(4), scores_of(counts), counts, [], "x")
    assert dict(matplotlib.rcParams) == before
    assert not recwarn.list
