"""A network prepared for prediction computes the same function; the original is not changed."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import MODELS, build_model, fold_batch_norm, ops, prepare_for_inference
from models.ops import WINOGRAD_CHANNELS, WinogradConv2d

SMALL = {"unet": {"base_channels": 4}, "segnet": {"base_channels": 4}, "fcn": {"backbone": "vgg11_bn"}}
SMALL |= {name: {"backbone": "resnet18"} for name in ("deeplabv3plus", "pspnet")}
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def small_model(name, **options):
    torch.manual_seed(0)
    model = build_model(name, 3, **{**SMALL.get(name, {}), **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as after training
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_folding_batch_norm_keeps_the_function_and_leaves_no_batch_norm(name, synchronized, narrow_fcn):
    model, folded = small_model(name), small_model(name)
    if synchronized:
        folded = nn.SyncBatchNorm.convert_sync_batchnorm(folded)
    folded = fold_batch_norm(folded, 3)
    images = torch.randn(1, 3, 64, 96)
    expected, got = model(images), folded(images)
    assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())


@pytest.mark.parametrize("name", MODELS)
def test_the_model_and_its_layers_stay_as_they_were(name, narrow_fcn):
    model = small_model(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    description = repr(model)
    prepared = prepare_for_inference(model, **CPU)
    assert model.training and repr(model) == description and not prepared.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_weights_can_be_given():
    model = small_model("unet")
    weights = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    prepared = prepare_for_inference(model, weights, **CPU)
    assert not prepared(torch.rand(1, 3, 32, 32)).any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_prepared_network_gives_the_logits_of_the_model(name, dtype, narrow_fcn):
    model = small_model(name, **({"base_channels": 32} if name == "unet" else {}))
    prepared = prepare_for_inference(model, device=torch.device("cpu"), dtype=dtype)
    images = torch.randn(3, 3, 48, 64).contiguous(memory_format=torch.channels_last)
    expected = model(images)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        mixed = (model(images) - expected).norm()
    assert (prepared(images.to(dtype)) - expected).norm() < max(1e-5 * expected.norm(), 2 * mixed)


def test_the_convolution_after_an_upsampling_keeps_its_faster_form():
    prepared = prepare_for_inference(small_model("deeplabv3plus"), **CPU)
    assert type(prepared.fuse[0]) is nn.Conv2d and type(prepared.refine[0]) is WinogradConv2d


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 5), (4, 4), (7, 9), (16, 12)])
@pytest.mark.parametrize("bias", [False, True])
def test_winograd_convolves(size, bias):
    conv, x = nn.Conv2d(8, 6, 3, padding=1, bias=bias), torch.randn(2, 8, *size)
    for layout in (torch.channels_last, torch.contiguous_format):
        got = WinogradConv2d(conv)(x.to(memory_format=layout))
        torch.testing.assert_close(got, conv(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_only_convolutions_that_winograd_computes_and_speeds_up_are_replaced():
    many, few = WINOGRAD_CHANNELS, WINOGRAD_CHANNELS // 2
    layers = [
        nn.Conv2d(many, many, 3, padding=1),
        nn.Conv2d(many, many, 3, padding=2, dilation=2),
        nn.Conv2d(many, few, 3, padding=1),
        nn.Conv2d(few, many, 3, padding=0),
        nn.Conv2d(many, many, 3, stride=2, padding=1),
        nn.Conv2d(many, many, 3, padding=1, groups=many),
        nn.Conv2d(many, many, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(many, 4, 1, bias=False),
    ]
    replaced = [ops.inference_conv(layer) for layer in layers]
    assert [type(layer) for layer in replaced] == [WinogradConv2d] + [nn.Conv2d] * 7
    for old, new in zip(layers, replaced, strict=True):
        x = torch.randn(2, old.in_channels, 20, 24)
        torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"bias": False}, {"groups": 2}])
def test_a_1x1_convolution_is_the_same_with_the_dilation_that_one_thread_prefers(options):
    conv, x = nn.Conv2d(4, 6, 1, **options), torch.randn(2, 4, 9, 8)
    replaced = ops.inference_conv(conv)
    assert replaced is not conv and replaced.dilation == (2, 2) and conv.dilation == (1, 1)
    torch.testing.assert_close(replaced(x), conv(x))
