"""ResNet without its classifier, whose last stages can be dilated instead of strided."""

from torch import Tensor, nn

from ..checks import check_choice
from ..layers import init_weights


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet18 and 34).

    Args:
        in_channels: channels of the input.
        width: channels of both convolutions and of the output.
        stride: of the first convolution.
        dilation: of the convolution that has the stride.
        next_dilation: of every 3x3 convolution after it.
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, next_dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, next_dilation, next_dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, width, H/stride, W/stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x.add_(identity))


class Bottleneck(nn.Module):
    """1x1 to `width`, 3x3 with the stride, 1x1 to four times the width, and a shortcut (ResNet50 and 101).

    Args as in `BasicBlock`; the only 3x3 convolution is the one that has the stride.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, next_dilation: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, 4 * width, H/stride, W/stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu(x.add_(identity))


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return the projection of a shortcut whose shape changes, else None."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


RESNETS: dict[str, tuple[type[nn.Module], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}
DILATIONS = {8: (1, 1, 2, 4), 16: (1, 1, 1, 2), 32: (1, 1, 1, 1)}  # of the four stages, by output stride


class ResNet(nn.Module):
    """ResNet: four stages of residual blocks, whose outputs are all returned.

    Paper: Deep Residual Learning for Image Recognition (He et al., 2015), https://arxiv.org/abs/1512.03385.
    A block learns only what to add to its input, so that gradients pass through a hundred layers. Dilation
    (Yu and Koltun, 2016) keeps the resolution of late stages: where a stride is removed, the kernels after it
    are dilated, and every weight keeps its meaning.
    Route: image 1/1 → stem 1/2 → pool 1/4 → layer1 1/4, layer2 1/8, layer3 1/16, layer4 1/32; no stage goes
    below 1/output_stride.
    Differs from the paper: the stride of a Bottleneck is in its 3x3 convolution, as in torchvision. In a
    dilated stage the convolution that lost its stride keeps the dilation before it, all later ones take the
    doubled one; the same rule applies to BasicBlocks, which torchvision refuses to dilate.
    Initial weights: He normal (fan out), batch norm 1 and 0.
    Parameters: 11,176,512 (18), 21,284,672 (34), 23,508,032 (50), 42,500,160 (101).

    Args:
        name: a key of `RESNETS`.
        in_channels: channels of the images.
        output_stride: 8, 16 or 32, the stride of the last stage.

    Shape:
        images (N, in_channels, H, W) → four feature maps, `out_channels[i]` channels each.
    """

    def __init__(self, name: str, in_channels: int = 3, output_stride: int = 32) -> None:
        super().__init__()
        check_choice("backbone", name, RESNETS)
        check_choice("output_stride", output_stride, DILATIONS)
        block, depths = RESNETS[name]
        widths = (64, 128, 256, 512)
        self.name = name
        self.out_channels = tuple(width * block.expansion for width in widths)
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        channels, before = 64, 1
        stages = zip(widths, depths, DILATIONS[output_stride], strict=True)
        for number, (width, depth, dilation) in enumerate(stages, 1):
            stride = 1 if number == 1 or dilation > before else 2  # dilated instead of strided
            blocks = [block(channels, width, stride, before, dilation)]
            channels, before = width * block.expansion, dilation
            blocks += [block(channels, width, 1, dilation, dilation) for _ in range(depth - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        init_weights(self)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the outputs of layer1 to layer4."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))  # 1/4
        x1 = self.layer1(x)  # 1/4
        x2 = self.layer2(x1)  # 1/8
        x3 = self.layer3(x2)  # 1/min(16, output_stride)
        x4 = self.layer4(x3)  # 1/output_stride
        return x1, x2, x3, x4
