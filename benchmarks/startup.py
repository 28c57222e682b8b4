"""Start-up: help and errors, imports, and the way to the first training step; a process each time.

    python benchmarks/startup.py --rounds 5

Whole processes, from start to exit: `--help`, settings that train.py refuses, `import torch` alone, and
`from models import UNet`. Of a training run on mock_data: from torch being imported to the first call of the
network in training mode, where the run ends; once in a new output folder, whose data check begins at nothing,
and once in one that knows the data.

Goals: help and every settings error within 0.5 s; `from models import UNet` at most 1.1 times `import torch`;
the first training step within 1.5 s.
"""

from __future__ import annotations

import builtins
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import machine, options, print_goals, print_table, ratios, rotation, spread, write_json

ROOT = Path(__file__).parent.parent
TORCH, MODELS = "import torch", "from models import UNet"
NEW, KNOWN = "to the first step, new output folder", "to the first step, data known"
CASES = {  # arguments of python
    "train.py --help": ["train.py", "--help"],
    "predict.py --help": ["predict.py", "--help"],
    "a wrong name": ["train.py", "--model", "unett"],
    "a wrong pair": ["train.py", "--model", "unet", "--backbone", "resnet18"],
    "no such data folder": ["train.py", "--data_root", "nowhere"],
    "no such checkpoint": ["train.py", "--resume", "nowhere"],
    TORCH: ["-c", TORCH],
    MODELS: ["-c", MODELS],
    NEW: [__file__, "--first-step", "--output_dir"],
    KNOWN: [__file__, "--first-step", "--output_dir"],
}


def first_step(flags: list[str]) -> None:
    """Run train.py; print the seconds from torch to the first call of a network in training mode, and end."""
    real, moments = builtins.__import__, []

    def watched(name, *rest, **more):
        first = name.split(".")[0] == "torch" and "torch" not in sys.modules
        module = real(name, *rest, **more)
        if first:
            moments.append(time.perf_counter())
            builtins.__import__ = real
            sys.modules["torch"].nn.modules.module.register_module_forward_pre_hook(begin)
        return module

    def begin(module, inputs):
        if module.training and not inputs[0].is_meta:
            print(time.perf_counter() - moments[0], flush=True)
            os._exit(0)

    builtins.__import__ = watched
    sys.path.insert(0, str(ROOT))
    sys.argv = ["train.py", *flags]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def seconds_of(name: str, folder: Path) -> float:
    """Seconds of one run."""
    command = [sys.executable, *CASES[name]]
    if name in (NEW, KNOWN):
        command.append(tempfile.mkdtemp(dir=folder) if name == NEW else str(folder / "known"))
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode not in (0, 2):
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr}")
    return float(done.stdout.split()[-1]) if name in (NEW, KNOWN) else seconds


def main() -> None:
    if sys.argv[1:2] == ["--first-step"]:
        first_step(sys.argv[2:])
    parser = options(__doc__, "startup")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), metavar="NAME")
    args = parser.parse_args()

    seconds: dict[str, list[float]] = {name: [] for name in args.cases}
    with tempfile.TemporaryDirectory() as folder:
        for turn, names in rotation(args.cases, 1 + args.rounds):  # the first one warms the file cache
            for name in names:
                value = seconds_of(name, Path(folder))
                if turn:
                    seconds[name].append(value)
    description = machine("torchvision", "matplotlib")
    print(f"{args.rounds} rounds")
    print_table(("what", "seconds"), [(name, spread(values, 2)) for name, values in seconds.items()])
    goals = [(name, 0.5, seconds[name], True) for name in list(CASES)[:6] if name in seconds]
    if TORCH in seconds and MODELS in seconds:
        goals.append((f"{MODELS} / {TORCH}", 1.1, ratios(seconds[MODELS], seconds[TORCH]), True))
    goals += [(name, 1.5, seconds[name], True) for name in (NEW, KNOWN) if name in seconds]
    print_goals(goals)
    write_json(args.output, {"settings": vars(args), "machine": description, "seconds": seconds})


if __name__ == "__main__":
    main()
