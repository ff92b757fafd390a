"""Mixed precision: number formats, autocast, loss scaling, master weights."""

from ..kernels.matmul import scaled_matmul
from .autocast import autocast
from .formats import FloatFormat, describe
from .grad_scaler import GradScaler
from .master_weights import MasterWeights
from .trainer import MixedPrecisionTrainer

__all__ = [
    "FloatFormat", "GradScaler", "MasterWeights", "MixedPrecisionTrainer", "autocast", "describe", "scaled_matmul",
]  # fmt: skip
