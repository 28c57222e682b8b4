"""What only a CUDA device can show: precisions, steps without a wait, scores, resuming, compiling.

Scores and losses are compared with TF32 off, and within what differs between two orders of summation.
"""

import csv
import dataclasses
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import train
from losses import LOSSES, build_loss
from models import MODELS, build_model, read_checkpoint
from utils.cli import Fail

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("undrawn", "narrow_fcn", "process_state"),
]
SMALL = {  # options of each network that make it small
    "unet": {"base_channels": 8},
    "segnet": {"base_channels": 8},
    "fcn": {"backbone": "vgg11_bn"},
    "pspnet": {"backbone": "resnet18"},
    "deeplabv3plus": {"backbone": "resnet18"},
}


def without_tf32():
    """Compute float32 in float32. (Only set: torch refuses to read what was set in two ways.)"""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def process_state():
    """Begin without TF32; give torch its defaults back, of which a run changes some."""
    without_tf32()
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def worker(monkeypatch):
    """The benchmarks' way to a step and a validation of train.py."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import worker

    return worker


def trained(config):
    """Train; return the run's folder."""
    train.main(config)
    return Path(config.resume or Path(config.output_dir, config.run_name))


def losses(folder):
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


def test_every_network_is_tested():
    assert set(SMALL) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_network_computes_what_it_computes_on_the_cpu(name):
    torch.manual_seed(0)
    model, images = build_model(name, 5, **SMALL[name]).eval(), torch.randn(2, 3, 64, 80)
    with torch.inference_mode():
        wanted = model(images)
        found = model.to(DEVICE, memory_format=torch.channels_last)(images.to(DEVICE)).cpu()
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_network_has_the_gradients_that_it_has_on_the_cpu(name):
    torch.manual_seed(0)
    model, images = build_model(name, 5, dropout=0.0, **SMALL[name]), torch.randn(4, 3, 48, 64)
    masks = torch.randint(5, (4, 48, 64))
    found = []
    for device in ("cpu", DEVICE):
        model.zero_grad(set_to_none=True)
        model.to(device, torch.float64)
        loss = build_loss("joint")(model(images.double().to(device)), masks.to(device))
        loss.backward()
        found.append(torch.cat([weight.grad.flatten().cpu() for weight in model.parameters()]))
    assert (found[0] - found[1]).norm() < 1e-6 * found[0].norm()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_and_its_gradient_are_those_of_the_cpu(name, dtype):
    torch.manual_seed(0)
    weights = [1.0, 2.0, 3.0] if name == "weighted_ce" else None
    loss_fn = build_loss(name, class_weights=weights)
    logits, masks = torch.randn(2, 3, 40, 48).to(dtype), torch.randint(3, (2, 40, 48))
    masks[0, :4] = 255
    found = []
    for device in ("cpu", DEVICE):
        x = logits.to(device, memory_format=torch.channels_last).requires_grad_()
        loss = loss_fn.to(device)(x, masks.to(device))
        loss.backward()
        found.append((loss.item(), x.grad.float().cpu()))
    (loss, gradient), (other_loss, other_gradient) = found
    assert other_loss == pytest.approx(loss, rel=1e-5)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert (other_gradient - gradient).norm() < tolerance * gradient.norm()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns(amp, settings):
    folder = trained(settings(device=DEVICE, amp=amp, epochs=8))
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
def test_no_step_makes_the_host_wait(optimizer, amp, worker, tmp_path):
    settings = {"amp": amp, "optimizer": optimizer, "clip_grad": 1.0, "accumulate": 2, "ema_decay": 0.9}
    case = worker.Case("separable_resnet18", size=64, batch=4, device=DEVICE, settings=settings)
    assert waits(worker, case, tmp_path) == ""


@pytest.mark.parametrize("name", ["unet", "segnet", "fcn", "pspnet_resnet18", "deeplabv3plus_resnet18"])
def test_no_network_makes_the_host_wait_in_a_step(name, worker, tmp_path):
    case = worker.Case(name, size=64, batch=4, device=DEVICE, settings={"amp": "bf16"})
    assert waits(worker, case, tmp_path) == ""


def waits(worker, case, folder):
    """Where a step waits for the GPU, once what comes only in the first steps is over."""
    step = worker.our_step(worker.our_run(case, folder))
    for _ in range(3):
        step()
    return worker.wait_inside(step)


def test_scores_on_the_device_equal_the_cpus(worker, data, tmp_path, monkeypatch):
    monkeypatch.setitem(worker.NETWORKS, "narrow", {"model": "unet", "base_channels": 8})
    case = worker.Case("narrow", size=64, classes=2, data=str(data), device=DEVICE, settings={"amp": "off"})
    run = worker.our_run(case, tmp_path)
    step = worker.our_step(run)
    for _ in range(30):
        step()
    on_cpu = worker.our_run(dataclasses.replace(case, device="cpu"), tmp_path)
    on_cpu.model.load_state_dict(run.model.state_dict())
    without_tf32()
    (_, found), (_, wanted) = map(worker.our_validation, (run, on_cpu))
    assert found.counts.sum() == wanted.counts.sum()
    moved = (found.counts - wanted.counts).abs().sum() / 2  # pixels whose best two classes are nearly equal
    assert moved <= 1e-3 * wanted.counts.sum()
    assert found.scores.mean_iou == pytest.approx(wanted.scores.mean_iou, abs=5e-3)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-3)


def test_a_run_resumed_on_the_device_ends_like_one_that_was_not_broken(settings, monkeypatch):
    kept = {"device": DEVICE, "amp": "off", "deterministic": True}  # else two equal runs differ, too
    whole = trained(settings(**kept, run_name="whole"))
    step, count = train.train_step, [0]

    def stopped(*args, **options):
        count[0] += 1
        if count[0] == 5:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **options)

    monkeypatch.setattr(train, "train_step", stopped)
    with pytest.raises(Fail, match="--resume"):
        train.main(settings(**kept, run_name="broken"))
    monkeypatch.setattr(train, "train_step", step)
    folder = whole.parent / "broken"
    trained(settings(**kept, resume=str(folder)))
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_deterministic_step_has_the_same_gradients_each_time(name, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # refuses what has no deterministic form
    torch.manual_seed(0)
    model = build_model(name, 5, dropout=0.0, **SMALL[name]).to(DEVICE, memory_format=torch.channels_last)
    images, masks = torch.randn(4, 3, 64, 80, device=DEVICE), torch.randint(5, (4, 64, 80), device=DEVICE)
    found = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
            logits = model(images)
        build_loss("joint")(logits, masks).backward()
        found.append([weight.grad.clone() for weight in model.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.slow
def test_a_compiled_run_learns_as_an_eager_one(settings):
    eager = losses(trained(settings(device=DEVICE, amp="off", run_name="eager")))
    compiled = losses(trained(settings(device=DEVICE, amp="off", compile=True, run_name="compiled")))
    assert compiled == pytest.approx(eager, rel=1e-2)
