"""Resuming from what a person may have left: folders without a checkpoint, edited or exchanged files."""

from pathlib import Path

import pytest
import torch

import train
from models import read_checkpoint
from utils.cli import Fail

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def stopped(settings, monkeypatch):
    """A run that ended after one of three epochs, its folder, and settings to resume it."""
    original = train.end_epoch

    def end(run, evaluation):
        original(run, evaluation)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(train, "end_epoch", end)
        with pytest.raises(Fail, match="out of memory"):
            train.main(settings(epochs=3))
    folder = Path(settings().output_dir) / "run"
    return folder, settings(resume=str(folder))


def edit(folder, change):
    content = read_checkpoint(folder / "last.pt")
    change(content)
    torch.save(content, folder / "last.pt")


@pytest.mark.parametrize("name", ["config", "progress", "fingerprint", "schedule", "scaler", "optimizer"])
def test_a_checkpoint_without_training_state_is_refused_and_named(stopped, name):
    folder, config = stopped
    edit(folder, lambda content: content.pop(name))
    with pytest.raises(Fail, match="holds no complete training state.*--init_from") as caught:
        train.main(config)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["progress"].clear(),
        lambda content: content["progress"].update(epoch="x"),
        lambda content: content["progress"].update(step=99),
        lambda content: content["config"].update(optimizer="sgd"),
        lambda content: content["model"].pop("classifier.weight"),
        lambda content: content["model"].update({"classifier.weight": torch.zeros(1)}),
        lambda content: content["model"].update(more=torch.zeros(1)),
        lambda content: content["optimizer"]["param_groups"].pop(),
    ],
    ids=["progress", "epoch", "step", "optimizer", "missing", "shape", "more", "groups"],
)
def test_a_checkpoint_that_does_not_fit_is_one_message(stopped, change):
    folder, config = stopped
    edit(folder, change)
    with pytest.raises(Fail, match="last.pt") as caught:
        train.main(config)
    assert caught.value.code == 2


def test_best_pt_given_to_resume_is_its_runs_folder(stopped):
    folder, config = stopped
    assert train.main(type(config)(**{**vars(config), "resume": str(folder / "best.pt")})).folder == folder


def test_a_run_whose_best_pt_is_gone_finds_a_new_best_epoch(stopped, capsys):
    folder, config = stopped
    (folder / "best.pt").unlink()
    edit(folder, lambda content: content["progress"].update(best=0.999))
    assert (train.main(config).folder / "best.pt").exists()
    assert "best.pt is missing" in capsys.readouterr().out


def test_a_name_whose_run_was_killed_before_it_saved_anything_can_be_used_again(settings):
    folder = Path(settings().output_dir) / "run"
    (folder / "samples").mkdir(parents=True)
    for name in ("config.json", ".lock"):
        (folder / name).write_text("{}")
    assert train.main(settings(epochs=1)).folder == folder


def test_more_epochs_in_the_settings_of_a_program_are_taken_without_flags(settings):
    folder = train.main(settings(epochs=1, scheduler="none")).folder
    result = train.main(settings(resume=str(folder), epochs=2, scheduler="none"))
    assert (result.folder / "log.csv").read_text().count("\n") == 3
