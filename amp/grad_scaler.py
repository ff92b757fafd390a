"""Dynamic loss scaling: keep FP16 gradients out of the underflow, and find the scale by trial.

A gradient below 2**-25 rounds to zero in FP16. Multiplying the loss by S multiplies every gradient by S (the chain
rule is linear), so tiny ones survive; after they are in FP32 they are divided by S again and the update is what it
would have been. The largest useful S is unknown and moves, so it is searched for: an overflow (inf or NaN in any
gradient) skips the step and halves S; `growth_interval` steps *in a row* without one double it. (Micikevicius et al.
2018, section 3.2.)

`GradScaler` behaves as `torch.amp.GradScaler`, which keeps its books (`scale`, getters, state dict). Scale, run of good
steps and overflow flag stay on the gradients' device as 0-dim tensors. With an optimizer that reads the flag there
(`optim.AdamW` with its kernel, or torch's `fused=True`) a step never waits for the GPU; any other needs one `.item()`.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from ..kernels.unscale import unscale_


class GradScalerReference:
    """Document 001's GradScaler, put right: good steps count in a row, and `step` unscales by itself.

        scaler.scale_loss(loss).backward()
        scaler.step(optimizer)          # False: an overflow, skipped
    """

    def __init__(self, init_scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.scale = init_scale
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.good_steps = 0

    def scale_loss(self, loss):
        return loss * self.scale

    def step(self, optimizer):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for grad in grads:
            grad /= self.scale
        if not all(grad.isfinite().all() for grad in grads):
            self.scale *= self.backoff_factor
            self.good_steps = 0
            return False
        optimizer.step()
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale *= self.growth_factor
            self.good_steps = 0
        return True


def next_scale(scale, good_steps, overflow, growth_factor, backoff_factor, growth_interval):
    """The reference's last lines in 0-dim tensors (float32, int32, bool): the new scale and run of good steps.

    Products are rounded once, from fp64; a growth that would make the scale infinite is left out.
    """
    wide = scale.double()
    grown = (wide * growth_factor).float()
    good_steps = good_steps + 1
    due = good_steps == growth_interval
    kept = torch.where(due & torch.isfinite(grown), grown, scale)
    new = torch.where(overflow, (wide * backoff_factor).float(), kept)
    return new, good_steps.masked_fill(due | overflow, 0)


@dataclass
class _OptimizerState:  # since the last `update()`
    stage: str = "ready"  # then "unscaled", then "stepped"
    found_inf: dict[torch.device, torch.Tensor] = field(default_factory=dict)


class GradScaler(torch.amp.GradScaler):
    """Scales the loss, unscales the gradients, skips steps that overflowed, adapts the scale.

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)                      # only needed to clip
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)                          # skipped if a gradient is not finite
        scaler.update()

    Arguments as in torch.amp: device (a name only, the scale is where the first loss is; it may be left out, as in
    torch.cuda.amp), init_scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, enabled=True.
    `growth_factor` > 1 multiplies the scale after `growth_interval` good steps in a row, `backoff_factor` < 1 after one
    with an overflow (AssertionError otherwise, as in torch). With `enabled` False every method is a no-op and `step` a
    plain `optimizer.step()`.
    """

    def __init__(self, *args, device: str | torch.device = "cuda", **settings):
        if args and isinstance(args[0], (str, torch.device)):
            device, *args = args
        torch.device(device)
        super().__init__("cpu", *args, **settings)
        # By the optimizer itself and not its id, which a new one may get when an old one is gone.
        self._per_optimizer_states: dict[torch.optim.Optimizer, _OptimizerState] = defaultdict(_OptimizerState)
        self._overflow_flags: dict[torch.device, torch.Tensor] = {}

    def overflow_flag(self, device: torch.device) -> torch.Tensor:
        """A 0-dim float32 there, until `update`: who sets it to 1 before `unscale_` or `step` has the step skipped.

        For kernels that multiply by the scale themselves and see what overflows, such as `scaled_matmul`.
        """
        return self._overflow_flags.setdefault(device, torch.zeros((), dtype=torch.float32, device=device))

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, in place, and look for inf and NaN; no sync.

        Raises:
            RuntimeError: called twice, or after `step`, without an `update` between.
            ValueError: a gradient is FP16, where what underflowed is gone.
        """
        if not self._enabled:
            return
        self._check_scale_growth_tracker("unscale_")
        state = self._per_optimizer_states[optimizer]
        if state.stage == "unscaled":
            raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")
        if state.stage == "stepped":
            raise RuntimeError("unscale_() is being called after step().")
        # The reciprocal is rounded once, from fp64.
        self._check_and_multiply(optimizer, self._scale.double().reciprocal().float(), allow_fp16=False)
        state.stage = "unscaled"

    def step(self, optimizer: torch.optim.Optimizer, *args, **kwargs):
        """Unscale if `unscale_` was not called, then return `optimizer.step(*args, **kwargs)`; None if a gradient
        overflowed.

        Raises:
            RuntimeError: called twice without an `update` between, or with a closure.
            AssertionError: `scale` was never called, or no parameter has a gradient.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if "closure" in kwargs:
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[optimizer]
        if state.stage == "stepped":
            raise RuntimeError("step() has already been called since the last update().")
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            result = self._step_on_device(optimizer, state, *args, **kwargs)
        else:
            if state.stage == "ready":
                self.unscale_(optimizer)
            if not state.found_inf:
                raise AssertionError("No inf checks were recorded for this optimizer.")
            overflow = any(flag.item() for flag in state.found_inf.values())
            result = None if overflow else optimizer.step(*args, **kwargs)
        state.stage = "stepped"
        return result

    def _step_on_device(self, optimizer, state, *args, **kwargs):
        """Hand scale and flag to an optimizer whose kernel unscales and skips by itself (torch's protocol)."""
        grad_scale = getattr(optimizer, "grad_scale", None)
        if state.stage == "ready":
            self._check_and_multiply(optimizer, None, allow_fp16=True)
            grad_scale = self._scale if grad_scale is None else self._scale * grad_scale
        optimizer.grad_scale = grad_scale
        optimizer.found_inf = sum(self._flags(state), torch.zeros_like(self._scale))
        try:
            return optimizer.step(*args, **kwargs)
        finally:
            del optimizer.grad_scale, optimizer.found_inf

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Adapt the scale to this iteration, or set it to `new_scale`; call once, after every `step`.

        AssertionError: no gradient was checked since the last `update`, or `new_scale` is a tensor with several
        elements or one that requires a gradient.
        """
        if not self._enabled:
            return
        self._check_scale_growth_tracker("update")
        if isinstance(new_scale, torch.Tensor) and (new_scale.numel() != 1 or new_scale.requires_grad):
            raise AssertionError(
                "new_scale should be a float or a 1-element tensor with requires_grad=False, "
                f"got shape {tuple(new_scale.shape)}, requires_grad={new_scale.requires_grad}"
            )
        if new_scale is not None:
            self._scale.fill_(new_scale.reshape(()) if isinstance(new_scale, torch.Tensor) else new_scale)
        else:
            flags = self._flags(*self._per_optimizer_states.values())
            if not flags:
                raise AssertionError("No inf checks were recorded prior to update.")
            factors = self._growth_factor, self._backoff_factor, self._growth_interval
            scale, run = next_scale(self._scale, self._growth_tracker, sum(flags) > 0, *factors)
            self._scale.copy_(scale)
            self._growth_tracker.copy_(run)
        self._per_optimizer_states.clear()
        self._overflow_flags.clear()

    def _check_and_multiply(self, optimizer, factor: torch.Tensor | None, allow_fp16: bool) -> None:
        """Multiply gradients by `factor` (None: not at all) and record a flag per device; one launch for each dtype."""
        groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not allow_fp16 and any(p.grad.dtype == torch.float16 for p in params):
            raise ValueError(
                "Attempting to unscale FP16 gradients. "
                "Keep the parameters in float32 under autocast, or wrap the optimizer in MasterWeights."
            )
        if any(hasattr(p.grad, "device_mesh") for p in params):
            raise TypeError("gradients must be plain tensors, got DTensors; under FSDP use torch.amp.GradScaler")
        for param in params:
            if param.grad.is_sparse and param.grad.dtype == torch.float16:
                # Two finite FP16 entries of one index may overflow only when they are added.
                param.grad = param.grad.coalesce()
            grad = param.grad._values() if param.grad.is_sparse else param.grad
            groups[grad.device, grad.dtype].append(grad)
        flags = self._per_optimizer_states[optimizer].found_inf
        flags.clear()
        for (device, _), grads in groups.items():
            flag = flags.setdefault(device, self.overflow_flag(device).clone())
            unscale_(grads, None if factor is None else factor.to(device, non_blocking=True), flag)

    def _flags(self, *states: _OptimizerState) -> list[torch.Tensor]:
        """The overflow flags of all devices, on that of the scale."""
        flags = (flag for state in states for flag in state.found_inf.values())
        return [flag.to(self._scale.device, non_blocking=True) for flag in flags]
