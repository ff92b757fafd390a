"""What a run leaves behind beside the adapter: run.json, metrics.jsonl, loss.png."""

import importlib.util
import json
import math
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .nn.files import whole_file, write_json

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")


def versions(*more: str) -> dict[str, str]:
    """Versions of everything that a result may depend on, and of `more` packages."""
    found = {"handtuned": __version__, "python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch"] = torch.__version__  # a wheel's metadata may leave out its tag (+cu130)
    return found


def command_line() -> str:
    """The command as it was typed, ready to paste."""
    name = "handtuned" if Path(sys.argv[0]).name in ("handtuned", "__main__.py") else sys.argv[0]
    words = [name, *sys.argv[1:]]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        words = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", *words]
    return shlex.join(words)


class Metrics:
    """`metrics.jsonl`: one JSON object a logged step, appended as it happens."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict]:
        """All whole lines; a last line cut short by a kill is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def keep_until(self, step: int) -> None:
        """Drop what was logged after `step`: those steps will be run again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def append(self, row: dict) -> None:
        """Under loss scaling a step that is skipped may have infinite numbers, which JSON has no word for: null."""
        row = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def draw_loss(rows: list[dict], path: Path, title: str) -> None:
    """Draw loss and learning rate over the optimizer steps into a PNG."""
    from matplotlib.figure import Figure

    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.plot(steps, [math.nan if row["loss"] is None else row["loss"] for row in rows], color="black", label="loss")
    left.set(xlabel="optimizer step", ylabel="loss per answer token (nats)", yscale="log", title=title)
    right = left.twinx()
    right.plot(steps, [row["learning_rate"] for row in rows], color="tab:orange", linestyle="--", label="learning rate")
    right.set_ylabel("learning rate")
    left.grid(alpha=0.3)
    figure.legend(handles=[*left.lines, *right.lines], loc="upper right", bbox_to_anchor=(0.88, 0.9))
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def check_reporter(kind: str) -> None:
    """Raise ValueError if the library of `--report-to` is not there, before the work begins."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise ValueError(_missing(kind))


def _missing(kind: str) -> str:
    return f"--report-to {kind} needs its library: pip install {kind}"


class Reporter:
    """Hands each logged row to TensorBoard or Weights & Biases, through their own libraries."""

    def __init__(self, kind: str, directory: Path, settings: dict):
        self.kind, self.sink = kind, None
        try:
            if kind == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.sink = SummaryWriter(str(directory / "tensorboard"))
            elif kind == "wandb":
                import wandb

                self.sink = wandb.init(project="handtuned", dir=str(directory), config=settings)
        except ImportError as error:
            raise ValueError(_missing(kind)) from error

    def log(self, row: dict) -> None:
        numbers = {key: value for key, value in row.items() if key != "step"}
        if self.kind == "tensorboard":
            for key, value in numbers.items():
                self.sink.add_scalar(f"train/{key}", value, row["step"])
        elif self.kind == "wandb":
            self.sink.log({f"train/{key}": value for key, value in numbers.items()}, step=row["step"])

    def close(self) -> None:
        if self.kind == "tensorboard":
            self.sink.close()
        elif self.kind == "wandb":
            self.sink.finish()


def write_run(directory: Path, settings: dict, marks: dict[str, str]) -> None:
    """`run.json`: the exact command, all settings, versions, and the marks of base model and data."""
    record = {
        "command": command_line(),
        "settings": settings,
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}",
        "marks": marks,
    }
    write_json(directory / "run.json", record)
