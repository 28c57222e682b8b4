"""From a dataclass to flags: every field of `Config` and of `Args` can be given on the command line.

A field `image_size: tuple[int, int] = (128, 128)  # height and width` becomes `--image_size 256 256`
(or `--image-size`), a boolean `compile` becomes `--compile` and `--no-compile`, and the remarks `--help`.
Needs the standard library alone, so that `--help` and a wrong flag are answered at once.
"""

import ast
import difflib
import inspect
import io
import json
import signal
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NOT_SETTINGS = ("versions", "why")  # keys of a config.json that say something about the run, but set nothing


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
    config_file: str | None  # of --config


def parse(cls: type, argv: list[str], usage: str) -> Parsed:
    """Read flags into an instance of the dataclass `cls`.

    Raises:
        Fail: an unknown or repeated flag, a value of the wrong type, or a rule of the class itself.
        SystemExit: after `--help`.
    """
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)]
    if "-h" in argv or "--help" in argv:
        print(help_text(cls, usage))
        sys.exit(0)
    values, given, config_file = {}, {}, None
    for name, words in _split(argv, names, hints):
        if name in given or (name == "config" and config_file):
            raise Fail(f"--{name} is given twice; give it once")
        if name == "config":
            config_file = words[0] if len(words) == 1 else ""
            values = read_settings(Path(config_file), cls)
        else:
            given[name] = _from_words(name, words, hints[name])
    return Parsed(make(cls, {**values, **given}), given, config_file)


def make(cls: type, values: dict[str, Any]) -> Any:
    """An instance of the dataclass `cls`; its defaults, which users edit, are checked by type as well."""
    hints = get_type_hints(cls)
    merged = {field.name: field.default for field in fields(cls)} | values
    try:
        return cls(**{name: coerce(name, value, hints[name]) for name, value in merged.items()})
    except ValueError as error:
        raise Fail(str(error)) from error


def read_settings(path: Path, cls: type) -> dict[str, Any]:
    """The settings in a `config.json`, all of them or the differences only; types are checked by `make`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Fail(f"--config {path} cannot be read: {error.strerror}. Give a run's config.json") from error
    except ValueError as error:
        raise Fail(f"--config {path} is not JSON: {error}. Give a run's config.json") from error
    if not isinstance(values, dict):
        raise Fail(f"--config {path} must hold one JSON object of settings; got {type(values).__name__}")
    values = {name: value for name, value in values.items() if name not in NOT_SETTINGS}
    known = [field.name for field in fields(cls)]
    for name in values:
        if name not in known:
            raise Fail(f"--config {path} has an unknown setting {name!r}.{near(name, known)}")
    return values


def resumed_settings(
    settings: Any, saved: dict[str, Any], given: dict[str, Any], free: tuple[str, ...]
) -> Any:
    """The settings of a run that goes on: its own, and those given that may change without changing the run.

    Prints where the settings of today's file differ.

    Args:
        settings: today's, of the class that is returned too.
        saved: the run's own, plain values.
        given: what stood on the command line.
        free: names that change no result.

    Raises:
        Fail: a given setting contradicts the run's.
    """
    cls = type(settings)
    hints = get_type_hints(cls)
    run_is = {name: coerce(name, value, hints[name]) for name, value in saved.items() if name in hints}
    own = {field.name: run_is.get(field.name, field.default) for field in fields(cls)}
    allowed = {"output_dir": settings.output_dir, "check": settings.check}
    today = replace(settings, **given)  # where a size given as one number is height and width
    for name, value in ((name, getattr(today, name)) for name in given):
        longer = name == "epochs" and own["scheduler"] != "poly" and value > own["epochs"]
        if name in free or longer:
            allowed[name] = value
        elif name not in allowed and name != "resume" and value != own[name]:
            why = " and whose poly schedule plans to the last epoch" if name == "epochs" else ""
            raise Fail(
                f"--{name} {value} contradicts the run to resume, which has {own[name]}{why}. "
                "Leave it out to go on, or start a new run from its weights by --init_from"
            )
    for name, value in own.items():
        if (
            name not in allowed
            and name not in given
            and name not in ("run_name", "resume")
            and getattr(settings, name) != value
        ):
            print(f"  {name} stays {value}, as the run began (config.py says {getattr(settings, name)})")
    return make(cls, own | allowed)


def near(word: str, known: list[str]) -> str:
    """` Did you mean 'unet'?`, or nothing where no name comes close."""
    match = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def _split(argv: list[str], names: list[str], hints: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield (field, words) a flag; `--no-x` yields the word false for a boolean field x."""
    known = [*names, "config"] if "config" not in names else names
    at = 0
    while at < len(argv):
        flag, at = argv[at], at + 1
        if not flag.startswith("--") or flag == "--":
            raise Fail(f"{flag!r} stands alone; settings are given as --name value. --help lists them")
        name, equals, first = flag[2:].partition("=")
        name = name.replace("-", "_")
        words = [first] if equals else []
        while at < len(argv) and not argv[at].startswith("--"):
            words.append(argv[at])
            at += 1
        plain = name.removeprefix("no_")
        if name not in known and plain in names and hints[plain] is bool:
            if words:
                raise Fail(f"--no-{plain} takes no value; got {' '.join(words)}")
            name, words = plain, ["false"]
        if name not in known:
            raise Fail(f"unknown flag {flag.partition('=')[0]}.{near(name, known)} --help lists all settings")
        if not words and hints.get(name) is not bool:
            raise Fail(f"--{name} needs a value; --help says which")
        yield name, words or ["true"]


def _from_words(name: str, words: list[str], hint: Any) -> Any:
    """Turn the words after a flag into a value of the field's type."""
    if any(get_origin(option) is tuple for option in _options(hint)):
        none = len(words) == 1 and words[0].lower() == "none" and NoneType in _options(hint)
        value = None if none else words
    elif len(words) > 1:
        raise Fail(f"{name} takes one value; got {len(words)}: {' '.join(words)}")
    else:
        value = words[0]
    return coerce(name, value, hint)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def coerce(name: str, value: Any, hint: Any) -> Any:
    """The value as the type that the field wants, from a command line, from JSON, or from an edited file.

    Raises:
        Fail: the value is none of the types or choices; the message names the field, and a near choice.
    """
    for option in sorted(_options(hint), key=lambda option: option is not NoneType):  # "none" is text, too
        try:
            return _convert(value, option)
        except (ValueError, TypeError, OverflowError):
            continue
    choices = [str(c) for option in _options(hint) if get_origin(option) is Literal for c in get_args(option)]
    shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    hint_near = near(str(shown), choices) if choices else ""
    raise Fail(f"{name} must be {describe(hint)}; got {str(shown)!r}.{hint_near}".removesuffix("."))


def _convert(value: Any, option: Any) -> Any:
    """One type's reading of a value; raises ValueError or TypeError where it is not of that type."""
    if option is NoneType:
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
    elif get_origin(option) is Literal:
        for choice in get_args(option):
            if value == choice and type(value) is type(choice) or value == str(choice):
                return choice
        if isinstance(value, list) and len(value) == 1:
            return _convert(value[0], option)
    elif option is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, bool) or str(value).lower() in words:
            return value if isinstance(value, bool) else words[str(value).lower()]
    elif option is int:
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return int(value)
    elif option is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            number = float(value)
            if number - number == 0:  # neither infinite nor NaN
                return number
    elif option is str:
        if isinstance(value, str):
            return value
    elif get_origin(option) is tuple:
        if isinstance(value, str):  # inside a nested tuple: 255,0,0 or #ff0000
            value = list(bytes.fromhex(value[1:])) if value.startswith("#") else value.split(",")
        if isinstance(value, (list, tuple)):
            inner = get_args(option)
            kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
            if len(kinds) == len(value) > 0:
                return tuple(_convert(v, kind) for v, kind in zip(value, kinds, strict=True))
    raise ValueError


def describe(hint: Any) -> str:
    """A type in words: `two whole numbers`, `one of unet, fcn`, `a number or none`."""
    words = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            choices = get_args(option)
            words.append(("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices)))
        elif get_origin(option) is tuple:
            inner = get_args(option)
            many = "" if inner[-1] is Ellipsis else {2: "two ", 3: "three "}.get(len(inner), f"{len(inner)} ")
            plural = {int: "whole numbers", float: "numbers", str: "names"}
            words.append(many + plural.get(inner[0], "colours (255,0,0 or '#ff0000')"))
        else:
            plain = {
                int: "a whole number",
                float: "a number",
                str: "text",
                bool: "true or false",
                NoneType: "none",
            }
            words.append(plain[option])
    return " or ".join(words)


def help_text(cls: type, usage: str) -> str:
    """Each field with its remark and default, under the headings of the file."""
    hints, remarks = get_type_hints(cls), field_remarks(cls)
    lines = [usage, ""]
    for field in fields(cls):
        heading, remark = remarks[field.name]
        if heading:
            lines += ["", heading]
        flag = f"--{field.name} / --no-{field.name}" if hints[field.name] is bool else f"--{field.name}"
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        choices = [c for o in _options(hints[field.name]) if get_origin(o) is Literal for c in get_args(o)]
        text = remark + (f" [{', '.join(map(str, choices))}]" if choices else "") + f" (default: {default})"
        lines.append(f"  {flag}")
        lines += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if "config" not in hints:
        lines += ["", "  --config FILE.json", "      start from these settings instead of the defaults"]
    return "\n".join(lines + ["", "  --help", "      this list"])


def field_remarks(cls: type) -> dict[str, tuple[str, str]]:
    """Field name to (heading that stands above it, remark): the comments of the class's source.

    A remark begins behind its field and goes on in the comments below; one after a blank line is a heading.
    """
    source = textwrap.dedent(inspect.getsource(cls))
    ends = {}  # last line of a field: its name
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            ends[node.end_lineno] = node.target.id
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    remarks: dict[str, tuple[str, str]] = {}
    heading, name = "", None
    for number, line in enumerate(source.splitlines(), start=1):
        if number in ends:
            name = ends[number]
            remarks[name], heading = (heading, comments.get(number, "")), ""
        elif line.strip().startswith("#") and name:
            above, remark = remarks[name]
            remarks[name] = (above, f"{remark} {comments[number]}".lstrip())
        elif line.strip().startswith("#"):
            heading = comments[number]
        elif not line.strip():
            name = None
    return remarks
