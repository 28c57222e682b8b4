"""Which file may import which: scripts import every package, packages import no other, config.py none."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "losses", "metrics", "datasets", "utils")
SCRIPTS = ("train", "predict")
DEPENDENCIES = {"torch", "torchvision", "numpy", "PIL", "matplotlib", "tqdm"}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
PREDICTION = {  # the path from images to scored masks, which both scripts and other code take
    "utils/prediction.py": {"datasets", "metrics", "models"},
    "utils/evaluation.py": {"datasets", "metrics", "models"},
}


def imported(path):
    """Top-level names of the modules that a file imports absolutely, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_package_imports_itself_and_its_dependencies_alone(path):
    name = path.relative_to(ROOT).as_posix()
    allowed = set(sys.stdlib_module_names) | DEPENDENCIES | {name.split("/")[0]}
    assert imported(path) <= allowed | PREDICTION.get(name, set())


@pytest.mark.parametrize("path", sorted((ROOT / "models").rglob("*.py")), ids=lambda path: path.name)
def test_models_import_torch_alone_except_for_public_weights(path):
    assert imported(path) <= set(sys.stdlib_module_names) | {"torch", "torchvision"}


def test_config_imports_the_standard_library_alone():
    assert imported(ROOT / "config.py") <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_does_not_import_the_other(script):
    others = set(SCRIPTS) - {script}
    assert not imported(ROOT / f"{script}.py") & others


def test_torch_load_is_always_called_with_weights_only():
    for path in [*FILES, *(ROOT / f"{script}.py" for script in SCRIPTS)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.jit.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", f"{path}: {ast.unparse(node)}"


def test_importing_the_packages_is_silent_and_does_not_load_slow_dependencies():
    code = (
        "import sys, models, losses, metrics, datasets, utils.optim, utils.visualize, utils.prediction\n"
        "print([name for name in ('torchvision', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
