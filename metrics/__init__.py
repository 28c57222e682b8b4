"""Scores of predicted masks, all from one integer confusion matrix."""

from .confusion import ConfusionMatrix, Scores, predicted_ids

__all__ = ["ConfusionMatrix", "Scores", "predicted_ids"]
