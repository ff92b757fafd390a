"""Lesson 03's ladder: the loss-scaled FP16 product with its flag, and its backward pass."""

import functools

import torch

from ...kernels.runtime import tl, triton
from ..canaries import guarded, place
from ..emulated import seen_there, without_faults
from ..exercise import Exercise, expect, expect_close, number, unchanged
from ..watch import launched, watched

BLOCK = 16


# 03.4


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, c_ptr, flag_ptr, scale, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        a_mask, b_mask = (m < M)[:, None] & (k < K)[None, :], (k < K)[:, None] & (n < N)[None, :]
        a = tl.load(a_ptr + m[:, None] * stride_am + k[None, :] * stride_ak, mask=a_mask, other=0.0)
        b = tl.load(b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc)
    if FORM == 1:
        c = (acc.to(tl.float16) * scale).to(tl.float16)
    else:
        c = (acc * scale).to(tl.float16)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(c_ptr + m[:, None] * N + n[None, :], c, mask=inside)
    looked = acc if FORM == 2 else c.to(tl.float32)
    bad = tl.max(tl.where(inside & (tl.abs(looked) < float("inf")) | (inside == 0), 0, 1))
    if FORM == 3:
        tl.store(flag_ptr, tl.maximum(bad.to(tl.float32), tl.load(flag_ptr)))
    else:
        tl.store(flag_ptr, 1.0, mask=bad != 0)


def _product(form=0, strided=True):
    def scaled_product(a, b, scale, c, found_inf):
        (M, K), N = a.shape, b.shape[1]
        strides = (*a.stride(), *b.stride()) if strided else (K, 1, N, 1)
        grid = (triton.cdiv(M, BLOCK), triton.cdiv(N, BLOCK))
        _product_kernel[grid](a, b, c, found_inf, scale, M, N, K, *strides, BLOCK=BLOCK, FORM=form)

    return scaled_product


def _operands(M, K, N, size_a=1.0, size_b=1.0):
    a, b = size_a * torch.randn(M, K), size_b * torch.randn(K, N)
    return guarded((M, K), torch.float16, a), guarded((K, N), torch.float16, b)


def _close_product(got, a, b, scale, what, hint=""):
    """Within one rounding to FP16 and the roundings of an FP32 sum."""
    want = scale * (a.double() @ b.double())
    summed = scale * (a.double().abs() @ b.double().abs()).max().item()
    close = {"rtol": 2**-10, "atol": 2**-24 + a.shape[1] * 2**-24 * summed}
    if (got.double() - want).abs().max() < 2**-8 * want.abs().max():
        hint = "Nearly: only c is rounded to FP16. The accumulator stays FP32 from tile to tile; scale it, then round."
    expect_close(got.double(), want.half().double(), what, **close, hint=hint)


def _check_product(scaled_product):
    cases = {
        "16 × 16 × 16": ((16, 16, 16), 1.0, 1.0, 1.0),
        "33 × 20 × 17": ((33, 20, 17), 1.0, 1.0, 4.0),
        "1 × 65 × 5": ((1, 65, 5), 1.0, 1.0, 0.5),
        "70 × 150 × 20": ((70, 150, 20), 1.0, 1.0, 0.7),
        "products of 1e-8": ((20, 8, 18), 1e-4, 1e-4, 16384.0),
        "a of hundreds, b of thousandths": ((20, 8, 18), 300.0, 1e-3, 1024.0),
    }
    for what, (size, size_a, size_b, scale) in cases.items():
        a, b = _operands(*size, size_a, size_b)
        c, flag = guarded((size[0], size[2]), torch.float16), guarded(1, values=torch.zeros(1))
        _run(scaled_product, a, b, scale, c, flag, what, hint="" if size_a <= 1 else "Scale the FP32 accumulator.")
        hint = "c = scale · a b, the sum over all of K."
        if size_a < 1:
            hint = "Multiply the FP32 accumulator by the scale, then round: 1e-8 alone is 0 in FP16."
        elif size_a > 1:
            hint = "Multiply the FP32 accumulator by the scale, not an operand: a · scale overflows in FP16."
        _close_product(c, a, b, scale, f"c ({what})", hint)
        expect(flag.item() == 0, f"{what}: every entry of c is finite, but found_inf is {flag.item():g}.")
    a, b = _operands(18, 33, 20)
    a_t, b_t = (guarded(t.t().shape, torch.float16, t.t()) for t in (a, b))
    c, flag = guarded((18, 20), torch.float16), guarded(1, values=torch.zeros(1))
    _run(scaled_product, a_t.t(), b_t.t(), 2.0, c, flag, "a and b are transposed views")
    _close_product(c, a, b, 2.0, "c, of two transposed views", "Use a.stride() and b.stride(), both of each.")
    for what, at, value, before in (
        ("an entry of the last tile overflows with the scale", (19, 0), 300.0, 0.0),
        ("an entry of the first tile overflows with the scale", (0, 0), 300.0, 0.0),
        ("a holds NaN", (3, 2), float("nan"), 0.0),
        ("all is finite, and the flag was 1 before", (0, 0), 0.5, 1.0),
    ):
        a, b = _operands(20, 8, 18, 0.1)
        a[at], b[at[1]] = value, 1.0
        c, flag = guarded((20, 18), torch.float16), guarded(1, values=torch.tensor([before]))
        _run(scaled_product, a, b, 1024.0, c, flag, what, holes=True)
        want = max(before, float(not torch.isfinite(c).all()))
        told = "Look at c, after the scale and the rounding; infinity and NaN count; store 1 only where one was seen."
        expect(flag.item() == want, f"{what}: found_inf is {flag.item():g}, expected {want:g}. {told}")

    a, b = _operands(20, 8, 18, 0.1)
    a[19], b[:2] = torch.tensor([63.96875, 2**-7] + 6 * [0.0]), 1.0
    c, flag = guarded((20, 18), torch.float16), guarded(1, values=torch.zeros(1))
    _run(scaled_product, a, b, 1024.0, c, flag, "entries of 65512")
    told = "65512 rounds to 65504, the largest finite number of FP16, and only from 65520 on to infinity: look at c."
    expect(flag.item() == 0, f"entries of 65512: every entry of c is finite, but found_inf is {flag.item():g}. {told}")

    def call():
        a, b = torch.randn(40, 33).half(), torch.randn(33, 20).half()
        a[3, 3] = float("inf")
        scaled_product(a, b, 2.0, torch.empty(40, 20, dtype=torch.float16), torch.zeros(1))

    tried = "tried tails in M, N and K, transposed views, products that underflow, overflow and NaN"
    return f"{tried}{seen_there(without_faults(call))}"


def _run(scaled_product, a, b, scale, c, flag, what, holes=False, hint=""):
    tensors = {"inputs": {"a": a, "b": b}, "changed": {"found_inf": flag}}
    tensors["changed" if holes else "outputs"] = {"c": c} | (tensors["changed"] if holes else {})
    watch = launched(scaled_product, a, b, scale, c, flag, **tensors, what=what, hint=hint)
    expect(watch.dots > 0 or not watch.loads, "No tl.dot was used: it is what reaches the tensor cores.")


# 03.5


class ScaledMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, scale):
        ctx.save_for_backward(a, b)
        ctx.scale = scale
        c, found_inf = _made(a, b, scale)
        ctx.mark_non_differentiable(found_inf)
        return c, found_inf

    @staticmethod
    def backward(ctx, dc, _):
        a, b = ctx.saved_tensors
        return _made(dc, b.t(), ctx.scale)[0], _made(a.t(), dc, ctx.scale)[0], None


def _made(a, b, scale):
    c = torch.empty(a.shape[0], b.shape[1], dtype=torch.float16, device=a.device)
    found_inf = torch.zeros(1, device=a.device)
    _product()(a, b, scale, c, found_inf)
    return c, found_inf


class _Unscaled(ScaledMatmul):
    @staticmethod
    def backward(ctx, dc, _):
        a, b = ctx.saved_tensors
        return _made(dc, b.t(), 1.0)[0], _made(a.t(), dc, 1.0)[0], None


class _Exchanged(ScaledMatmul):
    @staticmethod
    def backward(ctx, dc, _):
        a, b = ctx.saved_tensors
        return _made(dc, b.t(), ctx.scale)[0], _made(dc.t(), a, ctx.scale)[0], None


class _BackwardInTorch(ScaledMatmul):
    @staticmethod
    def backward(ctx, dc, _):
        a, b = ctx.saved_tensors
        return ctx.scale * (dc @ b.t()), ctx.scale * (a.t() @ dc), None


def _check_function(scaled_matmul):
    for M, K, N, scale in ((33, 20, 17, 8.0), (16, 16, 16, 1.0)):
        what = f"a {M} × {K}, b {K} × {N}, scale {scale:g}"
        a, b = (torch.randn(size).half().to(place()).requires_grad_() for size in ((M, K), (K, N)))
        dc = (0.1 * torch.randn(N, M)).half().to(place()).t()
        with unchanged(a=a, b=b):
            c, flag = watched(lambda: scaled_matmul(a, b, scale), "forward", "c", "found_inf")  # noqa: B023 called at once
        expect(c.dtype == torch.float16, f"c is {c.dtype}: allocate it in FP16, as a and b are.")
        _close_product(c.detach(), a.detach(), b.detach(), scale, f"c ({what})")
        expect(number(flag, "found_inf") == 0, "Every entry of c is finite, but found_inf is not 0.")
        seen = number(scaled_matmul(torch.full_like(a, 60000.0), b, scale)[1], "found_inf")
        expect(seen == 1, f"c overflows, and found_inf is {seen:g}: return the flag that the kernel was given.")
        expect(c.requires_grad, "c has no gradient: call YourFunction.apply(a, b, scale).")
        backward = functools.partial(torch.autograd.grad, c, (a, b), dc, allow_unused=True)
        with unchanged(a=a, b=b, dc=dc):
            da, db = watched(backward, "backward", "da", "db")
        for name, got, left, right in (("da", da, dc, b.t()), ("db", db, a.t(), dc)):
            shape = f"da = s·dc bᵀ is {M} × {K}, db = s·aᵀ dc is {K} × {N}."
            hint = f"{shape} dc is a transposed view: use both of its strides."
            if scale != 1:
                hint += " Is the scale in both?"
            expect(got.shape == (left.shape[0], right.shape[1]), f"{name} has the wrong shape. {shape}")
            _close_product(got, left.detach(), right.detach(), scale, f"{name} ({what})", hint)

    def call():
        a, b = (torch.randn(size).half().requires_grad_() for size in ((33, 20), (20, 17)))
        c, _ = scaled_matmul(a, b, 2.0)
        torch.autograd.grad(c, (a, b), torch.ones_like(c))

    gpu = without_faults(call)
    ours, theirs = _trained(scaled_matmul), _trained(_in_torch)
    expect(
        abs(ours[-1] - theirs[-1]) < 0.05 * theirs[0],
        f"A layer trained with it ends at a loss of {ours[-1]:.3f}, with torch's product at {theirs[-1]:.3f}.",
    )
    return (
        "tried two shapes, forward, da and db, kernels alone; and trained a layer of 24 × 12 with it: loss "
        f"{ours[0]:.2f} → {ours[-1]:.3f}, with torch's product → {theirs[-1]:.3f}{seen_there(gpu)}"
    )


def _in_torch(a, b, scale):
    c = (scale * (a.float() @ b.float())).half()
    return c, torch.zeros(1)


def _trained(scaled_matmul, steps=12):
    """Losses of a linear layer whose FP16 product is this one; its weight is FP32."""
    torch.manual_seed(3)
    x, truth = torch.randn(40, 24).to(place()), torch.randn(24, 12).to(place())
    weight, losses = torch.zeros(24, 12, device=place(), requires_grad=True), []
    for _ in range(steps):
        y, _ = scaled_matmul(x.half(), weight.half(), 1.0)
        loss = (y.float() - x @ truth).square().mean()
        weight.grad = None
        loss.backward()
        weight.data -= 2.0 * weight.grad
        losses.append(loss.item())
    return losses


EXERCISES = {
    "03.4": Exercise(
        title="The loss-scaled product",
        specification="scaled_product(a, b, scale, c, found_inf): c = scale · a b in FP16, and a flag for overflow.",
        checker=_check_product,
        solution=_product(),
        wrong={
            "rounds, then scales": (_product(1), "then round"),
            "looks before the scale": (_product(2), "after the scale"),
            "reads the flag and writes it back": (_product(3), "a GPU need not. race"),
            "contiguous only": (_product(strided=False), "Use a.stride()"),
        },
        hints=(
            "Start from your matmul of 02.6; pass four strides instead of assuming rows of K and N.",
            "After the loop: c = (acc * scale).to(tl.float16). Then the store, then look at c.",
            "bad = tl.max(tl.where(inside & (tl.abs(c.to(tl.float32)) < float('inf')) | (inside == 0), 0, 1)), and "
            "tl.store(flag_ptr, 1.0, mask=bad != 0).",
        ),
    ),
    "03.5": Exercise(
        title="Its backward pass",
        specification="scaled_matmul(a, b, scale) → (c, found_inf): an autograd Function of your kernel, with da, db.",
        checker=_check_function,
        solution=ScaledMatmul.apply,
        wrong={
            "scale forgotten in backward": (_Unscaled.apply, "Is the scale in both?"),
            "db transposed": (_Exchanged.apply, "invalid gradient"),
            "backward in torch": (_BackwardInTorch.apply, "torch itself computes here"),
        },
        hints=(
            "class ScaledMatmul(torch.autograd.Function) with static methods forward(ctx, a, b, scale) and "
            "backward(ctx, dc, _).",
            "forward: ctx.save_for_backward(a, b); ctx.scale = scale; allocate c and found_inf, launch, return both.",
            "backward: the same kernel twice, on dc and b.t(), and on a.t() and dc; return da, db, None.",
        ),
    ),
}
