"""The way from pictures to logits at a picture's own size: folding, restoring, sliding windows, averaging."""

import numpy as np
import pytest
import torch
from torch import nn

from datasets.fitting import Box
from models import MODELS, build_model
from utils.inference import (
    CACHED,
    Network,
    fold_batch_norm,
    normalize,
    restore,
    restored_strips,
    sliding_blocks,
)
from utils.winograd import FEWEST_CHANNELS, WinogradConv2d, use_winograd

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
def test_folding_batch_norm_keeps_the_function_and_leaves_no_batch_norm(name, narrow_fcn):
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


def slide(forward, picture, window, overlap=0.25):
    """The logits of a whole picture, and how often each pixel was given."""
    rows = lambda top, bottom: picture[:, top:bottom]  # noqa: E731
    whole, times = None, torch.zeros(picture.shape[1:])
    for top, left, block in sliding_blocks(forward, rows, picture.shape[1:], window, overlap):
        whole = block.new_zeros(len(block), *picture.shape[1:]) if whole is None else whole
        place = np.s_[top : top + block.shape[1], left : left + block.shape[2]]
        whole[(slice(None), *place)] = block
        times[place] += 1
    return whole, times


@pytest.mark.parametrize("size", [(40, 40), (33, 100), (97, 64), (128, 31), (20, 20), (64, 65), (150, 203)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_sliding_an_identity_gives_each_pixel_of_the_picture_back_once(size, overlap):
    picture = torch.randint(0, 256, (2, *size), dtype=torch.uint8)
    whole, times = slide(identity, picture, (40, 48), overlap)
    assert torch.equal(times, torch.ones(size))
    assert torch.allclose(whole, picture.float(), atol=1e-3)


def test_windows_are_blended_as_by_sums_over_the_whole_picture():
    model = small_model("unet")
    network = Network(model, mean=[0.5] * 3, std=[0.2] * 3, **CPU)
    picture = torch.randint(0, 256, (3, 75, 110), dtype=torch.uint8)
    sums, total = torch.zeros(3, 75, 110), torch.zeros(75, 110)
    ramp = ((torch.minimum(torch.arange(40), torch.arange(39, -1, -1)) + 1) / 10).clamp(max=1)
    for top in (0, 18, 35):
        for left in (0, 23, 47, 70):
            place = np.s_[..., top : top + 40, left : left + 40]
            sums[place] += network.logits(picture[place][None])[0] * ramp[:, None] * ramp
            total[place] += ramp[:, None] * ramp
    assert torch.allclose(slide(network.logits, picture, (40, 40))[0], sums / total, atol=1e-4)


def test_one_window_that_covers_the_picture_equals_taking_it_whole():
    model = small_model("unet")
    network = Network(model, mean=[0.5] * 3, std=[0.2] * 3, **CPU)
    picture = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    assert torch.equal(slide(network.logits, picture, (64, 64))[0], network.logits(picture[None])[0])


def test_sliding_asks_for_one_strip_at_a_time_and_gives_no_more_than_a_window():
    asked, given = [], []

    def read(top, bottom):
        asked.append(bottom - top)
        return torch.zeros(1, bottom - top, 400, dtype=torch.uint8)

    for _, _, block in sliding_blocks(identity, read, (400, 400), (40, 40)):
        given.append(tuple(block.shape))
    assert set(asked) == {40}
    assert max(rows for _, rows, _ in given) <= 40
    assert max(columns for _, _, columns in given) <= 40


@pytest.mark.parametrize("box", [Box(0, 0, 8, 10, 100, 77), Box(2, 1, 5, 9, 5, 9), Box(1, 0, 30, 40, 17, 23)])
def test_restoring_in_strips_equals_restoring_at_once(box):
    logits = torch.randn(1, 3, 33, 41)
    strips = list(restored_strips(logits, box, elements=3 * box.original_width * 7))
    assert [top for top, _, _ in strips] == list(range(0, box.original_height, 7))
    joined = torch.cat([strip for _, _, strip in strips], dim=1)
    assert torch.allclose(joined, restore(logits, box)[0], atol=1e-5)


def test_flip_averaging_is_symmetric_and_equals_the_plain_way_for_a_symmetric_picture():
    network = Network(small_model("unet"), mean=[0.5] * 3, std=[0.2] * 3, tta="flip", **CPU)
    picture = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    assert torch.allclose(network.logits(picture).flip(-1), network.logits(picture.flip(-1)), atol=1e-4)


def test_multiscale_averaging_keeps_the_size():
    network = Network(small_model("unet"), mean=[0.5] * 3, std=[0.2] * 3, tta="multiscale", **CPU)
    assert network.logits(torch.zeros(2, 3, 37, 53, dtype=torch.uint8)).shape == (2, 3, 37, 53)


@pytest.mark.parametrize("size", [(1, 5), (4, 4), (7, 9), (16, 12)])
@pytest.mark.parametrize("bias", [False, True])
def test_winograd_convolves(size, bias):
    conv, x = nn.Conv2d(8, 6, 3, padding=1, bias=bias), torch.randn(2, 8, *size)
    for layout in (torch.channels_last, torch.contiguous_format):
        with torch.no_grad():
            expected = conv(x)
            torch.testing.assert_close(
                WinogradConv2d(conv)(x.to(memory_format=layout)), expected, atol=1e-5, rtol=1e-5
            )


def test_only_convolutions_that_winograd_does_the_same_and_quicker_are_replaced():
    many, few = FEWEST_CHANNELS, FEWEST_CHANNELS // 2
    model = nn.Sequential(
        nn.Conv2d(many, many, 3, padding=1),
        nn.Conv2d(many, many, 3, padding=2, dilation=2),
        nn.Conv2d(many, few, 3, padding=1),
        nn.Conv2d(few, many, 3, padding=0),
        nn.Conv2d(many, many, 3, stride=2, padding=1),
        nn.Conv2d(many, many, 3, padding=1, groups=many),
        nn.Conv2d(many, 4, 1, bias=False),
    )
    x = torch.randn(2, many, 20, 24)
    with torch.no_grad():
        expected = model(x)
        use_winograd(model)
        torch.testing.assert_close(model(x), expected)
    assert [type(layer) for layer in model] == [WinogradConv2d] + [nn.Conv2d] * 6


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_network_made_ready_gives_the_logits_of_the_model(name, precision, narrow_fcn):
    model = small_model(name) if name != "unet" else build_model("unet", 3, base_channels=32).eval()
    network = Network(model, mean=[0.5] * 3, std=[0.2] * 3, device=torch.device("cpu"), precision=precision)
    pictures = torch.randint(0, 256, (3, 3, 48, 64), dtype=torch.uint8)
    images = normalize(pictures, [0.5] * 3, [0.2] * 3)
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            mixed = (model(images) - expected).norm()
    error = (network.logits(pictures) - expected).norm()
    assert error < max(1e-5 * expected.norm(), 2 * mixed)


def test_a_cpu_takes_a_batch_through_the_network_in_parts_that_its_cache_holds():
    model, sizes = small_model("segnet"), []
    network = Network(model, mean=[0.5] * 3, std=[0.2] * 3, **CPU)
    pictures = torch.randint(0, 256, (5, 3, 32, CACHED // (2 * 32 * 4 * 4)), dtype=torch.uint8)
    network.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    whole = network.logits(pictures)
    assert sizes == [2, 2, 1]
    assert torch.allclose(whole[2], network.logits(pictures[2:3])[0], atol=1e-4)
