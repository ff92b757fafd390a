"""Cross-entropy straight from hidden states, in chunks, on answer tokens only.

A vocabulary of V words turns N hidden vectors into N × V logits; for SmolLM2 (V = 49,152) at 4 × 128 tokens that is
100 MB in fp32, and the softmax and its gradient want as much again. But the loss needs one number per token. So

    forward:   z = h Wᵀ + b            (one chunk of tokens at a time)
               loss = Σ logsumexp(z) − z[target]
    backward:  dz = softmax(z) − onehot(target)
               dh = dz W,   dW = dzᵀ h,   db = Σ dz

and since dz is known as soon as z is, the gradients are computed in the forward pass, chunk by chunk, and no logits
outlive their chunk. Kept for backward: dh (N × D, fp32 or fp16), and dW, db when the head is trained. Tokens whose
label is −100 (prompt, padding) are dropped before the product: they cost nothing.

In fp16 the three products are `scaled_matmul`. Most of dz is near 0, and of dh = dz W too: what is below 2⁻²⁵ would be
rounded to zero before backward multiplies it by the loss scale S. So dz, which lies in −1 … 1, is rounded as 2¹⁵ dz,
and S / 2¹⁵ meets the fp32 sums: what is rounded is S dh. Whether that overflowed comes from the same pass.

The same idea: Liger-Kernel's FusedLinearCrossEntropy (Hsu et al. 2024, arXiv:2410.10989, § 3.2).
"""

import torch
import torch.nn.functional as F

from ..kernels.matmul import scaled_matmul

IGNORE_INDEX = -100
CHUNK_BYTES = 64 * 2**20
HALF_RANGE = 2.0**15  # |dz| ≤ 1, times this, is as far from fp16's overflow as from its underflow


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, dtype, chunk, scale, found_inf):
        need_dh, need_dw, need_db = ctx.needs_input_grad[:3]
        half = dtype == torch.float16

        def gradient(a, b):
            if not half:
                return a @ b
            c, overflow = scaled_matmul(a, b, scale / HALF_RANGE)
            torch.maximum(found_inf, overflow, out=found_inf)
            return c

        w = weight.to(dtype)
        dh = torch.empty_like(hidden, dtype=dtype if half else torch.float32) if need_dh else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if need_dw else None
        db = torch.zeros_like(bias, dtype=torch.float32) if need_db else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            h = hidden[rows].to(dtype)
            if half:
                z = scaled_matmul(h, w.t())[0].float() + (0 if bias is None else bias)
            else:
                z = F.linear(h, w, None if bias is None else bias.to(dtype)).float()
            index = target[rows, None]
            log_p = torch.log_softmax(z, dim=1)
            loss -= log_p.gather(1, index).sum()
            if not (need_dh or need_dw or need_db):
                continue
            dz = log_p.exp_()
            dz.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=torch.float32))
            if need_db:
                db += dz.sum(0) * scale
            if half:
                dz *= HALF_RANGE
            dz = dz.to(dtype)
            if need_dh:
                dh[rows] = gradient(dz, w)
            if need_dw:
                dw += gradient(dz.t(), h)
        ctx.save_for_backward(dh, dw, db, scale)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        *grads, scale = ctx.saved_tensors
        pairs = zip(grads, ctx.dtypes, strict=True)
        grads = [None if grad is None else (grad * (dloss / scale)).to(dtype) for grad, dtype in pairs]
        return (*grads, None, None, None, None, None)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None = None,
    chunk: int | None = None, loss_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Sum of cross-entropies of `hidden @ weight.T + bias` against `target`, never holding all logits.

    The caller divides by the count of answer tokens over the whole accumulated batch: every token weighs the same.

    Args:
        hidden: (..., D), fp32/bf16/fp16. The product runs in its dtype, or in autocast's.
        weight: (V, D), the output head (often the tied embedding).
        target: (...) int64, class of each position; −100 drops the position.
        bias: (V,) or None.
        chunk: tokens at a time; by default as many as make 64 MiB of fp32 logits.
        loss_scale: () fp32, the factor between this loss and what `backward` is called on. Only fp16 makes use of it,
            and rounds gradients with this factor in them.
        found_inf: () fp32, set to 1 if a gradient in fp16 overflowed (`amp.GradScaler.overflow_flag`).

    Returns a scalar in fp32; 0 with zero gradients when every target is −100.
    ValueError: shapes that do not fit, a target outside [0, V) (on a CPU), or chunk below 1.
    """
    if hidden.shape[:-1] != target.shape:
        raise ValueError(f"target must have shape {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if chunk is None:
        chunk = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    kept = target != IGNORE_INDEX
    hidden, target = hidden[kept], target[kept]
    if not target.is_cuda and target.numel() and not 0 <= int(target.min()) <= int(target.max()) < weight.shape[0]:
        raise ValueError(f"target must lie in [0, {weight.shape[0]}) or be {IGNORE_INDEX}, got {int(target.min())} … "
                         f"{int(target.max())}")  # fmt: skip
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    one = torch.ones((), dtype=torch.float32, device=hidden.device)
    scale = one if loss_scale is None or dtype != torch.float16 else loss_scale  # that gradients have before backward
    found_inf = torch.zeros_like(one) if found_inf is None else found_inf
    if not torch.is_grad_enabled():  # which `needs_input_grad` of a Function does not know
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    with torch.autocast(kind, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, target, dtype, chunk, scale, found_inf)
