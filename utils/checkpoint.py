"""Atomic writes: everything this program writes goes through `write_atomic`.

A file is written under a hidden name beside its target, flushed to the disk, then renamed, so that a kill, a
full disk or a power cut leaves either the old file or the new one. Checkpoints are read in
`models/checkpoint.py`.
"""

import errno
import json
import os
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

TEMPORARY = ".writing"  # ending of a file that is not complete yet
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # some network and FUSE mounts


def write_atomic(path: Path, write: Callable[[BinaryIO], Any], sync: bool = True) -> None:
    """Let `write` fill a temporary file, then rename it to `path`.

    Without `sync` the file is not flushed to the disk; `flush_to_disk` does that once for many files. An
    OSError (no room, no right, no folder) names `path`, and the file that was there is unchanged.
    """
    # shorter than any name that the file system takes for `path` itself
    temporary = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # the folder itself may fail
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    if sync:
        _flush_folder(path)  # so that the rename survives a power cut as well


def flush_to_disk(paths: Iterable[Path]) -> None:
    """Flush files that were written without `sync`, and their folders, each once."""
    files = {path for path in paths if path.exists()}
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for path in {path.parent: path for path in files}.values():
        _flush_folder(path)


def _flush_folder(path: Path) -> None:
    """Flush the folder of a file to the disk; where folders cannot be flushed, do nothing."""
    if os.name != "posix":
        return
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            error.filename = str(path)
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """`write_atomic` for text, in UTF-8."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """`write_atomic` for JSON that a person reads."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_image(path: Path, image: Any, sync: bool = True, **options: Any) -> None:
    """`write_atomic` for a Pillow image, as PNG."""
    write_atomic(path, lambda file: image.save(file, "png", **options), sync)


def save_atomic(checkpoint: dict[str, Any], path: Path) -> None:
    """`write_atomic` for a checkpoint of tensors, numbers, strings, lists and dicts.

    Anything else, which could not be read back without running foreign code, is a TypeError.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch's own error, over that of a full disk
                raise error.__context__ from None
            raise

    _check_plain(checkpoint, "checkpoint")
    write_atomic(path, write)


def sweep(folder: Path) -> None:
    """Remove the incomplete files that a killed process left in a run's folder and the folders below it."""
    for left in [*folder.glob(f".*{TEMPORARY}"), *folder.glob(f"*/.*{TEMPORARY}")]:
        left.unlink(missing_ok=True)


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names of the model's own file, without the prefixes of wrappers."""
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): value.detach()
        for name, value in model.state_dict().items()
    }


def first_non_finite(weights: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None where all are finite."""
    finite = torch.stack([torch.isfinite(value).all() for value in weights.values()]).tolist()  # one wait
    return next((name for name, each in zip(weights, finite, strict=True) if not each), None)


def load_fitting(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, str]:
    """Load the weights that fit into `model` by name and shape; return the other names, with the reason."""
    own, fitting, skipped = model.state_dict(), {}, {}
    for name, value in weights.items():
        if name not in own:
            skipped[name] = "not in this model"
        elif own[name].shape != value.shape:
            skipped[name] = f"{tuple(value.shape)} there, {tuple(own[name].shape)} here"
        else:
            fitting[name] = value
    model.load_state_dict({**own, **fitting})
    return skipped | {name: "not in the checkpoint" for name in own if name not in weights}


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if type(key) not in (str, int):
                raise TypeError(f"{where} has the key {key!r}; a checkpoint's are strings or whole numbers")
            _check_plain(item, f"{where}[{key!r}]")
    elif not (value is None or type(value) in (str, int, float, bool, Tensor)):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values")
