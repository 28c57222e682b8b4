"""A run that is killed, over and over and at any moment, ends as if nothing had happened."""

import os
import random
import signal
import time
from pathlib import Path

import doors
import pytest
import torch

import train
from models import read_checkpoint

KILLS = 20


def run_silently(config):
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    train.main(config)


def read_all(folder):
    """Every file under its final name can be read at any time."""
    for name in ("last.pt", "best.pt"):
        if (folder / name).exists():
            read_checkpoint(folder / name)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills by SIGKILL, which Windows does not have")
def test_a_run_killed_twenty_times_ends_with_the_same_weights(settings):
    changes = dict(
        epochs=6, dropout=0.2, ema_decay=0.9, accumulate=2, rotate=15.0, save_every_minutes=1e-9, amp="off"
    )
    whole = train.main(settings(run_name="whole", **changes))
    folder = Path(settings().output_dir) / "broken"
    draw, kills = random.Random(0), 0
    while True:
        resume = str(folder) if (folder / "last.pt").exists() else None
        if folder.exists() and not resume:  # killed before its first checkpoint: nothing to go on with
            folder.rename(folder.with_name(f"lost_{kills}"))
        config = settings(run_name="broken", resume=resume, **changes)
        process = doors.CONTEXT.Process(target=run_silently, args=(config,))
        process.start()
        if kills < KILLS:
            started = time.monotonic()
            before = (folder / "last.pt").stat().st_mtime_ns if resume else 0
            while time.monotonic() - started < 20 and process.is_alive():  # until it has done a step
                last = folder / "last.pt"
                if last.exists() and last.stat().st_mtime_ns > before:
                    break
                time.sleep(0.002)
            time.sleep(draw.random() * 0.05)
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        read_all(folder)
        if (folder / "report.png").exists():
            break
    assert kills >= 10
    for name in ("last.pt", "best.pt"):
        one, other = (read_checkpoint(path / name) for path in (whole, folder))
        for key, value in one["model"].items():
            assert torch.equal(value, other["model"][key]), key
