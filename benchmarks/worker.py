"""One training step, ours or a peer's, in a process of its own that is told through a pipe how many to do.

How memory is allocated is a matter of a whole process, and so are page faults, kernel time and peak memory:
every case has its own, started before the rounds, and only one computes at a time.
"""

from __future__ import annotations

import io
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timing import resident
from torch import Tensor, nn

from config import Config
from losses import build_loss
from models import build_model, deeplabv3plus, layers, ops, pspnet
from models.layers import ConcatConvBNReLU
from utils.device import keep_freed_memory, multiply_adds

IGNORED = 255
PEERS = ("segmentation_models_pytorch", "torchvision")  # without one, what needs it says so
NETWORKS: dict[str, dict[str, Any]] = {  # settings of Config
    "unet": dict(model="unet", base_channels=64),
    "segnet": dict(model="segnet", base_channels=64),
    "fcn": dict(model="fcn", backbone="vgg16_bn"),
    "fcn_vgg16": dict(model="fcn", backbone="vgg16"),
    "pspnet_resnet18": dict(model="pspnet", backbone="resnet18"),
    "pspnet_resnet50": dict(model="pspnet", backbone="resnet50"),
    "deeplabv3plus_resnet18": dict(model="deeplabv3plus", backbone="resnet18"),
    "deeplabv3plus_resnet50": dict(model="deeplabv3plus", backbone="resnet50"),
    "separable_resnet18": dict(model="deeplabv3plus", backbone="resnet18", separable=True),
    "separable_resnet50": dict(model="deeplabv3plus", backbone="resnet50", separable=True),
}

WAYS: dict[str, dict[str, Any]] = {  # of a training step; steps.py says what each is
    "ours": dict(),
    "off": dict(settings={"amp": "off"}),
    "plain": dict(maker="plain", trainer=torch.float32),
    "bf16": dict(maker="plain", trainer=torch.bfloat16, channels_last=True),
    "smp": dict(maker="smp", trainer=torch.float32),
    "smp_bf16": dict(maker="smp", trainer=torch.bfloat16, channels_last=True),
    "eager": dict(trainer=torch.float32, channels_last=True, bare=True),
    "eager_smp": dict(maker="smp", trainer=torch.float32, channels_last=True, bare=True),
    "eager_torchvision": dict(maker="torchvision", trainer=torch.float32, channels_last=True, bare=True),
}


@dataclass(frozen=True)
class Case:
    """What one process trains, and how.

    Attributes:
        network: a key of `NETWORKS`.
        maker: who wrote the network: ours; plain (ours, each convolution computed whole); smp or torchvision.
        trainer: None for train.py's own step; else a plain loop in that dtype.
        channels_last: of the plain loop.
        bare: cross entropy alone, fused SGD and freed memory kept in the plain loop, so that little but the
            network is measured.
        settings: of Config, for train.py's step.
        compile_mode: of torch.compile, for train.py's step; None for what the settings say.
        data: folder of pictures; None for a few of noise.
        fused_adam: in the plain loop, train.py's own fused Adam and cuDNN's search for the fastest kernels.
    """

    network: str
    maker: str = "ours"
    trainer: torch.dtype | None = None
    channels_last: bool = False
    bare: bool = False
    size: int = 256
    batch: int = 4
    classes: int = 12
    device: str = "cpu"
    settings: dict[str, Any] = field(default_factory=dict)
    compile_mode: str | None = None
    data: str | None = None
    fused_adam: bool = False

    @property
    def config(self) -> Config:
        """The settings of train.py, defaults but for what makes the case."""
        return Config(
            num_classes=self.classes,
            ignore_index=IGNORED,
            image_size=self.size,
            batch_size=self.batch,
            epochs=1000,
            device=self.device,
            **NETWORKS[self.network],
            **self.settings,
        )

    def build(self) -> nn.Module:
        """The network, with random weights."""
        config = self.config
        if self.maker == "smp":
            import segmentation_models_pytorch as smp

            return smp.DeepLabV3Plus(config.backbone, encoder_weights=None, classes=self.classes)
        if self.maker == "torchvision":
            from torchvision.models.segmentation import deeplabv3_resnet50

            return deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=self.classes)
        return build_model(config.model, self.classes, **config.model_options)


PLAIN = dict.fromkeys(("upsample_concat_conv", "depthwise", "inner_conv", "resize_backward"), False)


def compute_whole() -> None:
    """Have this process compute the networks as torch does.

    The bias of FCN's score stays outside of its convolution: inside, oneDNN would end the process.
    """
    ops.override(**PLAIN).__enter__()


def floating_point_work(case: Case) -> int:
    """Floating-point operations of a training step: three times those of the forward pass.

    Kernel positions that see only padding count, resized channels are counted as they are computed. Torch's
    own count of the backward pass is several times too high for grouped convolutions.
    """
    forms = ops.override(inner_conv=False, upsample_concat_conv=True)
    with forms, torch.device("meta"):
        forward = multiply_adds(case.build(), torch.empty(case.batch, 3, case.size, case.size))
    return round(3 * 2 * forward)


def inner_multiply_adds(case: Case) -> float:
    """Multiply-adds of the convolutions in a forward pass, without kernel positions that see only padding.

    Dilated convolutions of small maps see little else, and oneDNN skips it: a network with many of them
    would seem fast by the work it does not do.
    """
    found = []

    def inside(conv: nn.Module, image: Tensor, output: Tensor) -> int:
        """Pairs of an output position and a kernel position that falls on the map, for one image."""
        pairs = [0, 0]  # down, across
        for axis, (side, out) in enumerate(zip(image.shape[2:], output.shape[2:], strict=True)):
            for at in range(out):
                first = at * conv.stride[axis] - conv.padding[axis]
                positions = (first + step * conv.dilation[axis] for step in range(conv.kernel_size[axis]))
                pairs[axis] += sum(0 <= position < side for position in positions)
        return pairs[0] * pairs[1]

    def count(conv: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        (images,), weights = inputs, conv.weight.shape[:2].numel()  # of one kernel position
        if isinstance(conv, nn.ConvTranspose2d):
            found.append(images.shape[0] * images.shape[2:].numel() * conv.weight.numel())
        else:
            found.append(len(output) * inside(conv, images, output) * weights)

    def fewer(conv: nn.Module, maps: list[Tensor], like: Tensor) -> None:
        """Of a map that is resized, all kernel positions are computed at each of its own positions."""
        for x in maps:
            if x is not like:
                weights = x.shape[1] * conv.out_channels
                found.append(x.numel() * conv.out_channels * conv.weight.shape[2:].numel())
                found.append(-len(x) * inside(conv, like, like) * weights)

    def watched(maps: list[Tensor], block: nn.Module, *, like: Tensor) -> Tensor:
        if isinstance(block, ConcatConvBNReLU):
            fewer(block[0], maps, like)
        return fuse(maps, block, like=like)

    fuse = layers.upsample_concat_conv
    with torch.device("meta"), ExitStack() as stack:
        for module in (deeplabv3plus, pspnet):
            stack.enter_context(mock.patch.object(module, "upsample_concat_conv", watched))
        model = case.build()
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.register_forward_hook(count)
        model(torch.empty(case.batch, 3, case.size, case.size))
    return sum(found)


def write_pictures(root: Path, train: int, val: int, size: tuple[int, int], classes: int, kind: str) -> None:
    """Pictures of smooth noise, masks of blocks, `size` (height, width); `kind` is the pictures' suffix."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for number in range(count):
            picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            mask = Image.fromarray(rng.integers(0, classes, (8, 8), dtype=np.uint8))
            picture.resize(size[::-1], Image.Resampling.BICUBIC).save(
                root / split / f"images/{number}.{kind}"
            )
            mask.resize(size[::-1], Image.Resampling.NEAREST).save(root / split / f"masks/{number}.png")


def our_run(case: Case, folder: Path) -> Any:
    """Everything that train.py has when its first step begins."""
    import train
    from datasets import check_data
    from utils.device import pick_device, pick_precision

    keep_freed_memory()
    config = case.config
    data = Path(case.data or folder / "data")
    if case.data is None:
        write_pictures(data, case.batch, 1, config.image_size, case.classes, "png")
    about = dict(num_classes=case.classes, ignore_index=IGNORED, cache_dir=config.cache_dir)
    report = check_data(data, **about)
    device = pick_device(config.device)
    model = train.build_network(config, fresh=True)
    with redirect_stdout(io.StringIO()):
        precision = pick_precision(config.amp, device)
        run = train.build_run(config, report, device, precision, model, folder=folder)
    if case.compile_mode:
        run.forward = torch.compile(run.model, mode=case.compile_mode)
    train.set_train_mode(run)
    return run


def our_step(run: Any, count: int | None = None) -> Callable[[], object]:
    """A step of train.py on a batch, or on its first `count` images."""
    import train

    images, masks = run.data.train.batch([(0, index) for index in range(count or run.config.batch_size)])
    if run.device.type == "cuda":  # as the loader does
        images, masks = images.pin_memory(), masks.pin_memory()
    return lambda: train.train_step(run, images, masks, epoch=0, step=0)


def our_epoch(run: Any) -> dict[str, float]:
    """An epoch of train.py's loop over the data: images per second and the share of waiting for them."""
    import train

    clock = run.monitor.clock
    clock.seconds = dict.fromkeys(clock.seconds, 0.0)
    run.progress.step, run.progress.sums = 0, {}
    start = time.perf_counter()
    train.train_one_epoch(run)
    seconds = time.perf_counter() - start  # the loss was read, so that all is done
    run.progress.epoch += 1
    return {"rate": len(run.data.train) / seconds, "waiting": clock.share("data")}


def our_loader(run: Any, epoch: int) -> int:
    """Go through an epoch of train.py's loader, and compute nothing; returns the number of images."""
    from datasets.sampling import epoch_batches

    batches = epoch_batches(len(run.data.train), run.config.batch_size, run.config.seed, epoch)
    return sum(len(images) for images, *_ in run.data.loader.epoch(batches, epoch))


def our_validation(run: Any) -> tuple[int, Any]:
    """A validation by train.py; returns the number of images, and `counts`, `scores` and `loss`."""
    import train

    return len(run.data.val), train.evaluate(run, train.averaged_weights(run))


def our_checkpoint(run: Any) -> Path:
    """The run's weights as best.pt, in its folder."""
    import train

    train.save(run, "best", {"model": train.averaged_weights(run)})
    return run.folder / "best.pt"


def our_ema(run: Any) -> Callable[[], object]:
    """An update of the moving average of a run with `ema_decay`."""
    return run.ema.update


def end_run(run: Any) -> None:
    """End the loader's processes."""
    run.data.loader.close()


def op_form(name: str, fast: bool) -> AbstractContextManager:
    """Within the block, the fast or the plain form of an operator; see `models.ops.override`."""
    return ops.override(**{name: fast})


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The networks' own bilinear resizing."""
    return ops.resize(x, size)


def our_loss(fused: bool) -> nn.Module:
    """The joint loss, as training uses it or as the plain formula."""
    return build_loss("joint", IGNORED, fused=fused)


def wait_inside(step: Callable[[], object]) -> str:
    """Where a step makes the host wait for the GPU; empty where nowhere."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def plain_step(case: Case) -> tuple[Callable[[], object], str]:
    """A step as most scripts have it, on a float batch that is normalised already; and the loss's name."""
    if case.maker == "plain":
        compute_whole()
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    model = case.build().to(case.device, memory_format=layout).train()
    if case.bare:
        keep_freed_memory()
    if case.fused_adam:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
    elif case.bare:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    else:
        optimizer = torch.optim.Adam(model.parameters())
    images = torch.randn(case.batch, 3, case.size, case.size, device=case.device).to(memory_format=layout)
    masks = torch.randint(0, case.classes, (case.batch, case.size, case.size), device=case.device)
    dice, name = None, "cross entropy"
    if not case.bare:
        try:
            from segmentation_models_pytorch.losses import DiceLoss

            dice, name = DiceLoss("multiclass", ignore_index=IGNORED), "cross entropy + SMP DiceLoss"
        except ModuleNotFoundError:
            name = "cross entropy alone (segmentation_models_pytorch is not installed)"

    def loss_of(logits: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, masks, ignore_index=IGNORED)
        return loss + dice(logits, masks) if dice else loss

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, case.trainer, enabled=case.trainer != torch.float32):
            output = model(images)
            if isinstance(output, tuple):  # PSPNet with its auxiliary head
                loss = loss_of(output[0]) + 0.4 * loss_of(output[1])
            else:
                loss = loss_of(output["out"] if isinstance(output, dict) else output)
        loss.backward()
        optimizer.step()

    return step, name


def timed(step: Callable[[], object], count: int, device: str) -> dict[str, float]:
    """Seconds and page faults a step, the share of kernel time, and the peak memory so far."""
    on_gpu = device.startswith("cuda")
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(count):
        step()
    wait()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds / count,
        "faults": (after.ru_minflt - before.ru_minflt) / count,
        "kernel": (after.ru_stime - before.ru_stime) / seconds,
        "peak": torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM"),
    }


def serve(case: Case, pipe: Connection) -> None:
    """Get ready, say so, then do as many steps as each message says, or an epoch, and answer."""
    torch.manual_seed(0)
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            if case.trainer is None:
                run = our_run(case, Path(folder))
                step, precision, loss = our_step(run), run.precision, run.config.loss
                about["fused"] = bool(run.optimizer.defaults.get("fused"))
            else:
                (step, loss), precision = plain_step(case), case.trainer
            about |= {"precision": str(precision).removeprefix("torch."), "loss": loss}
            about["work"] = floating_point_work(case)
            if case.bare:
                about["multiply_adds"] = 3 * inner_multiply_adds(case)
        except ModuleNotFoundError as error:
            if error.name not in PEERS:
                raise
            pipe.send({"absent": f"{error.name} is not installed"})
            return
        on_gpu = case.device.startswith("cuda")
        timed(
            step, 5 if on_gpu else 2, case.device
        )  # what comes once (on a GPU: tuning, graphs) is over then
        if on_gpu:
            about["waits"] = wait_inside(step)
        pipe.send(about)
        while True:
            try:
                message = pipe.recv()
            except EOFError:
                return
            pipe.send(our_epoch(run) if message == "epoch" else timed(step, message, case.device))


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo"])  # the latter comes with any optimizer, in 2 s


class Worker:
    """A case's process.

    Attributes:
        ready: precision, loss and floating-point work a step, of ours also whether the optimizer is fused and
            on a GPU where a step waits for it; or under `absent` why there is none.
    """

    def __init__(self, case: Case) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=serve, args=(case, theirs))
        self._process.start()
        theirs.close()
        self.ready = self._answer()

    def steps(self, count: int) -> dict[str, float]:
        """Do so many; see `timed`."""
        self._pipe.send(count)
        return self._answer()

    def epoch(self) -> dict[str, float]:
        """Of ours: see `our_epoch`."""
        self._pipe.send("epoch")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            return self._pipe.recv()
        except EOFError:
            self.close()
            raise SystemExit("a worker ended before its time; what it said stands above") from None

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def product_rates(side: int, device: str = "cpu", repeat: int = 1) -> dict[str, float]:
    """FLOP/s of a product of two square matrices: what the machine can do, by dtype."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(side, side, device=device).to(dtype)
        torch.mm(a, a)
        wait()
        start = time.perf_counter()
        for _ in range(repeat):
            torch.mm(a, a)
        wait()
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 * repeat / (time.perf_counter() - start)
    return rates
