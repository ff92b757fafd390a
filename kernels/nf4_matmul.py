"""Products with a 4-bit weight."""

import threading
from typing import Protocol

import torch

from .lora_product import lora_product


class QuantizedWeight(Protocol):
    """What is needed of a quantized weight: its shape (N, K), and its values in a dtype, written into `out`."""

    shape: torch.Size

    def dequantize(self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor: ...


_local = threading.local()


def scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer for a dequantized weight, valid until this thread's next call.

    On a CPU it is one reused block: fresh memory of this size costs a page fault for every 4 KiB.
    CUDA's caching allocator reuses blocks by itself, and knows about streams.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    blocks = _local.__dict__.setdefault("blocks", {})
    if dtype not in blocks or blocks[dtype].numel() < shape.numel():
        blocks[dtype] = torch.empty(shape.numel(), dtype=dtype)
    return blocks[dtype][: shape.numel()].view(shape)


def dense_weight(weight: torch.Tensor | QuantizedWeight, x: torch.Tensor) -> torch.Tensor:
    """The weight (N, K) in x's dtype. A quantized one lies in the scratch: use it before the next call."""
    if isinstance(weight, torch.Tensor):
        return weight.to(x.dtype)
    return weight.dequantize(x.dtype, out=scratch(torch.Size(weight.shape), x.dtype, x.device))


def quantized_product(x, weight, bias, S, lora_B, scale):
    return lora_product(x, dense_weight(weight, x), bias, S, lora_B, scale)
