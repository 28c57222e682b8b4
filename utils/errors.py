"""Messages for errors that end a run, with advice."""

import os
from pathlib import Path

import torch
from torch import nn

from utils.checkpoint import first_non_finite, plain_weights
from utils.cli import Fail, quoted
from utils.device import is_out_of_memory, peak_memory
from utils.distributed import is_lost


def explain(error: Exception, device: torch.device, folder: Path | None, memory_savers: str) -> str | None:
    """Return what the user can do about an error that ended a run; None where it is a bug of this program.

    Args:
        error: what ended the run.
        device: where the run computed.
        folder: the run's folder; None before there is one.
        memory_savers: settings that need less memory.
    """
    saved = folder is not None and os.path.exists(folder / "last.pt")
    resume = f"continue with --resume {quoted(folder)}" if saved else "start again: nothing was saved yet"
    first_line = str(error).split("\n")[0]
    if is_out_of_memory(error):
        weights = f" (from these weights: --init_from {quoted(folder / 'last.pt')})" if saved else ""
        peak = f"out of memory on {device}, with a peak of {peak_memory(device) / 2**30:.1f} GiB"
        return f"{peak}. Free some, then {resume}; or start a new run{weights} with {memory_savers}"
    if is_lost(error):
        reason = first_line.split("] ", 1)[-1].split(". ")[0]  # without gloo's source file and its advice
        return f"another process of this run has ended or hangs: {reason}. Fix that, then {resume}"
    if "DataLoader worker" in first_line:
        advice = "If memory or /dev/shm ran out, use num_workers 0 or fewer workers"
        return f"{first_line} {advice}; then {resume}"
    message = f"{str(error).rstrip('.')}. Fix that, then {resume}"
    return message if isinstance(error, (ValueError, OSError)) else None


def non_finite_advice(folder: Path) -> str:
    """Return what is left and what to try when numbers of a run in `folder` are no longer finite."""
    last = folder / "last.pt"
    kept = f"{last} is the last good state. " if last.exists() else ""
    return f"{kept}Try a lower learning_rate, clip_grad 1, more warmup_steps, or amp off"


def refuse_non_finite(model: nn.Module, step: int, folder: Path) -> None:
    """Raise Fail if weights are not finite after a step, which the loss does not show yet."""
    name = first_non_finite(plain_weights(model))
    if name:
        advice = non_finite_advice(folder)
        raise Fail(f"the weights of {name} are not finite after step {step}. {advice}", 1)
