"""The training loop, whole: forward, scale, backward, unscale, clip, step, update, schedule.

`train_step` is one optimizer step (`train_step_reference` in plain torch), `train` repeats it over the rows.
Accumulation, loss scaling and clipping have to be done in one order:

    every micro-batch   loss · scale / tokens of the whole step  → backward: gradients add up, still scaled
    once per step       unscale → clip → step (skipped after an overflow) → update the scale

The study documents' `loss = mean(batch) / accumulation_steps` weighs a token in a short micro-batch more. Here each
micro-batch's *sum* is divided by the answer tokens of the whole step, so that 1 × 8 rows, 8 × 1 rows and 2 ranks of
4 × 1 rows give the same gradient.
"""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from ..amp import GradScaler
from ..nn.loss import IGNORE_INDEX
from ..optim import AdamW, cosine_with_warmup
from ..optim.accumulate import TokenMean
from .data import Example, batch_indices, collate
from .distributed import World
from .evaluation import CausalLM
from .models import Base
from .settings import FinetuneSettings


def train_step_reference(model, batches: list, optimizer, scaler, max_grad_norm: float, dtype: torch.dtype) -> float:
    """One optimizer step over several micro-batches: the study documents' loop, put right.

    Args:
        batches: (token ids, labels) pairs, each (rows, length), right-padded; a label of -100 is not learnt.
        dtype: of the computation, by autocast.

    Returns:
        the loss per answer token.
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


def train_step(
    training: "Training", batches: Iterable, answer_tokens: int, max_grad_norm: float
) -> tuple[float, float]:
    """The same on several ranks, with a loss that looks at answer tokens alone, a schedule, and a check for NaN.

    Args:
        batches: (micro-batch on the device, whether it is the last) pairs, those of this rank.
        answer_tokens: of all micro-batches of all ranks.
        max_grad_norm: the gradient's L2 norm is clipped to this; 0 leaves it alone.

    Returns:
        (loss in nats per answer token, gradient norm before clipping), over all ranks.

    Raises:
        Diverged: before a step that would make every weight NaN. (Loss scaling skips such a step instead.)
    """
    lm, optimizer, scaler, world = training.lm, training.optimizer, training.scaler, training.world
    mean = TokenMean(answer_tokens / world.size)  # gradients are averaged over ranks
    for batch, last in batches:
        with torch.autocast(lm.device.type, dtype=training.dtype, enabled=training.dtype != torch.float32):
            loss = world.run(lambda batch=batch: lm.loss(batch), sync=last)  # summed over answer tokens
        scaler.scale(mean.part(loss)).backward()

    idle = [name for name, p in lm.model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:  # what has not met the loss would silently stay as it is
        raise ValueError(f"{len(idle)} trainable parameters got no gradient, the first is {idle[0]}")
    world.collect_gradients(scaler)
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = world.clip_gradients(parameters, max_grad_norm or math.inf).item()
    loss = world.sum(mean.loss_sum.item()) / answer_tokens
    if not scaler.is_enabled() and not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Diverged(f"the loss is {loss:g} and its gradient's norm {grad_norm:g}")
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    skipped = scaler.get_scale() < scale  # after an overflow; so is its place in the schedule
    training.skipped = training.skipped + 1 if skipped else 0
    if not skipped:
        training.schedule.step()
        training.moved = training.moved or grad_norm > 0
    optimizer.zero_grad(set_to_none=True)
    if training.skipped == SKIPPED:
        raise Diverged(f"the last {SKIPPED} steps overflowed, down to a loss scale of {scaler.get_scale():g}, and were "
                       f"skipped (loss {loss:g})")  # fmt: skip
    return loss, grad_norm


SKIPPED = 20  # overflows in a row that end a run; the first loss scale, 2^16, is below 1 after 17


class Diverged(ValueError):
    """The loss or its gradient is not finite any more, or no step has changed anything."""


@dataclass
class Training:
    """A model with adapters, and all that changes while it is trained."""

    lm: CausalLM
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: GradScaler
    dtype: torch.dtype = torch.float32  # of the computation
    world: World = field(default_factory=World)
    skipped: int = 0  # the latest steps in a row that overflowed
    moved: bool = False  # a step has changed the adapters


def optimizer_steps(settings: FinetuneSettings, rows: int, ranks: int) -> int:
    """How many the settings ask for."""
    rows_per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * ranks
    return settings.max_steps or max(1, math.ceil(settings.num_train_epochs * rows / rows_per_step))


def prepare(base: Base, settings: FinetuneSettings, total: int, world: World | None = None) -> Training:
    """Optimizer, schedule over `total` steps and loss scaler for the adapters of a model.

    Under `world` it is wrapped for training among its ranks (default: this process alone).
    """
    world = world or World()
    parameters = world.wrap(base.model, base.device)
    optimizer = AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = cosine_with_warmup(optimizer, total, settings.warmup_ratio)
    lm = world.evaluate(lambda: CausalLM(base.model, base.examples[0].input_ids[None, :8]))
    return Training(lm, optimizer, schedule, GradScaler(enabled=base.dtype == torch.float16), base.dtype, world)


def train(
    training: Training, examples: list[Example], total: int, settings: FinetuneSettings, first: int = 0
) -> Iterator[dict]:
    """Train until `total` optimizer steps are done; yields the measurements of each.

    Args:
        examples: encoded rows; step i takes the rows that `batch_indices` names for it.
        settings: rows per micro-batch, micro-batches per step and rank, clipping, and the seed.
        first: optimizer steps done already.
    """
    training.lm.model.train()
    world, size, seed = training.world, settings.per_device_train_batch_size, settings.seed
    rows_per_step = size * settings.gradient_accumulation_steps * world.size
    training.moved = training.schedule.last_epoch > 0
    for step in range(first, total):
        started = time.perf_counter()
        rows = [examples[i] for i in batch_indices(step, len(examples), rows_per_step, seed)]
        answer_tokens = sum(row.answer_tokens for row in rows)  # of all ranks: each knows the whole batch
        learning_rate = training.schedule.get_last_lr()[0]
        batches = _micro_batches(rows, size, training.lm.device, world, (seed, step))
        try:
            loss, grad_norm = train_step(training, batches, answer_tokens, settings.max_grad_norm)
        except Diverged as error:
            with world.shared_errors():
                raise Diverged(f"step {step + 1}: {error}: training cannot go on; {_advice(training)}") from None
        tokens = sum(len(row.input_ids) for row in rows)
        if step + 1 == total and not training.moved:
            with world.shared_errors():
                raise Diverged(
                    f"step {total}: no step has changed the adapters (loss {loss:g}, gradient {grad_norm:g}, loss "
                    f"scale {training.scaler.get_scale():g}); {_advice(training)}"
                )
        yield {
            "step": step + 1, "epoch": round((step + 1) * rows_per_step / len(examples), 4), "loss": loss,
            "learning_rate": learning_rate, "grad_norm": grad_norm, "answer_tokens": answer_tokens,
            "tokens_per_second": round(tokens / (time.perf_counter() - started), 1),
        }  # fmt: skip


def _advice(training: Training) -> str:
    lower = f"a lower --learning-rate than {training.schedule.base_lrs[0]:g}"
    if training.scaler.is_enabled():
        return f"what helps is a --dtype of wider range (bfloat16, float32) or {lower}"
    return f"{lower} is what most often helps"


def _micro_batches(rows: list[Example], size: int, device: torch.device, world: World, seed: tuple) -> Iterator:
    """(micro-batch, whether it is the last) of this rank, every `world.size`th of the step's."""
    mine = range(0, len(rows), size)[world.rank :: world.size]
    for at in mine:
        world.seed(*seed, at)
        yield collate(rows[at : at + size], 0, device), at == mine[-1]


@contextlib.contextmanager
def stop_after_step(world: World) -> Iterator[SimpleNamespace]:
    """The first Ctrl-C or SIGTERM within sets `wished`, to stop after this step; the second stops at once.

    Not so under torchrun, which passes on a Ctrl-C that has reached its processes already, and where
    `World.note_signal` looks after SIGTERM.
    """
    stop, alone = SimpleNamespace(wished=False), world.mode == "none"

    def note(number, frame):
        if stop.wished and alone:
            raise KeyboardInterrupt
        if not stop.wished:
            print("\nstopping after this step", file=sys.stderr)
        stop.wished = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)[: 1 + alone]}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
