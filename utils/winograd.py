"""3x3 convolutions by fewer multiplications, for networks that predict on a CPU.

Paper: Fast Algorithms for Convolutional Neural Networks (Lavin and Gray, 2016), https://arxiv.org/abs/1509.09308,
used from row to row alone: four rows of the result take six products with a row of taps in place of twelve, or
two rows four in place of six, and sums of rows, which cost little where a pixel has many channels. Along both
axes there would be fewer products still, but the sums would cost what they save. The result differs by
rounding, by four rows three times as much as by two, hence four in float32 and two in bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_CHANNELS = 128  # in and out; below it the sums cost more than they save


class WinogradConv2d(nn.Module):
    """A convolution with the weights of `conv`, which `replaceable` has accepted.

    Shape:
        images (N, in_channels, H, W), channels last → (N, out_channels, H, W), channels last.
    """

    def __init__(self, conv: nn.Conv2d, rows: int) -> None:
        super().__init__()
        self.rows = rows  # of the result, that are made together: 2 or 4
        self.transforms = {2: (_taps_2, _sums_2, _rows_2), 4: (_taps_4, _sums_4, _rows_4)}[rows]
        taps = self.transforms[0](*conv.weight.detach().float().unbind(2))  # above, at, and below
        taps = [tap.unsqueeze(2).to(conv.weight.dtype) for tap in taps]  # (out, in, 1, 3) each
        self.taps = [tap.contiguous(memory_format=torch.channels_last) for tap in taps]
        self.bias, self.apart = conv.bias, conv.dilation[0]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve; rows `apart` from one another are taken together."""
        _, sums_of, to_rows = self.transforms
        number, _, height, width = x.shape
        groups = -(-height // (self.rows * self.apart))
        seen = groups * self.rows + 2
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 0, self.apart, (seen - 1) * self.apart - height))
        x = x.view(number, seen, self.apart, width, -1)
        last = (groups - 1) * self.rows + 1
        sums = sums_of([x[:, row : row + last : self.rows] for row in range(self.rows + 2)])
        products = [self._along(part, tap) for part, tap in zip(sums, self.taps, strict=True)]
        result = x.new_empty(number, groups, self.rows, self.apart, width, products[0].shape[-1])
        to_rows([part.view_as(result[:, :, 0]) for part in products], result.unbind(2))
        if self.bias is not None:
            result += self.bias
        return result.flatten(1, 3)[:, :height].permute(0, 3, 1, 2)

    def _along(self, x: Tensor, tap: Tensor) -> Tensor:
        """(N, rows, W, out) of (N, groups, apart, W, in) and one row of taps, which looks along the rows."""
        x = x.flatten(1, 2).permute(0, 3, 1, 2)
        return F.conv2d(x, tap, padding=(0, self.apart), dilation=(1, self.apart)).permute(0, 2, 3, 1)


def replaceable(conv: nn.Module) -> bool:
    """Whether the replacement gives the same map and is worth it."""
    return (
        type(conv) is nn.Conv2d  # what is derived from it may take more than one map
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == conv.dilation
        and conv.dilation[0] == conv.dilation[1]
        and conv.groups == 1
        and min(conv.in_channels, conv.out_channels) >= FEWEST_CHANNELS
    )


def use_winograd(model: nn.Module, rows: int) -> None:
    """Replace, in place, the convolutions for which it is worth it."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if replaceable(child):
                setattr(module, name, WinogradConv2d(child, rows))


# The paper's three transforms for two and for four rows: of the taps, of what is seen, and of the products.


def _taps_2(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _sums_2(d: list[Tensor]) -> list[Tensor]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _rows_2(m: list[Tensor], rows: tuple[Tensor, ...]) -> None:
    torch.add(m[0], m[1], out=rows[0]).add_(m[2])
    torch.sub(m[1], m[2], out=rows[1]).sub_(m[3])


def _taps_4(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    even, wide_even = (a + c) / 6, (a + 4 * c) / 24
    return [a / 4, -even - b / 6, -even + b / 6, wide_even + b / 12, wide_even - b / 12, c]


def _sums_4(d: list[Tensor]) -> list[Tensor]:
    even, odd = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    wide_even, wide_odd = d[4] - d[2], (d[3] - d[1]).mul_(2)
    first = torch.sub(d[4], d[2], alpha=5).add_(d[0], alpha=4)
    last = torch.sub(d[5], d[3], alpha=5).add_(d[1], alpha=4)
    return [first, even + odd, even.sub_(odd), wide_even + wide_odd, wide_even.sub_(wide_odd), last]


def _rows_4(m: list[Tensor], rows: tuple[Tensor, ...]) -> None:
    even, wide_even = m[1] + m[2], m[3] + m[4]
    odd, wide_odd = m[1].sub_(m[2]), m[3].sub_(m[4])
    torch.add(even, wide_even, out=rows[0]).add_(m[0])
    torch.add(odd, wide_odd, alpha=2, out=rows[1])
    torch.add(even, wide_even, alpha=4, out=rows[2])
    torch.add(odd, wide_odd, alpha=8, out=rows[3]).add_(m[5])
