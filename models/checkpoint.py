"""Read a file of weights safely: nothing in it is executed, a damaged one is refused before it is used."""

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

FORMAT = 1  # the layout of a checkpoint that this code writes and reads


def read_file(path: str | Path, what: str, legacy: bool = False) -> dict:
    """Open a dict saved by `torch.save`, on the CPU, after testing every checksum of the file.

    Only tensors, numbers, strings, lists and dicts are accepted (`weights_only=True`): it cannot run code.

    Args:
        path: the file.
        what: its name in messages, e.g. "checkpoint".
        legacy: also open files from before torch 1.6, as some public weights are, which have no checksums.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or something else than a saved dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}. Give the path of an existing file.")
    remedy = f"Give a {what} saved by torch.save, or copy it again from where it was whole."
    try:
        if not legacy or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch itself does not notice a flipped byte
            if damaged:
                raise ValueError(f"the checksum of its part {damaged!r} is wrong")
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole {what}: {error}. {remedy}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a {what} that can be opened safely: {reason} {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict; got {type(content).__name__}. {remedy}")
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
    """Read a checkpoint of this project (`last.pt`, `best.pt`) with all checks but the fit to a network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no checkpoint of this project, of another format, or not finite.
    """
    checkpoint = read_file(path, "checkpoint")
    remedy = "Give a best.pt or last.pt of a run."
    if "format" not in checkpoint:
        raise ValueError(f"{path} must have a 'format' number; it holds {list(checkpoint)[:4]}. {remedy}")
    if checkpoint["format"] != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {checkpoint['format']!r}, but this code reads format {FORMAT}. "
            f"Use the version of the code that wrote it."
        )
    check_weights(checkpoint.get("model"), f"{path}, entry 'model',")
    if checkpoint.get("ema") is not None:
        check_weights(checkpoint["ema"], f"{path}, entry 'ema',")
    architecture = checkpoint.get("architecture")
    parts = ["name", "num_classes", "in_channels", "options"]
    if not isinstance(architecture, dict) or set(architecture) != set(parts):
        raise ValueError(f"{path}, entry 'architecture', must name {parts}; got {architecture!r}. {remedy}")
    if not isinstance(checkpoint.get("info"), dict) or not isinstance(architecture["options"], dict):
        raise ValueError(f"{path} must hold dicts under 'info' and 'options'; it does not. {remedy}")
    return checkpoint
