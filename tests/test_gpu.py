"""What only a CUDA device can show: precisions, steps without a wait, scores, resuming, compiling."""

import csv
import sys
from pathlib import Path

import pytest
import torch

import train
from models import read_checkpoint
from utils.device import pick_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def losses(folder):
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns(amp, settings):
    folder = train.main(settings(device="cuda", amp=amp, epochs=8)).folder
    first, *_, last = losses(folder)
    assert last < first
    assert (read_checkpoint(folder / "last.pt")["scaler"] != {}) == (amp == "fp16")


@pytest.mark.parametrize(
    ("optimizer", "amp"),
    [
        ("adam", "off"),
        ("adam", "bf16"),
        ("adam", "fp16"),
        ("sgd", "fp16"),
        ("rmsprop", "bf16"),  # not fp16: torch has no fused RMSprop, and its scaler then reads a value back
    ],
)
def test_no_step_makes_the_host_wait(optimizer, amp, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import worker

    settings = {"amp": amp, "optimizer": optimizer, "clip_grad": 1.0, "accumulate": 2, "ema_decay": 0.9}
    case = worker.Case("separable_resnet18", size=64, batch=4, device="cuda", settings=settings)
    step = worker.our_step(worker.our_run(case, tmp_path))
    for _ in range(3):
        step()
    assert worker.wait_inside(step) == ""


def test_scores_on_the_device_equal_the_cpus(settings):
    folder = train.main(settings(device="cuda", amp="off")).folder
    saved = read_checkpoint(folder / "best.pt")
    found = []
    for name in ("cuda", "cpu"):
        config = settings(device=name, amp="off")
        model = train.build_network(config, fresh=True)
        report = train.check_data(config.data_root, num_classes=config.num_classes)
        run = train.build_run(config, report, pick_device(name), torch.float32, model)
        found.append(train.evaluate(run, {key: value.to(name) for key, value in saved["model"].items()}))
    assert found[0].counts.sum() == found[1].counts.sum()
    assert found[0].scores.mean_iou == pytest.approx(found[1].scores.mean_iou, abs=1e-3)
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-3)


def test_a_run_resumed_on_the_device_ends_like_one_that_was_not_broken(settings, monkeypatch):
    whole = train.main(settings(device="cuda", amp="off", run_name="whole")).folder
    step, count = train.train_step, [0]

    def broken(*args):
        count[0] += 1
        if count[0] == 5:  # in the second epoch
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train, "train_step", broken)
    with pytest.raises(KeyboardInterrupt):
        train.main(settings(device="cuda", amp="off", run_name="broken"))
    monkeypatch.setattr(train, "train_step", step)
    folder = whole.parent / "broken"
    train.main(settings(device="cuda", amp="off", resume=str(folder)))
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-3)


def test_a_compiled_run_learns_as_an_eager_one(settings):
    eager = losses(train.main(settings(device="cuda", amp="off", run_name="eager")).folder)
    compiled = losses(
        train.main(settings(device="cuda", amp="off", compile=True, run_name="compiled")).folder
    )
    assert compiled == pytest.approx(eager, rel=1e-2)
