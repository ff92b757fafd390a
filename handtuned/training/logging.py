"""What a run prints, and what it leaves behind beside the adapter: run.json, metrics.jsonl, loss.png."""

import contextlib
import importlib.util
import json
import math
import os
import platform
import resource
import shlex
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from ..nn import LoRALinear
from ..nn.files import whole_file
from ..quant import quantization_summary
from .loading import one_line
from .settings import FinetuneSettings

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


def processor(*fields: str) -> list[str]:
    """What the CPU is: these fields of /proc/cpuinfo on Linux, elsewhere what Python knows."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if known := [facts[name] for name in fields if name in facts]:
            return known
    return [platform.processor() or platform.machine()]


def command_line() -> str:
    """The command as it was typed, ready to paste."""
    name = "handtuned" if Path(sys.argv[0]).name in ("handtuned", "__main__.py") else sys.argv[0]
    words = [name, *sys.argv[1:]]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        words = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", *words]
    return shlex.join(words)


def finite(numbers: dict) -> dict:
    """The same for JSON, which holds no NaN: None for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def read_json(path: Path, *objects: str) -> dict:
    """The object in a file that a run has left, which must hold these `objects`. ValueError: the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for part in (found, found.get("paths", {}), *(found[name] for name in objects)):
            part.keys()
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    return found


class Metrics:
    """`metrics.jsonl`: one JSON object per logged step, appended as it happens."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict]:
        """All whole lines; a last line cut short by a kill is left out."""
        rows = []
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            for line in self.path.read_text(encoding="utf-8").splitlines():
                rows.append(json.loads(line))
        return rows

    def keep_until(self, step: int) -> None:
        """Drop what was logged after `step`: those steps will be run again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def append(self, row: dict) -> None:
        """Under loss scaling a step that is skipped may have infinite numbers."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")


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
        raise ValueError(f"--report-to {kind} needs its library: pip install {kind}")


class Reporter:
    """Hands each logged row to TensorBoard or Weights & Biases, through their own libraries."""

    def __init__(self, kind: str, directory: Path, settings: dict):
        self._write, self.close = lambda numbers, step: None, lambda: None
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            sink = SummaryWriter(str(directory / "tensorboard"))

            def write(numbers: dict, step: int) -> None:
                for number in numbers.items():
                    sink.add_scalar(*number, step)
                sink.flush()  # it would wait for minutes, and a run that is stopped does not close it

            self._write, self.close = write, sink.close
        elif kind == "wandb":
            import wandb

            with one_line("--report-to wandb"):
                sink = wandb.init(project="handtuned", dir=str(directory), config=settings)
            self._write, self.close = sink.log, sink.finish

    def log(self, row: dict) -> None:
        self._write({f"train/{key}": value for key, value in row.items() if key != "step"}, step=row["step"])


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def plan(settings: FinetuneSettings, base, total: int) -> str:
    """The run in a few lines: parameters, bytes before and after quantization, data, steps (`models.Base`)."""
    trainable = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    adapters = [type(module).__name__ for module in base.model.modules() if isinstance(module, LoRALinear)]
    kept = [row for row in quantization_summary(base.model).rows if row.kind not in adapters]
    parameters = sum(row.parameters for row in kept)
    before, after = megabytes(sum(row.bytes_before for row in kept)), megabytes(sum(row.bytes_after for row in kept))
    what = f"{settings.adapter()} on {len(adapters)} layers"
    if settings.method == "full":
        what = "all of the model" + (", with fp32 masters" if base.dtype.itemsize == 2 else "")
    threads = f", {torch.get_num_threads()} threads" if base.device.type == "cpu" else ""
    return "\n".join([
        f"model        {settings.model}: {parameters:,} parameters",
        f"weights      {f'{before} → {after}' if settings.method == 'qlora' else f'{after}, not quantized'}",
        f"trainable    {trainable:,} parameters ({100 * trainable / parameters:.2f} %): {what}",
        f"data         {len(base.examples)} rows to learn from, {len(base.held_out.examples)} held out",
        f"steps        {total} of {settings.per_device_train_batch_size} rows × "
        f"{settings.gradient_accumulation_steps}, learning rate {settings.learning_rate:g}",
        f"on           {base.device}{threads}, computing in {str(base.dtype).removeprefix('torch.')}",
        f"into         {settings.output_dir}",
    ])  # fmt: skip


class RunLog:
    """Follows a `loop.Training` step by step from `first`, the optimizer steps done already: a bar, and on the main
    rank metrics.jsonl and `--report-to`."""

    def __init__(self, directory: Path, training, first: int):
        from tqdm import tqdm

        settings, self.main, self.total = training.settings, training.world.main, training.total
        self.metrics, self.every = Metrics(directory / "metrics.jsonl"), settings.logging_steps
        if self.main:
            self.metrics.keep_until(first)
        self.reporter = Reporter(settings.report_to if self.main else "none", directory, settings.to_json())
        self.bar = tqdm(total=self.total, initial=first, desc="training", unit="step", dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, error, *more):
        self.bar.close()
        if error is None:
            self.reporter.close()

    def log(self, row: dict) -> None:
        rates = f"lr {row['learning_rate']:.1e}, {row['tokens_per_second']:.0f} tokens/s"
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {rates}")
        self.bar.update(1)
        if self.main and (row["step"] % self.every == 0 or row["step"] == self.total):
            self.metrics.append(row)
            self.reporter.log(row)


def summary(results: dict, directory: Path) -> str:
    """Held-out scores and answers before and after, peak memory, and where to go from here."""
    lines, (before, after) = [""], (results["before"], results["after"])
    if before and after:
        lines.append(f"held-out rows ({after['rows']})   before      after")
        for name, text, form in (("exact_match", "exact match", ".1%"), ("token_accuracy", "right tokens", ".1%"),
                                 ("loss", "loss", ".4f")):  # fmt: skip
            was, now = ("not finite" if side[name] is None else f"{side[name]:{form}}" for side in (before, after))
            lines.append(f"  {text:18} {was:>9} {now:>10}")
    for entry in results["answers"]:
        lines += ["", *(f"{part:9} {_short(entry[part])}" for part in ("prompt", "expected", "before", "after"))]
    prompt = _short(results["answers"][0]["prompt"]) if results["answers"] else "…"
    kind = "adapter" if (directory / "adapter_config.json").exists() else "model"
    return "\n".join([
        *lines,
        "",
        f"peak memory  {megabytes(results['peak_memory_bytes'])}",
        f"time         {results['seconds']:.0f} s",
        f"{kind:12} {directory}",
        f'talk to it   handtuned generate --{kind} {directory} "{prompt}"',
    ])  # fmt: skip


def _short(text: str) -> str:
    return textwrap.shorten(text, 110, placeholder=" …")


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
