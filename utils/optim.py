"""Optimizers with their parameter groups, and learning-rate schedules that are functions of the step.

The rate of step `k` is a closed form of `k` (for plateau also of the scores seen so far), never of the
rate of step `k - 1`. A run that is broken off and resumed therefore continues with the very same digits,
and what a schedule will do can be drawn before it does it.
"""

from collections.abc import Iterable
from copy import copy
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from utils.cli import near


class Adam(torch.optim.Adam):
    """Torch's Adam, which is handed the weights in the order in which memory has them.

    Its fused form on CPUs copies each gradient to the order of its dimensions, which is another in
    channels_last, and does not use the copy: a twentieth of FCN's step.
    """

    def _init_group(self, group: dict, *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [_as_stored(tensor) for tensor in tensors]
        return has_complex


def _as_stored(x: Tensor) -> Tensor:
    """A view of a CPU's channels_last tensor (N, C, H, W) as (N, H, W, C); any other as it is."""
    stored = x.is_cpu and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1) if stored else x


OPTIMIZERS = {  # from groups, momentum and the choice of the fused form, which torch's RMSprop lacks
    "adam": lambda groups, momentum, fused: Adam(groups, fused=fused),
    "sgd": lambda groups, momentum, fused: torch.optim.SGD(
        groups, momentum=momentum, nesterov=momentum > 0, fused=fused
    ),
    "rmsprop": lambda groups, momentum, fused: torch.optim.RMSprop(groups, momentum=momentum),
}


def build_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    backbone_lr_scale: float = 1.0,
) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters of `model`.

    Its groups, where they have parameters, are called `head`, `head.no_decay`, `backbone` and
    `backbone.no_decay` under `name`, and keep the parameters' names under `param_names`.

    Args:
        model: on its device already; on a CPU or CUDA device adam and sgd take their fused form.
        name: `adam` (betas 0.9 and 0.999; weight decay is the L2 term of the paper, not AdamW's), `sgd`
            (Nesterov, in torch's form: the velocity does not contain the learning rate), `rmsprop` (alpha
            0.99).
        lr: learning rate of everything but the backbone.
        weight_decay: on weights of two or more dimensions. Vectors (scale and shift of a norm, every bias)
            have none: pulling them to zero makes no function simpler (He et al., Bag of Tricks, 2019,
            section 3.1).
        momentum: of sgd and rmsprop; Adam has its first beta instead.
        backbone_lr_scale: factor on the learning rate of the parameters below a module named `backbone`.

    Raises:
        ValueError: unknown name, or nothing to train, in the backbone or at all.
    """
    _one_of("optimizer", name, OPTIMIZERS)
    members = {"head": [], "head.no_decay": [], "backbone": [], "backbone.no_decay": []}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "backbone" if "backbone" in path.split(".") else "head"
            members[part if parameter.ndim > 1 else f"{part}.no_decay"].append((path, parameter))
    if not any(members.values()):
        raise ValueError(f"no parameter of {type(model).__name__} is trainable. Unfreeze a part")
    if backbone_lr_scale != 1 and not members["backbone"] + members["backbone.no_decay"]:
        raise ValueError(
            f"backbone_lr_scale {backbone_lr_scale} needs a backbone that is trained; this "
            f"{type(model).__name__} has none. Leave it at 1, or do not freeze the backbone"
        )
    groups = []
    for group, parameters in members.items():
        rate = lr * backbone_lr_scale if group.startswith("backbone") else lr
        decay = 0.0 if group.endswith("no_decay") else weight_decay
        if parameters:
            groups.append({"params": parameters, "name": group, "lr": rate, "weight_decay": decay})
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return OPTIMIZERS[name](groups, momentum, fused or None)


def _poly(schedule: "Schedule", step: int) -> float:
    """DeepLab's "poly" (Chen, 2016) over the steps after the warm-up; the last has a rate above 0."""
    length = schedule.total_steps - schedule.warmup_steps
    return max(0.0, 1 - (step - schedule.warmup_steps) / length) ** schedule.poly_power


SCHEDULES = {  # name: the factor on the base rate at a step, 0-based, past the warm-up
    "step": lambda s, step: s.step_gamma ** (step // s.steps_per_epoch // s.step_size),  # as torch's StepLR
    "poly": _poly,
    "plateau": lambda s, step: s.plateau_factor**s.cuts,
    "none": lambda s, step: 1.0,
}


@dataclass
class Schedule:
    """The learning rate of each step of a run, set in the optimizer's groups.

    In the first W = `warmup_steps` steps, k < W, the rate is base * (k + 1) / (W + 1); then base * factor.
    Call `step()` after each optimizer step and `epoch_end(score)` after each epoch. To resume, load the
    optimizer's state and this one's.

    Attributes:
        position: the number of steps taken; each group's `lr` is the one of the step to come.

    Raises:
        ValueError: unknown name.

    Example:
        >>> optimizer = build_optimizer(nn.Linear(2, 1), "sgd", lr=1.0)
        >>> Schedule(optimizer, "step", steps_per_epoch=1, epochs=4, step_size=2).plan()
        [1.0, 1.0, 0.1, 0.1]
    """

    optimizer: torch.optim.Optimizer  # its groups' present rates are the base rates
    name: str  # a key of SCHEDULES, which uses the options that begin with it
    _: KW_ONLY
    steps_per_epoch: int  # optimizer steps, not batches, where gradients are accumulated
    epochs: int  # length of the run
    warmup_steps: int = 0  # steps of linear warm-up in front of any schedule, fewer than the run has
    step_size: int = 30  # epochs between two cuts
    step_gamma: float = 0.1  # factor of each cut
    poly_power: float = 0.9
    plateau_factor: float = 0.1  # of each cut
    plateau_patience: int = 10  # validations without a rise that are borne

    def __post_init__(self) -> None:
        _one_of("scheduler", self.name, SCHEDULES)
        self.total_steps = self.steps_per_epoch * self.epochs
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.load_state_dict({"position": 0, "best": float("-inf"), "waited": 0, "cuts": 0})

    def step(self) -> None:
        """Count one optimizer step, and set the rates of the next."""
        self.position += 1
        self._set_rates()

    def epoch_end(self, score: float | None) -> None:
        """Take note of the monitored score, higher is better; None where the epoch had no validation.

        When over `plateau_patience` validations in a row bring no rise, `plateau` cuts. As torch's
        ReduceLROnPlateau(mode="max") by default: a rise is one by more than 1e-4 of the best score so far,
        and NaN is none.
        """
        if score is None:
            return
        if score > self.best * (1 + 1e-4):
            self.best, self.waited = float(score), 0
        else:
            self.waited += 1
        if self.waited > self.plateau_patience:
            self.cuts, self.waited = self.cuts + 1, 0
        self._set_rates()

    def rate(self, step: int) -> float:
        """Return the first group's rate at a step, by the cuts so far."""
        return self.base_lrs[0] * self._factor(step)

    def plan(self) -> list[float]:
        """Return the first group's rate at each step of the run, without a cut of `plateau`."""
        uncut = copy(self)
        uncut.cuts = 0
        return [uncut.rate(step) for step in range(self.total_steps)]

    def curve(self, points: int = 500) -> list[tuple[float, float]]:
        """Return about `points` of the plan as (epoch, learning rate), from the last step backwards."""
        plan = [(step / self.steps_per_epoch, lr) for step, lr in enumerate(self.plan(), start=1)]
        return plan[:: -max(1, len(plan) // points)]

    def state_dict(self) -> dict:
        """Return what a resumed run needs, in plain values; warm-up stays as it was if the run grows."""
        names = ("position", "best", "waited", "cuts", "warmup_steps")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken: the groups' rates are set anew."""
        vars(self).update(state)
        self._set_rates()

    def _factor(self, step: int) -> float:
        warming = step < self.warmup_steps
        return (step + 1) / (self.warmup_steps + 1) if warming else SCHEDULES[self.name](self, step)

    def _set_rates(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self._factor(self.position)


def _one_of(field: str, name: str, choices: Iterable[str]) -> None:
    if name not in choices:
        hint = near(str(name), list(choices)) or " Choose one of these."
        raise ValueError(f"{field} must be one of {', '.join(choices)}; got {name!r}.{hint}")
