"""Memory: the peak of a training step, over many epochs, and what many pictures cost; Linux alone.

    python benchmarks/memory.py --parts peak --models unet pspnet_resnet50

- peak: largest resident size of a process after four training steps, ours against the plain way and against
  bf16 with channels_last (steps.py says what these are); the same network and batch. Each round has new
  processes.
- large: the same of ours, UNet at 1024 x 1024, batch 1.
- flat: resident size of a train.py process as each of 100 short epochs begins.
- many: time per picture of train.py on 1,000 and on 10,000 tiny pictures: until the first epoch begins, less
  what that takes with 16 pictures; and training in the last of two epochs.

Goals: ours at most 0.85 of plain; UNet at 1024 x 1024 within 5 GiB; the last tenth of the epochs at most 1.02
times the second tenth; 10,000 pictures at most 1.1 times the time of 1,000 for each.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from timing import (
    machine,
    options,
    print_goals,
    print_table,
    ratios,
    resident,
    rotation,
    spread,
    write_json,
)
from worker import NETWORKS, WAYS, Case, Worker, write_pictures

ROOT = Path(__file__).parent.parent
SMALL = ["--num_classes", "4", "--image_size", "32", "--base_channels", "4", "--batch_size", "16"]


def peak(case: Case) -> int:
    """Bytes, of a new process."""
    with closing(Worker(case)) as worker:
        return worker.steps(2)["peak"]


def measure_peaks(args) -> tuple[dict, list, list]:
    """GiB by network, way and round; rows; goals."""
    found, rows, goals = {}, [], []
    for network in args.models:
        peaks: dict[str, list[float]] = {way: [] for way in args.cases}
        for _, ways in rotation(peaks, args.rounds):
            for way in ways:
                case = Case(network, size=args.size, batch=args.batch, **WAYS[way])
                peaks[way].append(peak(case) / 2**30)
        rows += [(f"{network}, {way}: peak, GiB", spread(values, 2)) for way, values in peaks.items()]
        if "ours" in peaks and "plain" in peaks:
            goals.append((f"{network}: peak / plain's", 0.85, ratios(peaks["ours"], peaks["plain"]), True))
        found[network] = peaks
    return found, rows, goals


def measure_large(args) -> tuple[dict, list, list]:
    peaks = [peak(Case("unet", size=1024, batch=1)) / 2**30 for _ in range(args.rounds)]
    what = "unet, 1024 x 1024, batch 1: peak, GiB"
    return {"unet": peaks}, [(what, spread(peaks, 2))], [(what, 5, peaks, True)]


def run_train(data: Path, epochs: int, folder: str) -> tuple[list[float], list[int], list[dict]]:
    """Seconds after the start and resident bytes, as each epoch begins; and the rows of log.csv."""
    flags = ["--data_root", str(data), "--epochs", str(epochs), "--output_dir", folder, "--run_name", "run"]
    start = time.perf_counter()
    command = [sys.executable, "train.py", *SMALL, *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        moments, sizes = [], []
        for line in process.stdout:
            if line.startswith("Epoch "):
                moments.append(time.perf_counter() - start)
                sizes.append(resident("VmRSS", process.pid))
    if process.returncode:
        raise SystemExit(f"train.py ended with exit code {process.returncode}")
    with open(Path(folder) / "run" / "log.csv", newline="", encoding="utf-8") as file:
        return moments, sizes, list(csv.DictReader(file))


def measure_flat(args) -> tuple[dict, list, list]:
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder) / "data", 32, 8, (48, 48), 4, "png")
        sizes = run_train(Path(folder) / "data", args.epochs, folder)[1]
    tenth = max(1, len(sizes) // 10)
    parts = {"second": sizes[tenth : 2 * tenth], "last": sizes[-tenth:]}
    rows = [
        (f"{name} tenth of {args.epochs} epochs: resident, MiB", spread([size / 2**20 for size in part]))
        for name, part in parts.items()
    ]
    growth = statistics.median(parts["last"]) / statistics.median(parts["second"])
    return {"resident": sizes}, rows, [(f"resident over {args.epochs} epochs", 1.02, [growth], True)]


def measure_many(args) -> tuple[dict, list, list]:
    found: dict[int, dict[str, list[float]]] = {count: {"start": [], "step": []} for count in args.pictures}
    with tempfile.TemporaryDirectory() as folder:
        for count in (16, *args.pictures):
            write_pictures(Path(folder) / f"{count}", count, max(1, count // 10), (32, 32), 4, "png")
        for _, counts in rotation(args.pictures, args.rounds):
            base = run_train(Path(folder) / "16", 2, tempfile.mkdtemp(dir=folder))[0][0]
            for count in counts:
                moments, _, log = run_train(Path(folder) / f"{count}", 2, tempfile.mkdtemp(dir=folder))
                found[count]["start"].append(1000 * (moments[0] - base) / count)
                found[count]["step"].append(1000 / float(log[-1]["images_per_second"]))
    few, many = min(found), max(found)
    what = {"start": "until the first epoch", "step": "training"}
    rows = [
        (f"{count} pictures, {what[part]}: ms a picture", spread(values, 2))
        for count, parts in found.items()
        for part, values in parts.items()
    ]
    goals = [
        (f"{what[part]}, {many} / {few} pictures", 1.1, ratios(found[many][part], found[few][part]), True)
        for part in what
    ]
    return found, rows, goals


PARTS = {"peak": measure_peaks, "large": measure_large, "flat": measure_flat, "many": measure_many}


def main() -> None:
    parser = options(__doc__, "memory", rounds=1)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="*", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    cases = ("ours", "plain", "bf16")
    parser.add_argument("--cases", nargs="*", choices=cases, default=cases, metavar="NAME", help="of peak")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--pictures", type=int, nargs=2, default=[1000, 10000])
    args = parser.parse_args()

    results, rows, goals = {}, [], []
    for part in args.parts:
        results[part], more_rows, more_goals = PARTS[part](args)
        rows, goals = rows + more_rows, goals + more_goals
    print_table(("what", "median (lowest..highest)"), rows)
    print_goals(goals)
    description = machine("segmentation-models-pytorch")
    write_json(args.output, {"settings": vars(args), "machine": description, **results})


if __name__ == "__main__":
    main()
