"""U-Net: an encoder and a mirrored decoder, joined at every scale by skip connections."""

import torch
from torch import Tensor, nn

from .layers import ConvBNReLU, Upsample, check_images, check_numbers, init_weights, pad_end


class DoubleConv(nn.Sequential):
    """Twice: 3x3 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, middle_channels: int | None = None) -> None:
        middle = middle_channels or out_channels
        super().__init__(ConvBNReLU(in_channels, middle), ConvBNReLU(middle, out_channels))


class Up(nn.Module):
    """Double height and width, set the skip before it, convolve twice."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, bilinear: bool) -> None:
        super().__init__()
        if bilinear:
            self.up = Upsample()
            self.conv = DoubleConv(in_channels + skip_channels, out_channels, in_channels)
        else:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
            self.conv = DoubleConv(in_channels // 2 + skip_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Merge `x` (N, C, h, w) with `skip` (N, K, 2h or 2h+1, 2w or 2w+1)."""
        x = self.up(x)
        x = pad_end(x, skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3])  # 1 where an odd size lost one
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """U-Net: what the encoder knew about place is handed to the decoder that knows about meaning.

    Paper: U-Net: Convolutional Networks for Biomedical Image Segmentation (Ronneberger, Fischer, Brox, 2015),
    https://arxiv.org/abs/1505.04597. Four poolings let the network see wide context; four upsamplings bring
    that back to the pixels; at each scale the encoder's map is set beside the decoder's, so edges stay sharp.
    Route: image 1/1 (64) → 1/2 (128) → 1/4 (256) → 1/8 (512) → 1/16 (1024) → 1/8 … 1/1 (64) → logits 1/1.
    Differs from the paper: padded convolutions (same size out, no mirrored tiles), batch norm instead of
    biases; a row or column lost to an odd size comes back as zeros. Dropout is off unless asked for.
    `bilinear` puts parameter-free upsampling in place of the learned one and halves the bottom, the
    arrangement made common by milesial/Pytorch-UNet.
    Initial weights: normal, standard deviation sqrt(2 / fan_in), as the paper has it.
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
        d4, d3, d2 = (c3, c2, c1) if bilinear else (c4, c3, c2)  # what each decoder stage hands up

        self.pool = nn.MaxPool2d(2)
        self.enc1 = DoubleConv(in_channels, c1)
        self.enc2 = DoubleConv(c1, c2)
        self.enc3 = DoubleConv(c2, c3)
        self.enc4 = DoubleConv(c3, c4)
        self.enc5 = DoubleConv(c4, c5)
        self.dropout = nn.Dropout(dropout)
        self.dec4 = Up(c5, c4, d4, bilinear)
        self.dec3 = Up(d4, c3, d3, bilinear)
        self.dec2 = Up(d3, c2, d2, bilinear)
        self.dec1 = Up(d2, c1, c1, bilinear)
        self.head = nn.Conv2d(c1, num_classes, kernel_size=1)
        init_weights(self, mode="fan_in")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of `images`."""
        check_images(images, self.in_channels)
        x1 = self.enc1(images)  # 1/1
        x2 = self.enc2(self.pool(x1))  # 1/2
        x3 = self.enc3(self.pool(x2))  # 1/4
        x4 = self.dropout(self.enc4(self.pool(x3)))  # 1/8
        x5 = self.dropout(self.enc5(self.pool(x4)))  # 1/16
        x = self.dec4(x5, x4)  # 1/8
        x = self.dec3(x, x3)  # 1/4
        x = self.dec2(x, x2)  # 1/2
        x = self.dec1(x, x1)  # 1/1
        return self.head(x)
