"""Weights from files: checkpoints of runs, and public classification weights."""

import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from torch import nn

from models import build_model, load_model, load_pretrained, read_checkpoint
from models.backbones import VGG, ResNet
from models.checkpoint import FORMAT

OPTIONS = {"base_channels": 4}


def checkpoint(**changes):
    content = {
        "format": FORMAT,
        "kind": "best",
        "model": build_model("unet", 3, 1, **OPTIONS).state_dict(),
        "architecture": {"name": "unet", "num_classes": 3, "in_channels": 1, "options": OPTIONS},
        "info": {"class_names": ["sky", "road", "tree"], "image_size": [64, 96], "mean": [0.5]},
    }
    return {**content, **changes}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "best.pt"


def test_a_loaded_model_predicts_as_the_saved_one_and_has_the_run_s_description(path):
    model = build_model("unet", 3, 1, **OPTIONS).eval()
    torch.save(checkpoint(model=model.state_dict()), path)
    random_state = torch.get_rng_state()
    loaded = load_model(path)
    assert torch.equal(torch.get_rng_state(), random_state)  # loading draws nothing
    images = torch.rand(1, 1, 40, 33)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training and all(value.requires_grad for value in loaded.parameters())
    assert loaded.info.class_names == ["sky", "road", "tree"] and loaded.info.image_size == [64, 96]
    assert loaded.info.architecture["options"] == OPTIONS


def test_building_for_weights_from_a_file_does_not_import_the_compiler():
    """It takes a second, which every prediction would wait for."""
    code = "import sys, torch as t, models; t.set_default_device('meta'); "
    code += "[models.build_model(name, 3) for name in models.MODELS]\n"
    code += "assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


def test_averaged_weights_are_the_ones_that_predict(path):
    ema = {key: torch.zeros_like(value) for key, value in checkpoint()["model"].items()}
    torch.save(checkpoint(ema=ema), path)
    assert not any(value.any() for value in load_model(path).state_dict().values())
    torch.save(checkpoint(ema=None), path)
    assert load_model(path).classifier.weight.any()


def test_a_truncated_checkpoint_is_refused(path):
    torch.save(checkpoint(), path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="best.pt is not a whole checkpoint: File is not a zip file. Give"):
        load_model(path)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_a_single_flipped_bit_is_refused(path, fraction):
    torch.save(checkpoint(), path)
    content = bytearray(path.read_bytes())
    content[int(len(content) * fraction)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="best.pt is (damaged: the checksum|not a whole checkpoint)"):
        load_model(path)


class Opener:
    """Something that a pickle would build on opening, and that no checkpoint may hold."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a dict; got list"),
        ({"state_dict": {}}, "must have a 'format' number; it holds .'state_dict'"),
        (checkpoint(format=7), "has checkpoint format 7, but this code reads formats 1 and 2"),
        (
            checkpoint(model={"classifier.weight": torch.full((1,), torch.nan)}),
            "must be finite; 'classifier.weight' is not",
        ),
        (checkpoint(ema={"classifier.weight": torch.full((1,), torch.inf)}), "entry 'ema', must be finite"),
        (checkpoint(model=[1]), "entry 'model', must be a dict of tensors by name"),
        (checkpoint(architecture={"name": "unet"}), "entry 'architecture', must name .'name', 'num_classes'"),
        (checkpoint(info=None), "must hold dicts under 'info' and 'options'"),
        (
            checkpoint(model={"classifier.weight": torch.zeros(1)}),
            "does not fit the unet it describes: .*Missing key",
        ),
        (checkpoint(info={"opener": Opener()}), "is not a checkpoint that can be opened safely"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_of_this_project_is_refused(path, capsys, content, message):
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_model(path)
    assert capsys.readouterr().out == ""


def test_a_text_file_and_a_missing_file_are_refused(path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*best.pt. Give"):
        read_checkpoint(path)
    path.write_text("epoch,loss\n")
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_public_weights_fill_the_backbone_and_the_classifier_is_reported(path, legacy):
    source = {**ResNet("resnet18").state_dict(), "fc.weight": torch.rand(10, 512), "fc.bias": torch.rand(10)}
    torch.save(source, path, _use_new_zipfile_serialization=not legacy)
    model = build_model("deeplabv3plus", 2, backbone="resnet18")
    classifier = model.classifier.weight.clone()
    report = load_pretrained(model, path)
    assert report.left_over == ("fc.weight", "fc.bias") and report.missing == report.adapted == ()
    assert str(report) == "120 tensors loaded; 2 left over (fc.weight, fc.bias)"
    assert all(torch.equal(value, source[key]) for key, value in model.backbone.state_dict().items())
    assert torch.equal(model.classifier.weight, classifier)


@pytest.mark.parametrize("in_channels", [1, 2, 3, 5])
def test_a_first_convolution_on_rgb_is_adapted_to_other_channels(path, in_channels):
    source = ResNet("resnet18").state_dict()
    torch.save(source, path)
    model = build_model("pspnet", 2, in_channels, backbone="resnet18").eval()
    report = load_pretrained(model, path)
    assert report.adapted == (() if in_channels == 3 else ("backbone.conv1.weight",))
    gray = torch.rand(1, 1, 32, 32)  # the same image in every channel gives the same result as in color
    expected = nn.functional.conv2d(gray.expand(-1, 3, -1, -1), source["conv1.weight"])
    given = nn.functional.conv2d(gray.expand(-1, in_channels, -1, -1), model.backbone.conv1.weight)
    if in_channels in (1, 3):
        torch.testing.assert_close(given, expected)
    for index in range(in_channels if in_channels > 1 else 0):
        wanted = source["conv1.weight"][:, index % 3] * 3 / in_channels
        torch.testing.assert_close(model.backbone.conv1.weight[:, index], wanted)


@pytest.mark.parametrize(("bn", "biases_first"), [("", False), ("", True), ("_bn", False)])
def test_segnet_takes_vgg16_with_and_without_batch_norm(path, bn, biases_first):
    torch.manual_seed(0)
    source = VGG(f"vgg16{bn}").state_dict()
    source = dict(sorted(source.items(), key=lambda item: biases_first and item[1].dim()))
    torch.save(source, path)
    model = build_model("segnet", 2)
    report = load_pretrained(model, path)
    convolutions = [layer for layer in model.backbone.features if isinstance(layer, nn.Conv2d)]
    given = [value for value in source.values() if value.dim() == 4]
    assert len(given) == 13
    assert all(torch.equal(layer.weight, value) for layer, value in zip(convolutions, given, strict=True))
    assert len(report.missing) == (0 if bn else 13 * 4) and len(report.loaded) == (91 if bn else 26)


def test_fcn_takes_its_two_wide_layers_from_the_classifier(path, narrow_fcn):
    row = torch.rand(25088)  # one neuron's weights over (512, 7, 7), the same for all: a small file
    torch.save(
        {
            **VGG("vgg11").state_dict(),
            "classifier.0.weight": row.expand(32, -1),
            "classifier.3.weight": row[:32].expand(32, -1),
            "classifier.6.weight": torch.rand(1000, 1).expand(-1, 32),
        },
        path,
    )
    model = build_model("fcn", 2, backbone="vgg11")
    report = load_pretrained(model, path)
    assert torch.equal(model.fc6.weight[7], row.reshape(512, 7, 7))
    assert torch.equal(model.fc7.weight[7, :, 0, 0], row[:32])
    assert report.left_over == ("classifier.6.weight",) and report.missing == ("fc6.bias", "fc7.bias")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: ResNet("resnet34").state_dict(),
            "must hold the weights of resnet18; 'layer1.2.conv1.weight'",
        ),
        (
            lambda: {**ResNet("resnet18").state_dict(), "conv1.weight": torch.rand(8, 3, 7, 7)},
            "needs .64, 3, 7, 7",
        ),
        (lambda: VGG("vgg11", base_channels=4).state_dict(), "must hold the weights of resnet18"),
        (lambda: {"epoch": 3}, "must be a dict of tensors by name"),
    ],
)
def test_weights_of_another_network_are_refused_and_change_nothing(path, content, message):
    torch.save(content(), path)
    model = build_model("pspnet", 2, backbone="resnet18")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_network_without_a_backbone_takes_no_public_weights(path):
    with pytest.raises(ValueError, match="unet has no backbone for public weights"):
        load_pretrained(build_model("unet", 2, **OPTIONS), path)


def test_a_failed_download_is_reported_with_what_to_do(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(
        ValueError, match=r"must download https://.*resnet18.*no route to host.*or set pretrained"
    ):
        load_pretrained(build_model("pspnet", 2, backbone="resnet18"), "imagenet")


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "encoder.", "model.encoder.", "module.backbone."])
@pytest.mark.parametrize("entry", [None, "state_dict", "model"])
def test_public_weights_are_found_below_the_prefix_that_other_programs_put_in_front(tmp_path, prefix, entry):
    source = build_model("deeplabv3plus", 2, backbone="resnet18").backbone.state_dict()
    weights = {prefix + name: value for name, value in source.items()} | {"classifier.weight": torch.zeros(2)}
    torch.save({entry: weights, "epoch": 3} if entry else weights, tmp_path / "weights.pth")
    model = build_model("deeplabv3plus", 3, backbone="resnet18")
    report = load_pretrained(model, tmp_path / "weights.pth")
    assert len(report.loaded) == len(source) and not report.missing
    assert torch.equal(model.backbone.layer4[1].conv2.weight, source["layer4.1.conv2.weight"])
