"""Checks of arguments and inputs, whose messages say what was expected, what came and what to do."""

import difflib
from collections.abc import Collection

import torch
from torch import Tensor

MIN_SIDE = 32  # pixels; the encoders halve height and width five times


def check_images(images: Tensor, in_channels: int) -> None:
    """Raise ValueError for a batch that no network of this package can take."""
    if isinstance(images, torch.fx.Proxy):  # torch.fx traces symbols, which have no shape to compare
        return
    if images.dim() != 4 or images.shape[1] != in_channels:
        raise ValueError(
            f"images must be (N, {in_channels}, H, W) for this model; got {tuple(images.shape)}. "
            f"Build the model with the images' in_channels, or convert the images."
        )
    if not images.is_floating_point():
        raise ValueError(
            f"images must be floating point; got {images.dtype}. Convert them with .float(), and normalize "
            f"them as in training."
        )
    height, width = images.shape[-2:]
    if height < MIN_SIDE or width < MIN_SIDE:
        raise ValueError(
            f"images must be at least {MIN_SIDE} pixels high and wide; got {height} x {width}. "
            f"Enlarge or pad them first."
        )


def check_numbers(num_classes: int, in_channels: int, dropout: float, base_channels: int = 1) -> None:
    """Raise ValueError for a count or a probability out of range."""
    counts = {"num_classes": num_classes, "in_channels": in_channels, "base_channels": base_channels}
    for name, value in counts.items():
        least = 2 if name == "num_classes" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            hint = "Count the background as a class." if name == "num_classes" else "Give a larger number."
            raise ValueError(f"{name} must be a whole number of {least} or more; got {value!r}. {hint}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1); got {dropout!r}. Give 0 to leave it out.")


def check_choice(
    name: str, value: object, choices: Collection[object], fix: str = "Choose one of these."
) -> None:
    """Raise ValueError unless `value` is one of `choices`; the message names the nearest choice, or `fix`."""
    if value not in list(choices):  # `in` on a dict would fail for an unhashable value such as a list
        names = [str(choice) for choice in choices]
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else fix
        raise ValueError(f"{name} must be one of {', '.join(names)}; got {value!r}. {hint}")
