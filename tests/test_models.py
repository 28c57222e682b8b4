"""The networks: shapes, counts, and what holds for each of them with any settings."""

import copy
import functools
import inspect
import shutil
from pathlib import Path
from unittest import mock

import doors
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from models import FCN, MODELS, DeepLabV3Plus, PSPNet, SegNet, UNet, build_model, ops
from models.backbones import VGGS
from models.layers import DepthwiseSeparableConv, PooledBatchNorm2d

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


def images_of(*size: int) -> torch.Tensor:
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
    sum(logits.square().mean() for logits in as_tuple(model(images_of(1, 3, 32, 33)))).backward()
    for key, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), key
    model.zero_grad()


def test_pooled_batch_norm_is_the_ordinary_one_but_for_a_single_value():
    pooled, ordinary = PooledBatchNorm2d(4), nn.BatchNorm2d(4)
    several = images_of(2, 4, 1, 1)
    assert torch.equal(pooled(several), ordinary(several))
    assert torch.equal(pooled.running_var, ordinary.running_var)
    before = {key: value.clone() for key, value in pooled.state_dict().items()}
    expected = (several[:1] - pooled.running_mean[:, None, None]) / (pooled.running_var + 1e-5).sqrt()[
        :, None, None
    ]
    torch.testing.assert_close(pooled(several[:1]), expected)
    assert all(torch.equal(value, before[key]) for key, value in pooled.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_prediction_does_not_depend_on_the_other_images_of_its_batch(name):
    model, images = small_model(name).eval(), images_of(3, 3, 49, 64)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_gives_the_same_logits_and_stays_channels_last(name):
    model, images = small_model(name).eval(), images_of(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)
        logits = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    model.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert logits.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(32, 64), (33, 47)])
def test_the_images_are_never_written_to(name, size):
    images = images_of(2, 3, *size)
    before = images.clone()
    for training in (True, False):
        small_model(name).train(training)(images)
        assert torch.equal(images, before)


@pytest.mark.parametrize("name", MODELS)
def test_one_optimizer_step_changes_every_parameter(name):
    model = small_model(name).train()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = torch.randint(0, 3, (2, 64, 64), generator=torch.Generator().manual_seed(2))
    loss = sum(
        nn.functional.cross_entropy(logits, labels) for logits in as_tuple(model(images_of(2, 3, 64, 64)))
    )
    loss.backward()
    optimizer.step()
    unchanged = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    model.load_state_dict(before, strict=False)
    model.zero_grad()
    assert unchanged == []


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_makes_an_equal_model(name):
    first = small_model(name).eval()
    with torch.device("meta"):
        second = build_small(name).eval()
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()}, assign=True)
    images = images_of(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(second(images), first(images))


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_is_one_graph_with_the_same_logits(name):
    torch.compiler.reset()
    model = small_model(name).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images_of(2, 3, 33, 65)), model(images_of(2, 3, 33, 65)))
    compiled.train()(images_of(1, 3, 32, 32))  # the branch for a pooled map of one value


@pytest.mark.parametrize("name", MODELS)
def test_images_that_do_not_fit_are_refused(name):
    with pytest.raises(ValueError, match=r"at least 32 pixels .* got 31 x 64"):
        small_model(name)(torch.zeros(1, 3, 31, 64))
    with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\).* got \(1, 4, 64, 64\)"):
        small_model(name)(torch.zeros(1, 4, 64, 64))


@pytest.mark.parametrize(
    ("name", "num_classes", "options", "message"),
    [
        ("unett", 2, {}, r"model must be one of .*unet, deeplabv3plus, .*got 'unett'. Did you mean 'unet'\?"),
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
def test_invalid_arguments_are_refused_with_the_reason(name, num_classes, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes, **options)


@pytest.mark.parametrize("name", MODELS)
def test_options_are_keyword_only_and_spelt_out(name):
    _, num_classes, in_channels, *options = inspect.signature(MODELS[name].__init__).parameters.values()
    assert (num_classes.name, in_channels.name, in_channels.default) == ("num_classes", "in_channels", 3)
    assert all(option.kind is inspect.Parameter.KEYWORD_ONLY for option in options)


def test_pspnet_gives_its_auxiliary_logits_in_training_only():
    model = small_model("pspnet")
    logits, aux_logits = model.train()(images_of(1, 3, 33, 40))
    assert logits.shape == aux_logits.shape == (1, 3, 33, 40)
    assert isinstance(model.eval()(images_of(1, 3, 33, 40)), torch.Tensor)


def test_separable_deeplab_has_no_other_3x3_outside_its_backbone():
    with torch.device("meta"):
        model = DeepLabV3Plus(3, backbone="resnet18", separable=True)
    heads = [module for part in (model.aspp, model.fuse, model.refine) for module in part.modules()]
    kernels = [module for module in heads if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    assert len(kernels) == sum(isinstance(module, DepthwiseSeparableConv) for module in heads) == 5
    assert all(kernel.groups == kernel.in_channels for kernel in kernels)


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
    x = images_of(1, 3, 4, 5)
    for up in ups:
        up.to_empty(device="cpu").init_bilinear()
        resized = nn.functional.interpolate(x, scale_factor=up.factor, mode="bilinear")
        inside = (..., slice(up.factor, -up.factor), slice(up.factor, -up.factor))
        torch.testing.assert_close(up(x)[inside], resized[inside])


def test_unet_pads_an_odd_size_with_zeros_at_the_end():
    up = UNet(3, base_channels=4).decoder1.eval()
    seen = []
    up.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, skip = images_of(1, 8, 16, 16), images_of(1, 4, 33, 32)
    up(x, skip)
    assert torch.equal(seen[0][:, :4], skip)
    assert torch.equal(seen[0][:, 4:, :32], up.up(x)) and not seen[0][:, 4:, 32].any()


def test_segnet_unpools_values_to_the_positions_of_their_maxima():
    model = SegNet(2, base_channels=4).eval()
    seen = []
    model.backbone.features[5].register_forward_hook(lambda _, inputs, output: seen.append(output))
    model.decoder1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images_of(1, 3, 32, 34))
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


def test_the_five_networks_are_exported_by_name():
    assert {UNet, DeepLabV3Plus, PSPNet, FCN, SegNet} <= set(MODELS.values())


def leaves(model):
    return {name: module for name, module in model.named_modules() if not [*module.children()]}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_called_with_one_tensor(name, training):
    model, seen = small_model(name).train(training), {}

    def watch(layer, inputs, output):
        seen[layer] = inputs, output

    handles = [layer.register_forward_hook(watch) for layer in leaves(model).values()]
    model(images_of(2, 3, 64, 65))
    for handle in handles:
        handle.remove()
    for key, layer in leaves(model).items():
        if key.startswith("aux") and not training:
            continue
        inputs, output = seen[layer]
        assert len(inputs) == 1 and type(inputs[0]) is torch.Tensor, key
        returned = output if isinstance(output, tuple) else (output,)  # max pooling also returns indices
        assert all(type(value) is torch.Tensor for value in returned), key


@pytest.mark.parametrize("name", MODELS)
def test_the_flop_counter_counts_each_convolution_as_torch_computes_it(name):
    with torch.device("meta"):
        model, images = build_small(name).eval(), torch.empty(1, 3, 512, 512)  # no kernel larger than its map
    found = []
    for forms in ({}, dict.fromkeys(ops.FORMS, False)):
        with ops.override(**forms), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


@pytest.mark.filterwarnings("ignore:NOTE. The nodes")  # of PSPNet, whose training has more
@pytest.mark.parametrize("name", MODELS)
def test_features_can_be_extracted_by_torch_fx(name):
    model = small_model(name)
    train_nodes, eval_nodes = get_graph_node_names(model)
    last = [node for node in eval_nodes if "classifier" in node or "score" in node or "head" in node][-1]
    assert last in train_nodes
    extractor = create_feature_extractor(model, {last: "features"}).eval()
    for size in ((64, 64), (33, 47)):
        images = images_of(2, 3, *size)
        assert extractor(images)["features"].shape[:2] == (2, 3)
        traced = torch.fx.symbolic_trace(model.eval())
        torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("name", MODELS)
def test_a_quantizer_can_observe_the_convolutions(name):
    model = copy.deepcopy(small_model(name)).eval()
    model.qconfig = torch.ao.quantization.default_qconfig
    prepared = torch.ao.quantization.prepare(model)
    prepared(images_of(1, 3, 64, 64))
    for key, layer in prepared.named_modules():
        if type(layer) is nn.Conv2d and not key.startswith("aux"):  # which only training calls
            assert torch.isfinite(layer.activation_post_process.max_val), key


def test_the_activation_of_unet_is_one_line_that_changes_no_other_network(monkeypatch):
    monkeypatch.setattr("models.unet.ACTIVATION", nn.GELU)
    types = [type(module) for module in build_small("unet").modules()]
    assert types.count(nn.GELU) == 18 and nn.ReLU not in types
    for name in set(MODELS) - {"unet"}:
        assert not any(isinstance(module, nn.GELU) for module in build_small(name).modules())


def test_images_of_whole_numbers_are_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match="must be floating point; got torch.uint8. Convert them with .float()"
    ):
        build_model("unet", 2, base_channels=4)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
