"""Figures and printed lines of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import visualize
from utils.checkpoint import write_image
from utils.cli import quoted
from utils.evaluation import Evaluation
from utils.run_folder import END_MARK
from utils.tables import class_table, format_score, mean_scores, write_csv

SHOWN = 4  # images in a panel


@dataclass(frozen=True)
class RunReport:
    """Draws and describes a run.

    Attributes:
        folder: of the run.
        classes: names, colors and ignore_index.
        learning_rates: (epoch, planned learning rate) points.
    """

    folder: Path
    classes: visualize.Classes
    learning_rates: Sequence[tuple[float, float]]

    def draw_augmented(self, images: np.ndarray, masks: np.ndarray) -> None:
        """Write `samples/augmented.png` of a batch: uint8 images (N, H, W, C), masks (N, H, W)."""
        (self.folder / "samples").mkdir(exist_ok=True)
        panel = visualize.augmented_panel(images, masks, self.classes)
        write_image(self.folder / "samples" / "augmented.png", panel)

    def write_log(self, rows: list[dict[str, Any]], draw: bool) -> None:
        """Write `log.csv`, one row per epoch; `draw` also draws it as `curves.png`."""
        write_csv(self.folder / "log.csv", rows)
        if draw:
            write_image(self.folder / "curves.png", visualize.draw_curves(rows, self.learning_rates))

    def draw_samples(self, epoch: int, samples: Sequence[visualize.Sample]) -> None:
        """Write the validation samples of an epoch to `samples/`."""
        panel = visualize.sample_panels(samples, self.classes)
        write_image(self.folder / "samples" / f"epoch_{epoch:03d}.png", panel)

    def draw_final(
        self,
        rows: list[dict[str, Any]],
        evaluation: Evaluation,
        samples: Sequence[visualize.Sample],
        subtitle: str,
    ) -> None:
        """Write `report.png`, the mark of a finished run."""
        parts = (self.classes, evaluation.scores, evaluation.counts.numpy(), samples)
        title = self.folder.name
        report = visualize.draw_report(rows, self.learning_rates, *parts, title, subtitle)
        write_image(self.folder / END_MARK, report)

    def describe_epoch(
        self, row: dict[str, Any], eta: str, evaluation: Evaluation | None, is_best: bool
    ) -> str:
        """Return a line about an epoch, and the table of the classes if it has validated."""
        terms = [f"{name[6:]} {value:.4f}" for name, value in row.items() if name.startswith("train_")]
        terms.append(f"learning rate {row['learning_rate']:.3g}, {row['images_per_second']:.0f} images/s")
        lines = ["  " + ", ".join(terms) + eta]
        if evaluation:
            scores = mean_scores(evaluation.scores) + "  (best so far)" * is_best
            lines.append(f"  validation loss {evaluation.loss:.4f}, {scores}")
            lines.append(class_table(self.classes.names, evaluation.scores))
        return "\n".join(lines)

    def describe_best(self, epoch: int, evaluation: Evaluation, time_and_memory: str) -> str:
        """Return the scores of best.pt, and what to do next."""
        names, scores = self.classes.names, evaluation.scores
        most_frequent = names[int(evaluation.counts.sum(1).argmax())]
        baseline = f"mean IoU {format_score(scores.baseline_iou)}"
        return "\n".join(
            [
                f"best: epoch {epoch}, {mean_scores(scores)}; "
                f"predicting {most_frequent} everywhere would have {baseline}",
                class_table(names, scores),
                time_and_memory,
                f"see {self.folder / END_MARK}; predict with: python predict.py --weights "
                f"{quoted(self.folder / 'best.pt')}",
            ]
        )
