"""`handtuned memory`: what training will take, what would make it fit, and whether the estimate is right."""

import argparse
import contextlib
import re

import torch

from ..training.models import choose_device, choose_dtype, load_base
from .analyses import korthikanti
from .breakdown import GB, GIB, both
from .estimate import DTYPES, METHODS, MOMENTS, estimate
from .model_shapes import shape_of
from .recommend import recommend
from .tracker import Measurement, measure, training_step

UNITS = {"GB": GB, "G": GB, "GIB": GIB, "MB": 10**6, "MIB": 2**20}


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
    parser.add_argument("--gradient-checkpointing", dest="checkpoint", action=on_off, default=False,
                        help="a checkpoint in every layer")  # fmt: skip
    parser.add_argument("--flash", action=on_off, default=True, help="fused attention (default: on)")
    parser.add_argument("--logits", choices=("chunked", "full"), default="chunked",
                        help="full: all logits at once, as transformers does (default: chunked)")  # fmt: skip
    parser.add_argument("--lora-r", "--r", type=int, default=8, help="rank of the adapters (default: 8)")
    parser.add_argument("--target-modules", nargs="+", default=["all-linear"], help="(default: all-linear)")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=0, help="ZeRO stage (default: 0)")
    parser.add_argument("--gpus", "--world-size", dest="world_size", metavar="GPUS", type=int, default=1,
                        help="devices (default: 1)")  # fmt: skip
    parser.add_argument("--offload", action=on_off, default=False, help="optimizer state and gradients on the host")
    parser.add_argument("--gpu", metavar="SIZE", help="memory of one device (24GB, 80GiB): what would make it fit?")
    parser.add_argument("--measure", action="store_true", help="also load the model, run a step and count (one device)")


def run(args: argparse.Namespace) -> int:
    budget = parse_size(args.gpu) if args.gpu else None
    settings = {name: value for name, value in vars(args).items() if name not in ("gpu", "measure")}
    if args.dtype == "auto":
        chosen = torch.bfloat16 if budget else choose_dtype("auto", choose_device("auto"))
        settings["dtype"] = str(chosen).removeprefix("torch.")
    targets = tuple(part for word in args.target_modules for part in word.split(","))
    with contextlib.suppress(ValueError):
        settings["model"] = float(args.model)
    settings["target_modules"] = "all-linear" if targets == ("all-linear",) else targets
    settings["accumulation_steps"] = settings.pop("gradient_accumulation_steps")
    breakdown, shape = estimate(**settings), shape_of(settings["model"])
    print(breakdown)
    if shape.layers:
        sizes = (args.batch, args.seq, shape.hidden, shape.heads, shape.layers)
        scores, fused = (both(korthikanti(*sizes, flash=flash)) for flash in (False, True))
        print("rule of thumb for activations (Korthikanti et al., a 16-bit GPT with dropout): "
              f"{scores} with attention scores, {fused} without")  # fmt: skip
    if args.measure:
        measured = _measured(settings, args.model)
        print(f"measured: {measured}\nthe estimate is off by {100 * (breakdown.peak / measured.peak - 1):+.1f} %")
    if budget:
        print(f"\n{recommend(settings, budget)}")
    return 0


def _measured(settings: dict, model: str) -> Measurement:
    if settings["world_size"] > 1 or settings["offload"] or not settings["flash"]:
        raise ValueError("--measure runs on one device, with fused attention, without offload")
    if settings["method"] == "full" and settings["dtype"] != "float32":
        raise ValueError("--measure trains full models in float32; add --dtype float32")
    place = choose_device("auto")
    loaded, _ = load_base(model, settings["method"], getattr(torch, settings["dtype"]), place)
    names = ("method", "batch", "seq", "checkpoint", "logits", "lora_r", "target_modules", "accumulation_steps")
    return measure(training_step(loaded, **{name: settings[name] for name in names}), device=place.type)


def parse_size(text: str) -> int:
    """ "24GB" (or "24", "24G") is 24 · 10⁹ bytes, "24GiB" 24 · 2³⁰; anything else, or no bytes at all, a ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get((match[2] or "GB").upper()) if match else None
    if unit is None or float(match[1]) == 0:
        raise ValueError(f"--gpu must be a size such as 24GB or 80GiB, got {text!r}")
    return int(float(match[1]) * unit)
