"""The training loop, whole: forward, scale, backward, unscale, clip, step, update, schedule.

`train_step` is one optimizer step (`train_step_reference` in plain torch), `train` repeats it over the rows.
Accumulation, loss scaling and clipping have to be done in one order:

    every micro-batch   loss · scale / tokens of the whole step  → backward: gradients add up, still scaled
    once per step       unscale → clip → step (skipped after an overflow) → update the scale

A model that is trained whole in 16 bits has FP32 masters in the optimizer (`amp.MasterWeights`): gradients go to them
after each backward pass, and the step ends with the masters rounded into the model.

The study documents' `loss = mean(batch) / accumulation_steps` weighs a token in a short micro-batch more. Here each
micro-batch's *sum* is divided by the answer tokens of the whole step, so that 1 × 8 rows, 8 × 1 rows and 2 ranks of
4 × 1 rows give the same gradient.
"""

import contextlib
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..amp import GradScaler, MasterWeights
from ..nn.loss import IGNORE_INDEX
from ..nn.variants import lora_plus_groups
from ..optim import AdamW, AdamW8bit, ZeroOptimizer
from ..optim.accumulate import TokenMean
from ..optim.schedule import schedule_with_warmup
from .data import Example, batch_indices, collate
from .evaluation import CausalLM
from .models import Base
from .packing import packer
from .settings import FinetuneSettings
from .world import World


def train_step_reference(model, batches: list, optimizer, scaler, max_grad_norm: float, dtype: torch.dtype) -> float:
    """One optimizer step over several micro-batches: the study documents' loop, put right.

    Args:
        batches: (token ids, labels) pairs, each (rows, length), right-padded; a label of -100 is not learnt.
        dtype: of the computation, by autocast.

    Returns the loss per answer token.
    """
    tokens = sum((labels[:, 1:] != IGNORE_INDEX).sum() for _, labels in batches)
    total = 0.0
    for ids, labels in batches:
        with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum") / tokens
        scaler.scale(loss).backward()
        total += loss.item()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return total


def train_step(training: "Training", batches: Iterable, answer_tokens: int,
               max_grad_norm: float) -> tuple[float, float]:  # fmt: skip
    """The same on several ranks, with a loss that looks at answer tokens alone, a schedule, and a check for NaN.

    Args:
        batches: (micro-batch on the device, whether it is the last) pairs, those of this rank.
        answer_tokens: of all micro-batches of all ranks.
        max_grad_norm: the gradient's L2 norm is clipped to this; 0 leaves it alone.

    Returns (loss in nats per answer token, gradient norm before clipping), over all ranks.
    Diverged: before a step that would make every weight NaN. (Loss scaling skips such a step instead.)
    """
    lm, optimizer, scaler, world = training.lm, training.optimizer, training.scaler, training.world
    mean, masters = TokenMean(answer_tokens / (world.size if world.averages else 1)), training.masters
    lm.loss_scale = scaler.scale(torch.ones((), device=lm.device)) / mean.expected
    lm.found_inf = scaler.overflow_flag(lm.device)
    for batch, last in batches:
        sync = last or world.syncs_each_pass
        with torch.autocast(lm.device.type, dtype=training.dtype, enabled=training.dtype != torch.float32):
            loss = world.run(lambda batch=batch: lm.loss(batch), sync=sync)  # summed over answer tokens
        scaler.scale(mean.part(loss)).backward()
        if sync:
            world.collect_gradients(masters, scaler)

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    idle = [pair for pair in zip(training.names, parameters, strict=True) if pair[1].grad is None]
    if len(idle) == len(parameters):
        raise ValueError(f"none of {len(idle)} trainable parameters got a gradient, the first is {idle[0][0]}")
    if idle:  # these rows are too short for it, or took other experts
        warnings.warn(f"{len(idle)} trainable parameters met no row of a step, the first is {idle[0][0]}", stacklevel=1)
        for _, parameter in idle:
            parameter.grad = torch.zeros_like(parameter)
    scaler.unscale_(optimizer)
    grad_norm = world.clip_gradients(parameters, max_grad_norm or math.inf).item()
    loss = world.sum(mean.loss_sum.item()) / answer_tokens
    if not scaler.is_enabled() and not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Diverged(f"the loss is {loss:g} and its gradient's norm {grad_norm:g}: training cannot go on")
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    skipped = scaler.get_scale() < scale  # after an overflow; so is its place in the schedule
    training.skipped = training.skipped + 1 if skipped else 0
    if not skipped:
        masters.write_back()
        training.schedule.step()
        training.moved = training.moved or grad_norm > 0
    optimizer.zero_grad(set_to_none=True)
    if training.skipped == SKIPPED:
        raise Diverged(f"the last {SKIPPED} steps overflowed, down to a loss scale of {scaler.get_scale():g}, and were "
                       f"skipped (loss {loss:g}): training cannot go on")  # fmt: skip
    return loss, grad_norm


SKIPPED = 20  # overflows in a row that end a run; the first loss scale, 2^16, is below 1 after 17


class Diverged(ValueError):
    """The loss or its gradient is not finite any more, or no step has changed anything."""


@dataclass
class Training:
    """A run: what it began with, and the model whose adapters, or all of it, are trained, with all that changes."""

    lm: CausalLM
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: GradScaler
    dtype: torch.dtype = torch.float32  # of the computation
    world: World = field(default_factory=World)
    base: Base | None = None
    settings: FinetuneSettings | None = None
    total: int = 0  # optimizer steps of the whole run
    layout: Callable[[Sequence[Example]], list[list[int]] | None] = lambda rows: None  # which rows share a sequence
    elements: int = 0  # of the trained parameters
    names: list[str] | None = None  # of what the optimizer holds, in its order (default: as in the model)
    skipped: int = 0  # the latest steps in a row that overflowed
    moved: bool = False  # a step has changed the parameters
    masters: MasterWeights | ZeroOptimizer = field(init=False)  # in place of 16-bit parameters

    def __post_init__(self):
        self.names = self.names or [name for name, p in self.lm.model.named_parameters() if p.requires_grad]
        self.masters = self.world.masters(self.lm.model, self.optimizer)


OPTIMIZERS = {"adamw": AdamW, "adamw8bit": AdamW8bit}


def prepare(base: Base, settings: FinetuneSettings, total: int, world: World | None = None) -> Training:
    """Optimizer, schedule over `total` steps and loss scaler for the parameters of a model that are to be trained.

    Under `world` it is wrapped for training among its ranks (default: this process alone).
    """
    world = world or World()
    layout = packer(base.model, settings.max_seq_length) if settings.packing else Training.layout
    trained = {p: name for name, p in base.model.named_parameters() if p.requires_grad}
    elements, rate, decay = sum(p.numel() for p in trained), settings.learning_rate, settings.weight_decay
    groups = [{"params": [*trained], "lr": rate, "weight_decay": decay}]
    if settings.loraplus_lr_ratio:
        groups = lora_plus_groups(base.model, rate, settings.loraplus_lr_ratio, decay)
    names = [trained[parameter] for group in groups for parameter in group["params"]]
    optimizer = world.make_optimizer(base.model, base.device, groups, OPTIMIZERS[settings.optim], settings.offload)
    schedule = schedule_with_warmup(optimizer, settings.lr_scheduler, total, settings.warmup_ratio)
    lm = world.evaluate(lambda: CausalLM(base.model, base.examples[0].input_ids[None, :8]))
    scaler = GradScaler(enabled=base.dtype == torch.float16)
    return Training(lm, optimizer, schedule, scaler, base.dtype, world, base, settings, total, layout, elements, names)


def train(training: Training, first: int = 0) -> Iterator[dict]:
    """Do the optimizer steps after the `first`; yields the measurements of each. The rows of step i are those that
    `batch_indices` names."""
    training.lm.model.train()
    settings, examples, world = training.settings, training.base.examples, training.world
    rows_per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * world.size
    lengths = [len(example.input_ids) for example in examples] if settings.group_by_length else None
    training.moved = training.schedule.last_epoch > 0
    for step in range(first, training.total):
        started = time.perf_counter()
        rows = [examples[i] for i in batch_indices(step, len(examples), rows_per_step, settings.seed, lengths)]
        answer_tokens = sum(row.answer_tokens for row in rows)  # of all ranks: each knows the whole batch
        learning_rate = training.schedule.get_last_lr()[0]
        try:
            batches = _micro_batches(training, rows, step)
            loss, grad_norm = train_step(training, batches, answer_tokens, settings.max_grad_norm)
            if step + 1 == training.total and not training.moved:
                what = "model" if settings.method == "full" else "adapters"
                raise Diverged(f"no step has changed the {what} (loss {loss:g}, gradient {grad_norm:g}, "
                               f"loss scale {training.scaler.get_scale():g})")  # fmt: skip
        except Diverged as error:
            advice = f"a lower --learning-rate than {settings.learning_rate:g}"
            if training.scaler.is_enabled():
                advice = f"what helps is a --dtype of wider range (bfloat16, float32) or {advice}"
            else:
                advice += " is what most often helps"
            with world.shared_errors():
                raise Diverged(f"step {step + 1}: {error}; {advice}") from None
        tokens = sum(len(row.input_ids) for row in rows)
        yield {"step": step + 1, "epoch": round((step + 1) * rows_per_step / len(examples), 4), "loss": loss,
               "learning_rate": learning_rate, "grad_norm": grad_norm, "answer_tokens": answer_tokens,
               "tokens_per_second": round(tokens / (time.perf_counter() - started), 1)}  # fmt: skip


def _micro_batches(training: Training, rows: list[Example], step: int) -> Iterator:
    """(micro-batch, whether it is the last) of this rank, every `world.size`th of the step's."""
    world, size = training.world, training.settings.per_device_train_batch_size
    mine = range(0, len(rows), size)[world.rank :: world.size]
    for at in mine:
        world.seed(training.settings.seed, step, at)
        some = rows[at : at + size]
        yield collate(some, 0, training.lm.device, training.layout(some)), at == mine[-1]


@contextlib.contextmanager
def stop_after_step(world: World) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM within sets `world.stopping`, to stop after this step; the second stops at once.

    Not so under torchrun, which passes on a Ctrl-C that has reached its processes already, and where
    `World.note_signal` looks after SIGTERM.
    """

    def note(number, frame):
        if world.stopping and world.alone:
            raise KeyboardInterrupt
        if not world.stopping:
            print("\nstopping after this step", file=sys.stderr)
        world.stopping = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)[: 1 + world.alone]}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
