"""LoRA linear: y = x Wᵀ + b + s (x Aᵀ) Bᵀ, forward and backward, as one autograd Function.

W (N, K) is frozen as a rule, A (r, K) and B (N, r) are trained, s = alpha / r
(Hu et al. 2021, "LoRA", section 4.1). With S = x Aᵀ (M, r) and the gradient dy (M, N):

    forward    S = x Aᵀ            y  = x Wᵀ + b + s S Bᵀ
    backward   dS = s dy B         dx = dy W + dS A
               dA = dSᵀ x          dB = s dyᵀ S          dW = dyᵀ x (only if W is trained)

FLOPs: the base product costs 2MNK, LoRA adds 2Mr(N + K) forward and 4Mr(N + K) backward:
0.8 % at M = N = K = 4096 and r = 16. Written as separate layers it costs far more than that in
*memory traffic*, since the LoRA term, its scaling and the sum are each an (M, N) array that is
written and read again. Here the product for y starts with, or ends in, S Bᵀ, so no array of
that size exists besides y.

Saved for backward: x and S only (S is (M, r), tiny). dW is skipped for a frozen W, and a
4-bit W is dequantized again in backward instead of being kept.
"""

import threading
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class QuantizedWeight(Protocol):
    """What this file needs of a quantized weight: its shape (N, K), and its values written into `out`."""

    shape: torch.Size

    def dequantize(self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor: ...


def lora_linear_reference(x, weight, bias, lora_A, lora_B, scaling, keep=None, dropout_p=0.0):
    """The specification, in ops that autograd differentiates: x Wᵀ + b + s (x̂ Aᵀ) Bᵀ.

    x̂ is x after dropout, which touches the LoRA path alone: x̂ = x · keep / (1 - dropout_p), with
    `keep` a boolean mask of x's shape (None: nothing is dropped). All tensors share one dtype.
    """
    dropped = x if keep is None else x * keep / (1 - dropout_p)
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(dropped, lora_A), lora_B)


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


def dense_weight(weight: "torch.Tensor | QuantizedWeight", x: torch.Tensor) -> torch.Tensor:
    """The weight (N, K) in x's dtype. A quantized one lies in the scratch: use it before the next call."""
    if isinstance(weight, torch.Tensor):
        return weight.to(x.dtype)
    return weight.dequantize(x.dtype, out=scratch(torch.Size(weight.shape), x.dtype, x.device))


# Skinny products (one side is r) are slow in most BLAS layouts. These keep r as the *rows* of a
# contiguous left operand, which measures 1.5 to 4 times as fast on a CPU as the layouts that the
# formulas suggest: S is kept as Sᵀ (r, M), and dB comes out as dBᵀ.


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, dropout_p):
        rows = x.reshape(-1, x.shape[-1])
        keep = None
        dropped = rows
        if dropout_p > 0:
            keep = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - dropout_p)
            dropped = rows * keep
            scaling = scaling / (1 - dropout_p)
        y = F.linear(rows, dense_weight(weight, rows), None if bias is None else bias.to(x.dtype))
        S_t = lora_A.to(x.dtype) @ dropped.t()
        y.addmm_(S_t.t(), lora_B.to(x.dtype).t(), alpha=scaling)
        plain = isinstance(weight, torch.Tensor)
        ctx.save_for_backward(rows, S_t, lora_A, lora_B, keep, weight if plain else None)
        ctx.quantized = None if plain else weight
        ctx.scaling = scaling
        ctx.x_shape = x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, S_t, lora_A, lora_B, keep, weight = ctx.saved_tensors
        if ctx.quantized is not None:
            weight = ctx.quantized
        needs_x, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dW = db = dA = dB = None
        dS_t = None
        if needs_x or needs_A:
            dS_t = (lora_B.t() * ctx.scaling).to(dy.dtype).contiguous() @ dy.t()
        if needs_A:
            dA = (dS_t @ (x if keep is None else x * keep)).to(lora_A.dtype)
        if needs_B:
            dB = (S_t @ dy).to(lora_B.dtype).mul_(ctx.scaling).t()
        if needs_x:
            dx = dy @ dense_weight(weight, x)
            if keep is None:
                dx.addmm_(dS_t.t(), lora_A.to(dy.dtype))
            else:
                dx.addcmul_(dS_t.t() @ lora_A.to(dy.dtype), keep.to(dy.dtype))
            dx = dx.view(ctx.x_shape)
        if needs_weight:
            dW = (dy.t() @ x).to(weight.dtype)
        if needs_bias:
            db = dy.sum(0).to(ctx.bias_dtype)
        return dx, dW, db, dA, dB, None, None


def lora_linear(
    x: torch.Tensor,
    weight: "torch.Tensor | QuantizedWeight",
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """y = x Wᵀ + b + s (x̂ Aᵀ) Bᵀ in x's dtype, with a gradient for every tensor that asks for one.

    Args:
        x: (..., K), floating point. The product is computed and returned in its dtype.
        weight: (N, K), any floating dtype; or a quantized weight, which gets no gradient.
        bias: (N,) or None.
        lora_A: (r, K), any floating dtype; its gradient has that dtype.
        lora_B: (N, r), likewise.
        scaling: s, usually alpha / r.
        dropout_p: probability in [0, 1) with which an element of x is dropped on the LoRA path
            (the base product sees all of x). The mask comes from torch's generator.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ValueError: shapes that do not fit, or `dropout_p` outside [0, 1).
    """
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be (..., {K}) for a weight of shape {(N, K)}, got {tuple(x.shape)}")
    r = lora_A.shape[0]
    if lora_A.shape != (r, K) or lora_B.shape != (N, r):
        raise ValueError(
            f"lora_A must be (r, {K}) and lora_B ({N}, r), got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        )
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be ({N},), got {tuple(bias.shape)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    return _LoRALinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p)
