"""Blocks that several networks share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, computed by `ops.conv2d`, for the shapes where torch's own is slow or wrong on CPUs.

    These are dilated and depthwise kernels, kernels larger than their map, and 1x1 kernels from very many
    channels to few.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, in_channels, H, W)."""
        return ops.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, batch norm, ReLU; padded so that height and width stay."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, dilation: int = 1) -> None:
        conv = Conv2d if dilation > 1 else nn.Conv2d
        padding = kernel // 2 * dilation
        super().__init__(
            conv(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class DepthwiseSeparableConv(nn.Sequential):
    """3x3 convolution of each channel alone, then 1x1 over the channels, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        options = {"padding": dilation, "dilation": dilation, "groups": in_channels, "bias": False}
        super().__init__(
            Conv2d(in_channels, in_channels, 3, **options),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            ConvBNReLU(in_channels, out_channels, kernel=1),
        )


class ConcatConvBNReLU(ConvBNReLU):
    """`ConvBNReLU` of maps concatenated after resizing, which `upsample_concat_conv` can apply before it."""


def upsample_concat_conv(maps: Sequence[Tensor], block: nn.Module, *, like: Tensor) -> Tensor:
    """Return `block(torch.cat([resize(x, like) for x in maps], dim=1))`.

    The convolution of a `ConcatConvBNReLU` may be computed by `ops.upsample_concat_conv`, which does not call
    the module. If a hook watches for that call, or it is of another class, the line above is what runs.

    Args:
        maps: (N, C_i, h_i, w_i); their channels add up to those that `block` takes.
        block: takes the concatenation.
        like: one of the maps; the others are resized to its height and width.
    """
    replaceable = isinstance(block, ConcatConvBNReLU) and type(block[0]) is nn.Conv2d
    if not (replaceable and ops.chosen("upsample_concat_conv", like, block, block[0])):
        return block(torch.cat([resize(x, like) for x in maps], dim=1))
    conv, norm, relu = block
    return relu(norm(ops.upsample_concat_conv(maps, conv.weight, conv.bias, like)))


class PooledBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of maps pooled to 1x1, where a batch of one image has no variance.

    With a single value per channel the running statistics are used, in training too, and are not updated.
    Any other input is treated as by `nn.BatchNorm2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W)."""
        traced = isinstance(x, torch.fx.Proxy)
        if traced or (self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1):
            statistics = self.running_mean, self.running_var, self.weight, self.bias
            return F.batch_norm(x, *statistics, self.training and traced, self.momentum, self.eps)
        return super().forward(x)


class AveragePool2d(nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d` to bins x bins, computed by `ops.average_pool`."""

    def __init__(self, bins: int) -> None:
        super().__init__(bins)

    def forward(self, x: Tensor) -> Tensor:
        """Average (N, C, H, W) to (N, C, bins, bins)."""
        return ops.average_pool(x, self.output_size)


class PooledConvBNReLU(nn.Sequential):
    """Average pooling to bins x bins, 1x1 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, bins: int) -> None:
        super().__init__(
            AveragePool2d(bins),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            PooledBatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Upsample(nn.Upsample):
    """`nn.Upsample` to twice the height and width, bilinear, computed by `ops.resize`."""

    def __init__(self) -> None:
        super().__init__(scale_factor=2, mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        """Resize (N, C, H, W) to (N, C, 2H, 2W)."""
        height, width = x.shape[-2:]
        return ops.resize(x, (2 * height, 2 * width))


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Resize `x` bilinearly to the height and width of `like` (half-pixel centers, not `align_corners`)."""
    return x if x is like else ops.resize(x, like.shape[-2:])


def init_weights(module: nn.Module, mode: str = "fan_out") -> None:
    """Initialize a network: He normal convolutions, zero biases; batch norm keeps weight 1 and bias 0.

    Args:
        module: changed in place.
        mode: "fan_out" as torchvision's ResNet and VGG, or "fan_in" as He et al. 2015. Depthwise convolutions
            always take "fan_in", which is 9: torch computes a wrong fan out for groups.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            fan = "fan_in" if layer.groups > 1 else mode
            if not layer.weight.is_meta:  # drawing there would import the compiler, which takes a second
                nn.init.kaiming_normal_(layer.weight, mode=fan, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_classifier(conv: nn.Conv2d) -> None:
    """Initialize the last convolution of a network for small logits: deviation 0.01, zero bias."""
    if not conv.weight.is_meta:  # as in `init_weights`
        nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
