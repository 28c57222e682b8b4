"""Train a segmentation network: edit config.py, then run `python train.py`. Every setting is also a flag."""

import sys

from config import Config
from utils.cli import Fail, Parsed, end_with, mendable, parse, quoted, resumed_settings


def read_flags() -> Parsed:
    """The settings, after a look for the folders and files that they name."""
    parsed = parse(Config, sys.argv[1:], __doc__)
    with mendable():
        parsed.settings.refuse_missing()
    return parsed


if __name__ == "__main__":  # before torch is imported, so that --help and wrong settings are answered at once
    PARSED = end_with(read_flags)

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from datasets import DataError, DataReport, check_data
from datasets.folder import SegmentationDataset
from datasets.sampling import Loader, epoch_batches
from datasets.transforms import Augmentation, mean_std
from losses import AuxLoss, build_loss, median_frequency_weights
from metrics import ConfusionMatrix, Scores, predicted_ids
from models import build_model, load_pretrained, read_checkpoint
from models.checkpoint import FORMAT
from utils import checkpoint as files
from utils import device as machine
from utils import distributed, visualize
from utils import run as run_files
from utils.distributed import ONE_PROCESS, Processes
from utils.ema import Ema
from utils.inference import Network, normalize, picture_logits, restore
from utils.optim import Schedule, build_optimizer
from utils.run import END_MARK, Clock, Progress, StopSignal, class_table, format_score, mean_scores

FREE = ("num_workers", "device", "cache", "cache_dir", "save_every_minutes")  # settings that change no result
SHOWN = 4  # pictures in a panel of samples/ and in the report


def main(config: Config, given: dict[str, Any] | None = None) -> Path:
    """Train as `config` says and return the run's folder.

    `given` are the settings that stood on the command line: resuming refuses those that contradict the run.
    What the user can mend, and what stops the work, is raised as `Fail` with its exit code.
    """
    machine.keep_freed_memory()
    processes, saved, folder = distributed.read_processes(), None, None
    with mendable():
        run_files.try_output(Path(config.output_dir))
        if config.resume:
            folder = run_files.find_run(config.resume, Path(config.output_dir))
            saved = read_checkpoint(folder / "last.pt")
            print(f"resuming {folder}")
            own = saved["config"] | {"run_name": folder.name}
            config = resumed_settings(config, own, given or {}, FREE)
        elif config.run_name and not config.check and Path(config.output_dir, config.run_name).exists():
            raise run_files.taken(Path(config.output_dir, config.run_name))  # before the data is checked
        device = machine.pick_device(config.device, processes.local_rank)
        precision = machine.pick_precision(config.amp, device)
        model = build_network(config, fresh=saved is None)
        about = config.pick("num_classes", "ignore_index", "class_colors", "in_channels", "labels")
        about |= config.pick("mask_suffix", "val_share", "seed")
        about |= {"class_names": config.names, "cache_dir": config.cache_folder}
        report = check_data(config.data_root, **about, progress=progress_bar)
    print(report.describe(), flush=True)
    if config.check:
        return Path(config.data_root)
    try:
        distributed.join(processes, device)
        with mendable():
            run = Run(config, report, device, precision, model, processes)
            if saved is not None:
                run.folder = folder
                restore_state(run, saved)
            elif processes.is_main:
                run.folder = run_files.create_run(Path(config.output_dir), config.run_name, config.model)
            held = run_files.hold(run.folder) if processes.is_main else nullcontext()
            folder = run.folder = distributed.told_by_main(run.folder)
        with held, run.stop, closing(run.loader):
            start(run)
            train(run)
        if processes.world_size > 1:
            run.forward = run.model  # the wrapper goes before the group
        distributed.leave()
    except (DataError, OSError, RuntimeError, MemoryError) as error:
        told = run_files.explain(error, device, folder, config.memory_savers)
        if told is None:
            raise
        raise Fail(told, 1) from error
    return folder


def build_network(config: Config, fresh: bool) -> nn.Module:
    """The network on the CPU; a fresh one with the first weights that the settings ask for."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, config.num_classes, config.in_channels, **config.model_options)
    if fresh and config.pretrained != "none":
        print(load_pretrained(model, config.pretrained))
    if fresh and config.init_from:
        checkpoint = read_checkpoint(config.init_from)
        skipped = files.load_fitting(model, checkpoint.get("ema") or checkpoint["model"])
        own = [*model.state_dict()]
        missing = [name for name in own if name in skipped]
        frozen = [name for name in missing if config.freeze_backbone and name.startswith("backbone.")]
        problem = ""
        if len(missing) == len(own):
            problem = f"none of its weights fits {config.model}"
        elif frozen and config.pretrained == "none":
            problem = f"freeze_backbone, but {frozen[0]} is not in it, or of another shape"
        if problem:
            remedy = f"Give a checkpoint of {config.model}" + " with this backbone" * bool(frozen)
            raise ValueError(f"init_from {config.init_from}: {problem}. {remedy}")
        loaded = f"{len(own) - len(missing)} of {len(own)} loaded, {len(skipped)} skipped"
        lines = [f"{name}: {why}" for name, why in skipped.items()]
        print("\n  ".join([f"weights from {config.init_from}: {loaded}", *lines]))
    return model


class Run:
    """What the functions of a run share; made once, changed only by training."""

    def __init__(
        self,
        config: Config,
        report: DataReport,
        device: torch.device,
        precision: torch.dtype,
        model: nn.Module,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        """Everything a run needs, from its settings, its data and its network; nothing is written yet."""
        torch.backends.cudnn.benchmark = not config.deterministic
        torch.use_deterministic_algorithms(config.deterministic)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it at first use
        if device.type == "cuda" and precision != torch.float32:
            torch.set_float32_matmul_precision("high")  # what autocast leaves in float32 may use TF32

        self.config, self.report, self.processes = config, report, processes
        self.device, self.precision = device, precision
        shared = config.pick("image_size", "resize", "in_channels", "ignore_index", "seed")
        shared |= {"encoding": report.encoding, "max_value": report.max_value}
        moves = Augmentation(**config.pick("hflip", "vflip", "scale", "rotate", "color_jitter"))
        self.train_set = SegmentationDataset(report.train, augmentation=moves, **shared)
        self.val_set = SegmentationDataset(report.val, evaluation=True, **shared)
        for split, data in (("training", self.train_set), ("validation", self.val_set)):
            print(f"{split} {data.use_cache(config.cache, config.cache_folder)}")
            data.fill_cache(progress_bar, processes.rank, processes.world_size)
        workers = config.num_workers
        if workers is None:  # only for what must be decoded each time while a GPU computes
            decoded = self.train_set.cache is not None
            workers = 0 if decoded or device.type == "cpu" else min(8, os.cpu_count() or 1)
        self.loader = Loader(self.train_set, workers, pin_memory=device.type == "cuda")
        self.mean, self.std = mean_std(config.in_channels)
        colors = config.class_colors or visualize.default_palette(config.num_classes)
        self.classes = visualize.Classes(config.names, [list(color) for color in colors], config.ignore_index)

        together = config.batch_size // (config.accumulate * processes.world_size)
        largest = max(parameter.nbytes for parameter in model.parameters())
        machine.keep_freed_memory(largest, together * math.prod(config.image_size))
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model.to(device, memory_format=layout)
        if config.freeze_backbone:
            model.backbone.requires_grad_(False)
        if config.sync_batchnorm:
            if device.type != "cuda":
                raise ValueError(f"sync_batchnorm needs GPUs; got device {device}. Leave it off")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model
        self.forward = distributed.wrap(model, processes, device)  # gradients averaged over the processes
        if config.compile:
            self.forward = torch.compile(self.forward)
        self.ema = Ema(model, config.ema_decay) if config.ema_decay else None

        weights = config.weighting
        if weights == "auto":
            weights = median_frequency_weights(report.class_pixels["train"], report.class_image_pixels)
            print("class weights (median frequency): " + ", ".join(f"{w:.4g}" for w in weights))
        loss_fn = build_loss(config.loss, config.ignore_index, weights, **config.loss_options)
        self.loss_fn = AuxLoss(loss_fn, config.aux_weight).to(device)
        groups = config.pick("weight_decay", "momentum", "backbone_lr_scale")
        self.optimizer = build_optimizer(model, config.optimizer, config.learning_rate, **groups)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        order = (len(self.train_set), config.batch_size, config.seed, 0)
        steps = len(epoch_batches(*order, processes.world_size))
        options = config.pick("step_size", "step_gamma", "poly_power", "plateau_factor", "plateau_patience")
        options |= {"warmup_steps": min(config.warmup_steps, steps * config.epochs // 2)}
        options |= {"steps_per_epoch": steps, "epochs": config.epochs}
        self.schedule = Schedule(self.optimizer, config.scheduler, **options)

        self.folder, self.progress, self.clock = Path(), Progress(), Clock()
        self.rate_plan: list[tuple[float, float]] = []  # (epoch, learning rate) over the run, to draw
        self.best: Evaluation | None = None  # of best.pt, where this process wrote it
        self.stop = StopSignal(quiet=not processes.is_main)
        self.saved_at = time.monotonic()  # when last.pt was last written


def progress_bar(iterable: Iterable | None = None, total: int | None = None, description: str = "") -> tqdm:
    """A bar on a terminal, of the main process alone; silent elsewhere."""
    silent = True if os.environ.get("RANK", "0") != "0" else None  # None: where stderr is no terminal
    return tqdm(iterable, description, total, leave=False, unit="img", dynamic_ncols=True, disable=silent)


def start(run: Run) -> None:
    """Write what this run is, draw one augmented batch, and print the table of what will happen."""
    config = run.config
    if not run.processes.is_main:
        return
    files.sweep(run.folder)
    if (run.folder / END_MARK).exists():  # a finished run that was given more epochs
        (run.folder / END_MARK).unlink()
        save_last(run)
    steps, warmup = run.schedule.steps_per_epoch, run.schedule.warmup_steps
    plan = [(step / steps, rate) for step, rate in enumerate(run.schedule.plan(), start=1)]
    run.rate_plan = plan[:: -max(1, len(plan) // 500)]  # backwards, so that the end is there
    files.write_json(run.folder / "config.json", config.saved | {"versions": run_files.versions()})
    (run.folder / "samples").mkdir(exist_ok=True)
    shown = visualize.spread(len(run.train_set), 2 * SHOWN)
    images, masks = run.train_set.batch([(0, index) for index in shown])
    panel = visualize.augmented_panel(images.permute(0, 2, 3, 1).numpy(), masks.numpy(), run.classes)
    files.write_image(run.folder / "samples" / "augmented.png", panel)

    with torch.device("meta"):  # which computes nothing
        twin = build_network(config, fresh=False).eval()
        operations = run_files.multiply_adds(twin, torch.empty(1, config.in_channels, *config.image_size))
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    options = [f"{name} {value}" for name, value in config.model_options.items()]
    loss = [f"{name} {value}" for name, value in config.loss_options.items()]
    height, width = config.image_size
    several = f", {run.processes.world_size} processes" * (run.processes.world_size > 1)
    device = f"{machine.describe_device(run.device)}, {str(run.precision).removeprefix('torch.')}{several}"
    rows = {
        "data": f"{config.data_root}, {len(run.train_set)} pictures to train, {len(run.val_set)} to validate",
        "classes": f"{config.num_classes}: {', '.join(config.names)}",
        "picture": f"{height} x {width}, {config.resize}, {config.in_channels} channels",
        "model": f"{config.model} ({', '.join(options)})",
        "size": f"{parameters / 1e6:.2f} M parameters, {operations / 1e6:,.0f} M multiply-adds a picture",
        "loss": ", ".join([config.loss, *loss]),
        "optimizer": f"{config.optimizer}, learning rate {config.learning_rate:g}, batch {config.batch_size}",
        "schedule": f"{config.scheduler}, {config.epochs} epochs of {steps} steps, {warmup} steps to warm up",
        "device": device,
        "folder": run.folder,
    }
    print("\n".join(f"{name:<10} {text}" for name, text in rows.items()), flush=True)


def train(run: Run) -> None:
    """All epochs that are left, then the report."""
    config, progress = run.config, run.progress
    while not is_over(run):
        number = progress.epoch + 1
        print(f"Epoch {number}/{config.epochs}", flush=True)
        started = time.perf_counter()
        rate = train_one_epoch(run) / (time.perf_counter() - started)
        row = {
            "epoch": number,
            "steps": run.schedule.position,
            "learning_rate": run.schedule.rate(run.schedule.position - 1),
            **{f"train_{name}": value / len(run.train_set) for name, value in progress.sums.items()},
            "images_per_second": rate,
        }
        found = None
        if number % config.val_every == 0 or number == config.epochs:
            with run.clock.to("validation"):
                found = evaluate(run, averaged_weights(run))
            row |= run_files.score_columns(config.names, found.scores, found.loss)
        end_epoch(run, row, found)
        print_epoch(run, row, found)
    if progress.epoch < config.epochs:
        print(f"no better {config.monitor} for {progress.stalled} validations: stopped early")
    finish(run)


def is_over(run: Run) -> bool:
    """Whether all epochs are done, or the score has not risen for too long."""
    stalled = 0 < run.config.early_stop <= run.progress.stalled
    return stalled or run.progress.epoch >= run.config.epochs


def train_one_epoch(run: Run) -> int:
    """Take the steps of the present epoch that are left; returns how many pictures they had.

    Each term's sum over the pictures goes to `progress.sums`.
    """
    config, progress, epoch = run.config, run.progress, run.progress.epoch
    order = (len(run.train_set), config.batch_size, config.seed, epoch)
    rank, world_size = run.processes.rank, run.processes.world_size
    wholes = epoch_batches(*order, world_size)
    sizes, batches = [len(whole) for whole in wholes], [whole[rank::world_size] for whole in wholes]
    sums = {name: torch.tensor(value, device=run.device) for name, value in progress.sums.items()}
    bad_step = torch.tensor(-1, device=run.device)  # the first whose loss is not finite
    shown_at = 0.0
    set_train_mode(run)
    loader = iter(run.loader.epoch(batches, epoch, progress.step))
    with progress_bar(total=len(run.train_set), description=f"Epoch {epoch + 1}") as bar:
        done = seen = bar.n = bar.initial = sum(sizes[: progress.step])
        for step in range(progress.step, len(batches)):
            waiting = time.perf_counter()
            images, masks, _ = next(loader)
            # a GPU that is still at work does not wait for data
            run.clock.add("step" if machine.is_busy(run.device) else "data", waiting)
            with run.clock.to("step"):
                terms = train_step(run, images, masks, epoch, step)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value * sizes[step]
                bad_step = torch.where((bad_step < 0) & ~torch.isfinite(terms["loss"]), step, bad_step)
                progress.step, seen, last = step + 1, seen + sizes[step], step + 1 == len(batches)
                now = time.monotonic()
                late = 0 < config.save_every_minutes < (now - run.saved_at) / 60
                signaled, late = distributed.largest([run.stop.number, late])
                if signaled or late or last or run.device.type == "cpu" or now - shown_at > 0.5:
                    refuse_non_finite(run, int(bad_step), batches)  # the only wait for the device
                    bar.set_postfix_str(f"loss {float(sums['loss']) / seen:.4f}", refresh=False)
                    shown_at = now
                    said = run.clock.estimate(run.schedule.position, run.schedule.total_steps, last)
                    if said:
                        tqdm.write(said, file=sys.stdout)
            bar.update(sizes[step])
            if signaled or late:
                progress.sums = over_processes(run, sums)
                save_last(run)
                if signaled:
                    leave(run, signaled)
    progress.sums = over_processes(run, sums)
    return seen - done


def over_processes(run: Run, sums: dict[str, Tensor]) -> dict[str, float]:
    """Sums of loss terms over all pictures, from those of the processes."""
    totals = torch.stack(list(sums.values())) / run.processes.world_size
    distributed.sum_over(totals)
    return dict(zip(sums, totals.tolist(), strict=True))


def train_step(run: Run, images: Tensor, masks: Tensor, epoch: int, step: int) -> dict[str, Tensor]:
    """One optimizer step over a batch, in `accumulate` parts; returns the loss and its terms, detached."""
    config, processes = run.config, run.processes
    place = np.random.SeedSequence([config.seed, epoch, step, processes.rank])
    torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))  # for dropout
    images = images.to(run.device, non_blocking=True)
    masks = masks.to(run.device, non_blocking=True)
    denominator = None
    if config.accumulate * processes.world_size > 1:  # that of the whole batch, so that parts add up to it
        denominator = run.loss_fn.denominator(masks)
        distributed.sum_over(denominator)
        denominator = denominator / processes.world_size  # gradients are averaged, not summed
    total: dict[str, Tensor] = {}
    parts = list(zip(images.chunk(config.accumulate), masks.chunk(config.accumulate), strict=True))
    for number, (part, part_masks) in enumerate(parts, start=1):
        inputs = normalize(part, run.mean, run.std, config.channels_last)
        with distributed.averaging(run.forward, number == len(parts)):
            with machine.autocast(run.device, run.precision):
                logits = run.forward(inputs)
            loss = run.loss_fn(logits, part_masks, denominator)
            run.scaler.scale(loss).backward()
        for name, value in {"loss": loss.detach(), **run.loss_fn.terms}.items():
            total[name] = total[name] + value if name in total else value
    if config.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.schedule.step()
    if run.ema:
        run.ema.update(run.model)
    return total


def set_train_mode(run: Run) -> None:
    """Training mode, but for a frozen backbone, whose statistics stay as they are."""
    run.model.train()
    if run.config.freeze_backbone:
        run.model.backbone.eval()


def refuse_non_finite(run: Run, step: int, batches: list[list[int]]) -> None:
    """Stop the run where a step (-1: none) had a loss that is not finite; `last.pt` stays as it is."""
    if step >= 0:
        pictures = ", ".join(str(run.train_set.pairs[index].image) for index in batches[step])
        rate = run.schedule.rate(run.progress.epoch * run.schedule.steps_per_epoch + step)
        where = f"in epoch {run.progress.epoch + 1}, step {step + 1}"
        conditions = f"(learning rate {rate:.3g}, {run.precision}), pictures {pictures}"
        raise Fail(f"the loss is not finite {where} {conditions}. {what_now(run)}", 1)


def what_now(run: Run) -> str:
    """What is left, and what to try, where numbers ceased to be finite."""
    last = run.folder / "last.pt"
    kept = f"{last} is the last good state. " if last.exists() else ""
    return f"{kept}Try a lower learning_rate, clip_grad 1, more warmup_steps, or amp off"


def leave(run: Run, signaled: int) -> None:
    """End the process after the signal that all processes know of; the caller has saved."""
    distributed.wait_for_all()
    if not run.processes.is_main:
        sys.exit(128 + signaled)
    raise Fail(f"stopped; go on with --resume {quoted(run.folder)}", 128 + signaled)


def averaged_weights(run: Run) -> dict[str, Tensor]:
    """The weights that validate and predict: the moving average where there is one."""
    return run.ema.weights if run.ema else files.plain_weights(run.model)


@dataclass
class Evaluation:
    """What a pass over the validation pictures gave."""

    scores: Scores
    counts: Tensor  # confusion matrix
    loss: float  # mean of the pictures' losses
    picture_iou: list[float]  # mean IoU of each picture alone, in the data set's order


@torch.no_grad()
def evaluate(run: Run, weights: dict[str, Tensor]) -> Evaluation:
    """Score weights of the model on the validation pictures, each once and at its own mask's size."""
    config, pictures = run.config, len(run.val_set)
    distributed.from_main(weights)
    network = ready_network(run, weights)
    where = machine.counting_device(run.device)
    matrix, one = (ConfusionMatrix(config.num_classes, config.ignore_index, where) for _ in range(2))
    picture_iou = torch.zeros(pictures, dtype=torch.float64, device=where)
    losses = torch.zeros(pictures, device=run.device)
    rank, world_size = run.processes.rank, run.processes.world_size
    together = config.batch_size * world_size  # pictures a round; each process goes round equally often
    with progress_bar(total=pictures, description="validation") as bar:
        for first in range(0, pictures, together):
            everyone = range(pictures)[first : first + together]
            for index, (_, _, truth), logits in validation_logits(run, network, everyone[rank::world_size]):
                truth = truth[None].to(run.device)
                one.reset()
                one.update(predicted_ids(logits), truth)
                matrix.merge(one)
                picture_iou[index] = one.picture_mean_iou
                losses[index] = run.loss_fn(logits, truth)
            (signaled,) = distributed.largest([run.stop.number])
            if signaled:  # validation is done again on resume
                save_last(run)
                leave(run, signaled)
            bar.update(len(everyone))
    state = matrix.state()
    distributed.sum_over(state, picture_iou, losses)
    matrix.load_state(state)
    return Evaluation(matrix.scores(), matrix.counts.cpu(), float(losses.mean()), picture_iou.tolist())


def ready_network(run: Run, weights: dict[str, Tensor]) -> Network:
    """The model with these weights, ready to predict."""
    looks = {"mean": run.mean, "std": run.std, "channels_last": run.config.channels_last}
    return Network(run.model, weights, device=run.device, precision=run.precision, **looks)


def validation_logits(run: Run, network: Network, batch: Sequence[int]) -> Iterator[tuple]:
    """Yield index, `evaluation_item` and logits (1, num_classes, H, W) of some pictures, in order."""
    items = [run.val_set.evaluation_item(index) for index in batch]
    images, boxes = [image for image, _, _ in items], [box for _, box, _ in items]
    window = run.config.image_size if run.config.resize == "crop" else None
    logits = picture_logits(network, images, boxes, window) if batch else ()
    yield from zip(batch, items, logits, strict=True)


def sample_rows(run: Run, weights: dict[str, Tensor], found: Evaluation, shown: Sequence[int]) -> list[tuple]:
    """Some validation pictures as rows for `visualize.sample_panels`, predicted once more."""
    rows = []
    for index, (image, box, truth), logits in validation_logits(run, ready_network(run, weights), shown):
        picture = restore(image[None].float(), box)[0].permute(1, 2, 0).round().byte().numpy()
        caption = f"{run.report.val[index].image.name}  mean IoU {format_score(found.picture_iou[index])}"
        rows.append((picture, truth.numpy(), predicted_ids(logits)[0].cpu().numpy(), caption))
    return rows


def end_epoch(run: Run, row: dict[str, Any], found: Evaluation | None) -> None:
    """Move the schedule, the best score, the log, the curves and the checkpoints on by one epoch."""
    config, progress = run.config, run.progress
    score = getattr(found.scores, f"mean_{config.monitor}") if found else None
    run.schedule.epoch_end(score)
    better = score is not None and score > progress.best
    if better:
        progress.best, progress.best_epoch, progress.stalled = score, progress.epoch + 1, 0
        run.best = found
    elif score is not None:
        progress.stalled += 1
    progress.rows.append(row)
    progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
    if better:
        save(run, "best", {"model": averaged_weights(run)})
    save_last(run)
    if not run.processes.is_main:
        return
    with run.clock.to("saving"):
        run_files.write_log(run.folder / "log.csv", progress.rows)
        if run.clock.share("saving") < 0.1:  # not at every one of many short epochs; `finish` draws the last
            draw_curves(run)
        last = progress.epoch == config.epochs
        if found and (last or progress.epoch % max(1, config.epochs // 10) == 0):
            rows = sample_rows(run, averaged_weights(run), found, visualize.spread(len(run.val_set), SHOWN))
            panel = visualize.sample_panels(rows, run.classes)
            files.write_image(run.folder / "samples" / f"epoch_{progress.epoch:03d}.png", panel)


def draw_curves(run: Run) -> None:
    """Write `curves.png`: the log so far, over the planned learning rate."""
    files.write_image(run.folder / "curves.png", visualize.draw_curves(run.progress.rows, run.rate_plan))


def save_last(run: Run) -> None:
    """Write `last.pt`, from which the run goes on as if nothing had been."""
    state = {
        "model": files.plain_weights(run.model),
        "ema": run.ema.weights if run.ema else None,
        "ema_steps": run.ema.steps if run.ema else 0,
        "config": run.config.saved,
        "progress": asdict(run.progress),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict(),
        "fingerprint": run.report.fingerprint,
    }
    save(run, "last", state)
    run.saved_at = time.monotonic()


def save(run: Run, kind: str, state: dict[str, Any]) -> None:
    """Write `last.pt` or `best.pt`: a state, and what prediction asks of a checkpoint, in plain values.

    Weights that are not finite, which the loss has not shown yet, end the run; the earlier file stays.
    """
    config = run.config
    bad = files.first_non_finite(files.plain_weights(run.model))
    if bad:
        found = f"the weights of {bad} are not finite after step {run.schedule.position}"
        raise Fail(f"{found}. {what_now(run)}", 1)
    info = {
        **config.pick("resize", "ignore_index", "mask_suffix", "amp"),
        "image_size": list(config.image_size),
        "class_names": list(config.names),
        "palette": run.classes.palette,
        "mean": run.mean,
        "std": run.std,
        "encoding": run.report.encoding.to_dict(),
        "max_value": run.report.max_value,
        "pairing": run.report.pairing,
        "epoch": run.progress.epoch,
        "versions": run_files.versions(),
    }
    network = {"name": config.model, "options": config.model_options}
    network |= config.pick("num_classes", "in_channels")
    checkpoint = {"format": FORMAT, "kind": kind, "architecture": network, "info": info, **state}
    if run.processes.is_main:
        with run.clock.to("saving"):
            files.save_atomic(checkpoint, run.folder / f"{kind}.pt")


def restore_state(run: Run, saved: dict[str, Any]) -> None:
    """Put a run where its `last.pt` was written; refuse changed data, and a finished run."""
    now = run.report.fingerprint
    changed = [part for part, value in saved["fingerprint"].items() if now.get(part) != value]
    if changed:
        what = f"{run.config.data_root} has changed since {run.folder} was started: {', '.join(changed)}"
        raise ValueError(f"{what}. Bring the old data back, or start a new run by --init_from")
    run.progress = Progress(**saved["progress"])
    if is_over(run) and (run.folder / END_MARK).exists():
        after = f"after {run.progress.epoch} epochs"
        raise ValueError(f"{run.folder} is finished {after}. Start a new run by --init_from")
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.schedule.load_state_dict(saved["schedule"])
    if saved["scaler"]:  # of a run that goes on at fp16; one at another precision has none
        run.scaler.load_state_dict(saved["scaler"])
    if run.ema:
        run.ema.load(saved["ema"], saved["ema_steps"])


def print_epoch(run: Run, row: dict[str, Any], found: Evaluation | None) -> None:
    """One line about the epoch, and the table of the classes where it validated."""
    terms = [f"{name[6:]} {value:.4f}" for name, value in row.items() if name.startswith("train_")]
    terms.append(f"learning rate {row['learning_rate']:.3g}, {row['images_per_second']:.0f} pictures/s")
    line = "  " + ", ".join(terms)
    if not is_over(run):
        line += run.clock.left(run.schedule.position, run.schedule.total_steps)
    if found:
        best = "  (best so far)" * (run.progress.best_epoch == row["epoch"])
        line += f"\n  validation loss {found.loss:.4f}, {mean_scores(found.scores)}{best}"
        line += "\n" + class_table(run.config.names, found.scores)
    print(line, flush=True)


def finish(run: Run) -> None:
    """Draw the report of `best.pt`, and say where everything lies."""
    config, progress, found = run.config, run.progress, run.best
    distributed.wait_for_all()  # for best.pt
    best = read_checkpoint(run.folder / "best.pt")["model"]
    if found is None:  # it is of before a resume
        with run.clock.to("validation"):
            found = evaluate(run, best)
    if not run.processes.is_main:
        return
    scores = found.scores
    with run.clock.to("saving"):
        run_files.write_log(run.folder / "log.csv", progress.rows)
        draw_curves(run)
        order = sorted(range(len(run.val_set)), key=lambda index: -found.picture_iou[index])
        rows = sample_rows(run, best, found, order[:2] + order[2:][-2:])
        parts = (run.classes, scores, found.counts.numpy(), rows)
        subtitle = f"{config.model} on {config.data_root}, best of {len(progress.rows)} epochs"
        report = visualize.draw_report(progress.rows, run.rate_plan, *parts, run.folder.name, subtitle)
        files.write_image(run.folder / END_MARK, report)
    commonest = config.names[int(found.counts.sum(1).argmax())]
    baseline = f"{commonest} everywhere would have mean IoU {format_score(scores.baseline_iou)}"
    print(f"best: epoch {progress.best_epoch}, {mean_scores(scores)}; {baseline}")
    print(class_table(config.names, scores))
    print(f"time: {run.clock.describe()}; peak memory {machine.peak_memory(run.device) / 2**30:.1f} GiB")
    best_file = quoted(run.folder / "best.pt")
    print(f"see {run.folder / END_MARK}; predict with: python predict.py --weights {best_file}")


if __name__ == "__main__":
    end_with(lambda: main(PARSED.settings, PARSED.given))
