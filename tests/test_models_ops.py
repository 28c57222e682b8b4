"""The fast forms against the plain ones: the same values and gradients for any size, dtype and layout."""

import doors
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import ops
from models.layers import AveragePool2d, ConcatConvBNReLU, Conv2d, Upsample, resize, upsample_concat_conv

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def random(*shape, dtype=torch.float64, layout=torch.contiguous_format, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.contiguous(memory_format=layout).requires_grad_()


def both_forms(form, function, *inputs):
    """The result and the gradients of `inputs`, by the fast and by the plain form."""
    found = []
    for fast in (True, False):
        with ops.override(**{form: fast}):
            result = function(*inputs)
        factor = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view_as(result)
        found.append((result.detach(), *torch.autograd.grad((result.square() * factor).sum(), inputs)))
    return found


def test_a_form_is_forced_by_its_name_for_a_while():
    x = torch.zeros(1)
    with ops.override(resize=True), ops.override(unpool=True):
        assert ops.chosen("resize", x) and ops.chosen("unpool", x)
    assert not ops.chosen("resize", x) and not ops.chosen("unpool", x)
    with pytest.raises(ValueError, match="form must be one of .*; got resise"), ops.override(resise=True):
        pass


@pytest.mark.parametrize(
    ("kernel", "padding", "dilation", "groups"), [(3, 6, 6, 1), (3, 6, 6, 4), (7, 3, 1, 1), (1, 0, 1, 1)]
)
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (5, 5), (4, 6), (6, 3), (7, 5)])
def test_leaving_out_kernel_positions_that_only_see_padding_changes_nothing(
    kernel, padding, dilation, groups, size
):
    torch.manual_seed(0)
    conv = Conv2d(4, 8, kernel, padding=padding, dilation=dilation, groups=groups).double()
    inputs = random(2, 4, *size), conv.weight, conv.bias
    for ours, theirs in zip(*both_forms("inner_conv", lambda x, *_: conv(x), *inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(conv(inputs[0]), nn.Conv2d.forward(conv, inputs[0]))


@LAYOUTS
@pytest.mark.parametrize(("size", "dilation"), [((4, 4), 2), ((12, 12), 3), ((13, 17), 6), ((5, 20), 12)])
def test_a_depthwise_dilated_convolution_is_torchs(size, dilation, layout):
    x, weight, bias = random(2, 4, *size, layout=layout), random(4, 1, 3, 3), random(4)
    window = (1, 1), (dilation, dilation), (dilation, dilation), 4
    fast, plain = both_forms("depthwise", lambda *inputs: ops.conv2d(*inputs, *window), x, weight, bias)
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    if size == (4, 4):
        function = lambda x, weight: ops.depthwise(x, weight, None, dilation)  # noqa: E731
        assert torch.autograd.gradcheck(function, (x, weight))


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (lambda: Conv2d(32, 32, 3, padding=6, dilation=6, groups=32), (16, 16)),
        (lambda: Conv2d(32, 32, 3, padding=6, dilation=6, groups=32), (32, 32)),
        (lambda: Conv2d(32, 32, 3, padding=6, dilation=6, groups=32), (5, 33)),
        (lambda: Conv2d(512, 64, 7, padding=3), (2, 2)),
        (lambda: Conv2d(512, 64, 7, padding=3), (1, 4)),
    ],
)
def test_the_gradients_of_a_convolution_are_right_in_bf16(conv, size):
    """Torch's own (2.10 to 2.14, on a CPU) leave some of these weights as the memory was."""
    torch.manual_seed(0)
    conv, found = conv(), []
    for enabled in (False, True):
        torch.manual_seed(1)
        shapes = (2, conv.in_channels, *size), (2, conv.out_channels, *size)
        x, grad = (torch.randn(shape).to(memory_format=torch.channels_last) for shape in shapes)
        x, grad = x.requires_grad_(), grad.to(torch.bfloat16 if enabled else torch.float32)
        used = [torch.full_like(conv.weight, 1e9) for _ in range(4)]
        del used  # the gradient may be written to this memory
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            conv(x).backward(grad)
        found.append((x.grad, conv.weight.grad))
        conv.weight.grad = None
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() < 0.01 * one.norm()


SCORES = """
import torch
from models.fcn import FC_CHANNELS
from models.layers import Conv2d
score = Conv2d(FC_CHANNELS, 12, 1).to(memory_format=torch.channels_last)
for _ in range(6):
    x = torch.randn(4, FC_CHANNELS, 8, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        score(x).float().square().mean().backward()
    score.zero_grad(set_to_none=True)
    used = [torch.empty(1000 * n) for n in range(1, 60)]
"""


def test_the_gradient_of_a_few_scores_of_many_channels_stays_inside_its_memory(tmp_path):
    """In a process of its own: a write outside ends it with a signal."""
    (tmp_path / "script.py").write_text(SCORES)
    code, _, errors = doors.run([str(tmp_path / "script.py")], doors.ROOT, tmp_path / "log")
    assert code == 0, errors


def test_the_bias_is_added_afterwards_in_low_precision_on_a_cpu_alone():
    conv, x = Conv2d(32, 5, 1), random(2, 32, 6, 7, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        assert ops.chosen("split_bias", x.to(dtype)) == (dtype == torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.chosen("split_bias", x)
    inputs = x, conv.weight, conv.bias
    for ours, theirs in zip(*both_forms("split_bias", lambda x, *_: conv(x), *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_size", [0, 2])
@pytest.mark.parametrize("coarse", [(1, 1), (4, 6), (16, 24), (20, 3)])
def test_convolving_before_upsampling_and_concatenation_changes_nothing(coarse, at_size):
    torch.manual_seed(0)
    channels, sizes = [5, 3, 2], [coarse, (3, 3), (2, 5)]
    sizes[at_size] = (16, 24)
    block = ConcatConvBNReLU(sum(channels), 4).double()
    block[0].bias = nn.Parameter(torch.rand(4).double())
    maps = [random(2, c, *size, seed=c) for c, size in zip(channels, sizes, strict=True)]

    def apply(*maps_and_weights):
        maps = maps_and_weights[:3]
        return upsample_concat_conv(maps, block, like=maps[at_size])

    called = []
    block[0].register_forward_hook(lambda *_: called.append(1))
    fast, plain = both_forms("upsample_concat_conv", apply, *maps, block[0].weight, block[0].bias)
    assert called == [1]  # in the plain form
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_a_convolution_with_hooks_is_called():
    block, maps = ConcatConvBNReLU(3, 4), [torch.rand(1, 2, 4, 4), torch.rand(1, 1, 8, 8)]
    seen, conv = [], block[0]
    watch = lambda _, inputs: seen.append(inputs[0].shape)  # noqa: E731
    for register in (
        conv.register_forward_pre_hook,
        nn.modules.module.register_module_forward_pre_hook,
        block.register_forward_pre_hook,
    ):
        handle = register(watch)
        upsample_concat_conv(maps, block, like=maps[1])
        handle.remove()
        assert (1, 3, 8, 8) in seen
        seen.clear()
    upsample_concat_conv(maps, block, like=maps[1])
    assert not seen


def test_a_convolution_of_another_class_is_called():
    class Doubled(nn.Conv2d):  # as a quantizer's, which does more than convolve
        def forward(self, x):
            return 2 * super().forward(x)

    block, maps = ConcatConvBNReLU(3, 4), [torch.rand(1, 2, 4, 4), torch.rand(1, 1, 8, 8)]
    block[0] = Doubled(3, 4, 3, padding=1)
    expected = block(torch.cat([resize(maps[0], like=maps[1]), maps[1]], dim=1))
    torch.testing.assert_close(upsample_concat_conv(maps, block, like=maps[1]), expected)


@LAYOUTS
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "target"), [((4, 5), (8, 10)), ((1, 1), (3, 4)), ((7, 6), (33, 17)), ((9, 8), (4, 8))]
)
def test_resizing_by_products_is_interpolation(size, target, channels, layout):
    x = random(2, channels, *size, layout=layout)
    fast, plain = both_forms("resize", lambda x: ops.resize(x, target), x)
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert fast[0].is_contiguous(memory_format=layout) or size == (1, 1)  # which has both
    with ops.override(resize=True):
        assert torch.autograd.gradcheck(lambda x: ops.resize(x, target), x)


def test_resizing_by_products_keeps_the_dtype_under_autocast():
    x = random(1, 2, 4, 4, dtype=torch.float32)
    with ops.override(resize=True), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ops.resize(x, (8, 8)), F.interpolate(x, (8, 8), mode="bilinear"))


@LAYOUTS
def test_a_resized_map_among_others_has_torchs_gradient(layout):
    coarse, fine = random(2, 3, 4, 5, layout=layout), random(2, 3, 8, 10, layout=layout, seed=1)
    join = lambda x: torch.cat([resize(x, like=fine), fine, Upsample()(x)], dim=1)  # noqa: E731
    for ours, theirs in zip(*both_forms("resize_backward", join, coarse), strict=True):
        torch.testing.assert_close(ours, theirs)


@LAYOUTS
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(11, 16), (8, 8), (3, 5)])
def test_pooling_by_products_is_adaptive_pooling(bins, size, layout):
    x = random(2, 3, *size, layout=layout)
    for ours, theirs in zip(*both_forms("average_pool", AveragePool2d(bins), x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bins", [2, 3, 6])
def test_pooling_has_a_deterministic_gradient_where_that_is_asked_for(bins):
    x = random(2, 3, 8, 8)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            names = AveragePool2d(bins)(x).grad_fn.name()
        finally:
            torch.use_deterministic_algorithms(False)
        assert ("AdaptiveAvgPool" in names) == (not deterministic)  # that has none on a GPU


@LAYOUTS
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)])
def test_unpooling_by_positions_is_torchs(size, layout):
    x = random(2, 3, *size, layout=layout)

    def pool_and_unpool(x):
        padded = ops.pad_even(x)
        pooled, indices = F.max_pool2d(padded, 2, return_indices=True)
        indices = ops.pooling_indices(indices, padded.shape[3])
        return ops.crop(ops.max_unpool2d(pooled * pooled, indices), x.shape)

    fast, plain = both_forms("unpool", pool_and_unpool, x)
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


@LAYOUTS
def test_unpooling_by_positions_passes_gradcheck_and_keeps_the_layout(layout):
    x = random(1, 3, 3, 2, layout=layout)
    positions = torch.randint(0, 4, x.shape, dtype=torch.uint8)
    assert torch.autograd.gradcheck(lambda x: ops.max_unpool2d(x, positions), x)
    assert ops.max_unpool2d(x, positions).is_contiguous(memory_format=layout)


def test_unpooling_works_in_deterministic_mode():
    x = torch.rand(1, 2, 4, 4)
    pooled, indices = F.max_pool2d(x, 2, return_indices=True)
    expected = F.max_unpool2d(pooled, indices, 2)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(ops.max_unpool2d(pooled, ops.pooling_indices(indices, 4)), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_matrices_are_kept_and_can_be_used_in_training_after_inference():
    ops._cached_matrix.cache_clear()
    like = torch.rand(1, 2, 4, 4)
    with ops.override(resize=True):
        with torch.inference_mode():
            ops.resize(torch.rand(1, 2, 4, 4), (6, 8))
        ops.resize(like.requires_grad_(), (6, 8)).sum().backward()
        ops.resize(like.double(), (6, 8))
    assert (ops._cached_matrix.cache_info().misses, ops._cached_matrix.cache_info().hits) == (4, 2)
    assert like.grad is not None and ops._cached_matrix.cache_info().maxsize == 64


@pytest.mark.parametrize("recorder", ["export", "compile"])
def test_what_a_compiler_records_does_not_stay_in_the_cache(recorder):
    ops._cached_matrix.cache_clear()
    block = ConcatConvBNReLU(3, 4).eval()

    class Model(nn.Module):
        def forward(self, coarse, fine):
            return ops.average_pool(upsample_concat_conv([coarse, fine], block, like=fine), 3)

    inputs = torch.rand(1, 2, 4, 4), torch.rand(1, 1, 8, 8)
    with torch.no_grad(), ops.override(average_pool=True):
        if recorder == "export":
            recorded = torch.export.export(Model(), inputs).module()
        else:
            recorded = torch.compile(Model(), backend="eager", fullgraph=True)
        found = recorded(*inputs)
        assert ops._cached_matrix.cache_info().currsize == 0
        torch.testing.assert_close(found, Model()(*inputs))


@pytest.mark.parametrize("form", ["average_pool", "depthwise", "resize", "unpool", "upsample_concat_conv"])
def test_every_form_with_gradients_can_be_compiled(form):
    torch.compiler.reset()
    block, conv = ConcatConvBNReLU(3, 4), Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)

    def model(coarse, fine):
        x = conv(upsample_concat_conv([coarse, fine], block, like=fine))
        x, indices = F.max_pool2d(resize(x, like=fine) + ops.resize(x, (8, 8)), 2, return_indices=True)
        return ops.average_pool(ops.max_unpool2d(x, ops.pooling_indices(indices, 8)), 3)

    inputs = random(1, 2, 4, 4, dtype=torch.float32), random(1, 1, 8, 8, dtype=torch.float32)
    with ops.override(**{form: True}):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = [torch.autograd.grad(each(*inputs).square().sum(), inputs) for each in (model, compiled)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
