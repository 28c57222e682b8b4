"""Settings: flags from the dataclass, and errors that name the culprit and the remedy."""

import json
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from config import Config
from config import settings as edited
from utils.cli import Fail, field_remarks, help_text, make, parse, quoted, resumed_settings

ROOT = Path(__file__).parent.parent


def settings(*argv):
    return parse(Config, list(argv), "usage").settings


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--epochs", "3"], "epochs", 3),
        (["--epochs=3"], "epochs", 3),
        (["--learning-rate", "1e-3"], "learning_rate", 0.001),
        (["--image_size", "64", "96"], "image_size", (64, 96)),
        (["--image-size", "64"], "image_size", (64, 64)),
        (["--compile"], "compile", True),
        (["--no-channels_last"], "channels_last", False),
        (["--no-channels-last"], "channels_last", False),
        (["--channels_last", "false"], "channels_last", False),
        (["--num_workers", "none"], "num_workers", None),
        (["--class_names", "a", "b", "c", "d"], "class_names", ("a", "b", "c", "d")),
        (["--class_names", "none"], "class_names", None),
        (["--ignore_index", "-1"], "ignore_index", -1),
        (["--loss", "weighted_ce", "--class_weights", "auto"], "class_weights", "auto"),
        (["--loss", "focal", "--class_weights", "1", "2", "3", "4"], "class_weights", (1.0, 2.0, 3.0, 4.0)),
        (
            ["--class_colors", "0,0,0", "#ff0000", "1,2,3", "9,9,9"],
            "class_colors",
            ((0, 0, 0), (255, 0, 0), (1, 2, 3), (9, 9, 9)),
        ),
        (["--model", "fcn", "--backbone", "vgg11"], "backbone", "vgg11"),
        (["--model", "pspnet", "--output_stride", "16"], "output_stride", 16),
    ],
)
def test_a_flag_sets_its_field(argv, name, value):
    assert getattr(settings(*argv), name) == value


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--modle", "unet"], ["--modle", "'model'"]),
        (["--model", "unett"], ["unet, deeplabv3plus", "'unett'", "Did you mean 'unet'"]),
        (["--epoch", "3"], ["--epoch", "'epochs'"]),  # no abbreviations
        (["--epochs", "many"], ["epochs", "a whole number", "'many'"]),
        (["--epochs", "0"], ["epochs", "1 or more", "0"]),
        (["--epochs"], ["epochs", "needs a value"]),
        (["--epochs", "3", "--epochs", "4"], ["epochs", "twice"]),
        (["epochs=3"], ["'epochs=3'", "--name value"]),
        (["--image_size", "1", "2", "3"], ["image_size", "two whole numbers"]),
        (["--image_size", "16"], ["image_size", "32 pixels"]),
        (["--no-epochs"], ["--no-epochs"]),
        (["--no-compile", "yes"], ["--no-compile", "no value"]),
        (["--learning_rate", "nan"], ["learning_rate", "a number"]),
        (["--learning_rate", "-1"], ["learning_rate"]),
        (["--poly_power", "0"], ["poly_power", "or more", "got 0.0"]),
        (["--model", "fcn", "--backbone_lr_scale", "0"], ["backbone_lr_scale", "or more", "got 0.0"]),
        (["--num_classes", "1"], ["num_classes", "2"]),
        (["--num_classes", "40000"], ["num_classes", "32768"]),
        (["--class_names", "a", "b"], ["class_names", "4 classes", "got 2"]),
        (["--class_names", "a", "a", "b", "c"], ["class_names", "differ"]),
        (["--ignore_index", "3"], ["ignore_index", "0 to 3", "got 3"]),
        (["--backbone", "resnet50"], ["backbone", "deeplabv3plus", "unet"]),
        (["--model", "fcn", "--backbone", "resnet50"], ["backbone", "vgg16", "resnet50"]),
        (["--model", "segnet", "--separable"], ["separable", "deeplabv3plus"]),
        (["--model", "deeplabv3plus", "--output_stride", "32"], ["output_stride", "8 or 16"]),
        (["--focal_gamma", "1"], ["focal_gamma", "focal"]),
        (["--scheduler", "step", "--poly_power", "2"], ["poly_power", "poly"]),
        (["--accumulate", "3"], ["accumulate", "batch_size"]),
        (["--model", "fcn", "--freeze_backbone"], ["freeze_backbone", "pretrained"]),
        (["--scale", "2", "1"], ["scale"]),
        (["--config", "nowhere.json"], ["nowhere.json", "config.json"]),
    ],
)
def test_wrong_input_is_refused_with_culprit_and_remedy(argv, words):
    with pytest.raises(Fail) as caught:
        settings(*argv)
    assert caught.value.code == 2
    for word in words:
        assert word in str(caught.value)


def test_every_field_has_a_remark_and_help_shows_it_with_its_default():
    remarks, text = field_remarks(Config), help_text(Config, "usage")
    for field in fields(Config):
        assert len(remarks[field.name][1]) > 10, field.name
        assert f"--{field.name}" in text
    assert "(default: unet)" in text
    assert "Augmentation" in text


def test_a_remark_goes_on_in_the_comment_below_its_field():
    remarks = field_remarks(Config)
    assert remarks["resize"][1].startswith("how a picture comes to image_size")
    assert remarks["resize"][1].endswith("cut in windows at its scale")
    assert remarks["labels"][1].endswith("or #000000=0,#ff0000=1")
    assert field_remarks(Config)["vflip"][1].startswith("probability")


def test_a_remark_keeps_the_sign_of_a_colour():
    assert "0=0,255=1 or #000000=0,#ff0000=1" in field_remarks(Config)["labels"][1]


def test_a_model_or_loss_that_config_knows_by_name_alone_has_no_options():
    named = Config(model="new", loss="new")
    assert (named.model_options, named.loss_options) == ({}, {})


def test_the_names_and_colours_of_mock_data_are_left_out_with_another_number_of_classes():
    found = settings("--num_classes", "11", "--ignore_index", "11")
    assert (found.class_names, found.class_colors) == (None, None)
    assert found.names[10] == "class_10"


def test_edited_defaults_are_checked_by_type_as_flags_are():
    @dataclass(frozen=True)
    class Edited:
        epochs: int = "ten"  # number of epochs

    with pytest.raises(Fail, match="epochs must be a whole number; got 'ten'"):
        parse(Edited, [], "usage")


def test_a_backbone_edited_into_the_file_does_not_bind_a_model_without_one():
    @dataclass(frozen=True)
    class Edited(Config):
        model: str = "pspnet"  # as in a config.py that a user has edited
        backbone: str | None = "resnet18"

    assert parse(Edited, [], "usage").settings.model_options["backbone"] == "resnet18"
    assert "backbone" not in parse(Edited, ["--model", "unet"], "usage").settings.model_options
    with pytest.raises(Fail, match="backbone of fcn must be one of vgg11.*got 'resnet18'"):
        parse(Edited, ["--model", "fcn"], "usage")


def test_config_file_is_read_and_flags_override_it(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"epochs": 7, "image_size": [64, 96], "why": "a test", "versions": {"x": "1"}})
    )
    found = settings("--config", str(path), "--epochs", "8")
    assert (found.epochs, found.image_size) == (8, (64, 96))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "JSON"),
        ("[1]", "object"),
        ('{"epoch": 3}', "'epochs'"),
        ('{"epochs": "x"}', "epochs"),
        ('{"learning_rate": 1' + 400 * "0" + "}", "learning_rate must be a number"),
    ],
)
def test_a_wrong_config_file_is_refused(tmp_path, text, word):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(Fail, match=word):
        settings("--config", str(path))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "recipes").glob("*.json")), ids=lambda path: path.stem
)
def test_a_recipe_is_understood_and_says_why(path):
    assert len(json.loads(path.read_text(encoding="utf-8"))["why"]) > 20
    settings("--config", str(path))


def test_saved_settings_come_back_equal(tmp_path):
    path = tmp_path / "config.json"
    written = Config(loss="focal", class_weights=(1.0, 2.0, 3.0, 4.0), image_size=96, num_workers=2)
    path.write_text(json.dumps(written.saved))
    assert settings("--config", str(path)) == written


def test_saved_settings_are_understood_when_the_defaults_have_been_edited(monkeypatch):
    runs = [Config(), Config(model="pspnet", loss="ce", scheduler="none", num_classes=3)]
    saved = [run.saved for run in runs]
    edited = {
        "model": "fcn",
        "backbone": "vgg11_bn",
        "base_channels": 64,
        "poly_power": 2.0,
        "joint_ce": "focal",
    }
    for name, value in {**edited, "run_name": "x", "resume": "auto", "init_from": "old.pt"}.items():
        monkeypatch.setattr(Config, name, value)
    for run, values in zip(runs, saved, strict=True):
        found = make(Config, values)
        assert (found.model, found.model_options) == (run.model, run.model_options)
        assert (found.loss, found.loss_options, found.scheduler) == (
            run.loss,
            run.loss_options,
            run.scheduler,
        )
        assert (found.run_name, found.resume, found.init_from) == (None, None, None)


def test_a_list_in_the_edited_file_is_taken_for_a_tuple():
    @edited
    class Edited:
        image_size: tuple[int, int] | int = [256, 192]
        class_colors: tuple[tuple[int, int, int], ...] | None = [[0, 0, 0], [255, 0, 0]]

    found = make(Edited, {})
    assert found.image_size == (256, 192) and found.class_colors == ((0, 0, 0), (255, 0, 0))


def test_a_value_with_a_stray_comma_is_shown_with_it(monkeypatch):
    monkeypatch.setattr(Config, "batch_size", (4,))
    with pytest.raises(Fail, match=r"batch_size must be a whole number; got '\(4,\)'"):
        settings()


def test_a_path_with_a_space_is_quoted_where_a_command_is_told():
    assert quoted(Path("runs/mine")) == str(Path("runs/mine"))
    assert quoted(Path("a run")) == '"a run"'


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert settings("--output_dir=~/runs").output_dir == "/home/me/runs"
    assert Config(cache_dir="~/cache").cache_folder == Path("/home/me/cache")


def test_resuming_keeps_the_runs_settings_and_refuses_a_contradiction():
    run = Config(epochs=5, scheduler="none", batch_size=4).saved
    today = Config(resume="runs/x", batch_size=8)
    assert resumed_settings(today, run, {"num_workers": 2}, ("num_workers",)).batch_size == 4
    assert resumed_settings(today, run, {"epochs": 9}, ()).epochs == 9
    with pytest.raises(Fail, match="batch_size 8 contradicts.* has 4"):
        resumed_settings(today, run, {"batch_size": 8}, ())
    with pytest.raises(Fail, match="epochs"):
        resumed_settings(today, Config(epochs=5).saved, {"epochs": 9}, ())


def test_a_run_that_began_from_other_weights_can_be_resumed():
    run = Config(model="segnet", init_from="old/best.pt", freeze_backbone=True)
    found = resumed_settings(Config(resume="runs/x"), run.saved, {"resume": "runs/x"}, ())
    assert found == run


def test_resuming_with_the_runs_own_size_as_one_number_is_no_contradiction():
    run, given = Config(image_size=64).saved, {"image_size": 64}
    assert resumed_settings(Config(resume="runs/x", **given), run, given, ()).image_size == (64, 64)


@pytest.mark.parametrize(
    "named",
    [
        {"data_root": "nowhere"},
        {"data_root": "README.md"},
        {"init_from": "mock_data"},
        {"resume": "nowhere"},
        {"init_from": "nowhere"},
        {"model": "fcn", "pretrained": "nowhere"},
    ],
    ids=lambda named: [*named][-1],
)
def test_what_a_setting_names_and_is_not_there_is_refused(named):
    Config(**{name: value for name, value in named.items() if name == "model"}).refuse_missing()
    with pytest.raises(FileNotFoundError, match=r"(nowhere|README.md|mock_data)\. Give"):
        Config(**named).refuse_missing()


@pytest.mark.parametrize("door", ["train.py", "predict.py"])
def test_help_and_a_wrong_flag_are_answered_before_torch_is_imported(door):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{door!r}, sys.argv[1]]\n"
        "try:\n"
        f"    runpy.run_path({door!r}, run_name='__main__')\n"
        "finally:\n"
        "    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    missing = ("--data_root=nowhere", 2) if door == "train.py" else ("--window=1", 2)
    for flag, status in (("--help", 0), ("--nonsense", 2), missing):
        done = subprocess.run([sys.executable, "-c", code, flag], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status
        assert done.stderr.splitlines()[-1] == "False"
        assert "Traceback" not in done.stderr
