"""Checkpoints of format 1, whose tensors had other names, and outputs of the code that wrote them."""

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch

import train
from config import Config
from models import build_model, load_model, read_checkpoint
from models.checkpoint import FORMAT, new_name

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
LAST = DATA / "unet_format1_last.pt"  # after the first of two epochs on mock_data
NETWORKS = json.loads((DATA / "format1_networks.json").read_text(encoding="utf-8"))


def old_weights(shapes):
    """Weights that depend on the names, so that two swapped names are noticed."""
    weights = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            weights[name] = torch.rand(shape, generator=generator) + 0.5
        else:
            weights[name] = 0.1 * torch.randn(shape, generator=generator)
    return weights


def sample(values, count):
    values = values.detach().flatten().double()
    return [float(values.norm()), *values[(torch.arange(count) * 7919) % len(values)].tolist()]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: f"{network['name']}-{network['options']}")
def test_old_weights_of_each_network_give_the_logits_that_they_gave(network, tmp_path, narrow_fcn):
    name, options = network["name"], network["options"]
    with torch.device("meta"):
        model = build_model(name, 3, **options)
    backbone = {key: value.shape for key, value in model.state_dict().items() if key.startswith("backbone.")}
    weights = old_weights({**backbone, **network["names"]})
    architecture = {"name": name, "num_classes": 3, "in_channels": 3, "options": options}
    content = {"format": 1, "model": weights, "ema": weights, "architecture": architecture, "info": {}}
    torch.save(content, tmp_path / "best.pt")

    images = torch.rand(1, 3, 48, 33, generator=torch.Generator().manual_seed(0)).double()
    logits = load_model(tmp_path / "best.pt").double()(images)

    assert sample(logits, 8) == pytest.approx(network["logits"], rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: f"{network['name']}-{network['options']}")
def test_the_order_of_the_parameters_is_the_old_one_which_the_optimizer_counts_by(network, narrow_fcn):
    with torch.device("meta"):
        model = build_model(network["name"], 3, **network["options"])
    names = [name for name in model.state_dict() if not name.startswith("backbone.")]
    assert names == [new_name(network["name"], name) for name in network["names"]]
    assert names == [new_name(network["name"], name) for name in names]  # names of today stay


def test_an_old_file_is_read_in_the_present_format():
    old, now = torch.load(LAST, weights_only=True), read_checkpoint(LAST)
    assert (old["format"], now["format"]) == (1, FORMAT)
    model = build_model("unet", 4, **now["architecture"]["options"])
    names = [name for name, _ in model.named_parameters()]
    stored = [name for group in now["optimizer"]["param_groups"] for name in group["param_names"]]
    assert list(now["model"]) == list(now["ema"]) == list(model.state_dict())
    assert sorted(stored) == sorted(names)


def test_an_old_run_is_resumed_and_ends_as_it_did(tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    for name in ("last.pt", "best.pt"):
        shutil.copy(LAST, folder / name)
    train.main(Config(resume=str(folder), cache_dir=str(tmp_path / "cache"), device="cpu"))
    expected = json.loads((DATA / "unet_format1_end.json").read_text(encoding="utf-8"))
    last = read_checkpoint(folder / "last.pt")
    for entry in ("model", "ema"):
        weights = torch.cat([value.flatten().double() for value in last[entry].values()])
        assert sample(weights, 24) == pytest.approx(expected[entry], rel=1e-4, abs=1e-6)
    losses = [row["train_loss"] for row in last["progress"]["rows"]]
    assert losses == pytest.approx([row["train_loss"] for row in expected["rows"]], rel=1e-5)
