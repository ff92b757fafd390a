"""Gradient accumulation: a big batch in small pieces, with exactly the big batch's gradient.

The losses of k micro-batches may be backpropagated one after another into the same `.grad`. What has to be right is
the division. The big batch's loss is a mean over its tokens,

    L = Σ_i ℓ_i / n,        n = n_1 + … + n_k  answer tokens,

and neither "divide each micro-batch's mean by k" (a short sequence's tokens weigh too much) nor "always divide by k"
(a tail of fewer than k is made too small) computes that. So each micro-batch contributes its *sum* of losses, over n.

A trainer that sees one micro-batch after the other learns n with the last one. It divides by an estimate (the first
count times k), which keeps gradients in the range that FP16 needs, and multiplies the finished gradient by
estimate / n. Under DistributedDataParallel only the last micro-batch's backward pass communicates.
"""

import contextlib
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel


def accumulated_step_reference(model, optimizer, micro_batches, max_norm=1.0) -> None:
    """Document 001's update, put right: weighted by tokens, a tail of any length, clipped, nothing left from before.

    `micro_batches` are all (inputs, labels) of this step; at least one label is not −100.
    """
    tokens = sum((labels != -100).sum() for _, labels in micro_batches)
    optimizer.zero_grad()
    for inputs, labels in micro_batches:
        logits = model(inputs).flatten(0, -2)
        loss = F.cross_entropy(logits, labels.flatten(), reduction="sum") / tokens
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()


class TokenMean:
    """The mean loss of all tokens of an optimizer step: `part(…).backward()` for each micro-batch, then `correct`.

    `expected`, a number or 0-dim tensor, is the count of all tokens of the step, or an estimate of it. Where gradients
    are averaged over ranks, all ranks' tokens divided by their number. `loss_sum` and `tokens` are this process's.
    """

    def __init__(self, expected):
        self.expected = expected
        self.loss_sum = self.tokens = 0

    def part(self, loss_sum: torch.Tensor, tokens=0) -> torch.Tensor:
        """What to backpropagate for one micro-batch; `tokens` is needed only if `expected` is an estimate."""
        self.loss_sum, self.tokens = self.loss_sum + loss_sum.detach(), self.tokens + tokens
        return loss_sum / self.expected

    def correct(self, gradients: list[torch.Tensor], tokens=None) -> None:
        """Scale the accumulated gradients to the count there was: this process's, or `tokens`, as for `expected`."""
        torch._foreach_mul_(gradients, float(self.expected / (self.tokens if tokens is None else tokens)))


class GradientAccumulationTrainer:
    """Trains with `accumulation_steps` micro-batches for each optimizer step.

        trainer = GradientAccumulationTrainer(model, optimizer, accumulation_steps=8)
        for epoch in range(3):
            print(trainer.train_epoch(loader))

    The loss is the cross-entropy of `model(inputs)` (or its `.logits`) over labels that are not −100. Logits are (…,
    classes) and labels (…), aligned: nothing is shifted here.

    Args:
        model: called with `inputs` (as keywords if that is a dict); may be wrapped in DistributedDataParallel.
        max_norm: bound of the gradient's L2 norm; None does not clip.
        scheduler: its `step()` is called once for each optimizer step that was not skipped.
        scaler: an `amp.GradScaler` or torch's, for a model that computes in FP16 (under autocast then).

    ValueError: `accumulation_steps` is not a whole number or < 1, `max_norm` ≤ 0, or the optimizer is a ZeroOptimizer
    on several ranks.
    """

    def __init__(self, model, optimizer, accumulation_steps=4, max_norm=1.0, scheduler=None, scaler=None):
        if not isinstance(accumulation_steps, int) or accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be a whole number and at least 1, got {accumulation_steps!r}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be above 0 or None, got {max_norm}")
        if getattr(optimizer, "across_ranks", False):  # a ZeroOptimizer's
            raise ValueError("optimizer must not be cut among ranks: this trainer takes its norm on one rank")
        self.model, self.optimizer, self.scheduler, self.scaler = model, optimizer, scheduler, scaler
        self.accumulation_steps, self.max_norm = accumulation_steps, max_norm
        self.distributed = isinstance(model, DistributedDataParallel)
        self._micro_batches = 0

    def train_step(self, inputs, labels) -> bool:
        """Accumulate one micro-batch, and update the parameters if it completes a batch.

        Returns whether the optimizer was asked to step: not if all labels were −100. ValueError: labels do not fit.
        """
        if self._micro_batches == 0:
            self.optimizer.zero_grad()
        last = self._micro_batches + 1 == self.accumulation_steps
        with self.model.no_sync() if self.distributed and not last else contextlib.nullcontext():
            loss_sum, tokens = cross_entropy_sum(self._forward(inputs), labels)
            if self._micro_batches == 0:
                self._mean = TokenMean((self._over_processes(tokens) * self.accumulation_steps).clamp(min=1))
            self._backward(self._mean.part(loss_sum, tokens))
        self._last = loss_sum.detach(), tokens
        self._micro_batches += 1
        return last and self._update()

    def finish(self) -> bool:
        """Update from an incomplete batch, if there is one; returns what `train_step` would."""
        if self._micro_batches == 0:
            return False
        for param in self._used_anywhere() if self.distributed else ():  # none of its micro-batches communicated
            self._average(param.grad)
        return self._update()

    def train_epoch(self, loader: Iterable) -> float:
        """One pass over (inputs, labels) pairs, the tail included; returns the mean loss of all answer tokens, each
        measured when its micro-batch was seen. ValueError: there was nothing to learn from."""
        self.model.train()
        loss = tokens = 0
        for inputs, labels in loader:
            self.train_step(inputs, labels)
            loss, tokens = loss + self._last[0], tokens + self._last[1]
        self.finish()
        if tokens == 0:
            raise ValueError("loader must yield labels other than -100, got none")
        return (loss / tokens).item()

    @property
    def last_loss(self) -> torch.Tensor:
        """Mean loss of the last micro-batch's answer tokens (0-dim; NaN if it had none)."""
        loss_sum, tokens = self._last
        return loss_sum / tokens

    def _forward(self, inputs):
        return self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)

    def _backward(self, loss: torch.Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def _update(self) -> bool:
        tokens = self._over_processes(self._mean.tokens)
        self._micro_batches = 0
        if tokens == 0:
            return False
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        params = self._params()
        self._mean.correct([param.grad for param in params], tokens)
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.max_norm)
        self._step()
        return True

    def _step(self, **arguments) -> bool:
        """The optimizer's step and the schedule's; whether there was one, not an overflow."""
        if self.scaler is None:
            self.optimizer.step(**arguments)
        else:
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer, **arguments)
            self.scaler.update()
            if self.scaler.get_scale() < scale:
                return False
        if self.scheduler is not None:
            self.scheduler.step()
        return True

    def _params(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _used_anywhere(self) -> list[torch.Tensor]:
        """The parameters with a gradient in any process, which is zero where there is none. All must call it."""
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        flags = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
        used = [p for p, share in zip(params, self._average(flags).tolist(), strict=True) if share > 0]
        for param in used:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        return used

    def _over_processes(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean count of all processes: DDP averages gradients, so counts are averaged alike."""
        tokens = tokens.double()
        return self._average(tokens) if self.distributed else tokens

    @staticmethod
    def _average(tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor.div_(dist.get_world_size())


def cross_entropy_sum(outputs, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropies of all labels (…) but −100, and their count (0-dim tensors).

    `outputs` are logits (…, classes), or have them as `.logits`. ValueError: the shapes do not fit.
    """
    logits = getattr(outputs, "logits", outputs)
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of the logits without the last dimension, {tuple(logits.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return F.cross_entropy(flat, labels.reshape(-1), reduction="sum"), (labels != -100).sum()
