"""Integers above 8 bits, and images with nothing to see."""

import numpy as np
import pytest
from image_files import write_tiff
from PIL import Image
from test_pairing import mask

import predict
import train
from datasets import DataError, check_data, read_image
from datasets.folder import SegmentationDataset
from models import load_model, read_checkpoint
from utils import prediction

SIZE = (40, 48)


def make(root, save, values):
    """A pair per entry of `values`, the last one to validate; `save(path without suffix, values)`."""
    for number, own in enumerate(values):
        split = "val" if number == len(values) - 1 else "train"
        (root / split / "images").mkdir(parents=True, exist_ok=True)
        save(root / split / "images" / f"p{number}", own)
        ids = np.zeros(SIZE, np.uint8)
        ids[:, :20] = 1
        mask(root / split / "masks" / f"p{number}.png", 0)
        Image.fromarray(ids).save(root / split / "masks" / f"p{number}.png")
    return root


def ramp(top, dtype=np.uint16):
    return np.linspace(0, top, SIZE[0] * SIZE[1]).round().astype(dtype).reshape(SIZE)


def png(path, array):
    Image.fromarray(array).save(f"{path}.png")


def tiff(path, array):
    write_tiff(f"{path}.tif", array)


def npy(path, array):
    np.save(f"{path}.npy", array)


@pytest.mark.parametrize("save", [png, tiff, npy])
@pytest.mark.parametrize(
    ("top", "range_end"), [(4095, 4095), (2000, 2047), (300, 511), (100, 255), (40000, 65535)]
)
def test_the_range_is_that_of_all_images_of_all_splits(tmp_path, save, top, range_end):
    make(tmp_path, save, [ramp(top // 3), ramp(50), ramp(top)])  # the largest is in val
    report = check_data(tmp_path, num_classes=2, in_channels=1)
    assert report.max_value == range_end
    assert ("becomes 0..255" in report.describe()) == (range_end < 65535)
    dataset = SegmentationDataset(
        report.train, encoding=report.encoding, image_size=SIZE, in_channels=1, max_value=report.max_value,
        evaluation=True,
    )  # fmt: skip
    seen, _, _ = dataset.evaluation_item(0)
    assert np.array_equal(seen[0], (ramp(top // 3) * (255 / range_end) + 0.5).astype(np.uint8))


def test_eight_bits_have_no_range(tmp_path):
    make(tmp_path, png, [ramp(90, np.uint8)] * 2 + [ramp(80, np.uint8)])
    report = check_data(tmp_path, num_classes=2, in_channels=1)
    assert report.max_value is None and "bits" not in report.describe()


def test_a_mixed_set_says_how_many_are_wide(tmp_path):
    make(tmp_path, png, [ramp(1000), ramp(90, np.uint8), ramp(900)])
    report = check_data(tmp_path, num_classes=2, in_channels=1)
    assert "images: 2 of 3 hold integers above 8 bits, up to 1000; 0..1023 (10 bits)" in report.describe()


def test_values_beyond_the_range_of_training_are_refused_and_not_clipped(tmp_path):
    png(tmp_path / "a", ramp(5000))
    with pytest.raises(DataError, match=r"a\.png.*0\.\.5000.*end at 4095"):
        read_image(tmp_path / "a.png", 1, max_value=4095)


def test_the_range_is_kept_in_the_checkpoint_and_used_by_predict(tmp_path, settings, monkeypatch, capsys):
    root = make(tmp_path / "wide", png, [ramp(4095), ramp(3000), ramp(2000)])
    config = settings(data_root=str(root), in_channels=1, epochs=1)
    folder = train.main(config).folder
    info = read_checkpoint(folder / "best.pt")["info"]
    assert info["max_value"] == 4095 and info["pairing"]["mask_suffix"] == ""
    seen = []
    original = prediction.load_fitted

    def spy(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(prediction, "load_fitted", spy)
    (root / "val/images/note.heic").write_bytes(b"x")
    args = {"weights": str(folder), "input": str(root / "val/images"), "output": str(tmp_path / "out")}
    predict.main(predict.Args(**args, truth=str(root / "val/masks")))
    assert seen[0][2].max() == round(2000 * 255 / 4095)
    assert "left out 1 file (1 .heic)" in capsys.readouterr().out


def test_an_old_checkpoint_without_a_range_still_predicts(tmp_path, settings, data):
    folder = train.main(settings(epochs=1)).folder
    model = load_model(folder / "best.pt")
    for name in ("max_value", "pairing"):
        delattr(model.info, name)
    assert predict.segment(model, np.zeros((40, 40, 3), np.uint8)).shape == (40, 40)


@pytest.mark.parametrize("save", [png, tiff, npy])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_images_that_are_all_constant_are_warned_of(tmp_path, save, dtype):
    make(tmp_path, save, [np.full(SIZE, value, dtype) for value in (0, 9, 200)])
    (warning, *_) = check_data(tmp_path, num_classes=2, in_channels=1).warnings
    assert "all 3 images are constant" in warning and "p0." in warning


def test_images_of_one_value_nearly_everywhere_are_warned_of(tmp_path):
    dark = np.zeros((*SIZE, 3), np.uint8)
    dark[::9, ::40] = 200
    make(tmp_path, png, [dark, dark[::-1].copy(), dark[:, ::-1].copy()])
    (warning,) = check_data(tmp_path, num_classes=2).warnings
    assert "one value (0) fills 99." in warning


@pytest.mark.parametrize("constant", [1, 2])
def test_some_constant_images_are_nothing_to_warn_of(tmp_path, constant):
    make(tmp_path, png, [np.full(SIZE, 7, np.uint8)] * constant + [ramp(255, np.uint8)] * (3 - constant))
    assert not [w for w in check_data(tmp_path, num_classes=2, in_channels=1).warnings if "value" in w]


def test_a_large_jpeg_of_one_colour_is_constant_and_one_with_a_dot_is_not(tmp_path):
    photo = np.full((803, 601, 3), 90, np.uint8)

    def jpeg(path, array):
        Image.fromarray(array).save(f"{path}.jpg")

    for name, dot, expected in (("plain", 0, True), ("dotted", 120, False)):
        own = photo.copy()
        own[300:400, 300:400] += dot
        root = make(tmp_path / name, jpeg, [own] * 3)
        for path in root.glob("*/masks/*"):
            Image.fromarray(np.arange(803 * 601).reshape(803, 601).astype(np.uint8) % 2).save(path)
        warnings = check_data(root, num_classes=2).warnings
        assert any("constant" in warning for warning in warnings) == expected


@pytest.mark.parametrize("name", ["road\r", "a\nb", "\x1b[31mred", "tab\there"])
def test_a_class_name_with_a_control_character_is_refused(tmp_path, name):
    make(tmp_path, png, [ramp(200, np.uint8)] * 3)
    with pytest.raises(ValueError, match="class_names has"):
        check_data(tmp_path, num_classes=2, in_channels=1, class_names=["background", name])
    report = check_data(tmp_path, num_classes=2, in_channels=1, class_names=["背景", "дорога ünd"])
    assert "背景" in report.describe()
