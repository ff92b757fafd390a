"""Installs the root folders as one importable package, `handtuned`.

Each top-level folder is one floor of the house (see README.md); the mapping
below makes `kernels/nf4.py` importable as `handtuned.kernels.nf4`, and
`notebooks/lessons/` as `handtuned.lessons`.
"""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
FOLDERS = {
    "handtuned": "handtuned",
    **{f"handtuned.{floor}": floor for floor in ("kernels", "quant", "amp", "optim", "nn")},
    "handtuned.lessons": "notebooks/lessons",
    "handtuned.lessons.exercises": "notebooks/lessons/exercises",
}
PARTS = find_packages(str(HERE), include=["handtuned.*"])  # of handtuned/ itself, which need no mapping

version = re.search(r'^__version__ = "(.+)"', (HERE / "handtuned" / "__init__.py").read_text(encoding="utf-8"), re.M)[1]

extras = {
    "finetune": [
        "transformers>=5.0",
        "tokenizers",
        "safetensors",
        "gguf",
        "accelerate",
        "tqdm",
        "matplotlib",
        "regex",
    ],
    "data": ["datasets"],
    "notebooks": ["jupyterlab", "jupytext", "ipykernel", "matplotlib", "nbclient", "peft"],
    "test": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "bitsandbytes",
        "peft",
        "psutil",
        "pyarrow",
        "optuna",
        "tensorboard",
        "ipykernel",
        "jupytext",
        "nbclient",
        "regex",
    ],
    "tune": ["optuna"],
    "dev": ["ruff"],
}

# NF4 on CPUs. Without a C compiler the torch reference runs instead.
native = Extension(
    "handtuned.kernels._nf4_cpu",
    sources=["kernels/nf4_cpu.c"],
    depends=["kernels/nf4_kinds.h", "kernels/nf4_tile.h"],
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off"],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(
    name="handtuned",
    version=version,
    description="Every technique for training big models on small memory, with kernels written by hand in Triton",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*FOLDERS, *PARTS],
    package_dir=FOLDERS,
    ext_modules=[native],
    package_data={"handtuned.datasets": ["*.jsonl"]},
    install_requires=["torch>=2.11", "numpy", 'triton>=3.6; platform_system == "Linux"'],
    extras_require=extras,
    entry_points={"console_scripts": ["handtuned = handtuned.cli:main"]},
)
