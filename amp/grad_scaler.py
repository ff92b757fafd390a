"""Dynamic loss scaling: keep FP16 gradients out of the underflow, and find the scale by trial.

A gradient below 2**-25 rounds to zero in FP16. Multiplying the loss by S multiplies every gradient by S (the chain
rule is linear), so tiny ones survive; after they are in FP32 they are divided by S again and the update is what it
would have been. The largest useful S is unknown and moves, so it is searched for: an overflow (inf or NaN in any
gradient) skips the step and halves S; `growth_interval` steps *in a row* without one double it. (Micikevicius et al.
2018, section 3.2.)

`GradScaler` is a `torch.amp.GradScaler` that unscales by our kernel and adapts the scale by `next_scale`. Scale, run of
good steps and overflow flag stay on the gradients' device as 0-dim tensors. With an optimizer that reads the flag there
(`optim.AdamW` with its kernel, or torch's `fused=True`) a step never waits for the GPU; any other needs one `.item()`.
"""

from collections import defaultdict

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
    plain `optimizer.step()`. `unscale_` refuses FP16 gradients, where what underflowed is gone: ValueError.
    """

    def __init__(self, *args, device: str | torch.device = "cuda", **settings):
        if args and isinstance(args[0], (str, torch.device)):
            device, *args = args
        torch.device(device)
        super().__init__("cpu", *args, **settings)
        self._overflow_flags: dict[torch.device, torch.Tensor] = {}

    def overflow_flag(self, device: torch.device) -> torch.Tensor:
        """A 0-dim float32 there, until `update`: who sets it to 1 before `unscale_` or `step` has the step skipped.

        For kernels that multiply by the scale themselves and see what overflows, such as `scaled_matmul`.
        """
        flag = torch.zeros((), dtype=torch.float32, device=device)
        return self._overflow_flags.setdefault(flag.device, flag)  # "cuda" is cuda:0, too

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16) -> dict[torch.device, torch.Tensor]:
        """For torch's `unscale_`, one launch for each dtype; returns an overflow flag per device. `allow_fp16`: only
        look, as an optimizer unscales by itself."""
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not allow_fp16 and any(p.grad.dtype == torch.float16 for p in params):
            raise ValueError(
                "Attempting to unscale FP16 gradients. "
                "Keep the parameters in float32 under autocast, or wrap the optimizer in MasterWeights."
            )
        if any(hasattr(p.grad, "device_mesh") for p in params):
            raise TypeError("gradients must be plain tensors, got DTensors; under FSDP use torch.amp.GradScaler")
        # torch goes by its id, which a new one may get when this one is gone.
        self._per_optimizer_states[id(optimizer)]["optimizer"] = optimizer
        groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        for param in params:
            if param.grad.is_sparse and param.grad.dtype == torch.float16:
                # Two finite FP16 entries of one index may overflow only when they are added.
                param.grad = param.grad.coalesce()
            grad = param.grad._values() if param.grad.is_sparse else param.grad
            groups[grad.device, grad.dtype].append(grad)
        flags: dict[torch.device, torch.Tensor] = {}
        for (device, _), grads in groups.items():
            flag = flags.setdefault(device, self.overflow_flag(device).clone())
            unscale_(grads, None if allow_fp16 else inv_scale.to(device, non_blocking=True), flag)
        return flags

    def step(self, optimizer: torch.optim.Optimizer, *args, **kwargs):
        try:
            return super().step(optimizer, *args, **kwargs)
        except BaseException:  # torch would leave these behind, and multiply the scales in the next step
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)
            raise

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
            states = self._per_optimizer_states.values()
            flags = [flag for state in states for flag in state["found_inf_per_device"].values()]
            if not flags:
                raise AssertionError("No inf checks were recorded prior to update.")
            factors = self._growth_factor, self._backoff_factor, self._growth_interval
            overflow = sum(flag.to(self._scale.device, non_blocking=True) for flag in flags) > 0
            scale, run = next_scale(self._scale, self._growth_tracker, overflow, *factors)
            self._scale.copy_(scale)
            self._growth_tracker.copy_(run)
        self._per_optimizer_states.clear()
        self._overflow_flags.clear()
