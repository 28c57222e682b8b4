"""Soft Dice over the classes present in the batch."""

import torch
from torch import Tensor

from .base import SegmentationLoss, check_at_least_0
from .fused import Factors


class Dice(SegmentationLoss):
    """L = 1 - mean of d_c over the classes present among the batch's valid labels.

    d_c = (2 sum_V p_c [y = c] + s) / (sum_V p_c + n_c + s), n_c the pixels of class c, sums over the whole
    batch. After V-Net (Milletari et al., 2016), section 3, https://arxiv.org/abs/1606.04797, with plain sums
    instead of squared ones in the denominator, which keep the gradient where p is small.

    Crops seldom hold all classes. An absent one would have d_c near 0 or 1 whatever the network predicts, so
    it is left out, and its suppression is left to the cross entropy: hence `joint` as the usual choice.

    Differs from: segmentation_models.pytorch, which divides by C although absent classes add 0; MONAI, which
    takes a ratio per image and counts absent classes; milesial and yassouali, which take one ratio over all
    classes together (the latter after writing another class over the ignored pixels of the masks). nnU-Net
    leaves out the background.

    `dice_smooth` is s, in pixels, 0 or more; 1 matters only for classes of a few pixels.
    """

    name = "dice"

    def __init__(self, *, ignore_index: int = 255, dice_smooth: float = 1.0, fused: bool = True) -> None:
        check_at_least_0(dice_smooth=dice_smooth)
        super().__init__(ignore_index=ignore_index, fused=fused)
        self.smooth = dice_smooth
        self.factors = Factors(ignore_index, pixel=0.0, dice=1.0, smooth=dice_smooth)

    def formula(self, logits: Tensor, masks: Tensor, total: Tensor, fraction: Tensor) -> Tensor:
        """Return fraction * (1 - mean of d_c over the present classes)."""
        valid, labels = self.split(masks)
        p = logits.softmax(1) * valid[:, None]
        target = torch.zeros_like(p).scatter(1, labels[:, None], valid[:, None].to(p.dtype))  # one-hot
        overlap, mass, pixels = (x.sum((0, 2, 3)) for x in (p * target, p, target))  # (C,)
        below = (mass + pixels + self.smooth).clamp(min=1e-12)  # 0 for an absent class if s is 0
        dice = (2 * overlap + self.smooth) / below
        present = pixels > 0
        return fraction * ((1 - dice) * present).sum() / present.sum().clamp(min=1)
