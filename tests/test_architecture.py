"""The house's floors, arrows and laws (README, "How it is built"), read from the source."""

import ast
import os
import re
import subprocess
import sys

import pytest
from handtuned.kernels import nf4_cpu
from source_tree import ROOT, References, package, scripts

from handtuned.cli import COMMANDS

# Floor → the floors that it may import. The commands stand on all of them, the lessons on the commands.
MAY_IMPORT = {
    "kernels": set(),
    "quant": {"kernels"},
    "optim": {"kernels", "quant"},
    "amp": {"kernels", "quant", "optim"},
    "nn": {"kernels", "quant"},
}
PUBLIC = {
    "kernels": "backend",
    "kernels.lora": "lora_linear",
    "quant": "NF4_CODE quantize_nf4 dequantize_nf4 NF4Tensor quantize_affine dequantize_affine NF4Linear "
    "NF4Experts quantize_model load_quantized quantization_summary",
    "nn": "LoRALayer LoRALinear apply_lora_to_model mark_only_lora_as_trainable lora_parameters merge_lora "
    "unmerge_lora disable_lora save_adapter load_adapter set_adapter manual_checkpoint_forward checkpoint "
    "checkpoint_sequential TransformerBlock CheckpointedTransformerLayer linear_cross_entropy",
    "amp": "FloatFormat describe autocast GradScaler scaled_matmul MasterWeights MixedPrecisionTrainer",
    "optim": "AdamW AdamW8bit cosine_with_warmup GradientAccumulationTrainer ZeroOptimizer",
    "memory": "estimate measure analyze_lora_params analyze_memory_savings",
    "gpu": "emulate KernelFault",
}
OPTIONAL = {"transformers", "tokenizers", "safetensors", "huggingface_hub", "gguf", "tqdm", "matplotlib", "peft",
            "bitsandbytes", "regex",
            "datasets", "pyarrow", "optuna", "tensorboard", "wandb", "IPython", "jupytext", "jupyter_client",
            "nbclient", "nbformat"}  # fmt: skip
LINES = 350

PACKAGE = package()
FILES = {module.path for module in PACKAGE.values()}
REFERENCES = References(PACKAGE)


@pytest.fixture(scope="module", autouse=True)
def syntax_trees():
    """A million objects, which every collection of garbage would look through in the tests behind these."""
    yield
    for module in (*PACKAGE.values(), *TESTS, *BENCHMARKS, *NOTEBOOKS):
        vars(module).pop("tree", None), vars(module).pop("definitions", None)


TESTS, BENCHMARKS, NOTEBOOKS = scripts("tests/*.py"), scripts("benchmarks/*.py"), scripts("notebooks/*.py")
KERNELS = [
    module
    for module in PACKAGE.values()
    if module.path.parent == ROOT / "kernels" and "@triton.jit" in module.text and module.path.stem != "runtime"
]
COMMAND_MODULES = {f"handtuned.{module}" for module, _ in COMMANDS.values()}


def each(modules):
    return pytest.mark.parametrize("module", modules, ids=lambda module: str(module.path.relative_to(ROOT)))


def is_reference(name):
    """`lora_linear_reference`, `unscale_reference_` (in place), or a class `GradScalerReference`."""
    return name.rstrip("_").lower().endswith("reference")


def first_definition(module):
    return next(node.name for node in module.tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))


def floor_of(dotted):
    """ "handtuned.quant.nf4" → "quant", "handtuned.training.loop" → "handtuned", "torch.nn" → None."""
    first, _, rest = dotted.partition(".")
    if first != "handtuned":
        return None
    part = rest.partition(".")[0]
    return part if part in (*MAY_IMPORT, "lessons") else "handtuned"


def home_of(dotted):
    """The module of the package that something imported is, or stands in."""
    while dotted and dotted not in PACKAGE:
        dotted = dotted.rpartition(".")[0]
    return dotted


@each(PACKAGE.values())
def test_arrows_point_one_way(module):
    floor = floor_of(module.name)
    allowed = {floor, *MAY_IMPORT.get(floor, MAY_IMPORT)} | ({"handtuned"} if floor == "lessons" else set())
    for dots, name, _ in module.imports:
        assert dots or name.split(".")[0] not in {"handtuned", *MAY_IMPORT}, f"{name} is not imported relatively"
        reached = floor_of(name) if dots else None
        # The package itself offers its version to every floor.
        if reached and home_of(name) != "handtuned":
            assert reached in allowed, f"{floor} imports {name}"


@each([*PACKAGE.values(), *TESTS, *BENCHMARKS, *NOTEBOOKS])
def test_what_is_used_of_the_package_is_there(module):
    """Inside functions and cells that only a GPU runs, too. One name comes from a file in C."""
    missing = sorted(set(REFERENCES.missing(module)) - {"handtuned.kernels._nf4_cpu"})
    assert not missing, "there is no " + ", ".join(missing)


@each([module for module in PACKAGE.values() if floor_of(module.name) == "handtuned"])
def test_inside_handtuned_nothing_imports_a_command(module):
    """Neither a part (training/, memory/, gpu/) nor another command; cli calls them by name."""
    for _, name, _ in module.imports:
        assert home_of(name) not in COMMAND_MODULES - {module.name}, f"{module.name} imports the command {name}"


def test_what_stands_directly_in_handtuned_is_a_command():
    loose = {f"handtuned.{path.stem}" for path in (ROOT / "handtuned").glob("*.py")} - COMMAND_MODULES
    assert loose == {"handtuned.__init__", "handtuned.__main__", "handtuned.cli"}, "the rest belongs into a folder"


@each(PACKAGE.values())
def test_nothing_looks_up_into_the_checkout(module):
    """An installed package has no checkout around it: what a command needs from there is an argument."""
    assert "parents[" not in module.text and "__file__).parent.parent" not in module.text


@each([*PACKAGE.values(), *TESTS, *BENCHMARKS])
def test_files_stay_small(module):
    count = len(module.text.splitlines())
    assert count <= LINES, f"{count} lines; the limit is {LINES}"


@each([*PACKAGE.values(), *TESTS, *BENCHMARKS])
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(module.tree), "no docstring"


@each(KERNELS)
def test_a_kernel_file_begins_with_its_reference(module):
    first = first_definition(module)
    assert is_reference(first), f"{first} stands before the naive torch version"


def test_the_reading_order_meets_the_naive_version_first():
    """Each file of README's reading order: nothing is defined before the version of the study documents, put right."""
    order = re.search(r"A good order to read them: (.*)", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    files = re.findall(r"`([\w/]+\.py)`", order)
    assert len(files) == 8
    for file in files:
        module = next(module for module in PACKAGE.values() if module.path == ROOT / file)
        first = first_definition(module)
        # manual_checkpoint_forward has the documents' name and Function.
        assert is_reference(first) or (file, first) == ("nn/checkpoint.py", "_RecomputeFunction"), f"{file}: {first}"


@each(KERNELS)
def test_a_kernel_file_has_a_test_and_a_benchmark_of_its_name(module):
    for path in (f"tests/test_{module.path.stem}.py", f"benchmarks/bench_{module.path.stem}.py"):
        assert (ROOT / path).is_file(), f"{path} is missing"


def roots():
    """Where reading begins: what a user, a lesson or a benchmark calls, and what runs when a module is imported."""
    page = (ROOT / "docs" / "from-peft.md").read_text(encoding="utf-8")
    promised = set(re.findall(r"\w+", " ".join(re.findall(r"```python\n# handtuned.*?```|`[^`\n]+`", page, re.S))))
    found = {REFERENCES.find(f"handtuned.{part}.{name}") for part, names in PUBLIC.items() for name in names.split()}
    found |= {(command, name) for command in COMMAND_MODULES for name in ("add_arguments", "run")}
    found.add(("handtuned.cli", "main"))
    for module in PACKAGE.values():
        if floor_of(module.name) == "lessons":
            found |= REFERENCES.of(module, module.tree)
        for node in module.top_level_code:
            found |= REFERENCES.of(module, node)
        for name in module.definitions:
            named = name.startswith("__") or is_reference(name)  # references are there to be compared with
            if named or (name in promised and floor_of(module.name) == "nn"):
                found.add((module.name, name))
    for script in [*NOTEBOOKS, *BENCHMARKS]:
        found |= REFERENCES.of(script, script.tree)
    return found


def test_the_public_names_are_there():
    missing = [f"handtuned.{part}.{name}" for part, names in PUBLIC.items() for name in names.split()
               if REFERENCES.find(f"handtuned.{part}.{name}") is None]  # fmt: skip
    assert not missing


def test_something_reaches_every_name():
    """A command, a lesson, a benchmark, a public name or docs/from-peft.md, through any number of calls."""
    reached = REFERENCES.reached({place for place in roots() if place is not None})
    dead = [f"{module.name}.{name}" for module in PACKAGE.values() if floor_of(module.name) != "lessons"
            for name in module.definitions if (module.name, name) not in reached]  # fmt: skip
    assert not dead, "nothing but tests uses " + ", ".join(dead)


def run_python(code, **environment):
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


@pytest.mark.parametrize("folder", ["quant", "lessons"])
def test_bare_folder_names_are_not_importable(folder, tmp_path):
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and f"No module named '{folder}'" in done.stderr


def test_version_is_told():
    import handtuned

    done = subprocess.run([sys.executable, "-m", "handtuned", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"handtuned {handtuned.__version__}"


TRAINING_ROW = """
import sys, torch
from handtuned.nn import apply_lora_to_model
from handtuned.quant import NF4Linear
model = torch.nn.Sequential(NF4Linear.from_linear(torch.nn.Linear(128, 128)))
apply_lora_to_model(model, 8, 16, ["0"])
files, x = set(), torch.randn(64, 128, requires_grad=True)
def note(frame, event, argument):
    if event == "call":
        files.add(frame.f_code.co_filename)
model(x).sum().backward()
sys.setprofile(note)
model(x).sum().backward()
sys.setprofile(None)
print(*files, sep="\\n")
"""


@pytest.mark.skipif(nf4_cpu.LEVEL == nf4_cpu.PLAIN, reason="torch multiplies, by way of the dense weight")
def test_a_training_row_passes_seven_files():
    """Forward and backward through LoRA on NF4, on a CPU (README, "How it is built")."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "HANDTUNED_BACKEND")}
    done = subprocess.run([sys.executable, "-c", TRAINING_ROW], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    ours = {os.path.relpath(file, ROOT) for file in done.stdout.splitlines() if file in map(str, FILES)}
    assert len(ours) <= 7, sorted(ours)
    assert "kernels/lora.py" in ours
