"""Optimizers, schedules and gradient accumulation."""

from .accumulate import GradientAccumulationTrainer
from .adamw import AdamW
from .adamw8bit import AdamW8bit
from .schedule import cosine_with_warmup, optimizer_steps

__all__ = ["AdamW", "AdamW8bit", "GradientAccumulationTrainer", "cosine_with_warmup", "optimizer_steps"]
