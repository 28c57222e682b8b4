"""SegNet: VGG16 and its mirror, whose decoder unpools with the encoder's max-pooling indices."""

from torch import Tensor, nn

from .backbones import VGG
from .checks import check_images, check_numbers
from .layers import init_weights
from .ops import crop, max_unpool2d, pad_even, pooling_indices


class SegNet(nn.Module):
    """SegNet: upsampling without weights, by the indices of max pooling.

    Paper: SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation (Badrinarayanan,
    Kendall, Cipolla, 2015), https://arxiv.org/abs/1511.00561. The encoder is VGG16's 13 convolutions; each
    pooling keeps the index of the maximum. The decoder writes each value back to that position, with zeros
    elsewhere, and convolutions fill the gaps: edges survive at two bits per value, not a whole feature map.
    Route: image 1/1 → pooled 1/2 (64) → 1/4 (128) → 1/8 (256) → 1/16 (512) → 1/32 (512) → unpooled and
    convolved 1/16 (512) → 1/8 (256) → 1/4 (128) → 1/2 (64) → logits 1/1.
    Differs from the paper: ordinary batch norm statistics, not recomputed over the training set afterwards.
    Pooling rounds odd sizes up, as Caffe does. `dropout` is where Bayesian SegNet has it, off by default.
    Initial weights: He normal (fan in), zero biases, batch norm 1 and 0.001, as in the authors' files.
    Parameters (RGB, 21 classes): 29,455,125.

    Args:
        num_classes: channels of the logits, 2 or more.
        in_channels: channels of the images.
        base_channels: channels at full size, 64 in the paper and in public weights; the others scale with it.
        dropout: probability of zeroing a value after the three deepest stages of both halves, in training.

    Shape:
        images (N, in_channels, H, W), H and W at least 32 → logits (N, num_classes, H, W).

    Raises:
        ValueError: an argument out of its range or choices; images of other channels, or too small.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, *, base_channels: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_numbers(num_classes, in_channels, dropout, base_channels)
        self.in_channels = in_channels
        self.backbone = VGG("vgg16_bn", in_channels, base_channels, return_indices=True)
        self.dropout = nn.Dropout(dropout)
        c1, c2, c3, c4, c5 = self.backbone.out_channels
        self.decoder5 = stage(c5, c5, c5, c4)  # 1/16
        self.decoder4 = stage(c4, c4, c4, c3)  # 1/8
        self.decoder3 = stage(c3, c3, c3, c2)  # 1/4
        self.decoder2 = stage(c2, c2, c1)  # 1/2
        self.decoder1 = stage(c1, c1)  # 1/1
        self.classifier = nn.Conv2d(c1, num_classes, 3, padding=1)
        init_weights(self, mode="fan_in")
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 0.001)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of `images`."""
        check_images(images, self.in_channels)
        x, pooled = images, []
        for layer in self.backbone.features:
            if isinstance(layer, nn.MaxPool2d):
                size, padded = x.shape, pad_even(x)
                x, indices = layer(padded)
                pooled.append((pooling_indices(indices, padded.shape[3]), size))
                x = self.dropout(x) if len(pooled) > 2 else x
            else:
                x = layer(x)
        x = self.dropout(self.decoder5(unpool(x, *pooled[4])))
        x = self.dropout(self.decoder4(unpool(x, *pooled[3])))
        x = self.dropout(self.decoder3(unpool(x, *pooled[2])))
        x = self.decoder2(unpool(x, *pooled[1]))
        x = self.decoder1(unpool(x, *pooled[0]))
        return self.classifier(x)


def unpool(x: Tensor, indices: Tensor, size: tuple[int, ...]) -> Tensor:
    """Write each value of `x` where its maximum was in a map of `size`, zeros elsewhere."""
    return crop(max_unpool2d(x, indices), size)


def stage(*channels: int) -> nn.Sequential:
    """Return 3x3 convolutions from each number of channels to the next, with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for before, after in zip(channels, channels[1:], strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
