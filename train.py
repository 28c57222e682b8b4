"""Train a segmentation network: edit config.py, then run `python train.py`. Every setting is also a flag."""

import sys

from config import Config
from utils.cli import Fail, Parsed, end_with, mendable, parse, resumed_settings


def read_flags() -> Parsed:
    """The settings, with what they name looked for.

    Raises:
        Fail: a wrong flag or value, or a file or folder that is not there.
    """
    parsed = parse(Config, sys.argv[1:], __doc__)
    with mendable():
        parsed.settings.refuse_missing()
    return parsed


PARSED: Parsed | None = None
if __name__ == "__main__":  # before torch is imported, so that --help and wrong settings are answered at once
    PARSED = end_with(read_flags)

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from datasets import DataError, DataReport, check_data
from datasets.folder import SegmentationDataset
from datasets.sampling import Loader, epoch_batches, evaluation_shard
from datasets.transforms import Augmentation, mean_std
from losses import AuxLoss, build_loss, median_frequency_weights
from metrics import ConfusionMatrix, Scores, predicted_ids
from models import build_model, load_pretrained, read_checkpoint
from models.checkpoint import FORMAT
from utils import distributed, visualize
from utils import run as run_files
from utils.checkpoint import (
    first_non_finite,
    load_fitting,
    plain_weights,
    save_atomic,
    sweep,
    write_image,
    write_json,
)
from utils.device import (
    autocast,
    describe_device,
    is_busy,
    is_out_of_memory,
    keep_freed_memory,
    peak_memory,
    pick_device,
    pick_precision,
)
from utils.distributed import ONE_PROCESS, Processes
from utils.ema import Ema
from utils.inference import Network, normalize, picture_logits, restore
from utils.optim import Schedule, build_optimizer, build_schedule
from utils.run import END_MARK, Clock, StopSignal, class_table, format_score, format_time, score_columns

FREE = ("num_workers", "device", "cache", "cache_dir", "save_every_minutes")  # settings that change no result
SHOWN = 4  # pictures in a panel of samples/ and in the report


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds beside weights, optimizer and schedule."""

    epoch: int = 0  # epochs that are over
    step: int = 0  # steps of the present epoch that are over
    sums: dict[str, float] = field(default_factory=dict)  # of the present epoch: each loss term x pictures
    best: float = -1.0  # monitored score
    best_epoch: int = 0
    stalled: int = 0  # validations since the best
    rows: list[dict[str, Any]] = field(default_factory=list)  # of log.csv


@dataclass
class Run:
    """What the functions of a run share; built once by `build`, changed only by training."""

    config: Config
    report: DataReport
    device: torch.device
    precision: torch.dtype
    train_set: SegmentationDataset
    val_set: SegmentationDataset
    loader: Loader
    architecture: dict[str, Any]
    model: nn.Module
    forward: nn.Module  # the model, its gradients averaged over the processes, compiled if asked for
    processes: Processes
    loss_fn: AuxLoss
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    ema: Ema | None
    mean: list[float]
    std: list[float]
    palette: list[list[int]]
    folder: Path = Path()
    progress: Progress = field(default_factory=Progress)
    clock: Clock = field(default_factory=Clock)
    stop: StopSignal = field(default_factory=StopSignal)
    saved_at: float = field(default_factory=time.monotonic)


def main(config: Config, given: dict[str, Any] | None = None) -> Path:
    """Train as `config` says and return the run's folder.

    Args:
        config: the settings.
        given: those of them that the user asked for expressly; resuming refuses what contradicts the run.

    Raises:
        Fail: with the exit code, for all that the user can mend and for what stopped the work.
    """
    keep_freed_memory()
    processes, saved, folder = distributed.read_processes(), None, None
    with mendable():
        run_files.try_output(Path(config.output_dir))
        if config.resume:
            folder = run_files.find_run(config.resume, Path(config.output_dir))
            saved = read_checkpoint(folder / "last.pt")
            print(f"resuming {folder}")
            config = resumed_settings(config, saved["config"], given or {}, FREE)
        device = pick_device(config.device, processes.local_rank)
        precision = pick_precision(config.amp, device)
        model = build_network(config, fresh=saved is None)
        report = check_data(
            config.data_root,
            class_names=config.names,
            **config.pick(
                "num_classes", "ignore_index", "class_colors", "in_channels", "labels", "mask_suffix"
            ),
            cache_dir=config.cache_folder,
            progress=progress_bar,
        )
    print(report.describe(), flush=True)
    if config.check:
        return Path(config.data_root)
    try:
        distributed.join(processes, device)
        with mendable():
            run = build(config, report, device, precision, model, processes)
            if saved is None and processes.is_main:
                run.folder = run_files.create_run(Path(config.output_dir), config.run_name, config.model)
            elif saved is not None:
                run.folder = folder
                restore_state(run, saved)
            folder = run.folder = distributed.told_by_main(run.folder)
        with run.stop, closing(run.loader):
            start(run)
            train(run)
    except (DataError, OSError, RuntimeError, MemoryError) as error:
        told = what_happened(error, config, device, folder)
        if told is None:
            raise
        raise Fail(told, 1) from error
    distributed.leave()
    return folder


def what_happened(error: Exception, config: Config, device: torch.device, folder: Path | None) -> str | None:
    """What to tell the user of an error that ended a run; None where it is a fault of this program."""
    saved = folder is not None and os.path.exists(folder / "last.pt")
    go_on = f"go on with --resume {folder}" if saved else "start again: nothing was saved yet"
    first_line = str(error).split("\n")[0]
    if is_out_of_memory(error):
        parts = [n for n in range(config.accumulate + 1, config.batch_size + 1) if config.batch_size % n == 0]
        less = [f"accumulate {n}" for n in parts[:1]] + ["amp bf16"] * (config.amp == "off")
        width = "backbone" if config.backbone_name else "base_channels"
        less += [f"a smaller batch_size, image_size or {width}"]
        weights = f" (from these weights: --init_from {folder / 'last.pt'})" if saved else ""
        return (
            f"out of memory on {device}, with a peak of {peak_memory(device) / 2**30:.1f} GiB. "
            f"Free some, then {go_on}; or start anew{weights} with {', '.join(less)}"
        )
    if distributed.is_lost(error):
        reason = first_line.split("] ", 1)[-1].split(". ")[0]  # without gloo's file and its good wishes
        return f"another process of this run has ended: {reason}. Mend what ended it, then {go_on}"
    if "DataLoader worker" in first_line:
        return f"{first_line}. Where memory ran out, take fewer num_workers; then {go_on}"
    return f"{error}. Mend that, then {go_on}" if isinstance(error, (DataError, OSError)) else None


def build_network(config: Config, fresh: bool) -> nn.Module:
    """The network on the CPU; a fresh one with the first weights that the settings ask for.

    Raises:
        ValueError: options that the network refuses, or weights that are none.
        FileNotFoundError: no such file of weights.
    """
    torch.manual_seed(config.seed)
    model = build_model(config.model, config.num_classes, config.in_channels, **config.model_options)
    if fresh and config.pretrained != "none":
        print(load_pretrained(model, config.pretrained))
    if fresh and config.init_from:
        checkpoint = read_checkpoint(config.init_from)
        skipped = load_fitting(model, checkpoint.get("ema") or checkpoint["model"])
        print("\n  ".join([f"weights from {config.init_from}, {len(skipped)} skipped", *skipped]))
    return model


def build(
    config: Config,
    report: DataReport,
    device: torch.device,
    precision: torch.dtype,
    model: nn.Module,
    processes: Processes = ONE_PROCESS,
) -> Run:
    """Everything a run needs, from its settings, its data and its network; nothing is written yet.

    Raises:
        ValueError: a combination that does not work; the message says which setting to change.
    """
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, at its first use
    if device.type == "cuda" and precision != torch.float32:
        torch.set_float32_matmul_precision("high")  # what autocast leaves in float32 may use TF32
    train_set, val_set = build_datasets(config, report, processes)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout)
    if config.freeze_backbone:
        model.backbone.requires_grad_(False)
    if config.sync_batchnorm and device.type != "cuda":
        raise ValueError(f"sync_batchnorm needs GPUs; got device {device}. Leave it off")
    if config.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    weights = class_weights(config, report)
    loss_fn = AuxLoss(
        build_loss(config.loss, config.ignore_index, weights, **config.loss_options), config.aux_weight
    )
    options = config.pick("weight_decay", "momentum", "backbone_lr_scale")
    optimizer = build_optimizer(model, config.optimizer, config.learning_rate, **options)
    steps_per_epoch = len(epoch_batches(len(train_set), config.batch_size, config.seed, epoch=0))
    schedule = build_schedule(
        optimizer,
        config.scheduler,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        warmup_steps=min(config.warmup_steps, steps_per_epoch * config.epochs // 2),
        **config.pick("step_size", "step_gamma", "poly_power", "plateau_factor", "plateau_patience"),
    )
    mean, std = mean_std(config.in_channels)
    parallel = distributed.wrap(model, processes, device)
    return Run(
        config=config,
        report=report,
        device=device,
        precision=precision,
        train_set=train_set,
        val_set=val_set,
        loader=Loader(
            train_set,
            num_workers=loading_processes(config, train_set, device),
            pin_memory=device.type == "cuda",
        ),
        architecture={
            "name": config.model,
            **config.pick("num_classes", "in_channels"),
            "options": config.model_options,
        },
        model=model,
        forward=torch.compile(parallel) if config.compile else parallel,
        processes=processes,
        loss_fn=loss_fn.to(device),
        optimizer=optimizer,
        schedule=schedule,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        ema=Ema(model, config.ema_decay) if config.ema_decay else None,
        mean=mean,
        std=std,
        palette=[
            list(color) for color in config.class_colors or visualize.default_palette(config.num_classes)
        ],
        stop=StopSignal(quiet=not processes.is_main),
    )


def build_datasets(
    config: Config, report: DataReport, processes: Processes
) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training pictures with augmentation, validation pictures without."""
    shared = config.pick("image_size", "resize", "in_channels", "ignore_index", "seed")
    shared["encoding"] = report.encoding
    augmentation = Augmentation(**config.pick("hflip", "vflip", "scale", "rotate", "color_jitter"))
    train_set = SegmentationDataset(report.train, augmentation=augmentation, **shared)
    val_set = SegmentationDataset(report.val, evaluation=True, **shared)
    for data in (train_set, val_set):
        said = data.use_cache(config.cache, config.cache_folder)
        data.fill_cache(progress_bar, processes.rank, processes.world_size)
    print(said)
    return train_set, val_set


def loading_processes(config: Config, data: SegmentationDataset, device: torch.device) -> int:
    """As the setting says; by itself only for what must be decoded each time while a GPU computes."""
    if config.num_workers is not None:
        return config.num_workers
    return 0 if data.cache is not None or device.type == "cpu" else min(8, os.cpu_count() or 1)


def class_weights(config: Config, report: DataReport) -> list[float] | None:
    """The class weights in numbers; `auto` comes from the training masks, and is printed."""
    if config.weighting != "auto":
        return None if config.weighting is None else list(config.weighting)
    weights = median_frequency_weights(report.class_pixels["train"], report.class_image_pixels)
    print("class weights (median frequency): " + ", ".join(f"{w:.4g}" for w in weights))
    return weights


def progress_bar(
    iterable: Iterable[Any] | None = None, total: int | None = None, description: str = "", unit: str = "img"
) -> tqdm:
    """A bar on a terminal, of the main process alone; silent elsewhere."""
    return tqdm(
        iterable,
        description,
        total,
        leave=False,
        unit=unit,
        dynamic_ncols=True,
        disable=not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0",
    )


def start(run: Run) -> None:
    """Write what this run is, draw one augmented batch, and print the table of what will happen."""
    config = run.config
    if not run.processes.is_main:
        return
    sweep(run.folder)
    if (run.folder / END_MARK).exists():  # a finished run that was given more epochs
        (run.folder / END_MARK).unlink()
        save_last(run)
    write_json(run.folder / "config.json", config.saved | {"versions": run_files.versions()})
    (run.folder / "samples").mkdir(exist_ok=True)
    keys = [(0, index) for index in spread(len(run.train_set), 2 * SHOWN)]
    images, masks = run.train_set.batch(keys)
    panel = visualize.augmented_panel(
        hwc(images), masks.numpy(), config.names, run.palette, config.ignore_index
    )
    write_image(run.folder / "samples" / "augmented.png", panel)
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
    options = [f"{name} {value}" for name, value in config.model_options.items()]
    loss = [f"{name} {value}" for name, value in config.loss_options.items()]
    height, width = config.image_size
    rows = {
        "data": f"{config.data_root}, {len(run.train_set)} pictures to train, {len(run.val_set)} to validate",
        "classes": f"{config.num_classes}: {', '.join(config.names)}",
        "picture": f"{height} x {width}, {config.resize}, {config.in_channels} channels",
        "model": f"{config.model} ({', '.join(options)})",
        "size": f"{parameters:.2f} M parameters, {multiply_adds(run) / 1e6:,.0f} M multiply-adds a picture",
        "loss": ", ".join([config.loss, *loss]),
        "optimizer": f"{config.optimizer}, learning rate {config.learning_rate:g}, batch {config.batch_size}",
        "schedule": f"{config.scheduler}, {config.epochs} epochs of {run.schedule.steps_per_epoch} steps, "
        f"{run.schedule.warmup_steps} steps to warm up",
        "device": f"{describe_device(run.device)}, {str(run.precision).removeprefix('torch.')}"
        + (f", {run.processes.world_size} processes" if run.processes.world_size > 1 else ""),
        "folder": str(run.folder),
    }
    print("\n".join(f"{name:<10} {text}" for name, text in rows.items()), flush=True)


def spread(total: int, count: int) -> list[int]:
    """At most `count` of `total` indices, evenly apart: neighbours are often frames of one video."""
    count = min(count, total)
    return [total * place // count for place in range(count)]


def multiply_adds(run: Run) -> float:
    """Multiply-adds of one picture's way through the network, counted without computing them."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        twin = build_model(*list(run.architecture.values())[:3], **run.architecture["options"]).eval()
        picture = torch.empty(1, run.config.in_channels, *run.config.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(picture)
    return counter.get_total_flops() / 2


def train(run: Run) -> None:
    """All epochs that are left, then the report."""
    config, progress = run.config, run.progress
    while not is_over(run):
        number = progress.epoch + 1
        print(f"Epoch {number}/{config.epochs}", flush=True)
        started = time.perf_counter()
        pictures = train_one_epoch(run)
        row = {
            "epoch": number,
            "steps": run.schedule.position,
            "learning_rate": run.schedule.rate(run.schedule.position - 1),
            **{f"train_{name}": value / len(run.train_set) for name, value in progress.sums.items()},
        }
        row["images_per_second"] = pictures / (time.perf_counter() - started)
        found = None
        if number % config.val_every == 0 or number == config.epochs:
            with run.clock.to("validation"):
                found = evaluate(run, averaged_weights(run))
            row |= score_columns(config.names, found.scores, found.loss)
        end_epoch(run, row, found)
        print_epoch(run, row, found)
    if progress.epoch < config.epochs:
        print(f"no better {config.monitor} for {progress.stalled} validations: stopped early")
    finish(run)


def is_over(run: Run) -> bool:
    """Whether all epochs are done, or the score has not risen for too long."""
    config, progress = run.config, run.progress
    stalled = bool(config.early_stop) and progress.stalled >= config.early_stop
    return stalled or progress.epoch >= config.epochs


def train_one_epoch(run: Run) -> int:
    """The steps of the present epoch that are left; each term's sum over pictures goes to `progress.sums`.

    Returns:
        How many pictures they had.

    Raises:
        Fail: a signal came (after saving), or the loss is not finite.
    """
    config, progress = run.config, run.progress
    epoch = progress.epoch
    order = (len(run.train_set), config.batch_size, config.seed, epoch)
    batches = epoch_batches(*order, run.processes.rank, run.processes.world_size)
    sizes = [len(batch) for batch in epoch_batches(*order)]  # over all processes
    sums = {name: torch.tensor(value, device=run.device) for name, value in progress.sums.items()}
    bad_step = torch.tensor(-1, device=run.device)  # the first whose loss is not finite
    shown_at = 0.0
    set_train_mode(run)
    loader = iter(run.loader.epoch(batches, epoch, progress.step))
    with progress_bar(total=len(run.train_set), description=f"Epoch {epoch + 1}") as bar:
        done = bar.n = bar.initial = sum(sizes[: progress.step])
        for step in range(progress.step, len(batches)):
            waiting = time.perf_counter()
            images, masks, _ = next(loader)
            run.clock.add("step" if is_busy(run.device) else "data", waiting)  # a busy GPU waits for nothing
            with run.clock.to("step"):
                terms = train_step(run, images, masks, epoch, step)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value * sizes[step]
                bad_step = torch.where((bad_step < 0) & ~torch.isfinite(terms["loss"]), step, bad_step)
                due = time.monotonic() - shown_at > 0.5 or step + 1 == len(batches)
                if due or run.device.type == "cpu":  # the only wait for the device
                    refuse_non_finite(run, int(bad_step), batches)
                if due:
                    loss = float(sums["loss"]) / sum(sizes[: step + 1])
                    bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                    shown_at = time.monotonic()
                    estimate_time(run, epoch_over=step + 1 == len(batches))
            bar.update(sizes[step])
            progress.step = step + 1
            minutes = (time.monotonic() - run.saved_at) / 60
            late = bool(config.save_every_minutes) and minutes > config.save_every_minutes
            signaled, late = distributed.largest([run.stop.number, late])
            if signaled or late:
                refuse_non_finite(run, int(bad_step), batches)
                progress.sums = over_processes(run, sums)
                save_last(run)
                leave_if_stopped(run, signaled)
    progress.sums = over_processes(run, sums)
    return sum(sizes) - done


def estimate_time(run: Run, epoch_over: bool) -> None:
    """Say once how long the run's steps will take: after ten of them, or 20 seconds, or an epoch."""
    steps, seconds = run.clock.since_first(run.schedule.position)
    enough = epoch_over or seconds > 20 or (steps >= 10 and seconds > 2)
    if run.clock.told or not steps or not enough:
        return
    run.clock.told = True
    all_steps = run.schedule.total_steps - run.schedule.position + steps
    tqdm.write(
        f"{'time':<10} about {format_time(seconds / steps * all_steps)} of steps for "
        f"{run.config.epochs - run.progress.epoch} epochs, by the pace of {steps} steps; "
        f"validation comes on top{run.clock.advice()}",
        file=sys.stdout,
    )


def over_processes(run: Run, sums: dict[str, Tensor]) -> dict[str, float]:
    """Sums of loss terms over all pictures, from those of the processes."""
    totals = torch.stack(list(sums.values())) / run.processes.world_size
    distributed.sum_over(totals)
    return dict(zip(sums, totals.tolist(), strict=True))


def train_step(run: Run, images: Tensor, masks: Tensor, epoch: int, step: int) -> dict[str, Tensor]:
    """One optimizer step over a batch, in `accumulate` parts; returns the loss and its terms, detached."""
    config = run.config
    torch.manual_seed(position_seed(config.seed, epoch, step, run.processes.rank))  # for dropout
    images = images.to(run.device, non_blocking=True)
    masks = masks.to(run.device, non_blocking=True)
    denominator = None
    if (
        config.accumulate * run.processes.world_size > 1
    ):  # that of the whole batch, so that parts add up to it
        denominator = run.loss_fn.denominator(masks)
        distributed.sum_over(denominator)
        denominator = denominator / run.processes.world_size  # gradients are averaged, not summed
    total: dict[str, Tensor] = {}
    parts = list(zip(images.chunk(config.accumulate), masks.chunk(config.accumulate), strict=True))
    for number, (part, part_masks) in enumerate(parts, start=1):
        inputs = normalize(part, run.mean, run.std, config.channels_last)
        with distributed.averaging(run.forward, number == len(parts)):
            with autocast(run.device, run.precision):
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


def position_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """A seed that depends on the place in the run alone."""
    digest = hashlib.blake2b(f"{seed} {epoch} {step} {rank}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def set_train_mode(run: Run) -> None:
    """Training mode, but for a frozen backbone, whose statistics stay as they are."""
    run.model.train()
    if run.config.freeze_backbone:
        run.model.backbone.eval()


def refuse_non_finite(run: Run, step: int, batches: list[list[int]]) -> None:
    """Stop the run where a loss was not finite; `last.pt` stays as it is.

    Raises:
        Fail: always, unless `step` is negative.
    """
    if step < 0:
        return
    files = ", ".join(str(run.train_set.pairs[index].image) for index in batches[step])
    rate = run.schedule.rate(run.progress.epoch * run.schedule.steps_per_epoch + step)
    raise Fail(
        f"the loss is not finite in epoch {run.progress.epoch + 1}, step {step + 1} (learning rate "
        f"{rate:.3g}, {run.precision}), pictures {files}. {what_now(run)}",
        1,
    )


def what_now(run: Run) -> str:
    """What is left, and what to try, where numbers ceased to be finite."""
    last = run.folder / "last.pt"
    kept = f"{last} is the last good state. " if last.exists() else ""
    return f"{kept}Try a lower learning_rate, clip_grad 1, more warmup_steps, or amp off"


def leave_if_stopped(run: Run, signaled: int) -> None:
    """End the process after the signal that all processes know of; the caller has saved.

    Raises:
        Fail: a signal came.
        SystemExit: it did, and another process says so.
    """
    if signaled:
        distributed.wait_for_all()
        if not run.processes.is_main:
            sys.exit(128 + signaled)
        raise Fail(f"stopped; go on with --resume {run.folder}", 128 + signaled)


def averaged_weights(run: Run) -> dict[str, Tensor]:
    """The weights that validate and predict: the moving average where there is one."""
    return run.ema.weights if run.ema else plain_weights(run.model)


@dataclass
class Evaluation:
    """What a pass over the validation pictures gave."""

    scores: Scores
    counts: Tensor  # confusion matrix
    loss: float  # mean of the pictures' losses
    picture_iou: list[float]  # mean IoU of each picture alone, in the data set's order
    rows: list[tuple]  # (image, truth, prediction, caption) of the pictures asked for


def evaluate(
    run: Run,
    weights: dict[str, Tensor],
    keep: Iterable[int] | None = None,
    only: Sequence[int] | None = None,
) -> Evaluation:
    """Score weights on the validation pictures, each once and at its own mask's size.

    Args:
        run: the run.
        weights: of the model.
        keep: indices of the pictures to hand back as rows for `visualize.sample_panels`; None for a few.
        only: indices of the pictures to score; None for all.
    """
    config, pictures = run.config, len(run.val_set)
    keep = spread(pictures, SHOWN) if keep is None else keep
    distributed.from_main(weights)
    own = ConfusionMatrix(config.num_classes, config.ignore_index, run.device)
    states = torch.zeros(pictures, len(own.state()), dtype=torch.int64, device=run.device)
    losses = torch.zeros(pictures, device=run.device)
    kept = {}
    for index, picture, truth, logits in validation_logits(run, weights, only or range(pictures)):
        ids = predicted_ids(logits)
        own.reset()
        own.update(ids, truth)
        states[index] = own.state()
        with torch.no_grad():
            losses[index] = run.loss_fn(logits, truth)
        if index in keep:
            kept[index] = (hwc(picture)[0], truth[0].cpu().numpy(), ids[0].cpu().numpy())
    distributed.sum_over(states, losses)
    kept = distributed.gathered(kept)
    picture_iou = []
    for state in states.cpu():
        own.load_state(state)
        picture_iou.append(own.scores().mean_iou)
    own.load_state(states.sum(0))
    names = [
        f"{pair.image.name}  mean IoU {format_score(iou)}"
        for pair, iou in zip(run.report.val, picture_iou, strict=True)
    ]
    rows = [(*kept[index], names[index]) for index in keep if index in kept]
    return Evaluation(own.scores(), own.counts.cpu(), float(losses.mean()), picture_iou, rows)


@torch.inference_mode()
def validation_logits(
    run: Run, weights: dict[str, Tensor], pictures: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield index, picture (1, C, H, W), truth (1, H, W) and logits (1, num_classes, H, W), in order."""
    network = Network(
        run.model,
        weights,
        mean=run.mean,
        std=run.std,
        device=run.device,
        precision=run.precision,
        channels_last=run.config.channels_last,
    )
    window = run.config.image_size if run.config.resize == "crop" else None
    rank, world_size = run.processes.rank, run.processes.world_size
    indices = [pictures[place] for place in evaluation_shard(len(pictures), rank, world_size)]
    longest = evaluation_shard(len(pictures), 0, world_size)  # all processes go round equally often
    with progress_bar(total=len(indices), description="validation") as bar:
        for first in range(0, len(longest), run.config.batch_size):
            batch = indices[first : first + run.config.batch_size]
            items = [run.val_set.evaluation_item(index) for index in batch]
            images, boxes = [image for image, _, _ in items], [box for _, box, _ in items]
            logits = picture_logits(network, images, boxes, window) if batch else ()
            for index, (image, box, truth), one in zip(batch, items, logits, strict=True):
                picture = restore(image[None].float(), box).round().to(torch.uint8)
                yield index, picture, truth[None].to(run.device), one
            (signaled,) = distributed.largest([run.stop.number])
            if signaled:  # validation is done again on resume
                save_last(run)
                leave_if_stopped(run, signaled)
            bar.update(len(batch))


def end_epoch(run: Run, row: dict[str, Any], found: Evaluation | None) -> None:
    """Move the schedule, the best score, the log, the curves and the checkpoints on by one epoch."""
    config, progress = run.config, run.progress
    score = None
    if found:
        score = {"iou": found.scores.mean_iou, "dice": found.scores.mean_dice}[config.monitor]
    run.schedule.epoch_end(score)
    better = score is not None and score > progress.best
    if better:
        progress.best, progress.best_epoch, progress.stalled = score, progress.epoch + 1, 0
    elif score is not None:
        progress.stalled += 1
    progress.rows.append(row)
    progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
    if better:
        save_best(run, row)
    save_last(run)
    if not run.processes.is_main:
        return
    with run.clock.to("saving"):
        run_files.write_log(run.folder / "log.csv", progress.rows)
        if run.clock.share("saving") < 0.1:  # not at every one of many short epochs; `finish` draws the last
            draw_curves(run)
        last = progress.epoch == config.epochs
        if found and (last or progress.epoch % max(1, config.epochs // 10) == 0):
            panel = visualize.sample_panels(found.rows, config.names, run.palette, config.ignore_index)
            write_image(run.folder / "samples" / f"epoch_{progress.epoch:03d}.png", panel)


def draw_curves(run: Run) -> None:
    """Write `curves.png`: the log so far, over the planned learning rate."""
    write_image(run.folder / "curves.png", visualize.draw_curves(run.progress.rows, planned_rates(run)))


def planned_rates(run: Run) -> list[tuple[float, float]]:
    """(epoch, learning rate) at up to 500 steps of the plan, to draw."""
    plan = run.schedule.plan()
    steps = range(0, len(plan), max(1, len(plan) // 500))
    return [(step / run.schedule.steps_per_epoch, plan[step]) for step in steps]


def save_last(run: Run) -> None:
    """Write `last.pt`, from which the run goes on as if nothing had been.

    Raises:
        Fail: the weights are not finite; the earlier file stays.
    """
    with run.clock.to("saving"):
        weights = finite_weights(run)
        checkpoint = {
            "format": FORMAT,
            "kind": "last",
            "model": weights,
            "ema": run.ema.weights if run.ema else None,
            "ema_steps": run.ema.steps if run.ema else 0,
            "architecture": run.architecture,
            "info": prediction_info(run),
            "config": run.config.saved,
            "progress": asdict(run.progress),
            "optimizer": run.optimizer.state_dict(),
            "schedule": run.schedule.state_dict(),
            "scaler": run.scaler.state_dict(),
            "fingerprint": run.report.fingerprint,
        }
        if run.processes.is_main:
            save_atomic(checkpoint, run.folder / "last.pt")
        run.saved_at = time.monotonic()


def save_best(run: Run, row: dict[str, Any]) -> None:
    """Write `best.pt`: the weights that validated best, and all that prediction needs to know.

    Raises:
        Fail: as `save_last`.
    """
    with run.clock.to("saving"):
        finite_weights(run)
        checkpoint = {
            "format": FORMAT,
            "kind": "best",
            "model": averaged_weights(run),
            "architecture": run.architecture,
            "info": prediction_info(run) | {"scores": row},
        }
        if run.processes.is_main:
            save_atomic(checkpoint, run.folder / "best.pt")


def finite_weights(run: Run) -> dict[str, Tensor]:
    """The model's weights.

    Raises:
        Fail: one is NaN or infinite, which the loss has not shown yet.
    """
    weights = plain_weights(run.model)
    name = first_non_finite(weights)
    if name:
        raise Fail(
            f"the weights of {name} are not finite after step {run.schedule.position}. {what_now(run)}", 1
        )
    return weights


def prediction_info(run: Run) -> dict[str, Any]:
    """What prediction asks of a checkpoint beside the weights, in plain values."""
    config = run.config
    return {
        "class_names": list(config.names),
        "palette": run.palette,
        "image_size": list(config.image_size),
        **config.pick("resize", "ignore_index", "mask_suffix", "amp"),
        "mean": run.mean,
        "std": run.std,
        "encoding": run.report.encoding.to_dict(),
        "epoch": run.progress.epoch,
        "versions": run_files.versions(),
    }


def restore_state(run: Run, saved: dict[str, Any]) -> None:
    """Put a run where its `last.pt` was written.

    Raises:
        ValueError: the data has changed, or the run is finished.
    """
    changed = [
        part for part, value in saved["fingerprint"].items() if run.report.fingerprint.get(part) != value
    ]
    if changed:
        raise ValueError(
            f"{run.config.data_root} has changed since {run.folder} was started: {', '.join(changed)}. "
            "Bring the old data back, or start a new run (from these weights: --init_from)"
        )
    run.progress = Progress(**saved["progress"])
    if is_over(run) and (run.folder / END_MARK).exists():
        raise ValueError(
            f"{run.folder} is finished after {run.progress.epoch} epochs. Start a new run by --init_from"
        )
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.schedule.load_state_dict(saved["schedule"])
    if saved["scaler"]:  # of a run that goes on at fp16; one at another precision has none
        run.scaler.load_state_dict(saved["scaler"])
    if run.ema:
        run.ema.load(saved["ema"], saved["ema_steps"])


def print_epoch(run: Run, row: dict[str, Any], found: Evaluation | None) -> None:
    """One line about the epoch, and the table of the classes where it validated."""
    terms = ", ".join(
        f"{name.removeprefix('train_')} {row[name]:.4f}" for name in row if name.startswith("train_")
    )
    line = f"  {terms}, learning rate {row['learning_rate']:.3g}, {row['images_per_second']:.0f} pictures/s"
    steps, seconds = run.clock.since_first(run.schedule.position)
    if steps and not is_over(run):
        ahead = (run.schedule.total_steps - run.schedule.position) * seconds / steps
        line += f", about {format_time(ahead)} left"
    if found:
        best = "  (best so far)" if run.progress.best_epoch == row["epoch"] else ""
        line += f"\n  validation loss {found.loss:.4f}, mean IoU {format_score(found.scores.mean_iou)}, "
        line += f"mean Dice {format_score(found.scores.mean_dice)}{best}"
        line += "\n" + class_table(run.config.names, found.scores)
    print(line, flush=True)


def finish(run: Run) -> None:
    """Score `best.pt` once more, draw the report, and say where everything lies."""
    config, progress = run.config, run.progress
    distributed.wait_for_all()  # for best.pt
    best = read_checkpoint(run.folder / "best.pt")["model"]
    with run.clock.to("validation"):
        found = evaluate(run, best, keep=())
        order = sorted(range(len(found.picture_iou)), key=lambda index: -found.picture_iou[index])
        chosen = order[:2] + order[2:][-2:]
        rows = evaluate(run, best, keep=chosen, only=chosen).rows
    if not run.processes.is_main:
        return
    with run.clock.to("saving"):
        run_files.write_log(run.folder / "log.csv", progress.rows)
        draw_curves(run)
        report = visualize.draw_report(
            progress.rows,
            config.names,
            run.palette,
            found.scores.iou,
            found.scores.dice,
            found.counts.numpy(),
            rows[:2],
            rows[2:],
            title=run.folder.name,
            subtitle=f"{config.model} on {config.data_root}, best of {len(progress.rows)} epochs",
            ignore_index=config.ignore_index,
            lr_plan=planned_rates(run),
        )
        write_image(run.folder / END_MARK, report)
    scores, most = found.scores, config.names[int(found.counts.sum(1).argmax())]
    print(
        f"best: epoch {progress.best_epoch}, mean IoU {format_score(scores.mean_iou)}, "
        f"mean Dice {format_score(scores.mean_dice)}, pixel accuracy {format_score(scores.pixel_accuracy)}; "
        f"{most} everywhere would have mean IoU {format_score(scores.baseline_iou)}"
    )
    print(class_table(config.names, scores))
    print(f"time: {run.clock.describe()}; peak memory {peak_memory(run.device) / 2**30:.1f} GiB")
    print(f"see {run.folder / END_MARK}; predict with: python predict.py --weights {run.folder / 'best.pt'}")


def hwc(images: Tensor) -> np.ndarray:
    """uint8 (N, C, H, W) tensors as (N, H, W, C) arrays, to draw."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


if __name__ == "__main__":
    assert PARSED is not None
    end_with(lambda: main(PARSED.settings, PARSED.given))
