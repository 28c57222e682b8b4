"""Quicker convolutions for networks that predict on a CPU: weights laid out once, 3x3 by half the products.

Paper: Fast Algorithms for Convolutional Neural Networks (Lavin and Gray, 2016), https://arxiv.org/abs/1509.09308,
its F(4, 3) from row to row alone: four rows of the result take six products with a row of taps in place of
twelve, and sums of rows, which cost little where a pixel has many channels. Along both axes there would be
fewer products still, but the sums would cost what they save. Its result differs by rounding: of its size by 2e-6
in float32 and 1e-2 in bfloat16, which changes no more pixels' classes than bfloat16 does without it.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_CHANNELS = 128  # in and out, for Winograd's way; below it the sums cost more than they save


class PackedConv2d(nn.Module):
    """A convolution whose weights lie as oneDNN wants them, which `nn.Conv2d` sees to at every call.

    Shape:
        images (N, in_channels, H, W), channels last → (N, out_channels, H', W'), channels last.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride=1, padding=0, dilation=1, groups=1
    ) -> None:
        super().__init__()
        pair = nn.modules.utils._pair
        self.how = [pair(padding), pair(stride), pair(dilation), groups]
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *self.how)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.how, "none", [], "")


class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride 1 that keeps height and width, as `by_winograd` accepts.

    Shape:
        images (N, in_channels, H, W), channels last → (N, out_channels, H, W), channels last.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.bias, self.apart = conv.bias, conv.dilation[0]
        along = {"padding": (0, self.apart), "dilation": (1, self.apart)}  # a row of taps looks along rows
        taps = _of_taps(*conv.weight.detach().float().unbind(2))  # of those above, at, and below
        taps = [tap.unsqueeze(2).to(conv.weight.dtype) for tap in taps]
        self.taps = nn.ModuleList(PackedConv2d(tap, None, **along) for tap in taps)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve; rows `apart` from one another are taken together, by fours."""
        number, _, height, width = x.shape
        fours = -(-height // (4 * self.apart))
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 0, self.apart, (4 * fours + 1) * self.apart - height))
        x = x.view(number, 4 * fours + 2, self.apart, width, -1)
        sums = _of_rows([x[:, row : row + 4 * fours - 3 : 4] for row in range(6)])
        sums = [part.flatten(1, 2).permute(0, 3, 1, 2) for part in sums]  # (N, in, H / 4, W)
        products = [taps(part).permute(0, 2, 3, 1) for taps, part in zip(self.taps, sums, strict=True)]
        result = x.new_empty(number, fours, 4, self.apart, width, products[0].shape[-1])
        _to_rows([part.view_as(result[:, :, 0]) for part in products], result.unbind(2))
        if self.bias is not None:
            result += self.bias
        return result.flatten(1, 3)[:, :height].permute(0, 3, 1, 2)


def _of_taps(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    """The six sums of three taps."""
    even, wide_even = (a + c) / 6, (a + 4 * c) / 24
    return [a / 4, -even - b / 6, -even + b / 6, wide_even + b / 12, wide_even - b / 12, c]


def _of_rows(d: list[Tensor]) -> list[Tensor]:
    """The six sums of six rows."""
    even, odd = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    wide_even, wide_odd = d[4] - d[2], (d[3] - d[1]).mul_(2)
    first = torch.sub(d[4], d[2], alpha=5).add_(d[0], alpha=4)
    last = torch.sub(d[5], d[3], alpha=5).add_(d[1], alpha=4)
    return [first, even + odd, even.sub_(odd), wide_even + wide_odd, wide_even.sub_(wide_odd), last]


def _to_rows(m: list[Tensor], rows: tuple[Tensor, ...]) -> None:
    """Four rows of six products."""
    even, wide_even = m[1] + m[2], m[3] + m[4]
    odd, wide_odd = m[1].sub_(m[2]), m[3].sub_(m[4])
    torch.add(even, wide_even, out=rows[0]).add_(m[0])
    torch.add(odd, wide_odd, alpha=2, out=rows[1])
    torch.add(even, wide_even, alpha=4, out=rows[2])
    torch.add(odd, wide_odd, alpha=8, out=rows[3]).add_(m[5])


def by_winograd(conv: nn.Conv2d) -> bool:
    """Whether Winograd's way gives the same map and is worth it."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == conv.dilation
        and conv.dilation[0] == conv.dilation[1]
        and conv.groups == 1
        and min(conv.in_channels, conv.out_channels) >= FEWEST_CHANNELS
    )


def quicken(model: nn.Module, convs: Iterable[nn.Module], winograd: bool = True) -> None:
    """Replace, in place, those convolutions of a network by quicker ones."""
    convs = set(convs)
    for module in list(model.modules()):
        for name, conv in list(module.named_children()):
            if conv not in convs:
                continue
            if winograd and by_winograd(conv):
                setattr(module, name, WinogradConv2d(conv))
            else:
                how = (conv.stride, conv.padding, conv.dilation, conv.groups)
                setattr(module, name, PackedConv2d(conv.weight, conv.bias, *how))
