"""The encoders against torchvision's: same names, same counts, same features."""

import pytest
import torch
import torchvision
from torchvision.models.vgg import cfgs, make_layers

from models.backbones import RESNETS, VGG, VGGS, ResNet

DILATIONS = {8: [False, True, True], 16: [False, False, True], 32: [False, False, False]}
BOTTLENECKS = ("resnet50", "resnet101")
CONFIGS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}  # torchvision's letters


def random_statistics(model):
    """Move the batch norm statistics off 0 and 1, so that a swapped one is noticed."""
    for key, value in model.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif key.endswith("running_var"):
            value.uniform_(1, 2)
    return model.eval()


def torchvision_vgg(name):
    return make_layers(cfgs[CONFIGS[name.removesuffix("_bn")]], batch_norm=name.endswith("_bn"))


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("name", "output_stride"),  # torchvision does not dilate BasicBlocks: see the test of every nth position
    [(name, stride) for name in RESNETS for stride in (DILATIONS if name in BOTTLENECKS else (32,))],
)
@torch.no_grad()
def test_resnet_features_are_torchvisions(name, output_stride):
    torch.manual_seed(0)
    dilation = {"replace_stride_with_dilation": DILATIONS[output_stride]} if name in BOTTLENECKS else {}
    theirs = random_statistics(torchvision.models.get_model(name, weights=None, **dilation))
    with torch.device("meta"):
        ours = ResNet(name, output_stride=output_stride).eval()
    left_over = ours.load_state_dict(theirs.state_dict(), strict=False, assign=True)
    assert left_over.unexpected_keys == ["fc.weight", "fc.bias"] and left_over.missing_keys == []
    x = images = torch.rand(2, 3, 65, 80)
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for stage, (channels, features) in enumerate(zip(ours.out_channels, ours(images), strict=True)):
        x = getattr(theirs, f"layer{stage + 1}")(x)
        assert features.shape[1] == channels
        assert_same(features, x)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.no_grad()
def test_every_nth_position_of_a_dilated_resnet_is_the_strided_one(name, output_stride):
    torch.manual_seed(0)
    strided, dilated = random_statistics(ResNet(name)), ResNet(name, output_stride=output_stride).eval()
    dilated.load_state_dict(strided.state_dict())
    images, step = torch.rand(1, 3, 95, 64), 32 // output_stride
    assert_same(dilated(images)[-1][..., ::step, ::step], strided(images)[-1])


@pytest.mark.parametrize("name", VGGS)
@torch.no_grad()
def test_vgg_features_are_torchvisions(name):
    torch.manual_seed(0)
    theirs = random_statistics(torchvision_vgg(name))
    with torch.device("meta"):
        ours = VGG(name).eval()
    ours.features.load_state_dict(theirs.state_dict(), assign=True)
    images = torch.rand(1, 3, 67, 40)
    maps = ours(images)
    assert [x.shape[1] for x in maps] == list(ours.out_channels)
    assert [x.shape[2] for x in maps] == [33, 16, 8, 4, 2]
    assert_same(maps[-1], theirs(images))


@torch.no_grad()
def test_vgg_that_rounds_up_pools_as_ceil_mode_does():
    torch.manual_seed(0)
    ours = VGG("vgg11", base_channels=8, round_up=True)
    x = images = torch.rand(1, 3, 67, 33)
    for layer in ours.features:
        if isinstance(layer, torch.nn.MaxPool2d):
            layer = torch.nn.MaxPool2d(2, ceil_mode=True)
        x = layer(x)
    assert x.shape[-2:] == (3, 2)
    assert torch.equal(ours(images)[-1], x)


@pytest.mark.parametrize("name", [*RESNETS, *VGGS])
def test_parameter_counts_are_torchvisions_without_the_classifier(name):
    with torch.device("meta"):
        ours = ResNet(name) if name in RESNETS else VGG(name)
        theirs = torchvision.models.get_model(name, weights=None)
    theirs.fc = theirs.classifier = torch.nn.Identity()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("width", [16, 64])
def test_vgg_channels_grow_with_the_first_stage(width):
    assert VGG("vgg11", base_channels=width).out_channels == tuple(
        width * factor for factor in (1, 2, 4, 8, 8)
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResNet("resnet20"), "backbone must be one of resnet18.*got 'resnet20'. Did you mean"),
        (lambda: ResNet("resnet18", output_stride=4), "output_stride must be one of 8, 16, 32; got 4"),
        (lambda: VGG("vgg16bn"), "Did you mean 'vgg16_bn'?"),
    ],
)
def test_unknown_backbones_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
