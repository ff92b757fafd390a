"""Optimizers, schedules, gradient accumulation and ZeRO."""

from .accumulate import GradientAccumulationTrainer
from .adamw import AdamW
from .adamw8bit import AdamW8bit
from .schedule import cosine_with_warmup, optimizer_steps
from .zero import ZeroOptimizer

__all__ = [
    "AdamW", "AdamW8bit", "GradientAccumulationTrainer", "ZeroOptimizer", "cosine_with_warmup", "optimizer_steps",
]  # fmt: skip
