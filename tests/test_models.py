"""The five networks: shapes, counts, and what a user may rely on whatever the settings."""

import functools
import inspect
import shutil
from pathlib import Path
from unittest import mock

import doors
import pytest
import torch
from torch import nn

from models import FCN, MODELS, DeepLabV3Plus, PSPNet, SegNet, UNet, build_model
from models.backbones import VGGS
from models.fcn import Score
from models.layers import (
    AtrousConv2d,
    AtrousDepthwise,
    AveragePool2d,
    InnerConv2d,
    MergingConv2d,
    PooledBatchNorm2d,
    SeparableConvBNReLU,
    Upsample,
    resize,
)

ROOT = Path(__file__).parent.parent
SMALL = {  # cheap settings; a network without an entry is tested with its defaults
    "unet": {"base_channels": 4},
    "deeplabv3plus": {"backbone": "resnet18"},
    "pspnet": {"backbone": "resnet18", "aux": True},
    "fcn": {"backbone": "vgg11_bn"},
    "segnet": {"base_channels": 4},
}
VARIANTS = [
    *[("unet", {"bilinear": bilinear}) for bilinear in (False, True)],
    *[
        (name, {"backbone": backbone, "output_stride": stride, choice: chosen})
        for name, choice in (("deeplabv3plus", "separable"), ("pspnet", "aux"))
        for backbone in ("resnet18", "resnet50")  # one of each kind of block
        for stride in (8, 16)
        for chosen in (False, True)
    ],
    *[
        (name, {"backbone": deep})
        for name in ("deeplabv3plus", "pspnet")
        for deep in ("resnet34", "resnet101")
    ],
    *[("fcn", {"backbone": vgg, "variant": variant}) for vgg in VGGS for variant in ("8s", "16s", "32s")],
    ("segnet", {}),
]


def build_small(name: str) -> nn.Module:
    with mock.patch("models.fcn.FC_CHANNELS", 32):  # as narrow_fcn, for models that are kept
        return build_model(name, 3, **SMALL.get(name, {}))


@functools.cache
def small_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_small(name)


def as_tuple(logits):
    return logits if isinstance(logits, tuple) else (logits,)


def pictures(*size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: str(value))
def test_logits_have_the_height_and_width_of_the_images(name, options):
    with torch.device("meta"):  # shapes alone, no arithmetic
        model = build_model(name, 5, 2, **options)
        for training, size in ((False, (33, 48)), (True, (32, 101))):  # odd and even at every stride
            for logits in as_tuple(model.train(training)(torch.empty(1, 2, *size))):
                assert logits.shape == (1, 5, *size)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("unet", {}, 31_038_933),
        ("unet", {"bilinear": True}, 17_264_277),
        ("segnet", {}, 29_455_125),
        ("deeplabv3plus", {"backbone": "resnet18"}, 16_608_181),
        ("deeplabv3plus", {"backbone": "resnet34"}, 26_716_341),
        ("deeplabv3plus", {}, 40_352_181),
        ("deeplabv3plus", {"backbone": "resnet101"}, 59_344_309),
        ("deeplabv3plus", {"separable": True}, 26_696_133),
        ("pspnet", {"backbone": "resnet18", "aux": True}, 16_319_018),
        ("pspnet", {"backbone": "resnet34", "aux": True}, 26_427_178),
        ("pspnet", {"aux": True}, 48_957_802),
        ("pspnet", {"backbone": "resnet101", "aux": True}, 67_949_930),
        ("pspnet", {}, 46_592_597),
        ("pspnet", {"backbone": "resnet101"}, 65_584_725),
        ("fcn", {"backbone": "vgg11"}, 128_995_551),
        ("fcn", {"backbone": "vgg13"}, 129_180_063),
        ("fcn", {"backbone": "vgg16"}, 134_489_759),
        ("fcn", {"backbone": "vgg19"}, 139_799_455),
        ("fcn", {"backbone": "vgg16", "variant": "16s"}, 134_815_994),
        ("fcn", {"backbone": "vgg16", "variant": "32s"}, 136_152_917),
    ],
    ids=str,
)
def test_parameter_counts_are_those_of_the_papers_and_of_the_docstring(name, options, count):
    with torch.device("meta"):
        model = build_model(name, 21, **options)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == count
    assert f"{count:,}" in " ".join(MODELS[name].__doc__.split())


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_one_trains(name):
    model = small_model(name).train()
    sum(logits.square().mean() for logits in as_tuple(model(pictures(1, 3, 32, 33)))).backward()
    for key, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), key
    model.zero_grad()


def test_pooled_batch_norm_is_the_ordinary_one_but_for_a_single_value():
    pooled, ordinary = PooledBatchNorm2d(4), nn.BatchNorm2d(4)
    several = pictures(2, 4, 1, 1)
    assert torch.equal(pooled(several), ordinary(several))
    assert torch.equal(pooled.running_var, ordinary.running_var)
    before = {key: value.clone() for key, value in pooled.state_dict().items()}
    expected = (several[:1] - pooled.running_mean[:, None, None]) / (pooled.running_var + 1e-5).sqrt()[
        :, None, None
    ]
    torch.testing.assert_close(pooled(several[:1]), expected)
    assert all(torch.equal(value, before[key]) for key, value in pooled.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_prediction_does_not_depend_on_the_other_pictures_of_its_batch(name):
    model, images = small_model(name).eval(), pictures(3, 3, 49, 64)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_gives_the_same_logits_and_stays_channels_last(name):
    model, images = small_model(name).eval(), pictures(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)
        logits = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    model.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert logits.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(32, 64), (33, 47)])
def test_the_images_are_never_written_to(name, size):
    images = pictures(2, 3, *size)
    before = images.clone()
    for training in (True, False):
        small_model(name).train(training)(images)
        assert torch.equal(images, before)


@pytest.mark.parametrize("name", MODELS)
def test_one_optimizer_step_moves_every_parameter(name):
    model = small_model(name).train()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = torch.randint(0, 3, (2, 64, 64), generator=torch.Generator().manual_seed(2))
    loss = sum(
        nn.functional.cross_entropy(logits, labels) for logits in as_tuple(model(pictures(2, 3, 64, 64)))
    )
    loss.backward()
    optimizer.step()
    still = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    model.load_state_dict(before, strict=False)
    model.zero_grad()
    assert still == []


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_makes_an_equal_model(name):
    first = small_model(name).eval()
    with torch.device("meta"):
        second = build_small(name).eval()
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()}, assign=True)
    images = pictures(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(second(images), first(images))


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_is_one_graph_with_the_same_logits(name):
    torch.compiler.reset()
    model = small_model(name).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pictures(2, 3, 33, 65)), model(pictures(2, 3, 33, 65)))
    compiled.train()(pictures(1, 3, 32, 32))  # the branch for a pooled map of one value


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(11, 16), (8, 8), (3, 5)])
def test_pooling_by_products_equals_adaptive_pooling_and_has_a_deterministic_gradient(bins, size):
    pool, found = AveragePool2d(bins), []
    try:
        for asked in (False, True):
            torch.use_deterministic_algorithms(asked)
            x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
            y = pool(x)
            assert ("AdaptiveAvgPool" in y.grad_fn.name()) == (not asked and bins > 1)  # none such on a GPU
            y.square().sum().backward()
            found.append((y.detach(), x.grad))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_images_that_do_not_fit_are_refused(name):
    with pytest.raises(ValueError, match=r"at least 32 pixels .* got 31 x 64"):
        small_model(name)(torch.zeros(1, 3, 31, 64))
    with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\).* got \(1, 4, 64, 64\)"):
        small_model(name)(torch.zeros(1, 4, 64, 64))


@pytest.mark.parametrize(
    ("name", "num_classes", "options", "message"),
    [
        ("unett", 2, {}, "model must be one of unet.*got 'unett'. Did you mean 'unet'?"),
        (
            "unet",
            2,
            {"backbone": "resnet50"},
            "an option of unet must be one of base_channels.*got 'backbone'. Leave it out",
        ),
        ("pspnet", 2, {"output_strid": 8}, "Did you mean 'output_stride'?"),
        ("unet", 1, {}, "num_classes must be a whole number of 2 or more; got 1. Count the background"),
        ("unet", 2, {"base_channels": 0}, "base_channels must be .* got 0"),
        ("segnet", 2, {"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ("fcn", 2, {"variant": "4s"}, "variant must be one of 8s, 16s, 32s; got '4s'"),
        ("fcn", 2, {"backbone": "resnet50"}, "backbone must be one of vgg11.*got 'resnet50'"),
        ("deeplabv3plus", 2, {"backbone": "resnet51"}, "Did you mean 'resnet50'?"),
        ("deeplabv3plus", 2, {"output_stride": 32}, "output_stride must be one of 16, 8; got 32"),
        ("pspnet", 2, {"backbone": ["resnet18"]}, r"backbone must be one of resnet18.*got \['resnet18'\]"),
        ("pspnet", 2, {"backbone": "vgg16"}, "backbone must be one of resnet18.*got 'vgg16'"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(name, num_classes, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes, **options)


@pytest.mark.parametrize("name", MODELS)
def test_options_are_keyword_only_and_spelt_out(name):
    _, num_classes, in_channels, *options = inspect.signature(MODELS[name].__init__).parameters.values()
    assert (num_classes.name, in_channels.name, in_channels.default) == ("num_classes", "in_channels", 3)
    assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options)


def test_pspnet_gives_its_auxiliary_logits_in_training_only():
    model = small_model("pspnet")
    logits, aux_logits = model.train()(pictures(1, 3, 33, 40))
    assert logits.shape == aux_logits.shape == (1, 3, 33, 40)
    assert isinstance(model.eval()(pictures(1, 3, 33, 40)), torch.Tensor)


def test_separable_deeplab_has_no_other_3x3_outside_its_backbone():
    with torch.device("meta"):
        model = DeepLabV3Plus(3, backbone="resnet18", separable=True)
    heads = [module for part in (model.aspp, model.decoder) for module in part.modules()]
    kernels = [module for module in heads if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    assert len(kernels) == sum(isinstance(module, SeparableConvBNReLU) for module in heads) == 5
    assert all(kernel.groups == kernel.in_channels for kernel in kernels)


@pytest.mark.parametrize(
    ("make", "padding", "dilation", "groups"),
    [
        (lambda: AtrousConv2d(4, 8, dilation=6), 6, 6, 1),
        (lambda: AtrousConv2d(4, 8, dilation=6, groups=4), 6, 6, 4),
        (lambda: InnerConv2d(4, 8, kernel=7), 3, 1, 1),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (5, 5), (4, 6), (6, 3), (7, 5)])
def test_taps_that_see_padding_alone_are_left_out_without_a_trace(make, padding, dilation, groups, size):
    torch.manual_seed(0)
    conv, x = make().double(), torch.rand(2, 4, *size).double()
    whole = conv.weight.detach().clone().requires_grad_()
    ours = conv(x)
    theirs = nn.functional.conv2d(x, whole, conv.bias, 1, padding, dilation, groups)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(conv.weight.grad, whole.grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "dilation"), [((4, 4), 2), ((12, 12), 3), ((13, 17), 6), ((5, 20), 12)])
def test_a_depthwise_atrous_convolution_is_torchs(size, dilation, layout):
    torch.manual_seed(0)
    conv, x = AtrousConv2d(4, 4, dilation, groups=4).double(), torch.rand(2, 4, *size).double()
    conv.bias = nn.Parameter(torch.rand(4).double())
    x, again = (x.contiguous(memory_format=layout).requires_grad_() for _ in range(2))
    weight = conv.weight.detach().clone().requires_grad_()
    ours = conv(x)
    theirs = nn.functional.conv2d(again, weight, conv.bias, padding=dilation, dilation=dilation, groups=4)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for one, other in ((ours, theirs), (x.grad, again.grad), (conv.weight.grad, weight.grad)):
        torch.testing.assert_close(one, other)
    if size == (4, 4):
        assert torch.autograd.gradcheck(AtrousDepthwise.apply, (x, weight, dilation))


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: AtrousConv2d(32, 32, dilation=6, groups=32), (16, 16)),
        (lambda: AtrousConv2d(32, 32, dilation=6, groups=32), (32, 32)),
        (lambda: AtrousConv2d(32, 32, dilation=6, groups=32), (5, 33)),
        (lambda: InnerConv2d(512, 64, kernel=7), (2, 2)),
        (lambda: InnerConv2d(512, 64, kernel=7), (1, 4)),
    ],
)
def test_the_gradients_of_a_convolution_are_right_in_bf16(make, size):
    """Torch's own (2.10 to 2.14, on a CPU) are wrong for some of these weights: what lay there before."""
    torch.manual_seed(0)
    conv, found = make(), []
    for enabled in (False, True):
        torch.manual_seed(1)
        shapes = (2, conv.in_channels, *size), (2, conv.out_channels, *size)
        x, grad = (torch.randn(shape).to(memory_format=torch.channels_last) for shape in shapes)
        x, grad = x.requires_grad_(), grad.to(torch.bfloat16 if enabled else torch.float32)
        kept = [torch.full_like(conv.weight, 1e9) for _ in range(4)]
        del kept  # for the gradient to lie on
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            conv(x).backward(grad)
        found.append((x.grad, conv.weight.grad))
        conv.weight.grad = None
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() < 0.01 * one.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_resized_map_among_others_has_torchs_gradient(layout):
    torch.manual_seed(0)
    coarse, again = (torch.rand(2, 3, 4, 5).to(memory_format=layout).requires_grad_() for _ in range(2))
    again.data.copy_(coarse.data)
    fine, factor = (torch.rand(2, each, 8, 10).to(memory_format=layout) for each in (2, 8))
    theirs = nn.functional.interpolate(again, scale_factor=2, mode="bilinear")
    (torch.cat([resize(coarse, like=fine), fine, Upsample()(coarse)], dim=1) * factor).sum().backward()
    (torch.cat([theirs, fine, theirs], dim=1) * factor).sum().backward()
    torch.testing.assert_close(coarse.grad, again.grad)


@pytest.mark.parametrize("fine", [0, 2])
@pytest.mark.parametrize("coarse", [(1, 1), (4, 6), (16, 24), (20, 3)])
def test_maps_are_merged_as_by_resizing_and_convolving(coarse, fine):
    torch.manual_seed(0)
    channels, sizes = [5, 3, 2], [coarse, (3, 3), (2, 5)]
    sizes[fine] = (16, 24)
    maps = [torch.rand(2, *shape).double() for shape in zip(channels, *zip(*sizes, strict=True), strict=True)]
    conv = MergingConv2d(channels, 4, fine=fine).double()
    conv.bias = nn.Parameter(torch.rand(4).double())
    weight = conv.weight.detach().clone().requires_grad_()
    resized = [nn.functional.interpolate(x, size=(16, 24), mode="bilinear") for x in maps]
    ours = conv(maps)
    theirs = nn.functional.conv2d(torch.cat(resized, dim=1), weight, conv.bias, padding=1)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(conv.weight.grad, weight.grad)


@pytest.mark.parametrize("stride", [8, 16])
def test_deeplab_looks_equally_far_at_both_output_strides(stride):
    with torch.device("meta"):
        model = DeepLabV3Plus(3, backbone="resnet18", output_stride=stride)
    reach = [branch[0].dilation[0] * stride for branch in model.aspp.atrous]
    assert reach == [96, 192, 288]  # pixels of the image


@pytest.mark.parametrize(("variant", "factors"), [("8s", (2, 2, 8)), ("16s", (2, 16)), ("32s", (32,))])
def test_fcn_upsampling_starts_as_bilinear_resizing(variant, factors):
    with torch.device("meta"):
        model = FCN(3, backbone="vgg11", variant=variant)
    ups = [module for module in model.modules() if isinstance(module, nn.ConvTranspose2d)]
    assert sorted(up.factor for up in ups) == sorted(factors)
    x = pictures(1, 3, 4, 5)
    for up in ups:
        up.to_empty(device="cpu").start_bilinear()
        resized = nn.functional.interpolate(x, scale_factor=up.factor, mode="bilinear")
        inside = (..., slice(up.factor, -up.factor), slice(up.factor, -up.factor))
        torch.testing.assert_close(up(x)[inside], resized[inside])


def test_unet_sets_an_odd_size_back_with_zeros_at_the_end():
    up = UNet(3, base_channels=4).dec1.eval()
    seen = []
    up.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, skip = pictures(1, 8, 16, 16), pictures(1, 4, 33, 32)
    up(x, skip)
    assert torch.equal(seen[0][:, :4], skip)
    assert torch.equal(seen[0][:, 4:, :32], up.up(x)) and not seen[0][:, 4:, 32].any()


def test_segnet_sets_values_back_where_their_maxima_stood():
    model = SegNet(2, base_channels=4).eval()
    seen = []
    model.backbone.features[5].register_forward_hook(lambda _, inputs, output: seen.append(output))
    model.decoder1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(pictures(1, 3, 32, 34))
    before, after = (x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2) for x in seen)  # windows of four
    kept = after != 0
    assert kept.any() and kept.sum(-1).max() == 1
    assert torch.equal(before.argmax(-1)[kept.any(-1)], kept.int().argmax(-1)[kept.any(-1)])


@pytest.mark.parametrize("name", MODELS)
def test_torch_hub_builds_each_network(name):
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), name, source="local", num_classes=21, in_channels=4)
    assert type(model) is MODELS[name] and model.in_channels == 4


def test_the_folder_alone_runs_with_torch_as_the_only_package(tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import os, sys\n"
        "for name in ('torchvision', 'PIL', 'matplotlib', 'config', 'utils'): sys.modules[name] = None\n"
        "sys.path.insert(0, '.')\n"
        "import torch, models\n"
        "for name in models.MODELS:\n"
        "    with torch.device('meta'): models.build_model(name, 2)(torch.empty(2, 3, 64, 64))\n"
        "model = models.build_model('segnet', 2, base_channels=2)\n"
        "print(os.path.abspath(models.__path__[0]), tuple(model(torch.rand(1, 3, 32, 40)).shape))\n"
    )
    (tmp_path / "alone.py").write_text(code)
    done = doors.run(["alone.py"], tmp_path, tmp_path / "printed")
    assert done == (0, f"{tmp_path / 'models'} (1, 2, 32, 40)\n", "")


def test_every_network_is_exported_by_name():
    assert set(MODELS.values()) == {UNet, DeepLabV3Plus, PSPNet, FCN, SegNet}


def test_an_atrous_convolution_keeps_a_bias_on_small_maps():
    conv = AtrousConv2d(2, 3, dilation=12)
    conv.bias = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(
        conv(torch.zeros(1, 2, 5, 5)), conv.bias[None, :, None, None].expand(1, 3, 5, 5)
    )


SCORES = """
import torch
from models.fcn import FC_CHANNELS, Score
score = Score(FC_CHANNELS, 12).to(memory_format=torch.channels_last)
for _ in range(6):
    x = torch.randn(4, FC_CHANNELS, 8, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        score(x).float().square().mean().backward()
    score.zero_grad(set_to_none=True)
    kept = [torch.empty(1000 * n) for n in range(1, 60)]
"""


def test_the_gradient_of_the_few_scores_of_many_channels_stays_in_its_place(tmp_path):
    """In a process of its own: where it does not, that ends by a signal."""
    (tmp_path / "script.py").write_text(SCORES)
    code, _, errors = doors.run([str(tmp_path / "script.py")], doors.ROOT, tmp_path / "log")
    assert code == 0, errors


def test_scores_are_those_of_a_convolution():
    score, conv = Score(32, 5), torch.nn.Conv2d(32, 5, kernel_size=1)
    conv.load_state_dict(score.state_dict())
    x = torch.randn(2, 32, 6, 7)
    assert torch.allclose(score(x), conv(x), atol=1e-6)
    for layer in (score, conv):
        layer(x).square().sum().backward()
    assert torch.allclose(score.weight.grad, conv.weight.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(score.bias.grad, conv.bias.grad, rtol=1e-4, atol=1e-4)
