"""Lesson 10's ladder: a QLoRA layer out of the kernels of lessons 07 and 09."""

import functools
import gc

import torch

from ...kernels.nf4 import NF4_CODE
from ...nn.live_memory import LiveMemory
from ...quant import quantize_nf4
from ..canaries import guarded, place
from ..emulated import seen_there, without_faults
from ..exercise import Exercise, expect, expect_close, unchanged
from ..watch import by_kernels, launched, watched
from .e07_kernels import PARTS, base_and_low_rank, skinny_product, up_grads
from .e07_layer import _reference, losses_of
from .e09_kernels import dequantize_nested


def _dense(q):
    constants, table, offset, nested_block = q.nested
    W = torch.empty(q.shape, device=q.packed.device)
    levels = NF4_CODE.to(W.device)
    dequantize_nested(q.packed, q.absmax, constants, table, offset, levels, W, q.block_size, nested_block)
    return W


class QLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q, A, B, scale):
        S, y = x.new_empty(x.shape[0], A.shape[0]), x.new_empty(x.shape[0], q.shape[0])
        skinny_product(x, A.t(), 1.0, S)
        base_and_low_rank(x, _dense(q), S, B, scale, y)
        ctx.save_for_backward(x, A, B, S)
        ctx.q, ctx.scale = q, scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, A, B, S = ctx.saved_tensors
        dS, dx, dB, dA_t = (torch.empty_like(t) for t in (S, x, B, A.t().contiguous()))
        up_grads(dy, S, B, ctx.scale, dS, dB)
        skinny_product(x.t(), dS, 1.0, dA_t)
        base_and_low_rank(dy, _dense(ctx.q).t(), dS, A.t(), 1.0, dx)
        return dx, None, dA_t.t(), dB, None


class _DenseKept(QLoRA):
    @staticmethod
    def forward(ctx, x, q, A, B, scale):
        ctx.W = _dense(q)
        return QLoRA.forward(ctx, x, q, A, B, scale)


class _AdapterForgotten(QLoRA):
    @staticmethod
    def forward(ctx, x, q, A, B, scale):
        return QLoRA.forward(ctx, x, q, A, B, 0.0)


def _by_the_library(x, q, A, B, scale):
    return _reference(x, q.dequantize(), A, B, scale)


def _layer(M, K, N, R):
    x, W, A, B = (torch.randn(size).to(place()) for size in ((M, K), (N, K), (R, K), (N, R)))
    q = quantize_nf4(W / K**0.5)
    q.packed = guarded(q.packed.shape, torch.uint8, q.packed)
    return x, q, A / K**0.5, B


def _check_qlora(qlora):
    for M, K, N, R in ((33, 20, 17, 3), (5, 48, 40, 4)):
        what = f"x {M} × {K}, W {N} × {K} in NF4, r = {R}"
        x, q, A, B = _layer(M, K, N, R)
        leaves, dense, made = [t.requires_grad_() for t in (x, A, B)], q.dequantize(), []
        with unchanged(x=x, A=A, B=B):
            watch = launched(
                lambda: made.append(qlora(x, q, A, B, 0.5)),  # noqa: B023 called at once
                inputs={"q.packed": q.packed},
                what=what,
                torch_may=PARTS,
            )
        want = _reference(x, dense, A, B, 0.5)
        expect(isinstance(made[0], torch.Tensor), f"Return y, a tensor, got {type(made[0]).__name__}.")
        by_kernels(watch, "y", made[0])
        expect_close(made[0], want, f"y ({what})", rtol=1e-4, atol=1e-3, hint="y = x Wᵀ + scale · (x Aᵀ) Bᵀ.")
        expect(made[0].requires_grad, "y has no gradient: call YourFunction.apply(x, q, A, B, scale).")
        dy = torch.randn(N, M).to(place()).t()
        backward = functools.partial(torch.autograd.grad, made[0], leaves, dy, allow_unused=True)
        with unchanged(x=x, A=A, B=B, dy=dy, packed=q.packed):
            got = watched(backward, "backward", "dx", "dA", "dB", torch_may=PARTS)
        for name, mine, theirs in zip(("dx", "dA", "dB"), got, torch.autograd.grad(want, leaves, dy), strict=True):
            hint = "As in 07.7, with W dequantized once more; dy is a transposed view."
            expect_close(mine, theirs, f"{name} ({what})", rtol=1e-4, atol=1e-3, hint=hint)
    kept, bytes_of_dense = _kept(qlora)
    expect(
        kept < bytes_of_dense / 2,
        f"Values and gradients are right, but {kept:,} bytes are kept between forward and backward; the dense weight "
        f"has {bytes_of_dense:,}. Keep q, and dequantize a second time in backward.",
    )
    cpu = quantize_nf4(torch.randn(17, 20))

    def call():
        x, A, B = (torch.randn(size).requires_grad_() for size in ((33, 20), (3, 20), (17, 3)))
        torch.autograd.grad(qlora(x, cpu, A, B, 0.5), (x, A, B), torch.ones(33, 17))

    gpu = without_faults(call)
    x, q, A, B = _layer(32, 24, 20, 2)
    ours = _trained(qlora, x, q, A, B)
    theirs = _trained(lambda x, q, A, B, s: _reference(x, q.dequantize(), A, B, s), x, q, A, B)
    expect(
        abs(ours[-1] - theirs[-1]) < 0.02 * theirs[0],
        f"A layer trained with it ends at a loss of {ours[-1]:.3f}, with torch's operations at {theirs[-1]:.3f}.",
    )
    return (
        f"tried two shapes, forward, dx, dA and dB, kernels alone, {kept:,} bytes kept; and trained a layer through 4 "
        f"bits: loss {ours[0]:.2f} → {ours[-1]:.3f}, with torch's operations → {theirs[-1]:.3f}{seen_there(gpu)}"
    )


def _kept(qlora):
    """(bytes alive between forward and backward, bytes of a dense weight)."""
    warm, (x, q, A, B) = _layer(2, 64, 64, 2)[1], _layer(2, 64, 64, 2)
    A.requires_grad_()
    qlora(x, warm, A, B, 1.0)  # what is made once for all weights is not counted
    gc.collect()
    with LiveMemory(place()) as memory:
        y = qlora(x, q, A, B, 1.0)
        gc.collect()
        kept = max(0, memory.added)
    del y
    return kept, 4 * 64 * 64


def _trained(qlora, x, q, A, B, steps=12):
    """Losses of a layer in NF4 that lacks an update of rank 2."""
    torch.manual_seed(5)
    target = _reference(x, q.dequantize(), torch.randn_like(A), torch.randn_like(B) / 5, 1.0).detach()
    return losses_of(qlora, x.detach(), q, A, torch.zeros_like(B), target, steps)


EXERCISES = {
    "10.4": Exercise(
        title="a QLoRA layer of your kernels",
        specification="qlora(x, q, A, B, scale) → x Wᵀ + scale · (x Aᵀ) Bᵀ with W in NF4, by the kernels of 07 and 09.",
        checker=_check_qlora,
        solution=QLoRA.apply,
        wrong={
            "dense weight kept": (_DenseKept.apply, "dequantize a second time"),
            "no adapter": (_AdapterForgotten.apply, "y (x 33 × 20"),
            "by the library": (_by_the_library, "torch itself computes here"),
        },
        hints=(
            "constants, table, offset, nested_block = q.nested; q.packed holds the codes, q.absmax the scales' codes; "
            "q.shape and q.block_size are what they say.",
            "forward is 07.7's, with W made by your dequantize of 09.4 and then let go: ctx.q = q, no ctx.W.",
            "backward dequantizes again: dx = dy W + dS A needs it.",
        ),
    ),
}
