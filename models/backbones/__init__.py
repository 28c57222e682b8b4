"""Encoders of the networks, with torchvision's attribute names, so that its public weights fit."""

from .resnet import RESNETS, ResNet
from .vgg import VGG, VGGS

__all__ = ["RESNETS", "VGG", "VGGS", "ResNet"]
