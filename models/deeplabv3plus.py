"""DeepLabv3+: a dilated ResNet, ASPP, and a decoder that adds low-level features."""

import torch
from torch import Tensor, nn

from .backbones import ResNet
from .checks import check_choice, check_images, check_numbers
from .layers import (
    ConcatConvBNReLU,
    ConvBNReLU,
    DepthwiseSeparableConv,
    PooledConvBNReLU,
    init_classifier,
    init_weights,
    resize,
    upsample_concat_conv,
)

ASPP_CHANNELS = 256
LOW_LEVEL_CHANNELS = 48  # few, so that the low-level features do not outweigh the 256 semantic ones
RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # by output stride: the same reach in the image


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: features at five scales, from one position to the whole image."""

    def __init__(self, in_channels: int, rates: tuple[int, ...], separable: bool, dropout: float) -> None:
        super().__init__()
        conv = DepthwiseSeparableConv if separable else ConvBNReLU
        self.conv1x1 = ConvBNReLU(in_channels, ASPP_CHANNELS, kernel=1)
        self.atrous = nn.ModuleList(conv(in_channels, ASPP_CHANNELS, dilation=rate) for rate in rates)
        self.image_pooling = PooledConvBNReLU(in_channels, ASPP_CHANNELS, bins=1)
        self.project = ConvBNReLU((2 + len(rates)) * ASPP_CHANNELS, ASPP_CHANNELS, kernel=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, h, w) to (N, 256, h, w)."""
        image = self.image_pooling(x)  # (N, 256, 1, 1)
        branches = [self.conv1x1(x), *(conv(x) for conv in self.atrous)]
        branches.append(image.expand_as(branches[0]))  # as resizing would give
        return self.dropout(self.project(torch.cat(branches, dim=1)))  # 1280 → 256


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+: wide context by dilated convolutions, sharp edges by low-level features.

    Paper: Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation (Chen et al.,
    2018), https://arxiv.org/abs/1802.02611. Dilation widens the encoder's view without losing resolution;
    ASPP looks at its last features at several scales at once; a small decoder combines them with those of
    layer1.
    Route: image 1/1 → layer1 1/4 (low level) … layer4 1/output_stride → ASPP (256) → upsampled to 1/4 and
    concatenated with the low level (48) → two 3x3 (256) → logits 1/4 → 1/1.
    Differs from the paper: plain 3x3 convolutions where it prefers depthwise separable ones (`separable=True`
    gives those); pooling over the whole image rather than a crop; half-pixel centers where it aligns corners;
    the low level is layer1's output after its last ReLU; no multi-grid, as in the authors' ResNet models.
    Initial weights: He normal (fan out), batch norm 1 and 0, classifier normal with deviation 0.01.
    Parameters (RGB, 21 classes): resnet18 16,608,181, resnet34 26,716,341, resnet50 40,352,181, resnet101
    59,344,309; separable resnet50 26,696,133.

    Args:
        num_classes: channels of the logits, 2 or more.
        in_channels: channels of the images.
        backbone: resnet18, resnet34, resnet50 or resnet101.
        output_stride: 16 (faster) or 8 (finer; layer4 has four times the positions).
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
        fuse = DepthwiseSeparableConv if separable else ConcatConvBNReLU
        refine = DepthwiseSeparableConv if separable else ConvBNReLU
        self.backbone = ResNet(backbone, in_channels, output_stride)
        layer1_channels, _, _, layer4_channels = self.backbone.out_channels
        self.aspp = ASPP(layer4_channels, RATES[output_stride], separable, dropout)
        self.low_level = ConvBNReLU(layer1_channels, LOW_LEVEL_CHANNELS, kernel=1)
        self.fuse = fuse(ASPP_CHANNELS + LOW_LEVEL_CHANNELS, ASPP_CHANNELS)
        self.refine = refine(ASPP_CHANNELS, ASPP_CHANNELS)
        self.classifier = nn.Conv2d(ASPP_CHANNELS, num_classes, kernel_size=1)
        for part in (self.aspp, self.low_level, self.fuse, self.refine):
            init_weights(part)
        init_classifier(self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of `images`."""
        check_images(images, self.in_channels)
        layer1, _, _, layer4 = self.backbone(images)  # 1/4 and 1/output_stride
        low_level = self.low_level(layer1)  # (N, 48, H/4, W/4)
        x = self.aspp(layer4)  # (N, 256, h, w)
        # upsample x, concatenate it with the low-level features, apply a 3x3 convolution
        x = upsample_concat_conv([x, low_level], self.fuse, like=low_level)  # (N, 256, H/4, W/4)
        x = self.refine(x)
        return resize(self.classifier(x), like=images)
