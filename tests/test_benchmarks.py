"""The benchmarks at their smallest: each still runs and writes what it measured."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import doors
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = ["--size", "64", "--batch", "2", "--rounds", "1"]
SMALLEST = {
    "steps": ["--models", "separable_resnet18", "--cases", "ours", "plain", "--product", "64", *SMALL],
    "losses": ["--shapes", "1x3x32x32", "--layouts", "NHWC", "--losses", "joint", "--rounds", "1"],
    "data": ["--photos", "0", "--samples", "4", "--size", "32", "--rounds", "1"],
    "train": [
        "--cases",
        "script",
        "--network",
        "separable_resnet18",
        "--pictures",
        "4",
        "2",
        "--workers",
        "0",
    ]
    + SMALL,
    "scores": ["--rounds", "1", "--seeds", "0", "1"]
    + ["--", "--image_size", "32", "--base_channels", "4", "--epochs", "1"],
    "startup": ["--cases", "train.py --help", "--rounds", "1"],
    "memory": ["--parts", "peak", "--models", "separable_resnet18", "--cases", "ours", *SMALL],
}


@pytest.fixture
def run(monkeypatch):
    """Call benchmarks/run.py's main."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])  # last: some share a name with a room
    monkeypatch.setattr(sys, "argv", [])
    import run

    return run.main


def forked(command, cwd=doors.ROOT, **_):
    """As subprocess.run, by a process that has loaded torch."""
    python, *words = command
    assert python == sys.executable
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.CompletedProcess(command, *doors.run(words, str(cwd), Path(folder) / "log"))


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_writes_its_measurements_and_the_machine(name, run, tmp_path, capsys, monkeypatch):
    if name in ("scores", "train"):  # startup is about the start itself
        monkeypatch.setattr(subprocess, "run", forked)
    output = tmp_path / "out.json"
    run([name, "--output", str(output), *SMALLEST[name]])
    found = json.loads(output.read_text())
    assert found["machine"]["cores"] > 0
    assert found["machine"]["versions"]["torch"]
    assert found["settings"]["rounds"] == 1
    assert "| --- |" in capsys.readouterr().out


def test_the_entry_knows_every_script_and_names_them_for_a_wrong_name(run, capsys):
    import run as entry

    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {"run", "timing", "worker"}
    scripts -= {"children", "profiling", "gpu_runs", "gpu_steps", "gpu_forms", "gpu_training"}  # of gpu.py
    assert set(entry.NAMES) == scripts
    with pytest.raises(SystemExit, match="no benchmark 'step'"):
        run(["step"])
    assert "steps " in capsys.readouterr().out


def test_a_worker_that_fails_ends_the_benchmark(run, tmp_path):
    with pytest.raises(SystemExit, match="ended before its time"):
        run(["steps", *SMALLEST["steps"], "--size", "8", "--output", str(tmp_path / "out.json")])
