"""Command-line flags from a dataclass: every field of `Config` and of `Args` is a flag.

A field `image_size: tuple[int, int] = (128, 128)  # height and width` becomes `--image_size 256 256` (or
`--image-size`), a boolean `compile` becomes `--compile` and `--no-compile`, and the remarks become `--help`.
Needs the standard library alone, so that `--help` and a wrong flag are answered at once.
"""

import difflib
import json
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NOT_SETTINGS = ("versions", "why")  # keys of a config.json that describe the run, but set nothing
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "none"}
PLURALS = {int: "whole numbers", float: "numbers", str: "names"}
ALIASES = {  # names of settings and choices in other projects
    "accumulate": "accumulate_grad_batches grad_accum gradient_accumulation_steps",
    "amp": "fp16 half mixed_precision precision use_amp",
    "backbone": "encoder encoder_name",
    "batch_size": "batch bs",
    "class_names": "classes names",
    "clip_grad": "gradient_clip_val grad_clip max_norm max_grad_norm",
    "cosine": "cosineannealinglr cosine_annealing cos",
    "data_root": "data data_dir data_path dataset dataset_dir root",
    "early_stop": "early_stopping patience",
    "epochs": "max_epochs n_epochs num_epochs num_train_epochs",
    "hflip": "flip fliplr horizontal_flip",
    "image_size": "crop_size img_size imgsz input_size size",
    "input": "images img imgs source",
    "learning_rate": "lr base_lr lr0",
    "loss": "criterion loss_fn",
    "model": "arch architecture net network",
    "num_classes": "n_classes nc",
    "num_workers": "workers",
    "output_dir": "logdir log_dir out save_dir work_dir",
    "pretrained": "encoder_weights weights",
    "run_name": "exp_name experiment name",
    "truth": "ground_truth gt masks targets",
    "weight_decay": "decay wd",
    "weights": "checkpoint ckpt load model",
}
SEVERAL_GPUS = ("devices", "gpus", "num_gpus")


class Fail(Exception):
    """Ends the program with one line and an exit code: 2 the user can fix it, 1 part of the work failed."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def fixable() -> Iterator[None]:
    """Turn a ValueError or OSError of the calls inside, which speaks to the user, into `Fail`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Fail(str(error)) from error


def end_with(call: Callable[[], Any]) -> Any:
    """Return what `call` returns; its `Fail` ends the process with one line on stderr and its exit code.

    Characters that the terminal cannot show are escaped from here on.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return call()
    except Fail as fail:
        print(f"error: {fail}", file=sys.stderr)
        sys.exit(fail.code)
    except AttributeError as error:
        if not hasattr(type(error.obj), "remarks"):
            raise
        lost = f"class {type(error.obj).__name__} has no setting {error.name!r}"
        print(f"error: {lost}.{near(error.name, vars(error.obj))} Restore its name", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before or after the part that saves
        sys.exit(128 + signal.SIGINT)


@dataclass(frozen=True)
class Parsed:
    """The result of reading a command line."""

    settings: Any  # the dataclass instance
    given: dict[str, Any]  # the values on the command line itself, by field


def parse(cls: type, argv: list[str], usage: str) -> Parsed:
    """Read flags into an instance of the dataclass `cls`; `--help` exits here.

    Raises:
        Fail: an unknown flag, or a value that the field or the dataclass refuses.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(cls, usage))
        sys.exit(0)
    hints, given = get_type_hints(cls) | {"config": str}, {}
    for name, words in _split(argv, hints):
        if name in given:
            raise Fail(f"--{name} is given twice; give it once")
        if len(words) > 1 and not any(get_origin(option) is tuple for option in _options(hints[name])):
            raise Fail(f"{name} takes one value; got {len(words)}: {' '.join(words)}")
        given[name] = coerce(name, words if len(words) > 1 else words[0], hints[name])
    values = read_settings(Path(given.pop("config")), cls) if "config" in given else {}
    return Parsed(make(cls, values | given), given)


def make(cls: type, values: dict[str, Any]) -> Any:
    """Return an instance of the dataclass `cls`, with all types checked, those of edited defaults as well."""
    hints = get_type_hints(cls)
    all_values = {name: values.get(name, getattr(cls, name)) for name in hints}
    with fixable():
        return cls(**{name: coerce(name, value, hints[name]) for name, value in all_values.items()})


def read_settings(path: Path, cls: type) -> dict[str, Any]:
    """Return the settings in a JSON file, all of them or some; `make` checks their types."""
    try:
        values = json.loads(path.read_bytes())  # which recognizes UTF-8 and UTF-16, with or without a mark
    except (OSError, ValueError) as error:
        raise Fail(f"--config {path} cannot be read as JSON: {error}. Give a run's config.json") from error
    if not isinstance(values, dict):
        raise Fail(f"--config {path} must hold one JSON object of settings; got {type(values).__name__}")
    known = get_type_hints(cls)
    for name in values:
        if name not in (*known, *NOT_SETTINGS):
            raise Fail(f"--config {path} has an unknown setting {name!r}.{near(name, known)}")
    return {name: value for name, value in values.items() if name in known}


def resumed_settings(
    settings: Any, saved: dict[str, Any], given: dict[str, Any], free: tuple[str, ...]
) -> Any:
    """Return the settings of a run to resume: its own, `saved`, and those of `free` that are given as flags.

    Prints which of its settings differ from today's. `epochs` in `free` may only become more.

    Raises:
        Fail: a flag contradicts the run.
    """
    run, kept = make(type(settings), saved), []
    today = replace(settings, **given)  # where a size given as one number is height and width
    allowed = ["output_dir", "check", *(name for name in given if name in free)]
    if "epochs" in allowed and today.epochs < run.epochs:
        allowed.remove("epochs")
    for name, own in vars(run).items():
        value = getattr(today, name)
        if name in (*allowed, "resume") or value == own:
            continue
        if name in given:
            planned = name == "epochs" and name not in free
            why = f", and whose {run.scheduler} schedule ends with them" * planned
            raise Fail(
                f"--{name} {value} contradicts the run to resume, which has {own}{why}. "
                "Leave it out to go on, or start a new run from its weights by --init_from"
            )
        kept += [f"{name} {own}"] if name != "run_name" else []
    if kept:
        print(f"settings of the run that differ from config.py: {', '.join(kept)}")
    return replace(run, **{name: getattr(today, name) for name in allowed})


def quoted(path: Path) -> str:
    """Return a path as a command line takes it."""
    return f'"{path}"' if " " in str(path) else str(path)


def near(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'unet'?`, or nothing where no name is close."""
    aliases = [name for name in known if word.lower() in ALIASES.get(name, "").split()]
    match = aliases or difflib.get_close_matches(word.lower(), known, n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def _split(argv: list[str], hints: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield (field, words) per flag; `--no-x` yields the word false for a boolean field x."""
    flags: list[list[str]] = []  # each with its words
    for word in argv:
        if word.startswith("--"):
            flags.append(word.split("=", 1))
        elif flags:
            flags[-1].append(word)
        else:
            raise Fail(f"{word!r} belongs to no flag; settings are given as --name value. --help lists them")
    for flag, *words in flags:
        name = flag[2:].replace("-", "_")
        plain = name.removeprefix("no_")
        if name not in hints and hints.get(plain) is bool:
            if words:
                raise Fail(f"--no-{plain} takes no value; got {' '.join(words)}")
            name, words = plain, ["false"]
        if name not in hints:
            torchrun = " Several GPUs: torchrun --nproc_per_node N train.py" if name in SEVERAL_GPUS else ""
            raise Fail(f"unknown flag {flag}.{torchrun or near(name, hints)} --help lists all settings")
        if not words and hints[name] is not bool:
            raise Fail(f"--{name} needs a value: {describe(hints[name])}")
        yield name, words or ["true"]


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> list[str]:
    return [str(c) for option in _options(hint) if get_origin(option) is Literal for c in get_args(option)]


def coerce(name: str, value: Any, hint: Any) -> Any:
    """Convert a value from a command line, from JSON, or from an edited file to the type of its field."""
    for option in sorted(_options(hint), key=lambda option: option is not NoneType):  # "none" is text, too
        try:
            return _convert(value, option)
        except (ValueError, LookupError, OverflowError):
            continue
    several = isinstance(value, (list, tuple)) and len(value) > 1  # (4,) is shown with its stray comma
    shown = " ".join(map(str, value)) if several else str(value)
    close = near(shown, _choices(hint))
    raise Fail(f"{name} must be {describe(hint)}; got {shown!r}.{close}".removesuffix("."))


def _convert(value: Any, option: Any) -> Any:
    """Convert a value to one type; raises ValueError, LookupError or OverflowError where that fails."""
    if option is NoneType and str(value).lower() == "none":
        return None
    if option is bool:
        return BOOLEANS[str(value).lower()]
    if option is str and isinstance(value, str):
        return value
    if option in (int, float) and isinstance(value, (option, int, str)) and not isinstance(value, bool):
        number = option(value)
        if abs(number) < inf:  # nor NaN
            return number
    if get_origin(option) is Literal:
        return {str(choice): choice for choice in get_args(option)}[str(value)]
    if get_origin(option) is tuple:
        kinds = get_args(option)
        if isinstance(value, str):  # 255,0,0 or (255, 0, 0) or #ff0000, or one name or colour of several
            inner = value.strip("()[] ").split(",") if kinds[0] in (int, float) else [value]
            value = bytes.fromhex(value[1:]) if kinds[0] is int and value.startswith("#") else inner
        if isinstance(value, (list, tuple, bytes)):
            kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
            if len(kinds) == len(value) > 0:
                return tuple(map(_convert, value, kinds))
    raise ValueError


def describe(hint: Any) -> str:
    """Return a type in words: `two whole numbers`, `one of unet, fcn`, `a number or none`."""
    words = []
    for option in _options(hint):
        inner = get_args(option)
        if get_origin(option) is Literal:
            words.append("one of " * (len(inner) > 1) + ", ".join(map(str, inner)))
        elif get_origin(option) is tuple:
            many = "" if inner[-1] is Ellipsis else {2: "two "}.get(len(inner), f"{len(inner)} ")
            words.append(many + PLURALS.get(inner[0], "colours (255,0,0 or '#ff0000')"))
        else:
            words.append(TYPES[option])
    return " or ".join(words)


def help_text(cls: type, usage: str) -> str:
    """Return a list of all fields with their remarks and defaults, under the headings of the file."""
    lines, heading = [usage.strip()], ""
    for name, hint in get_type_hints(cls).items():
        remark, choices = cls.remarks()[name], ", ".join(_choices(hint))
        text = remark.text + f" [{choices}]" * bool(choices) + f" (default: {as_flag(getattr(cls, name))})"
        lines += ["", remark.heading] if remark.heading != heading else []
        heading = remark.heading
        lines.append(f"  --{name}" + f" / --no-{name}" * (hint is bool))
        lines += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "  --config FILE.json", "      start from these settings instead of the defaults"]
    return "\n".join([*lines, "", "  --help", "      this list"])


def as_flag(value: Any) -> str:
    """Return a value in the form that its flag takes: `256 256`, `0,0,0 255,0,0`, `none`."""
    if isinstance(value, tuple):
        return " ".join(",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value) or '""'
