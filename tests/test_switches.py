"""Each switch of a run can be turned, does what it says, and trains to the same score."""

import csv
import dataclasses
import os
import shutil
import sys

import doors
import numpy as np
import pytest
import torch
from conftest import without_drawing, write_pair
from torch import nn

import train
from config import Config
from models import MODELS, build_model, read_checkpoint
from utils.device import counting_device

WELL = 0.96  # mean IoU that eight seeds reach on this data without any switch: 0.964 to 0.994


class Learned:
    """A finished run: its score, its weights, and what it was when it was over."""

    def __init__(self, folder, run):
        with open(folder / "log.csv", newline="", encoding="utf-8") as file:
            self.iou = float(list(csv.DictReader(file))[-1]["mean_iou"])
        self.last = read_checkpoint(folder / "last.pt")
        self.best = read_checkpoint(folder / "best.pt")["model"]
        self.run = run


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    """Train with some settings changed; each choice once, for the second that it takes to learn this well."""
    root, rng, kept = tmp_path_factory.mktemp("switches"), np.random.default_rng(0), {}
    for split, number in (("train", 8), ("val", 6)):
        for stem in range(number):
            write_pair(root / "data", split, f"p{stem}", rng)
    config = Config(
        data_root=str(root / "data"),
        output_dir=str(root / "runs"),
        num_classes=2,
        image_size=32,
        base_channels=8,
        epochs=16,
        batch_size=2,
        warmup_steps=2,
        learning_rate=0.01,
        val_every=16,
        amp="off",
    )

    def make(again=0, **changes):
        key = (again, *changes.items())
        if key not in kept:
            runs, original = [], train.start
            with pytest.MonkeyPatch.context() as patch, without_drawing():
                patch.setattr(train, "start", lambda run: (runs.append(run), original(run)))
                folder = train.main(dataclasses.replace(config, **changes)).folder
            kept[key] = Learned(folder, runs[0])
        return kept[key]

    return make


def assert_learned(learn, **changes):
    found = learn(**changes)
    assert found.iou > WELL
    assert abs(found.iou - learn().iou) < 0.03
    return found


def differs(one, other):
    return any(not torch.equal(value, other[name]) for name, value in one.items())


def test_bf16_computes_in_bf16_and_learns_as_well(learn):
    assert assert_learned(learn, amp="bf16").run.precision == torch.bfloat16
    assert learn().run.precision == torch.float32


def test_channels_last_is_a_layout_and_learns_as_well(learn):
    layouts = [
        next(p for p in found.run.model.parameters() if p.ndim == 4 and p.shape[2] == 3).stride()[1]
        for found in (learn(), assert_learned(learn, channels_last=False))
    ]
    assert layouts == [1, 9]  # step from one channel to the next in a 3 x 3 kernel


def test_the_average_of_the_weights_is_what_validates_and_learns_as_well(learn):
    found = assert_learned(learn, ema_decay=0.9)
    assert not differs(found.best, found.last["ema"])
    assert differs(found.best, found.last["model"])
    assert not differs(found.last["model"], learn().last["model"])  # training itself is the same
    counters = [name for name in found.best if name.endswith("num_batches_tracked")]
    assert all(found.best[name] == 16 * 4 for name in counters) and counters


def test_loading_processes_and_no_cache_change_nothing(learn):
    found = assert_learned(learn, num_workers=2, cache="off")
    assert found.run.data.loader.num_workers == 2
    assert found.run.data.train.cache is None
    assert not differs(found.last["model"], learn().last["model"])


def test_accumulation_learns_as_well(learn):
    found = assert_learned(learn, accumulate=2)
    assert differs(found.last["model"], learn().last["model"])  # batch norm sees half batches


def test_deterministic_runs_are_equal(learn):
    try:
        one, two = (learn(deterministic=True, epochs=2, val_every=2, again=number) for number in (1, 2))
        assert torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" in os.environ  # without it torch refuses matrix products on a GPU
    finally:
        torch.use_deterministic_algorithms(False)
    assert not differs(one.last["model"], two.last["model"])


@pytest.mark.parametrize("name", sorted({*MODELS} - {"fcn"}))  # 134 M weights, no layer that others lack
def test_a_network_takes_the_same_step_where_determinism_is_asked_for(name):
    small = {"unet": {"base_channels": 4}, "segnet": {"base_channels": 4}}
    small |= {name: {"backbone": "resnet18"} for name in ("deeplabv3plus", "pspnet")}
    options = small.get(name, {})
    model, images = build_model(name, num_classes=2, **options).eval(), torch.randn(2, 3, 36, 50)
    gradients = []
    try:
        for asked in (False, True):
            torch.use_deterministic_algorithms(asked)
            model.zero_grad()
            model(images).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_a_device_without_float64_has_its_predictions_counted_on_the_cpu():
    assert counting_device(torch.device("mps")) == torch.device("cpu")
    assert counting_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def two_convolutions(name, num_classes, in_channels=3, **options):
    """A network that compiles in seconds; a real one takes a minute."""
    layers = (
        nn.Conv2d(in_channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, num_classes, 1),
    )
    return nn.Sequential(*layers)


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler"
)
def test_a_compiled_network_learns_as_well_and_its_weights_keep_their_names(learn, monkeypatch):
    monkeypatch.setattr(train, "build_model", two_convolutions)
    plain, found = learn(epochs=10, val_every=10, again=1), learn(epochs=10, val_every=10, compile=True)
    assert min(plain.iou, found.iou) > WELL
    assert abs(plain.iou - found.iou) < 0.03
    assert found.run.forward is not found.run.model
    assert found.best.keys() == plain.best.keys()


FAULTS = """
import resource, sys, torch
from utils.device import keep_freed_memory
keep_freed_memory()
keep_freed_memory(2**20, int(sys.argv[1]))
total = [0] * 9
for step in range(9):
    torch.ones(2**25)  # 128 MiB
    total[step] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(min(after - before for before, after in zip(total, total[1:])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(("pixels", "kept"), [(4 * 256 * 256, True), (1024 * 1024, False)])
def test_freed_memory_is_kept_but_for_the_maps_of_large_pictures(pixels, kept, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FAULTS)
    _, faults, errors = doors.run([str(script), str(pixels)], doors.ROOT, tmp_path / "log")
    assert (int(faults) < 100) is kept, errors
