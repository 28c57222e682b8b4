"""Losses of (logits, masks). All leave out ignored pixels, and are 0 where no pixel is valid."""

import difflib
import inspect
from collections.abc import Sequence

from torch import Tensor

from .auxiliary import AuxLoss
from .base import SegmentationLoss
from .cross_entropy import CrossEntropy, WeightedCrossEntropy, median_frequency_weights
from .dice import Dice
from .focal import Focal
from .joint import Joint

__all__ = ["LOSSES", "AuxLoss", "SegmentationLoss", "build_loss", "median_frequency_weights"]

LOSSES: dict[str, type[SegmentationLoss]] = {
    "ce": CrossEntropy,
    "weighted_ce": WeightedCrossEntropy,
    "focal": Focal,
    "dice": Dice,
    "joint": Joint,
}


def build_loss(
    name: str,
    ignore_index: int = 255,
    class_weights: Sequence[float] | Tensor | None = None,
    fused: bool = True,
    **options: object,
) -> SegmentationLoss:
    """Build a loss by its name: `loss = loss_fn(logits, masks)`.

    Args:
        name: a key of `LOSSES`.
        ignore_index: label of the pixels that do not count.
        class_weights: one number per class, for weighted_ce (required), focal, and joint with one of these.
        fused: compute in one pass (`losses/fused.py`); False: by the formula in the loss's own file.
        **options: `focal_gamma` (focal, joint with focal), `dice_weight` and `joint_ce` (joint),
            `dice_smooth` (dice, joint). An option that the loss does not have is refused.

    Raises:
        ValueError: unknown name, an option or weights that do not apply, or a value out of range.

    Example:
        >>> import torch
        >>> loss_fn = build_loss("joint", dice_weight=0.25)
        >>> logits, masks = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
        >>> loss, terms = loss_fn.with_terms(logits, masks)
        >>> print(f"{loss:.4f}", {name: f"{term:.4f}" for name, term in terms.items()})
        0.5999 {'ce': '0.6931', 'dice': '0.3200'}
    """
    if name not in LOSSES:
        close = difflib.get_close_matches(str(name), LOSSES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {name!r}.{hint}")
    known = inspect.signature(LOSSES[name]).parameters
    if class_weights is not None:
        options["class_weights"] = class_weights
    if "fused" in known:  # a loss of your own need not have it
        options["fused"] = fused
    for option in options:
        if option not in known and "options" not in known:  # joint hands on those of its pixel loss
            takes = ", ".join(key for key in known if key not in ("ignore_index", "fused")) or "no options"
            raise ValueError(
                f"{option} does not apply to loss {name!r}, which takes {takes}. Leave {option} out."
            )
    return LOSSES[name](ignore_index=ignore_index, **options)
