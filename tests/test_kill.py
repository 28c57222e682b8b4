"""A run that is killed, over and over and at any moment, ends as if nothing had happened."""

import os
import random
import shlex
import signal
import time

import doors
import pytest
import torch

from models import read_checkpoint

KILLS = 5  # of each of the four schedulers
SCHEDULES = ("poly", "none", "step --step_size 2", "plateau --plateau_patience 0")
FLAGS = """--num_classes 2 --image_size 32 --base_channels 4 --batch_size 2 --warmup_steps 2 --epochs 6
    --dropout 0.2 --ema_decay 0.9 --accumulate 2 --rotate 15 --save_every_minutes 1e-9 --amp off"""


def wait_for(happened, process, seconds):
    """Until it has happened, the process is over, or the time is."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_alive() and not happened():
        time.sleep(0.001)


def read_all(folder):
    """Every file under its final name can be read at any time."""
    for name in ("last.pt", "best.pt"):
        if (folder / name).exists():
            read_checkpoint(folder / name)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills by SIGKILL, which Windows does not have")
@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_a_run_killed_at_five_moments_ends_with_the_same_weights(data, tmp_path, scheduler):
    flags = shlex.split(f"{FLAGS} --scheduler {scheduler}")
    new = ["train.py", *flags, "--data_root", str(data), "--output_dir", str(tmp_path)]
    assert doors.run([*new, "--run_name", "whole"], doors.ROOT, tmp_path / "log")[0] == 0
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    draw, kills = random.Random(scheduler), 0
    while True:
        resume = (folder / "last.pt").exists()
        if folder.exists() and not resume:  # killed before its first checkpoint: nothing to go on with
            folder.rename(folder.with_name(f"lost_{kills}"))
        words = ["train.py", "--resume", str(folder)] if resume else [*new, "--run_name", "broken"]
        process = doors.start(words, doors.ROOT, tmp_path / "log")
        if kills < KILLS:
            last = folder / "last.pt"
            before = last.stat().st_mtime_ns if resume else 0
            wait_for(lambda: last.exists() and last.stat().st_mtime_ns > before, process, 20)  # noqa: B023
            time.sleep(draw.random() * 0.03)
            if kills % 2:  # while it writes a checkpoint
                wait_for(lambda: any(folder.glob(".*.writing")), process, 1)
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "log.err").read_text()
        read_all(folder)
        if (folder / "report.png").exists():
            break
    assert kills >= KILLS - 1
    for name in ("last.pt", "best.pt"):
        one, other = (read_checkpoint(path / name) for path in (whole, folder))
        for key, value in one["model"].items():
            assert torch.equal(value, other["model"][key]), key
