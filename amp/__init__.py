"""Mixed precision: number formats, autocast, loss scaling, master weights."""

from .formats import FloatFormat, describe
from .grad_scaler import GradScaler

__all__ = ["FloatFormat", "GradScaler", "describe"]
