"""How much memory a training step takes: model states, activations, logits, and the moment when most is alive.

States of A parameters, in bytes per parameter (Rajbhandari et al. 2020, "ZeRO", section 3.1):

                        weight   gradient   master   Adam's moments
    fp32                4        4          –        8                 = 16
    fp16 or bf16        2        2          4        8                 = 16: mixed precision does not halve it
    LoRA, trained part  4        4          –        8                 = 16, of a few per mille of A
    NF4, frozen part    0.516    –          –        –

Over N devices ZeRO-1 divides moments and masters by N, ZeRO-2 gradients too, ZeRO-3 weights too.

Activations grow with batch × sequence and are counted in `activations.py`. They and the gradients
are not at their largest together: backward frees the one while it makes the other, so the step is
followed moment by moment, and the peak is that of the fullest one.
"""

import math
from collections import Counter
from collections.abc import Iterable

import torch

from ..nn.checkpoint_plan import Segment, split_evenly
from ..quant.nf4 import nf4_bytes
from .activations import KINDS, PREFIX, LayerSetup, follow
from .breakdown import Breakdown, Component
from .model_shapes import PROJECTIONS, Shape, shape_of

METHODS = ("full", "lora", "qlora")
DTYPES = ("float32", "float16", "bfloat16")
MOMENTS = {"adamw": 2, "sgd-momentum": 1, "sgd": 0}
# What ZeRO divides from each stage on.
DIVIDED = {
    1: ("optimizer state", "master weights"),
    2: ("gradients",),
    3: ("weights", "quantization constants", "adapters"),
}


def state_bytes(shape: Shape, method: str, c: int, optimizer: str, masters: bool, adapters: int) -> dict[str, int]:
    """Bytes of each state on one device that shares nothing: c bytes per value, `adapters` parameters of LoRA."""
    full = method == "full"
    trained = shape.parameters if full else adapters
    packed = [out * into for out, into in shape.linears.values()] if method == "qlora" else []
    codes, scales = (sum(part) for part in zip((0, 0), *map(nf4_bytes, packed), strict=True))
    return {
        "weights": c * (shape.parameters - shape.layers * sum(packed)) + shape.layers * codes,
        "quantization constants": shape.layers * scales,
        "adapters": 4 * adapters,
        "gradients": (c if full else 4) * trained,
        "optimizer state": MOMENTS[optimizer] * (4 if masters or not full else c) * trained,
        "master weights": 4 * trained * masters,
    }


def estimate(
    model, method: str = "full", dtype: torch.dtype | str = torch.float32, optimizer: str = "adamw", batch: int = 1,
    seq: int = 512, checkpoint: bool | int = False, zero: int = 0, world_size: int = 1, flash: bool = True, *,
    lora_r: int = 8, target_modules: str | Iterable[str] = "all-linear", logits: str = "chunked",
    answer_tokens: int | None = None, master_weights: bool | None = None, accumulation_steps: int = 1,
    offload: bool = False,
) -> Breakdown:  # fmt: skip
    """Estimate the memory of one training step (forward, backward, optimizer) on one device.

    Args:
        model: a model or config of the Llama family, a preset ("llama-3-8b", "7b", …), a directory, or
            a number of parameters (then states only). See `model_shapes.shape_of`.
        method: "full" trains everything, "lora" adapters on frozen weights, "qlora" adapters on
            linears in NF4 with double quantization (embeddings, norms and the head stay in `dtype`).
        dtype: of weights and activations: float32, float16 or bfloat16. Adapters are fp32.
        optimizer: "adamw", "sgd-momentum" or "sgd".
        batch, seq: rows, and tokens per row, of one forward pass on one device.
        checkpoint: False; True for a checkpoint in every layer; or a number of segments.
        zero: stage 0 (replicated) to 3, over `world_size` devices.
        flash: fused attention, which keeps no probabilities; False for eager attention.
        lora_r, target_modules: rank, and projections by name or "all-linear".
        logits: "chunked" (`nn.loss`: never all at once, answer tokens only) or "full" (transformers'
            own loss from `labels`).
        answer_tokens: with "chunked", how many tokens have a label (default: all but the first of each row).
        master_weights: keep fp32 masters (default: where weights in 16 bits are trained).
        accumulation_steps: above 1, gradients of earlier passes are there during forward.
        offload: optimizer state, masters and gradients lie in the host's memory (under stage 1 the full
            gradients stay on the device). `ZeroOptimizer` also keeps the rank's weights there, not counted.

    Returns:
        A `Breakdown`.

    Raises:
        ValueError, TypeError: an argument out of range, or a model that is not of the Llama family.
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
    _need("model", shape.name, shape.layers or method == "full", "more than a number of parameters for LoRA")
    tokens = batch * seq
    labelled = batch * (seq - 1) if answer_tokens is None else answer_tokens
    _need("answer_tokens", labelled, 0 <= labelled <= tokens, f"from 0 to batch · seq = {tokens}")

    c = getattr(torch, name).itemsize
    full = method == "full"
    masters = full and c == 2 if master_weights is None else master_weights
    targets = frozenset() if full else _projections(target_modules)
    in_layer = sum(lora_r * sum(shape.linears[each]) for each in targets)  # adapter parameters
    trainable = shape.parameters if full else shape.layers * in_layer
    states = state_bytes(shape, method, c, optimizer, masters, shape.layers * in_layer)
    states, host = _spread(states, zero, world_size, offload)

    moments: dict[str, Counter] = {}
    if shape.layers:
        def gradient(count: int) -> int:
            return math.ceil(count / (world_size if zero >= 2 else 1)) * (states["gradients"] > 0)

        gradients = {
            "layer": gradient(c * shape.layer_parameters if full else 4 * in_layer),
            "table": gradient(c * shape.table_parameters * full),
            "norm": gradient(c * shape.hidden * full),
        }
        moments = follow(
            LayerSetup(shape, c, seq, full, targets, lora_r, flash), tokens, _segments(shape.layers, checkpoint),
            labelled if logits == "chunked" else None, gradients, held=accumulation_steps > 1,
        )  # fmt: skip
        for alive in moments.values():
            alive["buffers"] += _made_whole(shape, method, c, zero)
    step = moments["optimizer step"] = Counter({"gradients": states["gradients"]})
    if masters and not offload:
        # The masters are stepped with FP32 gradients: in the 16-bit ones' place, or beside them for a rank's shard.
        step["buffers"] = math.ceil(4 * trainable / world_size) if zero else states["gradients"]

    title = f"{shape.name}, {method}, {name}, {optimizer}"
    if shape.layers:
        title += f", {batch} × {seq} tokens" + (f", checkpoint={checkpoint}" if checkpoint else "")
    if zero:
        title += f", ZeRO-{zero} over {world_size}" + (" with offload" if offload else "")
    return _breakdown(title, shape, states, moments, trainable, host)


def _need(argument: str, value, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{argument} must be {expected}, got {value!r}")


def _projections(names: str | Iterable[str]) -> frozenset[str]:
    if names == "all-linear":
        return frozenset(PROJECTIONS)
    names = [names] if isinstance(names, str) else list(names)
    known = names and set(names) <= set(PROJECTIONS)
    _need("target_modules", names, known, f"all-linear or some of {', '.join(PROJECTIONS)}")
    return frozenset(names)


def _segments(layers: int, checkpoint: bool | int) -> tuple[Segment, ...]:
    if isinstance(checkpoint, bool):
        size = 1 if checkpoint else layers
        return tuple(Segment(at, at + size, recompute=checkpoint) for at in range(0, layers, size))
    _need("checkpoint", checkpoint, isinstance(checkpoint, int) and 1 <= checkpoint <= layers,
          f"False, True or a number of segments from 1 to {layers}")  # fmt: skip
    return split_evenly(layers, checkpoint)


def _made_whole(shape: Shape, method: str, c: int, zero: int) -> int:
    """What is there only while it is used: a dequantized weight, or under ZeRO-3 a layer's weights and gradients.

    Of a gathered layer its weights, and with them either the buffer that they came in or, in backward, its
    gradients and the buffer that these leave in.
    """
    if zero < 3:
        return c * max(out * into for out, into in shape.linears.values()) * (method == "qlora")
    return c * max(shape.layer_parameters, shape.table_parameters) * (3 if method == "full" else 2)


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


def _breakdown(title, shape, states, moments, trainable, host) -> Breakdown:
    whole = {name: Counter(states | {"gradients": 0}) + alive for name, alive in moments.items()}
    totals = {name: alive.total() for name, alive in whole.items()}
    peak = max(totals, key=totals.get)
    names = [*states, *(PREFIX + kind for kind in KINDS), "logits", "buffers"]
    most = {name: max(alive[name] for alive in whole.values()) for name in names} | states
    lines = {name: Component(most[name], whole[peak][name]) for name in names if most[name]}
    notes = []
    if peak == "optimizer step" and "buffers" in lines:
        notes.append("buffers at the peak: gradients as FP32, which the masters are stepped with")
    if not shape.layers:
        notes.append("only the number of parameters is known: activations are not in this breakdown")
    return Breakdown(title, lines, totals, shape.parameters, trainable, host, tuple(notes))
