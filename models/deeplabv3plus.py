"""DeepLabv3+: a dilated ResNet, ASPP, and a decoder that adds back one fine map."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .backbones import ResNet
from .layers import (
    ConvBNReLU,
    MergingConvBNReLU,
    PooledConvBNReLU,
    SeparableConvBNReLU,
    check_choice,
    check_images,
    check_numbers,
    concatenated,
    init_scores,
    init_weights,
    resize,
)

ASPP_CHANNELS = 256
FINE_CHANNELS = 48  # few, so that the fine map does not outweigh the 256 semantic ones
RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # by output stride: the same reach in the image


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: one map seen at five reaches, from a position to the whole."""

    def __init__(self, in_channels: int, rates: tuple[int, ...], separable: bool, dropout: float) -> None:
        super().__init__()
        conv = SeparableConvBNReLU if separable else ConvBNReLU
        self.point = ConvBNReLU(in_channels, ASPP_CHANNELS, kernel=1)
        self.atrous = nn.ModuleList(conv(in_channels, ASPP_CHANNELS, dilation=rate) for rate in rates)
        self.pool = PooledConvBNReLU(in_channels, ASPP_CHANNELS, bins=1)
        self.project = ConvBNReLU((2 + len(rates)) * ASPP_CHANNELS, ASPP_CHANNELS, kernel=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, h, w) to (N, 256, h, w)."""
        whole = self.pool(x).expand(-1, -1, *x.shape[-2:])  # one value everywhere, as resizing 1x1 would give
        branches = [self.point(x), *(conv(x) for conv in self.atrous), whole]
        return self.dropout(self.project(torch.cat(branches, dim=1)))  # 1280 → 256


class SeparableMerge(SeparableConvBNReLU):
    """`MergingConvBNReLU` by a separable convolution, whose two halves are cheap as they are."""

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, fine: int) -> None:
        super().__init__(sum(in_channels), out_channels)
        self.fine = fine

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Merge a list of maps (N, in_channels[i], h_i, w_i) to (N, out_channels, H, W)."""
        return super().forward(concatenated(maps, self.fine))


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+: wide context by dilated convolutions, sharp edges by one early map.

    Paper: Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation (Chen et al.,
    2018), https://arxiv.org/abs/1802.02611. Dilation lets the encoder see far without losing more resolution;
    ASPP looks at its last map at several reaches at once; a small decoder joins that with the map of layer1.
    Route: image 1/1 → layer1 1/4 (fine) … layer4 1/output_stride → ASPP (256) → up to 1/4 → cat fine (48) →
    two 3x3 (256) → logits 1/4 → 1/1.
    Differs from the paper: plain 3x3 convolutions where it prefers depthwise separable ones (`separable=True`
    gives those); pooling over the whole map rather than a crop; half-pixel centres where it aligns corners;
    the fine map is layer1's output after its last ReLU; no multi-grid, as in the authors' ResNet models.
    Initial weights: He normal (fan out), batch norm 1 and 0, classifier normal with deviation 0.01.
    Parameters (RGB, 21 classes): resnet18 16,608,181, resnet34 26,716,341, resnet50 40,352,181, resnet101
    59,344,309; separable resnet50 26,696,133.

    Args:
        num_classes: channels of the logits, 2 or more.
        in_channels: channels of the images.
        backbone: resnet18, resnet34, resnet50 or resnet101.
        output_stride: 16 (faster) or 8 (finer; layer4 holds four times the positions).
        separable: depthwise separable 3x3 convolutions in ASPP and decoder, batch norm and ReLU after both
            halves: a third fewer weights and half the multiplications.
        dropout: probability of zeroing a value after ASPP, in training.

    Shape:
        images (N, in_channels, H, W), H and W at least 32 → logits (N, num_classes, H, W).

    Raises:
        ValueError: an argument out of its range or choices; images of other channels, or too small.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        backbone: str = "resnet50",
        output_stride: int = 16,
        separable: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_numbers(num_classes, in_channels, dropout)
        check_choice("output_stride", output_stride, RATES)
        self.in_channels = in_channels
        conv = SeparableConvBNReLU if separable else ConvBNReLU
        merge = SeparableMerge if separable else MergingConvBNReLU
        self.backbone = ResNet(backbone, in_channels, output_stride)
        fine_channels, *_, deep_channels = self.backbone.out_channels
        self.aspp = ASPP(deep_channels, RATES[output_stride], separable, dropout)
        self.fine = ConvBNReLU(fine_channels, FINE_CHANNELS, kernel=1)
        self.decoder = nn.Sequential(
            merge((ASPP_CHANNELS, FINE_CHANNELS), ASPP_CHANNELS, fine=1), conv(ASPP_CHANNELS, ASPP_CHANNELS)
        )
        self.head = nn.Conv2d(ASPP_CHANNELS, num_classes, kernel_size=1)
        for part in (self.aspp, self.fine, self.decoder):
            init_weights(part)
        init_scores(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of `images`."""
        check_images(images, self.in_channels)
        fine, _, _, deep = self.backbone(images)  # 1/4 and 1/output_stride
        fine = self.fine(fine)  # (N, 48, H/4, W/4)
        x = self.decoder([self.aspp(deep), fine])  # (N, 256, H/4, W/4)
        return resize(self.head(x), like=images)
