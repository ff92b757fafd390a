"""How much memory a training step takes: model states, activations, logits, and the moment when most is alive.

States of A parameters, in bytes per parameter (Rajbhandari et al. 2020, "ZeRO", section 3.1):

                        weight   gradient   master   Adam's moments
    fp32                4        4          –        8                 = 16
    fp16 or bf16        2        2          4        8                 = 16: mixed precision does not halve it
    LoRA, trained part  4        4          –        8                 = 16, of a few per mille of A
    NF4, frozen part    0.516    –          –        –

Over N devices ZeRO-1 divides moments and masters by N, ZeRO-2 gradients too, ZeRO-3 weights too.

Activations grow with batch × sequence. They are counted while the model's own step runs dry, on tensors without memory
(`fake.py`). They and the gradients are not at their largest together: backward frees the one while it makes the
other, so the step is followed moment by moment, and the peak is that of the fullest one.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.nf4_matmul import ON_CPU, plan
from ..nn import apply_lora_to_model
from ..nn.checkpoint_layers import repeated_layers
from ..nn.loss import IGNORE_INDEX
from ..optim import ZeroOptimizer
from ..optim.adamw8bit import BLOCK_SIZE, BYTES_WHILE_STEPPING, PIECE
from ..quant import NF4Experts, NF4Linear
from ..quant.linear import FrozenNF4
from ..quant.mxfp4 import DECODING, MXFP4Experts
from ..training.models import train_whole
from ..training.sources import format_of, quantization_of
from .breakdown import Breakdown, Component
from .dry_run import Part, dry_step
from .fake import SizesOnly, build
from .model_shapes import config_of, shape_of

METHODS = ("full", "lora", "qlora")
DTYPES = ("float32", "float16", "bfloat16")
MOMENTS = {"adamw": 2, "adamw8bit": 2, "sgd-momentum": 1, "sgd": 0}
# What ZeRO divides from each stage on.
DIVIDED = {
    1: ("optimizer state", "master weights"),
    2: ("gradients",),
    3: ("weights", "adapters"),  # the scales of NF4 weights are buffers, which stay whole
}


def state_bytes(
    weights: int, constants: int, trained: int, method: str, c: int, optimizer: str, masters: bool
) -> dict[str, int]:
    """Bytes of each state on one device that shares nothing: c bytes per value, `trained` parameters."""
    full = method == "full"
    moment = 1 + 4 / BLOCK_SIZE if optimizer == "adamw8bit" else 4 if masters or not full else c
    return {
        "weights": weights,
        "quantization constants": constants,
        "adapters": 4 * trained * (not full),
        "gradients": (c if full else 4) * trained,
        "optimizer state": math.ceil(MOMENTS[optimizer] * moment * trained),
        "master weights": 4 * trained * masters,
    }


def estimate(model, method: str = "full", dtype: torch.dtype | str = torch.float32, optimizer: str = "adamw",
             batch: int = 1, seq: int = 512, checkpoint: bool | int | Collection[str] = False, zero: int = 0,
             world_size: int = 1, flash: bool = True, *, lora_r: int = 8,
             target_modules: str | Iterable[str] = "all-linear", logits: str = "chunked",
             answer_tokens: int | None = None, master_weights: bool | None = None, accumulation_steps: int = 1,
             offload: bool = False, adapt: Callable[[nn.Module], object] | None = None, skip: Iterable[str] = (),
             trust_remote_code: bool = False, requantize: bool = False) -> Breakdown:  # fmt: skip
    """Estimate the memory of one training step (forward, backward, optimizer) on one device.

    Args:
        model: a causal LM of transformers, its config, a preset ("llama-3-8b", "7b", …), a directory, or
            a number of parameters (then states only). See `model_shapes`.
        method: "full" trains everything, "lora" adapters on frozen weights, "qlora" adapters on
            linears in NF4 with double quantization (embeddings, norms and the head stay in `dtype`).
        dtype: of weights and activations: float32, float16 or bfloat16. Adapters are fp32.
        optimizer: "adamw", "adamw8bit", "sgd-momentum" or "sgd".
        batch, seq: rows, and tokens per row, of one forward pass on one device.
        checkpoint: False; True for a checkpoint in every layer; a number of segments, the last of which is kept; or
            the paths of the layers that are recomputed.
        zero: stage 0 (DDP, which keeps the memory of gradients) to 3, over `world_size` devices; gradients are summed
            as in `finetune`, in FP32.
        flash: fused attention, which keeps no probabilities; False for eager attention.
        lora_r, target_modules: rank, and linears by name or "all-linear", as for `apply_lora_to_model`.
        logits: "chunked" (`nn.loss`: never all at once, answer tokens only) or "full" (transformers'
            own loss from `labels`).
        answer_tokens: with "chunked", how many tokens have a label (default: all but the first of each row).
        master_weights: keep fp32 masters (default: where weights in 16 bits are trained).
        accumulation_steps: above 1, gradients of earlier passes are there during forward.
        offload: optimizer state, masters and gradients lie in the host's memory (under stage 1 the full
            gradients stay on the device). `ZeroOptimizer` also keeps the rank's weights there, not counted.
        adapt: puts adapters on the model, in place of LoRA of `lora_r` on `target_modules`.
        skip: linears that "qlora" does not quantize, as for `quantize_model`.
        trust_remote_code: whether code that the model brings along may run.
        requantize: "qlora" makes NF4 of experts in MXFP4 (gpt-oss), in place of keeping their bytes.

    ValueError, TypeError: an argument out of range, or a model that transformers does not know.
    """
    shape = shape_of(model)
    name = str(dtype).removeprefix("torch.")
    words = {"method": (method, METHODS), "dtype": (name, DTYPES), "optimizer": (optimizer, tuple(MOMENTS)),
             "logits": (logits, ("chunked", "full"))}  # fmt: skip
    for argument, (word, known) in words.items():
        _need(argument, word, word in known, f"one of {', '.join(known)}")
    _need("zero", zero, zero in (0, 1, 2, 3), "0, 1, 2 or 3")
    counts = {"batch": batch, "seq": seq, "world_size": world_size, "lora_r": lora_r,
              "accumulation_steps": accumulation_steps}  # fmt: skip
    for argument, count in counts.items():
        _need(argument, count, isinstance(count, int) and count >= 1, "an integer of at least 1")
    known = shape is None or shape.layers > 0
    _need("model", model, known or method == "full", "more than a number of parameters for LoRA")
    tokens = batch * seq
    labelled = batch * (seq - 1) if answer_tokens is None else answer_tokens
    _need("answer_tokens", labelled, 0 <= labelled <= tokens, f"from 0 to batch · seq = {tokens}")

    c, full = getattr(torch, name).itemsize, method == "full"
    masters = full and c == 2 if master_weights is None else master_weights
    held, replicated = accumulation_steps > 1, zero == 0 and world_size > 1
    run, title, extra = Run(), shape.name if shape else "", 0
    if known:
        title, config = config_of(shape or model, trust_remote_code)
        adapt = adapt or partial(apply_lora_to_model, rank=lora_r, target_modules=target_modules)
        # Gradients of earlier passes stay where they arose, and DDP's in its buckets.
        low = replicated or (held and not (masters and zero == 0))
        setup = Setup(config.to_json_string(use_diff=False), repr(adapt), method, name, batch, seq, flash, logits,
                      labelled, low and zero < 2, tuple(skip), trust_remote_code,
                      method == "qlora" and not requantize and _in_mxfp4(model, config), config, adapt)  # fmt: skip
        run = run_dry(setup, checkpoint) if isinstance(checkpoint, int) else spliced(setup, set(checkpoint))
    if shape and shape.rounded:
        extra = shape.rounded - run.parameters
    trained = run.trained + extra * full
    states = state_bytes(run.weights + c * extra, run.constants, trained, method, c, optimizer, masters)
    states, host = _spread(states, zero, world_size, offload)

    # Under ZeRO gradients are summed in FP32, bucket by bucket; over several devices that takes a copy (gloo's).
    width, shard = (c if full else 4), math.ceil(4 * trained / world_size) * (not offload)
    bucket = min(trained, ZeroOptimizer.bucket_elements + run.largest_trained)
    summing = bucket * (8 if world_size > 1 else width)
    courses = []
    for moment, course in run.courses():
        made = course["gradients"] // width
        if zero >= 2 or (offload and zero == 0):
            arrived = -(-made // world_size) * (not offload)
            course["gradients"] = width * arrived
            course["buffers"] += (4 - width) * arrived + held * shard
        elif low:
            course["gradients"] += states["gradients"]
        if zero == 2:  # whole until their bucket is full
            course["buffers"] += np.where(made < bucket, width * made, summing)
        if held and replicated:
            course["buffers"] += states["gradients"]  # those of earlier passes, beside the buckets
        elif held and masters and zero == 0:
            course["buffers"] += 4 * trained  # the masters' gradients of earlier passes
        course["buffers"] += run.made_whole(method, zero, c)
        courses.append((moment, course | {name: size + 0 * made for name, size in states.items()
                                          if name != "gradients"}))  # fmt: skip
    if courses and zero == 1:
        last = states | {"buffers": summing + shard}
        courses.append(("sum of the gradients", {name: np.array([size]) for name, size in last.items()}))
    # The masters are stepped with FP32 gradients, in the place of 16-bit ones that have gone by then.
    wide = math.ceil(4 * trained / (world_size if zero else 1)) - states["gradients"] * (zero != 1 and not replicated)
    if optimizer == "adamw8bit":
        piece = min(PIECE, math.ceil(run.largest_trained / (world_size if zero else 1)))
        wide = wide * masters + BYTES_WHILE_STEPPING * piece
    step = states | {"buffers": wide * ((masters or optimizer == "adamw8bit") and not offload)}
    courses.append(("optimizer step", {name: np.array([size]) for name, size in step.items()}))

    title += f", {method}, {name}, {optimizer}"
    if known:
        title += f", {batch} × {seq} tokens" + (f", checkpoint={checkpoint}" if checkpoint else "")
    if zero:
        title += f", ZeRO-{zero} over {world_size}" + " with offload" * offload
    flops = accumulation_steps * sum(part.flops for part in run.parts)
    found = _breakdown(title, states, courses, run.parameters + extra, trained, host)
    return replace(found, flops=flops, layers=run.layers)


def _in_mxfp4(model, config) -> bool:
    """Whether the experts of a model, loaded or not, are in MXFP4."""
    held = isinstance(model, nn.Module) and any(isinstance(module, MXFP4Experts) for module in model.modules())
    return held or format_of(quantization_of(config.to_dict())) == "mxfp4"


def _need(argument: str, value, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{argument} must be {expected}, got {value!r}")


@dataclass(frozen=True)
class Setup:
    """All that decides about a dry run: equal ones are run once. The arguments are those of `estimate`."""

    config_text: str
    adapt_text: str
    method: str
    dtype: str
    batch: int
    seq: int
    flash: bool
    logits: str
    labelled: int
    held: bool
    skip: tuple[str, ...]
    trust_remote_code: bool
    in_mxfp4: bool  # the experts
    config: object = field(compare=False)
    adapt: Callable = field(compare=False)


@dataclass(frozen=True)
class Run:
    """What a dry run found: bytes of weights and scales, numbers of parameters, and the parts of the step."""

    weights: int = 0
    constants: int = 0
    parameters: int = 0
    trained: int = 0
    largest_trained: int = 0
    largest_packed: int = 0  # bytes of the largest NF4 weight where it is made dense
    largest_gathered: int = 0  # bytes of the largest layer, or of the embedding table
    parts: tuple[Part, ...] = ()

    def made_whole(self, method: str, zero: int, c: int) -> int:
        """What is there only while it is used: a dequantized weight; or under ZeRO-3 a layer's weights, with the buffer
        that they came in, or in its place their gradients in FP32, twice while these are summed."""
        return self.largest_packed if zero < 3 else self.largest_gathered * (8 // c if method == "full" else 2)

    def courses(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """(moment, component → bytes after each of its events), in order; always "gradients" and "buffers" too."""
        alive = Counter()
        for part in self.parts:
            if len(part.changes["buffers"]):
                course = {component: alive[component] + row.cumsum() for component, row in part.changes.items()}
                alive.update({component: int(row.sum()) for component, row in part.changes.items()})
                yield part.name, course

    @property
    def layers(self) -> dict[str, float]:
        """Path → bytes that a layer leaves behind in the forward pass, per FLOP, in their order."""
        return {part.layer: sum(int(row.sum()) for row in part.changes.values()) / max(1, part.flops)
                for part in self.parts if part.name.startswith("forward of")}  # fmt: skip


def spliced(setup: Setup, recomputed: set[str]) -> Run:
    """The step in which these layers are recomputed: their parts of the run where all are, the rest of the other."""
    kept, again = (run_dry(setup, checkpoint) for checkpoint in (False, True))
    unknown = recomputed - kept.layers.keys()
    _need("checkpoint", sorted(unknown), not unknown, f"paths of layers such as {next(iter(kept.layers), None)}")
    pairs = zip(kept.parts, again.parts, strict=True)
    return replace(kept, parts=tuple(second if second.layer in recomputed else first for first, second in pairs))


@lru_cache(maxsize=64)
def run_dry(setup: Setup, checkpoint: bool | int = False) -> Run:
    """Build the model of a setup on fake tensors and trace its step."""
    dtype = getattr(torch, setup.dtype)
    with torch.random.fork_rng(devices=[]), SizesOnly():
        model = build(setup.config, dtype, setup.method == "qlora", setup.skip, setup.flash, setup.trust_remote_code)
        weights = list(model.parameters())
        packed = [module for module in model.modules() if isinstance(module, FrozenNF4)]
        # Their codes and the course of a step are as in NF4; the scales, and what decoding takes, are not.
        in_mxfp4 = {module for module in packed if setup.in_mxfp4 and isinstance(module, NF4Experts)}
        if setup.method == "full":
            train_whole(model)
        else:
            setup.adapt(model)
        layers = repeated_layers(model)
        if not isinstance(checkpoint, bool):
            _need("checkpoint", checkpoint, 1 <= checkpoint <= len(layers),
                  f"False, True or a number of segments from 1 to {len(layers)}")  # fmt: skip
        table = model.get_input_embeddings().weight.nbytes
        gathered = max([table, *(sum(p.nbytes for p in layer.parameters()) for layer in layers.values())])
        ids = torch.zeros((setup.batch, setup.seq), dtype=torch.long)
        place = torch.arange(setup.batch * (setup.seq - 1)).view(setup.batch, setup.seq - 1)
        labels = F.pad(torch.where(place < setup.labelled, 0, IGNORE_INDEX), (1, 0), value=IGNORE_INDEX)
        sizes = [p.numel() for p in model.parameters() if p.requires_grad]
        # A CPU multiplies with the codes as they are; who asks about 16 bits has a GPU in mind.
        dense = dtype.itemsize == 2 or any(plan(torch.empty((ids.numel(), m.in_features)), m.quantized) not in ON_CPU
                                           for m in packed if isinstance(m, NF4Linear))  # fmt: skip
        trace = dry_step(model, {"input_ids": ids, "labels": labels}, dtype, checkpoint, setup.held, setup.logits)
    return Run(
        weights=sum(p.nbytes for p in weights),
        constants=sum(m.quantized.shape.numel() // 32 if m in in_mxfp4 else
                      sum(b.nbytes for name, b in m.named_buffers() if name != "nested_code") for m in packed),
        parameters=sum(p.numel() for p in weights) + sum(m.quantized.shape.numel() - m.weight.numel() for m in packed),
        trained=sum(sizes),
        largest_trained=max(sizes, default=0),
        largest_packed=max((m.quantized.shape[-2:].numel() * (DECODING if m in in_mxfp4 else dtype.itemsize)
                            for m in packed if dense or m in in_mxfp4), default=0),
        largest_gathered=gathered,
        parts=tuple(trace.parts()),
    )


def _spread(states: dict[str, int], zero: int, world_size: int, offload: bool) -> tuple[dict[str, int], int]:
    """(bytes of each state on one device, bytes moved to the host)."""
    divided = [name for stage in range(1, zero + 1) for name in DIVIDED[stage]]
    states = states | {name: math.ceil(states[name] / world_size) for name in divided}
    if not offload:
        return states, 0
    moved, host = ["optimizer state", "master weights", "gradients"], 0
    if zero == 1:  # the full gradients stay, and the rank's part of their mean is on the host
        moved.remove("gradients")
        host = math.ceil(states["gradients"] / world_size)
    return states | dict.fromkeys(moved, 0), host + sum(states[name] for name in moved)


def _breakdown(title, states, courses, parameters, trainable, host) -> Breakdown:
    """`courses`: (moment, component → bytes after each of its events)."""
    fullest: dict[str, Counter] = {}
    most = Counter(states)
    for name, course in courses:
        at = int(sum(course.values()).argmax())
        alive = Counter({component: int(row[at]) for component, row in course.items()})
        fullest[name] = max(fullest.get(name, alive), alive, key=Counter.total)
        most |= Counter({component: int(row.max()) for component, row in course.items()})
    totals = {name: alive.total() for name, alive in fullest.items()}
    peak = max(totals, key=totals.get)
    names = [*states, *sorted(most.keys() - states.keys())]
    lines = {name: Component(most[name], fullest[peak][name]) for name in names if most[name]}
    notes = []
    if peak == "optimizer step" and "buffers" in lines:
        notes.append("buffers at the peak: gradients as FP32, which the masters are stepped with")
    if len(totals) == 1:
        notes.append("only the number of parameters is known: activations are not in this breakdown")
    return Breakdown(title, lines, totals, parameters, trainable, host, tuple(notes))
