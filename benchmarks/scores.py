"""What the switches for speed cost in score: train.py as it comes against all of them off, over some seeds.

    python benchmarks/scores.py --seeds 0 1 2 -- --config benchmarks/recipes/camvid.json --epochs 10

What stands behind `--` goes to train.py; without it mock_data is trained on. `on` is the defaults (mixed
precision where it helps, channels_last, the cache); `off` is float32 in contiguous memory, each picture
decoded anew. The score is the best validation's mean IoU, as the run reports it.

Goal: the means differ by at most twice the standard error of their difference, so that noise explains it.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import machine, options, print_goals, print_table, spread, write_json

ROOT = Path(__file__).parent.parent
WAYS = {"on": [], "off": ["--amp", "off", "--channels_last", "false", "--cache", "off"]}


def train(flags: list[str]) -> dict[str, float]:
    """Seconds of a whole run, and its best mean IoU."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *flags, "--output_dir", folder, "--run_name", "run"]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"train.py ended with exit code {done.returncode}")
        with open(Path(folder) / "run" / "log.csv", newline="", encoding="utf-8") as file:
            scores = [float(row["mean_iou"]) for row in csv.DictReader(file) if row["mean_iou"]]
    return {"seconds": seconds, "mean_iou": max(scores)}


def main() -> None:
    parser = options(__doc__, "scores", rounds=1)
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=[0, 1, 2], help="two at least; rounds of each"
    )
    parser.add_argument("flags", nargs="*", help="of train.py, behind --")
    args = parser.parse_args()
    if len(args.seeds) < 2:
        parser.error("the spread between seeds takes two of them at least")

    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for seed in args.seeds * args.rounds:
        for way, switches in WAYS.items():
            runs[way].append({"seed": seed} | train([*args.flags, *switches, "--seed", str(seed)]))
    scores = {way: [run["mean_iou"] for run in found] for way, found in runs.items()}
    print_table(
        ("switches", "mean IoU, by seed", "mean", "standard deviation", "seconds a run"),
        [
            (
                way,
                ", ".join(f"{score:.4f}" for score in scores[way]),
                f"{statistics.mean(scores[way]):.4f}",
                f"{statistics.stdev(scores[way]):.4f}",
                spread([run["seconds"] for run in runs[way]], 1),
            )
            for way in WAYS
        ],
    )
    error = sum(statistics.variance(found) / len(found) for found in scores.values()) ** 0.5
    apart = abs(statistics.mean(scores["on"]) - statistics.mean(scores["off"]))
    print(f"standard error of the difference of the means: {error:.4f}")
    print_goals([("mean IoU, on against off: difference / its standard error", 2, [apart / error], True)])
    write_json(args.output, {"settings": vars(args), "machine": machine(), "runs": runs})


if __name__ == "__main__":
    main()
