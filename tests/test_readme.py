"""Every command and every example of the README runs, in a copy of the repository."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
INLINE = re.findall(r"`(python (?:train|predict)\.py [^`]*)`", TEXT)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository without what runs wrote, and a `my_data` as the README supposes it."""
    folder = tmp_path_factory.mktemp("readme") / "repo"
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "predictions", "__pycache__", "venv")
    )
    shutil.copytree(folder / "mock_data", folder / "my_data")
    return folder


def run(command, folder):
    """As a shell runs it, where a pattern without quotes would become many words."""
    program, rest = command.split(" ", 1)
    assert program == "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        f'"{sys.executable}" {rest}',
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_the_commands_run_in_their_order_and_the_first_reaches_080(copy):
    doors = [line for line in COMMANDS if re.match(r"python (train|predict)\.py", line)]
    assert doors[:2] == ["python train.py", "python predict.py"]
    for number, line in enumerate(doors):
        if "--resume" in line:
            newest = max((copy / "runs").glob("*/last.pt"), key=lambda path: path.stat().st_mtime_ns)
            (newest.parent / "report.png").unlink()  # as if it had been stopped before the end
        short = number > 0 and "train.py" in line and "--resume" not in line  # the first runs as it stands
        size = "" if "--image_size" in line else " --image_size 64"
        done = run(line + (f" --epochs 1{size}" if short else ""), copy)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
        if line == "python train.py":
            (folder,) = [path for path in (copy / "runs").iterdir() if path.name.startswith("unet_")]
            with open(folder / "log.csv", newline="", encoding="utf-8") as file:
                assert max(float(row["mean_iou"]) for row in csv.DictReader(file)) >= 0.80
            assert (folder / "report.png").stat().st_size > 10_000
        if line == "python predict.py":
            assert len(list((copy / "predictions" / "masks").glob("*.png"))) == 3
            assert len(list((copy / "predictions" / "overlays").glob("*.png"))) == 3


def test_the_commands_within_sentences_are_understood(copy):
    for command in INLINE:
        if "--config" in command:
            (copy / "runs" / "mine").mkdir(parents=True, exist_ok=True)
            target = copy / "runs" / "mine" / "config.json"
            if not target.exists():
                target.write_text("{}")
            command += " --check"
        done = run(command, copy)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_the_examples_in_python_run(copy):
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(examples) == 2
    start = "import torch\nimages = torch.zeros(1, 3, 64, 64)\n"
    prepared = (
        "import sys, train\nfrom config import Config\n"
        "if not __import__('pathlib').Path('runs/mine/best.pt').exists():\n"
        "    train.main(Config(epochs=1, run_name='mine_too'))\n"
        "    __import__('shutil').copytree('runs/mine_too', 'runs/mine', dirs_exist_ok=True)\n"
    )
    for code in (start + examples[0], prepared + examples[1] + "assert ids.ndim == 2\n"):
        done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_file_that_the_readme_names_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_requirements_are_plain_lower_bounds_of_the_six_packages():
    lines = (ROOT / "requirements.txt").read_text(encoding="ascii").split("\n")
    names = {re.split(r"[>=;]", line)[0] for line in lines if line}
    assert names == {"torch", "torchvision", "numpy", "Pillow", "matplotlib", "tqdm"}
    assert all(">=" in line for line in lines if line)
