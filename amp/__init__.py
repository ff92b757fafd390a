"""Mixed precision: number formats, autocast, loss scaling, master weights."""

from .grad_scaler import GradScaler

__all__ = ["GradScaler"]
