"""One training step in mixed precision: cast, scale, accumulate, unscale, clip, step, adapt the scale.

The order matters: clipping before unscaling would bound the norm of S·g, and leave a gradient of norm 1/S.
"""

import torch
import torch.nn.functional as F

from ..optim.accumulate import GradientAccumulationTrainer
from .grad_scaler import GradScaler
from .master_weights import LOW, MasterWeights


def mixed_precision_step_reference(model, optimizer, scaler, inputs, labels, dtype=torch.float16) -> float:
    """Document 001's train_step, with the loss in FP32; returns the loss."""
    optimizer.zero_grad()
    with torch.autocast(labels.device.type, dtype=dtype):
        logits = model(inputs)
    loss = F.cross_entropy(logits.float(), labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    scaler.step(optimizer)
    scaler.update()
    return loss.item()


class MixedPrecisionTrainer(GradientAccumulationTrainer):
    """Trains a model with 16-bit arithmetic and FP32 weights in the optimizer.

        trainer = MixedPrecisionTrainer(model, optimizer)
        for inputs, labels in loader:
            loss = trainer.train_step(inputs, labels)

    An FP32 model runs under autocast. A model that is FP16 or BF16 itself gets FP32 master weights, which take its
    parameters' place in the optimizer. FP16 comes with loss scaling; BF16 has the exponent range of FP32 and needs
    none. Loss, accumulation and the other arguments are those of `GradientAccumulationTrainer`.

    `scaler` is the `GradScaler` (disabled for BF16), `masters` the `MasterWeights`, or None for an FP32 model.

    ValueError: another dtype, a 16-bit model under DistributedDataParallel, and as `GradientAccumulationTrainer`.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype = torch.float16,
        init_scale: float = 65536.0, max_norm: float | None = 1.0, accumulation_steps: int = 1, scheduler=None,
    ):  # fmt: skip
        if dtype not in LOW:
            raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype}")
        scaler = GradScaler(init_scale, enabled=dtype == torch.float16)
        super().__init__(model, optimizer, accumulation_steps, max_norm, scheduler, scaler)
        self.dtype = dtype
        low = any(p.dtype in LOW for group in optimizer.param_groups for p in group["params"])
        if low and self.distributed:  # masters would collect gradients that no rank has averaged yet
            raise ValueError("model must be in FP32 to be wrapped in DistributedDataParallel, got 16-bit parameters")
        self.masters = MasterWeights(model, optimizer) if low else None
        self._stepped = False

    def train_step(self, inputs, labels: torch.Tensor) -> float:
        """Forward and backward of one micro-batch; every `accumulation_steps`-th call also updates.

        Returns the mean loss of its answer tokens (NaN if it has none). ValueError: logits and labels do not fit.
        """
        if self._micro_batches == 0:
            self.model.zero_grad()  # its 16-bit parameters are not the optimizer's
        super().train_step(inputs, labels)
        return self.last_loss.item()

    def finish(self) -> bool:
        """Update from a tail shorter than `accumulation_steps`.

        Returns whether the parameters were updated: not without an answer token, nor after an overflow.
        """
        return super().finish() and self._stepped

    def _forward(self, inputs):
        with torch.autocast(next(self.model.parameters()).device.type, dtype=self.dtype):
            return super()._forward(inputs)

    def _backward(self, loss: torch.Tensor) -> None:
        super()._backward(loss)
        if self.masters is not None:
            self.masters.collect_gradients()

    def _step(self) -> None:
        written = self.masters.step_arguments() if self.masters else {}  # by the step itself, if it can
        self._stepped = super()._step(**written)
        if self.masters is not None and self._stepped and not written:
            self.masters.write_back()
