"""Settings: rules from remarks, flags from fields, and messages that name the setting and the fix."""

import importlib
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields
from inspect import signature
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Literal

import pytest
import torch

import train
from config import Config, applying, broken_rules
from config import settings as edited
from losses import LOSSES
from models import MODELS
from predict import Args
from utils.cli import ALIASES, Fail, as_flag, end_with, help_text, make, near, parse, quoted, resumed_settings
from utils.optim import OPTIMIZERS, SCHEDULES

ROOT = Path(__file__).parent.parent


def parsed(*argv):
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
        (
            ["--class_colors", "(0, 0, 0)", "[1,2,3]", "1, 2, 3", "#FFFFFF"],
            "class_colors",
            ((0, 0, 0), (1, 2, 3), (1, 2, 3), (255, 255, 255)),
        ),
        (["--model", "fcn", "--backbone", "vgg11"], "backbone", "vgg11"),
        (["--model", "pspnet", "--output_stride", "16"], "output_stride", 16),
    ],
)
def test_a_flag_sets_its_field(argv, name, value):
    assert getattr(parsed(*argv), name) == value


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
        (["--image_size", "16"], ["image_size", "32 or more", "got 16 16"]),
        (["--no-epochs"], ["--no-epochs"]),
        (["--no-compile", "yes"], ["--no-compile", "no value"]),
        (["--learning_rate", "nan"], ["learning_rate", "a number"]),
        (["--learning_rate", "-1"], ["learning_rate"]),
        (["--poly_power", "0"], ["poly_power", "above 0", "got 0.0"]),
        (["--model", "fcn", "--backbone_lr_scale", "0"], ["backbone_lr_scale", "above 0", "got 0.0"]),
        (["--num_classes", "1"], ["num_classes", "2"]),
        (["--num_classes", "40000"], ["num_classes", "32768"]),
        (["--class_names", "a", "b"], ["class_names", "4 classes", "got 2"]),
        (["--class_names", "a", "a", "b", "c"], ["class_names", "differ"]),
        (["--ignore_index", "3"], ["ignore_index", "0 to 3", "got 3", "255"]),
        (["--num_classes", "300"], ["ignore_index", "0 to 299", "got 255", "65535"]),
        (["--backbone", "resnet50"], ["backbone belongs to model deeplabv3plus, pspnet, fcn", "unet"]),
        (["--model", "fcn", "--backbone", "resnet50"], ["backbone", "vgg16", "resnet50"]),
        (["--model", "segnet", "--separable"], ["separable", "deeplabv3plus"]),
        (["--model", "deeplabv3plus", "--output_stride", "32"], ["output_stride", "one of 8, 16", "32"]),
        (["--focal_gamma", "1"], ["focal_gamma belongs to loss or joint_ce focal", "Set joint_ce to focal"]),
        (
            ["--class_weights", "auto"],
            ["Set joint_ce to weighted_ce or focal", "leave class_weights at None"],
        ),
        (["--loss", "ce", "--class_weights", "auto"], ["with loss ce. Set loss to weighted_ce or focal"]),
        (["--optimizer", "adamw", "--momentum", "0.8"], ["momentum", "optimizer sgd, rmsprop"]),
        (["--scheduler", "cosine", "--poly_power", "2"], ["poly_power", "scheduler poly"]),
        (["--scheduler", "step", "--poly_power", "2"], ["poly_power", "poly"]),
        (["--accumulate", "3"], ["accumulate", "batch_size"]),
        (["--model", "fcn", "--freeze_backbone"], ["freeze_backbone", "pretrained"]),
        (["--scale", "2", "1"], ["scale"]),
        (["--scale", "0", "1"], ["each number of scale must be 0.1 to 10"]),
        (["--class_colors", "0,0,256", "1,1,1", "2,2,2", "3,3,3"], ["class_colors", "0 to 255"]),
        (["--lr", "0.1"], ["--lr", "Did you mean 'learning_rate'"]),
        (["--gpus", "2"], ["torchrun --nproc_per_node"]),
        (["--optimizer", "AdamW"], ["Did you mean 'adamw'"]),
        (["--config", "nowhere.json"], ["nowhere.json", "config.json"]),
    ],
)
def test_wrong_input_is_refused_with_the_setting_and_the_fix(argv, words):
    with pytest.raises(Fail) as caught:
        parsed(*argv)
    assert caught.value.code == 2
    for word in words:
        assert word in str(caught.value)


def test_every_field_has_a_remark_and_help_shows_it_with_its_default():
    text = help_text(Config, "usage")
    for field in fields(Config):
        assert len(Config.remarks()[field.name].text) > 10, field.name
        assert f"--{field.name}" in text
    assert "(default: unet)" in text
    assert "Augmentation" in text


@pytest.mark.parametrize("cls", [Config, Args])
def test_a_default_can_be_given_as_help_shows_it(cls):
    for field in fields(cls):
        shown = as_flag(field.default)
        words = shown.split() if isinstance(field.default, tuple) else [shown.replace('""', "")]
        found = parse(cls, [f"--{field.name}", *words], "usage").settings
        assert getattr(found, field.name) == getattr(cls(), field.name), field.name


def test_a_remark_goes_on_in_the_comment_below_its_field():
    remarks = {name: remark.text for name, remark in Config.remarks().items()}
    assert remarks["resize"].startswith("how an image is brought to image_size")
    assert remarks["resize"].endswith("cropped at its own scale")
    assert remarks["labels"].endswith("a map such as 0=0,255=1 or #000000=0,#ff0000=1")
    assert remarks["vflip"].startswith("[0 to 1] probability")


@edited
class Zoo:
    # Animal
    animal: Literal["cat", "dog", "newt"] = "cat"  # the animal
    fur: float | None = None  # [cat, dog; as hair; above 0 to below 1] its fur
    breed: str | None = None  # [cat: manx siam; dog: pug]
    legs: int = 4  # [0 or more] how many

    # Run (fast)
    speed: float = 1.0  # [-2 to 2.5]


def test_the_bracket_of_a_remark_holds_range_owners_values_and_keyword():
    fur, breed, speed = (Zoo.remarks()[name] for name in ("fur", "breed", "speed"))
    assert (fur.bounds, fur.owners, fur.keyword) == ("above 0 to below 1", {"cat": [], "dog": []}, "hair")
    assert (breed.bounds, breed.owners) == ("", {"cat": ["manx", "siam"], "dog": ["pug"]})
    assert (speed.bounds, speed.owners, speed.keyword, speed.heading) == (
        "-2 to 2.5",
        {},
        "speed",
        "Run (fast)",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fur": 0.0}, "fur must be above 0 to below 1; got 0.0"),
        ({"fur": 1.0}, "fur must be above 0 to below 1; got 1.0"),
        ({"legs": -1}, "legs must be 0 or more; got -1"),
        ({"speed": 2.6}, "speed must be -2 to 2.5; got 2.6"),
        (
            {"animal": "newt", "fur": 0.5},
            "fur belongs to animal cat, dog; got 0.5 with animal newt. "
            "Set animal to cat or dog, or leave fur at None",
        ),
        ({"animal": "dog", "breed": "manx"}, "breed of dog must be one of pug; got 'manx'"),
    ],
)
def test_a_setting_that_breaks_a_rule_is_named_with_the_fix(changes, words):
    assert [*broken_rules(Zoo())] == []
    assert [*broken_rules(Zoo(**changes))] == [words]


REGISTRIES = {"model": MODELS, "loss": LOSSES, "optimizer": OPTIMIZERS, "scheduler": SCHEDULES}
CHOICES = [(field, name) for field, registry in REGISTRIES.items() for name in registry]
RECIPE = {
    "base_channels",
    "aux_weight",
}  # whose defaults train the first run fast, and differ from the papers'


def chosen(field, name):
    focal = {"joint_ce": "focal"} if name == "joint" else {}
    return Config(**{field: name}, **focal)


@pytest.mark.parametrize("field", REGISTRIES)
def test_a_choice_offers_what_its_package_has(field):
    assert {*Config.remarks()[field].choices} == {*REGISTRIES[field]}


def test_every_owner_in_a_bracket_is_a_choice():
    choices = {choice for remark in Config.remarks().values() for choice in remark.choices}
    for name, remark in Config.remarks().items():
        assert {*remark.owners} <= choices, f"the bracket of {name}: {remark.owners}"


@pytest.mark.parametrize(("field", "name"), CHOICES)
def test_a_class_is_given_its_settings_and_none_of_anothers(field, name):
    section = Config.remarks()[field].heading
    settings = {n: r for n, r in Config.remarks().items() if r.heading == section}
    keywords = {"aux" if n == "aux_weight" else r.keyword: n for n, r in settings.items()}
    parameters = signature(REGISTRIES[field][name]).parameters.values()
    taken = {p.name: p.default for p in parameters}
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)  # as joint, to its pixel loss
    for keyword, setting in keywords.items():
        owned = setting in applying(chosen(field, name)) and Config.remarks()[setting].owners
        words = f"the bracket of {setting} names {name}, which has none"
        assert keyword in taken or passes_on or not owned, words
        if keyword in taken:
            assert setting in applying(chosen(field, name)), f"the bracket of {setting} lacks {name}"
            assert (
                setting in RECIPE
                or None in (default := {getattr(Config, setting), taken[keyword]})
                or (len(default) == 1)
            ), f"two defaults of {setting}: {default}"


def test_the_values_that_a_bracket_lists_are_those_that_the_class_takes():
    for remark in Config.remarks().values():
        for owner, values in remark.owners.items():
            for value in {v for listed in remark.owners.values() for v in listed if values}:
                with torch.device("meta"), nullcontext() if value in values else pytest.raises(ValueError):
                    MODELS[owner](2, **{remark.keyword: value})


def test_the_options_of_what_is_chosen_are_those_that_apply_under_the_names_of_its_class():
    config = Config(
        model="fcn", loss="focal", optimizer="sgd", scheduler="cosine", backbone="vgg11", rotate=5
    )
    assert config.model_options == {"variant": "8s", "backbone": "vgg11"}
    assert config.loss_options == {"focal_gamma": 2.0}
    assert config.optimizer_options == {"weight_decay": 1e-4, "backbone_lr_scale": 1.0, "momentum": 0.9}
    assert config.schedule_options == {}
    assert config.augmentation_options["rotate"] == 5
    assert Config(model="pspnet").model_options == {"aux": True}
    assert Config(model="pspnet", aux_weight=0).model_options == {"aux": False}


def test_a_model_or_loss_that_config_knows_by_name_alone_has_no_options():
    named = Config(model="new", loss="new")
    assert (named.model_options, named.loss_options) == ({}, {})


def test_weights_of_classes_are_those_in_use():
    assert Config().weighting is None
    assert Config(joint_ce="weighted_ce").weighting == "auto"
    assert Config(loss="focal", class_weights=(1, 2, 3, 4)).weighting == (1, 2, 3, 4)


def test_class_weights_edited_into_the_file_do_not_bind_a_loss_without_them():
    @dataclass(frozen=True)
    class Edited(Config):
        class_weights: str = "auto"

    assert Edited(loss="ce").weighting is None


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "field", ["in_channels", "hflip", "learning_rate", "weight_decay", "poly_power", "seed"]
)
def test_a_field_that_was_renamed_by_mistake_is_named(settings, tmp_path, monkeypatch, capsys, field):
    source = (ROOT / "config.py").read_text(encoding="utf-8")
    (tmp_path / "renamed.py").write_text(
        source.replace(f"\n    {field}:", f"\n    {field}s:"), encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "renamed", raising=False)
    renamed = importlib.import_module("renamed").Config
    small = {name: value for name, value in settings(epochs=1).saved.items() if name != field}
    with pytest.raises(SystemExit) as caught:
        end_with(lambda: train.main(make(renamed, small)))
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.startswith("error: ") and field in message and message.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp936"])
def test_a_terminal_of_any_encoding_shows_any_text(monkeypatch, encoding):
    streams = [TextIOWrapper(BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def fails():
        print("ž水 Вода")
        raise Fail("ž水 Вода")

    with pytest.raises(SystemExit):
        end_with(fails)
    for stream, start in zip(streams, ("", "error: "), strict=True):
        stream.flush()
        shown = stream.buffer.getvalue().decode(encoding)
        assert shown.startswith(start) and ("Вода" in shown or r"\u0412\u043e" in shown)


@pytest.mark.parametrize(
    ("word", "setting"),
    [
        ("lr", "learning_rate"),
        ("bs", "batch_size"),
        ("num_epochs", "epochs"),
        ("img_size", "image_size"),
        ("data", "data_root"),
        ("dataset", "data_root"),
        ("arch", "model"),
        ("epoch", "epochs"),
        ("zzz", ""),
    ],
)
def test_names_of_other_projects_lead_to_the_setting(word, setting):
    assert near(word, [field.name for field in fields(Config)]) == (
        f" Did you mean {setting!r}?" if setting else ""
    )


def test_every_alias_belongs_to_a_setting_or_a_choice():
    choices = {str(choice) for remark in Config.remarks().values() for choice in remark.choices}
    settings = {field.name for cls in (Config, Args) for field in fields(cls)}
    assert {*ALIASES} <= choices | settings


def test_the_names_and_colours_of_mock_data_are_left_out_with_another_number_of_classes():
    found = parsed("--num_classes", "11", "--ignore_index", "11")
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_file_is_read_and_flags_override_it(tmp_path, encoding):
    path = tmp_path / "config.json"
    content = {"epochs": 7, "image_size": [64, 96], "why": "a test", "versions": {"x": "1"}}
    path.write_text(json.dumps(content), encoding=encoding)
    found = parsed("--config", str(path), "--epochs", "8")
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
        parsed("--config", str(path))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "recipes").glob("*.json")), ids=lambda path: path.stem
)
def test_a_recipe_is_understood_and_says_why(path):
    assert len(json.loads(path.read_text(encoding="utf-8"))["why"]) > 20
    parsed("--config", str(path))


def test_saved_settings_come_back_equal(tmp_path):
    path = tmp_path / "config.json"
    written = Config(loss="focal", class_weights=(1.0, 2.0, 3.0, 4.0), image_size=96, num_workers=2)
    path.write_text(json.dumps(written.saved))
    assert parsed("--config", str(path)) == written


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


def test_a_list_in_an_edited_file_becomes_a_tuple():
    @edited
    class Edited:
        image_size: tuple[int, int] | int = [256, 192]
        class_colors: tuple[tuple[int, int, int], ...] | None = [[0, 0, 0], [255, 0, 0]]

    found = make(Edited, {})
    assert found.image_size == (256, 192) and found.class_colors == ((0, 0, 0), (255, 0, 0))


def test_a_value_with_a_stray_comma_is_shown_with_it(monkeypatch):
    monkeypatch.setattr(Config, "batch_size", (4,))
    with pytest.raises(Fail, match=r"batch_size must be a whole number; got '\(4,\)'"):
        parsed()


def test_a_path_with_a_space_is_quoted_in_a_command():
    assert quoted(Path("runs/mine")) == str(Path("runs/mine"))
    assert quoted(Path("a run")) == '"a run"'


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert parsed("--output_dir=~/runs").output_dir == "/home/me/runs"
    assert Config(cache_dir="~/cache").cache_folder == Path("/home/me/cache")


def test_resuming_keeps_the_settings_of_the_run_and_refuses_a_contradiction(capsys):
    run = Config(epochs=5, scheduler="none", batch_size=4, seed=7).saved
    today = Config(resume="runs/x", batch_size=8)
    assert resumed_settings(today, run, {"num_workers": 2}, ("num_workers",)).batch_size == 4
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("differ from config.py: scheduler none, epochs 5, batch_size 4, seed 7")
    with pytest.raises(Fail, match="batch_size 8 contradicts.* has 4"):
        resumed_settings(today, run, {"batch_size": 8}, ())


def test_a_resumed_run_is_given_more_epochs_where_they_are_free():
    run, today = Config(epochs=5, scheduler="none").saved, Config(resume="runs/x")
    assert resumed_settings(today, run, {"epochs": 9}, ("epochs",)).epochs == 9
    with pytest.raises(Fail, match="epochs 4 contradicts the run to resume, which has 5. Leave"):
        resumed_settings(today, run, {"epochs": 4}, ("epochs",))
    with pytest.raises(Fail, match="epochs 9 contradicts.*, and whose none schedule ends with them"):
        resumed_settings(today, run, {"epochs": 9}, ())


def test_a_run_that_began_from_other_weights_can_be_resumed():
    run = Config(model="segnet", init_from="old/best.pt", freeze_backbone=True)
    found = resumed_settings(Config(resume="runs/x"), run.saved, {"resume": "runs/x"}, ())
    assert found == run


def test_resuming_with_the_size_of_the_run_as_one_number_is_no_contradiction():
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
def test_a_folder_or_file_that_a_setting_names_must_exist(named):
    Config(**{name: value for name, value in named.items() if name == "model"}).refuse_missing()
    with pytest.raises(FileNotFoundError, match=r"(nowhere|README.md|mock_data)\. Give"):
        Config(**named).refuse_missing()


@pytest.mark.parametrize("script", ["train.py", "predict.py"])
def test_help_and_a_wrong_flag_are_answered_before_torch_is_imported(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, sys.argv[1]]\n"
        "try:\n"
        f"    runpy.run_path({script!r}, run_name='__main__')\n"
        "finally:\n"
        "    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    missing = ("--data_root=nowhere", 2) if script == "train.py" else ("--window=1", 2)
    for flag, status in (("--help", 0), ("--nonsense", 2), missing):
        done = subprocess.run([sys.executable, "-c", code, flag], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status
        assert done.stderr.splitlines()[-1] == "False"
        assert "Traceback" not in done.stderr
