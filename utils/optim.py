"""Optimizers with their parameter groups, and learning-rate schedules that are functions of the step.

The rate of step `k` is a closed form of `k` (for plateau also of the scores seen so far), never of the
rate of step `k - 1`. A run that is broken off and resumed therefore continues with the very same digits,
and what a schedule will do can be drawn before it does it.
"""

import difflib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def _adam(groups: list[dict], momentum: float, **fast: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-8, **fast)


def _sgd(groups: list[dict], momentum: float, **fast: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, **fast)


def _rmsprop(groups: list[dict], momentum: float, **fast: bool) -> torch.optim.Optimizer:
    # torch has no fused one
    return torch.optim.RMSprop(groups, alpha=0.99, eps=1e-8, momentum=momentum)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": _adam,
    "sgd": _sgd,
    "rmsprop": _rmsprop,
}


def build_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    backbone_lr_scale: float = 1.0,
    backbone: str = "backbone",
) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters of `model`.

    Args:
        model: on its device already; on a CPU or CUDA device adam and sgd take their fused form.
        name: `adam` (betas 0.9 and 0.999; weight decay is the L2 term of the paper, not AdamW's), `sgd`
            (Nesterov, in torch's form: the velocity does not contain the learning rate), `rmsprop` (alpha
            0.99).
        lr: learning rate of everything but the backbone.
        weight_decay: on weights of two or more dimensions; norms and biases have none.
        momentum: of sgd and rmsprop; Adam has its first beta instead.
        backbone_lr_scale: factor on the learning rate of the parameters below a module named `backbone`.
        backbone: the name of that module.

    Raises:
        ValueError: unknown name, a value out of range, or a parameter that is not in exactly one group.
    """
    _one_of("optimizer", name, OPTIMIZERS)
    _within("learning_rate", lr, lr > 0, "above 0")
    _within("weight_decay", weight_decay, weight_decay >= 0, "0 or more")
    _within("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
    _within("backbone_lr_scale", backbone_lr_scale, backbone_lr_scale > 0, "above 0")
    groups = parameter_groups(model, lr, weight_decay, backbone_lr_scale, backbone)
    check_groups(model, groups)
    fast = all(p.device.type in ("cpu", "cuda") for group in groups for _, p in group["params"])
    return OPTIMIZERS[name](groups, momentum, **({"fused": True} if fast else {}))


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    backbone_lr_scale: float = 1.0,
    backbone: str = "backbone",
) -> list[dict]:
    """Sort the trainable parameters by learning rate and by weight decay; the arguments of `build_optimizer`.

    Vectors (scale and shift of a norm, every bias) get no weight decay: pulling them to zero makes no
    function simpler (He et al., Bag of Tricks, 2019, section 3.1).

    Returns:
        Up to four groups, called `head`, `head.no_decay`, `backbone`, `backbone.no_decay` under
        `name`; an optimizer keeps the parameters' names under `param_names`.

    Raises:
        ValueError: `backbone_lr_scale` is not 1, and no parameter below `backbone` is trainable.
    """
    split = {"head": [], "head.no_decay": [], "backbone": [], "backbone.no_decay": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "backbone" if backbone in name.split(".") else "head"
            split[part if parameter.ndim > 1 else f"{part}.no_decay"].append((name, parameter))
    if backbone_lr_scale != 1 and not split["backbone"] + split["backbone.no_decay"]:
        raise ValueError(
            f"backbone_lr_scale needs trainable parameters under {backbone!r}; {type(model).__name__} has "
            f"none; got {backbone_lr_scale}. Set it to 1, or take a model with a backbone that is not frozen."
        )
    return [
        {
            "params": members,
            "name": name,
            "lr": lr * (backbone_lr_scale if name.startswith("backbone") else 1),
            "weight_decay": 0.0 if name.endswith("no_decay") else weight_decay,
        }
        for name, members in split.items()
        if members
    ]


def check_groups(model: nn.Module, groups: list[dict]) -> None:
    """Raise ValueError unless `groups` hold each trainable parameter of `model` once and no other."""
    members = [p[1] if isinstance(p, tuple) else p for group in groups for p in group["params"]]
    seen = Counter(id(parameter) for parameter in members)
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            f"optimizer: some parameter must be trainable; {type(model).__name__} has none. Unfreeze a part."
        )
    missing = [name for key, name in trainable.items() if not seen[key]]
    twice = [name for key, name in trainable.items() if seen[key] > 1]
    strange = len(seen.keys() - trainable.keys())
    if missing or twice or strange:
        raise ValueError(
            "optimizer: each trainable parameter must be in exactly one group; got missing: "
            f"{missing or 'none'}, more than once: {twice or 'none'}, frozen or of another model: {strange}. "
            "Build the groups with parameter_groups."
        )


class Schedule:
    """Constant learning rate (`none`), and the frame of the other schedules.

    In the first W = `warmup_steps` steps, k < W, the rate is base * (k + 1) / (W + 1); then base *
    factor(k).

    Args:
        optimizer: its groups' present rates are the base rates.
        steps_per_epoch: optimizer steps, not batches, where gradients are accumulated.
        epochs: length of the run, in epochs.
        warmup_steps: length of the linear warm-up, in steps.

    Attributes:
        position: the number of steps taken; each group's `lr` is the one of the step to come.
    """

    kept = ("position",)  # what a checkpoint needs, plain values

    def __init__(
        self, optimizer: torch.optim.Optimizer, steps_per_epoch: int, epochs: int, warmup_steps: int
    ) -> None:
        self.optimizer = optimizer
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * epochs
        self.warmup_steps = warmup_steps
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.position = 0
        self._set_rates()

    def factor(self, step: int) -> float:
        """Return the factor on the base rate at `step`, 0-based, warm-up left aside."""
        return 1.0

    def step(self) -> None:
        """Count one optimizer step, and set the rates of the next."""
        self.position += 1
        self._set_rates()

    def epoch_end(self, score: float | None) -> None:
        """Take note of the monitored score, higher is better; None where the epoch had no validation."""

    def plan(self) -> list[float]:
        """Return the first group's rate at each step of the run, to draw (plateau: without further cuts)."""
        return [self.base_lrs[0] * self._warmed(step) for step in range(self.total_steps)]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain values."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken: the groups' rates are set anew."""
        for name in self.kept:
            setattr(self, name, state[name])
        self._set_rates()

    def _warmed(self, step: int) -> float:
        return (step + 1) / (self.warmup_steps + 1) if step < self.warmup_steps else self.factor(step)

    def _set_rates(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self._warmed(self.position)


class StepLR(Schedule):
    """step_gamma^floor(epoch / step_size), as torch's StepLR; epochs count from the run's start."""

    def __init__(self, *frame: Any, step_size: int, step_gamma: float) -> None:
        _within("step_size", step_size, step_size >= 1, "1 or more epochs")
        _within("step_gamma", step_gamma, 0 < step_gamma <= 1, "in (0, 1]")
        self.step_size, self.step_gamma = step_size, step_gamma
        super().__init__(*frame)

    def factor(self, step: int) -> float:
        """Return gamma^floor(epoch / size)."""
        return self.step_gamma ** (step // self.steps_per_epoch // self.step_size)


class PolyLR(Schedule):
    """(1 - t / T)^poly_power per step, t of the T steps after the warm-up: DeepLab's "poly" (Chen, 2016).

    The last step has t = T - 1 and so a rate above 0; past the end of the run the rate is 0.
    """

    def __init__(self, *frame: Any, poly_power: float) -> None:
        _within("poly_power", poly_power, poly_power > 0, "above 0")
        self.poly_power = poly_power
        super().__init__(*frame)

    def factor(self, step: int) -> float:
        """Return (1 - t / T)^power."""
        length = self.total_steps - self.warmup_steps
        return max(0.0, 1 - (step - self.warmup_steps) / length) ** self.poly_power


class PlateauLR(Schedule):
    """plateau_factor^cuts; a cut falls when over `plateau_patience` validations in a row bring no rise.

    As torch's ReduceLROnPlateau(mode="max") by default: a rise is one by more than 1e-4 of the best score so
    far, and NaN is none. Epochs without validation do not count.
    """

    kept = ("position", "best", "waited", "cuts")

    def __init__(self, *frame: Any, plateau_factor: float, plateau_patience: int) -> None:
        _within("plateau_factor", plateau_factor, 0 < plateau_factor < 1, "in (0, 1)")
        _within("plateau_patience", plateau_patience, plateau_patience >= 0, "0 or more validations")
        self.plateau_factor, self.plateau_patience = plateau_factor, plateau_patience
        self.best, self.waited, self.cuts = float("-inf"), 0, 0
        super().__init__(*frame)

    def factor(self, step: int) -> float:
        """Return factor^cuts."""
        return self.plateau_factor**self.cuts

    def epoch_end(self, score: float | None) -> None:
        """Compare the score with the best so far; cut when patience has run out."""
        if score is None:
            return
        if score > self.best * (1 + 1e-4):
            self.best, self.waited = float(score), 0
        else:
            self.waited += 1
        if self.waited > self.plateau_patience:
            self.cuts, self.waited = self.cuts + 1, 0
        self._set_rates()


SCHEDULES: dict[str, type[Schedule]] = {
    "step": StepLR,
    "poly": PolyLR,
    "plateau": PlateauLR,
    "none": Schedule,
}


def build_schedule(
    optimizer: torch.optim.Optimizer,
    name: str,
    *,
    steps_per_epoch: int,
    epochs: int,
    warmup_steps: int = 0,
    step_size: int = 30,
    step_gamma: float = 0.1,
    poly_power: float = 0.9,
    plateau_factor: float = 0.1,
    plateau_patience: int = 10,
) -> Schedule:
    """Build the schedule `name`; it takes the options that its class names, and leaves the others alone.

    Call `step()` after each optimizer step and `epoch_end(score)` after each epoch.

    Args:
        optimizer: fresh from `build_optimizer`; when resuming, load both states afterwards.
        name: `step`, `poly`, `plateau` or `none`.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: epochs in the run.
        warmup_steps: steps of linear warm-up in front of any of them, less than the run's.
        step_size: epochs between the cuts of `step`.
        step_gamma: factor of each cut of `step`.
        poly_power: exponent of `poly`.
        plateau_factor: factor of each cut of `plateau`.
        plateau_patience: validations without a rise that `plateau` bears.

    Raises:
        ValueError: unknown name, or a value out of range.

    Example:
        >>> optimizer = build_optimizer(nn.Linear(2, 1), "sgd", lr=1.0)
        >>> build_schedule(optimizer, "step", steps_per_epoch=1, epochs=4, step_size=2).plan()
        [1.0, 1.0, 0.1, 0.1]
    """
    given = dict(locals())
    _one_of("scheduler", name, SCHEDULES)
    total = steps_per_epoch * epochs
    _within("steps_per_epoch * epochs", total, steps_per_epoch >= 1 and epochs >= 1, "1 or more")
    _within("warmup_steps", warmup_steps, 0 <= warmup_steps < total, f"in 0..{total - 1}, below the run")
    known = inspect.signature(SCHEDULES[name]).parameters.values()
    options = {option.name: given[option.name] for option in known if option.kind is option.KEYWORD_ONLY}
    return SCHEDULES[name](optimizer, steps_per_epoch, epochs, warmup_steps, **options)


def _one_of(field: str, name: str, choices: Iterable[str]) -> None:
    if name not in choices:
        close = difflib.get_close_matches(str(name), choices, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Choose one of these."
        raise ValueError(f"{field} must be one of {', '.join(choices)}; got {name!r}. {hint}")


def _within(field: str, value: float, right: bool, wanted: str) -> None:
    if not right:
        raise ValueError(f"{field} must be {wanted}; got {value}. Change that setting.")
