"""One training step in mixed precision: cast, scale, accumulate, unscale, clip, step, adapt the scale."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from .grad_scaler import GradScaler
from .master_weights import LOW, MasterWeights


class MixedPrecisionTrainer:
    """Trains a model with 16-bit arithmetic and FP32 weights in the optimizer.

        trainer = MixedPrecisionTrainer(model, optimizer)
        for inputs, labels in loader:
            loss = trainer.train_step(inputs, labels)

    An FP32 model runs under autocast. A model that is FP16 or BF16 itself gets FP32 master weights,
    which take its parameters' place in the optimizer. FP16 comes with loss scaling; BF16 has the
    exponent range of FP32 and needs none.

    The loss is the mean cross-entropy of `model(inputs)` (or its `.logits`) over labels that are not
    −100. Logits are (…, classes) and labels (…), aligned: nothing is shifted here.

    Args:
        model: on one device.
        optimizer: any torch optimizer over its parameters.
        dtype: torch.float16 or torch.bfloat16.
        init_scale: the loss scale to begin with, for FP16.
        max_norm: bound of the unscaled gradient's L2 norm; None does not clip.
        accumulation_steps: calls of `train_step` for each optimizer step; all their answer tokens
            weigh the same, as in one big batch.
        scheduler: its `step()` is called once for each optimizer step that was not skipped.

    Attributes:
        scaler: the `GradScaler` (disabled for BF16).
        masters: the `MasterWeights`, or None for an FP32 model.

    Raises:
        ValueError: another dtype, `accumulation_steps` no whole number or < 1, or `max_norm` ≤ 0.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype = torch.float16,
        init_scale: float = 65536.0,
        max_norm: float | None = 1.0,
        accumulation_steps: int = 1,
        scheduler=None,
    ):
        if dtype not in LOW:
            raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype}")
        if not isinstance(accumulation_steps, int) or accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be a whole number and at least 1, got {accumulation_steps!r}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be above 0 or None, got {max_norm}")
        if getattr(optimizer, "across_ranks", False):  # a ZeroOptimizer's
            raise ValueError("optimizer must not be cut among ranks: this trainer takes its norm on one rank")
        self.model = model
        self.optimizer = optimizer
        self.dtype = dtype
        self.max_norm = max_norm
        self.accumulation_steps = accumulation_steps
        self.scheduler = scheduler
        self.scaler = GradScaler(init_scale, enabled=dtype == torch.float16)
        low = any(p.dtype in LOW for group in optimizer.param_groups for p in group["params"])
        self.masters = MasterWeights(model, optimizer) if low else None
        self._micro_batches = self._tokens = 0

    def train_step(self, inputs, labels: torch.Tensor) -> float:
        """Forward and backward of one micro-batch; every `accumulation_steps`-th call also updates.

        Returns:
            the mean loss of this micro-batch's answer tokens (NaN if it has none).

        Raises:
            ValueError: logits and labels do not fit.
        """
        if self._micro_batches == 0:
            self.optimizer.zero_grad()
            self.model.zero_grad()  # its 16-bit parameters are not the optimizer's
        device = labels.device.type
        with torch.autocast(device, dtype=self.dtype):
            outputs = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)
        logits = getattr(outputs, "logits", outputs)
        if logits.shape[:-1] != labels.shape:
            raise ValueError(f"labels must have shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
        loss_sum = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum")
        tokens = (labels != -100).sum().item()
        if self._micro_batches == 0:
            # The count of the whole batch is known at its end; until then FP16 needs a divisor of that size.
            self._guess = max(1, tokens) * self.accumulation_steps
        self.scaler.scale(loss_sum / self._guess).backward()
        if self.masters is not None:
            self.masters.collect_gradients()
        self._tokens += tokens
        self._micro_batches += 1
        if self._micro_batches == self.accumulation_steps:
            self.finish()
        return loss_sum.item() / tokens if tokens else float("nan")

    def finish(self) -> bool:
        """Update from what has been accumulated, for a tail shorter than `accumulation_steps`.

        Returns:
            whether the parameters were updated: not without an answer token, nor after an overflow.
        """
        tokens, self._micro_batches, self._tokens = self._tokens, 0, 0
        if tokens == 0:
            return False
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.scaler.unscale_(self.optimizer)
        torch._foreach_mul_([p.grad for p in params], self._guess / tokens)
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.max_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer, **(self.masters.step_arguments() if self.masters else {}))
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            return False
        if self.masters is not None:
            self.masters.write_back()
        if self.scheduler is not None:
            self.scheduler.step()
        return True
