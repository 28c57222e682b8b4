"""Train a segmentation network: edit config.py, then run `python train.py`. Every setting is also a flag."""

import signal
import sys

from config import Config
from utils.cli import Fail, Parsed, end_with, fixable, parse, quoted, resumed_settings


def read_flags() -> Parsed:
    """Return the settings; the folders and files that they name must exist."""
    parsed = parse(Config, sys.argv[1:], __doc__)
    with fixable():
        parsed.settings.refuse_missing()
    return parsed


if __name__ == "__main__":  # before torch is imported, so that --help and wrong settings are answered at once
    PARSED = end_with(read_flags)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import math
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from datasets import DataError, DataReport, check_data
from datasets.augment import Augmentation
from datasets.fitting import mean_std
from datasets.folder import SegmentationDataset
from datasets.sampling import Loader, epoch_batches, make_loader
from losses import AuxLoss, build_loss, median_frequency_weights
from metrics import Scores
from models import architecture, build_model, load_pretrained, read_checkpoint
from models.checkpoint import FORMAT
from utils import device as devices
from utils import distributed, run_folder, visualize
from utils.checkpoint import plain_weights, save_atomic, sweep, write_json
from utils.distributed import Processes
from utils.ema import Ema
from utils.errors import explain, non_finite_advice, refuse_non_finite
from utils.evaluation import Evaluation, Validator, best_and_worst
from utils.inference import normalize
from utils.monitor import Monitor, Progress, progress_bar
from utils.optim import Schedule, build_optimizer, depends_on_length
from utils.run_report import SHOWN, RunReport
from utils.sync_batchnorm import convert_sync_batchnorm
from utils.tables import score_columns
from utils.training_state import (
    check_training_state,
    load_initial_weights,
    refuse_changed_data,
    restore_training_state,
    training_state,
)

# Settings that may differ when a run is resumed: they do not change what is trained (a device may round
# differently).
CAN_CHANGE = ("num_workers", "device", "cache", "cache_dir", "save_every_minutes", "data_root")


class Result(NamedTuple):
    """The result of `main`; both fields are None after `check`."""

    folder: Path | None  # of the run
    scores: Scores | None  # of best.pt on the validation images


def main(config: Config, given: dict[str, Any] | None = None) -> Result:
    """Train as `config` says.

    Args:
        config: the settings.
        given: those that were flags on the command line; resuming refuses any that contradicts the run. None,
            as other programs call it: a resumed run takes over what may change and differs from the defaults.

    Raises:
        Fail: something that the user can fix, or the end of the work; with the message and the exit code.
    """
    devices.keep_freed_memory()
    processes = distributed.read_processes()
    devices.set_threads(processes)
    with fixable(), distributed.reported_once(processes):
        run_folder.try_output(Path(config.output_dir))
        config, folder, saved = resolve_resume(config, given)
        device = devices.pick_device(config.device, processes)
        precision = devices.pick_precision(config.amp, device)
        model = build_network(config, fresh=saved is None)
        report = check(config)
    print(report.describe(), flush=True)
    if config.check:
        return Result(None, None)
    try:
        distributed.join(processes, device)
        with fixable():
            if processes.is_main and folder is None:
                folder = run_folder.create_run(Path(config.output_dir), config.run_name, config.model)
            folder = distributed.value_of_main(folder)
            lock = run_folder.lock(folder) if processes.is_main else nullcontext()
        with lock:
            with fixable():
                run = build_run(config, report, device, precision, model, processes, folder, saved)
            with run.monitor.stop, closing(run.data.loader):
                start(run)
                scores = train(run).scores
        if processes.world_size > 1:
            run.forward = run.parallel = run.model  # the wrapper must go before the process group
        distributed.leave()
    except (DataError, OSError, RuntimeError, MemoryError) as error:
        message = explain(error, device, folder, config.memory_savers)
        if message is None:
            raise
        raise Fail(message, 1) from error
    finally:
        if processes.is_main:
            run_folder.remove_unused(folder)
    return Result(folder, scores)


def resolve_resume(config: Config, given: dict[str, Any] | None) -> tuple[Config, Path | None, dict | None]:
    """Return the settings, and for a run that is resumed its folder and the content of its last.pt."""
    output_dir = Path(config.output_dir)
    if config.resume:
        folder = run_folder.find_run(config.resume, output_dir)
        saved = read_checkpoint(folder / "last.pt")
        print(f"resuming {folder}")
        check_training_state(saved, folder / "last.pt")
        own = saved["config"] | {"run_name": folder.name}
        free = CAN_CHANGE + (() if depends_on_length(own["scheduler"]) else ("epochs",))
        if (
            given is None
        ):  # called by a program, which can only say by other values than the defaults what it wants
            given = {n: v for n, v in config.pick(*free).items() if v != getattr(type(config), n)}
            if given.get("epochs", own["epochs"]) <= own["epochs"]:
                given.pop("epochs", None)
        return resumed_settings(config, own, given, free), folder, saved
    named = output_dir / config.run_name if config.run_name and not config.check else None
    if named and named.exists() and not run_folder.is_abandoned(named):
        raise run_folder.folder_exists(named)  # before the data is checked
    return config, None, None


def check(config: Config) -> DataReport:
    """Open and count every image and mask once; refuse data that cannot be trained on."""
    options = config.pick("num_classes", "ignore_index", "class_colors", "in_channels", "labels")
    options |= config.pick("mask_suffix", "val_share", "seed")
    options |= {"class_names": config.names, "cache_dir": config.cache_folder}
    return check_data(config.data_root, **options, progress=progress_bar)


@dataclass(frozen=True)
class Data:
    """The data sets of a run, and how their images and classes are presented."""

    report: DataReport
    train: SegmentationDataset
    val: SegmentationDataset
    loader: Loader  # of training batches
    mean: list[float]  # of each channel, in 0..1
    std: list[float]
    classes: visualize.Classes


@dataclass
class Run:
    """The objects of a run, passed to the functions below."""

    config: Config
    device: torch.device
    precision: torch.dtype  # that convolutions compute in
    processes: Processes
    folder: Path
    data: Data
    model: nn.Module
    parallel: nn.Module  # the model, wrapped by DistributedDataParallel if there are several processes
    forward: nn.Module  # `parallel`, compiled if `compile` is set
    ema: Ema | None
    loss_fn: AuxLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    progress: Progress
    monitor: Monitor
    validator: Validator
    report: RunReport
    architecture: dict[str, Any]  # of the model, for checkpoints
    best: Evaluation | None = None  # of best.pt, if this process evaluated it


def build_run(
    config: Config,
    report: DataReport,
    device: torch.device,
    precision: torch.dtype,
    model: nn.Module,
    processes: Processes = Processes(),  # noqa: B008  (immutable)
    folder: Path = Path(),  # noqa: B008
    saved: dict[str, Any] | None = None,
) -> Run:
    """Build everything that training needs, and restore the state of a run that is resumed."""
    devices.set_backends(config.deterministic, config.amp, device)
    data = build_data(config, report, device, processes)
    model = place_model(model, config, device, processes)
    parallel = distributed.wrap(model, processes, device)
    optimizer = build_optimizer(model, config.optimizer, config.learning_rate, **config.optimizer_options)
    steps = len(epoch_batches(len(data.train), config.batch_size, config.seed, 0, processes.world_size))
    length = {"steps_per_epoch": steps} | config.pick("epochs", "warmup_steps")
    schedule = Schedule(optimizer, config.scheduler, **length, **config.schedule_options)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    ema = Ema(model, config.ema_decay) if config.ema_decay else None
    progress = Progress()
    if saved:
        refuse_changed_data(report.fingerprint, saved["fingerprint"], config.data_root, folder)
        progress = resumed_progress(config, folder, saved, steps)
        restore_training_state(saved, model, optimizer, schedule, scaler, ema)
    loss_fn = build_criterion(config, report).to(device)
    validator = Validator(
        data.val,
        loss_fn,
        **config.pick("num_classes", "ignore_index", "channels_last"),
        batch_size=max(1, config.batch_size // (config.accumulate * processes.world_size)),
        mean=data.mean,
        std=data.std,
        window=config.image_size if config.resize == "crop" else None,
        device=device,
        precision=precision,
        processes=processes,
    )
    return Run(
        config,
        device,
        precision,
        processes,
        folder,
        data,
        model,
        parallel,
        forward=torch.compile(parallel) if config.compile else parallel,
        ema=ema,
        loss_fn=loss_fn,
        optimizer=optimizer,
        scaler=scaler,
        schedule=schedule,
        progress=progress,
        monitor=Monitor(progress, schedule, device, processes, config.save_every_minutes),
        validator=validator,
        report=RunReport(folder, data.classes, schedule.curve()),
        architecture=architecture(
            config.model, config.num_classes, config.in_channels, **config.model_options
        ),
    )


def resumed_progress(config: Config, folder: Path, saved: dict[str, Any], steps_per_epoch: int) -> Progress:
    """Return how far the run in `folder` has come; refuse one that is finished."""
    progress = Progress(**saved["progress"])
    if is_over(config, progress):
        can_grow = progress.epoch == config.epochs and not depends_on_length(config.scheduler)
        run_folder.refuse_finished(folder, progress.epoch, can_grow)
    if progress.step > steps_per_epoch:
        raise ValueError(f"{folder / 'last.pt'} is damaged: step {progress.step} of {steps_per_epoch}")
    if progress.best_epoch and not (folder / "best.pt").exists():
        print("best.pt is missing: the best epoch is searched for again")
        progress.best, progress.best_epoch = -1.0, 0
    return progress


def build_data(config: Config, report: DataReport, device: torch.device, processes: Processes) -> Data:
    """Build the data sets with their caches filled, and the loader of training batches."""
    options = config.pick("image_size", "resize", "in_channels", "ignore_index", "seed")
    options |= {"encoding": report.encoding, "max_value": report.max_value}
    augmentation = Augmentation(**config.augmentation_options)
    train_set = SegmentationDataset(report.train, augmentation=augmentation, **options)
    val_set = SegmentationDataset(report.val, evaluation=True, **options)
    for split, dataset in (("training", train_set), ("validation", val_set)):
        print(f"{split} {dataset.use_cache(config.cache, config.cache_folder)}")
        dataset.fill_cache(progress_bar, processes.rank, processes.world_size)
    batch_size = -(-config.batch_size // processes.world_size)
    cores = devices.available_cores() // processes.local_world_size
    loader = make_loader(train_set, config.num_workers, batch_size, device.type, cores)
    mean, std = mean_std(config.in_channels)
    colors = config.class_colors or visualize.default_palette(config.num_classes)
    classes = visualize.Classes(config.names, [list(color) for color in colors], config.ignore_index)
    return Data(report, train_set, val_set, loader, mean, std, classes)


def build_network(config: Config, fresh: bool) -> nn.Module:
    """Build the network on the CPU; a fresh one with the initial weights that the settings ask for."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, config.num_classes, config.in_channels, **config.model_options)
    if fresh and config.pretrained != "none":
        print(load_pretrained(model, config.pretrained))
    if fresh and config.init_from:
        path = Path(config.init_from)
        checkpoint = read_checkpoint(path / "best.pt" if path.is_dir() else path)
        weights = checkpoint.get("ema") or checkpoint["model"]
        needs_backbone = config.freeze_backbone and config.pretrained == "none"
        print(load_initial_weights(model, weights, config.init_from, config.model, needs_backbone))
    return model


def place_model(model: nn.Module, config: Config, device: torch.device, processes: Processes) -> nn.Module:
    """Move the model to the device, and freeze or synchronize its parts as the settings say."""
    batch = config.batch_size // (config.accumulate * processes.world_size)
    largest = max(parameter.nbytes for parameter in model.parameters())
    devices.keep_freed_memory(largest, batch * math.prod(config.image_size))
    model.to(device, memory_format=devices.memory_format(config.channels_last, device))
    if config.freeze_backbone:
        model.backbone.requires_grad_(False)
    return convert_sync_batchnorm(model) if config.sync_batchnorm and processes.world_size > 1 else model


def build_criterion(config: Config, report: DataReport) -> AuxLoss:
    """Build the loss; class weights `auto` are counted in the training masks."""
    weights = config.weighting
    if weights == "auto":
        weights = median_frequency_weights(report.class_pixels["train"], report.class_image_pixels)
        print("class weights (median frequency): " + ", ".join(f"{w:.4g}" for w in weights))
    loss_fn = build_loss(config.loss, config.ignore_index, weights, **config.loss_options)
    return AuxLoss(loss_fn, config.aux_weight)


def start(run: Run) -> None:
    """Write the settings, draw some augmented training images, and print a summary of the run."""
    config, train_set = run.config, run.data.train
    if not run.processes.is_main:
        return
    sweep(run.folder)
    if run_folder.reopen(run.folder):  # it was finished, and was given more epochs
        save_last(run)
    settings = config.saved | {"versions": run_folder.versions()}
    write_json(run.folder / "config.json", settings)
    shown = visualize.spread(len(train_set), 2 * SHOWN)
    images, masks = train_set.batch([(0, index) for index in shown])
    run.report.draw_augmented(images.permute(0, 2, 3, 1).numpy(), masks.numpy())
    print("\n".join(f"{name:<10} {text}" for name, text in summary(run).items()), flush=True)


def summary(run: Run) -> dict[str, Any]:
    """Return what will happen, as text by subject."""
    config, schedule, processes = run.config, run.schedule, run.processes.world_size
    with torch.device("meta"):  # which computes nothing
        meta_model = build_network(config, fresh=False).eval()
        operations = devices.multiply_adds(meta_model, torch.empty(1, config.in_channels, *config.image_size))
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    model, loss = (
        ", ".join(f"{name} {value}" for name, value in options.items())
        for options in (run.architecture["options"], config.loss_options)
    )
    steps = f"{config.epochs} epochs of {schedule.steps_per_epoch} steps, {schedule.warmup_steps} of warm-up"
    device = f"{devices.describe_device(run.device)}, {str(run.precision).removeprefix('torch.')}"
    size = " x ".join(map(str, config.image_size))
    return {
        "data": f"{config.data_root}, {len(run.data.train)} training, {len(run.data.val)} validation images",
        "classes": f"{config.num_classes}: {', '.join(config.names)}",
        "image": f"{size}, {config.resize}, {config.in_channels} channels",
        "model": f"{config.model} ({model})",
        "size": f"{parameters / 1e6:.2f} M parameters, {operations / 1e6:,.0f} M multiply-adds per image",
        "loss": config.loss + f", {loss}" * bool(loss),
        "optimizer": f"{config.optimizer}, learning rate {config.learning_rate:g}, batch {config.batch_size}",
        "schedule": f"{config.scheduler}, {steps}",
        "device": device + f", {processes} processes" * (processes > 1),
        "folder": run.folder,
    }


def train(run: Run) -> Evaluation:
    """Train for the remaining epochs, then draw the report; return the evaluation of best.pt."""
    config, progress = run.config, run.progress
    while not is_over(config, progress):
        number, evaluation = progress.epoch + 1, None
        print(f"Epoch {number}/{config.epochs}", flush=True)
        train_one_epoch(run)
        if number % config.val_every == 0 or number == config.epochs:
            evaluation = evaluate(run, averaged_weights(run))
        end_epoch(run, evaluation)
    if progress.epoch < config.epochs:
        print(f"stopped early: no better {config.monitor} for {progress.stalled} validations")
    return finish(run)


def is_over(config: Config, progress: Progress) -> bool:
    """Return whether all epochs are done, or the score has not improved for too long."""
    stalled = 0 < config.early_stop <= progress.stalled
    return stalled or progress.epoch >= config.epochs


def train_one_epoch(run: Run) -> None:
    """Take the remaining steps of the current epoch; sum their loss terms in `run.progress.sums`."""
    config, progress, monitor, epoch = run.config, run.progress, run.monitor, run.progress.epoch
    rank, world_size = run.processes.rank, run.processes.world_size
    batches = epoch_batches(len(run.data.train), config.batch_size, config.seed, epoch, world_size)
    loader = run.data.loader.epoch([batch[rank::world_size] for batch in batches], epoch, progress.step)
    set_train_mode(run)
    with monitor.epoch([len(batch) for batch in batches]):
        for images, masks in monitor.load(loader):
            terms = train_step(run, images, masks, epoch, progress.step)
            event = monitor.after_step(terms)
            if event.non_finite_step >= 0:
                refuse_non_finite_loss(run, event.non_finite_step, batches)
            if event.save:
                progress.sums = monitor.totals()
                save_last(run)
            if event.signal:
                stop(run, event.signal)
    progress.sums = monitor.totals()


def train_step(run: Run, images: Tensor, masks: Tensor, epoch: int, step: int) -> dict[str, Tensor]:
    """Take one optimizer step over a batch, in `accumulate` parts; return the loss and its terms, detached.

    Args:
        run: its model, optimizer, schedule and average are updated.
        images: uint8 (N, C, H, W), of this process.
        masks: class ids (N, H, W), uint8 or int64.
        epoch: from 0.
        step: of the epoch, from 0; with `epoch` and the seed it determines dropout.
    """
    config, processes = run.config, run.processes
    seeds = np.random.SeedSequence([config.seed, epoch, step, processes.rank])
    torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
    images, masks = devices.to_device(images, run.device), devices.to_device(masks, run.device)
    denominator = None
    if config.accumulate * processes.world_size > 1:  # of the whole batch, so that the parts add up to it
        denominator = run.loss_fn.denominator(masks)
        distributed.sum_over(denominator)
        denominator = denominator / processes.world_size  # gradients are averaged, not summed
    total: dict[str, Tensor] = {}
    count = 1
    if config.accumulate > 1:  # the same in all processes, of which some may have one image less
        count = min(config.accumulate, -distributed.largest([-len(images)])[0])
    parts = list(zip(images.tensor_split(count), masks.tensor_split(count), strict=True))
    for number, (part, part_masks) in enumerate(parts, start=1):
        inputs = normalize(part, run.data.mean, run.data.std, memory_format(run))
        if config.compile:
            torch._dynamo.maybe_mark_dynamic(inputs, 0)  # a last, smaller batch needs no new compilation
        with distributed.averaging(run.parallel, enabled=number == len(parts)):
            with devices.autocast(run.device, run.precision):
                logits = run.forward(inputs)
            loss, terms = run.loss_fn.with_terms(logits, part_masks, denominator)
            run.scaler.scale(loss).backward()
        for name, value in {"loss": loss.detach(), **terms}.items():
            total[name] = total[name] + value if name in total else value
    if config.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.schedule.step()
    if run.ema:
        run.ema.update()
    return total


def set_train_mode(run: Run) -> None:
    """Set training mode, except for a frozen backbone, whose statistics stay as they are."""
    torch.backends.cudnn.benchmark = not run.config.deterministic  # nearly all batches have one size
    run.model.train()
    if run.config.freeze_backbone:
        run.model.backbone.eval()


def memory_format(run: Run) -> torch.memory_format:
    """Return the memory format of weights and feature maps."""
    return devices.memory_format(run.config.channels_last, run.device)


def averaged_weights(run: Run) -> dict[str, Tensor]:
    """Return the weights that validate and predict: the moving average where there is one."""
    return run.ema.weights if run.ema else plain_weights(run.model)


def refuse_non_finite_loss(run: Run, step: int, batches: Sequence[Sequence[int]]) -> None:
    """Raise Fail for a step of this epoch whose loss is not finite; `last.pt` stays as it is."""
    images = [str(run.data.train.pairs[index].image) for index in batches[step]]
    lr = run.schedule.lr_at(run.progress.epoch * run.schedule.steps_per_epoch + step)
    where = f"in epoch {run.progress.epoch + 1}, step {step + 1}"
    conditions = f"(learning rate {lr:.3g}, {run.precision}), images {', '.join(images)}"
    raise Fail(f"the loss is not finite {where} {conditions}. {non_finite_advice(run.folder)}", 1)


def stop(run: Run, number: int) -> None:
    """End the process after a signal that all processes have agreed on; the caller has saved."""
    distributed.wait_for_all()
    if not run.processes.is_main:
        sys.exit(128 + number)
    raise Fail(f"stopped; continue with --resume {quoted(run.folder)}", 128 + number)


def evaluate(run: Run, weights: dict[str, Tensor]) -> Evaluation:
    """Score weights of the model on the validation images, each once and at its own mask's size."""

    def stop_on_signal() -> None:
        (number,) = distributed.largest([run.monitor.stop.number])
        if number:  # the validation is repeated on resume
            save_last(run)
            stop(run, number)

    clock, total = run.monitor.clock, len(run.data.val)
    with clock.measure("validation"), progress_bar(total=total, description="validation") as bar:
        return run.validator.evaluate(run.model, weights, bar, stop_on_signal)


def end_epoch(run: Run, evaluation: Evaluation | None) -> None:
    """Advance schedule, best score, checkpoints, log and drawings by one epoch."""
    config, progress, schedule, monitor = run.config, run.progress, run.schedule, run.monitor
    row = {
        "epoch": progress.epoch + 1,
        "steps": schedule.position,
        "learning_rate": schedule.lr_at(schedule.position - 1),
        **{f"train_{name}": value / len(run.data.train) for name, value in progress.sums.items()},
        "images_per_second": monitor.images_per_second,
    }
    if evaluation:
        row |= score_columns(config.names, evaluation.scores, evaluation.loss)
    score = getattr(evaluation.scores, f"mean_{config.monitor}") if evaluation else None
    schedule.epoch_end(score)
    is_best = progress.end_epoch(row, score)
    over = is_over(config, progress)
    if is_best:
        run.best = evaluation
        save(run, "best", {"model": averaged_weights(run)})
    if over or monitor.save_due():
        save_last(run)
    if run.processes.is_main:
        with monitor.clock.measure("saving"):
            often = monitor.clock.share("saving") < 0.1  # otherwise epochs are short: draw at the end
            run.report.write_log(progress.rows, draw=often)
            if evaluation and (over or progress.epoch % max(1, config.epochs // 10) == 0):
                shown = visualize.spread(len(run.data.val), SHOWN)
                weights = averaged_weights(run)
                samples = run.validator.samples(run.model, weights, evaluation.image_iou, shown)
                run.report.draw_samples(progress.epoch, samples)
        eta = "" if over else monitor.clock.eta(schedule.position, schedule.total_steps)
        print(run.report.describe_epoch(row, eta, evaluation, is_best), flush=True)


def finish(run: Run) -> Evaluation:
    """Draw the report of `best.pt`, print where everything is, and return the evaluation."""
    progress, monitor = run.progress, run.monitor
    if not progress.best_epoch:  # best.pt was lost, and no validation has come after that
        save(run, "best", {"model": averaged_weights(run)})
    distributed.wait_for_all()  # for best.pt
    best = read_checkpoint(run.folder / "best.pt")["model"]
    evaluation = run.best or evaluate(run, best)  # best.pt may have been written before a resume
    if run.processes.is_main:
        with monitor.clock.measure("saving"):
            run.report.write_log(progress.rows, draw=True)
            shown = best_and_worst(evaluation.image_iou)
            samples = run.validator.samples(run.model, best, evaluation.image_iou, shown)
            subtitle = f"{run.config.model} on {run.config.data_root}, best of {len(progress.rows)} epochs"
            run.report.draw_final(progress.rows, evaluation, samples, subtitle)
        memory = f"peak memory {devices.peak_memory(run.device) / 2**30:.1f} GiB"
        resources = f"time: {monitor.clock.describe()}; {memory}"
        print(run.report.describe_best(progress.best_epoch, evaluation, resources))
    return evaluation


def save_last(run: Run) -> None:
    """Save everything that an exact resume needs to `last.pt`."""
    parts = (run.model, run.optimizer, run.schedule, run.scaler, run.ema, run.progress)
    extra = {"config": run.config.saved, "fingerprint": run.data.report.fingerprint}
    with run.monitor.saving():
        save(run, "last", training_state(*parts) | extra)


def save(run: Run, kind: str, state: dict[str, Any]) -> None:
    """Write `last.pt` or `best.pt`: `state`, and what prediction needs from a checkpoint, in plain values."""
    config, data = run.config, run.data
    refuse_non_finite(run.model, run.schedule.position, run.folder)
    info = {
        **config.pick("resize", "ignore_index", "mask_suffix", "amp"),
        "image_size": list(config.image_size),
        "class_names": list(config.names),
        "palette": data.classes.palette,
        "mean": data.mean,
        "std": data.std,
        "encoding": data.report.encoding.to_dict(),
        "max_value": data.report.max_value,
        "pairing": data.report.pairing,
        "epoch": run.progress.epoch,
        "versions": run_folder.versions(),
    }
    content = {"format": FORMAT, "kind": kind, "architecture": run.architecture, "info": info, **state}
    if run.processes.is_main:
        with run.monitor.clock.measure("saving"):
            save_atomic(content, run.folder / f"{kind}.pt")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with(lambda: main(PARSED.settings, PARSED.given))
