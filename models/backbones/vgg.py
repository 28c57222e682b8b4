"""VGG without its classifier, with or without batch norm."""

from torch import Tensor, nn

from ..checks import check_choice
from ..layers import init_weights
from ..ops import pad_even

DEPTHS = {  # convolutions before each of the five pooling layers
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
VGGS = (*DEPTHS, *(f"{name}_bn" for name in DEPTHS))


class VGG(nn.Module):
    """VGG: 3x3 convolutions and ReLU alone, with five pooling layers that halve the size.

    Paper: Very Deep Convolutional Networks for Large-Scale Image Recognition (Simonyan and Zisserman, 2014),
    https://arxiv.org/abs/1409.1556. Two 3x3 convolutions have the receptive field of a 5x5 with fewer weights
    and one more ReLU.
    Route: image 1/1 → 1/2 (64) → 1/4 (128) → 1/8 (256) → 1/16 (512) → 1/32 (512).
    Differs from the paper: batch norm where the name ends in _bn. Without it, deep VGGs hardly train from
    random weights.
    Initial weights: He normal (fan out), as in torchvision.
    Parameters (convolutions only): 9,220,480 (vgg11), 9,404,992 (13), 14,714,688 (16), 20,024,384 (19).

    Args:
        name: one of `VGGS`.
        in_channels: channels of the images.
        base_channels: channels of the first stage, 64 in the paper; the others scale with it.
        round_up: also pool the last row and column of an odd size, as Caffe did; torchvision drops them.
        return_indices: the pooling layers return the indices of the maxima too, for a network that calls the
            layers of `features` itself.

    Shape:
        images (N, in_channels, H, W) → five feature maps, each after pooling, `out_channels[i]` channels.
    """

    def __init__(
        self,
        name: str,
        in_channels: int = 3,
        base_channels: int = 64,
        *,
        round_up: bool = False,
        return_indices: bool = False,
    ) -> None:
        super().__init__()
        check_choice("backbone", name, VGGS)
        self.name = name
        self.round_up = round_up
        self.out_channels = tuple(base_channels * factor for factor in (1, 2, 4, 8, 8))
        layers: list[nn.Module] = []
        for depth, channels in zip(DEPTHS[name.removesuffix("_bn")], self.out_channels, strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
                if name.endswith("_bn"):
                    layers.append(nn.BatchNorm2d(channels))
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
            layers.append(nn.MaxPool2d(2, return_indices=return_indices))
        self.features = nn.Sequential(*layers)
        init_weights(self)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps after the five pooling layers."""
        x, pooled = images, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                x = layer(pad_even(x) if self.round_up else x)  # zeros change no maximum after ReLU
                pooled.append(x)
            else:
                x = layer(x)
        return tuple(pooled)
