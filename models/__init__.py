"""Segmentation networks: logits = model(images). The folder only needs torch and can be copied elsewhere."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from .checkpoint import read_checkpoint
from .checks import check_choice
from .deeplabv3plus import DeepLabV3Plus
from .fcn import FCN
from .inference import fold_batch_norm, prepare_for_inference
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
    "architecture",
    "build_model",
    "fold_batch_norm",
    "load_model",
    "load_pretrained",
    "prepare_for_inference",
    "read_checkpoint",
]


def build_model(name: str, num_classes: int, in_channels: int = 3, **options: object) -> nn.Module:
    """Build a network by its name, with random weights.

    Args:
        name: a key of `MODELS`.
        num_classes: channels of the logits, background included.
        in_channels: channels of the images.
        **options: keyword arguments of the network's class, e.g. `backbone`, `base_channels`.

    Raises:
        ValueError: an unknown name or option, or a value that the network does not accept.

    Example:
        >>> model = build_model("unet", num_classes=5, base_channels=8)
        >>> model(torch.zeros(2, 3, 40, 56)).shape
        torch.Size([2, 5, 40, 56])
    """
    check_choice("model", name, MODELS)
    known = list(inspect.signature(MODELS[name]).parameters)[2:]  # after num_classes and in_channels
    for key in options:
        check_choice(f"an option of {name}", key, known, fix="Leave it out.")
    return MODELS[name](num_classes, in_channels, **options)


def architecture(name: str, num_classes: int, in_channels: int = 3, **options: object) -> dict[str, object]:
    """Return the arguments of `build_model`, defaults of the class included, as checkpoints hold them."""
    arguments = inspect.signature(MODELS[name]).bind(num_classes, in_channels, **options)
    arguments.apply_defaults()
    own = dict([*arguments.arguments.items()][2:])  # after num_classes and in_channels
    return {"name": name, "num_classes": num_classes, "in_channels": in_channels, "options": own}


def load_model(checkpoint: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Build the network that a checkpoint describes, with its weights (the averaged ones if it has them).

    Args:
        checkpoint: a `best.pt` or `last.pt` of a run.
        device: where to put the network.

    Returns:
        The network in evaluation mode. `model.info` has the rest of the checkpoint's description as
        attributes: `architecture`, and everything under its `info` (`class_names`, `mean`, `std`, ...).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another format, or does not fit the network it names.
    """
    content = read_checkpoint(checkpoint)
    architecture = content["architecture"]
    arguments = {key: value for key, value in architecture.items() if key != "options"}
    with torch.device("meta"):  # spends no time and no random numbers on weights that are replaced at once
        model = build_model(**arguments, **architecture["options"])
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
