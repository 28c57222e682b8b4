"""The way from pictures to logits at a picture's own size: folding, restoring, sliding windows, averaging."""

import pytest
import torch
from torch import nn

from datasets.transforms import Box
from models import MODELS, build_model
from utils.inference import Network, fold_batch_norm, normalize, restore, sliding_strips

SMALL = {"unet": {"base_channels": 4}, "segnet": {"base_channels": 4}, "fcn": {"backbone": "vgg11_bn"}}
SMALL |= {name: {"backbone": "resnet18"} for name in ("deeplabv3plus", "pspnet")}
CPU = {"device": torch.device("cpu"), "precision": torch.float32}


def small_model(name):
    torch.manual_seed(0)
    model = build_model(name, 3, **SMALL[name])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as after training
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_folding_batch_norm_keeps_the_function_and_leaves_no_batch_norm(name):
    model, folded = small_model(name), fold_batch_norm(small_model(name), 3)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, got = model(images), folded(images)
    assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_network_leaves_the_model_it_is_made_from_as_it_was():
    model = small_model("unet").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Network(model, mean=[0.5] * 3, std=[0.2] * 3, **CPU).logits(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_normalize_is_the_formula():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]
    expected = torch.stack([(images[:, c] / 255 - mean[c]) / std[c] for c in range(3)], dim=1)
    assert torch.allclose(normalize(images, mean, std), expected, atol=1e-5)


def test_restore_cuts_the_padding_off_and_resizes_the_content():
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 1, 2:6] = 1.0  # the content; rows 0, 1, 6 and 7 are padding
    assert torch.equal(restore(logits, Box(2, 0, 4, 8, 8, 16))[:, 1], torch.ones(1, 8, 16))
    assert torch.equal(restore(logits, Box(0, 0, 8, 8, 8, 8)), logits)


def identity(images):
    return images.float()


@pytest.mark.parametrize("size", [(40, 40), (33, 100), (97, 64), (128, 31), (20, 20), (64, 65)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_sliding_an_identity_gives_the_picture_back_whole_and_in_order(size, overlap):
    picture = torch.randint(0, 256, (2, *size), dtype=torch.uint8)
    strips = list(sliding_strips(identity, picture, (40, 48), overlap))
    assert [top for top, _ in strips] == [sum(s.shape[1] for _, s in strips[:i]) for i in range(len(strips))]
    assert torch.allclose(torch.cat([strip for _, strip in strips], dim=1), picture.float(), atol=1e-3)


def test_one_window_that_covers_the_picture_equals_taking_it_whole():
    model = small_model("unet")
    network = Network(model, mean=[0.5] * 3, std=[0.2] * 3, **CPU)
    picture = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    whole = network.logits(picture[None])[0]
    slid = torch.cat([strip for _, strip in sliding_strips(network.logits, picture, (64, 64))], dim=1)
    assert torch.equal(slid, whole)


def test_sliding_holds_one_strip_and_not_the_whole_pictures_logits():
    rows = [
        strip.shape[1]
        for _, strip in sliding_strips(identity, torch.zeros(1, 400, 40, dtype=torch.uint8), (40, 40))
    ]
    assert max(rows) <= 40
    assert sum(rows) == 400


def test_flip_averaging_is_symmetric_and_equals_the_plain_way_for_a_symmetric_picture():
    network = Network(small_model("unet"), mean=[0.5] * 3, std=[0.2] * 3, tta="flip", **CPU)
    picture = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    assert torch.allclose(network.logits(picture).flip(-1), network.logits(picture.flip(-1)), atol=1e-4)


def test_multiscale_averaging_keeps_the_size():
    network = Network(small_model("unet"), mean=[0.5] * 3, std=[0.2] * 3, tta="multiscale", **CPU)
    assert network.logits(torch.zeros(2, 3, 37, 53, dtype=torch.uint8)).shape == (2, 3, 37, 53)
