"""Exercises of lesson 07: the best matrix of rank r, LoRA's forward pass, a kernel for S = x Aᵀ, gradients."""

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ...kernels.runtime import tl, triton
from ..canaries import guarded
from ..emulated import seen_there, without_faults
from ..exercise import NEARER, Exercise, WrongAnswer, alike, expect, expect_close, unchanged
from ..watch import launched
from . import e07_kernels, e07_layer

# 07.1


def best_rank_r(M, r):
    U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
    return U[:, :r] * sigma[:r], Vt[:r]


def _without_sigma(M, r):
    U, _, Vt = np.linalg.svd(M, full_matrices=False)
    return U[:, :r], Vt[:r]


def _swapped(M, r):
    B, A = best_rank_r(M, r)
    return A, B


def _smallest(M, r):
    U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
    return U[:, -r:] * sigma[-r:], Vt[-r:]


def check_best_rank_r(candidate):
    rng = np.random.default_rng(3)
    for m, n, r in ((7, 5, 2), (5, 7, 3), (6, 6, 1), (4, 9, 4)):
        M = rng.normal(size=(m, n))
        with unchanged(M=M):
            answer = candidate(M, r)
        two = isinstance(answer, (tuple, list)) and len(answer) == 2
        expect(two, "Return the two factors, (B, A), not their product.")
        B, A = map(np.asarray, answer)
        expect(
            B.shape == (m, r) and A.shape == (r, n),
            f"For a {m} × {n} matrix and r = {r} the shapes must be B {(m, r)} and A {(r, n)}, in this order; "
            f"got {B.shape} and {A.shape}.",
        )
        U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
        best, error = np.sqrt((sigma[r:] ** 2).sum()), np.linalg.norm(M - B @ A)
        if error > best + 1e-9:
            why = f" {NEARER}" if error < best + 1e-4 else ""
            if np.allclose(B @ A, U[:, :r] @ Vt[:r]):
                why = " The singular values are missing: BA must be UΣVᵀ, not UVᵀ."
            elif np.allclose(B @ A, (U[:, -r:] * sigma[-r:]) @ Vt[-r:]):
                why = " You kept the smallest singular values; numpy sorts them from the largest down."
            raise WrongAnswer(
                f"{m} × {n}, r = {r}: ‖M − BA‖ is {error:.4f}, the best is {best:.4f} ({error - best:.1e} less).{why}"
            )
    return "Tall, wide and square matrices; every error equals that of the singular values cut off."


# 07.2


def lora_forward(x, W, bias, A, B, alpha):
    return F.linear(x, W, bias) + alpha / A.shape[0] * F.linear(F.linear(x, A), B)


def _scaled_by_alpha(x, W, bias, A, B, alpha):
    return F.linear(x, W, bias) + alpha * F.linear(F.linear(x, A), B)


def _product_first(x, W, bias, A, B, alpha):
    return F.linear(x, W, bias) + alpha / A.shape[0] * x @ (B @ A).t()


def _bias_needed(x, W, bias, A, B, alpha):
    return x @ W.t() + bias + alpha / A.shape[0] * (x @ A.t()) @ B.t()


def check_lora_forward(candidate):
    generator = torch.Generator().manual_seed(5)
    for lead, inputs, outputs, r, alpha, biased in (
        ((3,), 5, 7, 2, 8.0, True),
        ((2, 3, 1), 6, 4, 3, 1.5, False),
        ((65,), 33, 17, 1, 16.0, True),
    ):
        x = torch.randn(*lead, inputs, generator=generator)
        W, A = torch.randn(outputs, inputs, generator=generator), torch.randn(r, inputs, generator=generator)
        B = torch.randn(outputs, r, generator=generator)
        bias = torch.randn(outputs, generator=generator) if biased else None
        where = f"x of shape {tuple(x.shape)}, r = {r}, alpha = {alpha}, {'a' if biased else 'no'} bias"
        try:
            with unchanged(x=x, W=W, A=A, B=B, bias=bias):
                y = candidate(x, W, bias, A, B, alpha)
        except TypeError as error:
            if biased:
                raise
            raise WrongAnswer(f"With bias=None: {error}. F.linear takes None for a bias.") from None
        want = lora_forward(x, W, bias, A, B, alpha)
        hint = ""
        if alike(y, want):
            hint = "The low-rank part is (alpha / r) · x Aᵀ Bᵀ, and r is the number of A's rows."
            if torch.allclose(y, _scaled_by_alpha(x, W, bias, A, B, alpha), atol=1e-4):
                hint = "The factor is alpha / r, not alpha."
            elif biased and torch.allclose(y + bias, want, rtol=1e-4, atol=1e-4):
                hint = "The bias is missing."
        expect_close(y, want, f"The output for {where}", rtol=1e-4, atol=1e-4, hint=hint)
    x, W, A, B = (torch.randn(*size) for size in ((64, 256), (512, 256), (4, 256), (512, 4)))
    with FlopCounterMode(display=False) as counter:
        candidate(x, W, None, A, B, 8.0)
    used, needed = counter.get_total_flops(), 2 * 64 * 512 * 256 + 2 * 64 * 4 * (256 + 512)
    expect(
        used <= needed,
        f"The values are right, but 64 rows through 256 → 512 at r = 4 took {used:,} FLOPs where {needed:,} do: "
        "multiply x by Aᵀ first, then by Bᵀ, and never form BA.",
    )
    small, large = torch.full((2, 6), 1e-20), torch.full((3, 6), 1e20)  # x Aᵀ is 6, and BA infinite
    y = candidate(small, torch.zeros(4, 6), None, large, large[:, :4].t().contiguous(), 3.0)
    expect(
        bool(torch.isfinite(torch.as_tensor(y)).all()),
        "The values are right, but with x of 1e-20, A and B of 1e20 they are not finite: x Aᵀ is 6, but BA overflows. "
        "Multiply x by Aᵀ first, then by Bᵀ, and never form BA.",
    )
    counted = f"{used:,} FLOPs of torch's" if used < needed else f"{used:,} FLOPs, the fewest possible"
    return f"Odd shapes, leading dimensions, no bias, {counted}, and an x so small that BA must not be formed."


# 07.3


@triton.jit
def _down_kernel(x_ptr, a_ptr, s_ptr, K, R, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, FORM: tl.constexpr):
    m = tl.program_id(0)
    offs_r = tl.arange(0, BLOCK_R)
    in_r = offs_r < R
    acc = tl.zeros([BLOCK_R], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        in_k = offs_k < K if FORM != 1 else offs_k >= 0
        x = tl.load(x_ptr + m * K + offs_k, mask=in_k, other=0.0)
        a_mask = in_r[:, None] & in_k[None, :]
        a = tl.load(a_ptr + offs_r[:, None] * K + offs_k[None, :], mask=a_mask, other=0.0)
        part = tl.sum(a * x[None, :], axis=1)
        acc = part if FORM == 2 else acc + part
    tl.store(s_ptr + m * R + offs_r, acc, mask=in_r if FORM != 3 else offs_r >= 0)


def _down(form=0):
    def down(x, A, S):
        (M, K), R = x.shape, A.shape[0]
        _down_kernel[(M,)](x, A, S, K, R, BLOCK_K=32, BLOCK_R=triton.next_power_of_2(R), FORM=form)

    return down


def check_down(candidate):
    generator = torch.Generator().manual_seed(6)
    for M, K, R in ((7, 64, 8), (1, 1, 1), (3, 33, 5), (2, 100, 3), (20, 150, 20)):
        x_values, a_values = torch.randn(M, K, generator=generator), torch.randn(R, K, generator=generator)
        x, A, S = guarded((M, K), values=x_values), guarded((R, K), values=a_values), guarded((M, R))
        what = f"x {M} × {K}, r = {R}"
        launched(candidate, x, A, S, inputs={"x": x, "A": A}, outputs={"S": S}, what=what, torch_may=("sum",))
        want = x_values @ a_values.t()
        hint = "Row i of x begins at i * K, row j of A at j * K, row i of S at i * r."
        if K > 1 and torch.allclose(S.cpu(), x_values[:, K // 2 :] @ a_values[:, K // 2 :].t(), atol=1e-4):
            hint = "Only the last tile of K is in it: add each tile's part to the accumulator."
        expect_close(S.cpu(), want, f"S ({what})", rtol=1e-4, atol=1e-4, hint=hint)
    gpu = without_faults(lambda: candidate(torch.randn(3, 33), torch.randn(5, 33), torch.empty(3, 5)))
    return f"Five shapes between canaries, with tails in K and in r{seen_there(gpu)}."


# 07.4


def lora_gradients(x, dy, W, A, B, s):
    dS = s * dy @ B
    return dy @ W + dS @ A, dS.t() @ x, s * dy.t() @ (x @ A.t())


def _dx_without_W(x, dy, W, A, B, s):
    _, dA, dB = lora_gradients(x, dy, W, A, B, s)
    return s * dy @ B @ A, dA, dB


def _scale_forgotten(x, dy, W, A, B, s):
    dx, _, _ = lora_gradients(x, dy, W, A, B, s)
    return dx, (dy @ B).t() @ x, dy.t() @ (x @ A.t())


def _dB_transposed(x, dy, W, A, B, s):
    dx, dA, dB = lora_gradients(x, dy, W, A, B, s)
    return dx, dA, dB.t()


def _by_autograd(kept):
    """What autograd wants to keep: nothing that is given requires a gradient, so products by hand keep nothing."""
    raise WrongAnswer("Without autograd: write each gradient as a product, as in hint 1.") from None


def check_lora_gradients(candidate):
    generator = torch.Generator().manual_seed(7)
    for rows, inputs, outputs, r, s in ((3, 5, 7, 2, 2.0), (1, 8, 4, 3, 0.5), (65, 6, 6, 1, 4.0)):
        x, W, A, B = (
            torch.randn(*size, generator=generator, dtype=torch.float64)
            for size in ((rows, inputs), (outputs, inputs), (r, inputs), (outputs, r))
        )
        dy = torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        y = leaves[0] @ W.t() + s * (leaves[0] @ leaves[1].t()) @ leaves[2].t()
        wanted = torch.autograd.grad(y, leaves, dy)
        given = unchanged(x=x, dy=dy, W=W, A=A, B=B)
        with given, torch.no_grad(), saved_tensors_hooks(_by_autograd, lambda tensor: tensor):
            try:
                got = candidate(x, dy, W, A, B, s)
            except RuntimeError as error:  # the second is of torch.func
                if not any(said in str(error) for said in ("does not require grad", "saved tensor hooks")):
                    raise
                _by_autograd(error)
        expect(isinstance(got, (tuple, list)) and len(got) == 3, "Return three tensors: (dx, dA, dB).")
        low_rank = s * dy @ B @ A
        for name, mine, theirs in zip(("dx", "dA", "dB"), got, wanted, strict=True):
            hint, low_rank_alone = "", lambda gradient: gradient - dy @ W if name == "dx" else gradient  # noqa: B023
            if alike(mine, theirs):
                if torch.allclose(low_rank_alone(mine), s * low_rank_alone(theirs)):
                    hint = "The factor s is in it twice."
                elif name == "dx" and torch.allclose(mine, low_rank):
                    hint = "dx still crosses W: its first term is dy W."
                elif name == "dx" and torch.allclose(mine, dy @ W):
                    hint = "x also goes through A and B: the second term of dx is dS A."
                elif name != "dx" and torch.allclose(mine * s, theirs):
                    hint = "The factor s is missing: y depends on A and B through s B A."
            what = f"{name} (x {rows} × {inputs}, r = {r}, s = {s})"
            expect_close(mine, theirs, what, rtol=1e-9, atol=1e-9, hint=hint)
    return "Three shapes in fp64, all three gradients equal to autograd's."


EXERCISES = {
    "07.1": Exercise(
        title="the best matrix of rank r",
        specification="best_rank_r(M, r) → (B, A), shapes (m, r) and (r, n), with BA nearest to M among rank r.",
        checker=check_best_rank_r,
        solution=best_rank_r,
        wrong={
            "without singular values": (_without_sigma, "singular values are missing"),
            "A before B": (_swapped, "shapes must be"),
            "smallest values kept": (_smallest, "smallest singular values"),
        },
        hints=(
            "np.linalg.svd(M, full_matrices=False) gives U (m, k), σ (k,) and Vᵀ (k, n) with k = min(m, n).",
            "Keep the first r columns of U, the first r values of σ, the first r rows of Vᵀ.",
            "B = U[:, :r] * sigma[:r] multiplies each column by its singular value.",
        ),
    ),
    "07.2": Exercise(
        title="LoRA's forward pass",
        specification="lora_forward(x, W, bias, A, B, alpha) → x Wᵀ + bias + (alpha / r) x Aᵀ Bᵀ; x is (…, in).",
        checker=check_lora_forward,
        solution=lora_forward,
        wrong={
            "scaled by alpha": (_scaled_by_alpha, "alpha / r"),
            "BA formed": (_product_first, "never form BA"),
            "no bias crashes": (_bias_needed, "bias=None"),
        },
        hints=(
            "r is A.shape[0].",
            "F.linear(x, W, bias) computes x Wᵀ + bias for any leading dimensions, and takes None for the bias.",
            "The low-rank part is two such calls, one inside the other.",
        ),
    ),
    "07.3": Exercise(
        title="the skinny product as a kernel",
        specification="down(x, A, S): launch your Triton kernel so that S (M, r) = x Aᵀ; x (M, K), A (r, K), all fp32.",
        checker=check_down,
        solution=_down(),
        wrong={
            "no mask along K": (_down(1), "read past its end"),
            "only the last tile": (_down(2), "last tile of K"),
            "no mask on the store": (_down(3), "past its end"),
        },
        hints=(
            "One program per row is enough: m = tl.program_id(0), the grid is (M,). BLOCK_R must be a power of two: "
            "triton.next_power_of_2(r).",
            "In the loop over k load x's tile [BLOCK_K] and A's tile [BLOCK_R, BLOCK_K]; mask both where offs_k >= K, "
            "A also where offs_r >= r; other=0.0.",
            "acc += tl.sum(a * x[None, :], axis=1), and after the loop one store with mask=offs_r < R.",
        ),
    ),
    "07.4": Exercise(
        title="LoRA's gradients",
        specification="lora_gradients(x, dy, W, A, B, s) → (dx, dA, dB) of y = x Wᵀ + s (x Aᵀ) Bᵀ, without autograd.",
        checker=check_lora_gradients,
        solution=lora_gradients,
        wrong={
            "dx skips W": (_dx_without_W, "still crosses W"),
            "scale forgotten": (_scale_forgotten, "factor s is missing"),
            "dB transposed": (_dB_transposed, "shape"),
        },
        hints=(
            "For y = x Mᵀ: dx = dy M and dM = dyᵀ x. Use it three times.",
            "Let S = x Aᵀ. Then y = x Wᵀ + s S Bᵀ, so dS = s dy B and dB = s dyᵀ S.",
            "From dS come dA = dSᵀ x and the second part of dx, dS A.",
        ),
    ),
    **e07_kernels.EXERCISES,
    **e07_layer.EXERCISES,
}
