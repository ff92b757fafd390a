"""LoRA linear: y = x Wᵀ + b + s (x̂ Aᵀ) Bᵀ, forward and backward, as one autograd Function.

W (N, K) is frozen as a rule, A (r, K) and B (N, r) are trained, s = alpha / r (Hu et al. 2021,
"LoRA", section 4.1). x̂ is x after dropout, which touches the low-rank path alone. With S = x̂ Aᵀ (M, r):

    forward    S = x̂ Aᵀ            y  = x Wᵀ + b + s S Bᵀ
    backward   dS = s dy B         dx = dy W + dS A  (the mask on dS A)
               dA = dSᵀ x̂          dB = s dyᵀ S      dW = dyᵀ x (only if W is trained)

                FLOPs                bytes that must move (fp16)
    forward     2MNK + 2Mr(N + K)    2(MK + NK + MN) + 2r(N + K)
    backward    2MNK + 4Mr(N + K)    2(MN + NK + 2MK + 2r(N + K) + Mr)

At M = N = K = 4096 and r = 16, LoRA adds 0.8 % of the base product's FLOPs forward and 1.6 %
backward. Written as separate layers it costs much more than that in memory traffic: the
low-rank term, its scaling and the sum are each an (M, N) array, written and read again. Here y
is the only array of that size in forward, and dx in backward.

Saved for backward: x and S, which is tiny. Nothing else: not the mask (a seed makes it again), not
a product with W, and a quantized W is dequantized a second time instead of being kept. dW is
skipped when W is frozen: dx still crosses W, but a third of a full backward's products falls away.

The pieces are in `lora_down.py` (S), `lora_product.py` (y, dx) and `lora_backward.py` (dS, dB, dA).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from .dropout import new_seed, threshold_of
from .lora_backward import lora_down_grad, lora_up_grads
from .lora_down import drawn_mask, lora_down
from .lora_product import lora_product
from .nf4_matmul import QuantizedWeight, dense_weight, plan, quantized_product, quantized_product_dx


def lora_linear_reference(x, weight, bias, lora_A, lora_B, scaling, keep=None, dropout_p=0.0):
    """The specification, in operations that autograd differentiates: x Wᵀ + b + s (x̂ Aᵀ) Bᵀ.

    x̂ = x · keep / (1 - dropout_p), with `keep` a boolean mask of x's shape (None: nothing is
    dropped). All tensors share one dtype.
    """
    dropped = x if keep is None else x * keep / (1 - dropout_p)
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(dropped, lora_A), lora_B)


class _LoRALinear(torch.autograd.Function):
    """Several adapted layers on one x. `layers` holds weight, bias, lora_A, lora_B of each in turn."""

    @staticmethod
    def forward(ctx, x, scalings, dropout_p, *layers):
        weights, biases, As, Bs = layers[0::4], layers[1::4], layers[2::4], layers[3::4]
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        threshold, seed = threshold_of(dropout_p), None
        if threshold:
            seed = new_seed(x.device)
            scalings = [scale * 65536 / (65536 - threshold) for scale in scalings]
        S = lora_down(rows, _stack(As), drawn_mask(seed, rows, rows.shape[1], threshold), threshold)
        ys, dense, ctx.ways, ctx.quantized, ctx.bias_dtypes = [], [], [], [], []
        for weight, bias, A, B, part, scale in zip(weights, biases, As, Bs, _parts(S, As), scalings, strict=True):
            if isinstance(weight, torch.Tensor):
                y, way = lora_product(rows, weight, bias, part, B, scale), None
            else:
                way = plan(rows, weight, threshold > 0)
                y = quantized_product(way, rows, weight, bias, part, A, B, scale)
            # No view: callers may change it in place. (Traced by torch 2.11, a result that was itself made in place
            # would get no gradient.)
            if x.dim() != 2 or torch.compiler.is_compiling():
                y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
            ys.append(y)
            dense.append(weight if way is None else None)
            ctx.ways.append(way)
            ctx.quantized.append(None if way is None else weight)
            ctx.bias_dtypes.append(None if bias is None else bias.dtype)
        needs = ctx.needs_input_grad
        x_kept = rows if any(needs[3::4]) or any(needs[5::4]) else None  # for dW and dA
        ctx.save_for_backward(x_kept, S, seed, *As, *Bs, *dense)
        ctx.scales, ctx.threshold, ctx.x_shape = scalings, threshold, x.shape
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        dys = [dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        if not torch.is_autocast_enabled(dys[0].device.type):
            return _gradients(ctx, dys)
        with torch.autocast(dys[0].device.type, enabled=False):
            return _gradients(ctx, dys)


def _gradients(ctx, dys):
    """Gradients of x, None for scalings and dropout_p, then of weight, bias, lora_A and lora_B of each layer."""
    x, S, seed, *rest = ctx.saved_tensors
    count, threshold = len(dys), ctx.threshold
    As, Bs, weights = rest[:count], rest[count : 2 * count], rest[2 * count :]
    needs_x, _, _, *needs = ctx.needs_input_grad
    needs_A, needs_B = any(needs[2::4]), any(needs[3::4])
    dx, grads, dSs = None, [None] * len(needs), []
    for i, (dy, part) in enumerate(zip(dys, _parts(S, As), strict=True)):
        if needs[4 * i]:
            grads[4 * i] = (dy.t() @ x).to(weights[i].dtype)
        if needs[4 * i + 1]:
            grads[4 * i + 1] = dy.sum(0).to(ctx.bias_dtypes[i])
        if needs_x or needs_A or needs_B:
            dS, dB = lora_up_grads(dy, part, Bs[i], ctx.scales[i])
            dSs.append(dS)
            grads[4 * i + 3] = dB if needs[4 * i + 3] else None
    if not (needs_x or needs_A):
        return dx, None, None, *grads
    dS = dSs[0] if count == 1 else torch.cat([part.t() for part in dSs]).t()
    mask = drawn_mask(seed, dys[0], As[0].shape[1], threshold)
    if needs_A:
        dA = lora_down_grad(dS, x, As[0].dtype, mask, threshold)
        for i, part in enumerate([dA] if count == 1 else dA.split([A.shape[0] for A in As])):
            grads[4 * i + 2] = part.to(As[i].dtype) if needs[4 * i + 2] else None
    if needs_x:
        weights = [quantized or dense for quantized, dense in zip(ctx.quantized, weights, strict=True)]
        if count == 1 and ctx.ways[0] is not None:
            way, scale = ctx.ways[0], ctx.scales[0]
            dx = quantized_product_dx(way, dys[0], weights[0], dS, As[0], Bs[0], scale, mask, threshold)
        else:
            W = dense_weight(weights[0], dys[0])
            dx = lora_product(dys[0], W.t(), None, dS, _stack(As).t(), 1.0, mask, threshold)
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, dense_weight(weight, dy))
        if len(ctx.x_shape) != 2:
            dx = dx.view(ctx.x_shape)
    return dx, None, None, *grads


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _parts(S: torch.Tensor, As: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The columns of S (M, Σ r) that belong to each adapter."""
    return [S] if len(As) == 1 else S.split([A.shape[0] for A in As], dim=1)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """y = x Wᵀ + b + s (x̂ Aᵀ) Bᵀ in x's dtype, with a gradient for every tensor that asks for one.

    Args:
        x: (..., K), floating point. Everything is computed in its dtype (sums in fp32) and returned in it.
        weight: (N, K) of any floating dtype; or a quantized weight, which gets no gradient.
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
        ValueError: shapes that do not fit, or `dropout_p` outside [0, 1).
    """
    return stacked_lora_linear(x, [weight], [bias], [lora_A], [lora_B], [scaling], dropout_p)[0]


def stacked_lora_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | QuantizedWeight],
    biases: Sequence[torch.Tensor | None],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    scalings: Sequence[float],
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    """`lora_linear` for several layers that share an x (q, k, v; gate, up): their adapters read x once.

    All S = x̂ Aᵀ come from one pass over x, and so do all dA; one dx is accumulated in place. Ranks
    and output sizes may differ. The layers share one dropout mask.

    Args: as for `lora_linear`, one entry a layer.

    Returns:
        One (..., N_i) for each layer.

    Raises:
        TypeError, ValueError: as `lora_linear`, and when the sequences differ in length.
    """
    if has_torch_function((x,)):  # to a mode such as `amp.autocast` this is one operation, whatever it calls inside
        arguments = x, weights, biases, lora_As, lora_Bs, scalings, dropout_p
        return handle_torch_function(stacked_lora_linear, (x,), *arguments)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    lengths = {len(weights), len(biases), len(lora_As), len(lora_Bs), len(scalings)}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"one weight, bias, lora_A, lora_B and scaling a layer expected, got lengths {lengths}")
    layers = []
    for weight, bias, A, B in zip(weights, biases, lora_As, lora_Bs, strict=True):
        (N, K), r = weight.shape, A.shape[0]
        if x.dim() == 0 or x.shape[-1] != K:
            raise ValueError(f"x must be (..., {K}) for a weight of shape {(N, K)}, got {tuple(x.shape)}")
        if r == 0 or A.shape != (r, K) or B.shape != (N, r):
            raise ValueError(f"lora_A must be (r, {K}) and lora_B ({N}, r), got {tuple(A.shape)} and {tuple(B.shape)}")
        if bias is not None and bias.shape != (N,):
            raise ValueError(f"bias must be ({N},), got {tuple(bias.shape)}")
        layers += [weight, bias, A, B]
    if not torch.is_autocast_enabled(x.device.type):
        return _LoRALinear.apply(x, tuple(scalings), dropout_p, *layers)
    with torch.autocast(x.device.type, enabled=False):  # everything is computed in x's dtype
        return _LoRALinear.apply(x, tuple(scalings), dropout_p, *layers)
