"""U-Net: an encoder and a mirrored decoder, joined at every scale by skip connections."""

from functools import partial

import torch
from torch import Tensor, nn

from .checks import check_images, check_numbers
from .layers import Upsample, init_weights
from .ops import pad_end

ACTIVATION = partial(nn.ReLU, inplace=True)  # after every batch norm; also nn.GELU, nn.LeakyReLU, ...


class DoubleConv(nn.Sequential):
    """3x3 convolution, batch norm, activation; twice."""

    def __init__(self, in_channels: int, out_channels: int, middle_channels: int | None = None) -> None:
        middle_channels = middle_channels or out_channels
        super().__init__(
            nn.Conv2d(in_channels, middle_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle_channels),
            ACTIVATION(),
            nn.Conv2d(middle_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            ACTIVATION(),
        )


class Up(nn.Module):
    """Upsample by 2, concatenate with the skip connection, apply two convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, bilinear: bool) -> None:
        super().__init__()
        if bilinear:
            self.up = Upsample()
            self.conv = DoubleConv(in_channels + skip_channels, out_channels, in_channels)
        else:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
            self.conv = DoubleConv(in_channels // 2 + skip_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map `x` (N, C, h, w) and `skip` (N, K, H, W), where H is 2h or 2h+1, to (N, out_channels, H, W)."""
        x = self.up(x)
        x = pad_end(x, skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3])  # 1 where pooling dropped one
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """U-Net: skip connections restore the spatial detail that pooling removed.

    Paper: U-Net: Convolutional Networks for Biomedical Image Segmentation (Ronneberger, Fischer, Brox, 2015),
    https://arxiv.org/abs/1505.04597. Four poolings give the encoder a wide context, four upsamplings bring it
    back to the pixels; at each scale the encoder's features are concatenated to the decoder's, so that edges
    stay sharp.
    Route: image 1/1 (64) → 1/2 (128) → 1/4 (256) → 1/8 (512) → 1/16 (1024) → 1/8 … 1/1 (64) → logits 1/1.
    Differs from the paper: padded convolutions (same size out, no mirrored tiles), batch norm instead of
    biases; a row or column that pooling dropped from an odd size is padded with zeros. No dropout by default.
    `bilinear` replaces the learned upsampling by bilinear interpolation and halves the bottom, as in
    milesial/Pytorch-UNet.
    Initial weights: normal, standard deviation sqrt(2 / fan_in), as in the paper.
    Parameters (RGB, 21 classes): 31,038,933; bilinear 17,264,277.

    Args:
        num_classes: channels of the logits, 2 or more.
        in_channels: channels of the images.
        base_channels: channels at full size; each further scale has twice as many.
        bilinear: upsample bilinearly instead of by transposed convolutions.
        dropout: probability of zeroing a value at the end of the encoder (scales 1/8 and 1/16), in training.

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
        base_channels: int = 64,
        bilinear: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_numbers(num_classes, in_channels, dropout, base_channels)
        self.in_channels = in_channels
        c1, c2, c3, c4, c5 = (base_channels * 2**scale for scale in range(5))
        if bilinear:
            c5 = c4
        d4, d3, d2 = (c3, c2, c1) if bilinear else (c4, c3, c2)  # output channels of the decoder stages

        self.pool = nn.MaxPool2d(2)
        self.encoder1 = DoubleConv(in_channels, c1)
        self.encoder2 = DoubleConv(c1, c2)
        self.encoder3 = DoubleConv(c2, c3)
        self.encoder4 = DoubleConv(c3, c4)
        self.encoder5 = DoubleConv(c4, c5)
        self.dropout = nn.Dropout(dropout)
        self.decoder4 = Up(c5, c4, d4, bilinear)
        self.decoder3 = Up(d4, c3, d3, bilinear)
        self.decoder2 = Up(d3, c2, d2, bilinear)
        self.decoder1 = Up(d2, c1, c1, bilinear)
        self.classifier = nn.Conv2d(c1, num_classes, kernel_size=1)
        init_weights(self, mode="fan_in")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of `images`."""
        check_images(images, self.in_channels)
        x1 = self.encoder1(images)  # 1/1
        x2 = self.encoder2(self.pool(x1))  # 1/2
        x3 = self.encoder3(self.pool(x2))  # 1/4
        x4 = self.dropout(self.encoder4(self.pool(x3)))  # 1/8
        x5 = self.dropout(self.encoder5(self.pool(x4)))  # 1/16
        x = self.decoder4(x5, x4)  # 1/8
        x = self.decoder3(x, x3)  # 1/4
        x = self.decoder2(x, x2)  # 1/2
        x = self.decoder1(x, x1)  # 1/1
        return self.classifier(x)
