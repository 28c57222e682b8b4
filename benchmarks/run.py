"""The benchmarks by name: `python benchmarks/run.py steps --models unet`; each has its own `--help`.

steps    a training step of each network against the plain way, peers and the machine's own limit
losses   losses, class ids and the confusion matrix against other libraries'
data     from files to batches
predict  from pictures to masks
train    whole processes: an epoch and its validation against segmentation_models.pytorch and a plain script
scores   mean IoU with the switches for speed on and off, over some seeds
startup  --help, wrong settings, imports, the way to the first step
memory   peak, flatness over epochs, cost of many pictures
gpu      everything on a GPU in nine minutes: limits, tests, steps, a peer, compile, data, CamVid

What peers need is in benchmarks/requirements.txt; without one, its rows say so.
"""

import runpy
import sys
from pathlib import Path

NAMES = [line.split()[0] for line in __doc__.splitlines()[2:11]]


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in NAMES:
        print(__doc__)
        sys.exit(0 if arguments in ([], ["-h"], ["--help"]) else f"no benchmark {arguments[0]!r}")
    script = Path(__file__).parent / f"{arguments[0]}.py"
    sys.argv = [str(script), *arguments[1:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
