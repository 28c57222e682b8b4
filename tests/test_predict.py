"""predict.py whole: what it writes, that it scores as training does, and what it refuses."""

import csv
import importlib.util
import json
import os
import shutil
import sys
from dataclasses import make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import doors
import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train
from config import Config
from datasets import fit, read_image
from datasets.large import LargeImage, read_size
from metrics import ConfusionMatrix, predicted_ids
from models import MODELS, build_model, load_model
from predict import Args
from utils.cli import Fail, parse
from utils.export import export
from utils.inference import normalize

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("undrawn")


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder for the run of the default training, which many tests start from."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def args(settings, data, tmp_path, kept):
    """Train for an epoch and make Args for that run; any field can be given.

    The data that a test has not changed is the same every time, so the run without settings is made once.
    """

    def make(training=None, **changes):
        folder = tmp_path / "runs" / "run"
        if training is None and (kept / "run").exists():
            shutil.copytree(kept / "run", folder)
        else:
            train.main(settings(**{"epochs": 1, **(training or {})}))
            if training is None:
                shutil.copytree(folder, kept / "run")
        given = dict(
            weights=str(folder / "best.pt"), input=str(data / "val" / "images"), output=str(tmp_path / "out")
        )
        return Args(**{**given, **changes})

    return make


def test_masks_have_each_pictures_own_size_and_hold_class_ids_in_a_palette(args, data, tmp_path):
    predict.main(args())
    for picture in (data / "val" / "images").iterdir():
        mask = Image.open(tmp_path / "out" / "masks" / picture.name)
        assert (mask.mode, mask.size) == ("P", Image.open(picture).size)
        assert set(np.unique(np.array(mask))) <= {0, 1}
        assert (tmp_path / "out" / "overlays" / picture.name).exists()
    summary = rows_of(tmp_path / "out" / "summary.csv")
    assert len(summary) == 3
    assert all(abs(float(row["class_0"]) + float(row["class_1"]) - 1) < 1e-5 for row in summary)


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"resize": "letterbox", "ema_decay": 0.5},
        {"resize": "crop"},
        {"amp": "off", "batch_size": 3},
        {"ignore_index": 2},
    ],
    ids=["stretch", "letterbox-ema", "crop", "float32", "ignore-2"],
)
def test_scoring_the_predictions_gives_the_digits_of_the_log(args, data, tmp_path, capsys, training):
    if training.get("ignore_index") == 2:
        for path in data.rglob("masks/*.png"):
            mask = np.array(Image.open(path))
            Image.fromarray(np.where(mask == 255, 2, mask).astype(np.uint8)).save(path)
    given = args({"epochs": 3, "learning_rate": 0.01, **training}, truth=str(data / "val" / "masks"))
    best = max(rows_of(Path(given.weights).parent / "log.csv"), key=lambda row: float(row["mean_iou"]))
    for batch_size in (1, 8):
        output = tmp_path / f"out{batch_size}"
        capsys.readouterr()
        predict.main(replace(given, batch_size=batch_size, output=str(output)))
        printed = capsys.readouterr().out
        assert f"mean IoU {float(best['mean_iou']):.4f}" in printed
        assert f"mean Dice {float(best['mean_dice']):.4f}" in printed
        scores = rows_of(output / "scores.csv")
        assert [row["mean_iou"] for row in scores] == sorted(row["mean_iou"] for row in scores)
        mean = np.mean([float(row["mean_iou"]) for row in scores])
        assert abs(mean - float(best["picture_mean_iou"])) < 2e-6


def test_one_picture_in_other_code_equals_the_written_mask(args, data, tmp_path):
    given = args({"amp": "off"})
    predict.main(given)
    picture = data / "val" / "images" / "p1.png"
    ids = predict.segment(load_model(given.weights), np.array(Image.open(picture)))
    assert np.array_equal(ids, np.array(Image.open(tmp_path / "out" / "masks" / "p1.png")))


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((40, 50, 3), np.float32),
        np.zeros((3, 40, 50), np.uint8),
        np.zeros((40, 50), np.uint8),
        np.zeros((40, 50, 4), np.uint8),
        torch.zeros(40, 50, 3, dtype=torch.uint8),
        "picture.png",
        np.zeros((0, 50, 3), np.uint8),
    ],
    ids=["floats", "channels first", "grey", "four channels", "tensor", "path", "empty"],
)
def test_a_picture_that_segment_cannot_take_is_refused_with_what_it_takes(args, picture):
    model = load_model(args().weights)
    with pytest.raises(ValueError, match=r"uint8 array of \(H, W, 3\); got .+\. datasets.read_image"):
        predict.segment(model, picture)


def test_segment_refuses_a_model_that_no_checkpoint_describes():
    with pytest.raises(ValueError, match="model of models.load_model; got a UNet without info"):
        predict.segment(build_model("unet", 2, base_channels=4), np.zeros((40, 50, 3), np.uint8))


def test_masks_come_back_in_the_training_masks_own_encoding(args, data, tmp_path):
    for path in data.rglob("masks/*.png"):
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8)).save(path)
    predict.main(args({"ignore_index": -1, "epochs": 3, "learning_rate": 0.01}, encoding="source"))
    values = {
        v for path in (tmp_path / "out" / "masks").iterdir() for v in np.unique(np.array(Image.open(path)))
    }
    assert values <= {0, 255}


def test_classes_that_the_training_masks_encoding_lacks_are_refused_before_any_work(args, tmp_path):
    given = args(encoding="source")
    content = torch.load(given.weights, weights_only=True)
    table = content["info"]["encoding"]["table"]
    content["info"]["encoding"]["table"] = [[raw, id_] for raw, id_ in table if id_ != 1]
    torch.save(content, given.weights)
    with pytest.raises(Fail, match=r"class ids \[1\] have no value in .*Use encoding index") as caught:
        predict.main(given)
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_a_picture_whose_name_is_no_text_is_refused_before_any_work(args, data, tmp_path):
    given, picture = args(), data / "val" / "images" / "p0.png"
    os.rename(picture, os.path.join(os.fsencode(picture.parent), b"caf\xe9.png"))
    with pytest.raises(Fail, match=r"caf\\udce9.png: its name is no UTF-8: rename it") as caught:
        predict.main(given)
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()


def test_a_picture_alone_a_pattern_and_sub_folders_are_found(args, data, tmp_path):
    given = args()
    deep = tmp_path / "deep" / "a" / "b"
    deep.mkdir(parents=True)
    shutil.copy(data / "val" / "images" / "p0.png", deep / "p0.png")
    shutil.copy(data / "val" / "images" / "p1.png", tmp_path / "deep" / "p0.png")
    common = dict(weights=given.weights)
    predict.main(Args(**common, input=str(deep / "p0.png"), output=str(tmp_path / "one")))
    predict.main(Args(**common, input=str(tmp_path / "deep"), recursive=True, output=str(tmp_path / "all")))
    predict.main(
        Args(**common, input=str(data / "val" / "images" / "p[01].png"), output=str(tmp_path / "some"))
    )

    def masks(name):
        return {
            path.relative_to(tmp_path / name / "masks").as_posix()
            for path in (tmp_path / name).rglob("masks/**/*.png")
        }

    assert masks("one") == {"p0.png"}
    assert masks("all") == {"p0.png", "a/b/p0.png"}
    assert masks("some") == {"p0.png", "p1.png"}


def test_two_pictures_of_one_stem_have_two_masks(args, data, tmp_path):
    given = args()
    folder = tmp_path / "twins"
    folder.mkdir()
    picture = Image.open(data / "val" / "images" / "p0.png")
    picture.save(folder / "a.png")
    picture.save(folder / "a.jpg")
    picture.save(folder / "a_png.bmp")
    predict.main(Args(weights=given.weights, input=str(folder), output=given.output))
    assert {path.name for path in (tmp_path / "out" / "masks").iterdir()} == {
        "a_jpg.png",
        "a_png_.png",
        "a_png.png",
    }


def test_an_unreadable_picture_is_named_and_skipped_and_the_others_are_written(args, data, tmp_path):
    given = args()
    (data / "val" / "images" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(Fail) as caught:
        predict.main(given)
    assert caught.value.code == 1
    assert "broken.png" in str(caught.value)
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 3


def test_where_no_picture_is_readable_nothing_is_written_or_said_to_be(args, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(Fail, match="1 of 1 pictures had problems:\n.*text.png") as caught:
        predict.main(args(input=str(tmp_path / "text.png")))
    assert caught.value.code == 1
    assert "wrote" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_picture_whose_truth_is_all_ignored_comes_last_of_the_scores(args, data, tmp_path):
    given = args(truth=str(data / "val" / "masks"))
    Image.fromarray(np.full((40, 64), 255, np.uint8)).save(data / "val" / "masks" / "p1.png")
    predict.main(given)
    scores = rows_of(tmp_path / "out" / "scores.csv")
    assert [row["mean_iou"] == "" for row in scores] == [False, False, True]


def test_a_truth_of_0_and_255_for_a_network_of_0_and_1_is_told_to_lack_a_class(args, data, capsys):
    given = args(truth=str(data / "val" / "masks"))
    predict.main(given)
    assert "no pixel of" not in capsys.readouterr().out
    for path in (data / "val" / "masks").iterdir():
        Image.fromarray(np.uint8(255) * (np.asarray(Image.open(path)) > 0)).save(path)
    predict.main(given)
    assert "the truth has no pixel of class_1; 255 in it counts nowhere, as in training" in (
        capsys.readouterr().out
    )


def test_no_picture_keeps_its_confusion_matrix_and_their_total_is_that_of_all_pixels(args, data, tmp_path):
    given = args(truth=str(data / "val" / "masks"), num_workers=2, batch_size=1)
    work = predict.prepare(given, Path(given.weights))
    total = predict.predict_all(work)
    expected = ConfusionMatrix(2)
    for picture in work.pictures:
        files = (tmp_path / "out" / "masks" / f"{picture.name}.png", picture.truth)
        expected.update(*(torch.from_numpy(np.array(Image.open(file))) for file in files))
    assert torch.equal(total.state(), expected.state())
    assert [(one.matrix, set(one.scores)) for one in work.pictures] == [(None, set(predict.SCORES))] * 3


def test_probabilities_are_written_and_their_argmax_is_the_mask(args, tmp_path):
    predict.main(args({"amp": "off"}, probabilities=True))
    found = np.load(tmp_path / "out" / "probabilities" / "p0.npz")["probabilities"]
    mask = np.array(Image.open(tmp_path / "out" / "masks" / "p0.png"))
    assert (found.dtype, found.shape) == (np.float16, (2, *mask.shape))
    assert np.allclose(found.astype(np.float32).sum(0), 1, atol=2e-3)
    sure = np.abs(found[0].astype(np.float32) - 0.5) > 0.01
    assert np.array_equal(found.argmax(0)[sure], mask[sure])


@pytest.mark.parametrize(("threshold", "value"), [(0.0, 1), (1.0, 0)])
def test_a_threshold_decides_between_two_classes(args, tmp_path, threshold, value):
    predict.main(args(threshold=threshold))
    assert np.all(np.array(Image.open(tmp_path / "out" / "masks" / "p0.png")) == value)


@pytest.mark.parametrize(
    "changes", [{"window": 32}, {"window": (32, 40), "overlap": 0.5}, {"tta": "flip"}, {"tta": "multiscale"}]
)
def test_windows_and_augmented_predictions_cover_every_picture(args, data, tmp_path, changes):
    predict.main(args(**changes))
    for picture in (data / "val" / "images").iterdir():
        assert Image.open(tmp_path / "out" / "masks" / picture.name).size == Image.open(picture).size


@pytest.mark.parametrize("training", [{}, {"resize": "letterbox"}, {"resize": "crop"}])
def test_a_picture_taken_strip_by_strip_has_the_mask_and_overlay_of_the_usual_way(args, tmp_path, training):
    given = args({"amp": "off", "epochs": 3, "learning_rate": 0.01, **training})
    predict.main(given)
    work = predict.prepare(replace(given, output=str(tmp_path / "strips")), Path(given.weights))
    for picture in work.pictures:
        predict.predict_large(work, picture)
    written = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.png")]
    assert len(written) == 6
    for name in written:
        assert (tmp_path / "strips" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def turned_picture(path, mode, turn):
    rng = np.random.default_rng(turn)
    picture = Image.fromarray(rng.integers(0, 256, (300, 70, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = turn
    (picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)).save(path, exif=exif)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "I;16", "1"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_rows_and_fitted_pictures_equal_those_of_reading_at_once(tmp_path, mode, turn):
    path = tmp_path / "picture.png"
    turned_picture(path, mode, turn)
    with LargeImage(path, 3) as picture:
        height = picture.size[0]
        rows = [picture.rows(top, min(top + 32, height)) for top in range(0, height, 32)]
        fitted, box = picture.fitted((64, 96), "letterbox")
    expected, expected_box = fit(read_image(path), (64, 96), "letterbox")
    assert np.array_equal(np.concatenate(rows), read_image(path))
    assert box == expected_box
    rounding = 0 if mode in ("RGB", "L") else 1
    assert np.abs(fitted.astype(int) - expected).max() <= rounding


@pytest.mark.parametrize("ending", ["tif", "png", "jpg"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_pictures_size_is_that_of_the_picture_as_read(tmp_path, ending, turn):
    path = tmp_path / f"picture.{ending}"
    turned_picture(path, "RGB", turn)
    assert read_size(path) == read_image(path).shape[:2]


def test_whether_a_picture_is_large_is_told_without_decoding_it(tmp_path):
    path = tmp_path / "cut.png"
    Image.effect_noise((5000, 4000), 50).save(path, compress_level=1)
    path.write_bytes(path.read_bytes()[:5000])
    assert predict.is_large(path, classes=2)


def test_a_wide_picture_is_reduced_by_few_rows_at_a_time(tmp_path):
    sizes = []

    class Watched(LargeImage):
        def rows(self, top, bottom):
            sizes.append((bottom - top) * self.size[1])
            return super().rows(top, bottom)

    path = tmp_path / "wide.png"
    Image.effect_noise((60000, 200), 50).save(path, compress_level=1)
    with Watched(path, 3) as picture:
        reduced = picture.reduced(4096)
    assert np.array_equal(reduced, np.asarray(Image.fromarray(read_image(path)).reduce(15)))
    assert max(sizes) <= 2**22


SCRIPT = """
import resource, sys
import predict

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
weights, picture, output, window = sys.argv[1:]
predict.main(predict.Args(weights=weights, input=picture, output=output, window=int(window) or None))
print("lifted", peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read as Linux counts it")
@pytest.mark.parametrize("window", [0, 512])
def test_a_large_picture_takes_its_decoded_self_and_its_mask_and_little_more(args, tmp_path, window):
    """3000 x 3000 pixels: 36 MB decoded, 9 MB of ids; the logits of 12 classes would be 432 MB."""
    given = args({"num_classes": 12, "base_channels": 1, "amp": "off"})
    picture = Image.radial_gradient("L").convert("RGB").resize((3000, 3000))
    picture.save(tmp_path / "l.png", compress_level=1)
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [tmp_path / "script.py", given.weights, tmp_path / "l.png", tmp_path / "out", window]
    code, printed, errors = doors.run(list(map(str, words)), ROOT, tmp_path / "log")
    assert code == 0, errors
    assert int(printed.split("lifted")[1]) < 250 * 2**20
    assert Image.open(tmp_path / "out" / "masks" / "l.png").size == (3000, 3000)


def test_earlier_predictions_are_replaced_but_never_somebody_elses_masks(args, data, tmp_path, capsys):
    given = args(output=str(data / "val"))
    before = {path: path.read_bytes() for path in data.rglob("*.png")}
    with pytest.raises(Fail, match="masks exists"):
        predict.main(given)
    assert before == {path: path.read_bytes() for path in data.rglob("*.png")}
    again = Args(weights=given.weights, input=given.input, output=str(tmp_path / "out"))
    predict.main(again)
    predict.main(again)
    assert "replaced" in capsys.readouterr().out


def test_nothing_of_an_earlier_prediction_stays_beside_a_new_mask(args, data, tmp_path):
    given, out = args(truth=str(data / "val" / "masks"), probabilities=True), tmp_path / "out"
    predict.main(given)
    one = replace(given, input=f"{given.input}/p0.png", truth=None)
    predict.main(replace(one, overlay=False, probabilities=False))
    assert not (out / "scores.csv").exists()
    for folder in ("masks", "overlays", "probabilities"):
        stems = {path.stem for path in (out / folder).iterdir()}
        assert stems == {"p1", "p2"} | ({"p0"} if folder == "masks" else set())


def test_files_that_no_prediction_wrote_are_left_where_nothing_is_written_over_them(args, tmp_path):
    mine = [tmp_path / "out" / name for name in ("scores.csv", "overlays/p0.png", "probabilities/p0.npz")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    predict.main(args(overlay=False))
    assert [path.read_text() for path in mine] == ["mine"] * 3


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def text(path):
    path.write_text("no checkpoint")


def malicious(path):
    import pickle

    class Payload:
        def __reduce__(self):
            return (Path.touch, (path.with_name("payload-ran"),))

    path.write_bytes(pickle.dumps(Payload()))


def state_dict_alone(path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


def another_format(path):
    torch.save({**torch.load(path, weights_only=True), "format": 99}, path)


def gone(path):
    path.unlink()


@pytest.mark.parametrize(
    "damage", [truncated, flipped, text, malicious, state_dict_alone, another_format, gone]
)
def test_a_file_that_is_no_checkpoint_is_refused_by_name_and_nothing_is_written(args, tmp_path, damage):
    given = args()
    path = Path(given.weights)
    damage(path)
    with pytest.raises(Fail) as caught:
        predict.main(given)
    assert caught.value.code == 2
    assert "best.pt" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not path.with_name("payload-ran").exists()


def test_a_checkpoint_of_format_1_opens(data, tmp_path):
    """Made here by hand as the first version wrote it: never to be changed with the code."""
    torch.manual_seed(0)
    info = {
        "class_names": ["ground", "square"],
        "palette": [[0, 0, 0], [200, 30, 30]],
        "image_size": [32, 32],
        "resize": "stretch",
        "ignore_index": 255,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "encoding": {
            "kind": "indices",
            "num_classes": 2,
            "ignore_index": 255,
            "table": [[0, 0], [1, 1], [255, 255]],
            "snap": False,
            "palette": [],
        },
        "mask_suffix": "",
        "amp": "off",
        "epoch": 3,
    }
    options = {"base_channels": 4, "bilinear": False}
    architecture = {"name": "unet", "num_classes": 2, "in_channels": 3, "options": options}
    model = build_model("unet", 2, base_channels=4)
    torch.save(
        {"format": 1, "model": model.state_dict(), "architecture": architecture, "info": info},
        tmp_path / "old.pt",
    )
    folder = data / "val"
    given = dict(weights=str(tmp_path / "old.pt"), output=str(tmp_path / "out"))
    predict.main(Args(input=str(folder / "images"), truth=str(folder / "masks"), **given))
    assert len(rows_of(tmp_path / "out" / "scores.csv")) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": "no/such/folder"}, ["no/such/folder"]),
        ({"truth": "no/truth"}, ["no/truth"]),
        ({"device": "cuda:77"}, ["cuda:77"]),
        ({"output": "predict.py"}, ["output predict.py", "is a file"]),
    ],
)
def test_wrong_input_is_refused_and_nothing_is_written(args, tmp_path, changes, words):
    with pytest.raises(Fail) as caught:
        predict.main(args(**changes))
    assert caught.value.code == 2
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "out").exists()


def test_a_truth_of_another_size_is_refused_by_its_name_and_nothing_is_written(args, data, tmp_path):
    given = args(truth=str(data / "val" / "masks"))
    Image.new("L", (20, 30)).save(data / "val" / "masks" / "p1.png")
    with pytest.raises(Fail, match=r"p1.png \| is 30 x 20, its image 40 x 64"):
        predict.main(given)
    assert not (tmp_path / "out").exists()


def test_threshold_is_refused_for_more_than_two_classes(args):
    with pytest.raises(Fail, match="two classes"):
        predict.main(args({"num_classes": 3}, threshold=0.5))


@pytest.mark.parametrize(
    "flags", [["--overlap", "2"], ["--window", "8"], ["--tta", "flop"], ["--batch_size", "0"]]
)
def test_wrong_values_are_refused(flags):
    with pytest.raises(Fail, match=flags[0][2:]):
        parse(Args, flags, "usage")


@pytest.mark.parametrize("slip", [{}, {"batch_size": "4"}, {"batch_size": (4,)}, {"num_classes": 7}])
def test_the_newest_weights_are_found_whatever_slip_config_py_has(args, tmp_path, monkeypatch, slip):
    given = replace(args(), weights=None)
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"output_dir": "~/runs" if os.name == "posix" else str(tmp_path / "runs"), **slip}
    fields = [(name, object, value) for name, value in values.items()]
    monkeypatch.setattr(predict, "Config", make_dataclass("Edited", fields, bases=(Config,), frozen=True))
    predict.main(given)
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 3


def test_the_folder_of_a_run_stands_for_its_best_weights(args, tmp_path, capsys):
    given = args()
    run = Path(given.weights).parent
    predict.main(replace(given, weights=str(run)))
    assert f"{run / 'best.pt'}: unet" in capsys.readouterr().out
    with pytest.raises(Fail, match="best.pt"):
        predict.main(replace(given, weights=str(run.parent)))


def test_an_output_dir_that_is_no_text_is_refused_where_weights_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "Config", SimpleNamespace(output_dir=("runs",)))
    with pytest.raises(Fail, match="output_dir must be text; got .*'runs',"):
        predict.main(Args(output=str(tmp_path / "out")))


def test_a_truth_that_vanishes_meanwhile_ends_the_prediction_with_one_line(args, data, monkeypatch):
    lost = "no such file: masks/07.png"
    monkeypatch.setattr(predict, "LargeMask", Mock(side_effect=FileNotFoundError(lost)))
    with pytest.raises(Fail, match=f"cannot go on: {lost}. What was written before is whole") as caught:
        predict.main(args(input=str(data / "val/images"), truth=str(data / "val/masks")))
    assert caught.value.code == 1


def test_a_table_that_cannot_be_written_is_said_in_one_line_and_the_masks_are_whole(args, tmp_path):
    given = args()
    (tmp_path / "out" / "summary.csv").mkdir(parents=True)
    with pytest.raises(Fail, match="tables cannot be written: .*summary.csv.* The masks are whole") as caught:
        predict.main(given)
    assert caught.value.code == 1 and len(list((tmp_path / "out" / "masks").iterdir())) == 3


def test_a_home_folder_of_nobody_is_told_as_a_path_that_is_not_there(args):
    with pytest.raises(Fail, match="~nobody_of_that_name"):
        predict.main(args(input="~nobody_of_that_name/pictures"))


def test_a_tilde_is_the_home_folder_in_every_path():
    names = ("weights", "input", "truth", "output", "export")
    given = Args(**{name: f"~/{name}" for name in names})
    assert [getattr(given, name) for name in names] == [os.path.expanduser(f"~/{name}") for name in names]


def test_the_command_line_ends_with_code_2_and_one_line(tmp_path):
    words = ["predict.py", "--weights", str(tmp_path / "none.pt")]
    code, _, errors = doors.run(words, ROOT, tmp_path / "printed")
    assert code == 2
    assert errors.count("\n") == 1
    assert "none.pt" in errors


needs_export = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14), reason="export needs torch 2.14"
)


@needs_export
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_gives_the_networks_logits_for_pictures_of_any_size(tmp_path, name, narrow_fcn):
    torch.manual_seed(0)
    small = {"unet": {"base_channels": 4}, "segnet": {"base_channels": 4}, "fcn": {"backbone": "vgg11_bn"}}
    model = build_model(name, 3, **small.get(name, {"backbone": "resnet18"})).eval()
    about = {"class_names": ["a", "b", "c"]}
    path = tmp_path / "net.pt2"
    assert export(model, path, mean=[0.4] * 3, std=[0.2] * 3, about=about) < 1e-4
    found = {"info.json": ""}
    program = torch.export.load(path, extra_files=found).module()
    pictures = torch.randint(0, 256, (2, 3, 39, 70), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(normalize(pictures, [0.4] * 3, [0.2] * 3))
        assert torch.allclose(program(pictures), expected, atol=1e-3 * float(expected.abs().max()))
    assert json.loads(found["info.json"]) == about


@needs_export
def test_export_writes_a_file_and_predicts_nothing(args, tmp_path, capsys):
    predict.main(args(export=str(tmp_path / "net.pt2")))
    printed = capsys.readouterr().out
    assert "differ from the network's by" in printed
    assert "(N, 3, H, W), 33 pixels a side or more, as read" in printed
    assert (tmp_path / "net.pt2").exists()
    assert not (tmp_path / "out").exists()


@needs_export
@pytest.mark.parametrize(
    ("name", "words"), [("net.pt", ".pt2 or .onnx"), ("no/net.pt2", "no folder"), ("runs.pt2", "exists")]
)
def test_what_cannot_be_exported_is_refused(args, tmp_path, name, words):
    (tmp_path / "runs.pt2").write_bytes(b"mine")
    with pytest.raises(Fail, match=words):
        predict.main(args(export=str(tmp_path / name)))
    assert (tmp_path / "runs.pt2").read_bytes() == b"mine"


@needs_export
def test_onnx_is_compared_with_the_network_or_refused_with_the_packages_to_install(args, tmp_path, capsys):
    given = args(export=str(tmp_path / "net.onnx"))
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
        predict.main(given)
        assert (tmp_path / "net.onnx").stat().st_size > 1000
    else:
        with pytest.raises(Fail, match="pip install onnx"):
            predict.main(given)
        assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize("num_classes", [2, 256, 300])
def test_a_written_mask_reads_back_as_the_ids_of_the_network(tmp_path, num_classes):
    logits = torch.randn(1, num_classes, 24, 40)
    info = SimpleNamespace(palette=[[0, 0, 0]] * num_classes)
    ids = predicted_ids(logits)[0].numpy()
    work = predict.Work(Args(output=str(tmp_path)), info, None, None, None, [])
    predict.save(work, "a", ids, None, None)
    assert np.array_equal(np.array(Image.open(tmp_path / "masks" / "a.png")), logits.argmax(1)[0].numpy())


def test_a_large_picture_that_is_truncated_is_named(tmp_path):
    path = tmp_path / "cut.png"
    turned_picture(path, "RGB", 1)
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ValueError, match="cut.png"), LargeImage(path, 3) as picture:
        picture.rows(0, 10)
