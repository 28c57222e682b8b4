"""FCN: a VGG classifier made convolutional, its coarse scores refined by those of earlier poolings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import VGG
from .layers import InnerConv2d, check_choice, check_images, check_numbers, crop, init_scores, init_weights

FC_CHANNELS = 4096
VARIANTS = {"8s": 8, "16s": 16, "32s": 32}  # stride of the finest scores


class BilinearUpsample(nn.ConvTranspose2d):
    """A transposed convolution that multiplies height and width, and starts as bilinear resizing."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__(channels, channels, 2 * factor, stride=factor, padding=factor // 2, bias=False)
        self.factor = factor
        self.start_bilinear()

    @torch.no_grad()
    def start_bilinear(self) -> None:
        """Set the weights: each channel to itself alone, by a triangle over two input positions."""
        position = torch.arange(2 * self.factor, device="cpu")
        triangle = 1 - (position - (self.factor - 0.5)).abs() / self.factor
        self.weight.zero_()
        self.weight.diagonal(dim1=0, dim2=1).copy_((triangle[:, None] * triangle).unsqueeze(-1))


class Score(nn.Conv2d):
    """A 1x1 convolution whose bias is added after it.

    With the bias inside, oneDNN writes past its gradient where 4096 channels become fewer than 16, in bf16
    on CPUs with AMX, by two threads (torch 2.14). That ends the process, or spoils what lies beside.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (N, num_classes, H, W) of `x`."""
        scores = F.conv2d(x, self.weight)
        return scores + self.bias[:, None, None].to(scores.dtype)


class FCN(nn.Module):
    """FCN: the first network trained end to end from pixels to pixels.

    Paper: Fully Convolutional Networks for Semantic Segmentation (Long, Shelhamer, Darrell, 2015),
    https://arxiv.org/abs/1411.4038. VGG's fully connected layers are convolutions with one position; run over
    a larger picture they give a coarse map of scores. Learned upsampling doubles it, and the scores of pool4
    and pool3 are added on the way, so that the 8s variant draws finer outlines than 32s.
    Route: image 1/1 → pool3 1/8 (256) → pool4 1/16 (512) → pool5 1/32 → fc6, fc7 (4096) → scores 1/32
    → x2, + pool4's 1/16 → x2, + pool3's 1/8 → x8 to logits 1/1. (16s: x2, then x16. 32s: x32 at once.)
    Differs from the paper: padding 1 and 3 instead of a frame of 100 pixels and crops by fixed offsets. With
    poolings that round up, an enlarged map covers the finer one from the first pixel on, and only a surplus
    at the end is cut. A variant trains at once, not in the stages 32s → 16s → 8s. Score layers start small
    (deviation 0.01) instead of zero, so that every layer learns from the first step. Of these backbones the
    paper has vgg16; those with _bn are for random weights, from which plain ones hardly train.
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
        self.fc6 = InnerConv2d(pool5_channels, FC_CHANNELS, kernel=7)
        self.fc7 = nn.Conv2d(FC_CHANNELS, FC_CHANNELS, kernel_size=1)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.score = Score(FC_CHANNELS, num_classes)
        if variant != "32s":
            self.up_to_pool4 = BilinearUpsample(num_classes, 2)
            self.score_pool4 = nn.Conv2d(pool4_channels, num_classes, kernel_size=1)
        if variant == "8s":
            self.up_to_pool3 = BilinearUpsample(num_classes, 2)
            self.score_pool3 = nn.Conv2d(pool3_channels, num_classes, kernel_size=1)
        self.up_to_image = BilinearUpsample(num_classes, VARIANTS[variant])
        init_weights(self.fc6)
        init_weights(self.fc7)
        for name, layer in self.named_children():
            if name.startswith("score"):
                init_scores(layer)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of `images`."""
        check_images(images, self.in_channels)
        _, _, pool3, pool4, x = self.backbone(images)  # 1/8, 1/16, 1/32
        x = self.dropout(self.relu(self.fc6(x)))
        x = self.dropout(self.relu(self.fc7(x)))
        x = self.score(x)  # (N, num_classes, H/32, W/32), sizes rounded up
        if self.variant != "32s":
            x = crop(self.up_to_pool4(x), pool4.shape) + self.score_pool4(pool4)  # 1/16
        if self.variant == "8s":
            x = crop(self.up_to_pool3(x), pool3.shape) + self.score_pool3(pool3)  # 1/8
        return crop(self.up_to_image(x), images.shape)
