"""Every setting of a training run, in one place.

Edit the values here, or give any of them as a flag: `python train.py --model pspnet --image_size 256 256`.
The defaults train on the small data set in `mock_data/`; the remarks say what to use on real images.

A setting is `name: type = value` with a remark behind or below it. A bracket in front of the remark holds its
rules, by which values are refused: its range; the models, losses, optimizers or schedules that have it, with
their values where these differ; "as x" where they call it x. The settings of a section are the keyword
arguments of what is chosen in it (`model_options`, `loss_options`, ...); None leaves the value to the class.
"""

import re
from ast import literal_eval
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from inspect import getsource
from os.path import expanduser
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal, get_args, get_origin, get_type_hints


def settings(cls: type) -> type:
    """Make a frozen dataclass with `remarks()`, in which [256, 256] may stand for (256, 256)."""
    for name, value in [*vars(cls).items()]:
        if isinstance(value, list):
            setattr(cls, name, tuple(value))
    cls.remarks = classmethod(lambda _: read_remarks(cls))
    return dataclass(frozen=True)(cls)


@settings
class Config:
    """The settings of one run."""

    # fmt: off

    # Data
    data_root: str = "mock_data"  # folder with {train,val}/{images,masks}
    num_classes: int = 4  # [2 to 32768] number of classes, background included
    class_names: tuple[str, ...] | None = ("background", "berry", "leaf", "flower")
    # one per class; None: class_0, class_1, ...; these belong to mock_data and go with its num_classes alone
    class_colors: tuple[tuple[int, int, int], ...] | None = (
        (0, 0, 0), (204, 51, 102), (68, 170, 119), (238, 187, 68)
    )  # [0 to 255] red,green,blue, one colour per class, to draw with; None: chosen for you
    in_channels: int = 3  # [1 or more] channels of the images: 1 grey, 3 colour, 4 with alpha or infrared
    image_size: tuple[int, int] | int = (128, 128)
    # [32 or more] height and width of the network's input; one number: a square; real images: 256 to 512
    resize: Literal["stretch", "letterbox", "crop"] = "stretch"
    # how an image is brought to image_size: stretched, padded to keep its shape, or cropped at its own scale
    labels: str = "auto"
    # how masks encode classes: auto, snap (lossy masks), or a map such as 0=0,255=1 or #000000=0,#ff0000=1
    mask_suffix: str = ""  # what a mask's name has after its image's: "_mask" pairs cat.jpg with cat_mask.png
    val_share: float = 0.2
    # [0.001 to 0.999] fraction of the pairs that validate, drawn by seed, if data_root has no train and val
    ignore_index: int = 255  # [-2147483648 to 2147483647] mask value that is not scored: void, unlabelled
    cache: Literal["auto", "ram", "disk", "off"] = "auto"
    # where decoded and resized images are kept, so that each is decoded once; auto: ram if small, else disk
    cache_dir: str | None = None  # folder of the disk cache and check results; None: .cache in output_dir

    # Augmentation (training images only)
    hflip: float = 0.5  # [0 to 1] probability of a left-right flip; 0 where left and right differ in meaning
    vflip: float = 0.0  # [0 to 1] probability of an upside-down flip; 0.5 for aerial and microscope images
    scale: tuple[float, float] = (1.0, 1.0)
    # [0.1 to 10] lowest and highest zoom, then cropped or padded; 1 1: off; long runs on real images: 0.5 2
    rotate: float = 0.0
    # [0 to 180] largest rotation in degrees, either way; 10 is usual for street scenes, 180 for aerial images
    color_jitter: float = 0.0
    # [0 to 1] strength of random brightness, contrast and saturation; 0: off; long runs on real images: 0.3
    blur: float = 0.0  # [0 to 10] largest standard deviation of a Gaussian blur in pixels; 0: off; 1 is mild

    # Model
    model: Literal["unet", "deeplabv3plus", "pspnet", "fcn", "segnet"] = "unet"  # the network
    backbone: str | None = None
    # [deeplabv3plus, pspnet: resnet18 resnet34 resnet50 resnet101; fcn: vgg11 vgg13 vgg16 vgg19 vgg11_bn
    # vgg13_bn vgg16_bn vgg19_bn] the encoder; None: resnet50 or vgg16_bn
    output_stride: Literal[8, 16] | None = None
    # [deeplabv3plus, pspnet] image size per size of the deepest features; None: the papers' 16 and 8
    separable: bool = False  # [deeplabv3plus] depthwise separable convolutions: fewer parameters
    fcn_variant: Literal["8s", "16s", "32s"] = "8s"  # [fcn; as variant] stride of the scores; 8s is finest
    base_channels: int = 16
    # [unet, segnet; 1 or more] channels of the first level, doubled from level to level; the papers have 64
    bilinear: bool = False  # [unet] bilinear upsampling instead of transposed convolutions
    aux_weight: float = 0.4
    # [pspnet; 0 or more] weight of the auxiliary loss on layer3 in training; 0: no auxiliary head
    dropout: float | None = None  # [0 to 1] dropout probability; None: the paper's for each network

    # Initial weights
    pretrained: str = "none"
    # [deeplabv3plus, pspnet, fcn, segnet] backbone: none (random), imagenet (downloaded), a state-dict file
    freeze_backbone: bool = False
    # [deeplabv3plus, pspnet, fcn, segnet] keep the backbone as it is (with pretrained or init_from)
    init_from: str | None = None
    # checkpoint, or run's folder, whose weights this run starts from; those that do not fit are listed and
    # stay random

    # Loss
    loss: Literal["ce", "weighted_ce", "focal", "dice", "joint"] = "joint"
    # cross entropy, class-weighted, focal, Dice, or Dice and one of the first three
    joint_ce: Literal["ce", "weighted_ce", "focal"] = "ce"  # [joint] the form of cross entropy in joint
    class_weights: Literal["auto"] | tuple[float, ...] | None = None
    # [weighted_ce, focal; 0 or more] auto (median frequency, from the training masks) or one number per
    # class; None: auto for weighted_ce, equal for focal
    focal_gamma: float = 2.0  # [focal; 0 or more] focus on hard pixels; 0: plain cross entropy
    dice_weight: float = 0.5  # [joint; 0 to 1] fraction of Dice in joint; the rest is cross entropy

    # Optimizer
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = "adam"
    # adam is the safe choice; sgd with learning_rate 0.01 and poly is what most papers used
    learning_rate: float = 0.002
    # [above 0] at the start, after warm-up; real images: adam 0.0003 to 0.001, sgd 0.01, rmsprop 0.0001
    backbone_lr_scale: float = 1.0
    # [deeplabv3plus, pspnet, fcn, segnet; above 0] factor on the backbone's learning rate; 0.1 if pretrained
    weight_decay: float = 1e-4
    # [0 or more] L2 penalty on convolution weights, not on biases and normalization; adamw: 0.01 is usual
    momentum: float = 0.9  # [sgd, rmsprop; 0 to below 1] of the gradients (sgd: Nesterov)

    # Scheduler
    scheduler: Literal["step", "poly", "cosine", "plateau", "none"] = "poly"
    # how the learning rate falls: in steps; to zero at the end (poly, cosine); when the score stalls; or not
    warmup_steps: int = 10
    # [0 or more] steps over which it rises at first, at most half the run's; real data: 100 to 1000
    step_size: int = 30  # [step; 1 or more] epochs between two reductions
    step_gamma: float = 0.1  # [step; above 0 to 1] factor of each reduction
    poly_power: float = 0.9  # [poly; above 0] exponent: learning_rate x (1 - step / steps) ** poly_power
    plateau_factor: float = 0.5  # [plateau; above 0 to below 1] factor of each reduction
    plateau_patience: int = 5  # [plateau; 0 or more] validations without improvement before a reduction

    # Run
    epochs: int = 22  # [1 or more] passes over the training images; real data, random weights: 100 to 500
    batch_size: int = 4  # [1 or more] images per step, over all processes together; real data: 8 to 16
    accumulate: int = 1  # [1 or more] parts that a batch is computed in, one after another, to save memory
    amp: Literal["auto", "off", "tf32", "bf16", "fp16"] = "auto"
    # mixed precision; auto: bf16 where the GPU or the CPU is faster in it, else fp16 (GPU) or off; off: all
    # in float32; tf32: float32 with TF32 in convolutions and matrix products (GPU)
    channels_last: bool = True  # memory layout of convolutions; faster nearly everywhere
    compile: bool = False  # torch.compile: a minute at the start, then faster on a GPU; no gain on a CPU
    clip_grad: float = 0.0  # [0 or more] largest norm of the gradient; 0: no limit
    ema_decay: float = 0.0
    # [0 to below 1] moving average of the weights, for validation and prediction; 0: off, 0.999 is usual
    val_every: int = 1  # [1 or more] epochs between two validations; the last epoch always validates
    early_stop: int = 0  # [0 or more] stop after this many validations without improvement; 0: never
    monitor: Literal["iou", "dice"] = "iou"  # the mean score that decides which epoch is saved as best.pt
    num_workers: int | None = None
    # [0 or more] processes that load images; None: 0 on a CPU and for cached images that are only flipped,
    # else one per core but one, up to 16
    device: str = "auto"  # auto (a GPU where there is one), cpu, cuda, cuda:1, mps
    seed: int = 0  # [0 to 9223372036854775807] start of every random draw
    sync_batchnorm: bool = False  # batch norm over all processes (GPUs): for few images on each
    deterministic: bool = False  # the same numbers on a GPU in every run, slower; a CPU's always are
    output_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # this run's folder in output_dir; None: model, date and time
    resume: str | None = None  # continue a run: its folder, or auto (the newest unfinished one)
    save_every_minutes: float = 10.0  # [0 or more] between two saves within an epoch; 0: only at its end
    check: bool = False  # check the data, print what was found, and stop

    # fmt: on

    def __post_init__(self) -> None:
        """Convert `image_size` to (height, width), expand ~ in paths, and refuse invalid settings."""
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        if self.num_classes != type(self).num_classes:  # the default names go with the default number
            for name in ("class_names", "class_colors"):
                if getattr(self, name) == getattr(type(self), name):
                    object.__setattr__(self, name, None)
        for name in ("data_root", "cache_dir", "pretrained", "init_from", "output_dir", "resume"):
            if getattr(self, name):
                object.__setattr__(self, name, expanduser(getattr(self, name)))
        for problem in (*broken_rules(self), *self._conflicts()):
            raise ValueError(problem)

    def refuse_missing(self) -> None:
        """Refuse a data folder, a run or a file of weights that does not exist, before anything slow."""
        weights, words = (Path.is_file, "file of weights"), {"pretrained": ("none", "imagenet")}
        data = Path.is_dir, "folder of train/ and val/"
        run = lambda path: path.is_file() or (path / "best.pt").is_file(), "checkpoint or run"  # noqa: E731
        named = {"data_root": data, "init_from": run, "pretrained": weights}
        if self.resume:  # which has its own settings
            named, words = {"resume": (Path.exists, "run")}, {"resume": ("auto",)}
        for name, (exists, kind) in named.items():
            path = getattr(self, name)
            if path and path not in words.get(name, ()) and not exists(Path(path)):
                raise FileNotFoundError(f"no {kind} at {path}. Give {name} an existing one, or leave it out")

    def pick(self, *names: str) -> dict[str, Any]:
        """Return some settings by name."""
        return {name: getattr(self, name) for name in names}

    @property
    def augmentation_options(self) -> dict[str, Any]:
        """Keyword arguments of the augmentation."""
        return self._options("Augmentation")

    @property
    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of the model's class beside classes and channels."""
        options = self._options("Model", "model")
        if "aux_weight" in options:  # the network has the head, the loss its weight
            options["aux"] = options.pop("aux_weight") > 0
        return options

    @property
    def loss_options(self) -> dict[str, Any]:
        """Keyword arguments of the loss beside the class weights (`weighting`)."""
        return self._options("Loss", "loss", "class_weights")

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """Keyword arguments of the optimizer beside the learning rate."""
        return self._options("Optimizer", "optimizer", "learning_rate")

    @property
    def schedule_options(self) -> dict[str, Any]:
        """Keyword arguments of the schedule beside the warm-up."""
        return self._options("Scheduler", "scheduler", "warmup_steps")

    def _options(self, section: str, *without: str) -> dict[str, Any]:
        """Return the settings of a section that apply and are not None, by their names as arguments."""
        remarks = {name: self.remarks()[name] for name in applying(self) if name not in without}
        options = {
            r.keyword: getattr(self, name) for name, r in remarks.items() if r.heading.startswith(section)
        }
        return {keyword: value for keyword, value in options.items() if value is not None}

    @property
    def weighting(self) -> Literal["auto"] | tuple[float, ...] | None:
        """The class weights in use: weighted_ce without numbers means auto; None where there are none."""
        form = self.joint_ce if self.loss == "joint" else self.loss
        default = "auto" if form == "weighted_ce" else None
        return (self.class_weights or default) if "class_weights" in applying(self) else None

    @property
    def names(self) -> tuple[str, ...]:
        """One name per class."""
        return self.class_names or tuple(f"class_{c}" for c in range(self.num_classes))

    @property
    def memory_savers(self) -> str:
        """Settings that would need less memory than these."""
        parts = range(self.accumulate + 1, self.batch_size + 1)
        more_parts = [f"accumulate {n}" for n in parts if self.batch_size % n == 0][:1]
        shorter = ["amp bf16"] * (self.amp == "off")
        narrower = "backbone" if "backbone" in applying(self) else "base_channels"
        return ", ".join([*more_parts, *shorter, f"a smaller batch_size, image_size or {narrower}"])

    @property
    def cache_folder(self) -> Path:
        """Folder of decoded images and of the data check's results."""
        return Path(self.cache_dir or Path(self.output_dir) / ".cache")

    @property
    def saved(self) -> dict[str, Any]:
        """The settings as `config.json` and checkpoints hold them, to resume this run or to start others.

        Without those that do not apply, which would contradict config.py once its defaults are edited.
        """
        return self.pick(*applying(self)) | {"resume": None, "run_name": None}  # the folder has the name

    def _conflicts(self) -> Iterator[str]:
        """Yield one message per invalid setting that no range shows, and per invalid combination."""
        low, high = self.scale
        if low > high:
            yield f"scale must be the lowest and the highest zoom; got {low} {high}. 1 1 turns it off"
        if self.run_name and Path(self.run_name).name != self.run_name:
            fix = "Give the folder in output_dir"
            yield f"run_name must be a plain folder name; got {self.run_name!r}. {fix}"
        for name, value in self.pick("class_names", "class_colors", "class_weights").items():
            if value not in (None, "auto") and len(value) != self.num_classes:
                expected = f"one entry for each of the {self.num_classes} classes (num_classes)"
                fix = "Change it or num_classes, or leave it out (None)"
                yield f"{name} must have {expected}; got {len(value)}. {fix}"
        if len(set(self.names)) < len(self.names):
            yield f"class_names must differ from each other; got {', '.join(self.names)}"
        if isinstance(self.class_weights, tuple) and not any(self.class_weights):
            yield f"class_weights must not be all 0; got {self.class_weights}"
        if 0 <= self.ignore_index < self.num_classes:
            unused = 255 if self.num_classes <= 255 else 65535
            fix = f"Set it to the masks' value for void, or to {unused} if they have none"
            if self.ignore_index == 0 and self.num_classes <= 64:  # void is 0, the classes are 1 to N
                labels = ",".join(["0=ignore", *(f"{c}={c - 1}" for c in range(1, self.num_classes + 1))])
                fix = f"If 0 is void and the classes are 1 to {self.num_classes}: --labels '{labels}'"
            ids = f"(0 to {self.num_classes - 1})"
            yield f"ignore_index must not be a class id {ids}; got {self.ignore_index}. {fix}"
        if self.batch_size % self.accumulate:
            fix = "It is the number of parts that a batch is computed in"
            yield f"accumulate must divide batch_size ({self.batch_size}); got {self.accumulate}. {fix}"
        if self.freeze_backbone and self.pretrained == "none" and not self.init_from:
            yield "freeze_backbone needs weights worth keeping; got none. Give pretrained or init_from"
        if self.resume and self.init_from:
            yield "resume continues a run, init_from starts a new one; got both. Leave one out"


@dataclass(frozen=True)
class Remark:
    """What the source says about a setting: rules for the program, words for the user."""

    text: str  # all of it, with the bracket
    heading: str  # of the section
    choices: tuple[Any, ...]  # the names that it takes, where it is a choice
    bounds: str = ""  # such as "0 to 1", "above 0", "1 or more"
    owners: dict[str, list[str]] | None = (
        None  # choices that have the setting: the values it takes (none: any)
    )
    keyword: str = ""  # its name as an argument


@cache
def read_remarks(cls: type) -> dict[str, Remark]:
    """Read the comments in the source of a class of settings.

    A remark begins behind its field and goes on in the comments below; one after a blank line is a heading.

    Raises:
        OSError: there is no source.
    """
    remarks, heading, hints = {}, "", get_type_hints(cls)
    for part in re.split(r"\n    (?=\w+:)", dedent(getsource(cls))):  # the first is above all fields
        field, *below = re.split(r"\n\s*\n", part)
        name, text = field.partition(":")[0], " ".join(re.findall(r"  # (.*)", field))
        if name in hints:
            choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
            remarks[name] = Remark(text, heading, choices, **read_rules(text, name))
        heading = [heading, *re.findall(r"  # (.*)", "\n".join(below))][-1]
    return remarks


BOUNDS = re.compile(r"(above )?(-?\d+\.?\d*)(?: or more| to (below )?(-?\d+\.?\d*))?")


def read_rules(text: str, name: str) -> dict[str, Any]:
    """Return bounds, owners and keyword from the bracket in front of a remark, if there is one."""
    rules, bracket = {"keyword": name, "owners": {}}, re.match(r"\[(.*?)\]", text)
    for rule in bracket[1].split("; ") if bracket else ():
        owners, _, values = rule.partition(": ")
        if BOUNDS.fullmatch(rule):
            rules["bounds"] = rule
        elif rule.startswith("as "):
            rules["keyword"] = rule[3:]
        else:
            rules["owners"] |= dict.fromkeys(owners.split(", "), values.split())
    return rules


def applying(config: Any) -> list[str]:
    """Return the settings that the chosen model, loss, optimizer and schedule have."""
    names, chosen = [], set()
    for name, remark in config.remarks().items():
        if not remark.owners or chosen & {*remark.owners}:
            names.append(name)
            chosen |= {getattr(config, name)} if remark.choices else set()
    return names


def broken_rules(config: Any) -> Iterator[str]:
    """Yield one message per setting that breaks a rule in its bracket."""
    remarks, used = config.remarks(), applying(config)
    for name, remark in remarks.items():
        value, default = getattr(config, name), getattr(type(config), name)
        got = " ".join(map(str, value)) if isinstance(value, tuple) else value
        if name not in used and value != default:
            choosers = [other for other in remarks if {*remark.owners} <= {*remarks[other].choices}]
            current = {other: getattr(config, other) for other in choosers if other in used}
            now = ", ".join(f"{other} {choice}" for other, choice in current.items())
            fix = f"Set {[*current][-1]} to {' or '.join(remark.owners)}, or leave {name} at {default}"
            owners = f"{' or '.join(choosers)} {', '.join(remark.owners)}"
            yield f"{name} belongs to {owners}; got {got} with {now}. {fix}"
        if not is_within(value, remark.bounds):
            each = "each number of " * isinstance(value, tuple)
            yield f"{each}{name} must be {remark.bounds}; got {got}"
        for chooser in (other for other in used if remarks[other].choices):
            values = remark.owners.get(getattr(config, chooser))
            if values and value not in (None, *values):
                owner = getattr(config, chooser)
                yield f"{name} of {owner} must be one of {', '.join(values)}; got {value!r}"


def is_within(value: Any, bounds: str) -> bool:
    """Whether a number, or each number in a tuple, is within bounds; anything else is."""
    if isinstance(value, tuple):
        return all(is_within(item, bounds) for item in value)
    if not bounds or not isinstance(value, (int, float)):
        return True
    above, low, below, high = BOUNDS.fullmatch(bounds).groups()
    low, high = literal_eval(low), literal_eval(high or "1e999")
    return (value > low if above else value >= low) and (value < high if below else value <= high)
