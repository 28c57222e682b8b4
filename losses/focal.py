"""Focal loss, in its multi-class softmax form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import SegmentationLoss, check_at_least_0, label_log_probability
from .fused import Factors


class Focal(SegmentationLoss):
    """L = sum_V w_y (1 - p_y)^gamma (-log p_y) / sum_V w_y, with class weights w, or 1.

    Paper: Focal Loss for Dense Object Detection (Lin et al., 2017), equation 5,
    https://arxiv.org/abs/1708.02002, with the softmax's p_y for the sigmoid's p_t. With gamma 0 it is the
    (weighted) cross entropy, digit for digit.

    Differs from: MONAI, which divides by N C H W and so is C times smaller; segmentation_models.pytorch,
    whose multi-class mode is C one-against-rest sigmoid losses; yassouali/pytorch-segmentation, which takes
    p_y from the weighted cross entropy and whose mean counts ignored pixels.

    The larger `focal_gamma`, 0 or more, the less well-classified pixels count.
    """

    name = "focal"

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        class_weights: Sequence[float] | Tensor | None = None,
        focal_gamma: float = 2.0,
        fused: bool = True,
    ) -> None:
        check_at_least_0(focal_gamma=focal_gamma)
        super().__init__(ignore_index=ignore_index, class_weights=class_weights, fused=fused)
        self.gamma = focal_gamma

    @property
    def factors(self) -> Factors:
        """This loss as a case of `softmax_loss`."""
        return Factors(self.ignore_index, self.class_weights, self.gamma)

    def formula(self, logits: Tensor, masks: Tensor, total: Tensor, fraction: Tensor) -> Tensor:
        """Return sum_V w_y (1 - p_y)^gamma (-log p_y) / total."""
        valid, labels = self.split(masks)
        log_py = label_log_probability(logits, labels)
        rest = -torch.expm1(log_py)  # 1 - p_y
        rest = rest.clamp(min=torch.finfo(rest.dtype).tiny)  # gamma below 1 has no gradient at 0
        weights = valid if self.class_weights is None else self.class_weights[labels] * valid
        return (weights * rest**self.gamma * -log_py).sum() / total
