"""The training loop, whole: forward, scale, backward, unscale, clip, step, schedule."""

import math
import resource
import sys
import time
from functools import partial

import torch

from . import data
from .models import choose_dtype
from .parallel import Team


class Diverged(ValueError):
    """The loss or its gradient is no finite number any more."""


def train(answers, examples, settings, optimizer, schedule, scaler, first, total, on_step, team=None):
    """Train until `total` optimizer steps are done.

    The loss of a step is the sum of all its tokens' losses divided by the count of all its
    answer tokens, over every accumulated forward pass of every rank: 1 × 8 rows, 8 × 1 rows and
    2 ranks of 4 × 1 rows give the same gradient, and a long answer weighs as much a token as a short one.

    Args:
        answers: the AnswerModel.
        examples: encoded rows; step i takes the rows that `data.batch_indices` names for it.
        first, total: optimizer steps done already, and in the whole run.
        on_step: called after every step with its measurements; raises to stop.
        team: the ranks that share the work (default: this process alone).

    Raises:
        Diverged: before a step that would make every weight NaN. (Loss scaling skips such a step instead.)
    """
    team = team or Team()
    model = answers.model.train()
    place = next(model.parameters()).device
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    dtype = choose_dtype(settings.dtype, place)
    micro = settings.per_device_train_batch_size
    rows_a_step = micro * settings.gradient_accumulation_steps * team.size

    for step in range(first, total):
        started = time.perf_counter()
        rows = [examples[i] for i in data.batch_indices(step, len(examples), rows_a_step, settings.seed)]
        answer_tokens = sum(row.answer_tokens for row in rows)  # of all ranks: each knows the whole batch
        loss_sum = torch.zeros((), device=place)

        mine = range(0, len(rows), micro)[team.rank :: team.size]
        for at in mine:
            batch = data.collate(rows[at : at + micro], pad_id=0)
            batch = {name: tensor.to(place) for name, tensor in batch.items()}
            team.seed(settings.seed, step, at)
            with torch.autocast(place.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = team.run(partial(answers.loss, batch), sync=at == mine[-1])
            scaler.scale(loss * team.size / answer_tokens).backward()  # gradients are averaged over ranks
            loss_sum += loss.detach()

        if step == first:
            _check_gradients(model)
        team.collect_gradients(scaler)
        scaler.unscale_(optimizer)
        grad_norm = team.clip_gradients(parameters, settings.max_grad_norm or math.inf).item()
        loss = team.sum(loss_sum.item()) / answer_tokens
        learning_rate = schedule.get_last_lr()[0]
        if not scaler.is_enabled() and not (math.isfinite(loss) and math.isfinite(grad_norm)):
            with team.together():
                raise Diverged(
                    f"step {step + 1}: the loss is {loss:g} and its gradient's norm {grad_norm:g}: training "
                    f"cannot go on; a lower --learning-rate than {settings.learning_rate:g} is what most often helps"
                )
        scale_before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale_before:  # a step that overflowed was skipped; so is its place in the schedule
            schedule.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - started
        on_step({
            "step": step + 1,
            "epoch": round((step + 1) * rows_a_step / len(examples), 4),
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "answer_tokens": answer_tokens,
            "tokens_per_second": round(sum(len(row.input_ids) for row in rows) / seconds, 1),
        })  # fmt: skip


def _check_gradients(model) -> None:
    """Every trainable parameter must have met the loss; one that has not would silently stay as it is."""
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise ValueError(f"{len(idle)} trainable parameters got no gradient, the first is {idle[0]}")


def peak_memory(place: torch.device) -> int:
    """Most bytes used so far: allocated on the GPU, or resident in this process on a CPU."""
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated(place)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
