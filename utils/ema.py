"""An exponential moving average of a model's weights, for validation and prediction."""

import torch
from torch import Tensor, nn

from utils.checkpoint import plain_weights


class Ema:
    """average = decay * average + (1 - decay) * weights, after each step (Polyak and Juditsky, 1992).

    The decay of step t is at most (1 + t) / (10 + t), so that the random initial weights are soon forgotten.
    Running statistics of batch norm are averaged as well; integer counters are the model's own.

    Args:
        model: on its device; its current weights are the first average.
        decay: in (0, 1); the average covers about the last 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._current = plain_weights(model)  # the model's own tensors, which training changes in place
        self._average = {k: v.clone() for k, v in self._current.items() if v.is_floating_point()}
        self._values = [self._current[name] for name in self._average]

    @torch.no_grad()
    def update(self) -> None:
        """Include the weights as they are after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self._average.values()), self._values, 1 - decay)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The averaged weights as a state dict."""
        return self._current | self._average

    def load(self, weights: dict[str, Tensor], steps: int) -> None:
        """Continue from a saved average."""
        self.steps = steps
        for name, average in self._average.items():
            average.copy_(weights[name])
