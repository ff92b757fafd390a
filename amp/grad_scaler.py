"""Dynamic loss scaling: keep FP16 gradients out of the underflow, and find the scale by trial.

A gradient below 2**-25 rounds to zero in FP16. Multiplying the loss by S multiplies
every gradient by S (the chain rule is linear), so tiny ones survive; after they
are in FP32 they are divided by S again and the update is what it would have been.
The largest useful S is unknown and moves, so it is searched for: an overflow
(inf or NaN in any gradient) skips the step and halves S; `growth_interval` steps
*in a row* without one double it. (Micikevicius et al. 2018, section 3.2.)

The scale, the run of good steps and the overflow flag stay on the gradients' device
as 0-dim tensors. With an optimizer that can read the flag there (`optim.AdamW` with
its kernel, or torch's `fused=True`) a training step never waits for the GPU; any
other optimizer needs one `.item()` to decide whether to step.

Behaviour, errors and state dict are those of `torch.amp.GradScaler`.
"""

from collections import defaultdict
from collections.abc import Iterable
from enum import Enum

import torch

from ..kernels.unscale import unscale_


class _Stage(Enum):
    READY = 0
    UNSCALED = 1
    STEPPED = 2


class _OptimizerState:
    """What happened to one optimizer since the last `update()`."""

    def __init__(self):
        self.stage = _Stage.READY
        self.found_inf: dict[torch.device, torch.Tensor] = {}


class GradScaler:
    """Scales the loss, unscales the gradients, skips steps that overflowed, adapts the scale.

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)                      # only needed to clip
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)                          # skipped if a gradient is not finite
        scaler.update()

    Args:
        init_scale: the scale to begin with.
        growth_factor: multiplies the scale after `growth_interval` good steps in a row; above 1.
        backoff_factor: multiplies the scale after a step with an overflow; below 1.
        growth_interval: length of that run, in optimizer steps.
        enabled: False makes every method a no-op and `step` a plain `optimizer.step()`.

    Raises:
        AssertionError: `growth_factor` ≤ 1 or `backoff_factor` ≥ 1 (as in torch).
    """

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ):
        if enabled and growth_factor <= 1.0:
            raise AssertionError(f"growth_factor must be > 1.0, got {growth_factor}")
        if enabled and backoff_factor >= 1.0:
            raise AssertionError(f"backoff_factor must be < 1.0, got {backoff_factor}")
        self._enabled = enabled
        self._init_scale = init_scale
        self._growth_factor = growth_factor
        self._backoff_factor = backoff_factor
        self._growth_interval = growth_interval
        self._init_growth_tracker = 0
        # Made by the first scale(), on the device of the loss.
        self._scale: torch.Tensor | None = None
        self._growth_tracker: torch.Tensor | None = None
        # By the optimizer itself and not its id, which a new one may get when an old one is gone.
        self._states: dict[torch.optim.Optimizer, _OptimizerState] = defaultdict(_OptimizerState)

    def scale(self, outputs):
        """Multiply a tensor, or every tensor of a (nested) list or tuple, by the scale.

        Raises:
            ValueError: something in `outputs` is neither a tensor nor an iterable.
        """
        if not self._enabled:
            return outputs
        if isinstance(outputs, torch.Tensor):
            if self._scale is None:
                self._materialize(outputs.device)
            return outputs * self._scale.to(outputs.device, non_blocking=True)
        if isinstance(outputs, Iterable):
            scaled = map(self.scale, outputs)
            return type(outputs)(scaled) if isinstance(outputs, (list, tuple)) else scaled
        raise ValueError("outputs must be a Tensor or an iterable of Tensors")

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, in place, and look for inf and NaN; no sync.

        Raises:
            RuntimeError: called twice, or after `step`, without an `update` between.
            ValueError: a gradient is FP16. What underflowed there is gone and cannot be
                unscaled: keep parameters in FP32 (autocast) or use `MasterWeights`.
        """
        if not self._enabled:
            return
        self._require_scale("unscale_")
        state = self._states[optimizer]
        if state.stage is _Stage.UNSCALED:
            raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")
        if state.stage is _Stage.STEPPED:
            raise RuntimeError("unscale_() is being called after step().")
        # The reciprocal is rounded once, from fp64.
        self._check_and_multiply(optimizer, self._scale.double().reciprocal().float(), allow_fp16=False)
        state.stage = _Stage.UNSCALED

    def step(self, optimizer: torch.optim.Optimizer, *args, **kwargs):
        """Unscale if `unscale_` was not called, then `optimizer.step(*args, **kwargs)` unless a gradient overflowed.

        Returns:
            what `optimizer.step` returned, None when it was skipped.

        Raises:
            RuntimeError: called twice without an `update` between, or with a closure.
            AssertionError: `scale` was never called, or no parameter has a gradient.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if "closure" in kwargs:
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        self._require_scale("step")
        state = self._states[optimizer]
        if state.stage is _Stage.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            result = self._step_on_device(optimizer, state, *args, **kwargs)
        else:
            if state.stage is _Stage.READY:
                self.unscale_(optimizer)
            if not state.found_inf:
                raise AssertionError("No inf checks were recorded for this optimizer.")
            result = None
            if not any(flag.item() for flag in state.found_inf.values()):
                result = optimizer.step(*args, **kwargs)
        state.stage = _Stage.STEPPED
        return result

    def _step_on_device(self, optimizer, state, *args, **kwargs):
        """Hand scale and flag to an optimizer whose kernel unscales and skips by itself (torch's protocol)."""
        grad_scale = getattr(optimizer, "grad_scale", None)
        if state.stage is _Stage.READY:
            ones = torch.ones_like(self._scale)
            self._check_and_multiply(optimizer, ones, allow_fp16=True)
            grad_scale = self._scale if grad_scale is None else self._scale * grad_scale
        flags = [flag.to(self._scale.device, non_blocking=True) for flag in state.found_inf.values()]
        optimizer.grad_scale = grad_scale
        optimizer.found_inf = sum(flags) if flags else torch.zeros_like(self._scale)
        try:
            return optimizer.step(*args, **kwargs)
        finally:
            del optimizer.grad_scale, optimizer.found_inf

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Adapt the scale to this iteration, or set it to `new_scale`; call once, after every `step`.

        Raises:
            AssertionError: no gradient was checked since the last `update`, or `new_scale`
                is a tensor with several elements or one that requires a gradient.
        """
        if not self._enabled:
            return
        self._require_scale("update")
        if new_scale is not None:
            if isinstance(new_scale, torch.Tensor):
                if new_scale.numel() != 1 or new_scale.requires_grad:
                    raise AssertionError(
                        "new_scale should be a float or a 1-element tensor with requires_grad=False, "
                        f"got shape {tuple(new_scale.shape)}, requires_grad={new_scale.requires_grad}"
                    )
                self._scale.copy_(new_scale.reshape(()))
            else:
                self._scale.fill_(new_scale)
        else:
            flags = [
                flag.to(self._scale.device, non_blocking=True)
                for state in self._states.values()
                for flag in state.found_inf.values()
            ]
            if not flags:
                raise AssertionError("No inf checks were recorded prior to update.")
            self._adapt(sum(flags) > 0)
        self._states.clear()

    def _adapt(self, overflow: torch.Tensor) -> None:
        """One move of the search, in 0-dim tensors so that nobody waits for the device.

        Products are taken in fp64 and rounded once; a growth that would make the scale infinite is left out.
        """
        wide = self._scale.double()
        grown = (wide * self._growth_factor).float()
        run = self._growth_tracker + 1
        due = run == self._growth_interval
        kept = torch.where(due & torch.isfinite(grown), grown, self._scale)
        self._scale.copy_(torch.where(overflow, (wide * self._backoff_factor).float(), kept))
        self._growth_tracker.copy_(run.masked_fill(due | overflow, 0))

    def _check_and_multiply(self, optimizer, factor: torch.Tensor, allow_fp16: bool) -> None:
        """Multiply every gradient by `factor` and record a flag a device; gradients of one dtype go in one launch."""
        groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if not allow_fp16 and grad.dtype == torch.float16:
                    raise ValueError(
                        "Attempting to unscale FP16 gradients. "
                        "Keep the parameters in float32 under autocast, or wrap the optimizer in MasterWeights."
                    )
                if grad.is_sparse:
                    # Two finite FP16 entries of one index may overflow only when they are added.
                    if grad.dtype == torch.float16:
                        grad = param.grad = grad.coalesce()
                    grad = grad._values()
                groups[grad.device, grad.dtype].append(grad)
        flags = self._states[optimizer].found_inf
        flags.clear()
        for (device, _), grads in groups.items():
            flag = flags.setdefault(device, torch.zeros((), dtype=torch.float32, device=device))
            unscale_(grads, factor.to(device, non_blocking=True), flag)

    def _materialize(self, device: torch.device) -> None:
        self._scale = torch.full((), self._init_scale, dtype=torch.float32, device=device)
        self._growth_tracker = torch.full((), self._init_growth_tracker, dtype=torch.int32, device=device)

    def _require_scale(self, method: str) -> None:
        if self._scale is None:
            raise AssertionError(
                f"Attempted {method} but _scale is None. This may indicate your script did not use "
                "scaler.scale(loss or outputs) earlier in the iteration."
            )

    def get_scale(self) -> float:
        """The scale as a Python number (waits for the device); 1.0 when disabled."""
        if not self._enabled:
            return 1.0
        return self._init_scale if self._scale is None else self._scale.item()

    def get_growth_factor(self) -> float:
        return self._growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        self._growth_factor = new_factor

    def get_backoff_factor(self) -> float:
        return self._backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        self._backoff_factor = new_factor

    def get_growth_interval(self) -> int:
        return self._growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        self._growth_interval = new_interval

    def is_enabled(self) -> bool:
        return self._enabled

    def _get_growth_tracker(self) -> int:
        if not self._enabled:
            return 0
        return self._init_growth_tracker if self._growth_tracker is None else self._growth_tracker.item()

    def state_dict(self) -> dict[str, float | int]:
        """The five entries of `torch.amp.GradScaler.state_dict()`; empty when disabled."""
        if not self._enabled:
            return {}
        return {
            "scale": self.get_scale(),
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._get_growth_tracker(),
        }

    def load_state_dict(self, state_dict: dict[str, float | int]) -> None:
        """Load this class's or torch's state dict; a no-op when disabled.

        Raises:
            RuntimeError: the dict is empty (saved from a disabled scaler).
        """
        if not self._enabled:
            return
        if not state_dict:
            raise RuntimeError(
                "The source state dict is empty, possibly because it was saved from a disabled instance of GradScaler."
            )
        self._init_scale = state_dict["scale"]
        self._growth_factor = state_dict["growth_factor"]
        self._backoff_factor = state_dict["backoff_factor"]
        self._growth_interval = state_dict["growth_interval"]
        self._init_growth_tracker = state_dict["_growth_tracker"]
        if self._scale is not None:
            self._scale.fill_(self._init_scale)
            self._growth_tracker.fill_(self._init_growth_tracker)

    def __getstate__(self) -> dict:
        """For pickle and copy: only between iterations, since the flags belong to live optimizers."""
        if self._states:
            raise AssertionError(
                "A GradScaler instance may only be pickled at the beginning of an iteration, "
                "or at the end after scaler.update()."
            )
        state = self.__dict__.copy()
        state["_init_scale"] = self.get_scale()
        state["_init_growth_tracker"] = self._get_growth_tracker()
        state["_scale"] = state["_growth_tracker"] = None
        return state
