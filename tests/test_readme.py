"""Every command and every example of the README runs, in a copy of the repository."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import doors
import pytest

import train
from config import Config

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
INLINE = re.findall(r"`(python (?:train|predict)\.py [^`]*)`", TEXT)


@pytest.fixture
def copy(tmp_path):
    """The repository without what runs wrote, and a `my_data` as the README supposes it."""
    folder = tmp_path / "repo"
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "predictions", "__pycache__", "venv")
    )
    shutil.copytree(folder / "mock_data", folder / "my_data")
    return folder


def in_a_shell(command, folder, python=""):
    """As a shell runs it, where a pattern without quotes would become many words."""
    program, rest = command.split(" ", 1)
    assert program == "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        f'"{sys.executable}" {python} {rest}',
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def run(command, folder):
    """By the words that a shell makes of it, in a process that has loaded torch: code, stdout, stderr."""
    told = in_a_shell(command, folder, '-c "import json, sys; print(json.dumps(sys.argv[1:]))"')
    return doors.run(json.loads(told.stdout), folder, folder / "printed")


@pytest.mark.slow
def test_the_commands_run_in_their_order_and_the_first_reaches_080(copy):
    lines = [line for line in COMMANDS if re.match(r"python (train|predict)\.py", line)]
    assert lines[:2] == ["python train.py", "python predict.py"]

    train_as_it_stands = in_a_shell(lines[0], copy)
    assert train_as_it_stands.returncode == 0, train_as_it_stands.stderr
    (folder,) = [path for path in (copy / "runs").iterdir() if path.name.startswith("unet_")]
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        assert max(float(row["mean_iou"]) for row in csv.DictReader(file)) >= 0.80
    assert (folder / "report.png").stat().st_size > 10_000

    predict_as_it_stands = in_a_shell(lines[1], copy)
    assert predict_as_it_stands.returncode == 0, predict_as_it_stands.stderr
    assert len(list((copy / "predictions" / "masks").glob("*.png"))) == 3
    assert len(list((copy / "predictions" / "overlays").glob("*.png"))) == 3

    for line in lines[2:]:
        if "--resume" in line:
            newest = max((copy / "runs").glob("*/last.pt"), key=lambda path: path.stat().st_mtime_ns)
            (newest.parent / "report.png").unlink()  # as if it had been stopped before the end
        elif "train.py" in line:
            for flag in ("--epochs 1", "--image_size 64", "--batch_size 20"):
                line += f" {flag}" if flag.split()[0] not in line else ""
        code, printed, errors = run(line, copy)
        assert code == 0, f"{line}\n{printed[-2000:]}{errors[-2000:]}"
        assert "Traceback" not in errors


def test_the_commands_within_sentences_are_understood(copy):
    (copy / "runs" / "mine").mkdir(parents=True)
    (copy / "runs" / "mine" / "config.json").write_text("{}")
    assert INLINE
    for command in INLINE:
        code, _, errors = run(command + (" --check" if "--config" in command else ""), copy)
        assert code == 0, f"{command}\n{errors}"


def test_the_examples_in_python_run(copy):
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(examples) == 2
    data, runs = str(copy / "mock_data"), str(copy / "runs")
    train.main(Config(data_root=data, output_dir=runs, run_name="mine", epochs=1, image_size=32))
    examples[0] = "import torch\nimages = torch.zeros(1, 3, 64, 64)\n" + examples[0]
    examples[1] += "assert ids.ndim == 2\n"
    for code in examples:
        (copy / "example.py").write_text(code, encoding="utf-8")
        code, _, errors = doors.run(["example.py"], copy, copy / "printed")
        assert code == 0, errors


def test_every_file_that_the_readme_names_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_requirements_are_plain_lower_bounds_of_the_six_packages():
    lines = (ROOT / "requirements.txt").read_text(encoding="ascii").split("\n")
    names = {re.split(r"[>=;]", line)[0] for line in lines if line}
    assert names == {"torch", "torchvision", "numpy", "Pillow", "matplotlib", "tqdm"}
    assert all(">=" in line for line in lines if line)
