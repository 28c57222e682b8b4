"""FCN: a VGG classifier made convolutional, whose coarse scores are refined by those of earlier poolings."""

import torch
from torch import Tensor, nn

from .backbones import VGG
from .checks import check_choice, check_images, check_numbers
from .layers import Conv2d, init_classifier, init_weights
from .ops import crop

FC_CHANNELS = 4096
VARIANTS = {"8s": 8, "16s": 16, "32s": 32}  # stride of the finest scores


class BilinearUpsample(nn.ConvTranspose2d):
    """A transposed convolution that multiplies height and width, initialized as bilinear interpolation."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__(channels, channels, 2 * factor, stride=factor, padding=factor // 2, bias=False)
        self.factor = factor
        self.init_bilinear()

    @torch.no_grad()
    def init_bilinear(self) -> None:
        """Set the weights: a triangle over two input positions within each channel, zero across channels."""
        position = torch.arange(2 * self.factor, device="cpu")
        triangle = 1 - (position - (self.factor - 0.5)).abs() / self.factor
        self.weight.zero_()
        self.weight.diagonal(dim1=0, dim2=1).copy_((triangle[:, None] * triangle).unsqueeze(-1))


class FCN(nn.Module):
    """FCN: the first network trained end to end from pixels to pixels.

    Paper: Fully Convolutional Networks for Semantic Segmentation (Long, Shelhamer, Darrell, 2015),
    https://arxiv.org/abs/1411.4038. VGG's fully connected layers are convolutions with a single output
    position; on a larger image they give a coarse map of scores. Learned upsampling doubles its size, and the
    scores of pool4 and pool3 are added on the way, so that 8s draws finer outlines than 32s.
    Route: image 1/1 → pool3 1/8 (256) → pool4 1/16 (512) → pool5 1/32 → fc6, fc7 (4096) → scores 1/32
    → x2, + pool4's 1/16 → x2, + pool3's 1/8 → x8 to logits 1/1. (16s: x2, then x16. 32s: x32 at once.)
    Differs from the paper: padding 1 and 3 instead of a frame of 100 pixels and crops by fixed offsets.
    Pooling rounds odd sizes up, so an upsampled map covers the finer one from the first pixel on and is
    cropped at its end. A variant is trained at once, not in the stages 32s → 16s → 8s. Score layers start
    small (deviation 0.01) instead of zero, so that every layer learns from the first step. The paper has
    vgg16 alone; backbones with _bn are for random weights, from which plain ones hardly train.
    Initial weights: He normal (fan out), upsampling bilinear. Public weights also fill fc6 and fc7, the
    classifier's layers 0 and 3, as the original did.
    Parameters (RGB, 21 classes): 8s vgg11 128,995,551, vgg13 129,180,063, vgg16 134,489,759, vgg19
    139,799,455; vgg16 16s 134,815,994, 32s 136,152,917.

    Args:
        num_classes: channels of the logits, 2 or more.
        in_channels: channels of the images.
        backbone: vgg11, vgg13, vgg16, vgg19, or one of these with _bn.
        variant: 8s, 16s or 32s, the stride of the finest scores.
        dropout: probability of zeroing a value after fc6 and fc7, in training.

    Shape:
        images (N, in_channels, H, W), H and W at least 32 → logits (N, num_classes, H, W).

    Raises:
        ValueError: an argument out of its range or choices; images of other channels, or too small.
    """

    pretrained_names = {"classifier.0.": "fc6.", "classifier.3.": "fc7."}  # beside the backbone's own keys

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        backbone: str = "vgg16_bn",
        variant: str = "8s",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_numbers(num_classes, in_channels, dropout)
        check_choice("variant", variant, VARIANTS)
        self.in_channels = in_channels
        self.variant = variant
        self.backbone = VGG(backbone, in_channels, round_up=True)
        _, _, pool3_channels, pool4_channels, pool5_channels = self.backbone.out_channels
        self.fc6 = Conv2d(pool5_channels, FC_CHANNELS, kernel_size=7, padding=3)
        self.fc7 = nn.Conv2d(FC_CHANNELS, FC_CHANNELS, kernel_size=1)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.score_fr = Conv2d(FC_CHANNELS, num_classes, kernel_size=1)
        if variant != "32s":
            self.upscore2 = BilinearUpsample(num_classes, 2)
            self.score_pool4 = nn.Conv2d(pool4_channels, num_classes, kernel_size=1)
        if variant == "8s":
            self.upscore_pool4 = BilinearUpsample(num_classes, 2)
            self.score_pool3 = nn.Conv2d(pool3_channels, num_classes, kernel_size=1)
        self.upscore = BilinearUpsample(num_classes, VARIANTS[variant])
        init_weights(self.fc6)
        init_weights(self.fc7)
        for name, layer in self.named_children():
            if name.startswith("score"):
                init_classifier(layer)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of `images`."""
        check_images(images, self.in_channels)
        _, _, pool3, pool4, x = self.backbone(images)  # 1/8, 1/16, 1/32
        x = self.dropout(self.relu(self.fc6(x)))
        x = self.dropout(self.relu(self.fc7(x)))
        x = self.score_fr(x)  # (N, num_classes, H/32, W/32), sizes rounded up
        if self.variant != "32s":
            x = crop(self.upscore2(x), pool4.shape) + self.score_pool4(pool4)  # 1/16
        if self.variant == "8s":
            x = crop(self.upscore_pool4(x), pool3.shape) + self.score_pool3(pool3)  # 1/8
        return crop(self.upscore(x), images.shape)
