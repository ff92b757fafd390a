"""Ground floor: one Triton kernel family a file, its torch reference beside it."""

from .runtime import backend

__all__ = ["backend"]
