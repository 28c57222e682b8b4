"""What a run prints, on a terminal and to a log file."""

import os
import re
import struct
import time

import pytest
import torch

import train
from utils import device, monitor, visualize
from utils.monitor import Clock, format_time


@pytest.mark.usefixtures("undrawn")
def test_a_log_file_shows_the_table_the_epochs_and_the_scores_without_control_codes(settings, capfd):
    config = settings(run_name="mine", epochs=3, val_every=2, class_names=("ground", "square"))
    folder = train.main(config).folder
    out, err = capfd.readouterr()
    assert err == ""
    assert not re.search(r"[^\n\x20-\x7e]", out)
    table, *epochs = re.split(r"^Epoch \d/3\n", out, flags=re.MULTILINE)
    rows = dict(line.split(maxsplit=1) for line in table.splitlines()[-10:])
    assert list(rows) == [
        *("data", "classes", "image", "model", "size", "loss", "optimizer", "schedule", "device", "folder")
    ]
    assert rows["classes"] == "2: ground, square"
    assert re.fullmatch(r"0\.12 M parameters, \d+ M multiply-adds per image", rows["size"])
    assert rows["folder"] == str(folder)
    assert len(epochs) == 3
    assert re.match(
        r"time       about \d+ s for 8 steps, measured over 2 of them, without validation", epochs[0]
    )
    assert "time " not in epochs[1]
    assert "images/s, about" in epochs[0] and "left" in epochs[1] and " left\n" not in epochs[2]
    for text, validated in zip(epochs, (False, True, True), strict=True):
        assert re.search(r"loss \d\.\d{4}, ce \d\.\d{4}, dice \d\.\d{4}, learning rate ", text)
        assert ("  square  " in text and "mean IoU 0." in text) == validated
    shares = r"\ntime: data \d+ %, step \d+ %, validation \d+ %, saving \d+ %; peak memory \d+\.\d GiB\n"
    assert re.search(shares, epochs[2])


@pytest.mark.usefixtures("undrawn")
def test_a_terminal_shows_bars_with_the_loss_the_speed_and_the_time_left(settings, monkeypatch):
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    original = train.train_step

    def slow_step(*args):
        time.sleep(0.15)  # bars are drawn every tenth of a second
        return original(*args)

    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    os.set_blocking(main, False)
    monkeypatch.setattr(train, "train_step", slow_step)
    with os.fdopen(terminal, "w") as screen:
        monkeypatch.setattr("sys.stderr", screen)
        train.main(settings(epochs=1))
        shown = os.read(main, 100_000).decode()
        monkeypatch.setenv("RANK", "1")
        assert train.progress_bar(total=1).disable
    os.close(main)
    assert re.search(r"Epoch 1:  67%.* 4/6 \[\d\d:\d\d<\d\d:\d\d, +\d+\.\d+img/s, loss \d\.\d{4}\]", shown)


@pytest.mark.usefixtures("undrawn")
def test_waiting_for_data_prints_advice_early_and_at_the_end(settings, monkeypatch, capsys):
    original = Clock.add

    def add(clock, what, start):
        original(clock, what, start - 1000 if what == "data" else start)

    monkeypatch.setattr(Clock, "add", add)
    train.main(settings(epochs=1))
    advised = [line for line in capsys.readouterr().out.splitlines() if "Waiting for data takes " in line]
    assert [line[:5] for line in advised] == ["time ", "time:"]
    assert all("num_workers" in line for line in advised)


def test_the_images_shown_are_spread_over_the_split():
    assert visualize.spread(101, 4) == [0, 25, 50, 75]
    assert visualize.spread(3, 4) == [0, 1, 2]


def test_advice_is_printed_above_a_tenth_of_the_time():
    clock = Clock()
    clock.seconds |= {"data": 1.0, "step": 9.0}
    assert clock.describe() == "data 10 %, step 90 %, validation 0 %, saving 0 %"
    clock.seconds["data"] = 1.2
    assert ". Waiting for data takes 12 % of the time: try cache" in clock.describe()


def test_the_speed_is_that_of_the_steps_after_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    clock = Clock()
    assert clock.since_first(7) == (0, 0)
    now[0] = 103.0
    assert clock.since_first(13) == (6, 3)


@pytest.mark.parametrize("done", [True, False])
def test_waiting_for_data_while_the_gpu_is_busy_is_not_counted(monkeypatch, done):
    stream = type("Stream", (), {"query": lambda _: done})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream())
    assert device.is_busy(torch.device("cuda")) == (not done)
    assert not device.is_busy(torch.device("cpu"))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (40, "40 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3600, "60 min"),
        (5400, "1.5 h"),
        (100_000, "27.8 h"),
        (180_000, "2.1 days"),
    ],
)
def test_a_duration_is_printed_in_its_unit(seconds, words):
    assert format_time(seconds) == words
