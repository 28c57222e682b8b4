"""Scoring a data set: each image once, at its mask's own size, counted over all processes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils import distributed
from utils.device import to_device


@dataclass
class Evaluation:
    """The result of a pass over the validation images."""

    scores: Any  # a metrics.Scores
    counts: Tensor  # confusion matrix, int64 (C, C), on the CPU
    loss: float  # mean of the images' losses
    image_iou: list[float]  # mean IoU of each image alone, in the data set's order


class Evaluator:
    """Collects the scores of predicted images without waiting for the device.

    Args:
        num_images: of the whole data set.
        make_matrix: returns an empty `metrics.ConfusionMatrix` on the device where predictions are counted.
        predicted_ids: maps logits (N, C, H, W) to class ids (N, H, W).
        loss_fn: maps logits and masks to a scalar.
        device: where the network computes.
    """

    def __init__(
        self,
        num_images: int,
        make_matrix: Callable[[], Any],
        predicted_ids: Callable[[Tensor], Tensor],
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self.matrix, self._of_image = make_matrix(), make_matrix()
        self.predicted_ids, self.loss_fn, self.device = predicted_ids, loss_fn, device
        self._image_iou = torch.zeros(num_images, dtype=torch.float64, device=self.matrix.device)
        self._losses = torch.zeros(num_images, device=device)

    def add(self, index: int, logits: Tensor, mask: Tensor) -> None:
        """Score one image.

        Args:
            index: of the image in the data set.
            logits: (1, C, H, W), on the device.
            mask: class ids (H, W).
        """
        masks = to_device(mask, self.device)[None]
        self._of_image.reset()
        self._of_image.update(self.predicted_ids(logits), masks)
        self.matrix.merge(self._of_image)
        self._image_iou[index] = self._of_image.image_mean_iou
        self._losses[index] = self.loss_fn(logits, masks)

    def result(self) -> Evaluation:
        """Return the evaluation over all processes, each of which has scored other images."""
        state = self.matrix.state()
        distributed.sum_over(state, self._image_iou, self._losses)
        self.matrix.load_state(state)
        counts, loss = self.matrix.counts.cpu(), float(self._losses.mean())
        return Evaluation(self.matrix.scores(), counts, loss, self._image_iou.tolist())


def shares(num_images: int, batch_size: int, rank: int, world_size: int) -> Iterable[tuple[int, range]]:
    """Yield the rounds of a validation: their number of images, and the indices that this process predicts.

    Every process takes part in every round, so that all agree on a signal after each.
    """
    together = batch_size * world_size
    for first in range(0, num_images, together):
        of_round = range(num_images)[first : first + together]
        yield len(of_round), of_round[rank::world_size]
