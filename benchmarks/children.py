"""Measurements in a child process, which may crash, hang or run out of memory without harm to the rest.

The parent needs the standard library alone. Children are forked from a server process that has imported torch
but never used CUDA, so that a new one starts in a fraction of a second; `spawn` is the alternative where a
forked process cannot use the GPU. A child's output is appended to a log file.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PRELOADED = ["torch", "torch._dynamo", "matplotlib.figure", "torchvision.models.segmentation", "pytest"]
PRELOADED += [
    "gpu_steps",
    "gpu_forms",
    "gpu_training",
    "train",
    "predict",
]  # none of these touches the CUDA driver: a test holds that
REASON = 300  # characters


@dataclass(frozen=True)
class Settings:
    """What a measurement is told: the command's settings.

    Attributes:
        device: cuda, cuda:1 or cpu.
        size: height and width of the images, pixels.
        batch: images per step.
        product: side of the square matrices whose product rate is the limit.
        steps: timed steps per network.
        camvid: folder of CamVid; None for generated images.
        network: trained on CamVid.
        resume: folder of the run to continue there.
        runs: folder of the training runs.
        output: the JSON; small files of the training runs are copied beside it.
        scratch: folder for anything that is not kept.
    """

    device: str
    size: int
    batch: int
    product: int
    steps: int
    camvid: str | None
    network: str
    resume: str | None
    runs: str
    output: str
    scratch: str

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA device."""
        return self.device.startswith("cuda")


class NotHere(Exception):
    """Raised by a measurement that this device, or this version of the code, has nothing to measure for."""


def make_context(method: str = "forkserver") -> multiprocessing.context.BaseContext:
    """Return the way in which children are started; `method` is forkserver or spawn."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        from multiprocessing.forkserver import ensure_running

        context.set_forkserver_preload(PRELOADED)
        before = os.environ.copy()
        folders = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))  # the server has another sys.path
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # `is_available` without the CUDA driver
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # killed children leave semaphores
        ensure_running()
        os.environ.clear()
        os.environ.update(before)
    return context


class Child:
    """A process that runs measurements, one after the other.

    Attributes:
        broken: a measurement failed: memory may still be held, or the CUDA context be unusable.
    """

    def __init__(self, context: multiprocessing.context.BaseContext, log: Path) -> None:
        self._pipe, theirs = context.Pipe()
        self._log, self.broken = log, False
        self.process = context.Process(target=_serve, args=(theirs, str(log)))
        self.process.start()
        theirs.close()

    def run(
        self, function: str, arguments: dict[str, Any], seconds: float, values: dict[str, Any]
    ) -> tuple[str, str]:
        """Run a function.

        Args:
            function: its module and name, with a dot between. It is called with `report`, which takes a dict
                of values, and with `arguments`.
            arguments: keyword arguments, picklable, `settings` among them.
            seconds: after which the process is killed.
            values: receives what is reported, at once, so that a killed measurement leaves what it had.

        Returns:
            Status (done, failed) and the reason, or a note, or an empty string.
        """
        deadline = time.monotonic() + seconds
        try:
            self._pipe.send((function, arguments))
            while self._pipe.poll(max(0.0, deadline - time.monotonic())):
                kind, content = self._pipe.recv()
                if kind != "values":
                    self.broken = kind == "failed"
                    return kind, content
                values |= content
        except (EOFError, OSError):
            return "failed", self._why_it_ended()
        self.kill()
        return "failed", f"stopped: not finished after its {seconds:.0f} s"

    def _why_it_ended(self) -> str:
        self.broken = True
        self.process.join(5)
        code = self.process.exitcode
        why = f"with exit code {code}"
        if code is not None and code < 0:
            why = f"by signal {-code} ({signal.Signals(-code).name})"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else ""
        self.kill()
        return f"the process was ended {why}; last line of its output: {last}"[:REASON]

    def kill(self) -> None:
        """End the process and those that it started, at once."""
        self.broken = True
        with suppress(OSError):
            self._pipe.close()
        with suppress(OSError):  # it has ended, or has no process group of its own yet
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(OSError):
            self.process.kill()
        self.process.join(10)

    def close(self) -> None:
        """Let the process end; kill it where it does not."""
        with suppress(OSError):
            self._pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.kill()


def _serve(pipe: Connection, log: str) -> None:
    """Run what comes through the pipe, until it is closed."""
    os.setpgid(0, 0)  # whoever kills this process finds those that it started by the group
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()  # where a crash happened, in the log
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        print(f"--- {name}", flush=True)
        pipe.send(_outcome(name, arguments, lambda values: pipe.send(("values", plain(values)))))
        sys.stdout.flush()


def _outcome(name: str, arguments: dict[str, Any], report: Callable[[dict], None]) -> tuple[str, str]:
    """Call a function on its device; return status and reason, or a note."""
    try:
        importlib.import_module("gpu_runs").use(arguments["settings"].device)
        module, _, function = name.rpartition(".")
        getattr(importlib.import_module(module), function)(report=report, **arguments)
    except NotHere as note:
        return "done", str(note)
    except BaseException as error:  # SystemExit too: a test runner, or train.py, that ends early
        traceback.print_exc()
        return "failed", reason(error)
    return "done", ""


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as JSON has them: torch's own kinds of text and number become plain ones."""
    return json.loads(json.dumps(values, default=str))


def reason(error: BaseException) -> str:
    """Return an exception in one line: type, message, and the innermost line of the project."""
    message = next(iter(str(error).strip().splitlines()), "")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    where = f" ({Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {message}"[: REASON - len(where)] + where


def _end_with_parent(parent: int) -> None:
    """End this process's group once its parent has gone, whatever it is computing."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
