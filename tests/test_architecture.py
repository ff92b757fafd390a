"""The house's floors and arrows (README, "How it is built")."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "kernels": set(),
    "quant": {"kernels"},
    "amp": {"kernels"},
    "optim": {"kernels"},
    "nn": {"kernels", "quant"},
    "handtuned": {"kernels", "quant", "amp", "optim", "nn"},
}
OPTIONAL = {"transformers", "tokenizers", "safetensors", "gguf", "tqdm", "matplotlib", "peft", "bitsandbytes",
            "optuna", "tensorboard", "wandb", "IPython", "jupytext", "jupyter_client", "nbclient",
            "nbformat"}  # fmt: skip
# Folder → dots that lead from its modules to the package.
LESSONS = {"notebooks/lessons": 2, "notebooks/lessons/exercises": 3}
LINES = 350


def modules(floor):
    return sorted((ROOT / floor).glob("*.py"))


def imports(path):
    """(depth of the dots, dotted name) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                yield node.level, f"{base}.{alias.name}".strip(".")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name


FLOORS = [path for floor in MAY_IMPORT for path in modules(floor)]
ALL = FLOORS + [path for folder in LESSONS for path in modules(folder)]


@pytest.mark.parametrize("path", FLOORS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_arrows_point_one_way(path):
    floor = path.parent.name
    for level, name in imports(path):
        first = name.split(".")[0]
        if floor == "handtuned":
            reached = first if level == 1 and first in MAY_IMPORT else None
            assert level < 2, f"{path.name} imports from outside the package"
        else:
            reached = first if level == 2 else None
            assert level < 3
        if reached is not None:
            assert reached in MAY_IMPORT[floor], f"{floor}/{path.name} imports {reached}"
        if level == 0:
            assert first != "handtuned", f"{path} imports handtuned by its absolute name"
            assert first not in MAY_IMPORT, f"{path} imports the bare top-level folder {first}"
        assert not (floor == "handtuned" and level == 1 and first == "lessons"), "the lessons stand on top of all"


@pytest.mark.parametrize("folder", LESSONS)
def test_lessons_import_relatively_from_within_the_package(folder):
    for path in modules(folder):
        for level, name in imports(path):
            first = name.split(".")[0]
            assert level <= LESSONS[folder], f"{path.name} imports from outside the package"
            if level == 0:
                assert first != "handtuned", f"{path} imports handtuned by its absolute name"
                assert first not in MAY_IMPORT, f"{path} imports the bare top-level folder {first}"


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_stay_small(path):
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert count <= LINES, f"{path.name} has {count} lines; the limit is {LINES}"


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_module_says_what_it_is(path):
    if path.read_text(encoding="utf-8").strip():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


def run_python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_pain_17_library_imports_without_triton_gpu_or_extras():
    """kernels, quant, amp, optim and nn need torch and numpy alone."""
    hidden = sorted(OPTIONAL | {"triton"})
    code = f"""
import sys
for name in {hidden!r}:
    sys.modules[name] = None
import handtuned, handtuned.kernels, handtuned.quant, handtuned.amp, handtuned.optim, handtuned.nn, handtuned.cli
import handtuned.lessons
import importlib, pkgutil
for floor in ("kernels", "quant", "amp", "optim", "nn"):
    package = importlib.import_module(f"handtuned.{{floor}}")
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"handtuned.{{floor}}.{{found.name}}")
for number in range(13):
    handtuned.lessons.exercises_of(f"{{number:02d}}")
import torch
from handtuned.kernels import backend
print(backend(torch.empty(0)))
"""
    done = run_python(code, HANDTUNED_BACKEND="", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch"


def test_bare_folder_names_are_not_importable(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import quant"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0 and "No module named 'quant'" in done.stderr


def test_version_is_told():
    import handtuned

    for command in ([sys.executable, "-m", "handtuned", "--version"],):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.strip() == f"handtuned {handtuned.__version__}"
