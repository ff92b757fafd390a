"""Linear warmup, then half a cosine: the learning rate of update k out of T.

    k < W        lr · max(k, ½) / W
    W ≤ k < T    min_lr + (lr − min_lr) · (1 + cos(π (k − W) / (T − W))) / 2
    k ≥ T        min_lr

k counts optimizer updates, not micro-batches (`optimizer_steps`). Starting the warmup at k/W, as is common, makes the
very first update (k = 0) a no-op; here it moves the weights by half of what the second may. Every other k agrees with
transformers' `get_cosine_schedule_with_warmup`; past T that one would climb again, this one stays. Other `DECAYS` than
the cosine: a straight line down, and none (transformers' "linear" and "constant_with_warmup").
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

DECAYS = ("cosine", "linear", "constant")


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, floor: float = 0.0) -> float:
    """Document 003's schedule, put right: what update `step` multiplies the learning rate by, at the end `floor`."""
    if step < warmup_steps:
        return max(step, 0.5) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return floor + (1.0 - floor) * cosine


@dataclass
class _Factor:
    """That, or another decay after the same warmup, for one parameter group: `LambdaLR` saves an object's numbers."""

    warmup_steps: int
    total_steps: int
    floor: float
    decay: str

    def __call__(self, step: int) -> float:
        if self.decay == "cosine" or step < self.warmup_steps:
            return warmup_cosine(step, self.warmup_steps, self.total_steps, self.floor)
        left = (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps)
        return 1.0 if self.decay == "constant" else self.floor + (1.0 - self.floor) * max(0.0, left)


class _Schedule(LambdaLR):
    def load_state_dict(self, state_dict: dict) -> None:
        """Also hand the rate to the optimizer, which torch leaves to whoever loads the optimizer's state."""
        super().load_state_dict(copy.deepcopy(state_dict))
        for group, lr in zip(self.optimizer.param_groups, self.get_last_lr(), strict=True):
            group["lr"] = lr


def schedule_with_warmup(
    optimizer: torch.optim.Optimizer, decay: str, total_steps: int, warmup_ratio: float = 0.1, min_lr: float = 0.0
) -> LambdaLR:
    """Warm up over the first ceil(warmup_ratio · total_steps) updates, then go down to `min_lr` by one of `DECAYS`.

    Call `.step()` once after each `optimizer.step()` that was not skipped. The state dict holds the position and the
    numbers of the schedule, so a resumed run continues exactly.

    Each parameter group's `lr` is taken as its peak; `total_steps` are optimizer updates (see `optimizer_steps`).

    Raises:
        TypeError: `total_steps` is not an integer.
        ValueError: another `decay`, `total_steps` < 1, `warmup_ratio` outside 0…1, or `min_lr` outside 0…lr.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {decay!r}")
    if type(total_steps) is not int:
        raise TypeError(f"total_steps must be an int, got {total_steps!r}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0.0 <= warmup_ratio <= 1.0:
        raise ValueError(f"warmup_ratio must lie in 0…1, got {warmup_ratio}")
    peaks = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    for peak in peaks:
        if not 0.0 <= min_lr <= peak:
            raise ValueError(f"min_lr must lie in 0…lr (lr is {peak}), got {min_lr}")
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    floors = [min_lr / peak if peak > 0 else 0.0 for peak in peaks]
    return _Schedule(optimizer, [_Factor(warmup_steps, total_steps, floor, decay) for floor in floors])


def cosine_with_warmup(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_ratio: float = 0.1, min_lr: float = 0.0
) -> LambdaLR:
    """`schedule_with_warmup` along half a cosine; with the same arguments and errors."""
    return schedule_with_warmup(optimizer, "cosine", total_steps, warmup_ratio, min_lr)


def optimizer_steps(
    examples: int, batch_size: int, accumulation_steps: int = 1, world_size: int = 1, epochs: int = 1
) -> int:
    """Optimizer updates in a run: what `total_steps` must be. ValueError: an argument is below 1.

    Each of `world_size` processes sees ceil(examples / world_size) examples per epoch, in micro-batches of
    `batch_size`; `accumulation_steps` of them make an update, and so does a shorter tail at the end of an epoch.
    """
    for name, value in list(locals().items()):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    micro_batches = math.ceil(math.ceil(examples / world_size) / batch_size)
    return epochs * math.ceil(micro_batches / accumulation_steps)
