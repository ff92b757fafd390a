"""The settings of a fine-tuning run: one dataclass, checked once, and its command-line flags."""

import argparse
import dataclasses
import itertools
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

METHODS = ("qlora", "lora")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PARALLEL = ("none", "ddp", "fsdp")
TRAIN_ON = ("all", "answers", "last")
REPORTERS = ("none", "tensorboard", "wandb")
RANGES = (  # what must hold of a value that is set, in words, and of which settings
    (lambda x: x >= 1, "at least 1", "lora_r per_device_train_batch_size gradient_accumulation_steps logging_steps "
     "save_steps save_total_limit eval_samples max_steps"),
    (lambda x: x >= 2, "at least 2", "max_seq_length"),
    (lambda x: 0 < x < math.inf, "a finite number above 0", "lora_alpha num_train_epochs learning_rate"),
    (lambda x: 0 <= x < math.inf, "a finite number, 0 or above", "weight_decay max_grad_norm"),
    (lambda x: 0 <= x < 1, "in [0, 1)", "lora_dropout warmup_ratio eval_fraction"),
    (lambda x: 0 <= x < 2**63, "in [0, 2^63)", "seed"),
    (bool, "at least one name", "target_modules"),
)  # fmt: skip


def _setting(default, text, **argparse_options):
    return field(default=default, metadata={"help": text, **argparse_options})


@dataclass
class FinetuneSettings:
    """Everything that decides a run. Two runs with equal settings on one machine give equal bits.

    Defaults follow QLoRA (Dettmers et al. 2023, Table 9: clipping at 0.3, warmup 0.03);
    `learning_rate` and `max_steps` left at None are chosen by `with_defaults`.

    Raises:
        ValueError: a value out of its range, named as the flag that sets it.
    """

    model: str = _setting("smollm2", "smollm2, a model directory, or a hub name", aliases=["--model-name-or-path"])
    data: tuple[str, ...] | str | None = _setting(
        None, "training rows: files (JSON, JSON Lines, CSV, TSV, Parquet, Arrow, text; in gzip or zstd too), "
        "directories, hub names, - for standard input; FILE:2 takes rows twice (default: the shipped household task)",
        aliases=["--dataset"], nargs="+", action="extend")  # fmt: skip
    eval_data: str | None = _setting(None, "held-out rows (default: a part split off --data)")
    eval_fraction: float = _setting(0.05, "part of --data held out when there is no --eval-data; 0 holds nothing out")
    eval_samples: int = _setting(200, "at most this many held-out rows are scored")
    columns: str | None = _setting(None, "columns of other names, such as prompt=question,completion=answer")
    train_on: str = _setting("answers", "what is learnt: all tokens, the answers, or the last answer", choices=TRAIN_ON)
    skip_bad_rows: bool = _setting(False, "count and drop bad rows instead of stopping at the first")
    output_dir: str | None = _setting(None, "where the adapter and the record go (default: handtuned-out/run-N)")
    method: str = _setting("qlora", "qlora: base in NF4 with double quantization; lora: base as it is", choices=METHODS)
    lora_r: int = _setting(8, "rank of the adapters", aliases=["--r"])
    lora_alpha: float = _setting(16.0, "LoRA scale: the update is multiplied by alpha / r")
    lora_dropout: float = _setting(0.0, "dropout on the adapter's input")
    target_modules: tuple[str, ...] | str = _setting(
        "all-linear", "module names (q_proj v_proj …), a regular expression, or all-linear", nargs="+")  # fmt: skip
    rank_pattern: tuple[str, ...] | None = _setting(None, "layers with a rank of their own, NAME=RANK …", nargs="+")
    alpha_pattern: tuple[str, ...] | None = _setting(None, "with a LoRA scale of their own, NAME=ALPHA …", nargs="+")
    exclude_modules: tuple[str, ...] | str | None = _setting(None, "names or expression of layers to leave", nargs="+")
    layers_to_transform: tuple[int, ...] | None = _setting(None, "numbers of the only blocks to adapt", nargs="+")
    learning_rate: float | None = _setting(None, "peak learning rate (default: 2e-4; 1e-3 for the shipped task)")
    weight_decay: float = _setting(0.0, "decoupled weight decay")
    warmup_ratio: float = _setting(0.03, "part of the steps that the learning rate climbs")
    max_grad_norm: float = _setting(0.3, "clip the gradient to this norm; 0 turns clipping off")
    per_device_train_batch_size: int = _setting(8, "rows in one forward pass", aliases=["--batch-size"])
    gradient_accumulation_steps: int = _setting(1, "forward passes in one optimizer step")
    num_train_epochs: float = _setting(3.0, "passes over the data, when --max-steps is not given")
    max_steps: int | None = _setting(None, "optimizer steps (default: from the epochs; 80 for the shipped task)")
    max_seq_length: int = _setting(512, "longest row in tokens; longer ones are truncated, counted and announced")
    gradient_checkpointing: bool = _setting(False, "recompute activations in the backward pass: less memory, more time")
    dtype: str = _setting("auto", "compute dtype; auto: bfloat16 or float16 on a GPU, float32 on a CPU", choices=DTYPES)
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N")
    parallel: str = _setting(
        "none", "under torchrun: ddp (a whole model in each process) or fsdp (weights shared out)", choices=PARALLEL)
    logging_steps: int = _setting(1, "steps between two lines of metrics.jsonl")
    save_steps: int = _setting(25, "steps between two checkpoints")
    save_total_limit: int = _setting(2, "checkpoints kept")
    report_to: str = _setting("none", "also log to tensorboard or wandb", choices=REPORTERS)
    seed: int = _setting(42, "seed of initialisation, data order and dropout")

    def __post_init__(self):
        if not isinstance(self.target_modules, str):
            self.target_modules = _target_modules(self.target_modules)
        if self.exclude_modules is not None and not isinstance(self.exclude_modules, str):
            self.exclude_modules = _target_modules(self.exclude_modules)
        self.choices()
        if self.data is not None and not isinstance(self.data, str):
            self.data = tuple(self.data) if len(self.data) > 1 else self.data[0]
        column_names(self.columns)
        for holds, expected, names in RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{flag(name)} must be {expected}, got {value!r}")
        for item in dataclasses.fields(self):
            value, choices = getattr(self, item.name), item.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{flag(item.name)} must be one of {', '.join(choices)}, got {value!r}")

    def with_defaults(self) -> "FinetuneSettings":
        """The same settings with the values that depend on the task filled in."""
        shipped = self.data is None
        rate = self.learning_rate or (1e-3 if shipped else 2e-4)
        return dataclasses.replace(self, learning_rate=rate, max_steps=self.max_steps or (80 if shipped else None))

    def choices(self) -> dict:
        """What `apply_lora_to_model` takes beside the targets."""
        ranks = _pattern("rank_pattern", self.rank_pattern, int)
        alphas = _pattern("alpha_pattern", self.alpha_pattern, float)
        layers = None if self.layers_to_transform is None else list(self.layers_to_transform)
        return {"rank_pattern": ranks, "alpha_pattern": alphas, "exclude_modules": self.exclude_modules,
                "layers_to_transform": layers}  # fmt: skip

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def column_names(text: str | None) -> dict[str, str]:
    """ "prompt=question,completion=answer" → column → name in the file."""
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    if not all(column and name for column, _, name in pairs):
        raise ValueError(f"--columns must be of the form prompt=NAME,completion=NAME, got {text!r}")
    return {column.strip(): name.strip() for column, _, name in pairs}


def _target_modules(words) -> tuple[str, ...] | str:
    """`all-linear` and a lone regular expression stay strings; names may also be joined by commas."""
    words = tuple(words)
    if len(words) == 1 and (words[0] == "all-linear" or re.search(r"[*+?()\[\]|^$\\{]", words[0])):
        return words[0]
    return tuple(part for word in words for part in word.split(",") if part)


def _pattern(name: str, pairs, kind: type) -> dict | None:
    """NAME=NUMBER … → name → number."""
    try:
        split = [pair.rpartition("=") for pair in pairs or ()]
        return {key: kind(number) for key, _, number in split} or None
    except ValueError:
        raise ValueError(f"{flag(name)} must be of the form NAME=NUMBER, got {' '.join(pairs)}") from None


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` one flag per setting; flags that are not typed stay out of the namespace."""
    for item in dataclasses.fields(FinetuneSettings):
        options = {key: value for key, value in item.metadata.items() if key != "aliases"}
        names = [flag(item.name), *item.metadata.get("aliases", ())]
        if item.type is bool:
            parser.add_argument(*names, dest=item.name, action=argparse.BooleanOptionalAction,
                                default=argparse.SUPPRESS, help=options["help"])  # fmt: skip
            continue
        text = options.pop("help")
        if item.default is not None:
            text += f" (default: {item.default})"
        kinds = {int: int, float: float, int | None: int, float | None: float, tuple[int, ...] | None: int}
        kind = kinds.get(item.type, str)
        metavar = None if "choices" in options else item.name.rsplit("_", 1)[-1].upper()
        parser.add_argument(*names, dest=item.name, type=kind, default=argparse.SUPPRESS,
                            help=text, metavar=metavar, **options)  # fmt: skip


def in_use(path: Path) -> bool:
    """Whether something stands there that must not be written over: a file, or a directory that is not empty."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def resumed(what: str, typed: dict, saved: dict, **free) -> FinetuneSettings:
    """The saved settings of a run or a study (`what`) that is to be continued, but for those that are `free`.

    Raises:
        ValueError: a setting was typed again (`typed`) and differs.
    """
    now = {name: getattr(FinetuneSettings(**{name: value}), name) for name, value in typed.items() if name not in free}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in now.items() if name in saved}
    changed = [f"{flag(name)} was {saved[name]}, now {now[name]}" for name in plain if plain[name] != saved[name]]
    if changed:
        raise ValueError(f"--resume goes on with the {what}'s own settings: {'; '.join(changed)}")
    return FinetuneSettings(**saved | free)


def next_output_dir(root: str = "handtuned-out") -> str:
    """The first free `handtuned-out/run-N`."""
    places = (os.path.join(root, f"run-{number}") for number in itertools.count(1))
    return next(place for place in places if not os.path.exists(place))
