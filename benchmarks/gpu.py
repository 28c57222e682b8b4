"""All that is to be measured on a GPU, in one command of a few minutes, the most telling first.

    python benchmarks/gpu.py --minutes 9 --camvid data/camvid --output benchmarks/results/gpu-h100.json
    python benchmarks/gpu.py --only camvid --minutes 5 --camvid data/camvid --network pspnet_resnet50
    python benchmarks/gpu.py --device cpu --size 64 --minutes 1

The first command works through the items of `--list`; the second trains the next network; the third runs the
same code on a CPU. Each item has its share of the minutes. Its measurements run in child processes: an
error, a crash, out of memory or a measurement that takes too long becomes a row with its reason, and the
next one begins. A row is printed, and the JSON written anew, as each measurement ends; the children's output
goes to a .log file beside the JSON. When the minutes are over, the rows that are left say "out of time".
The item `camvid` uses all the time that is left, and copies log.csv and report.png beside the JSON.

Goals on an H100, bf16, 512 x 512, batch 16: 45 % of torch.mm's rate for UNet, 35 % for DeepLabv3+ ResNet50
and PSPNet ResNet50; 1.3 times the FLOP/s of torchvision's deeplabv3_resnet50 in a plain loop of the same
flags; data waited for in less than 2 % of the time; no step makes the host wait. Needs torch, torchvision and
pytest.
"""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from children import ROOT, Child, Settings, make_context
from timing import print_table, save_json

DEEPLAB = "deeplabv3plus_resnet50"
FIVE = ("unet", DEEPLAB, "pspnet_resnet50", "fcn", "segnet")
MINUTES = 9.0  # that the items' seconds are meant for
LEAST = 0.5  # seconds that a measurement is begun with
RESERVE = 2.0  # seconds to end in
START = 90.0  # seconds that the first child may take: it imports torch, on a machine with a cold disk
PATHS = ("camvid", "resume", "runs", "output", "scratch")  # of one machine, and not written
GOALS = {"unet": 0.45, DEEPLAB: 0.35, "pspnet_resnet50": 0.35}  # share of torch.mm's rate


@dataclass(frozen=True)
class Task:
    """One measurement and one row: a function, `module.name`, and its own arguments."""

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """Measurements that answer one question.

    Attributes:
        seconds: their share of nine minutes.
        about: the question.
        tasks: in order.
        alone: each has a process of its own, where memory, compiled graphs or a crash would not be shared.
        conclude: from the values of the tasks by name to those of one more row; None for no such row.
    """

    seconds: float
    about: str
    tasks: tuple[Task, ...]
    alone: bool = False
    conclude: Callable[[dict[str, dict]], dict[str, Any]] | None = None


def compare_peers(found: dict[str, dict]) -> dict[str, float]:
    """How many times the images per second, and the FLOP/s, of torchvision's loop ours reach."""
    peer, values = found.get("torchvision", {}), {}
    for name in ("ours", "train.py"):
        for what in ("images_per_second", "tflops"):
            if what in peer and what in found.get(name, {}):
                values[f"{name}: times torchvision's {what}"] = found[name][what] / peer[what]
    return values | {"goal for tflops": 1.3}


def judge_steps(found: dict[str, dict]) -> dict[str, Any]:
    """Share of torch.mm's rate against the goals."""
    return {
        name: f"{found[name]['share_of_mm']:.2f} of {goal}"
        for name, goal in GOALS.items()
        if "share_of_mm" in found.get(name, {})
    }


def pair(network: str, op: str) -> Task:
    """A step of a network with the fast and the plain form of an operator."""
    return Task(f"{op}, {network}", "gpu_forms.form_of_step", {"network": network, "op": op})


def epoch_task(network: str, moves: str, workers: int | None = None, cache: str = "auto") -> Task:
    """Epochs with data; workers None: as train.py chooses."""
    name = f"{network}, {moves}, workers {'auto' if workers is None else workers}, cache {cache}"
    arguments = {"network": network, "moves": moves, "workers": workers, "half": network == "unet"}
    return Task(name, "gpu_training.epochs", {**arguments, "cache": cache})


def epoch_tasks() -> tuple[Task, ...]:
    """Epochs by augmentation, network, number of workers and cache."""
    ways = [{}, {"cache": "off"}, {"workers": 8}, {"workers": 0}]
    return tuple(
        epoch_task(network, moves, **way)
        for way in ways
        for moves in ("zoom, colour, rotation", "zoom, colour")[: 1 if "cache" in way else 2]
        for network in ("unet", DEEPLAB)
    )


def resize_task(channels: int, small: int, to: int) -> Task:
    """Resizing (N, channels, small, small) to `to`, at size 512."""
    arguments = {"channels": channels, "small": small, "to": to}
    return Task(f"resize {channels} channels {small} to {to}", "gpu_forms.form_of_resize", arguments)


def single(function: str) -> tuple[Task, ...]:
    """The task of an item that has only one."""
    return (Task(function.partition(".")[2], function),)


def compile_task(network: str, mode: str | None) -> Task:
    """A compiled step; mode None: the setting `compile`."""
    arguments = {"network": network, "mode": mode}
    return Task(f"{network}, {mode or 'setting compile'}", "gpu_steps.compiled", arguments)


ITEMS = {
    "limits": Item(10, "versions, card, rates of products, copies and launches", single("gpu_steps.limits")),
    "tests": Item(40, "the gpu tests that do not compile", single("gpu_training.gpu_tests"), alone=True),
    "waits": Item(25, "where an epoch and a validation wait for the GPU", single("gpu_training.waits")),
    "steps": Item(
        110,
        "train.py's step of the five networks: time, rate, kernels, memory",
        tuple(Task(name, "gpu_steps.steps", {"network": name}) for name in FIVE),
        alone=True,
        conclude=judge_steps,
    ),
    "peer": Item(
        30,
        "torchvision's deeplabv3_resnet50 and our DeepLabv3+ in the same loop",
        tuple(Task(way, "gpu_steps.peer", {"way": way}) for way in ("torchvision", "ours", "train.py")),
        conclude=compare_peers,
    ),
    "ab": Item(
        60,
        "two forms of one thing: operators, loss, batch sizes, memory layout",
        (
            resize_task(12, 128, 512),
            resize_task(256, 32, 128),
            Task("loss, 12 classes", "gpu_forms.form_of_loss", {"classes": 12}),
            Task("loss, 150 classes", "gpu_forms.form_of_loss", {"classes": 150}),
            Task("sums by label", "gpu_forms.sums_by_label"),
            pair("pspnet_resnet50", "upsample_concat_conv"),
            pair(DEEPLAB, "upsample_concat_conv"),
            pair(DEEPLAB, "resize"),
            pair("segnet", "unpool"),
            Task(f"moving average, {DEEPLAB}", "gpu_steps.ema_cost", {"network": DEEPLAB}),
            Task("batch, unet", "gpu_steps.batches", {"network": "unet", "half": True}),
            Task(f"batch, {DEEPLAB}", "gpu_steps.batches", {"network": DEEPLAB, "half": False}),
            Task("layout, unet", "gpu_forms.layouts", {"network": "unet"}),
        ),
    ),
    "compile": Item(
        70,
        "train.py's step compiled",
        tuple(compile_task(network, mode) for mode in (None, "reduce-overhead") for network in FIVE[:2]),
        alone=True,
    ),
    "data": Item(40, "epochs with data, and the loader alone", epoch_tasks()),
    "validation": Item(20, "train.py's validation and predict.py", single("gpu_training.validation")),
    "camvid": Item(150, "training on CamVid for the time left", single("gpu_training.camvid"), alone=True),
}


class Session:
    """One call of this command: its deadline, its child process, and the rows so far."""

    def __init__(self, settings: Settings, minutes: float, started: float) -> None:
        self.settings, self.deadline = settings, started + 60 * minutes - RESERVE
        self.log = Path(settings.output).with_suffix(".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self.context = make_context()
        self.child: Child | None = None
        self.rows: list[dict[str, Any]] = []
        shown = {name: value for name, value in asdict(settings).items() if name not in PATHS}
        shown |= {"minutes": minutes, "camvid": settings.camvid is not None}
        self.results: dict[str, Any] = {"settings": shown, "machine": None}
        self.results |= {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "rows": self.rows}

    def describe(self) -> str:
        """Look at the machine in a child; returns why the device cannot be used, or an empty string."""
        for method in ("forkserver", "spawn"):
            values: dict[str, Any] = {}
            began = time.monotonic()
            status, why = self.measure(Task("", "gpu_steps.describe"), START, values)
            if status == "done":
                self.results |= values | {"processes": method, "start_seconds": time.monotonic() - began}
                return ""
            self.context = make_context("spawn")  # where CUDA and the fork do not go together
        return why

    def measure(self, task: Task, seconds: float, values: dict[str, Any]) -> tuple[str, str]:
        """Run a task in the present child, or in a new one; returns status and reason."""
        try:
            self.child = self.child or Child(self.context, self.log)
            arguments = {"settings": self.settings, "seconds": seconds, **task.arguments}
            return self.child.run(task.function, arguments, seconds, values)
        except OSError as error:  # no process could be started
            return "failed", str(error)
        finally:
            if self.child and self.child.broken:
                self.end_child()

    def end_child(self, at_once: bool = False) -> None:
        """End the present child, which is idle or to be ended at once; the next task has a new one."""
        child, self.child = self.child, None
        if child is not None:
            child.kill() if at_once or child.broken else child.close()

    def work_through(self, names: list[str]) -> None:
        """Run items in order, each for its share of the time that is left at the start."""
        planned = start = time.monotonic()
        scale = max(0.0, self.deadline - start) / sum(ITEMS[name].seconds for name in names)
        for name in names:
            seconds = scale * ITEMS[name].seconds
            planned += seconds
            last = name == names[-1]
            end = self.deadline if last else min(planned, time.monotonic() + 1.5 * seconds)
            self.run_item(name, end)

    def run_item(self, name: str, end: float) -> None:
        """Run an item's tasks until `end`; none may take much more than its part of the time."""
        item = ITEMS[name]
        found: dict[str, dict] = {}
        if item.alone:
            self.end_child()
        for number, task in enumerate(item.tasks):
            began, values = time.monotonic(), {}
            left, parts = end - began, len(item.tasks) - number
            if left < LEAST:
                self.add_row(name, task.name, "out of time", "", 0.0, values)
                continue
            status, why = self.measure(task, left * min(1.0, max(2.5 / parts, 1 / 3)), values)
            self.add_row(name, task.name, status, why, time.monotonic() - began, values)
            found[task.name] = values
            if item.alone:
                self.end_child()
        if item.conclude and (values := item.conclude(found)):
            self.add_row(name, "conclusion", "done", "", 0.0, values)

    def add_row(
        self, item: str, row: str, status: str, why: str, seconds: float, values: dict[str, Any]
    ) -> None:
        """Print a row, and write the JSON with all rows so far."""
        about = {"item": item, "row": row, "status": status, "reason": why, "seconds": round(seconds, 2)}
        self.rows.append({**about, "values": values})
        save_json(self.settings.output, self.results)
        text = "; ".join(filter(None, (why, in_short(values))))
        print(f"| {item} | {row} | {status} | {seconds:.1f} | {text} |", flush=True)


def in_short(values: dict[str, Any], most: int = 280) -> str:
    """The numbers and words among some values; the JSON has the rest."""
    parts = []
    for name, value in values.items():
        if isinstance(value, bool | str | int):
            parts.append(f"{name} {value}")
        elif isinstance(value, float):
            parts.append(f"{name} {value:.4g}")
        elif isinstance(value, dict) and value:
            parts.append(f"{name} ({in_short(value, 120)})")
    text = ", ".join(parts).replace("|", "/")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def print_steps(rows: list[dict[str, Any]]) -> None:
    """Print a table of the networks' steps, as the README has it."""
    keys = ("batch", "ms", "images_per_second", "tflops", "share_of_mm", "idle_share", "kernels", "peak_gib")
    table = [
        (row["row"], *(f"{row['values'][key]:.3g}" if key in row["values"] else "" for key in keys))
        for row in rows
        if row["item"] == "steps" and "ms" in row["values"]
    ]
    if table:
        print()
        print_table(("network", *keys), table)


def read_arguments() -> argparse.Namespace:
    """The command line; what is wrong ends the program with one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything, start included")
    parser.add_argument("--camvid", help="folder of CamVid: {train,val}/{images,masks}, 11 classes")
    parser.add_argument("--output", default="benchmarks/results/gpu.json")
    parser.add_argument("--only", nargs="+", metavar="ITEM", help="these items, in the order of --list")
    parser.add_argument("--list", action="store_true", help="list the items and their seconds, and end")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=512, help="height and width of the images, pixels")
    parser.add_argument("--batch", type=int, help="images per step; 16, on a CPU 2")
    parser.add_argument("--product", type=int, help="side of the matrices; 8192, on a CPU 512")
    parser.add_argument("--steps", type=int, default=20, help="timed per network")
    parser.add_argument("--network", default=DEEPLAB, help=f"of the item camvid: {', '.join(FIVE)}")
    parser.add_argument("--resume", metavar="RUN", help="folder of an interrupted run that camvid continues")
    parser.add_argument("--runs", default=str(ROOT / "runs"), help="folder of camvid's training runs")
    args = parser.parse_args()
    if problem := next(problems(args), None):
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    return args


def problems(args: argparse.Namespace):
    """What is wrong with the arguments, one message each."""
    for given, known, what in ((args.only or [], ITEMS, "item"), ([args.network], FIVE, "network")):
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                yield f"no {what} {name!r}; expected one of {', '.join(known)}.{hint}"
    if args.minutes <= 0:
        yield f"--minutes must be more than 0; got {args.minutes:g}"
    for name in ("size", "batch", "product", "steps"):
        least, value = 32 if name == "size" else 1, getattr(args, name)
        if value is not None and value < least:
            yield f"--{name} must be {least} or more; got {value}"
    if args.camvid and not Path(args.camvid, "train", "images").is_dir():
        yield f"--camvid {args.camvid} has no train/images. Give the folder of train and val, or leave it out"
    if args.resume and not Path(args.resume, "last.pt").is_file():
        yield f"--resume {args.resume} has no last.pt. Give the folder of an interrupted run"


def settings_of(args: argparse.Namespace, scratch: str) -> Settings:
    """The settings that travel to the children, with the device's defaults and absolute paths."""
    on_gpu = args.device.startswith("cuda")
    paths = {
        name: str(Path(value).absolute()) if (value := getattr(args, name)) else None for name in PATHS[:-1]
    }
    return Settings(
        device=args.device,
        size=args.size,
        batch=args.batch or (16 if on_gpu else 2),
        product=args.product or (8192 if on_gpu else 512),
        steps=args.steps,
        network=args.network,
        scratch=scratch,
        **paths,
    )


def interrupt(number: int, _: object) -> None:
    """End by SIGTERM as by Ctrl-C: with what there is written."""
    raise KeyboardInterrupt(number)


def main() -> int:
    started = time.monotonic()
    args = read_arguments()
    if args.list:
        print_table(
            ("item", "seconds of nine minutes", "rows", "what it answers"),
            [(name, f"{item.seconds:g}", len(item.tasks), item.about) for name, item in ITEMS.items()],
        )
        return 0
    names = [name for name in ITEMS if not args.only or name in args.only]
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as scratch:
        session = Session(settings_of(args, scratch), args.minutes, started)
        try:
            if why := session.describe():
                hint = "--device cpu --size 64 runs the same code on a CPU"
                print(f"error: device {args.device!r} cannot be used: {why}. {hint}", file=sys.stderr)
                return 2
            print_table(("item", "row", "status", "seconds", "values"), [])
            session.work_through(names)
        except KeyboardInterrupt as error:
            session.end_child(at_once=True)
            session.add_row("", "", "interrupted", "", 0.0, {})
            return 128 + (error.args[0] if error.args else signal.SIGINT)
        finally:
            session.end_child()
    print_steps(session.rows)
    minutes = (time.monotonic() - started) / 60
    save_json(args.output, session.results | {"minutes_taken": minutes})
    print(f"written to {args.output} after {minutes:.1f} minutes; the children's output: {session.log}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main())
