"""Every command and every example of the README runs, in a copy of the repository."""

import csv
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import doors
import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train
from config import Config
from datasets import parse_labels
from utils.cli import Fail, parse

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
INLINE = re.findall(r"`(python (?:train|predict)\.py [^`]*)`", TEXT)
FLAGS = sorted(set(re.findall(r"`(--[^`]*)`", TEXT)))
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
NEW_FILES = [code for code in PYTHON if re.match(r"# (models|losses)/", code)]  # of what a reader may add


@pytest.fixture
def copy(tmp_path):
    """The repository without what runs wrote, and the data that the README supposes."""
    folder = tmp_path / "repo"
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "predictions", "__pycache__", "venv")
    )
    for name in ("my_data", "my_binary_data"):
        shutil.copytree(folder / "mock_data", folder / name)
    for mask in (folder / "my_binary_data").glob("*/masks/*.png"):
        Image.fromarray(np.uint8(255) * (np.asarray(Image.open(mask)) > 0)).save(mask)
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


def run_torchrun(command, folder):
    """On as many machines as it names, all of them this one, with one process each."""
    machines = int(dict(re.findall(r"--(\w+) (\S+)", command)).get("nnodes", 1))
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    if machines > 1:
        command = re.sub(r"--nproc_per_node \d+", "--nproc_per_node 1", command)
        command = re.sub(r"--rdzv_endpoint \S+", f"--rdzv_endpoint localhost:{port}", command)
    words = [find_spec("torch.distributed.run").origin, *command.split()[1:], "--device", "cpu"]
    logs = [folder / f"printed_{machine}" for machine in range(machines)]
    started = [doors.start(words, folder, log, OMP_NUM_THREADS="1") for log in logs]
    for process in started:
        process.join(300)
    printed, errors = ("".join(Path(f"{log}.{end}").read_text() for log in logs) for end in ("out", "err"))
    return max(process.exitcode for process in started), printed, errors


@pytest.mark.slow
def test_the_commands_run_in_their_order_and_the_first_reaches_080(copy):
    elsewhere = r"pip install|python -m pytest|torchrun --nproc"  # run by .ci/run and test_distributed.py
    lines = [line for line in COMMANDS if not re.match(elsewhere, line)]
    assert lines[0] == "python train.py" and "python predict.py" in lines

    train_as_it_stands = in_a_shell(lines[0], copy)
    assert train_as_it_stands.returncode == 0, train_as_it_stands.stderr
    (folder,) = [path for path in (copy / "runs").iterdir() if path.name.startswith("unet_")]
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        assert max(float(row["mean_iou"]) for row in csv.DictReader(file)) >= 0.80
    assert (folder / "report.png").stat().st_size > 10_000

    for line in lines[1:]:
        if "--export" in line and torch.__version__ < "2.14":  # it says that it needs that
            continue
        if "--resume" in line:
            newest = max((copy / "runs").glob("*/last.pt"), key=lambda path: path.stat().st_mtime_ns)
            (newest.parent / "report.png").unlink()  # as if it had been stopped before the end
        elif "train.py" in line:
            for flag in ("--epochs 1", "--image_size 64", "--batch_size 20"):
                line += f" {flag}" if flag.split()[0] not in line else ""
        several, before = line.startswith("torchrun"), {*(copy / "runs").iterdir()}
        code, printed, errors = (run_torchrun if several else run)(line, copy)
        assert code == 0, f"{line}\n{printed[-2000:]}{errors[-2000:]}"
        assert "Traceback" not in errors
        if several:  # one run, with one writer
            (made,) = {*(copy / "runs").iterdir()} - before
            assert (made / "report.png").exists() and printed.count("Epoch 1/1") == 1
        if line == "python predict.py":
            assert len(list((copy / "predictions" / "masks").glob("*.png"))) == 3
            assert len(list((copy / "predictions" / "overlays").glob("*.png"))) == 3


def test_the_commands_within_sentences_are_understood(copy):
    (copy / "runs" / "mine").mkdir(parents=True)
    (copy / "runs" / "mine" / "config.json").write_text("{}")
    assert INLINE
    for command in INLINE:
        code, _, errors = run(command + (" --check" if "--config" in command else ""), copy)
        assert code == 0, f"{command}\n{errors}"


def test_the_examples_in_python_run(copy):
    examples = [code for code in PYTHON if code not in NEW_FILES]
    assert len(examples) == 2
    data, runs = str(copy / "mock_data"), str(copy / "runs")
    train.main(Config(data_root=data, output_dir=runs, run_name="mine", epochs=1, image_size=32))
    examples[0] = "import torch\nimages = torch.zeros(1, 3, 64, 64)\n" + examples[0]
    examples[1] += "assert ids.ndim == 2\n"
    for code in examples:
        (copy / "example.py").write_text(code, encoding="utf-8")
        code, _, errors = doors.run(["example.py"], copy, copy / "printed")
        assert code == 0, errors


@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_that_the_readme_names_takes_the_value_it_gives(flags):
    words = shlex.split(flags)
    if words[1:] or words == ["--check"]:
        try:
            parse_labels(parse(Config, words, "").settings.labels)
        except Fail as of_training:
            if "unknown flag" not in str(of_training):
                raise
            parse(predict.Args, words, "")
    else:
        name = words[0].removeprefix("--no-").removeprefix("--")
        assert hasattr(Config, name) or hasattr(predict.Args, name)


def add_model_and_loss(copy):
    """Follow the README: two new files, their lines in the registries, their names in config.py."""
    config = (copy / "config.py").read_text(encoding="utf-8")
    for code in NEW_FILES:
        package, stem, name = re.match(r"# (\w+)/(\w+)\.py.*?class (\w+)", code, re.S).groups()
        (copy / package / f"{stem}.py").write_text(code, encoding="utf-8")
        lines = rf'from .{stem} import {name}\n\n\g<0>    "{stem}": {name},\n'
        init = (copy / package / "__init__.py").read_text(encoding="utf-8")
        init = re.sub(rf"^{package.upper()}\b.*{{\n", lines, init, flags=re.M)
        (copy / package / "__init__.py").write_text(init, encoding="utf-8")
        for setting in {"models": ["model"], "losses": ["loss", "joint_ce"]}[package]:
            config = config.replace(f"    {setting}: Literal[", f'    {setting}: Literal["{stem}", ')
    (copy / "config.py").write_text(config, encoding="utf-8")


def test_the_model_the_loss_and_the_format_that_the_readme_adds_train(copy):
    assert len(NEW_FILES) == 2
    add_model_and_loss(copy)
    file = copy / "datasets" / "reading.py"
    for table, entry in (("SUFFIXES", '".jp2"'), ("FORMATS", '"JPEG2000"')):
        assert f"`{entry}`" in TEXT and f"`{table}`" in TEXT
        code = file.read_text(encoding="utf-8")
        file.write_text(code.replace(f"\n{table} = (", f"\n{table} = ({entry}, "), encoding="utf-8")
    picture = copy / "mock_data" / "train" / "images" / "03.png"
    Image.open(picture).save(picture.with_suffix(".jp2"))
    picture.unlink()
    for loss in ("--loss brier", "--loss joint --joint_ce brier"):
        command = f"python train.py --model plain {loss} --epochs 1 --image_size 64 --batch_size 20"
        code, _, errors = run(command, copy)
        assert code == 0, errors


@pytest.mark.slow
def test_the_model_and_the_loss_that_the_readme_adds_pass_the_tests(copy):
    add_model_and_loss(copy)
    done = in_a_shell('python -m pytest -q -p no:cacheprovider -m "not slow" -k "plain or brier" tests', copy)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


def test_every_file_that_the_readme_names_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_every_heading_that_the_readme_points_to_is_there():
    headings = re.findall(r"^## (.*)$", TEXT, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_requirements_are_plain_lower_bounds_of_the_six_packages():
    lines = (ROOT / "requirements.txt").read_text(encoding="ascii").split("\n")
    names = {re.split(r"[>=;]", line)[0] for line in lines if line}
    assert names == {"torch", "torchvision", "numpy", "Pillow", "matplotlib", "tqdm"}
    assert all(">=" in line for line in lines if line)
