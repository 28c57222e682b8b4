"""Optimizers with their parameter groups, and learning-rate schedules in closed form.

The learning rate of step `k` is a function of `k` and of the scores so far, never of that of step `k - 1`: an
interrupted run that is resumed continues with the same digits, and a schedule can be drawn in advance.

Each optimizer and each schedule is a function with its own keyword options, and a line in a dict.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from utils.cli import near


class Adam(torch.optim.Adam):
    """Torch's Adam, given CPU weights in the order in which memory stores them.

    Its fused form on CPUs copies each channels_last gradient to the order of its dimensions, and does not use
    the copy: 5 % of FCN's step.
    """

    def _init_group(self, group: dict, *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [_as_stored(tensor) for tensor in tensors]
        return has_complex


def _as_stored(x: Tensor) -> Tensor:
    """View a CPU's channels_last tensor (N, C, H, W) as (N, H, W, C); return any other unchanged."""
    stored = x.is_cpu and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1) if stored else x


def adam(groups: list[dict], *, fused: bool | None) -> Adam:
    """Adam with betas 0.9 and 0.999; weight decay is the L2 term of the paper."""
    return Adam(groups, fused=fused)


def adamw(groups: list[dict], *, fused: bool | None) -> Adam:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""
    return Adam(groups, fused=fused, decoupled_weight_decay=True)


def sgd(groups: list[dict], *, fused: bool | None, momentum: float = 0.9) -> torch.optim.SGD:
    """SGD with Nesterov momentum, in torch's form: the velocity does not contain the learning rate."""
    return torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, fused=fused)


def rmsprop(groups: list[dict], *, momentum: float = 0.9) -> torch.optim.RMSprop:
    """RMSprop with alpha 0.99 and momentum."""
    return torch.optim.RMSprop(groups, momentum=momentum)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": adam,
    "adamw": adamw,
    "sgd": sgd,
    "rmsprop": rmsprop,
}


def build_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    *,
    weight_decay: float = 1e-4,
    backbone_lr_scale: float = 1.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters of `model`.

    Its groups, where they have parameters, are called `head`, `head.no_decay`, `backbone` and
    `backbone.no_decay` under `name`, and list the parameters' names under `param_names`.

    Args:
        model: on its device already; optimizers that have a fused form use it on CPU and CUDA devices.
        name: a key of `OPTIMIZERS`.
        learning_rate: of everything but the backbone.
        weight_decay: for weights of two or more dimensions. Vectors (scale and shift of a norm, every bias)
            have none (He et al., Bag of Tricks, 2019, section 3.1).
        backbone_lr_scale: factor on the learning rate of the parameters in a module named `backbone`.
        **options: keyword arguments of the optimizer, e.g. `momentum`.

    Raises:
        ValueError: unknown name or option; no trainable parameter, in the backbone or at all.
    """
    check_options("optimizer", name, OPTIMIZERS, options)
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
        lr = learning_rate * backbone_lr_scale if group.startswith("backbone") else learning_rate
        decay = 0.0 if group.endswith("no_decay") else weight_decay
        if parameters:
            groups.append({"params": parameters, "name": group, "lr": lr, "weight_decay": decay})
    if "fused" in inspect.signature(OPTIMIZERS[name]).parameters:
        options["fused"] = all(p.device.type in ("cpu", "cuda") for p in model.parameters()) or None
    return OPTIMIZERS[name](groups, **options)


def step(epoch: int, *, step_size: int = 30, step_gamma: float = 0.1) -> float:
    """Multiply by `step_gamma` every `step_size` epochs, as torch's StepLR."""
    return step_gamma ** (epoch // step_size)


def poly(progress: float, *, poly_power: float = 0.9) -> float:
    """DeepLab's polynomial decay (Chen et al., 2016)."""
    return (1 - progress) ** poly_power


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter, SGDR, 2017), without restarts."""
    return (1 + math.cos(math.pi * progress)) / 2


def plateau(scores: list[float], *, plateau_factor: float = 0.5, plateau_patience: int = 5) -> float:
    """Multiply by `plateau_factor` after more than `plateau_patience` validations without improvement.

    As torch's ReduceLROnPlateau(mode="max"): an improvement exceeds the best score by more than 1e-4 of it.
    """
    best, waited, reductions = -math.inf, 0, 0
    for score in scores:
        waited += 1
        if score > best * (1 + 1e-4):
            best, waited = score, 0
        if waited > plateau_patience:
            reductions, waited = reductions + 1, 0
    return plateau_factor**reductions


def constant() -> float:
    """Leave the learning rate as it is."""
    return 1.0


# Functions of `epoch` (0-based), `progress` (0 to 1 over the steps after the warm-up) or `scores` (of the
# validations so far) that return the factor on the base learning rate.
SCHEDULES: dict[str, Callable[..., float]] = {
    "step": step,
    "poly": poly,
    "cosine": cosine,
    "plateau": plateau,
    "none": constant,
}


def depends_on_length(name: str) -> bool:
    """Whether a schedule's learning rates depend on the number of epochs, which then must not change."""
    return "progress" in inspect.signature(SCHEDULES[name]).parameters


class Schedule:
    """The learning rate of each step of a run, set in the optimizer's groups.

    In the first W = `warmup_steps` steps, k < W, it is base * (k + 1) / (W + 1); then base * factor. Call
    `step()` after each optimizer step and `epoch_end(score)` after each epoch. To resume, load the states of
    the optimizer and of the schedule.

    Args:
        optimizer: its groups' present learning rates are the base ones.
        name: a key of `SCHEDULES`.
        steps_per_epoch: optimizer steps, not batches, where gradients are accumulated.
        epochs: length of the run.
        warmup_steps: length of the linear warm-up, at most half the run.
        **options: keyword arguments of the schedule, e.g. `step_size`.

    Attributes:
        position: number of steps taken; each group's `lr` is that of the next step.

    Raises:
        ValueError: unknown name or option.

    Example:
        >>> optimizer = build_optimizer(nn.Linear(2, 1), "sgd", 1.0)
        >>> Schedule(optimizer, "step", steps_per_epoch=1, epochs=4, step_size=2).plan()
        [1.0, 1.0, 0.1, 0.1]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        name: str,
        *,
        steps_per_epoch: int,
        epochs: int,
        warmup_steps: int = 0,
        **options: Any,
    ) -> None:
        check_options("scheduler", name, SCHEDULES, options)
        self.optimizer, self.steps_per_epoch, self.options = optimizer, steps_per_epoch, options
        self.function = SCHEDULES[name]
        self.inputs = {"epoch", "progress", "scores"} & {*inspect.signature(self.function).parameters}
        self.total_steps = steps_per_epoch * epochs
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        warmup_steps = min(warmup_steps, self.total_steps // 2)
        self.load_state_dict({"position": 0, "scores": [], "warmup_steps": warmup_steps})

    def step(self) -> None:
        """Count one optimizer step, and set the learning rates of the next."""
        self.position += 1
        self._set_lrs()

    def epoch_end(self, score: float | None) -> None:
        """Record the monitored score, higher is better; None after an epoch without validation."""
        if score is not None:
            self.scores.append(float(score))
            self._set_lrs()

    def lr_at(self, step: int) -> float:
        """Return the first group's learning rate at a step, given the scores so far."""
        return self.base_lrs[0] * self._factor(step, self.scores)

    def plan(self) -> list[float]:
        """Return the first group's learning rate at each step of the run, without reductions by `plateau`."""
        return [self.base_lrs[0] * self._factor(step, []) for step in range(self.total_steps)]

    def curve(self, points: int = 500) -> list[tuple[float, float]]:
        """Return about `points` of the plan as (epoch, learning rate), from the last step backwards."""
        plan = [(step / self.steps_per_epoch, lr) for step, lr in enumerate(self.plan(), start=1)]
        return plan[:: -max(1, len(plan) // points)]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain values; the warm-up does not change if the run grows."""
        return {"position": self.position, "scores": [*self.scores], "warmup_steps": self.warmup_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, and set the learning rates."""
        self.position, self.scores = state["position"], [*state["scores"]]
        self.warmup_steps = state["warmup_steps"]
        self._set_lrs()

    def _factor(self, step: int, scores: list[float]) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        inputs = {"epoch": step // self.steps_per_epoch, "progress": progress, "scores": scores}
        return self.function(**{name: inputs[name] for name in self.inputs}, **self.options)

    def _set_lrs(self) -> None:
        factor = self._factor(self.position, self.scores)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor


def check_options(field: str, name: str, choices: dict[str, Callable], options: dict[str, Any]) -> None:
    """Raise ValueError for a name that is not in `choices`, or an option that its function does not take."""
    if name not in choices:
        hint = near(str(name), choices) or " Choose one of these."
        raise ValueError(f"{field} must be one of {', '.join(choices)}; got {name!r}.{hint}")
    known = inspect.getfullargspec(choices[name]).kwonlyargs
    for option in options:
        if option not in known:
            raise ValueError(f"{field} {name} has no option {option!r}. Leave it out, or correct its name")
