"""`handtuned memory`: what training will take, what would make it fit, and whether the estimate is right."""

import argparse
import contextlib
import dataclasses

import torch

from ..nn.live_memory import LiveMemory
from ..training.loading import load_base
from ..training.loop import OPTIMIZERS
from ..training.models import choose_device, choose_dtype
from ..training.settings import FinetuneSettings, add_flags, parse_size
from .analyses import korthikanti
from .breakdown import both
from .estimate import DTYPES, METHODS, MOMENTS, estimate
from .fit import arguments, choose
from .model_shapes import config_of, shape_of
from .recommend import recommend
from .tracker import Measurement, measure, training_step

OWN = ("model", "method", "dtype", "optim", "offload", "per_device_train_batch_size", "max_seq_length", "data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `finetune` but --data and --resume, and what is asked about them."""
    parser.add_argument("--model", "--model-name-or-path", default="smollm2",
                        help="a preset (smollm2, qwen2.5-1.5b, llama-3-8b, 7b …), a model directory, a hub name, or a "
                        "number such as 7e9 (default: smollm2)")  # fmt: skip
    parser.add_argument("--method", choices=METHODS, default="qlora", help="(default: qlora)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="of weights and computation (default: as finetune; bfloat16 with --gpu)")  # fmt: skip
    parser.add_argument("--optimizer", "--optim", choices=tuple(MOMENTS), default="adamw", help="(default: adamw)")
    parser.add_argument("--batch", "--batch-size", "--per-device-train-batch-size", type=int, default=8,
                        help="rows in one forward pass (default: 8)")  # fmt: skip
    parser.add_argument("--seq", "--max-seq-length", type=int, default=512, help="tokens in a row (default: 512)")
    parser.add_argument("--flash", action=argparse.BooleanOptionalAction, default=True,
                        help="fused attention (default: on)")  # fmt: skip
    parser.add_argument("--logits", choices=("chunked", "full"), default="chunked",
                        help="full: all logits at once, as transformers does (default: chunked)")  # fmt: skip
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="ZeRO stage (default: 0)")
    parser.add_argument("--gpus", "--world-size", dest="world_size", metavar="GPUS", type=int, default=1,
                        help="devices (default: 1)")  # fmt: skip
    parser.add_argument("--offload", action=argparse.BooleanOptionalAction, default=False,
                        help="optimizer state and gradients on the host")  # fmt: skip
    parser.add_argument("--gpu", metavar="SIZE", help="memory of one device (24GB, 80GiB): what would make it fit?")
    parser.add_argument("--measure", action="store_true", help="also load the model, run a step and count (one device)")
    add_flags(parser, leave=OWN)


def run(args: argparse.Namespace) -> int:
    budget = parse_size("gpu", args.gpu) if args.gpu else None
    typed = vars(args)
    own = {name: typed[name] for name in ("method", "optimizer", "batch", "seq", "offload", "flash", "logits")}
    names = {item.name for item in dataclasses.fields(FinetuneSettings)} - set(OWN)
    given = {name: value for name, value in typed.items() if name in names}
    settings = FinetuneSettings(**given, method=args.method)
    dtype = args.dtype
    if dtype == "auto":
        chosen = torch.bfloat16 if budget else choose_dtype("auto", choose_device(settings.device))
        dtype = str(chosen).removeprefix("torch.")
    wanted = arguments(settings, dtype, args.world_size) | own | {"model": args.model, "world_size": args.world_size}
    if args.zero is not None:
        if args.zero != wanted["zero"] and "parallel" in typed:
            raise ValueError(f"--zero {args.zero} is another stage than --parallel {settings.parallel}; leave one out")
        wanted["zero"] = args.zero
    with contextlib.suppress(ValueError):
        wanted["model"] = float(args.model)
    if settings.memory_budget:
        def price(rows, recomputed):
            passes = wanted["accumulation_steps"] * (args.batch // rows)
            return estimate(**wanted | {"batch": rows, "checkpoint": recomputed, "accumulation_steps": passes})

        plan = choose(parse_size("memory_budget", settings.memory_budget), args.batch, price, wanted["checkpoint"])
        print(f"{plan}\n")
        wanted |= {"checkpoint": plan.recomputed, "batch": plan.rows,
                   "accumulation_steps": wanted["accumulation_steps"] * (args.batch // plan.rows)}  # fmt: skip
    breakdown, shape = estimate(**wanted), shape_of(wanted["model"])
    print(breakdown)
    if shape is None or shape.layers:
        config = config_of(shape or wanted["model"], wanted["trust_remote_code"])[1].get_text_config()
        if heads := getattr(config, "num_attention_heads", None):  # the rule is of attention
            sizes = args.batch, args.seq, config.hidden_size, heads, config.num_hidden_layers
            scores, fused = (both(korthikanti(*sizes, flash=flash)) for flash in (False, True))
            print("rule of thumb for activations (Korthikanti et al., a 16-bit GPT with dropout): "
                  f"{scores} with attention scores, {fused} without")  # fmt: skip
    if args.measure:
        measured = _measured(wanted, choose_device(settings.device))
        print(f"measured: {measured}\nthe estimate is off by {100 * (breakdown.peak / measured.peak - 1):+.1f} %")
    if budget:
        print(f"\n{recommend(wanted, budget)}")
    return 0


def _measured(wanted: dict, place: torch.device) -> Measurement:
    if wanted["world_size"] > 1 or wanted["offload"] or not wanted["flash"] or wanted["optimizer"] not in OPTIMIZERS:
        raise ValueError(f"--measure runs on one device, with fused attention and {' or '.join(OPTIMIZERS)}, without "
                         "offload")  # fmt: skip
    if not isinstance(wanted["model"], str):
        raise ValueError(f"--measure must have a model to load, got {wanted['model']:g} parameters")
    dtype = getattr(torch, wanted["dtype"])
    with LiveMemory(place.type) as others:  # tensors of this process that are not of the step
        pass
    told = (wanted[name] for name in ("skip", "trust_remote_code", "requantize"))
    loaded, _ = load_base(wanted["model"], wanted["method"], dtype, place, *told)
    names = ("method", "optimizer", "batch", "seq", "checkpoint", "logits", "accumulation_steps", "adapt")
    step = training_step(loaded, dtype=dtype, **{name: wanted[name] for name in names})
    found = measure(step, device=place.type)
    there = others.before + others.added  # of them, what has not died since
    return dataclasses.replace(found, before=found.before - there, peak=found.peak - there)
