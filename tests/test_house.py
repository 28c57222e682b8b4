"""Who may import whom: two doors know every room, no room knows another, config.py knows nobody."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("models", "losses", "metrics", "datasets", "utils")
DOORS = ("train", "predict")
PACKAGES = {"torch", "torchvision", "numpy", "PIL", "matplotlib", "tqdm"}
ROOM_FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path):
    """Top-level names of the modules that a file imports absolutely, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", ROOM_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_imports_itself_and_packages_alone(path):
    room = path.relative_to(ROOT).parts[0]
    allowed = set(sys.stdlib_module_names) | PACKAGES | {room}
    assert imported(path) <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "models").rglob("*.py")), ids=lambda path: path.name)
def test_models_import_torch_alone_but_for_public_weights(path):
    assert imported(path) <= set(sys.stdlib_module_names) | {"torch", "torchvision"}


def test_config_imports_the_standard_library_alone():
    assert imported(ROOT / "config.py") <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("door", DOORS)
def test_a_door_does_not_import_the_other(door):
    others = set(DOORS) - {door}
    assert not imported(ROOT / f"{door}.py") & others


def test_no_file_outside_the_doors_calls_torch_load_unsafely():
    for path in [*ROOM_FILES, *(ROOT / f"{door}.py" for door in DOORS)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.jit.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", f"{path}: {ast.unparse(node)}"


def test_importing_the_rooms_is_silent_and_does_not_load_slow_packages():
    code = (
        "import sys, models, losses, metrics, datasets, utils.optim, utils.visualize, utils.inference\n"
        "print([name for name in ('torchvision', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
