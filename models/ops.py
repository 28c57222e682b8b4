"""Faster equivalents of torch operations and workarounds for torch bugs, each beside its plain form.

Both forms of a pair give the same result up to rounding, and the same gradients. `FORMS` names the pairs and
holds the only place where a form is chosen; `override` forces one, for tests and benchmarks. While
`torch.export` or `torch.fx` records a network, standard operations without branches on a size are used.
Measured gains are the plain form's CPU time over the fast one's, forward and backward, channels_last, batch 4
(convolutions for prediction: forward, batch 1), on one thread of an AMD EPYC with avx512_bf16, torch 2.14.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling, is_exporting
from torch.nn.modules.module import _has_any_global_hook

FORMS: dict[str, Callable[[Tensor], bool]] = {  # name: whether the fast form is the default for an input
    "upsample_concat_conv": lambda x: not is_exporting(),  # export would fix the sizes of its matrices
    "depthwise": lambda x: x.is_cpu and not is_exporting(),
    "inner_conv": lambda x: not is_exporting(),  # branches on a size
    "split_bias": lambda x: x.is_cpu and _low_precision(x) and not is_exporting(),
    # ONNX lacks adaptive pooling of free sizes, mps that to bins that do not divide the size
    "average_pool": lambda x: is_exporting() or x.device.type == "mps" or _deterministic(),
    "resize": lambda x: x.device.type in ("cuda", "mps") and x.requires_grad and not is_exporting(),
    "resize_backward": lambda x: not is_compiling(),
    "unpool": lambda x: (x.is_cuda and not is_compiling()) or (_deterministic() and not is_exporting()),
    "winograd": lambda x: x.is_cpu and (x.dtype == torch.float32 or not _has_amx()),
    "pointwise": lambda x: x.is_cpu,
}
_forced: dict[str, bool] = {}


def chosen(form: str, x: Tensor, *bypassed: nn.Module) -> bool:
    """Return whether the fast form is used on `x`.

    A fast form that does the work of modules without calling them names these as `bypassed`. It is not used
    where such a call would do more than compute: where a hook is registered on one of them or on all modules,
    as summaries, FLOP counters and feature extraction do.
    """
    if isinstance(x, torch.fx.Proxy):
        return False
    if form in _forced:
        return _forced[form]
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in bypassed):
        return False
    if bypassed and not is_compiling() and _has_any_global_hook():
        return False
    return FORMS[form](x)


@contextmanager
def override(**forms: bool) -> Iterator[None]:
    """Force forms by name: True for the fast one, False for the plain one.

    Example:
        >>> with override(resize=True):
        ...     resize(torch.ones(1, 1, 2, 2), (3, 3)).sum().item()
        9.0
    """
    if unknown := forms.keys() - FORMS.keys():
        names = ", ".join(FORMS)
        raise ValueError(f"form must be one of {names}; got {', '.join(unknown)}. Correct the name.")
    before = dict(_forced)
    _forced.update(forms)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _low_precision(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")


@lru_cache
def _has_amx() -> bool:
    """Return whether this CPU multiplies tiles of bfloat16, as Linux describes it."""
    path = Path("/proc/cpuinfo")
    return path.exists() and "amx_bf16" in path.read_text(encoding="ascii", errors="ignore").split()


# Convolution ------------------------------------------------------------------------------------------------


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """`F.conv2d`, by `depthwise`, `inner_kernel` or with the bias added afterwards where that is chosen.

    The bias: with bfloat16 on a CPU with AMX, oneDNN writes past the end of its gradient where 4096 channels
    become fewer than 16, on two threads (torch 2.14). That ends the process or corrupts other tensors.
    """
    arguments = stride, padding, dilation, groups
    if isinstance(x, torch.fx.Proxy):
        return F.conv2d(x, weight, bias, *arguments)
    reach = [step * (kernel // 2) for step, kernel in zip(dilation, weight.shape[2:], strict=True)]
    if stride != (1, 1) or list(padding) != reach:  # the fast forms are for kernels that keep the size
        return F.conv2d(x, weight, bias, *arguments)
    per_channel = weight.shape[1:] == (1, 3, 3) and groups == len(weight) and dilation[0] == dilation[1]
    if chosen("depthwise", x) and per_channel and 1 < dilation[0] < max(x.shape[-2:]):
        return depthwise(x, weight, bias, dilation[0])
    if chosen("inner_conv", x):
        weight, padding = inner_kernel(weight, x.shape[-2:], dilation)
    if bias is not None and weight.shape[2:] == (1, 1) and chosen("split_bias", x):
        x = F.conv2d(x, weight, None, stride, padding, dilation, groups)
        return x + bias[:, None, None].to(x.dtype)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def inner_kernel(
    weight: Tensor, size: torch.Size, dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Return the weights of a size-keeping convolution that can touch a map of `size`, and their padding.

    The others only ever see padding. Torch's gradient of such weights is wrong in bfloat16 on CPUs (2.10 to
    2.14; 7x7 on maps of one or two rows). No gain in speed: 0.97 for FCN's fc6 on a map of 4x4, float32.
    """
    slices, padding = [], []
    for kernel, side, step in zip(weight.shape[2:], size, dilation, strict=True):
        reach = min(kernel // 2, (side - 1) // step)
        slices.append(slice(kernel // 2 - reach, kernel // 2 + reach + 1))
        padding.append(reach * step)
    return weight[:, :, slices[0], slices[1]], (padding[0], padding[1])


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=dilation, dilation=dilation, groups=channels)` of a 3x3 kernel.

    Torch's gradient of the weights is wrong in bfloat16 on CPUs, up to 1e36, on channels_last maps of 32x32
    and more (2.10 to 2.14). Gain for 512 channels of 32x32, rate 6: 1.4 in bfloat16, 0.9 in float32.
    """
    if torch.is_autocast_enabled("cpu"):
        x, weight = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight))
    x = _Depthwise.apply(x, weight, dilation)
    return x if bias is None else x + bias[:, None, None]


class _Depthwise(torch.autograd.Function):
    """(N, C, H, W), (C, 1, 3, 3), dilation → (N, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        """Convolve."""
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _depthwise_on_subgrids(x, weight, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """Convolve with the flipped kernel for x; sum products of shifted maps for each kernel weight."""
        x, weight = ctx.saved_tensors
        flipped = weight.flip(2, 3)
        grad_x = _depthwise_on_subgrids(grad, flipped, ctx.dilation) if ctx.needs_input_grad[0] else None
        sums = []
        for shifts in itertools.product((-ctx.dilation, 0, ctx.dilation), repeat=2):
            (out_rows, rows), (out_columns, columns) = map(_overlap, x.shape[-2:], shifts)
            products = grad[:, :, out_rows, out_columns] * x[:, :, rows, columns]
            sums.append(products.sum((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32)))
        return grad_x, torch.stack(sums, dim=1).view_as(weight), None


def _depthwise_on_subgrids(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Convolve each of the dilation² subgrids without dilation (space to batch), and interleave them."""
    number, channels, height, width = x.shape
    rows, columns = -(-height // dilation), -(-width // dilation)
    x = pad_end(x, rows * dilation - height, columns * dilation - width).permute(0, 2, 3, 1)
    x = x.reshape(number, rows, dilation, columns, dilation, channels).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(-1, rows, columns, channels).permute(0, 3, 1, 2)  # (N dilation², C, rows, columns)
    x = F.conv2d(x, weight, padding=1, groups=channels).permute(0, 2, 3, 1)
    x = x.reshape(number, dilation, dilation, rows, columns, channels).permute(0, 3, 1, 4, 2, 5)
    x = x.reshape(number, rows * dilation, columns * dilation, channels).permute(0, 3, 1, 2)
    return x[..., :height, :width].contiguous(memory_format=torch.channels_last)


def _overlap(length: int, shift: int) -> tuple[slice, slice]:
    """Return, along one side, the outputs for which a shifted kernel position is inside, and its inputs."""
    first, last = max(0, -shift), max(0, length - max(0, shift))
    return slice(first, max(first, last)), slice(first + shift, max(first, last) + shift)


def upsample_concat_conv(maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """`F.conv2d(torch.cat([resize(x, like) for x in maps], dim=1), weight, bias, padding=1)`, 3x3.

    Resizing and convolution are linear and commute: the nine kernel positions are applied to a coarse map as
    1x1 convolutions, and two small matrix products resize, shift and sum the results. That takes a tenth or
    less of the multiplications for the channels of the coarse maps. Gain for DeepLabv3+'s convolution at
    64x64: 3.1 in float32; for that of PSPNet with ResNet18 at 32x32: 1.9, and 1.7 in bfloat16.
    """
    weights = weight.split([x.shape[1] for x in maps], dim=1)
    at_size = next(index for index, x in enumerate(maps) if x is like)
    result = F.conv2d(like, weights[at_size], bias, padding=1)
    for index, (x, part) in enumerate(zip(maps, weights, strict=True)):
        if index != at_size:
            result = result + _upsample_conv(x, part, like.shape[-2:])
    return result


def _upsample_conv(x: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
    """Resize (N, C, h, w) to `size` (H, W) and convolve it with (out, C, 3, 3): (N, out, H, W)."""
    number, _, height, width = x.shape
    rows, columns = size
    positions = weight.permute(3, 2, 0, 1).flatten(0, 2)[
        ..., None, None
    ]  # (3 across x 3 down x out, C, 1, 1)
    x = F.conv2d(x, positions).permute(0, 2, 3, 1)  # (N, h, w, 3 across x 3 down x out)
    x = _matrix(_shifted_bilinear, width, columns, x) @ x.reshape(number * height, 3 * width, -1)
    x = x.view(number, height, columns, 3, -1).transpose(2, 3)  # (N, h, 3 down, W, out)
    x = _matrix(_shifted_bilinear, height, rows, x) @ x.reshape(number, 3 * height, -1)
    return x.view(number, rows, columns, -1).permute(0, 3, 1, 2)


# Resizing and pooling ---------------------------------------------------------------------------------------


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """`F.interpolate(x, size, mode="bilinear", align_corners=False)`.

    By products (form `resize`): on CUDA the gradient of `F.interpolate` is summed by atomic additions in the
    gradient's own dtype, which is inexact in bfloat16, slow, and different in every run. Not measured on a
    GPU yet. CPUs keep `F.interpolate`: products gain 0.6 there (12 classes, 64x64 to 256x256, float32).

    Gradient (form `resize_backward`): that of a map that was concatenated with others is a slice of the
    channels of theirs, which is slow in channels_last; a copy is taken first. Gain for 256 channels from
    16x16 to 64x64 beside 48 others: 1.1 in float32, concatenation included.
    """
    if chosen("resize", x):
        return _resize_by_products(x, size)
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    if chosen("resize_backward", x) and x.requires_grad:
        x.register_hook(_copy_channel_slice)
    return x


def _copy_channel_slice(grad: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last) if grad.stride(1) == 1 else grad


def _resize_by_products(x: Tensor, size: Sequence[int]) -> Tensor:
    """Multiply by one matrix per axis; the memory format stays."""
    number, channels, height, width = x.shape
    rows, columns = size
    down, across = _matrix(_bilinear, height, rows, x), _matrix(_bilinear, width, columns, x)
    with torch.autocast(x.device.type, enabled=False):  # a float32 map stays float32, as in F.interpolate
        if x.is_contiguous():
            return down @ (x @ across.T)
        x = across @ x.permute(0, 2, 3, 1).reshape(number * height, width, channels)
        x = down @ x.reshape(number, height, columns * channels)
    return x.view(number, rows, columns, channels).permute(0, 3, 1, 2)


def average_pool(x: Tensor, bins: int) -> Tensor:
    """`F.adaptive_avg_pool2d(x, bins)`: means over floor(i n / bins) to ceil((i + 1) n / bins) of each side.

    By two matrix products where torch's own is not available, or its gradient not deterministic (CUDA).
    """
    if bins == 1 or not chosen("average_pool", x):  # one bin is a mean, which every device has
        return F.adaptive_avg_pool2d(x, bins)
    rows, columns = (_matrix(_bins, side, bins, x) for side in x.shape[-2:])
    return rows @ x @ columns.T / (rows.sum(1)[:, None] * columns.sum(1))


def _matrix(
    build: Callable[[int, int, torch.dtype, torch.device], Tensor], source: int, target: int, like: Tensor
) -> Tensor:
    """Return `build(source, target)` in the dtype and on the device of `like`, from a cache where allowed.

    A compiler's or tracer's stand-in for a tensor must not outlive it, nor memory of a CUDA graph.
    """
    if is_compiling() or type(like) not in (Tensor, nn.Parameter):  # first: a compiler cannot trace the next
        return build(source, target, like.dtype, like.device)
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return build(source, target, like.dtype, like.device)
    return _cached_matrix(build, source, target, like.dtype, like.device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # an inference tensor could not be used in training later
def _cached_matrix(build: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return build(*arguments)


def _bilinear(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (target, source): the weights of bilinear resizing along one side."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    each = torch.eye(source, dtype=exact, device=device)
    return F.interpolate(each[None], size=target, mode="linear", align_corners=False)[0].T.to(dtype)


def _shifted_bilinear(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (target, source x 3): those weights from one position before, at and after; 0 outside."""
    return F.pad(_bilinear(source, target, dtype, device), (0, 0, 1, 1)).unfold(0, 3, 1).flatten(1)


def _bins(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (target, source): 1 for the positions of each bin, else 0."""
    index = torch.arange(target, device=device)[:, None]
    position = torch.arange(source, device=device)
    first, end = index * source // target, ((index + 1) * source + target - 1) // target
    return ((position >= first) & (position < end)).to(dtype)


# Max unpooling ----------------------------------------------------------------------------------------------


def pooling_indices(indices: Tensor, width: int) -> Tensor:
    """Return the indices of 2x2 max pooling in the form that `max_unpool2d` takes fastest.

    Args:
        indices: (N, C, h, w) int64, from `nn.MaxPool2d(2, return_indices=True)`.
        width: of the map that was pooled; even.

    Returns:
        `indices`, or where form `unpool` is chosen uint8 (N, C, h, w): 0 to 3, the position in each window.
    """
    if not chosen("unpool", indices):
        return indices
    return ((indices // width) % 2 * 2 + indices % 2).to(torch.uint8)


def max_unpool2d(x: Tensor, indices: Tensor) -> Tensor:
    """`F.max_unpool2d(x, indices, 2)`, for indices from `pooling_indices`.

    Torch's own converts both arguments to the contiguous format, reads 8 bytes per index, and is refused in
    deterministic mode, because it cannot know that no index occurs twice. Not measured on a GPU yet; on a CPU
    the fast form gains 0.7 to 0.8 with pooling (0.13 for the forward pass), so that torch's own stays.
    """
    if isinstance(indices, torch.fx.Proxy) or indices.dtype != torch.uint8:
        return F.max_unpool2d(x, indices, 2)
    return _Unpool.apply(x, indices)


class _Unpool(torch.autograd.Function):
    """(N, C, h, w), uint8 positions in 2x2 windows → (N, C, 2h, 2w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor) -> Tensor:
        """Write each value at its position, and zeros at the other three."""
        ctx.save_for_backward(positions)
        number, channels, height, width = x.shape
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        out = torch.empty(
            (number, channels, 2 * height, 2 * width), dtype=x.dtype, device=x.device, memory_format=layout
        )
        for position in range(4):
            out[:, :, position // 2 :: 2, position % 2 :: 2] = torch.where(positions == position, x, 0)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Read the gradient at each position."""
        (positions,) = ctx.saved_tensors
        result = grad[:, :, ::2, ::2]
        for position in range(1, 4):
            part = grad[:, :, position // 2 :: 2, position % 2 :: 2]
            result = torch.where(positions == position, part, result)
        return result, None


# Padding and cropping, which an exported graph must do without a branch on a size ---------------------------


def pad_even(x: Tensor) -> Tensor:
    """Add a row or column of zeros at the end where their number is odd, so that 2x2 pooling drops none."""
    height, width = x.shape[-2:]  # `height % 2` would not let export know that a size is positive
    return pad_end(x, 2 * ((height + 1) // 2) - height, 2 * ((width + 1) // 2) - width)


def pad_end(x: Tensor, rows: int, columns: int) -> Tensor:
    """`F.pad(x, [0, columns, 0, rows])`: add zeros after the last row and column; no copy where none."""
    if isinstance(x, torch.fx.Proxy) or is_exporting() or rows or columns:
        x = F.pad(x, [0, columns, 0, rows])
    return x


def crop(x: Tensor, size: torch.Size) -> Tensor:
    """`x[..., :height, :width]`, with the height and width of `size`."""
    height, width = size[-2:]
    if is_exporting():  # a slice is a view, and export would fix sizes to know its strides
        x = x.index_select(2, torch.arange(height, device=x.device))
        return x.index_select(3, torch.arange(width, device=x.device))
    return x[..., :height, :width]


# Convolutions for prediction alone --------------------------------------------------------------------------


def inference_conv(conv: nn.Conv2d) -> nn.Module:
    """Return the layer that computes `conv` fastest without gradients; often `conv` itself."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
        return conv
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    wide = min(conv.in_channels, conv.out_channels) >= WINOGRAD_CHANNELS
    if wide and shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and chosen("winograd", conv.weight):
        return WinogradConv2d(conv)
    if conv.kernel_size == (1, 1) and chosen("pointwise", conv.weight):
        return _dilated_pointwise(conv)
    return conv


def _dilated_pointwise(conv: nn.Conv2d) -> nn.Conv2d:
    """Return a 1x1 convolution with a dilation of 2, which has no effect on 1x1.

    Torch then computes it by oneDNN on one thread, too (2.10 to 2.14). Gain for 256 channels of 64x64: 1.1 in
    float32.
    """
    sizes = conv.in_channels, conv.out_channels, 1, conv.stride, conv.padding
    with torch.device("meta"):
        new = nn.Conv2d(*sizes, dilation=2, groups=conv.groups, bias=conv.bias is not None)
    new.weight, new.bias = conv.weight, conv.bias
    return new.train(conv.training)


WINOGRAD_CHANNELS = 128  # in and out; below it the sums cost more than they save


class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride, padding and dilation 1, by half the multiplications.

    Paper: Fast Algorithms for Convolutional Neural Networks (Lavin and Gray, 2016), F(4, 3),
    https://arxiv.org/abs/1509.09308, along the columns alone: y = A^T ((G g) * (B^T d)) gives four rows y of
    the result from six rows d of the input and a kernel column g by six products in place of twelve.
    (Along both axes there would be fewer products, but the sums would cost what they save.)

              [4  0 -5  0  1  0]        [ 1/4     0    0]
              [0 -4 -4  1  1  0]        [-1/6  -1/6 -1/6]          [1  1  1  1  1  0]
        B^T = [0  4 -4 -1  1  0]    G = [-1/6   1/6 -1/6]    A^T = [0  1 -1  2 -2  0]
              [0 -2 -1  2  1  0]        [1/24  1/12  1/6]          [0  1  1  4  4  0]
              [0  2 -1 -2  1  0]        [1/24 -1/12  1/6]          [0  1 -1  8 -8  1]
              [0  4  0 -5  0  1]        [   0     0    1]

    The result differs by rounding: by 2e-6 of its size in float32, and by 1e-2 in bfloat16, where that of
    `nn.Conv2d` differs by 3e-3. Gain for 256 channels of 64x64: 1.6 in float32.

    Shape:
        images (N, in_channels, H, W) → (N, out_channels, H, W), channels last.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        g0, g1, g2 = conv.weight.detach().float().unbind(2)  # kernel rows, (out, in, 3) each
        near, far = (g0 + g2) / 6, (g0 + 4 * g2) / 24
        rows = [g0 / 4, -near - g1 / 6, -near + g1 / 6, far + g1 / 12, far - g1 / 12, g2]  # G g
        kernels = torch.stack(rows).unsqueeze(3).to(conv.weight.dtype)
        self.kernels = [kernel.contiguous(memory_format=torch.channels_last) for kernel in kernels]
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        number, _, height, width = x.shape
        fours = -(-height // 4)
        x = F.pad(x, (0, 0, 1, 4 * fours + 1 - height))
        d = [x[:, :, row : row + 4 * fours - 3 : 4] for row in range(6)]  # (N, in, H / 4, W) each
        even, odd = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
        far_even, far_odd = d[4] - d[2], (d[3] - d[1]).mul_(2)
        first = torch.sub(d[4], d[2], alpha=5).add_(d[0], alpha=4)
        last = torch.sub(d[5], d[3], alpha=5).add_(d[1], alpha=4)
        sums = [first, even + odd, even.sub_(odd), far_even + far_odd, far_even.sub_(far_odd), last]  # B^T d

        biases = [None, self.bias, None, None, None, None]  # the second product is in all four rows
        products = [F.conv2d(*one, padding=(0, 1)) for one in zip(sums, self.kernels, biases, strict=True)]

        result = x.new_empty(number, 4 * fours, width, len(self.kernels[0])).permute(0, 3, 1, 2)
        rows = [result[:, :, row::4] for row in range(4)]  # A^T of the products
        even, odd = products[1] + products[2], products[1].sub_(products[2])
        far_even, far_odd = products[3] + products[4], products[3].sub_(products[4])
        torch.add(even, far_even, out=rows[0]).add_(products[0])
        torch.add(odd, far_odd, alpha=2, out=rows[1])
        torch.add(even, far_even, alpha=4, out=rows[2])
        torch.add(odd, far_odd, alpha=8, out=rows[3]).add_(products[5])
        return result[:, :, :height]
