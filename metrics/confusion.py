"""One confusion matrix over the whole split; every score is a ratio of its sums, taken at the end.

With h[t, p] the number of valid pixels of true class t that were predicted as p, for class c: TP = h[c, c],
FP = sum_t h[t, c] - TP, FN = sum_p h[c, p] - TP, and

    IoU_c = TP / (TP + FP + FN)         Dice_c = 2 TP / (2 TP + FP + FN)         accuracy_c = TP / (TP + FN)

A class that is neither present nor predicted (TP + FP + FN = 0) is n/a and leaves the means. These are the
definitions of PASCAL VOC, Cityscapes and of FCN (Long et al., 2015, section 5), and of torchmetrics'
JaccardIndex, but for the n/a, where it reports 0. Averages of ratios over batches (milesial, MONAI's default)
are different numbers, which depend on the batch size. The mean over images is reported too, under its own
name.
"""

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

# An image's score is kept as an integer multiple of 2^-40, so that the sum does not depend on the order.
_FIXED = 1 << 40


@dataclass(frozen=True)
class Scores:
    """Scores of a confusion matrix, as fractions in [0, 1]; NaN is n/a and leaves the means."""

    iou: np.ndarray  # (C,) float64, as the two below
    dice: np.ndarray
    accuracy: np.ndarray  # fraction of the class's pixels that were found; n/a for a class without pixels
    mean_iou: float
    mean_dice: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float  # each IoU weighted by the class's fraction of the target pixels
    mean_iou_foreground: float  # class 0 left out
    mean_dice_foreground: float
    image_mean_iou: float  # mean over images of each one's mean over the classes in its target or prediction
    image_mean_dice: float
    baseline_iou: float  # mean IoU of predicting the most frequent class everywhere
    baseline_accuracy: float


class ConfusionMatrix:
    """Counts of (target, prediction) pairs, kept on the device, additive over batches and processes.

    Args:
        num_classes: number of classes C.
        ignore_index: label of the pixels that are not counted.
        device: where the counts are kept and ids are moved to, best where the predictions will be; it must
            support float64, which `mps` does not.

    Example:
        >>> matrix = ConfusionMatrix(num_classes=3)
        >>> matrix.update(preds=torch.tensor([[0, 1, 1, 0]]), masks=torch.tensor([[0, 1, 0, 255]]))
        >>> scores = matrix.scores()
        >>> scores.iou, scores.mean_iou  # class 2 is neither present nor predicted
        (array([0.5, 0.5, nan]), 0.5)
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: str | torch.device = "cpu") -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.device = torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Set all counts to 0."""
        # the matrix; images with a valid pixel; sums of their mean IoU and Dice; pixels with a wrong id
        self._sums = torch.zeros(self.num_classes**2 + 4, dtype=torch.int64, device=self.device)

    @property
    def counts(self) -> Tensor:
        """The matrix, int64 (C, C), in pixels; rows are the target, columns the prediction."""
        return self._sums[:-4].view(self.num_classes, self.num_classes)

    @property
    def image_mean_iou(self) -> Tensor:
        """As in `scores`, without waiting for the device: a float64 scalar there, NaN where it is n/a."""
        return self._sums[-3].double() / _FIXED / self._sums[-4]

    @torch.no_grad()
    def update(self, preds: Tensor, masks: Tensor) -> None:
        """Count the pixels of a batch, without waiting for the device.

        Args:
            preds: predicted class ids, (N, H, W) or (H, W), any integer dtype (uint8 is fastest).
            masks: true class ids or `ignore_index`, the same shape.

        Raises:
            ValueError: shapes differ, or an id is neither in 0..C-1 nor, in masks, `ignore_index`. On a GPU
                ids are looked at by `scores()`, so that no step waits for the device.
        """
        if preds.shape != masks.shape or preds.ndim not in (2, 3):
            raise ValueError(
                "ConfusionMatrix.update: preds and masks must both be (N, H, W) or (H, W); got "
                f"{tuple(preds.shape)} and {tuple(masks.shape)}. Resize the logits to the masks' size first."
            )
        if not masks.numel():
            return
        preds, masks = (ids.to(self.device).reshape(-1, ids.shape[-2:].numel()) for ids in (preds, masks))
        if preds.is_cuda or self.num_classes > 255 or not 0 <= self.ignore_index <= 255:
            self._count(preds, masks)
        else:
            self._count_bytes(preds, masks)

    def _count_bytes(self, preds: Tensor, masks: Tensor) -> None:
        """Count on the CPU, with a row for each value of a byte: a wrong label shows in a row of its own."""
        c, rows = self.num_classes, 256
        (low, high), (pred_low, pred_high) = (map(int, ids.aminmax()) for ids in (masks, preds))
        if low < 0 or high > 255 or pred_low < 0 or pred_high >= c:
            self._refuse(preds, masks)
        dtype = torch.int16 if rows * c < 1 << 15 else torch.int32
        keys = preds.to(dtype).add_(masks.to(torch.uint8), alpha=c)
        bins = torch.stack([torch.bincount(key, minlength=rows * c) for key in keys]).view(-1, rows, c)
        bins[:, self.ignore_index] = 0
        if high >= c and bins[:, c:].any():
            self._refuse(preds, masks)
        self._add(bins[:, :c])

    def _count(self, preds: Tensor, masks: Tensor) -> None:
        """Count on any device; ignored and invalid pixels go to a cell of their own."""
        c = self.num_classes
        cells = c * c + 1
        preds, masks = preds.long(), masks.long()  # a byte would be compared modulo 256
        ignored = masks == self.ignore_index
        wrong = (preds < 0) | (preds >= c) | (~ignored & ((masks < 0) | (masks >= c)))
        if not masks.is_cuda and wrong.any():
            self._refuse(preds, masks)
        keys = torch.add(preds, masks, alpha=c).masked_fill_(ignored | wrong, cells - 1)
        keys += torch.arange(len(keys), device=keys.device)[:, None] * cells
        if masks.is_cuda:  # bincount would read its maximum back
            bins = torch.histc(keys.int(), bins=len(keys) * cells, min=0, max=len(keys) * cells - 1).long()
        else:
            bins = torch.bincount(keys.flatten(), minlength=len(keys) * cells)
        self._sums[-1] += wrong.sum()
        self._add(bins.view(-1, cells)[:, :-1].view(-1, c, c))

    def join(self) -> None:
        """Treat all counts so far as those of one image, which was counted in parts."""
        counts = self.counts.clone()
        self.reset()
        self._add(counts[None])

    def merge(self, other: "ConfusionMatrix") -> None:
        """Add the counts of another matrix over the same classes."""
        self._sums += other._sums.to(self.device)

    def state(self) -> Tensor:
        """Return all counts as one int64 vector; the sum over processes is their common state."""
        return self._sums.clone()

    def load_state(self, state: Tensor) -> None:
        """Load what `state` returned, or a sum of such vectors."""
        self._sums = state.to(self.device, torch.int64).clone()

    def scores(self) -> Scores:
        """Derive all scores (waits for the device).

        Raises:
            ValueError: a batch on a GPU held an id outside 0..C-1.
        """
        sums = self._sums.cpu().numpy()
        images, image_iou, image_dice, bad = sums[-4:]
        if bad:
            raise ValueError(
                f"ConfusionMatrix.scores: ids must be in 0..{self.num_classes - 1} or, in masks, "
                f"{self.ignore_index}; {bad} pixels are not. Check the masks, and num_classes."
            )
        h = sums[:-4].reshape(self.num_classes, self.num_classes).astype(np.float64)  # exact to 2^53
        targets, predicted, tp, total = h.sum(1), h.sum(0), np.diag(h), h.sum()
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is n/a
            iou = tp / (targets + predicted - tp)
            dice = 2 * tp / (targets + predicted)
            accuracy = tp / targets
            share = targets / total
            most = share.max()  # the baseline's IoU of that class; its others are 0
            return Scores(
                iou=iou,
                dice=dice,
                accuracy=accuracy,
                mean_iou=_mean(iou),
                mean_dice=_mean(dice),
                pixel_accuracy=float(tp.sum() / total),
                mean_accuracy=_mean(accuracy),
                frequency_weighted_iou=float((share * iou)[targets > 0].sum()) if total else float("nan"),
                mean_iou_foreground=_mean(iou[1:]),
                mean_dice_foreground=_mean(dice[1:]),
                image_mean_iou=float(image_iou / _FIXED / images),
                image_mean_dice=float(image_dice / _FIXED / images),
                baseline_iou=float(most / (targets > 0).sum()),
                baseline_accuracy=float(most),
            )

    def _add(self, h: Tensor) -> None:
        """Add the matrices of N images, (N, C, C)."""
        tp = h.diagonal(dim1=1, dim2=2).double()
        both = (h.sum(1) + h.sum(2)).double()  # TP + FP plus TP + FN
        present = both > 0
        classes = present.sum(1).clamp(min=1)
        iou = (tp / (both - tp).clamp(min=1)).sum(1) / classes
        dice = (2 * tp / both.clamp(min=1)).sum(1) / classes
        self._sums[:-4] += h.sum(0).flatten()
        self._sums[-4] += present.any(1).sum()
        self._sums[-3] += (iou * _FIXED).round().long().sum()
        self._sums[-2] += (dice * _FIXED).round().long().sum()

    def _refuse(self, preds: Tensor, masks: Tensor) -> NoReturn:
        known = f"0..{self.num_classes - 1}"
        kept = masks[masks != self.ignore_index]
        found = [f"{int(ids.min())} to {int(ids.max())}" if ids.numel() else "none" for ids in (preds, kept)]
        raise ValueError(
            f"ConfusionMatrix.update: preds must be class ids {known}, masks {known} or {self.ignore_index}; "
            f"got preds {found[0]}, masks {found[1]}. Map the others, or build it with more classes."
        )


def predicted_ids(logits: Tensor) -> Tensor:
    """Return the class of the largest logit at each pixel; of equal ones the lowest, as argmax does.

    Args:
        logits: (N, C, H, W), any float dtype and memory format.

    Returns:
        (N, H, W), uint8 up to 256 classes, else int16, which holds 32,768 classes.

    Example:
        >>> predicted_ids(torch.tensor([0.1, 0.7, 0.2]).view(1, 3, 1, 1))
        tensor([[[1]]], dtype=torch.uint8)
    """
    classes = logits.shape[1]
    if logits.device.type != "cpu" or classes > 256:
        return logits.argmax(1).to(torch.uint8 if classes <= 256 else torch.int16)
    if logits.stride(1) == 1:  # channels_last: max has a faster kernel than argmax
        return logits.max(1).indices.to(torch.uint8)
    ids = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.uint8)
    for scores, out in zip(logits, ids, strict=True):
        # the id is the number of classes before the first that has the maximum: plain passes over planes
        top = scores.amax(0)
        before, below = torch.ones_like(out), torch.empty_like(out, dtype=torch.bool)
        for plane in scores[:-1]:
            torch.ne(plane, top, out=below)
            out.add_(before.mul_(below.view(torch.uint8)))
    return ids


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
