"""train.py and predict.py as processes, forked from one that has loaded torch; on Windows, started anew."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    CONTEXT.set_forkserver_preload(["torch._dynamo", "matplotlib.figure"])  # what takes seconds to load


def start(words, folder, log):
    """Start `python WORDS` in `folder`; what it prints goes to `log` with the endings .out and .err."""
    process = CONTEXT.Process(target=_run, args=(list(words), str(folder), str(log)))
    process.start()
    return process


def run(words, folder, log):
    """The exit code of `python WORDS`, and what it printed to stdout and to stderr."""
    process = start(words, folder, log)
    process.join(600)
    if process.is_alive():
        process.kill()
    return process.exitcode, *(Path(f"{log}.{end}").read_text(errors="replace") for end in ("out", "err"))


def _run(words, folder, log):
    for number, end in ((1, "out"), (2, "err")):
        with open(f"{log}.{end}", "wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
