"""The top of lesson 07's ladder: a LoRA layer made of its kernels."""

import functools

import torch

from ..canaries import place
from ..emulated import seen_there, without_faults
from ..exercise import Exercise, expect, expect_close, unchanged
from ..watch import watched
from .e07_kernels import PARTS, base_and_low_rank, skinny_product, up_grads


class LoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, A, B, scale):
        S, y = x.new_empty(x.shape[0], A.shape[0]), x.new_empty(x.shape[0], W.shape[0])
        skinny_product(x, A.t(), 1.0, S)
        base_and_low_rank(x, W, S, B, scale, y)
        ctx.save_for_backward(x, W, A, B, S)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B, S = ctx.saved_tensors
        dS, dx, dB, dA_t = (torch.empty_like(t) for t in (S, x, B, A.t().contiguous()))
        up_grads(dy, S, B, ctx.scale, dS, dB)
        skinny_product(x.t(), dS, 1.0, dA_t)  # dA = dSᵀ x = (xᵀ dS)ᵀ: the second side is the short one
        base_and_low_rank(dy, W.t(), dS, A.t(), 1.0, dx)
        return dx, None, dA_t.t(), dB, None


class _NoBasePath(LoRA):
    @staticmethod
    def backward(ctx, dy):
        dx, *rest = LoRA.backward(ctx, dy)
        A, B, S = ctx.saved_tensors[2:]
        dS = torch.empty_like(S)
        skinny_product(dy, B, ctx.scale, dS)
        base_and_low_rank(dS, A.t(), dS, A.t(), 0.0, dx)
        return dx, *rest


class _InTorch(LoRA):
    @staticmethod
    def forward(ctx, x, W, A, B, scale):
        ctx.save_for_backward(x, W, A, B, x @ A.t())
        ctx.scale = scale
        return x @ W.t() + scale * (x @ A.t()) @ B.t()


class _ExchangedGradients(LoRA):
    @staticmethod
    def backward(ctx, dy):
        dx, _, dA, dB, _ = LoRA.backward(ctx, dy)
        return dx, None, dB, dA, None


def _reference(x, W, A, B, scale):
    return x @ W.t() + scale * (x @ A.t()) @ B.t()


def _check_layer(lora):
    for M, K, N, R in ((33, 20, 17, 3), (7, 40, 24, 20)):
        what = f"x {M} × {K}, W {N} × {K}, r = {R}"
        x, W, A, B = (torch.randn(size).to(place()) for size in ((M, K), (N, K), (R, K), (N, R)))
        leaves = [t.requires_grad_() for t in (x, A, B)]
        with unchanged(x=x, W=W, A=A, B=B):
            y = watched(lambda: lora(x, W, A, B, 0.5), "forward", "y", torch_may=PARTS)  # noqa: B023 called at once
        want = _reference(x, W, A, B, 0.5)
        expect_close(y, want, f"y ({what})", rtol=1e-4, atol=1e-3, hint="S = x Aᵀ, then the fused product.")
        expect(y.requires_grad, "y has no gradient: call YourFunction.apply(x, W, A, B, scale).")
        dy = torch.randn(N, M).to(place()).t()
        backward = functools.partial(torch.autograd.grad, y, leaves, dy, allow_unused=True)
        with unchanged(x=x, W=W, A=A, B=B, dy=dy):
            got = watched(backward, "backward", "dx", "dA", "dB", torch_may=PARTS)
        wanted = torch.autograd.grad(want, leaves, dy)
        for name, mine, theirs, formula in zip(
            ("dx", "dA", "dB"), got, wanted, ("dx = dy W + dS A", "dA = dSᵀ x", "dB = scale · dyᵀ S"), strict=True
        ):
            expect_close(
                mine, theirs, f"{name} ({what})", rtol=1e-4, atol=1e-3, hint=f"{formula}. dy is a transposed view."
            )

    def call():
        x, W, A, B = (torch.randn(size) for size in ((33, 20), (17, 20), (3, 20), (17, 3)))
        leaves = [t.requires_grad_() for t in (x, A, B)]
        torch.autograd.grad(lora(x, W, A, B, 0.5), leaves, torch.ones(33, 17))

    gpu = without_faults(call)
    ours, theirs = _trained(lora), _trained(_reference)
    expect(
        abs(ours[-1] - theirs[-1]) < 0.02 * theirs[0],
        f"A layer trained with it ends at a loss of {ours[-1]:.3f}, with torch's operations at {theirs[-1]:.3f}.",
    )
    return (
        "tried two shapes, forward, dx, dA and dB, kernels alone; and trained a layer on a planted update of rank 2 "
        f"with it: loss {ours[0]:.2f} → {ours[-1]:.3f}, with torch's operations → {theirs[-1]:.3f}{seen_there(gpu)}"
    )


def _trained(lora, steps=15):
    """Losses of a layer whose frozen weight lacks an update of rank 2."""
    torch.manual_seed(4)
    x, W, update = torch.randn(32, 24), torch.randn(20, 24) / 5, torch.randn(20, 2) @ torch.randn(2, 24) / 5
    x, W, update, A, B = (t.to(place()) for t in (x, W, update, torch.randn(2, 24) / 5, torch.zeros(20, 2)))
    return losses_of(lora, x, W, A, B, x @ (W + update).t(), steps)


def losses_of(layer, x, W, A, B, target, steps):
    """Losses of `layer(x, W, A, B, 1.0)` while Adam trains copies of A and B."""
    A, B = (torch.nn.Parameter(t.detach().clone()) for t in (A, B))
    optimizer, losses = torch.optim.Adam([A, B], lr=0.1), []
    for _ in range(steps):
        loss = (layer(x, W, A, B, 1.0) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


EXERCISES = {
    "07.7": Exercise(
        title="a layer of your kernels",
        specification="lora(x, W, A, B, scale) → y with gradients of x, A and B: an autograd Function of your kernels.",
        checker=_check_layer,
        solution=LoRA.apply,
        wrong={
            "dx without the base path": (_NoBasePath.apply, "dx = dy W + dS A"),
            "forward in torch": (_InTorch.apply, "torch itself computes here"),
            "dA and dB exchanged": (_ExchangedGradients.apply, "invalid gradient"),
        },
        hints=(
            "forward: S = x Aᵀ by your skinny kernel, y by your fused one; save x, W, A, B and S.",
            "backward: dS and dB by 07.6; dx = dy W + dS A is the fused kernel again, on W.t() and A.t() with scale 1.",
            "dA = dSᵀ x is (xᵀ dS)ᵀ: the skinny kernel once more. Return dx, None, dA, dB, None.",
        ),
    ),
}
