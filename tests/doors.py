"""train.py and predict.py as processes, forked from one that has loaded torch; on Windows, started anew."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")


def warm_up():
    """Let the process that others are forked from load, beside the first tests, what takes seconds."""
    if os.name == "posix":
        from multiprocessing.forkserver import ensure_running

        CONTEXT.set_forkserver_preload(["torch._dynamo", "matplotlib.figure"])
        ensure_running()


def fork(call, arguments, log, **environment):
    """Start `call(*arguments)` with more in its environment; it prints to `log`.out and `log`.err."""
    process = CONTEXT.Process(target=_printing_to, args=(str(log), environment, call, arguments))
    process.start()
    return process


def start(words, folder, log, **environment):
    """Start `python WORDS` in `folder`, likewise."""
    return fork(_door, (list(words), str(folder)), log, **environment)


def run(words, folder, log):
    """The exit code of `python WORDS`, and what it printed to stdout and to stderr."""
    process = start(words, folder, log)
    process.join(600)
    if process.is_alive():
        process.kill()
    return process.exitcode, *(Path(f"{log}.{end}").read_text(errors="replace") for end in ("out", "err"))


def _printing_to(log, environment, call, arguments):
    os.environ.update(environment)
    for number, end in ((1, "out"), (2, "err")):
        with open(f"{log}.{end}", "wb") as file:
            os.dup2(file.fileno(), number)
    call(*arguments)


def _door(words, folder):
    os.chdir(folder)
    sys.path.insert(0, folder)  # where a door finds its rooms
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
