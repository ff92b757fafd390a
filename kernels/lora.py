"""LoRA linear: y = x Wᵀ + b + s (x̂ Aᵀ) Bᵀ, forward and backward, as one autograd Function.

W (N, K) is frozen as a rule, A (r, K) and B (N, r) are trained, s = alpha / r (Hu et al. 2021,
"LoRA", section 4.1). x̂ is x after dropout, which touches the low-rank path alone. With S = x̂ Aᵀ (M, r):

    forward    S = x̂ Aᵀ            y  = x Wᵀ + b + s S Bᵀ
    backward   dS = s dy B         dx = dy W + dS A  (the mask on dS A)
               dA = dSᵀ x̂          dB = s dyᵀ S      dW = dyᵀ x (only if W is trained)

                FLOPs                bytes that must move (fp16)
    forward     2MNK + 2Mr(N + K)    2(MK + NK + MN) + 2r(N + K)
    backward    2MNK + 4Mr(N + K)    2(MN + NK + 2MK + 2r(N + K) + Mr)

At M = N = K = 4096 and r = 16, LoRA adds 0.8 % of the base product's FLOPs forward and 1.6 % backward. Written as
separate layers it costs much more than that in memory traffic: the low-rank term, its scaling and the sum are each an
(M, N) array, written and read again. Here y is the only array of that size in forward, and dx in backward.

Saved for backward: x and S, which is tiny. Nothing else: not the mask (a seed makes it again), not
a product with W, and a quantized W is dequantized a second time instead of being kept. dW is
skipped when W is frozen: dx still crosses W, but a third of a full backward's products falls away.

The pieces are in `lora_gemms.py` (S, dS, dB, dA), `matmul.py` (y and dx with a dense W) and `nf4_matmul.py` (the
same with W in NF4).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from .dropout import Dropout, new_seed, threshold_of
from .lora_gemms import lora_down, lora_down_grad, lora_up_grads
from .nf4 import NF4_CODE, NF4Weight, flatten, unflatten
from .nf4_cpu import nf4_product_native
from .nf4_matmul import plan, quantized_product, quantized_product_dx, takes_rows_as_they_are
from .runtime import traced


def lora_linear_reference(x, weight, bias, lora_A, lora_B, scaling, mask=None, dropout_p=0.0):
    """The specification, in operations that autograd differentiates: x Wᵀ + b + s (x̂ Aᵀ) Bᵀ.

    x̂ = x · mask / (1 - dropout_p), with a boolean `mask` of x's shape (None: nothing is
    dropped). All tensors share one dtype.
    """
    dropped = x if mask is None else x * mask / (1 - dropout_p)
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(dropped, lora_A), lora_B)


def _forward(x, weight, bias, A, B, scale, seed, threshold, way):
    """y (M, N) and S (M, r) from x (M, K)."""
    S = lora_down(x, A, None if seed is None else Dropout(seed, threshold))
    return quantized_product(way, x, weight, bias, S, A, B, scale), S


def _backward(dy, x, S, weight, A, B, scale, seed, threshold, way, needs):
    """dx, dA and dB from dy (M, N); None for what `needs` (three booleans) does not ask for."""
    needs_x, needs_A, needs_B = needs
    dropout = None if seed is None else Dropout(seed, threshold)
    dS, dB = lora_up_grads(dy, S, B, scale)
    dA = lora_down_grad(dS, x, A.dtype, dropout) if needs_A else None
    dx = quantized_product_dx(way, dy, weight, dS, A, B, scale, dropout) if needs_x else None
    return dx, dA, dB if needs_B else None


@torch.library.custom_op("handtuned::lora_linear", mutates_args=())
def _forward_op(
    x: torch.Tensor, weight: Sequence[torch.Tensor], sizes: Sequence[int], bias: torch.Tensor | None,
    A: torch.Tensor, B: torch.Tensor, scale: float, seed: torch.Tensor | None, threshold: int, way: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`_forward` as one operation for `torch.compile`, the weight flattened; and so its backward."""
    y, S = _forward(x, unflatten(weight, sizes), bias, A, B, scale, seed, threshold, way)
    return y.contiguous(), S.contiguous()


@_forward_op.register_fake
def _(x, weight, sizes, bias, A, B, scale, seed, threshold, way):
    return x.new_empty(x.shape[0], B.shape[0]), x.new_empty(x.shape[0], A.shape[0])


@torch.library.custom_op("handtuned::lora_linear_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor, x: torch.Tensor | None, S: torch.Tensor, weight: Sequence[torch.Tensor], sizes: Sequence[int],
    A: torch.Tensor, B: torch.Tensor, scale: float, seed: torch.Tensor | None, threshold: int, way: str,
    needs: Sequence[bool],
) -> list[torch.Tensor]:  # fmt: skip
    made = _backward(dy, x, S, unflatten(weight, sizes), A, B, scale, seed, threshold, way, needs)
    return [gradient.contiguous() for gradient in made if gradient is not None]


@_backward_op.register_fake
def _(dy, x, S, weight, sizes, A, B, scale, seed, threshold, way, needs):
    dx = dy.new_empty(dy.shape[0], A.shape[1])
    made = (dx, torch.empty_like(A), torch.empty_like(B))
    return [gradient for gradient, needed in zip(made, needs, strict=True) if needed]


def _rows_forward(x, weight, bias, A, B, scaling, dropout_p):
    """y (M, N) from x (..., K), and what backward takes: the rows of x, S, the seed, scale, threshold and way."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    threshold = threshold_of(dropout_p) if dropout_p else 0
    seed = new_seed(x.device) if threshold else None
    scale = scaling * 65536 / (65536 - threshold)
    way, bias = plan(rows, weight, threshold > 0, A.shape[0]), None if bias is None else bias.contiguous()
    if traced(rows):
        y, S = _forward_op(rows, *flatten(weight), bias, A, B, scale, seed, threshold, way)
    else:
        y, S = _forward(rows, weight, bias, A, B, scale, seed, threshold, way)
    return y, rows, S, seed, scale, threshold, way


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling, dropout_p):
        y, rows, S, seed, ctx.scale, ctx.threshold, ctx.way = _rows_forward(x, weight, bias, A, B, scaling, dropout_p)
        needs_weight, needs_A = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        dense = weight if isinstance(weight, torch.Tensor) else None
        ctx.save_for_backward(rows if needs_weight or needs_A else None, S, seed, A, B, dense)
        ctx.quantized, ctx.bias_dtype = None if dense is weight else weight, None if bias is None else bias.dtype
        ctx.x_shape = x.shape
        # No view: callers may change it in place.
        return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return _LoRALinear.backward(ctx, dy)
        dy = dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1])
        x, S, seed, A, B, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, _, _ = ctx.needs_input_grad
        needs, rest = (needs_x, needs_A, needs_B), (A, B, ctx.scale, seed, ctx.threshold, ctx.way)
        dW = (dy.t() @ x).to(weight.dtype) if needs_weight else None
        dbias = dy.sum(0).to(ctx.bias_dtype) if needs_bias else None
        weight, dx, dA, dB = weight if ctx.quantized is None else ctx.quantized, None, None, None
        if any(needs) and traced(dy):
            made = iter(_backward_op(dy, x, S, *flatten(weight), *rest, needs))
            dx, dA, dB = (next(made) if needed else None for needed in needs)
        elif any(needs):
            dx, dA, dB = _backward(dy, x, S, weight, *rest, needs)
        dx = dx if dx is None or dx.shape == ctx.x_shape else dx.view(ctx.x_shape)
        return dx, dW, dbias, dA, dB, None, None


def lora_linear(
    x: torch.Tensor, weight: torch.Tensor | NF4Weight, bias: torch.Tensor | None, lora_A: torch.Tensor,
    lora_B: torch.Tensor, scaling: float, dropout_p: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """y = x Wᵀ + b + s (x̂ Aᵀ) Bᵀ in x's dtype, with a gradient for every tensor that asks for one.

    Args:
        x: (..., K), floating point. Everything is computed in its dtype (sums in fp32) and returned in it.
        weight: (N, K) of any floating dtype; or one in NF4, which gets no gradient.
        bias: (N,) or None.
        lora_A: (r, K), r ≥ 1, of any floating dtype; its gradient has that dtype.
        lora_B: (N, r), likewise.
        scaling: s, usually alpha / r.
        dropout_p: probability in [0, 1) with which an element of x is dropped on the low-rank
            path (rounded to a multiple of 2⁻¹⁶; the scale makes up for what was dropped). The
            seed of the mask comes from torch's generator.

    Returns:
        (..., N) in x's dtype.

    Raises:
        TypeError: x is not floating point.
        ValueError: shapes that do not fit, an operand without memory, or `dropout_p` outside [0, 1).
    """
    arguments = x, weight, bias, lora_A, lora_B, scaling, dropout_p
    if has_torch_function((x,)):  # to a mode such as `amp.autocast` this is one operation, whatever it calls inside
        return handle_torch_function(lora_linear, (x,), *arguments)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    (N, K), r = weight.shape, lora_A.shape[0]
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be (..., {K}) for a weight of shape {(N, K)}, got {tuple(x.shape)}")
    if r == 0 or lora_A.shape != (r, K) or lora_B.shape != (N, r):
        got = f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        raise ValueError(f"lora_A must be (r, {K}) and lora_B ({N}, r), got {got}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be ({N},), got {tuple(bias.shape)}")
    if (lora_A.is_meta or lora_B.is_meta) and not x.is_meta:  # torch would multiply by whatever memory holds
        raise ValueError(f"x is on {x.device}, but lora_A on {lora_A.device} and lora_B on {lora_B.device}")
    grad = torch.is_grad_enabled()
    # At once: to one row a Function costs as much as its products, and so do S and two changes of shape.
    if not grad and not dropout_p and x.numel() * r <= 64 * K and takes_rows_as_they_are(x, weight):
        return nf4_product_native(x, weight, NF4_CODE, True, bias, None, lora_B, scaling, lora_A)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(*arguments)
    if grad:
        return _LoRALinear.apply(*arguments)
    y = _rows_forward(*arguments)[0]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], N)
