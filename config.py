"""Every setting of a training run, in one place.

Edit the values here, or give any of them as a flag: `python train.py --model pspnet --image_size 256 256`.
The defaults train on the small data set in `mock_data/`; the remarks say what to use on real pictures.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import inf
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
VGGS = ("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn")
BACKBONES = {  # model: (its backbones, the one that None stands for)
    "deeplabv3plus": (RESNETS, "resnet50"),
    "pspnet": (RESNETS, "resnet50"),
    "fcn": (VGGS, "vgg16_bn"),  # without batch normalisation it hardly trains from random weights
}


def settings(cls: type) -> type:
    """A frozen dataclass, in which a list may stand for a tuple: [256, 256], which it would refuse."""
    for name, value in [*vars(cls).items()]:
        if isinstance(value, list):
            setattr(cls, name, tuple(value))
    return dataclass(frozen=True)(cls)


@settings
class Config:
    """One run's settings: a field a line, with its remark behind it, or below where that is long."""

    # fmt: off

    # Data
    data_root: str = "mock_data"  # folder with {train,val}/{images,masks}
    num_classes: int = 4  # number of classes, background included; 2 or more
    class_names: tuple[str, ...] | None = ("background", "berry", "leaf", "flower")
    # one a class; None: class_0, class_1, ...; these belong to mock_data and go with its num_classes alone
    class_colors: tuple[tuple[int, int, int], ...] | None = (
        (0, 0, 0), (204, 51, 102), (68, 170, 119), (238, 187, 68)
    )  # red,green,blue of 0 to 255, one a class, to draw with; None: chosen for you
    in_channels: int = 3  # channels of the pictures: 1 grey, 3 colour, 4 with alpha or infrared
    image_size: tuple[int, int] | int = (128, 128)
    # height and width that the network sees, in pixels; one number: a square. Real pictures: 256 to 512
    resize: Literal["stretch", "letterbox", "crop"] = "stretch"
    # how a picture comes to image_size: stretched, padded with its shape kept, or cut in windows at its scale
    labels: str = "auto"
    # how masks encode classes: auto, snap (auto, lossy masks too), or a map such as 0=0,255=1 or
    # #000000=0,#ff0000=1
    mask_suffix: str = ""
    # what a mask's name has after its picture's: "_mask" pairs cat.jpg with cat_mask.png
    val_share: float = 0.2
    # fraction of the pairs that validate, drawn by seed, where data_root has no train and val
    ignore_index: int = 255  # mask value that counts nowhere: void, unlabelled
    cache: Literal["auto", "ram", "disk", "off"] = "auto"
    # where decoded and resized pictures are kept, so that each is decoded once; auto: ram if small, else disk
    cache_dir: str | None = None
    # folder of the disk cache and of the check's results; None: .cache in output_dir

    # Augmentation (training pictures only)
    hflip: float = 0.5  # probability of a flip left to right; 0 where left and right differ in meaning
    vflip: float = 0.0
    # probability of a flip upside down; 0.5 for pictures from above and under the microscope
    scale: tuple[float, float] = (1.0, 1.0)
    # lowest and highest zoom, then cut or padded to image_size; 1 1: off; long runs on real pictures: 0.5 2
    rotate: float = 0.0
    # largest rotation in degrees, either way; 10 is usual for street scenes, 180 for pictures from above
    color_jitter: float = 0.0
    # strength of random brightness, contrast and saturation, 0 to 1; 0: off; long runs on real pictures: 0.3

    # Model
    model: Literal["unet", "deeplabv3plus", "pspnet", "fcn", "segnet"] = "unet"  # the network
    backbone: str | None = None
    # resnet18, 34, 50, 101 (deeplabv3plus, pspnet; None: resnet50) or vgg11, 13, 16, 19, with _bn too (fcn;
    # None: vgg16_bn)
    pretrained: str = "none"
    # first weights of the backbone: none (random), imagenet (downloaded by torchvision), or a state-dict file
    output_stride: Literal[8, 16, 32] | None = None
    # how much smaller than the picture the deepest map is (deeplabv3plus, pspnet); None: the papers' 16 and 8
    separable: bool = False
    # depthwise separable convolutions in ASPP and decoder (deeplabv3plus): fewer parameters
    fcn_variant: Literal["8s", "16s", "32s"] = "8s"  # stride of the finest scores (fcn): 8s is finest
    base_channels: int = 16
    # channels of the first level (unet, segnet), doubled level by level; the papers have 64
    bilinear: bool = False  # bilinear upsampling instead of transposed convolutions (unet)
    aux_weight: float = 0.4  # weight of the auxiliary loss on layer3 while training (pspnet); 0: none
    dropout: float | None = None  # dropout probability; None: the paper's for each network
    freeze_backbone: bool = False
    # keep the backbone's weights and statistics as they are (with pretrained or init_from)
    init_from: str | None = None
    # checkpoint whose weights this run starts from; what does not fit is listed and left at random

    # Loss
    loss: Literal["ce", "weighted_ce", "focal", "dice", "joint"] = "joint"
    # cross entropy, class-weighted, focal, Dice, or Dice and one of the first three
    joint_ce: Literal["ce", "weighted_ce", "focal"] = "ce"  # the cross-entropy form inside joint
    class_weights: Literal["auto"] | tuple[float, ...] | None = None
    # auto (median frequency, from the training masks) or one number a class; None: auto for weighted_ce,
    # equal for focal
    focal_gamma: float = 2.0  # how much focal loss turns to hard pixels; 0 is plain cross entropy
    dice_weight: float = 0.5  # share of Dice in joint, 0 to 1; the cross entropy has the rest

    # Optimizer and schedule
    optimizer: Literal["adam", "sgd", "rmsprop"] = "adam"
    # adam is the safe choice; sgd with learning_rate 0.01 and poly is what most papers used
    learning_rate: float = 0.002
    # at the start (after warm-up); real pictures: adam 0.0003 to 0.001, sgd 0.01, rmsprop 0.0001
    backbone_lr_scale: float = 1.0  # factor on the backbone's learning rate; 0.1 with pretrained weights
    weight_decay: float = 1e-4  # L2 penalty on convolution weights; biases and normalisation have none
    momentum: float = 0.9  # of sgd (Nesterov) and rmsprop
    scheduler: Literal["step", "poly", "plateau", "none"] = "poly"
    # how the learning rate falls: in steps, to zero at the end, when the score stalls, or not
    warmup_steps: int = 10
    # steps over which the learning rate rises at first, at most half the run's; real data: 100 to 1000
    step_size: int = 30  # epochs between two drops (scheduler step)
    step_gamma: float = 0.1  # factor of each drop (scheduler step)
    poly_power: float = 0.9  # learning_rate x (1 - step / steps) to this power (scheduler poly)
    plateau_factor: float = 0.5  # factor of each drop (scheduler plateau)
    plateau_patience: int = 5  # validations without a better score before a drop (scheduler plateau)

    # Run
    epochs: int = 22  # passes over the training pictures; real data from random weights: 100 to 500
    batch_size: int = 4  # pictures a step, over all processes together; real data: 8 to 16
    accumulate: int = 1  # parts that a batch is computed in, one after the other, to save memory
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    # mixed precision; auto: bf16 where the GPU or the CPU is faster in it, else off
    channels_last: bool = True  # memory layout of convolutions; faster nearly everywhere
    compile: bool = False  # torch.compile: a minute at the start, then faster on a GPU; no gain on a CPU
    clip_grad: float = 0.0  # largest norm of the gradient; 0: no limit
    ema_decay: float = 0.0
    # average of the weights over steps, used for validation and prediction; 0: off, 0.999 is usual
    val_every: int = 1  # epochs between two validations; the last epoch always validates
    early_stop: int = 0  # stop after this many validations without a better score; 0: never
    monitor: Literal["iou", "dice"] = "iou"  # the mean score that decides what best.pt is
    num_workers: int | None = None
    # processes that load pictures; None: 0 where pictures are cached or the CPU trains, else up to 8
    device: str = "auto"  # auto (a GPU where there is one), cpu, cuda, cuda:1, mps
    seed: int = 0  # start of every random draw
    sync_batchnorm: bool = False  # batch norm over all processes' pictures (GPUs): for few of them on each
    deterministic: bool = False
    # same numbers on a GPU in every run, at some speed; on a CPU they are so anyway
    output_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # this run's folder in output_dir; None: model, date and time
    resume: str | None = None  # a run's folder, or auto (the newest unfinished one), to go on with
    save_every_minutes: float = 10.0  # minutes between two saves within an epoch; 0: only at an epoch's end
    check: bool = False  # check the data, say what was found, and stop

    # fmt: on

    def __post_init__(self) -> None:
        """Bring `image_size` to (height, width) and refuse what cannot be, naming field, value and remedy."""
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        if self.num_classes != type(self).num_classes:  # the default names go with the default number
            for name in ("class_names", "class_colors"):
                if getattr(self, name) == getattr(type(self), name):
                    object.__setattr__(self, name, None)
        for name in ("data_root", "cache_dir", "pretrained", "init_from", "output_dir", "resume"):
            if getattr(self, name):
                object.__setattr__(self, name, expanduser(getattr(self, name)))
        for problem in self._problems():
            raise ValueError(problem)

    def refuse_missing(self) -> None:
        """Refuse a data folder, a run or a file of weights that is not there, before anything slow."""
        weights, words = (Path.is_file, "file of weights"), {"pretrained": ("none", "imagenet")}
        data = Path.is_dir, "folder of train/ and val/"
        named = {"data_root": data, "init_from": weights, "pretrained": weights}
        if self.resume:  # which has its own settings
            named, words = {"resume": (Path.exists, "run")}, {"resume": ("auto",)}
        for name, (is_there, what) in named.items():
            path = getattr(self, name)
            if path and path not in words.get(name, ()) and not is_there(Path(path)):
                raise FileNotFoundError(f"no {what} at {path}. Give {name} an existing one, or leave it out")

    def pick(self, *names: str) -> dict[str, Any]:
        """Some settings by name, to hand on as keyword arguments."""
        return {name: getattr(self, name) for name in names}

    @property
    def names(self) -> tuple[str, ...]:
        """One name a class."""
        return self.class_names or tuple(f"class_{c}" for c in range(self.num_classes))

    @property
    def backbone_name(self) -> str | None:
        """The backbone that will be built; None where the model has no choice of one."""
        return (self.backbone or BACKBONES[self.model][1]) if self.model in BACKBONES else None

    @property
    def ce_form(self) -> str | None:
        """The cross-entropy form in use, alone or inside joint; None for pure Dice."""
        return {"joint": self.joint_ce, "dice": None}.get(self.loss, self.loss)

    @property
    def weighting(self) -> Literal["auto"] | tuple[float, ...] | None:
        """Class weights as they apply: weighted_ce without numbers means auto."""
        return "auto" if self.ce_form == "weighted_ce" and self.class_weights is None else self.class_weights

    @property
    def model_options(self) -> dict[str, Any]:
        """What the chosen network's class takes beyond classes and channels, under its own names."""
        options: dict[str, Any] = {
            "unet": self.pick("base_channels", "bilinear"),
            "deeplabv3plus": {"output_stride": self.output_stride or 16, "separable": self.separable},
            "pspnet": {"output_stride": self.output_stride or 8, "aux": self.aux_weight > 0},
            "fcn": {"variant": self.fcn_variant},
            "segnet": self.pick("base_channels"),
        }.get(self.model, {})
        backbone = {"backbone": self.backbone_name} if self.backbone_name else {}
        dropout = {} if self.dropout is None else self.pick("dropout")
        return {**backbone, **options, **dropout}

    @property
    def loss_options(self) -> dict[str, Any]:
        """What the chosen loss takes beyond classes and weights."""
        joint = self.pick("dice_weight", "joint_ce") if self.loss == "joint" else {}
        focal = self.pick("focal_gamma") if self.ce_form == "focal" else {}
        return {**joint, **focal}

    @property
    def memory_savers(self) -> str:
        """Settings that would need less memory than these."""
        parts = range(self.accumulate + 1, self.batch_size + 1)
        finer = [f"accumulate {n}" for n in parts if self.batch_size % n == 0][:1]
        shorter = ["amp bf16"] * (self.amp == "off")
        narrower = "backbone" if self.backbone_name else "base_channels"
        return ", ".join([*finer, *shorter, f"a smaller batch_size, image_size or {narrower}"])

    @property
    def cache_folder(self) -> Path:
        """Where decoded pictures and the findings of the data check are kept."""
        return Path(self.cache_dir or Path(self.output_dir) / ".cache")

    @property
    def saved(self) -> dict[str, Any]:
        """The settings as `config.json` and checkpoints hold them, for this run to go on and for others.

        Without what does not apply, which would contradict config.py once its defaults are edited.
        """
        foreign = {name for name, *_ in self._foreign()}
        values = {name: value for name, value in asdict(self).items() if name not in foreign}
        return {**values, "resume": None, "run_name": None}  # the folder has the name

    def _problems(self) -> Iterator[str]:
        """What cannot be, a line each: values alone, then beside each other."""
        ranges = (  # lowest and highest value, fields
            (0, 1, "hflip vflip color_jitter dropout dice_weight"),
            (0, 0.999999, "momentum ema_decay"),
            (0.001, 0.999, "val_share"),
            (0, inf, "warmup_steps plateau_patience early_stop num_workers save_every_minutes"),
            (0, inf, "aux_weight focal_gamma weight_decay clip_grad"),
            (1, inf, "in_channels base_channels epochs batch_size accumulate val_every step_size"),
            (1e-12, inf, "learning_rate backbone_lr_scale poly_power"),
            (1e-6, 1, "step_gamma"),
            (1e-6, 0.999999, "plateau_factor"),
            (0, 180, "rotate"),
            (2, 32768, "num_classes"),  # predicted ids are int16 above 256 of them
            (0, 2**63 - 1, "seed"),
            (-(2**31), 2**31 - 1, "ignore_index"),
        )
        for low, high, names in ranges:
            for name, value in self.pick(*names.split()).items():
                if value is not None and not low <= value <= high:
                    wanted = f"{low} or more" if high == inf else f"{low} to {high}"
                    yield f"{name} must be {wanted}; got {value}"
        if min(self.image_size) < 32:
            yield f"image_size must be 32 pixels or more a side; got {self.image_size}. Give height and width"
        low, high = self.scale
        if not 0.1 <= low <= high <= 10:
            wanted = "a low and a high zoom between 0.1 and 10"
            yield f"scale must be {wanted}; got {low} {high}. 1 1 turns it off"
        if self.run_name and Path(self.run_name).name != self.run_name:
            wanted = "a plain folder name"
            yield f"run_name must be {wanted}; got {self.run_name!r}. Give the folder in output_dir"

        colors, weights, most = self.class_colors, self.class_weights, self.num_classes
        for name, value in self.pick("class_names", "class_colors", "class_weights").items():
            if value not in (None, "auto") and len(value) != most:
                wanted = f"one entry for each of the {most} classes (num_classes)"
                remedy = "Change it or num_classes, or leave it out (None)"
                yield f"{name} must have {wanted}; got {len(value)}. {remedy}"
        if len(set(self.names)) < len(self.names):
            yield f"class_names must differ from each other; got {', '.join(self.names)}"
        if colors and not all(0 <= value <= 255 for color in colors for value in color):
            yield f"class_colors must be red, green, blue of 0 to 255; got {colors}"
        if isinstance(weights, tuple) and not (min(weights) >= 0 and sum(weights) > 0):
            yield f"class_weights must not be negative, and not all 0; got {weights}"
        if 0 <= self.ignore_index < most:
            moved = ",".join(f"{c}={c - 1}" for c in range(1, min(most, 3) + 1)) + ",..." * (most > 3)
            remedy = f"Ignore 0 by --labels 0=ignore,{moved}" if not self.ignore_index else "255 is usual"
            remedy = "-1 is never a class id" if most > 255 else remedy
            yield f"ignore_index must be no class id (0 to {most - 1}); got {self.ignore_index}. {remedy}"

        for name, choice, chosen, owners in self._foreign():
            got, default = getattr(self, name), getattr(type(self), name)
            if got != default:
                yield f"{name} belongs to {owners} ({choice}); got {got} with {chosen}. Leave it at {default}"
        choices = BACKBONES[self.model][0] if self.model in BACKBONES else ()
        if choices and self.backbone not in (None, *choices):
            yield f"backbone of {self.model} must be one of {', '.join(choices)}; got {self.backbone!r}"
        if self.model == "deeplabv3plus" and self.output_stride == 32:
            yield "output_stride of deeplabv3plus must be 8 or 16; got 32. Leave it out for the paper's 16"
        if self.batch_size % self.accumulate:
            remedy = "It is the number of parts that a batch is computed in"
            yield f"accumulate must divide batch_size ({self.batch_size}); got {self.accumulate}. {remedy}"
        if self.freeze_backbone and self.pretrained == "none" and not self.init_from:
            yield "freeze_backbone needs weights worth keeping; got none. Give pretrained or init_from"
        if self.resume and self.init_from:
            yield "resume goes on with a run, init_from starts a new one; got both. Leave one out"

    def _foreign(self) -> Iterator[tuple[str, str, str, str]]:
        """Settings that the chosen model, loss, optimizer or schedule lacks: (name, what, chosen, owners)."""
        chosen = self.pick("model", "loss", "optimizer", "scheduler")
        chosen["loss or joint_ce"] = self.ce_form or self.loss
        belongs = (  # fields, the choice that decides whether they apply, its values that have them
            ("backbone", "model", "deeplabv3plus, pspnet, fcn"),
            ("pretrained freeze_backbone backbone_lr_scale", "model", "deeplabv3plus, pspnet, fcn, segnet"),
            ("output_stride", "model", "deeplabv3plus, pspnet"),
            ("separable", "model", "deeplabv3plus"),
            ("fcn_variant", "model", "fcn"),
            ("base_channels", "model", "unet, segnet"),
            ("bilinear", "model", "unet"),
            ("aux_weight", "model", "pspnet"),
            ("joint_ce dice_weight", "loss", "joint"),
            ("focal_gamma", "loss or joint_ce", "focal"),
            ("class_weights", "loss or joint_ce", "weighted_ce, focal"),
            ("momentum", "optimizer", "sgd, rmsprop"),
            ("step_size step_gamma", "scheduler", "step"),
            ("poly_power", "scheduler", "poly"),
            ("plateau_factor plateau_patience", "scheduler", "plateau"),
        )
        for names, choice, owners in belongs:
            if chosen[choice] not in owners.split(", "):
                yield from ((name, choice, chosen[choice], owners) for name in names.split())
