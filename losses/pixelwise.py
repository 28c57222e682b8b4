"""The one computation behind every loss: softmax, its pixel term, its Dice term, and their gradient."""

import torch
from torch import Tensor, nn


class SegmentationLoss(nn.Module):
    """loss = pixel_share * focal-type term + dice_share * Dice term; the losses with names are special cases.

    Args:
        ignore_index: label of the pixels that count for nothing.
        class_weights: one number a class, or None for all ones.
        gamma: focusing exponent; 0 is cross entropy.
        pixel_share: factor on the pixel term.
        dice_share: factor on the Dice term.
        smooth: Dice's smoothing.
        names: what ``terms`` calls the pixel term and the Dice term.
    """

    def __init__(
        self,
        *,
        ignore_index,
        class_weights=None,
        gamma=0.0,
        pixel_share=1.0,
        dice_share=0.0,
        smooth=1.0,
        name="ce",
    ):
        super().__init__()
        weights = None
        if class_weights is not None:
            weights = torch.as_tensor(class_weights, dtype=torch.float32)
            if (
                weights.ndim != 1
                or not torch.isfinite(weights).all()
                or (weights < 0).any()
                or weights.sum() == 0
            ):
                raise ValueError(
                    f"class_weights must be one finite number of 0 or more a class, not all 0; got {class_weights}. "
                    "Give one weight a class."
                )
        self.ignore_index = ignore_index
        self.gamma, self.pixel_share, self.dice_share, self.smooth = gamma, pixel_share, dice_share, smooth
        self.name = name
        self.terms = {}
        self.register_buffer("class_weights", weights, persistent=False)

    def denominator(self, masks: Tensor) -> Tensor:
        """Return what the pixel term divides by: the sum of the class weights over the valid pixels of ``masks``."""
        valid = masks != self.ignore_index
        if self.class_weights is None:
            return valid.sum().float()
        weights = self.class_weights[masks.masked_fill(~valid, 0).long()]
        return (weights * valid).sum()

    def forward(self, logits: Tensor, masks: Tensor, denominator: Tensor | float | None = None) -> Tensor:
        masks = masks.long()
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        own = self.denominator(masks).to(dtype)
        total = (
            own if denominator is None else torch.as_tensor(denominator, dtype=dtype, device=logits.device)
        )
        total = torch.where(total > 0, total, 1.0)
        valid = masks != self.ignore_index
        index = masks.masked_fill(~valid, 0)[:, None]
        logp = torch.log_softmax(logits, 1, dtype=dtype)
        self.terms = {}
        loss = 0.0
        if self.pixel_share:
            lp = logp.gather(1, index)[:, 0]
            value = -lp * (-torch.expm1(lp)) ** self.gamma if self.gamma else -lp
            if self.class_weights is not None:
                value = value * self.class_weights.to(dtype)[index[:, 0]]
            pixel = (value * valid).sum() / total
            self.terms[self.name] = pixel.detach()
            loss = loss + self.pixel_share * pixel
        if self.dice_share:
            probs = logp.exp() * valid[:, None]
            truth = torch.zeros_like(probs).scatter_(1, index, 1.0) * valid[:, None]
            pixels = truth.sum((0, 2, 3))
            score = (2 * (probs * truth).sum((0, 2, 3)) + self.smooth) / (
                probs.sum((0, 2, 3)) + pixels + self.smooth
            )
            present = pixels > 0
            dice = ((1 - score) * present).sum() / present.sum().clamp(min=1) * (own / total)
            self.terms["dice"] = dice.detach()
            loss = loss + self.dice_share * dice
        return loss


class AuxLoss(nn.Module):
    """PSPNet's training loss: main + weight * auxiliary (Zhao et al., 2017, section 3.3: weight 0.4).

    Takes ``(logits, aux_logits)``; a plain tensor of logits, as in evaluation, is passed on to ``loss_fn``.
    """

    def __init__(self, loss_fn: SegmentationLoss, weight: float = 0.4):
        super().__init__()
        self.loss_fn = loss_fn
        self.weight = weight
        self.terms = {}

    def denominator(self, masks: Tensor) -> Tensor:
        """Return ``loss_fn.denominator(masks)``."""
        return self.loss_fn.denominator(masks)

    def forward(self, logits, masks: Tensor, denominator: Tensor | float | None = None) -> Tensor:
        if isinstance(logits, Tensor):
            loss = self.loss_fn(logits, masks, denominator)
            self.terms = self.loss_fn.terms
            return loss
        main_logits, aux_logits = logits
        aux = self.loss_fn(aux_logits, masks, denominator)
        main = self.loss_fn(main_logits, masks, denominator)
        self.terms = {**self.loss_fn.terms, "aux": aux.detach()}
        return main + self.weight * aux
