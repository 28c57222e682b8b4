"""Predicting and scoring the validation images: each once, at its mask's own size, over all processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from datasets.folder import SegmentationDataset
from datasets.sampling import evaluation_items
from metrics import ConfusionMatrix, Scores, predicted_ids
from models import prepare_for_inference
from utils import distributed
from utils.device import counting_device, memory_format, to_device
from utils.distributed import Processes
from utils.inference import Predictor, image_logits, restore
from utils.tables import format_score
from utils.visualize import Sample


@dataclass
class Evaluation:
    """The result of a pass over the validation images."""

    scores: Scores
    counts: Tensor  # confusion matrix, int64 (C, C), on the CPU
    loss: float  # mean of the images' losses
    image_iou: list[float]  # mean IoU of each image alone, in the data set's order


@dataclass(frozen=True)
class Validator:
    """Predicts and scores the images of a data set with any weights of a model.

    Attributes:
        dataset: made for evaluation.
        loss_fn: maps logits and masks to a scalar.
        num_classes: of the model.
        ignore_index: label of the pixels that are not counted.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        window: height and width of a window that slides over each image; None predicts images whole.
        batch_size: images, or windows, that are computed together.
        device: where to compute.
        precision: dtype of the network.
        channels_last: whether the network computes in channels_last.
        processes: each predicts its part of the images.
    """

    dataset: SegmentationDataset
    loss_fn: nn.Module
    num_classes: int
    ignore_index: int
    mean: Sequence[float]
    std: Sequence[float]
    window: tuple[int, int] | None
    batch_size: int
    device: torch.device
    precision: torch.dtype
    channels_last: bool
    processes: Processes

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, weights: dict[str, Tensor], progress: tqdm, after_round: Callable[[], None]
    ) -> Evaluation:
        """Score weights of `model` without waiting for the device in between.

        Args:
            model: is left unchanged.
            weights: a state dict; all processes take those of the main one.
            progress: a progress bar over all images.
            after_round: called by all processes after every batch; it may raise, to end the evaluation.
        """
        distributed.from_main(weights)  # batch norm statistics differ by process
        total, rank, world_size = len(self.dataset), self.processes.rank, self.processes.world_size
        where = counting_device(self.device)
        matrix, of_image = (ConfusionMatrix(self.num_classes, self.ignore_index, where) for _ in range(2))
        image_iou = torch.zeros(total, dtype=torch.float64, device=where)
        losses = torch.zeros(total, device=self.device)
        together = self.batch_size * world_size
        rounds = [range(total)[first : first + together] for first in range(0, total, together)]
        own = [indices[rank::world_size] for indices in rounds]
        for indices, predictions in zip(rounds, self._predict(model, weights, own), strict=True):
            for index, (_, _, mask), logits in predictions:
                masks = to_device(mask, self.device)[None]
                of_image.reset()
                of_image.update(predicted_ids(logits), masks)
                matrix.merge(of_image)
                image_iou[index] = of_image.image_mean_iou
                losses[index] = self.loss_fn(logits, masks)
            after_round()
            progress.update(len(indices))
        state = matrix.state()
        distributed.sum_over(state, image_iou, losses)
        matrix.load_state(state)
        return Evaluation(matrix.scores(), matrix.counts.cpu(), float(losses.mean()), image_iou.tolist())

    def samples(
        self,
        model: nn.Module,
        weights: dict[str, Tensor],
        image_iou: Sequence[float],
        shown: Sequence[int],
    ) -> list[Sample]:
        """Predict some images again, to be drawn: image, mask, prediction and caption of each."""
        samples = []
        (predictions,) = self._predict(model, weights, [shown])
        for index, (image, box, mask), logits in predictions:
            whole = restore(image[None].float(), box)[0].permute(1, 2, 0).round().byte().numpy()
            caption = f"{self.dataset.pairs[index].image.name}  mean IoU {format_score(image_iou[index])}"
            samples.append((whole, mask.numpy(), predicted_ids(logits)[0].cpu().numpy(), caption))
        return samples

    def _predict(
        self, model: nn.Module, weights: dict[str, Tensor], batches: Sequence[Sequence[int]]
    ) -> Iterator[Iterator[tuple[int, tuple, Tensor]]]:
        """Yield for each batch of indices an iterator over (index, item, logits (1, C, H, W))."""
        torch.backends.cudnn.benchmark = False  # it would tune for every size of window and last batch
        layout = memory_format(self.channels_last, self.device)
        options = {"dtype": self.precision, "channels_last": layout == torch.channels_last}
        prepared = prepare_for_inference(model, weights, device=self.device, **options)
        looks = {"mean": self.mean, "std": self.std, "memory_format": layout}
        predictor = Predictor(prepared, **looks, batch_size=self.batch_size)
        on_gpu = self.device.type == "cuda"
        threads = torch.get_num_threads() if on_gpu else 0  # on a CPU the network needs the cores
        loaded = evaluation_items(self.dataset, batches, threads, pin_memory=on_gpu)
        for indices, items in zip(batches, loaded, strict=True):
            images, boxes = [image for image, _, _ in items], [box for _, box, _ in items]
            logits = image_logits(predictor, images, boxes, self.window) if items else ()
            yield zip(indices, items, logits, strict=True)


def best_and_worst(scores: Sequence[float]) -> list[int]:
    """Return the indices of the two best scores and the two worst, as far as there are so many."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return order[:2] + order[2:][-2:]
