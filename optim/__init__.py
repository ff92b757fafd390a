"""Optimizers, schedules and gradient accumulation."""

from .adamw import AdamW
from .schedule import cosine_with_warmup, optimizer_steps

__all__ = ["AdamW", "cosine_with_warmup", "optimizer_steps"]
