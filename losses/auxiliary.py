"""PSPNet's training loss: the main head's and a fraction of the auxiliary head's."""

from torch import Tensor, nn

from .softmax_loss import SegmentationLoss


class AuxLoss(nn.Module):
    """loss_fn(logits) + weight * loss_fn(aux_logits).

    Paper: Pyramid Scene Parsing Network (Zhao et al., 2017), section 3.3, which chooses 0.4,
    https://arxiv.org/abs/1612.01105. A plain tensor, as the network gives in evaluation, is passed on to
    `loss_fn`. `terms` holds those of `loss_fn` on the main logits, and `aux`, before its weight.
    """

    def __init__(self, loss_fn: SegmentationLoss, weight: float = 0.4) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        self.weight = weight
        self.terms: dict[str, Tensor] = {}

    def denominator(self, masks: Tensor) -> Tensor:
        """Return `loss_fn.denominator(masks)`."""
        return self.loss_fn.denominator(masks)

    def forward(
        self, logits: Tensor | tuple[Tensor, Tensor], masks: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor:
        """Return the scalar loss of logits, or of (logits, aux_logits), both at the masks' size.

        The other arguments, and what is raised, are those of `SegmentationLoss.forward`.
        """
        if isinstance(logits, Tensor):
            loss = self.loss_fn(logits, masks, denominator)
            self.terms = self.loss_fn.terms
            return loss
        logits, aux_logits = logits
        aux = self.loss_fn(aux_logits, masks, denominator)
        main = self.loss_fn(logits, masks, denominator)
        self.terms = {**self.loss_fn.terms, "aux": aux.detach()}
        return main + self.weight * aux

    def with_terms(self, logits, masks, denominator=None):
        loss = self(logits, masks, denominator)
        return loss, self.terms
