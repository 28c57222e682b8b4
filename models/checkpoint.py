"""Read a file of weights safely: nothing in it is executed, and a damaged one is refused before use."""

import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

FORMAT = 2  # of the checkpoints that this code writes; it also reads format 1, whose names were others
OLD_NAMES = {  # by network: the beginnings of names in format 1, as patterns, and those of today
    "unet": {
        r"enc(\d)\.0\.": r"encoder\1.",
        r"enc(\d)\.1\.0\.": r"encoder\1.3.",
        r"enc(\d)\.1\.1\.": r"encoder\1.4.",
        r"dec(\d)\.up\.": r"decoder\1.up.",
        r"dec(\d)\.conv\.0\.": r"decoder\1.conv.",
        r"dec(\d)\.conv\.1\.0\.": r"decoder\1.conv.3.",
        r"dec(\d)\.conv\.1\.1\.": r"decoder\1.conv.4.",
        r"head\.": "classifier.",
    },
    "deeplabv3plus": {
        r"aspp\.point\.": "aspp.conv1x1.",
        r"aspp\.pool\.": "aspp.image_pooling.",
        r"fine\.": "low_level.",
        r"decoder\.0\.": "fuse.",
        r"decoder\.1\.": "refine.",
        r"head\.": "classifier.",
    },
    "pspnet": {
        r"pyramid\.stages\.": "ppm.",
        r"head\.0\.": "fuse.",
        r"head\.2\.": "classifier.",
        r"aux\.": "aux_classifier.",
    },
    "fcn": {
        r"score\.": "score_fr.",
        r"up_to_pool4\.": "upscore2.",
        r"up_to_pool3\.": "upscore_pool4.",
        r"up_to_image\.": "upscore.",
    },
    "segnet": {r"decoder1\.3\.": "classifier."},
}


def read_file(path: str | Path, what: str, legacy: bool = False) -> dict:
    """Open a dict saved by `torch.save`, on the CPU, after testing every checksum of the file.

    Only tensors, numbers, strings, lists and dicts are accepted (`weights_only=True`), so no code can run.

    Args:
        path: the file.
        what: its name in messages, e.g. "checkpoint".
        legacy: also open files from before torch 1.6, as some public weights are, which have no checksums.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or not a saved dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}. Give the path of an existing file.")
    fix = f"Give a {what} saved by torch.save, or copy it again from an intact one."
    try:
        if not legacy or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch itself does not notice a flipped byte
            if damaged:
                raise ValueError(f"the checksum of its part {damaged!r} is wrong")
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole {what}: {error}. {fix}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a {what} that can be opened safely: {reason} {fix}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict; got {type(content).__name__}. {fix}")
    return content


def check_weights(state: object, where: str) -> dict[str, Tensor]:
    """Return `state` if it is a dict of finite tensors by name; raise ValueError if not."""
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{where} must be a dict of tensors by name. Give a file that holds a state dict.")
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{where} must be finite; {key!r} is not. Use an earlier checkpoint.")
    return state


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of this project (`last.pt`, `best.pt`) with every check except the fit to a network.

    One of format 1 is returned in the present format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, not a checkpoint of this project, of another format, or not finite.
    """
    checkpoint = read_file(path, "checkpoint")
    fix = "Give a best.pt or last.pt of a run."
    if "format" not in checkpoint:
        raise ValueError(f"{path} must have a 'format' number; it holds {list(checkpoint)[:4]}. {fix}")
    if checkpoint["format"] not in (1, FORMAT):
        raise ValueError(
            f"{path} has checkpoint format {checkpoint['format']!r}, but this code reads formats 1 and "
            f"{FORMAT}. Use the version of the code that wrote it."
        )
    check_weights(checkpoint.get("model"), f"{path}, entry 'model',")
    if checkpoint.get("ema") is not None:
        check_weights(checkpoint["ema"], f"{path}, entry 'ema',")
    architecture = checkpoint.get("architecture")
    parts = ["name", "num_classes", "in_channels", "options"]
    if not isinstance(architecture, dict) or set(architecture) != set(parts):
        raise ValueError(f"{path}, entry 'architecture', must name {parts}; got {architecture!r}. {fix}")
    if not isinstance(checkpoint.get("info"), dict) or not isinstance(architecture["options"], dict):
        raise ValueError(f"{path} must hold dicts under 'info' and 'options'; it does not. {fix}")
    return checkpoint if checkpoint["format"] == FORMAT else in_present_format(checkpoint)


def in_present_format(checkpoint: dict) -> dict:
    """Return a checkpoint of format 1 with today's names: of weights, their average and the optimizer's."""
    network = checkpoint["architecture"]["name"]
    new = {**checkpoint, "format": FORMAT}
    for entry in ("model", "ema"):
        if new.get(entry) is not None:
            new[entry] = {new_name(network, name): value for name, value in new[entry].items()}
    if "optimizer" in new:
        groups = [dict(group) for group in new["optimizer"]["param_groups"]]
        for group in groups:
            if "param_names" in group:
                group["param_names"] = [new_name(network, name) for name in group["param_names"]]
        new["optimizer"] = {**new["optimizer"], "param_groups": groups}
    return new


def new_name(network: str, name: str) -> str:
    """Return today's name of a tensor that was called `name` in format 1."""
    for old, new in OLD_NAMES.get(network, {}).items():
        if match := re.match(old, name):
            return match.expand(new) + name[match.end() :]
    return name
