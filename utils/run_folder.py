"""The folder of a run: creating it, finding it again, and the lock that keeps other processes out."""

import os
import platform
import shutil
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import PIL
import torch

from utils.cli import quoted

try:
    import fcntl
except ImportError:  # Windows, where no lock is taken
    fcntl = None

END_MARK = "report.png"  # written last: a run that has it is finished
LOCK = ".lock"  # locked by the process that trains in the folder


def try_output(output_dir: Path, setting: str = "output_dir") -> None:
    """Raise an OSError now, before the work, if `output_dir`, which need not exist, cannot be written to.

    `setting` is the name of the setting in the message.
    """
    absolute = output_dir.absolute()
    folder = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{setting} {output_dir}: {folder} is a file. Choose another {setting}")
    try:
        TemporaryDirectory(prefix=".writable.", dir=folder).cleanup()
    except OSError as error:
        reason = error.strerror
        raise OSError(
            f"{setting} {output_dir} is not writable: {reason}. Choose another {setting}"
        ) from error


def create_run(output_dir: Path, run_name: str | None, model: str) -> Path:
    """Create a run's folder; `mkdir` decides between runs that start at the same moment."""
    output_dir.mkdir(parents=True, exist_ok=True)
    name = run_name or time.strftime(f"{model}_%Y-%m-%d_%H-%M-%S")
    for ending in [""] if run_name else ["", *(f"_{number}" for number in range(2, 1000))]:
        folder = output_dir / f"{name}{ending}"
        if is_abandoned(folder):
            shutil.rmtree(folder)
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise folder_exists(folder)


def remove_unused(folder: Path | None) -> None:
    """Remove the folder of a run that has failed before it saved anything."""
    if folder and folder.is_dir() and not any(folder.glob("*.pt")) and not (folder / "log.csv").exists():
        shutil.rmtree(folder, ignore_errors=True)


def is_abandoned(folder: Path) -> bool:
    """Return whether the folder is that of a run that was killed before it saved anything."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return "config.json" in names <= {"config.json", "samples", LOCK} and not is_running(folder)


def is_finished(folder: Path) -> bool:
    """Return whether the run in the folder has reached its end."""
    return (folder / END_MARK).exists()


def refuse_finished(folder: Path, epochs: int, can_grow: bool) -> None:
    """Raise ValueError if the run in the folder is finished after `epochs`; it may be able to have more."""
    if is_finished(folder):
        more = f"Give it more epochs (--epochs {2 * epochs}), or start" if can_grow else "Start"
        fix = f"{more} a new run with --init_from {quoted(folder / 'last.pt')}"
        raise ValueError(f"{folder} is finished after {epochs} epochs. {fix}")


def reopen(folder: Path) -> bool:
    """Make a finished run an unfinished one; return whether it was finished."""
    finished = is_finished(folder)
    (folder / END_MARK).unlink(missing_ok=True)
    return finished


def folder_exists(folder: Path) -> ValueError:
    """Return the error for a run_name whose folder exists."""
    unfinished = (folder / "last.pt").exists() and not is_finished(folder)
    resume = f", or continue it with --resume {quoted(folder)}" if unfinished else ""
    return ValueError(
        f"run_name {folder.name!r} exists in {folder.parent}. Choose another, or leave it out{resume}"
    )


def find_run(resume: str, output_dir: Path) -> Path:
    """Return the folder to resume: the one named, or for `auto` the newest unfinished run.

    Raises:
        FileNotFoundError: there is no such run, or it has no checkpoint.
        ValueError: another process trains in it (`auto` passes over such runs).
    """
    if resume == "auto":
        unfinished = [p for p in output_dir.glob("*/last.pt") if not is_finished(p.parent)]
        free = [path for path in unfinished if not is_running(path.parent)]
        if not free:
            raise FileNotFoundError(
                f"{output_dir} has no unfinished run that is not running. Leave resume out to start a new run"
            )
        return max(free, key=os.path.getmtime).parent
    last = (Path(resume).parent if Path(resume).suffix == ".pt" else Path(resume)) / "last.pt"
    if not last.is_file():
        raise FileNotFoundError(f"no checkpoint at {last}. Give resume the folder of a run, or leave it out")
    if is_running(last.parent):
        raise folder_in_use(last.parent)
    return last.parent


def lock(folder: Path) -> ExitStack:
    """Lock a run's folder until the returned stack is closed or the process ends, however it ends.

    Raises:
        ValueError: another process has locked it.
    """
    stack, path = ExitStack(), folder / LOCK

    def remove() -> None:
        with suppress(OSError):
            path.unlink()

    if fcntl:
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone, not of forked ones
        except BlockingIOError:
            raise folder_in_use(folder) from None
        except OSError:  # a file system without locks
            pass
        stack.callback(remove)
    return stack


def is_running(folder: Path) -> bool:
    """Return whether another process has locked the folder; any number of processes may ask at once."""
    if fcntl:
        try:
            with open(folder / LOCK) as file:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:  # another type: there is no such file, or no lock on this file system
            return isinstance(error, BlockingIOError)
    return False


def folder_in_use(folder: Path) -> ValueError:
    """Return the error for a folder in which another process trains."""
    return ValueError(f"another process is training in {folder}. Wait until it ends, or stop it first")


def newest_weights(output_dir: Path) -> Path:
    """Return the best.pt that was written last."""
    found = list(output_dir.glob("*/best.pt"))
    if not found:
        raise FileNotFoundError(
            f"no {output_dir}/*/best.pt. Train first (python train.py), or give weights a checkpoint"
        )
    return max(found, key=os.path.getmtime)


def versions() -> dict[str, str]:
    """Return the versions that the numbers of a run depend on: Python, the system, and packages."""
    packages = {"torch": str(torch.__version__), "numpy": np.__version__, "pillow": PIL.__version__}
    return {"python": platform.python_version(), "system": platform.platform(), **packages}
