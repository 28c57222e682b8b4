"""From a dataclass to flags: every field of `Config` and of `Args` can be given on the command line.

A field `image_size: tuple[int, int] = (128, 128)  # height and width` becomes `--image_size 256 256`
(or `--image-size`), a boolean `compile` becomes `--compile` and `--no-compile`, and the remarks `--help`.
Needs the standard library alone, so that `--help` and a wrong flag are answered at once.
"""

import difflib
import inspect
import json
import re
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

NOT_SETTINGS = ("versions", "why")  # keys of a config.json that say something about the run, but set nothing
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "none"}
PLURALS = {int: "whole numbers", float: "numbers", str: "names"}


class Fail(Exception):
    """Ends the program with one line and an exit code: 2 the user can mend it, 1 part of the work failed."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def mendable() -> Iterator[None]:
    """Around calls whose ValueError or OSError speaks to the user: they become `Fail`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Fail(str(error)) from error


def end_with(call: Callable[[], Any]) -> Any:
    """What `call` returns; its `Fail` ends the process with one line on stderr and its code."""
    try:
        return call()
    except Fail as fail:
        print(f"error: {fail}", file=sys.stderr)
        sys.exit(fail.code)
    except KeyboardInterrupt:  # before or after the part that saves
        sys.exit(128 + signal.SIGINT)


@dataclass(frozen=True)
class Parsed:
    """What a command line came to."""

    settings: Any  # the dataclass instance
    given: dict[str, Any]  # the values that stood on the command line itself, by field


def parse(cls: type, argv: list[str], usage: str) -> Parsed:
    """Read flags into an instance of the dataclass `cls`; what it refuses is a `Fail`, `--help` ends here."""
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
    """An instance of the dataclass `cls`; its defaults, which users edit, are checked by type as well."""
    hints = get_type_hints(cls)
    all_values = {name: values.get(name, getattr(cls, name)) for name in hints}
    with mendable():
        return cls(**{name: coerce(name, value, hints[name]) for name, value in all_values.items()})


def read_settings(path: Path, cls: type) -> dict[str, Any]:
    """The settings in a `config.json`, all of them or the differences only; types are checked by `make`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Fail(f"--config {path} cannot be read as JSON: {error}. Give a run's config.json") from error
    if not isinstance(values, dict):
        raise Fail(f"--config {path} must hold one JSON object of settings; got {type(values).__name__}")
    values = {name: value for name, value in values.items() if name not in NOT_SETTINGS}
    known = get_type_hints(cls)
    for name in values:
        if name not in known:
            raise Fail(f"--config {path} has an unknown setting {name!r}.{near(name, known)}")
    return values


def resumed_settings(
    settings: Any, saved: dict[str, Any], given: dict[str, Any], free: tuple[str, ...]
) -> Any:
    """The settings of a run that goes on: its own, `saved`, and of those given as flags the `free`.

    Prints where today's `settings` differ; one that was given and contradicts the run's is a `Fail`.
    """
    run = make(type(settings), saved)
    today = replace(settings, **given)  # where a size given as one number is height and width
    allowed = ["output_dir", "check", *(name for name in given if name in free)]
    if "epochs" in given and run.scheduler != "poly" and today.epochs > run.epochs:
        allowed.append("epochs")
    for name, own in vars(run).items():
        value = getattr(today, name)
        if name in allowed or name == "resume" or value == own:
            continue
        if name in given:
            why = " and whose poly schedule plans to the last epoch" if name == "epochs" else ""
            raise Fail(
                f"--{name} {value} contradicts the run to resume, which has {own}{why}. "
                "Leave it out to go on, or start a new run from its weights by --init_from"
            )
        if name != "run_name":
            print(f"  {name} stays {own}, as the run began (config.py says {value})")
    return replace(run, **{name: getattr(today, name) for name in allowed})


def quoted(path: Path) -> str:
    """A path as a command line takes it."""
    return f'"{path}"' if " " in str(path) else str(path)


def near(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'unet'?`, or nothing where no name comes close."""
    match = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def _split(argv: list[str], hints: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield (field, words) a flag; `--no-x` yields the word false for a boolean field x."""
    flags: list[list[str]] = []  # each with its words
    for word in argv:
        if word.startswith("--"):
            flags.append(word.split("=", 1))
        elif flags:
            flags[-1].append(word)
        else:
            raise Fail(f"{word!r} stands alone; settings are given as --name value. --help lists them")
    for flag, *words in flags:
        name = flag[2:].replace("-", "_")
        plain = name.removeprefix("no_")
        if name not in hints and hints.get(plain) is bool:
            if words:
                raise Fail(f"--no-{plain} takes no value; got {' '.join(words)}")
            name, words = plain, ["false"]
        if name not in hints:
            raise Fail(f"unknown flag {flag}.{near(name, hints)} --help lists all settings")
        if not words and hints[name] is not bool:
            raise Fail(f"--{name} needs a value; --help says which")
        yield name, words or ["true"]


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> list[str]:
    return [str(c) for option in _options(hint) if get_origin(option) is Literal for c in get_args(option)]


def coerce(name: str, value: Any, hint: Any) -> Any:
    """The value as the type that the field wants, from a command line, from JSON, or from an edited file."""
    for option in sorted(_options(hint), key=lambda option: option is not NoneType):  # "none" is text, too
        try:
            return _convert(value, option)
        except (ValueError, LookupError, OverflowError):
            continue
    several = isinstance(value, (list, tuple)) and len(value) > 1
    shown = " ".join(map(str, value)) if several else str(value)  # (4,) as it stands: a stray comma
    close = near(shown, _choices(hint))
    raise Fail(f"{name} must be {describe(hint)}; got {shown!r}.{close}".removesuffix("."))


def _convert(value: Any, option: Any) -> Any:
    """One type's reading of a value; raises ValueError, LookupError or OverflowError where it has none."""
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
        if isinstance(value, str):  # 255,0,0 or #ff0000, or one name or colour of several
            inner = value.split(",") if kinds[0] in (int, float) else [value]
            value = bytes.fromhex(value[1:]) if kinds[0] is int and value.startswith("#") else inner
        if isinstance(value, (list, tuple, bytes)):
            kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
            if len(kinds) == len(value) > 0:
                return tuple(map(_convert, value, kinds))
    raise ValueError


def describe(hint: Any) -> str:
    """A type in words: `two whole numbers`, `one of unet, fcn`, `a number or none`."""
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
    """Each field with its remark and default, under the headings of the file."""
    lines, remarks = [usage, ""], field_remarks(cls)
    for name, hint in get_type_hints(cls).items():
        heading, remark = remarks[name]
        default, choices = getattr(cls, name), ", ".join(_choices(hint))
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = remark + f" [{choices}]" * bool(choices) + f" (default: {shown})"
        lines += ["", heading] if heading else []
        lines.append(f"  --{name}" + f" / --no-{name}" * (hint is bool))
        lines += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "  --config FILE.json", "      start from these settings instead of the defaults"]
    return "\n".join([*lines, "", "  --help", "      this list"])


def field_remarks(cls: type) -> dict[str, tuple[str, str]]:
    """Field name to (heading that stands above it, remark): the comments of the class's source.

    A remark begins behind its field and goes on in the comments below; one after a blank line is a heading.
    """
    heading, remarks = "", {}
    source = textwrap.dedent(inspect.getsource(cls))
    for part in re.split(r"\n    (?=\w+:)", source):  # the first is what stands above all fields
        field, *below = re.split(r"\n\s*\n", part)
        name = field.partition(":")[0]
        remarks[name] = (heading, " ".join(re.findall(r"  # (.*)", field)))
        headings = re.findall(r"  # (.*)", "\n".join(below))
        heading = headings[-1] if headings else ""
    return remarks
