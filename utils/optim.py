"""Optimizers with their parameter groups, and learning-rate schedules that are functions of the step.

A schedule here is a closed form: the learning rate of step ``k`` depends on ``k`` alone (for plateau also on
the scores seen so far), never on the rate of step ``k - 1``. A run that is broken off and resumed at step
``k`` therefore continues with the very same digits, and what will happen can be drawn before it does.
"""

import difflib
from collections import Counter

import torch
from torch import nn


def _near(field, name, choices):
    if name not in choices:
        close = difflib.get_close_matches(str(name), choices, n=1)
        hint = (
            f" Did you mean {close[0]!r}?" if close else f" Choose one, for example {next(iter(choices))!r}."
        )
        raise ValueError(f"{field} must be one of {', '.join(choices)}; got {name!r}.{hint}")


def _adam(groups, lr, momentum, **fast):
    return torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, **fast)


def _sgd(groups, lr, momentum, **fast):
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, **fast)


def _rmsprop(groups, lr, momentum, **fast):
    fast = {"foreach": bool(fast)}  # there is no fused RMSprop
    return torch.optim.RMSprop(groups, lr=lr, alpha=0.99, eps=1e-8, momentum=momentum, **fast)


OPTIMIZERS = {"adam": _adam, "sgd": _sgd, "rmsprop": _rmsprop}


def parameter_groups(model, lr, *, weight_decay=0.0, backbone_lr_scale=1.0, backbone="backbone"):
    """Sort the trainable parameters by learning rate and weight decay.

    Vectors (the scale and shift of a norm, every bias) get no weight decay: pulling them to zero does not
    make the function simpler (He et al., Bag of Tricks, 2019, section 3.1). Frozen parameters are left out.

    Returns:
        Up to four groups named ``head``, ``head.no_decay``, ``backbone``, ``backbone.no_decay``, each with
        the names of its parameters under ``param_names`` once an optimizer holds it.
    """
    split = {"head": [], "head.no_decay": [], backbone: [], f"{backbone}.no_decay": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = backbone if backbone in name.split(".") else "head"
            split[part if parameter.ndim > 1 else f"{part}.no_decay"].append((name, parameter))
    if backbone_lr_scale != 1.0 and not split[backbone] + split[f"{backbone}.no_decay"]:
        raise ValueError(
            f"backbone_lr_scale is {backbone_lr_scale:g}, but {type(model).__name__} has no trainable "
            f"parameters under {backbone!r}. Set it to 1, or take a model with a backbone that is not frozen."
        )
    groups = []
    for name, members in split.items():
        if members:
            scale = backbone_lr_scale if name.startswith(backbone) else 1.0
            decay = 0.0 if name.endswith(".no_decay") else weight_decay
            groups.append({"params": members, "name": name, "lr": lr * scale, "weight_decay": decay})
    check_groups(model, groups)
    return groups


def check_groups(model, groups):
    """Raise ValueError unless ``groups`` hold each trainable parameter of ``model`` once and nothing else."""
    members = [p[1] if isinstance(p, tuple) else p for group in groups for p in group["params"]]
    seen = Counter(id(parameter) for parameter in members)
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter. Unfreeze a part of it to train."
        )
    missing = [name for key, name in trainable.items() if not seen[key]]
    twice = [name for key, name in trainable.items() if seen[key] > 1]
    strange = len(seen.keys() - trainable.keys())
    if missing or twice or strange:
        raise ValueError(
            f"optimizer: each trainable parameter of {type(model).__name__} must be in exactly one group; "
            f"missing: {missing or 'none'}, more than once: {twice or 'none'}, strange: {strange}. "
            "Build the groups with parameter_groups."
        )


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
    """Build an optimizer over the trainable parameters of ``model``.

    Args:
        model: on its device already, because that decides between the fused, the foreach and the plain form.
        name: ``adam`` (betas 0.9 and 0.999, weight decay as the L2 term of the paper, not AdamW's), ``sgd``
            (Nesterov momentum, in torch's form: the velocity does not contain the learning rate), or
            ``rmsprop`` (alpha 0.99).
        lr: learning rate of everything but the backbone.
        weight_decay: on weights with two or more dimensions; norms and biases have none.
        momentum: of sgd and rmsprop; Adam has its first beta instead.
        backbone_lr_scale: factor on the learning rate of the parameters below a module named ``backbone``.
        backbone: the name of that module.

    Raises:
        ValueError: unknown name, a value out of range, or a parameter that is not in exactly one group.
    """
    _near("optimizer", name, OPTIMIZERS)
    ranges = {
        "learning_rate": lr > 0,
        "backbone_lr_scale": backbone_lr_scale > 0,
        "weight_decay": weight_decay >= 0,
    }
    for field, right in {**ranges, "momentum": 0 <= momentum < 1}.items():
        if not right:
            values = f"learning_rate {lr}, backbone_lr_scale {backbone_lr_scale}, weight_decay {weight_decay}"
            raise ValueError(
                f"{field} is out of range; got {values}, momentum {momentum}. Rates and scales are positive, "
                "weight_decay is 0 or more, momentum in [0, 1)."
            )
    groups = parameter_groups(
        model, lr, weight_decay=weight_decay, backbone_lr_scale=backbone_lr_scale, backbone=backbone
    )
    members = [p for group in groups for _, p in group["params"]]
    fast = (
        {"fused": True}
        if all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in members)
        else {}
    )
    return OPTIMIZERS[name](groups, lr, momentum, **fast)


class Schedule:
    """Constant learning rate (``none``), and the frame of the other schedules.

    For the steps k < W (W = warmup_steps) the rate is base * (k + 1) / (W + 1); from k = W on, base *
    factor(k).

    Args:
        optimizer: its groups' present rates are the base rates.
        steps_per_epoch: optimizer steps, not batches where gradients are accumulated.
        epochs: length of the run.
        warmup_steps: length W of the linear warm-up, in steps.

    Attributes:
        position: the number of steps taken; the groups' ``lr`` is always the one of the step to come.
    """

    def __init__(self, optimizer, steps_per_epoch, epochs, warmup_steps=0):
        self.optimizer = optimizer
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * epochs
        self.warmup_steps = warmup_steps
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.position = 0
        self._set_rates()

    def factor(self, step: int) -> float:
        """Factor on the base rate at ``step``, 0-based, after the warm-up."""
        return 1.0

    def factor_at(self, step: int) -> float:
        """Factor on the base rate at ``step``, warm-up included."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.factor(step)

    def step(self):
        """Count one optimizer step and set the rates of the next."""
        self.position += 1
        self._set_rates()

    def epoch_end(self, score: float | None):
        """Take note of the monitored score, higher is better; None where the epoch had no validation."""

    def plan(self) -> list[float]:
        """Return the first group's rate at each step, for drawing (plateau: without further cuts)."""
        return [self.base_lrs[0] * self.factor_at(step) for step in range(self.total_steps)]

    def state_dict(self) -> dict:
        """Return what a resumed run needs, in plain values."""
        return {"position": self.position}

    def load_state_dict(self, state: dict):
        """Continue where ``state`` was taken, and set the groups' rates accordingly."""
        for key in self.state_dict():
            setattr(self, key, state[key])
        self._set_rates()

    def _set_rates(self):
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self.factor_at(self.position)


class StepLR(Schedule):
    """Multiply by ``step_gamma`` after every ``step_size`` epochs, as torch's StepLR."""

    def __init__(self, *args, step_size, step_gamma):
        self.step_size, self.step_gamma = step_size, step_gamma
        super().__init__(*args)

    def factor(self, step):
        """Return gamma^floor(epoch / size); epochs count from the start of the run, warm-up included."""
        return self.step_gamma ** (step // self.steps_per_epoch // self.step_size)


class PolyLR(Schedule):
    """(1 - t / T)^power per step, over the T steps after the warm-up.

    Source: DeepLab (Chen et al., 2016), section 4.1, which calls it the "poly" policy.

    The last step of the run has t = T - 1 and so a rate above 0; past the end the rate is 0.
    """

    def __init__(self, *args, poly_power):
        self.poly_power = poly_power
        super().__init__(*args)

    def factor(self, step):
        """Return (1 - t / T)^power."""
        length = self.total_steps - self.warmup_steps
        return max(0.0, 1 - (step - self.warmup_steps) / length) ** self.poly_power


class PlateauLR(Schedule):
    """Multiply by ``plateau_factor`` once the score has not risen for over ``plateau_patience`` validations.

    As torch's ReduceLROnPlateau(mode="max") with its defaults: a rise is one by more than 1e-4 of the best
    score. Epochs without validation do not count. A score of NaN is no rise.
    """

    def __init__(self, *args, plateau_factor, plateau_patience):
        self.plateau_factor, self.plateau_patience = plateau_factor, plateau_patience
        self.best, self.waited, self.cuts = None, 0, 0
        super().__init__(*args)

    def factor(self, step):
        """Return plateau_factor^(number of cuts so far)."""
        return self.plateau_factor**self.cuts

    def epoch_end(self, score):
        """Compare the score with the best so far, and cut the rate when patience has run out."""
        if score is None:
            return
        if self.best is None or score > self.best * (1 + 1e-4):
            self.best, self.waited = (score if score == score else self.best), 0
        else:
            self.waited += 1
        if self.waited > self.plateau_patience:
            self.cuts, self.waited = self.cuts + 1, 0
        self._set_rates()

    def state_dict(self):
        """Return position and what the scores have done so far."""
        return {"position": self.position, "best": self.best, "waited": self.waited, "cuts": self.cuts}


SCHEDULES = {"step": StepLR, "poly": PolyLR, "plateau": PlateauLR, "none": Schedule}


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
    """Build the schedule ``name``; each reads its own options and leaves the others alone.

    Call ``step()`` after each optimizer step and ``epoch_end(score)`` after each epoch.

    Args:
        optimizer: fresh from ``build_optimizer``; when resuming, load its state afterwards.
        name: ``step``, ``poly``, ``plateau`` or ``none``.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: epochs in the run.
        warmup_steps: steps of linear warm-up in front.
        step_size: epochs (step).
        step_gamma: factor in (0, 1] (step).
        poly_power: exponent (poly).
        plateau_factor: factor in (0, 1) (plateau).
        plateau_patience: validations without a rise that are borne (plateau).

    Raises:
        ValueError: unknown name, or a value out of range.
    """
    _near("scheduler", name, SCHEDULES)
    total = steps_per_epoch * epochs
    rules = {
        "steps_per_epoch and epochs must be 1 or more": steps_per_epoch >= 1 and epochs >= 1,
        f"warmup_steps must be in 0..{total - 1}, below the {total} steps of the run": 0
        <= warmup_steps
        < total,
        "step_size must be 1 or more epochs and step_gamma in (0, 1]": step_size >= 1 and 0 < step_gamma <= 1,
        "poly_power must be above 0": poly_power > 0,
        "plateau_factor must be in (0, 1) and plateau_patience 0 or more": 0 < plateau_factor < 1
        and plateau_patience >= 0,
    }
    given = (
        f"steps_per_epoch {steps_per_epoch}, epochs {epochs}, warmup_steps {warmup_steps}, "
        f"step_size {step_size}, step_gamma {step_gamma}, poly_power {poly_power}, plateau_factor {plateau_factor}, "
        f"plateau_patience {plateau_patience}"
    )
    for rule, kept in rules.items():
        if not kept:
            raise ValueError(f"schedule: {rule}; got {given}. Change that setting.")
    own = {
        "step": {"step_size": step_size, "step_gamma": step_gamma},
        "poly": {"poly_power": poly_power},
        "plateau": {"plateau_factor": plateau_factor, "plateau_patience": plateau_patience},
    }
    return SCHEDULES[name](optimizer, steps_per_epoch, epochs, warmup_steps, **own.get(name, {}))
