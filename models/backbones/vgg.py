"""VGG without its classifier, with batch norm as a choice."""

from torch import Tensor, nn

from ..layers import check_choice, init_weights, pad_even

DEPTHS = {  # convolutions before each of the five poolings
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
VGGS = (*DEPTHS, *(f"{name}_bn" for name in DEPTHS))


class VGG(nn.Module):
    """VGG: nothing but 3x3 convolutions, ReLU, and five poolings that halve the map.

    Paper: Very Deep Convolutional Networks for Large-Scale Image Recognition (Simonyan and Zisserman, 2014),
    https://arxiv.org/abs/1409.1556. Two 3x3 convolutions see what a 5x5 sees, with fewer weights and one more
    ReLU.
    Route: image 1/1 → 1/2 (64) → 1/4 (128) → 1/8 (256) → 1/16 (512) → 1/32 (512).
    Differs from the paper: batch norm where the name ends in _bn, without which deep ones hardly train from
    random weights.
    Initial weights: He normal (fan out), as torchvision has it.
    Parameters (convolutions only): 9,220,480 (vgg11), 9,404,992 (13), 14,714,688 (16), 20,024,384 (19).

    Args:
        name: one of `VGGS`.
        in_channels: channels of the images.
        base_channels: channels of the first stage, 64 in the paper; the others grow with it.
        round_up: pool the last row and column of an odd map too, as Caffe did; torchvision drops them.

    Shape:
        images (N, in_channels, H, W) → five maps, each after its pooling, `out_channels[i]` channels.
    """

    def __init__(
        self, name: str, in_channels: int = 3, base_channels: int = 64, round_up: bool = False
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
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        init_weights(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps after the five poolings."""
        x, maps = images, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                x = layer(pad_even(x) if self.round_up else x)  # after ReLU a zero never beats a value
                maps.append(x)
            else:
                x = layer(x)
        return maps
