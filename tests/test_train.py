"""train.py whole: a run's files, resuming, what stops it, and what it refuses."""

import csv
import io
import json
import os
import shutil
import signal
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import doors
import numpy as np
import pytest
import torch
from conftest import without_drawing
from PIL import Image

import train
from models import load_model, read_checkpoint
from utils import visualize
from utils.cli import Fail


def log_rows(folder):
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def weights(folder, name="last.pt"):
    return read_checkpoint(folder / name)["model"]


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


BLANK = Image.new("RGB", (1, 1))


def stop_after(monkeypatch, steps):
    """Let the run of `train.main` receive a signal during its step of this number."""
    original, count = train.train_step, [0]

    def step(run, *args):
        count[0] += 1
        if count[0] == steps:
            run.stop.number = signal.SIGTERM
        return original(run, *args)

    monkeypatch.setattr(train, "train_step", step)


@pytest.fixture(scope="module")
def finished(kept_settings):
    """A run that no test changes: its settings, its folder, and what it printed."""
    config = kept_settings(run_name="finished", class_names=("ground", "square"))
    with redirect_stdout(io.StringIO()) as printed:
        folder = train.main(config)
    return config, folder, printed.getvalue()


def test_a_run_leaves_the_files_that_it_promises(finished):
    _, folder, printed = finished
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "log.csv", "curves.png", "report.png", "last.pt", "best.pt", "samples")
    }
    assert {path.name for path in (folder / "samples").iterdir()} >= {"augmented.png", "epoch_002.png"}
    rows = log_rows(folder)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 <= float(row["mean_iou"]) <= 1 and float(row["train_loss"]) > 0 for row in rows)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert saved["base_channels"] == 4
    assert "torch" in saved["versions"]
    for words in ("Epoch 1/2", "Epoch 2/2", "mean IoU", "square", "report.png"):
        assert words in printed


def test_a_model_is_loaded_from_a_run_with_all_that_prediction_needs(finished):
    _, folder, _ = finished
    model = load_model(folder / "best.pt")
    assert not model.training
    assert model.info.class_names == ["ground", "square"]
    assert (model.info.image_size, model.info.resize, model.info.ignore_index) == ([32, 32], "stretch", 255)
    assert len(model.info.mean) == len(model.info.std) == 3
    assert len(model.info.palette) == 2
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 40, 56)).shape == (1, 2, 40, 56)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "deeplabv3plus", "backbone": "resnet18", "base_channels": 16, "epochs": 1},
        {"model": "pspnet", "backbone": "resnet18", "base_channels": 16, "epochs": 1},
        {"model": "segnet"},
        {"loss": "weighted_ce"},
        {"loss": "focal", "optimizer": "sgd", "scheduler": "step", "step_size": 1},
        {"loss": "dice", "optimizer": "rmsprop", "learning_rate": 1e-4, "scheduler": "plateau"},
        {"joint_ce": "focal", "scheduler": "none", "clip_grad": 1.0, "ema_decay": 0.9},
        {"resize": "letterbox", "rotate": 10.0, "vflip": 0.5, "accumulate": 2},
        {"resize": "crop", "in_channels": 1, "num_workers": 1, "cache": "off"},
        {"amp": "bf16", "channels_last": False, "val_every": 2, "deterministic": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
@pytest.mark.usefixtures("undrawn")
def test_every_choice_trains(settings, changes):
    config = settings(**changes)
    try:
        rows = log_rows(train.main(config))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(rows) == config.epochs
    assert 0 <= float(rows[-1]["mean_iou"]) <= 1


@pytest.mark.usefixtures("undrawn")
def test_the_score_rises_on_squares_that_can_be_learned(settings):
    folder = train.main(settings(epochs=12, learning_rate=0.01, base_channels=8, scale=(1.0, 1.0)))
    best = max(float(row["mean_iou"]) for row in log_rows(folder))
    assert best > 0.8
    assert best > float(log_rows(folder)[0]["mean_iou"]) + 0.1


@pytest.fixture(
    scope="module",
    params=[
        {"dropout": 0.3, "ema_decay": 0.9, "accumulate": 2},
        {"optimizer": "sgd", "scheduler": "plateau", "plateau_patience": 0, "rotate": 20.0},
        {"optimizer": "rmsprop", "scheduler": "step", "step_size": 1, "learning_rate": 1e-4},
    ],
    ids=["adam-poly-ema-dropout", "sgd-plateau", "rmsprop-step"],
)
def whole(request, kept_settings):
    """Settings, and the folder of a run with them that was not stopped."""
    with without_drawing():
        return request.param, train.main(kept_settings(run_name=None, **request.param))


@pytest.mark.parametrize(
    "steps", [1, 3, 4]
)  # of three an epoch: within the first, at its end, within the second
@pytest.mark.usefixtures("undrawn")
def test_a_stopped_and_resumed_run_ends_as_if_it_had_not_stopped(settings, monkeypatch, whole, steps):
    changes, whole = whole
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Fail) as stopped:
            train.main(settings(run_name="broken", **changes))
    assert stopped.value.code == 128 + signal.SIGTERM
    broken = train.main(settings(resume=str(Path(settings().output_dir) / "broken")))
    assert_equal_weights(weights(whole), weights(broken))
    assert_equal_weights(weights(whole, "best.pt"), weights(broken, "best.pt"))
    timeless = [{k: v for k, v in row.items() if k != "images_per_second"} for row in log_rows(whole)]
    assert timeless == [
        {k: v for k, v in row.items() if k != "images_per_second"} for row in log_rows(broken)
    ]


@pytest.mark.parametrize("stopped", [False, True])
def test_the_report_is_of_the_best_epoch_which_is_scored_anew_after_a_resume_alone(
    settings, monkeypatch, stopped
):
    evaluate, found, drawn = train.evaluate, [], []

    def best_at_first(run, weights):
        evaluation = evaluate(run, weights)
        if len(found) == 1:  # the second epoch's
            evaluation = replace(evaluation, scores=replace(evaluation.scores, mean_iou=0.0))
        found.append(evaluation)
        return evaluation

    monkeypatch.setattr(train, "evaluate", best_at_first)
    monkeypatch.setattr(visualize, "draw_curves", lambda *_: BLANK)
    monkeypatch.setattr(visualize, "draw_report", lambda *parts: drawn.append(parts) or BLANK)
    if stopped:
        with monkeypatch.context() as patch:
            stop_after(patch, 4)
            with pytest.raises(Fail):
                train.main(settings())
    train.main(settings(resume=str(Path(settings().output_dir) / "run")) if stopped else settings())
    assert len(found) == (3 if stopped else 2)
    ((_, _, _, scores, counts, *_),) = drawn
    assert scores.mean_iou == found[0].scores.mean_iou and (counts == found[0].counts.numpy()).all()


@pytest.mark.usefixtures("undrawn")
def test_resume_auto_takes_the_newest_unfinished_run(settings, monkeypatch, capsys, finished):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Fail):
            train.main(settings(run_name="unfinished"))
    newer = shutil.copytree(finished[1], Path(settings().output_dir) / "finished")
    (newer / "last.pt").touch()
    assert train.main(settings(resume="auto", batch_size=3)).name == "unfinished"
    assert "batch_size stays 2" in capsys.readouterr().out
    with pytest.raises(Fail, match="no unfinished run"):
        train.main(settings(resume="auto"))


@pytest.mark.usefixtures("undrawn")
def test_resuming_refuses_a_finished_run_a_contradiction_and_changed_data(settings, monkeypatch, data):
    folder = train.main(settings())
    with pytest.raises(Fail, match="finished after 2 epochs"):
        train.main(settings(resume=str(folder)))
    (folder / "report.png").unlink()
    with pytest.raises(Fail, match="learning_rate 0.5 contradicts"):
        train.main(settings(resume=str(folder)), {"learning_rate": 0.5})
    (data / "train" / "images" / "p0.png").unlink()
    (data / "train" / "masks" / "p0.png").unlink()
    with pytest.raises(Fail, match="has changed.*: training"):
        train.main(settings(resume=str(folder)))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_process_with_its_code_and_a_checkpoint(settings, data, tmp_path, number, code):
    flags = f"--data_root {data} --output_dir {tmp_path}/runs --run_name run --num_classes 2 --image_size 32"
    words = ["train.py", *flags.split(), "--epochs", "10000", "--base_channels", "4"]
    process, printed = doors.start(words, doors.ROOT, tmp_path / "log"), tmp_path / "log.out"
    try:
        while not (printed.exists() and "Epoch 2/" in printed.read_text()):
            assert process.is_alive()
            time.sleep(0.01)
        os.kill(process.pid, number)
        process.join(60)
    finally:
        process.kill()
    errors = (tmp_path / "log.err").read_text()
    assert process.exitcode == code
    assert "Traceback" not in errors
    assert "--resume" in errors
    assert read_checkpoint(tmp_path / "runs" / "run" / "last.pt")["kind"] == "last"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(settings):
    folder = Path(settings().output_dir) / "run"
    with pytest.raises(Fail) as caught:
        train.main(settings(learning_rate=1e30, optimizer="sgd", warmup_steps=0, amp="off"))
    assert caught.value.code == 1
    for words in ("not finite", "epoch 1, step", "learning rate", "p", ".png", "clip_grad"):
        assert words in str(caught.value)
    assert not (folder / "last.pt").exists()


@pytest.mark.usefixtures("undrawn")
def test_early_stopping_ends_the_run_with_a_report(settings, capsys):
    folder = train.main(settings(epochs=50, early_stop=2, learning_rate=1e-9, warmup_steps=0))
    assert len(log_rows(folder)) < 50
    assert (folder / "report.png").exists()
    assert "stopped early" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_weights_of_another_run_are_taken_over_where_they_fit(settings, capsys, finished):
    train.main(settings(init_from=str(finished[1] / "best.pt"), num_classes=3))
    printed = capsys.readouterr().out
    assert "2 skipped" in printed
    assert "(2, 4, 1, 1) there, (3, 4, 1, 1) here" in printed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "pspnet", "backbone": "resnet18", "base_channels": 16}, "none of its weights fits pspnet"),
        ({"model": "segnet", "base_channels": 4, "freeze_backbone": True}, "backbone.* is not in it"),
    ],
)
def test_weights_that_do_not_fit_at_all_are_refused(settings, finished, monkeypatch, changes, words):
    checkpoint = finished[1] / "best.pt"
    if "freeze_backbone" in changes:  # of which something else than the backbone fits
        content = read_checkpoint(checkpoint)
        content["model"] = {"decoder1.0.bias": torch.zeros(4)}
        monkeypatch.setattr(train, "read_checkpoint", lambda _: content)
    with pytest.raises(Fail, match=words):
        train.main(settings(init_from=str(checkpoint), **changes))
    assert not Path(settings().output_dir, "run").exists()


@pytest.mark.usefixtures("undrawn")
def test_one_run_name_is_one_run(settings, finished):
    with pytest.raises(Fail, match="'finished' exists"):  # said before the data is looked at
        train.main(replace(finished[0], data_root="nowhere"))
    with pytest.raises(ValueError, match="plain folder name; got 'a/b'"):
        settings(run_name="a/b")
    first = train.main(settings(epochs=1, run_name=None))
    assert first.name.startswith("unet_")


def test_check_stops_after_the_data_check_and_writes_no_run(settings, capsys):
    train.main(settings(check=True))
    assert "train: 6 images" in capsys.readouterr().out
    assert not (Path(settings().output_dir) / "run").exists()


def remove_val(data):
    shutil.rmtree(data / "val")


def empty_train(data):
    for path in (data / "train").rglob("*.png"):
        path.unlink()


def unpair(data):
    (data / "train" / "masks" / "p3.png").unlink()


def wrong_value(data):
    path = data / "train" / "masks" / "p2.png"
    mask = np.array(Image.open(path))
    mask[5, 5] = 7
    Image.fromarray(mask).save(path)


def truncate(data):
    path = data / "train" / "images" / "p1.png"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_val, ["val", "images", "masks"]),
        (empty_train, ["train", "holds no image"]),
        (unpair, ["p3.png", "mask"]),
        (wrong_value, ["p2.png", "7"]),
        (truncate, ["p1.png"]),
    ],
)
def test_wrong_data_is_refused_before_anything_is_written(settings, data, damage, words):
    damage(data)
    with pytest.raises(Fail) as caught:
        train.main(settings())
    assert caught.value.code == 2
    for word in words:
        assert word in str(caught.value)
    assert not Path(settings().output_dir).exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_root": "no/such/folder"}, ["no/such/folder"]),
        ({"device": "cuda:77"}, ["cuda:77", "auto"]),
        ({"device": "gpu"}, ["'gpu'", "auto"]),
        ({"amp": "fp16", "device": "cpu"}, ["fp16", "bf16"]),
        ({"resume": "no/run"}, ["no/run", "last.pt"]),
        ({"init_from": "no/best.pt"}, ["no/best.pt"]),
        (
            {"model": "pspnet", "backbone": "resnet18", "base_channels": 16, "pretrained": "no/w.pth"},
            ["no/w.pth"],
        ),
        ({"labels": "1=2=3"}, ["labels"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_refused_before_anything_is_written(settings, changes, words):
    with pytest.raises(Fail) as caught:
        train.main(settings(**changes))
    assert caught.value.code == 2
    for word in words:
        assert word in str(caught.value)
    assert not Path(settings().output_dir).exists()


def test_an_output_folder_that_is_a_file_is_refused(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Fail, match="file"):
        train.main(settings(output_dir=str(tmp_path / "file" / "runs")))


def test_two_runs_that_start_in_one_second_have_two_folders(tmp_path):
    from utils.run import create_run

    made = {create_run(tmp_path, None, "unet") for _ in range(5)}
    assert len(made) == 5
    create_run(tmp_path, "mine", "unet")
    with pytest.raises(ValueError, match="'mine' exists in .* Give another, or none$"):
        create_run(tmp_path, "mine", "unet")


def test_the_rates_in_the_log_lie_on_the_plan_that_is_drawn(finished, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        train.visualize, "draw_curves", lambda rows, plan: drawn.append((rows, plan)) or BLANK
    )
    train.main(replace(finished[0], run_name=None))
    rows, plan = drawn[-1]
    assert len(plan) == 2 * 3
    for row in rows:
        assert dict(plan)[row["epoch"]] == row["learning_rate"]


def test_more_epochs_on_resume_go_on_with_the_warm_up_that_the_run_began_with(settings, monkeypatch):
    drawn = []
    monkeypatch.setattr(visualize, "draw_curves", lambda *_: BLANK)
    monkeypatch.setattr(visualize, "draw_report", lambda _, plan, *__: drawn.append(plan) or BLANK)
    begun = settings(scheduler="plateau", warmup_steps=100, epochs=2, plateau_patience=0)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Fail):
            train.main(begun)
    more = {"resume": str(Path(begun.output_dir) / "run"), "epochs": 4}
    rates = [float(row["learning_rate"]) for row in log_rows(train.main(replace(begun, **more), more))]
    assert rates[0] < rates[1] == begun.learning_rate >= rates[2] >= rates[3]
    ((first, *_),) = [sorted(plan) for plan in drawn]
    assert first[1] == pytest.approx(begun.learning_rate / 4)  # of 3 steps of warm-up, half of the first 6


@pytest.mark.usefixtures("undrawn")
def test_the_same_settings_give_the_same_weights(finished):
    config, one, _ = finished
    two = train.main(replace(config, run_name=None))
    other = train.main(replace(config, run_name=None, seed=1))
    assert_equal_weights(weights(one), weights(two))
    assert any(not torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def test_accumulation_over_parts_equals_the_whole_batch_without_batch_norm(settings):
    from datasets import check_data

    found = {}
    for parts in (1, 2):
        config = settings(accumulate=parts, batch_size=4, amp="off", loss="ce", hflip=0.0, clip_grad=0.1)
        report = check_data(config.data_root, num_classes=2)
        model = train.build_network(config, fresh=True)
        run = train.Run(config, report, torch.device("cpu"), torch.float32, model)
        run.model.eval()  # batch norm as a fixed scale
        images, masks = run.train_set.batch([(0, index) for index in range(4)])
        masks[0, :20] = 255  # parts of different weight
        train.train_step(run, images, masks, 0, 0)
        found[parts] = {name: value.clone() for name, value in run.model.state_dict().items()}
    for name, value in found[1].items():
        if value.is_floating_point():
            assert torch.allclose(value, found[2][name], atol=1e-4), name
