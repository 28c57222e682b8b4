"""An exponential moving average of a model's weights, for validation and prediction."""

import torch
from torch import Tensor, nn

from utils.checkpoint import plain_weights


class Ema:
    """average = decay x average + (1 - decay) x weights, after each step (Polyak and Juditsky, 1992).

    The decay of step t is at most (1 + t) / (10 + t), so that the random first weights are soon forgotten.
    Batch norm's running statistics are averaged in the same way; counters are copied.

    Args:
        model: its present weights are the first average.
        decay: in (0, 1); the average looks back over about 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.weights = {name: value.clone() for name, value in plain_weights(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        averages, values = [], []
        for name, value in plain_weights(model).items():
            if value.is_floating_point():
                averages.append(self.weights[name])
                values.append(value)
            else:
                self.weights[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def load(self, weights: dict[str, Tensor], steps: int) -> None:
        """Go on from a saved average."""
        self.steps = steps
        for name, value in weights.items():
            self.weights[name].copy_(value)
