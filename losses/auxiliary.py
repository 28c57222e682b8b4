"""PSPNet's training loss: that of the main head plus a fraction of that of the auxiliary head."""

from torch import Tensor, nn

from .base import SegmentationLoss


class AuxLoss(nn.Module):
    """loss_fn(logits) + weight * loss_fn(aux_logits).

    Paper: Pyramid Scene Parsing Network (Zhao et al., 2017), section 3.3, which chooses 0.4,
    https://arxiv.org/abs/1612.01105. For a plain tensor, which the network returns in evaluation, it is
    `loss_fn` itself.
    """

    def __init__(self, loss_fn: SegmentationLoss, weight: float = 0.4) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        self.weight = weight

    def denominator(self, masks: Tensor) -> Tensor:
        """Return `loss_fn.denominator(masks)`."""
        return self.loss_fn.denominator(masks)

    def forward(
        self, logits: Tensor | tuple[Tensor, Tensor], masks: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor:
        """Return the scalar loss of logits, or of (logits, aux_logits), both at the masks' size.

        The other arguments, and what is raised, are those of `SegmentationLoss.forward`.
        """
        return self.with_terms(logits, masks, denominator)[0]

    def with_terms(
        self, logits: Tensor | tuple[Tensor, Tensor], masks: Tensor, denominator: Tensor | float | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and the terms of the main logits with `aux`, before its weight."""
        if isinstance(logits, Tensor):
            return self.loss_fn.with_terms(logits, masks, denominator)
        logits, aux_logits = logits
        aux = self.loss_fn(aux_logits, masks, denominator)
        main, terms = self.loss_fn.with_terms(logits, masks, denominator)
        return main + self.weight * aux, {**terms, "aux": aux.detach()}
