"""The state of a training run: what `last.pt` holds beside the settings, and how it is restored."""

from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoint import load_fitting, plain_weights
from utils.cli import quoted
from utils.ema import Ema
from utils.monitor import Progress


def training_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    scaler: torch.amp.GradScaler,
    ema: Ema | None,
    progress: Progress,
) -> dict[str, Any]:
    """Return everything that an exact resume needs, in tensors and plain values."""
    return {
        "model": plain_weights(model),
        "ema": ema.weights if ema else None,
        "ema_steps": ema.steps if ema else 0,
        "progress": asdict(progress),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": scaler.state_dict(),
    }


STATE = {  # what `last.pt` must hold to be resumed, and of which type
    "config": dict,
    "progress": dict,
    "optimizer": dict,
    "schedule": dict,
    "scaler": dict,
    "ema_steps": int,
    "fingerprint": dict,
}
DEFAULTED = {
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "nesterov",
    "decoupled_weight_decay",
}


def check_training_state(saved: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless a checkpoint holds everything that `training_state` and the scripts put in."""
    wrong = [name for name, kind in STATE.items() if not isinstance(saved.get(name), kind)]
    if not wrong:
        progress = {
            field.name: type(value)
            for field, value in zip(fields(Progress), astuple(Progress()), strict=True)
        }
        wrong = [
            f"progress.{k}" for k, kind in progress.items() if not isinstance(saved["progress"].get(k), kind)
        ]
    if wrong:
        raise ValueError(
            f"{path} holds no complete training state ({wrong[0]} is missing or wrong). Start a new run from "
            f"its weights with --init_from {quoted(path)}"
        )


def restore_training_state(
    saved: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    scaler: torch.amp.GradScaler,
    ema: Ema | None,
) -> None:
    """Load what `training_state` returned, all but the progress.

    Raises:
        ValueError: the weights do not fit the model.
    """
    groups = optimizer.state_dict()["param_groups"]
    try:
        model.load_state_dict(saved["model"])
        for now, then in zip(groups, saved["optimizer"]["param_groups"], strict=True):
            if missing := now.keys() - then.keys() - DEFAULTED:
                raise ValueError(f"its optimizer has no {', '.join(sorted(missing))}")
        optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(
            f"last.pt does not fit the network and optimizer of its settings: {reason}. Use the code that "
            "wrote it, or start a new run from its weights with --init_from"
        ) from error
    score = f"mean_{saved['config']['monitor']}"  # early checkpoints have the scores in their log alone
    scores = [row[score] for row in saved["progress"]["rows"] if score in row]
    schedule.load_state_dict({"scores": scores} | saved["schedule"])
    if saved["scaler"]:  # a run at another precision than fp16 has none
        scaler.load_state_dict(saved["scaler"])
    if ema:
        ema.load(saved["ema"], saved["ema_steps"])


def refuse_changed_data(now: dict[str, Any], saved: dict[str, Any], data_root: str, folder: Path) -> None:
    """Raise ValueError if the data is not what the run in `folder` was started with.

    Args:
        now: fingerprint of the data, by part.
        saved: the same when the run was started.
        data_root: for the message.
        folder: of the run.
    """
    changed = [part for part, value in saved.items() if now.get(part) != value]
    if changed:
        what = f"{data_root} has changed since {folder} was started: {', '.join(changed)}"
        fix = f"Restore the old data, or start a new run with --init_from {quoted(folder / 'last.pt')}"
        raise ValueError(f"{what}. {fix}")


def load_initial_weights(
    model: nn.Module, weights: dict[str, Tensor], source: str, name: str, needs_backbone: bool
) -> str:
    """Load the weights that fit into `model`; return a text that lists what was skipped.

    Args:
        model: changed in place.
        weights: a state dict, maybe of a network with another number of classes.
        source: the file of the weights, for messages.
        name: of the network.
        needs_backbone: every weight of the backbone must be there, because it will be frozen.

    Raises:
        ValueError: nothing fits, or a part of the backbone is missing that must not be.
    """
    skipped = load_fitting(model, weights)
    own = [*model.state_dict()]
    missing = [key for key in own if key in skipped]
    frozen = [key for key in missing if needs_backbone and key.startswith("backbone.")]
    kernels = [key for key, value in model.state_dict().items() if value.dim() > 1]
    if set(kernels) <= set(missing):  # a bias may still have the same name and shape
        raise ValueError(f"init_from {source}: none of its weights fits {name}. Give a checkpoint of {name}")
    if frozen:
        raise ValueError(
            f"init_from {source}: freeze_backbone is set, but {frozen[0]} is missing from it or has another "
            f"shape. Give a checkpoint of {name} with this backbone"
        )
    summary = f"{len(own) - len(missing)} of {len(own)} loaded, {len(skipped)} skipped"
    lines = [f"{key}: {reason}" for key, reason in skipped.items()]
    return "\n  ".join([f"weights from {source}: {summary}", *lines])
