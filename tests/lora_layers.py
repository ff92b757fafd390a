"""One LoRA layer whose adapter does something, and a forward and backward pass through it."""

import pytest
import torch
import torch.nn.functional as F
from handtuned.nn import LoRALinear
from handtuned.quant import quantize_nf4
from torch import nn

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def short(dtype):
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=short)


def layer(x, W, S, B, b=None):
    return F.linear(x, W, b) + 0.5 * (S @ B.t())


def quantized(N, K, block_size=64, double_quant=True, device="cpu"):
    return quantize_nf4(torch.randn(N, K, device=device) * 0.05, block_size, double_quant)


def adapted(base=None, rank=4, alpha=8.0, dropout=0.0):
    """A layer whose adapter does something (B is not zero)."""
    layer = LoRALinear(base or nn.Linear(64, 48), rank, alpha, dropout)
    nn.init.normal_(layer.lora_B)
    return layer


def run(layer, A, B, x, dy):
    x = x.detach().requires_grad_()
    for parameter in (A, B):
        parameter.grad = None
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "dA": A.grad, "dB": B.grad}


def operands(shape, dtype, device="cpu"):
    """x, W, b, A, B, dy; the adapter in fp32, the rest in `dtype`."""
    M, N, K, r = shape
    sizes = {"x": (M, K), "W": (N, K), "b": (N,), "A": (r, K), "B": (N, r), "dy": (M, N)}
    return [
        torch.randn(size, device=device).to(torch.float32 if name in "AB" else dtype) for name, size in sizes.items()
    ]


def exact(*tensors):
    return [t.double() for t in tensors]
