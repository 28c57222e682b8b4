"""3x3 convolutions by half the products, for networks that predict on a CPU.

Paper: Fast Algorithms for Convolutional Neural Networks (Lavin and Gray, 2016), F(4, 3) along columns alone,
https://arxiv.org/abs/1509.09308: four rows of the result take six products with a row of three taps in place
of twelve. Along both axes there would be fewer still, but the sums would cost what they save. The result
differs by rounding: by 2e-6 of its size in float32, and by 1e-2 in bfloat16, which itself differs by 3e-3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_CHANNELS = 128  # in and out; below it the sums cost more than they save


class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride, padding and dilation 1.

    Shape:
        images (N, in_channels, H, W) → (N, out_channels, H, W), channels last.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        above, at, below = conv.weight.detach().float().unbind(2)  # taps of three rows, (out, in, 3) each
        near, far = (above + below) / 6, (above + 4 * below) / 24
        sums = [above / 4, -near - at / 6, -near + at / 6, far + at / 12, far - at / 12, below]
        taps = torch.stack(sums).unsqueeze(3).to(conv.weight.dtype)
        self.taps = [one.contiguous(memory_format=torch.channels_last) for one in taps]
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
        sums = [first, even + odd, even.sub_(odd), far_even + far_odd, far_even.sub_(far_odd), last]

        biases = [None, self.bias, None, None, None, None]  # the second product is in all four rows
        products = [F.conv2d(*three, padding=(0, 1)) for three in zip(sums, self.taps, biases, strict=True)]

        result = x.new_empty(number, 4 * fours, width, len(self.taps[0])).permute(0, 3, 1, 2)
        rows = [result[:, :, row::4] for row in range(4)]
        even, odd = products[1] + products[2], products[1].sub_(products[2])
        far_even, far_odd = products[3] + products[4], products[3].sub_(products[4])
        torch.add(even, far_even, out=rows[0]).add_(products[0])
        torch.add(odd, far_odd, alpha=2, out=rows[1])
        torch.add(even, far_even, alpha=4, out=rows[2])
        torch.add(odd, far_odd, alpha=8, out=rows[3]).add_(products[5])
        return result[:, :, :height]


def use_winograd(model: nn.Module) -> None:
    """Replace, in place, those convolutions of a network that give the same map by it and gain."""
    for name, conv in list(model.named_modules()):
        if type(conv) is nn.Conv2d and min(conv.in_channels, conv.out_channels) >= FEWEST_CHANNELS:
            shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
            if shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1):
                model.set_submodule(name, WinogradConv2d(conv))
