"""Entry points of torch.hub, e.g. `torch.hub.load(folder, "deeplabv3plus", source="local", num_classes=21)`.

Each returns its network with random weights; `options` are those of the class, e.g. `backbone="resnet18"`.
"""

from torch import nn

from models import build_model

dependencies = ["torch"]


def unet(num_classes: int, in_channels: int = 3, **options: object) -> nn.Module:
    """Build a UNet; options: base_channels, bilinear, dropout."""
    return build_model("unet", num_classes, in_channels, **options)


def deeplabv3plus(num_classes: int, in_channels: int = 3, **options: object) -> nn.Module:
    """Build a DeepLabv3+; options: backbone, output_stride, separable, dropout."""
    return build_model("deeplabv3plus", num_classes, in_channels, **options)


def pspnet(num_classes: int, in_channels: int = 3, **options: object) -> nn.Module:
    """Build a PSPNet; options: backbone, output_stride, aux, dropout."""
    return build_model("pspnet", num_classes, in_channels, **options)


def fcn(num_classes: int, in_channels: int = 3, **options: object) -> nn.Module:
    """Build an FCN; options: backbone, variant, dropout."""
    return build_model("fcn", num_classes, in_channels, **options)


def segnet(num_classes: int, in_channels: int = 3, **options: object) -> nn.Module:
    """Build a SegNet; options: base_channels, dropout."""
    return build_model("segnet", num_classes, in_channels, **options)
