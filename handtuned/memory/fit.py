"""Make a training run fit into a memory budget: `--memory-budget 8GB`.

What is given up, in this order: time for recomputing layers, of each as many bytes per FLOP as it frees, and no more
layers than needed; then rows of one forward pass, made up for by accumulation, so that a step sees the same tokens and
its gradient stays the same. The run's own batches are looked through for the largest, its step runs dry on fake tensors
for each choice (`estimate`), and the choice is run once in earnest and measured. What that takes more than estimated
comes off the budget, and the choice is made again.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from ..nn.checkpoint_layers import checkpoint_layers
from ..training.data import Example, batch_indices, collate
from ..training.models import Base, add_adapters
from ..training.settings import FinetuneSettings, parse_size
from .breakdown import Breakdown, both
from .estimate import estimate
from .tracker import loss_of, measure


@dataclass(frozen=True)
class MemoryPlan:
    """What a run does to stay within a budget."""

    budget: int  # bytes
    asked_rows: int  # in one forward pass
    rows: int
    recomputed: tuple[str, ...]  # paths of layers
    layers: int  # that there are
    extra_flops: float  # of a step, as a fraction of those without recomputation
    peak: int  # bytes promised

    def __str__(self) -> str:
        rows = "" if self.rows == self.asked_rows else (
            f", {self.asked_rows} rows as {self.asked_rows // self.rows} × {self.rows}")  # fmt: skip
        return (f"within {both(self.budget)}: {len(self.recomputed)} of {self.layers} layers recomputed{rows}; peak "
                f"{both(self.peak)}, {100 * self.extra_flops:.1f} % more FLOPs")  # fmt: skip


def choose(budget: int, asked_rows: int, price: Callable[[int, tuple[str, ...]], Breakdown], everything: bool = False,
           more: int = 0) -> MemoryPlan:  # fmt: skip
    """The plan with the largest forward pass, and then the fewest recomputed layers, within `budget` bytes.

    Args:
        price: (rows of one forward pass, paths of recomputed layers) → breakdown of a step.
        everything: recompute all layers in any case.
        more: bytes that a step takes beyond its price.

    ValueError: no plan is within the budget; names the least that would do.
    """
    for rows in (size for size in range(asked_rows, 0, -1) if asked_rows % size == 0):
        whole = price(rows, ())
        # Of about equal ones the first: when backward comes to it, those behind it have gone.
        order = sorted(whole.layers, key=lambda path: -float(f"{whole.layers[path]:.1g}"))
        counts = range(len(order) if everything else 0, len(order) + 1)
        peaks = [price(rows, tuple(order[:count])).peak + more for count in counts]
        fitting = [count for count, peak in zip(counts, peaks, strict=True) if peak <= budget]
        if fitting:
            paths = tuple(order[: fitting[0]])
            chosen = price(rows, paths)
            extra = chosen.flops / max(1, whole.flops) - 1
            return MemoryPlan(budget, asked_rows, rows, paths, len(order), extra, chosen.peak + more)
    raise ValueError(f"--memory-budget must be at least {both(min(peaks))} for this run, with one row in a forward "
                     f"pass and layers recomputed, got {both(budget)}")  # fmt: skip


def arguments(settings: FinetuneSettings, dtype: torch.dtype, ranks: int = 1) -> dict:
    """What `estimate` is to be told of a run with these settings, besides the model."""
    stage = 3 if settings.parallel == "fsdp" else int(settings.parallel[-1]) if "zero" in settings.parallel else 0
    start = "default"  # another start has the same bytes, and would need the base's numbers
    plain = dataclasses.replace(settings, gradient_checkpointing=False, memory_budget=None, init_lora_weights=start,
                                method="lora" if settings.method == "full" else settings.method)  # if asked for later
    return {"method": settings.method, "dtype": dtype, "optimizer": settings.optim,
            "batch": settings.per_device_train_batch_size, "seq": settings.max_seq_length,
            "checkpoint": settings.gradient_checkpointing, "accumulation_steps": settings.gradient_accumulation_steps,
            "zero": stage, "world_size": ranks, "offload": settings.offload,
            "adapt": partial(adapt, settings=plain), "skip": settings.skip_modules or (),
            "trust_remote_code": settings.trust_remote_code, "requantize": settings.requantize}  # fmt: skip


def adapt(model: torch.nn.Module, settings: FinetuneSettings) -> None:
    """`add_adapters`, on fake tensors too: an adapter's file is read where tensors are real, and its sizes are kept."""
    fake = any(isinstance(parameter, FakeTensor) for parameter in model.parameters())
    with _disable_current_modes() if fake and settings.init_adapter else contextlib.nullcontext():
        add_adapters(model, settings)
    for module in model.modules() if fake else ():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                sizes = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = torch.nn.Parameter(sizes, parameter.requires_grad)


def fit(settings: FinetuneSettings, base: Base, training, total: int, directory: Path):
    """Put checkpoints into a run's model, as `--memory-budget` wants it.

    A run that is resumed, with as many rows on a rank, keeps the plan that it began with. Several ranks come to the
    same plan each, that of the estimate, without the pass in earnest.

    Returns (the settings with the micro-batch of the plan, the `MemoryPlan`), (settings, None) without a budget.
    ValueError: no plan is within the budget, or weights are shared out by FSDP, which is not estimated.
    """
    if not settings.memory_budget:
        return settings, None
    if settings.parallel == "fsdp":
        raise ValueError("--memory-budget must go with --parallel none, ddp or zero1 to zero3, got fsdp")
    world, asked = training.world, settings.per_device_train_batch_size
    saved, plan = directory / "results.json", None
    if world.size == 1 and saved.is_file() and (known := json.loads(saved.read_text(encoding="utf-8")).get("memory")):
        plan = MemoryPlan(**known | {"recomputed": tuple(known["recomputed"])})
    if plan is None or plan.asked_rows != asked:
        largest = {rows: _largest(base.examples, settings, training, total, rows) for rows in range(1, asked + 1)
                   if asked % rows == 0}  # fmt: skip

        def price(rows, recomputed):
            run = arguments(settings, base.dtype, world.size) | {"checkpoint": recomputed}
            run["accumulation_steps"] *= asked // rows
            candidates = [estimate(base.model, **run | {"batch": count, "seq": width, "answer_tokens": answers})
                          for _, answers, width, count, _ in largest[rows]]  # fmt: skip
            return max(candidates, key=lambda breakdown: breakdown.peak)

        plan = _measured(parse_size("memory_budget", settings.memory_budget), settings, training, price, largest)
    checkpoint_layers(base.model, plan.recomputed)
    passes = settings.gradient_accumulation_steps * (asked // plan.rows)
    print(f"memory       {plan}")
    smaller = {"per_device_train_batch_size": plan.rows, "gradient_accumulation_steps": passes}
    return dataclasses.replace(settings, **smaller), plan


def _largest(examples: Sequence[Example], settings: FinetuneSettings, training, total: int, rows: int) -> list[tuple]:
    """(tokens with padding, tokens with a label, length, sequences, examples) of the largest of a run's micro-batches,
    and of that with most labels."""
    per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * training.world.size
    lengths = [len(example.input_ids) for example in examples] if settings.group_by_length else None
    widest = fullest = (0, 0, 0, 0, [])
    for step in range(total):
        chosen = [examples[i] for i in batch_indices(step, len(examples), per_step, settings.seed, lengths)]
        for part in (chosen[at : at + rows] for at in range(0, per_step, rows)):
            bins = training.layout(part) or [[row] for row in range(len(part))]
            width = max(sum(len(part[row].input_ids) for row in shared) for shared in bins)
            found = width * len(bins), sum(row.answer_tokens for row in part), width, len(bins), part
            widest = max(widest, found, key=lambda it: it[:2])
            fullest = max(fullest, found, key=lambda it: it[1::-1])
    return [widest] if widest[:2] == fullest[:2] else [widest, fullest]


def _measured(budget: int, settings: FinetuneSettings, training, price, largest: dict) -> MemoryPlan:
    """A plan whose largest pass has been run and stays within the budget; on several ranks 5 % below it, and not run.
    """
    alone = training.world.mode == "none"
    more = 0 if alone else budget // 20  # the estimate comes within 5 %, and nothing is measured
    while True:
        plan = choose(budget, settings.per_device_train_batch_size, price, settings.gradient_checkpointing, more)
        checkpoint_layers(training.lm.model, plan.recomputed)
        if not alone:
            return dataclasses.replace(plan, peak=plan.peak - more)
        breakdown = price(plan.rows, plan.recomputed)
        held = breakdown["gradients"] if settings.gradient_accumulation_steps * plan.asked_rows > plan.rows else 0
        taken = max(_taken(training, part, held > 0) for *_, part in largest[plan.rows])
        taken += breakdown["optimizer state"] + breakdown["master weights"]
        peak = max(taken, breakdown.moments["optimizer step"])
        if peak <= budget:
            return dataclasses.replace(plan, peak=peak)
        more += peak - plan.peak


def _taken(training, rows: list[Example], held: bool) -> int:
    """Most bytes during one forward and backward pass on rows, before the optimizer has its state."""
    lm, trained = training.lm, [p for p in training.lm.model.parameters() if p.requires_grad]
    for parameter in trained if held else ():
        parameter.grad = torch.zeros_like(parameter)
    tensors = [*lm.model.parameters(), *lm.model.buffers(), *(p.grad for p in trained if p.grad is not None)]
    there = sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())
    lm.model.train()
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        batch = collate(rows, 0, lm.device, training.layout(rows))
        step = measure(lambda: loss_of(lm, batch, training.dtype).backward(), device=lm.device.type)
    for parameter in trained:
        parameter.grad = None
    return step.peak if lm.device.type == "cuda" else there + step.added
