"""Segmentation networks: logits = model(images). The folder needs torch alone and can be copied elsewhere."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .checkpoint import read_checkpoint
from .deeplabv3plus import DeepLabV3Plus
from .fcn import FCN
from .layers import check_choice
from .pretrained import PretrainedReport, load_pretrained
from .pspnet import PSPNet
from .segnet import SegNet
from .unet import UNet

MODELS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "deeplabv3plus": DeepLabV3Plus,
    "pspnet": PSPNet,
    "fcn": FCN,
    "segnet": SegNet,
}

__all__ = [
    "FCN",
    "MODELS",
    "DeepLabV3Plus",
    "PSPNet",
    "PretrainedReport",
    "SegNet",
    "UNet",
    "build_model",
    "load_model",
    "load_pretrained",
    "read_checkpoint",
]


def build_model(name: str, num_classes: int, in_channels: int = 3, **options: object) -> nn.Module:
    """Build a network by its name, with random weights.

    Args:
        name: a key of `MODELS`.
        num_classes: channels of the logits, background included.
        in_channels: channels of the images.
        **options: what the network's class takes beyond these, e.g. `backbone`, `base_channels`.

    Raises:
        ValueError: an unknown name or option, or a value that the network refuses.

    Example:
        >>> model = build_model("unet", num_classes=5, base_channels=8)
        >>> model(torch.zeros(2, 3, 40, 56)).shape
        torch.Size([2, 5, 40, 56])
    """
    check_choice("model", name, MODELS)
    known = list(inspect.signature(MODELS[name]).parameters)[2:]  # after num_classes and in_channels
    for key in options:
        check_choice(f"an option of {name}", key, known)
    shapes_alone = torch.get_default_device().type == "meta"
    with _NoInitialWeights() if shapes_alone else nullcontext():
        return MODELS[name](num_classes, in_channels, **options)


class _NoInitialWeights(TorchFunctionMode):
    """Draws no weights at random; on the meta device that imports the compiler, which takes a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", None) == "normal_":  # of torch.Tensor, or of torch.nn.init
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_model(checkpoint: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Build the network that a checkpoint describes, with its weights (the averaged ones if it has them).

    Args:
        checkpoint: a `best.pt` or `last.pt` of a run.
        device: where to put the network.

    Returns:
        The network in evaluation mode. `model.info` holds what the checkpoint knows beside the weights, by
        attribute: `architecture`, and what the run wrote under info (`class_names`, `mean`, `std`, ...).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another format, or does not fit the network it names.
    """
    content = read_checkpoint(checkpoint)
    architecture = content["architecture"]
    sizes = {key: value for key, value in architecture.items() if key != "options"}
    with torch.device("meta"):  # no time and no random numbers spent on weights that are replaced at once
        model = build_model(**sizes, **architecture["options"])
    weights = content["model"] if content.get("ema") is None else content["ema"]
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{checkpoint} does not fit the {architecture['name']} it describes: {reason}. "
            f"Use the version of the code that wrote it."
        ) from error
    model.info = SimpleNamespace(**{**content["info"], "architecture": architecture})
    return model.eval().to(device)
