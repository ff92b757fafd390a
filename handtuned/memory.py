"""`handtuned memory`: what training takes, before and after it is tried.

`estimate` works it out from sizes (`estimate.py`), `measure` counts what a function really
takes, and the two agree within 5 %. The analyses of the study documents are here too, corrected.
"""

import argparse
import gc
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .advice import advise
from .estimate import DTYPES, METHODS, MOMENTS, estimate
from .ledger import GB, GIB, both, size
from .nn.live_memory import LiveMemory
from .presets import shape_of
from .training.models import choose_device, choose_dtype, load_base

__all__ = ["Measurement", "analyze_lora_params", "analyze_memory_savings", "estimate", "korthikanti", "measure"]

UNITS = {"GB": GB, "G": GB, "GIB": GIB, "MB": 10**6, "MIB": 2**20}


@dataclass(frozen=True)
class Measurement:
    """What a function took, in bytes on one kind of device.

    Attributes:
        before, after: alive when it began and when it returned (its result included).
        peak: most alive at any moment.
        result: what it returned.
        history: bytes alive after every change, if asked for.
    """

    before: int
    peak: int
    after: int
    result: Any = None
    history: tuple[int, ...] | None = None

    @property
    def added(self) -> int:
        """Most bytes above those that were there before."""
        return self.peak - self.before

    def __str__(self):
        return f"peak {both(self.peak)}, {size(self.added)} above the {size(self.before)} that were there before"


def measure(function: Callable, *args, device: str | None = None, keep_history: bool = False, **kwargs) -> Measurement:
    """Run `function(*args, **kwargs)` and find the most memory that was in use by tensors.

    On a CPU every live tensor storage is counted, once however many views it has, from those that
    were there before to the last temporary (`nn.live_memory`); that slows the run down by some
    microseconds an operation. On a GPU the caching allocator's own books are read.

    Args:
        device: "cpu" or "cuda"; by default the GPU if CUDA is in use in this process.
        keep_history: also keep the course of it (CPU only), for a picture.

    Raises:
        ValueError: another device, or a history of a GPU.
    """
    device = device or ("cuda" if torch.cuda.is_initialized() else "cpu")
    if device == "cpu":
        with LiveMemory("cpu", keep_history=keep_history) as memory:
            result = function(*args, **kwargs)
        history = tuple(memory.before + added for added in memory.history) if keep_history else None
        return Measurement(
            memory.before, memory.before + memory.peak_added, memory.before + memory.added, result, history
        )
    if device != "cuda" or keep_history:
        raise ValueError(f'device must be "cpu" or "cuda" (and history is for a CPU only), got {device!r}')
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(*args, **kwargs)
    torch.cuda.synchronize()
    return Measurement(before, torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated(), result)


def korthikanti(batch: int, seq: int, hidden: int, heads: int, layers: int, flash: bool = False) -> int:
    """Bytes of activations of a GPT in 16 bits with dropout: s·b·h·(34 + 5·a·s/h) a layer, without the logits.

    With `flash` attention, which keeps no scores, s·b·h·34. For batch 1, sequence 2048 and the sizes of a
    7B model (4096, 32 heads, 32 layers) 28.5 GiB: the study documents' "28.5 G"; 8.5 GiB with flash.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", equation 2.
    """
    return layers * (34 * seq * batch * hidden + (0 if flash else 5 * heads * seq * seq * batch))


def analyze_lora_params(d: int, k: int, rank: int) -> dict[str, float]:
    """Print and return how many parameters LoRA trains for a d × k weight: (d + k)·rank against d·k.

    Returns:
        {"original": d·k, "lora": (d + k)·rank, "ratio": per cent of the original, "reduction": 100 − ratio}.

    Raises:
        ValueError: a size below 1.
    """
    for name, value in (("d", d), ("k", k), ("rank", rank)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    original, lora = d * k, (d + k) * rank
    ratio = 100 * lora / original
    print(f"original parameters: {d} × {k} = {original:,}")
    print(f"LoRA parameters (rank {rank}): ({d} + {k}) × {rank} = {lora:,}")
    print(f"ratio: {ratio:.2f} %, a reduction of {100 - ratio:.2f} %")
    return {"original": original, "lora": lora, "ratio": ratio, "reduction": 100 - ratio}


def analyze_memory_savings(
    num_layers: int, hidden_size: int, seq_len: int, batch_size: int, num_heads: int | None = None
) -> dict[str, int]:
    """Print and return the activation bytes of a 16-bit GPT: all kept, a checkpoint in every layer, √n groups.

    Counted as `korthikanti` does. A checkpoint is 2·s·b·h bytes, and the inside of one group is there
    while it is recomputed. (The documents' version leaves out the heads, takes elements for bytes,
    and multiplies a layer by √n, which is neither of the two ways to place checkpoints.)

    Args:
        num_heads: attention heads; by default of width 128.

    Returns:
        {"standard": bytes, "every layer": bytes, "sqrt": bytes}.

    Raises:
        ValueError: a size below 1.
    """
    heads = max(1, hidden_size // 128) if num_heads is None else num_heads
    sizes = {"num_layers": num_layers, "hidden_size": hidden_size, "seq_len": seq_len, "batch_size": batch_size,
             "num_heads": heads}  # fmt: skip
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    inside = korthikanti(batch_size, seq_len, hidden_size, heads, 1)
    boundary = 2 * batch_size * seq_len * hidden_size
    groups = round(math.sqrt(num_layers))
    savings = {
        "standard": num_layers * inside,
        "every layer": num_layers * boundary + inside,
        "sqrt": groups * boundary + math.ceil(num_layers / groups) * inside,
    }
    print(f"{num_layers} layers, hidden {hidden_size}, {heads} heads, {batch_size} × {seq_len} tokens, 16 bits")
    for name, count in savings.items():
        print(f"{name:12} {both(count):>26}  {100 * (1 - count / savings['standard']):5.1f} % saved")
    return savings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `handtuned memory`, named as those of `finetune`."""
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("--model", "--model-name-or-path", default="smollm2",
                        help="a preset (smollm2, qwen2.5-1.5b, llama-3-8b, 7b …), a model directory, or a number such "
                        "as 7e9 (default: smollm2)")  # fmt: skip
    parser.add_argument("--method", choices=METHODS, default="qlora", help="(default: qlora)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="of weights and computation (default: as finetune; bfloat16 with --gpu)")  # fmt: skip
    parser.add_argument("--optimizer", choices=tuple(MOMENTS), default="adamw", help="(default: adamw)")
    parser.add_argument("--batch", "--batch-size", "--per-device-train-batch-size", type=int, default=8,
                        help="rows in one forward pass (default: 8)")  # fmt: skip
    parser.add_argument("--seq", "--max-seq-length", type=int, default=512, help="tokens in a row (default: 512)")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1, help="(default: 1)")
    parser.add_argument("--gradient-checkpointing", action=on_off, default=False, help="a checkpoint in every layer")
    parser.add_argument("--flash", action=on_off, default=True, help="fused attention (default: on)")
    parser.add_argument("--logits", choices=("chunked", "full"), default="chunked",
                        help="full: all logits at once, as transformers does (default: chunked)")  # fmt: skip
    parser.add_argument("--lora-r", "--r", type=int, default=8, help="rank of the adapters (default: 8)")
    parser.add_argument("--target-modules", nargs="+", default=["all-linear"], help="(default: all-linear)")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=0, help="ZeRO stage (default: 0)")
    parser.add_argument("--gpus", "--world-size", type=int, default=1, help="devices (default: 1)")
    parser.add_argument("--offload", action=on_off, default=False, help="optimizer state and gradients on the host")
    parser.add_argument("--gpu", metavar="SIZE", help="memory of one device (24GB, 80GiB): what would make it fit?")
    parser.add_argument("--measure", action="store_true", help="also load the model, run a step and count (one device)")


def run(args: argparse.Namespace) -> int:
    budget = parse_size(args.gpu) if args.gpu else None
    dtype = args.dtype
    if dtype == "auto":
        chosen = torch.bfloat16 if budget else choose_dtype("auto", choose_device("auto"))
        dtype = str(chosen).removeprefix("torch.")
    targets = tuple(part for word in args.target_modules for part in word.split(","))
    settings = {
        "model": _number_or_name(args.model),
        "method": args.method,
        "dtype": dtype,
        "optimizer": args.optimizer,
        "batch": args.batch,
        "seq": args.seq,
        "checkpoint": args.gradient_checkpointing,
        "zero": args.zero,
        "world_size": args.gpus,
        "flash": args.flash,
        "lora_r": args.lora_r,
        "target_modules": "all-linear" if targets == ("all-linear",) else targets,
        "logits": args.logits,
        "accumulation_steps": args.gradient_accumulation_steps,
        "offload": args.offload,
    }
    ledger = estimate(**settings)
    print(ledger)
    shape = shape_of(settings["model"])
    if shape.layers:
        sizes = (args.batch, args.seq, shape.hidden, shape.heads, shape.layers)
        print(
            "rule of thumb for activations (Korthikanti et al., a 16-bit GPT with dropout): "
            f"{both(korthikanti(*sizes))} with attention scores, {both(korthikanti(*sizes, flash=True))} without"
        )
    if args.measure:
        measured = _measured(settings, args.model)
        print(f"measured: {measured}\nthe estimate is off by {100 * (ledger.peak / measured.peak - 1):+.1f} %")
    if budget:
        print()
        print(advise(settings, budget))
    return 0


def _measured(settings: dict, model: str) -> Measurement:
    if settings["world_size"] > 1 or settings["offload"] or not settings["flash"]:
        raise ValueError("--measure runs on one device, with fused attention, without offload")
    if settings["method"] == "full" and settings["dtype"] != "float32":
        raise ValueError("--measure trains full models in float32; add --dtype float32")
    from .rehearsal import training_step

    place = choose_device("auto")
    loaded, _ = load_base(model, settings["method"], getattr(torch, settings["dtype"]), place)
    names = ("method", "batch", "seq", "checkpoint", "logits", "lora_r", "target_modules", "accumulation_steps")
    step = training_step(loaded, **{name: settings[name] for name in names})
    return measure(step, device=place.type)


def _number_or_name(model: str):
    try:
        return float(model)
    except ValueError:
        return model


def parse_size(text: str) -> int:
    """ "24GB" (or "24", "24G") is 24 · 10⁹ bytes, "24GiB" 24 · 2³⁰.

    Raises:
        ValueError: anything else, or no bytes at all.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get((match[2] or "GB").upper()) if match else None
    if unit is None or float(match[1]) == 0:
        raise ValueError(f"--gpu must be a size such as 24GB or 80GiB, got {text!r}")
    return int(float(match[1]) * unit)
