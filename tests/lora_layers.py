"""One LoRA layer whose adapter does something, and a forward and backward pass through it."""

import torch
from handtuned.nn import LoRALinear
from torch import nn

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def short(dtype):
    return str(dtype).removeprefix("torch.")


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
