"""What a resumed run may change: the place of its data, and its length where the schedule allows."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import train
from config import Config
from models import read_checkpoint
from utils.cli import Fail
from utils.optim import SCHEDULES, depends_on_length

pytestmark = pytest.mark.usefixtures("undrawn")


def stop_after(monkeypatch, steps):
    """Let the run end by an error after some steps, as if memory had run out, with a checkpoint behind it."""
    original, count = train.train_step, [0]

    def step(*args):
        count[0] += 1
        if count[0] > steps:
            raise MemoryError
        return original(*args)

    monkeypatch.setattr(train, "train_step", step)


def resume(folder, **given):
    return train.main(Config(resume=str(folder), **given), given).folder


@pytest.mark.parametrize("relative", [False, True])
def test_a_run_whose_data_have_moved_goes_on_bit_equal(settings, data, tmp_path, monkeypatch, relative):
    whole = train.main(settings(run_name="whole")).folder
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Fail, match="out of memory"):
            train.main(settings(run_name="broken"))
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(data, tmp_path / "elsewhere" / "data")
    monkeypatch.chdir(tmp_path / "elsewhere")
    broken = resume(tmp_path / "runs" / "broken", data_root="data" if relative else str(moved))
    one, other = (read_checkpoint(folder / "last.pt")["model"] for folder in (whole, broken))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert (broken / "log.csv").read_text().count("\n") == 3


def test_a_run_does_not_go_on_with_other_data(settings, data, tmp_path, monkeypatch):
    stop_after(monkeypatch, 4)
    with pytest.raises(Fail, match="out of memory"):
        train.main(settings())
    other = shutil.copytree(data, tmp_path / "other")
    (other / "train" / "images" / "p0.png").unlink()
    (other / "train" / "masks" / "p0.png").unlink()
    with pytest.raises(Fail, match="other has changed since .* was started: training files"):
        resume(tmp_path / "runs" / "run", data_root=str(other))


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_a_finished_run_is_offered_more_epochs_where_its_schedule_allows_them(settings, scheduler):
    folder = train.main(settings(scheduler=scheduler, epochs=1)).folder
    with pytest.raises(Fail, match="is finished after 1 epochs") as caught:
        resume(folder)
    offered = re.search(r"--epochs (\d+)", str(caught.value))
    assert bool(offered) == (not depends_on_length(scheduler))
    if offered:
        assert resume(folder, epochs=int(offered[1])) == folder
        assert (folder / "log.csv").read_text().count("\n") == 1 + int(offered[1])
    else:
        with pytest.raises(Fail, match=f"epochs 2 contradicts .* whose {scheduler} schedule ends with them"):
            resume(folder, epochs=2)


def test_resuming_prints_the_kept_settings_in_one_line(settings, capsys):
    folder = Path(train.main(settings(scheduler="none", epochs=1)).folder)
    capsys.readouterr()
    train.main(settings(resume=str(folder), scheduler="none", epochs=2, seed=3), {"epochs": 2})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"resuming {folder}", "settings of the run that differ from config.py: seed 0"]
    assert not any("differ from" in line for line in lines[2:])
