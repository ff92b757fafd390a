"""The settings of a fine-tuning run: one dataclass, checked once, and its command-line flags."""

import argparse
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field

from .sources import located

METHODS = ("qlora", "lora", "full")
DTYPES = ("auto", "float32", "bfloat16", "float16")
OF_ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern",
               "exclude_modules", "layers_to_transform", "target_parameters", "save_for", "use_dora", "use_rslora",
               "init_lora_weights", "loraplus_lr_ratio", "lora_fa", "init_adapter")  # fmt: skip
NOT_IN_ADAPTERS = ("save_for", "loraplus_lr_ratio", "lora_fa", "init_adapter")  # one does not bring these with it
RANGES = (  # what must hold of a value that is set, in words, and of which settings
    (lambda x: x >= 1, "at least 1", "lora_r per_device_train_batch_size gradient_accumulation_steps logging_steps "
     "save_steps save_total_limit eval_samples max_steps"),
    (lambda x: x >= 2, "at least 2", "max_seq_length"),
    (lambda x: 0 < x < math.inf, "a finite number above 0", "lora_alpha num_train_epochs learning_rate "
     "loraplus_lr_ratio"),
    (lambda x: 0 <= x < math.inf, "a finite number, 0 or above", "weight_decay max_grad_norm"),
    (lambda x: 0 <= x < 1, "in [0, 1)", "lora_dropout warmup_ratio eval_fraction"),
    (lambda x: 0 <= x < 2**63, "in [0, 2^63)", "seed"),
    (bool, "at least one name", "target_modules skip_modules target_parameters"),
)  # fmt: skip


def _setting(default, text, **argparse_options):
    return field(default=default, metadata={"help": text, **argparse_options})


@dataclass
class FinetuneSettings:
    """Everything that decides a run. Two runs with equal settings on one machine give equal bits.

    Defaults follow QLoRA (Dettmers et al. 2023, Table 9: clipping at 0.3, warmup 0.03);
    `learning_rate` and `max_steps` left at None are chosen by `with_defaults`.

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
    train_on: str = _setting("answers", "what is learnt: all tokens, the answers, or the last answer",
                             choices=("all", "answers", "last"))  # fmt: skip
    skip_bad_rows: bool = _setting(False, "count and drop bad rows instead of stopping at the first")
    output_dir: str | None = _setting(None, "where the adapter and the record go (default: handtuned-out/run-N)")
    method: str = _setting(
        "qlora", "qlora: adapters on a base in NF4 with double quantization; lora: on the base as it is; full: no "
        "adapters, every parameter is trained", choices=METHODS)  # fmt: skip
    lora_r: int = _setting(8, "rank of the adapters", aliases=["--r"])
    lora_alpha: float = _setting(16.0, "LoRA scale: the update is multiplied by alpha / r")
    lora_dropout: float = _setting(0.0, "dropout on the adapter's input")
    target_modules: tuple[str, ...] | str = _setting(
        "all-linear", "module names (q_proj v_proj …), a regular expression, or all-linear", nargs="+")  # fmt: skip
    target_parameters: tuple[str, ...] | None = _setting(
        None, "names of parameters, such as experts' mlp.experts.down_proj, adapted beside the modules", nargs="+")
    rank_pattern: tuple[str, ...] | None = _setting(None, "layers with a rank of their own, NAME=RANK …", nargs="+")
    alpha_pattern: tuple[str, ...] | None = _setting(None, "with a LoRA scale of their own, NAME=ALPHA …", nargs="+")
    exclude_modules: tuple[str, ...] | str | None = _setting(None, "names or expression of layers to leave", nargs="+")
    layers_to_transform: tuple[int, ...] | None = _setting(None, "numbers of the only blocks to adapt", nargs="+")
    use_dora: bool = _setting(False, "DoRA: also learn the length of each row of a weight, apart from its direction")
    use_rslora: bool = _setting(False, "rsLoRA: multiply the update by alpha / √r instead of alpha / r")
    init_lora_weights: str = _setting(
        "default", "what adapters start as; pissa: the weight's main singular directions (with --method lora); loftq: "
        "the best correction of NF4's error (with --method qlora)", choices=("default", "gaussian", "pissa", "loftq"))
    loraplus_lr_ratio: float | None = _setting(None, "LoRA+: how much faster B learns than A, usually 16")
    lora_fa: bool = _setting(False, "LoRA-FA: train B alone; layers then need not keep their inputs")
    init_adapter: str | None = _setting(None, "go on from the adapter in this directory, its rank and layers")
    skip_modules: tuple[str, ...] | None = _setting(None, "names of layers that qlora leaves dense", nargs="+")
    requantize: bool = _setting(False, "qlora: experts in MXFP4 (gpt-oss) to NF4, in place of keeping their bytes")
    optim: str = _setting("adamw", "optimizer; adamw8bit: moments in 2 bytes per parameter, not 8",
                          choices=("adamw", "adamw8bit"))  # fmt: skip
    learning_rate: float | None = _setting(
        None, "peak learning rate (default: 2e-4; 1e-3 for the shipped task; a tenth of that with --method full)")
    lr_scheduler: str = _setting("cosine", "way down from the peak, after the warmup; linear: to 0; constant: none",
                                 aliases=["--lr-scheduler-type"], choices=("cosine", "linear", "constant"))  # fmt: skip
    weight_decay: float = _setting(0.0, "decoupled weight decay")
    warmup_ratio: float = _setting(0.03, "part of the steps that the learning rate climbs")
    max_grad_norm: float = _setting(0.3, "clip the gradient to this norm; 0 turns clipping off")
    per_device_train_batch_size: int = _setting(8, "rows in one forward pass", aliases=["--batch-size"])
    gradient_accumulation_steps: int = _setting(1, "forward passes in one optimizer step")
    num_train_epochs: float | None = _setting(None, "passes over the data, without --max-steps (default: 3; on the "
                                              "shipped task 80 steps)")  # fmt: skip
    max_steps: int | None = _setting(None, "optimizer steps (default: from the epochs; 80 for the shipped task)")
    max_seq_length: int = _setting(512, "longest row in tokens; longer ones are truncated, counted and announced")
    drop_long_rows: bool = _setting(False, "leave out longer rows instead of truncating them")
    packing: bool = _setting(False, "let short rows share sequences of up to --max-seq-length tokens, without padding")
    group_by_length: bool = _setting(False, "make each step of rows of like length")
    gradient_checkpointing: bool = _setting(False, "recompute activations in the backward pass: less memory, more time")
    memory_budget: str | None = _setting(
        None, "most memory that a step may take on each device, as 8GB or 500MiB: as few layers as that needs are "
        "recomputed, then fewer rows go through at once")  # fmt: skip
    dtype: str = _setting("auto", "compute dtype; auto: bfloat16 or float16 on a GPU, float32 on a CPU", choices=DTYPES)
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = _setting(False, "run code that the model brings along (auto_map in its config.json)")
    parallel: str = _setting(
        "none", "under torchrun: ddp (a whole model in each process), zero1 (optimizer state shared out), "
        "zero2 (gradients too), zero3 (weights too) or fsdp (torch's zero3)",
        choices=("none", "ddp", "zero1", "zero2", "zero3", "fsdp"))  # fmt: skip
    offload: bool = _setting(False, "under zero1 to zero3: what only the optimizer needs in the host's memory")
    logging_steps: int = _setting(1, "steps between two lines of metrics.jsonl")
    save_steps: int = _setting(25, "steps between two checkpoints")
    save_total_limit: int = _setting(2, "checkpoints kept")
    report_to: str = _setting("none", "also log to tensorboard or wandb", choices=("none", "tensorboard", "wandb"))
    save_for: str = _setting(
        "any", "peft: layers that PEFT would take for others are written as it finds them", choices=("any", "peft"))
    seed: int = _setting(42, "seed of initialisation, data order and dropout")

    def __post_init__(self):
        self.target_modules = _target_modules(self.target_modules)
        self.exclude_modules = _target_modules(self.exclude_modules)
        for name in ("skip_modules", "target_parameters"):
            words = getattr(self, name)
            setattr(self, name, words and tuple(part for word in words for part in word.split(",") if part))
        if self.skip_modules is not None and self.method != "qlora":
            raise ValueError(f"--skip-modules leaves layers dense under --method qlora, got --method {self.method}")
        if self.requantize and self.method != "qlora":
            raise ValueError(f"--requantize makes NF4 under --method qlora, got --method {self.method}")
        self.choices()
        if self.data is not None and not isinstance(self.data, str):
            self.data = tuple(self.data) if len(self.data) > 1 else self.data[0]
        files = *(self.data if isinstance(self.data, tuple) else [self.data]), self.eval_data
        if self.parallel != "none" and any(file and re.match(r"-(:|$)", file) for file in files):
            raise ValueError("standard input (-) cannot be shared by several ranks: write the rows to a file")
        column_names(self.columns)
        if self.memory_budget is not None:
            parse_size("memory_budget", self.memory_budget)
        if self.offload and not self.parallel.startswith("zero"):
            raise ValueError(f"--offload needs --parallel zero1, zero2 or zero3, got --parallel {self.parallel}")
        for holds, expected, names in RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{flag(name)} must be {expected}, got {value!r}")
        for init, method in (("pissa", "lora"), ("loftq", "qlora")):
            if self.init_lora_weights == init and self.method not in (method, "full"):
                raise ValueError(f"--init-lora-weights {init} needs --method {method}, got {self.method}")
        for item in dataclasses.fields(self):
            value, choices = getattr(self, item.name), item.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{flag(item.name)} must be one of {', '.join(choices)}, got {value!r}")
            if self.method == "full" and item.name in OF_ADAPTERS and value != item.default:
                raise ValueError(f"{flag(item.name)} is of adapters, and --method full has none")
        if self.parallel == "fsdp" and (self.method == "full" or self.optim == "adamw8bit"):
            raise ValueError("--parallel fsdp shards adapters and plain AdamW only: not --method full or --optim "
                             "adamw8bit; --parallel ddp and zero1 to zero3 take both")  # fmt: skip

    def with_defaults(self) -> "FinetuneSettings":
        """The same settings with the values that depend on the task filled in."""
        shipped = self.data is None
        rate = self.learning_rate or (1e-3 if shipped else 2e-4) / (10 if self.method == "full" else 1)
        steps = self.max_steps or (80 if shipped and self.num_train_epochs is None else None)
        epochs = self.num_train_epochs or 3.0
        return dataclasses.replace(self, learning_rate=rate, max_steps=steps, num_train_epochs=epochs)

    def choices(self) -> dict:
        """What `apply_lora_to_model` takes beside the targets."""
        ranks = _pattern("rank_pattern", self.rank_pattern, int)
        alphas = _pattern("alpha_pattern", self.alpha_pattern, float)
        layers = None if self.layers_to_transform is None else list(self.layers_to_transform)
        return {"rank_pattern": ranks, "alpha_pattern": alphas, "exclude_modules": self.exclude_modules,
                "layers_to_transform": layers, "target_parameters": self.target_parameters}  # fmt: skip

    def adapter(self) -> str:
        """What is trained, in words."""
        start = f"from {self.init_adapter}" if self.init_adapter else f"r {self.lora_r}, alpha {self.lora_alpha:g}"
        named = (("DoRA", self.use_dora), ("rsLoRA", self.use_rslora), ("LoRA-FA", self.lora_fa),
                 (f"LoRA+ {self.loraplus_lr_ratio}", self.loraplus_lr_ratio),
                 (self.init_lora_weights, self.init_lora_weights != "default"))  # fmt: skip
        return ", ".join([f"LoRA {start}", *(name for name, used in named if used)])

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def parse_size(name: str, text: str) -> int:
    """ "24GB" (or "24", "24G") is 24 · 10⁹ bytes, "24GiB" 24 · 2³⁰; anything else, or no bytes at all, a ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text, re.IGNORECASE)
    power = "BKMGT".index((match[2] or "BG"[text.strip()[-1:].isdigit()]).upper()) if match else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if size == 0:
        raise ValueError(f"{flag(name)} must be a size such as 24GB, 500MB or 80GiB, got {text!r}")
    return size


def column_names(text: str | None) -> dict[str, str]:
    """ "prompt=question,completion=answer" → column → name in the file."""
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    names = {column.strip(): name.strip() for column, _, name in pairs}
    if not all([*names, *names.values()]) or len(names) < len(pairs):
        raise ValueError(f"--columns must be of the form prompt=NAME,completion=NAME, got {text!r}")
    return names


def _target_modules(words) -> tuple[str, ...] | str | None:
    """`all-linear` and a lone regular expression stay strings; names may also be joined by commas."""
    if words is None or isinstance(words, str):
        return words
    words = tuple(words)
    if len(words) == 1 and (words[0] == "all-linear" or re.search(r"[*+?()\[\]|^$\\{]", words[0])):
        return words[0]
    return tuple(part for word in words for part in word.split(",") if part)


def _pattern(name: str, pairs, kind: type) -> dict | None:
    """NAME=NUMBER … → name → number."""
    try:
        split = [pair.rpartition("=") for pair in pairs or ()]
        numbers = {key: kind(number) for key, _, number in split}
    except ValueError:
        raise ValueError(f"{flag(name)} must be of the form NAME=NUMBER, got {' '.join(pairs)}") from None
    if not all(0 < number < math.inf for number in numbers.values()):
        raise ValueError(f"{flag(name)} must give finite numbers above 0, got {' '.join(pairs)}")
    return numbers or None


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, leave: Collection[str] = ()) -> None:
    """Give `parser` one flag per setting, but for some to `leave`; those not typed stay out of the namespace."""
    for item in dataclasses.fields(FinetuneSettings):
        if item.name in leave:
            continue
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


def absolute(settings: dict) -> dict:
    """The settings that are paths, in their absolute form where they are there."""
    return {name: located(settings[name]) for name in ("model", "data", "eval_data", "init_adapter")}


def resumed(what: str, typed: dict, record: dict, **free) -> FinetuneSettings:
    """The settings of a run or a study (`what`) that is to be continued, but for those that are `free`.

    `record` is what it wrote: "settings", and "paths", the `absolute` ones, which hold from any directory.

    ValueError: a setting was typed again (`typed`) and differs.
    """
    saved = dict(record["settings"])
    saved |= {name: located(place) or saved.get(name) for name, place in record.get("paths", {}).items()}
    fresh = FinetuneSettings(**typed)
    now = {name: getattr(fresh, name) for name in typed if name not in free}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in now.items() if name in saved}
    changed = [f"{flag(name)} was {saved[name]}, now {now[name]}" for name in plain
               if (located(plain[name]) or plain[name]) != (located(saved[name]) or saved[name])]  # fmt: skip
    if changed:
        raise ValueError(f"--resume goes on with the {what}'s own settings: {'; '.join(changed)}")
    return FinetuneSettings(**saved | free)


def next_output_dir() -> str:
    """The first free `handtuned-out/run-N`."""
    places = (os.path.join("handtuned-out", f"run-{number}") for number in itertools.count(1))
    return next(place for place in places if not os.path.exists(place))
