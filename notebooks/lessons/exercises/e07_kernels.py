"""Lesson 07's ladder: the fused forward pass, dS and dB."""

import torch

from ...kernels.runtime import tl, triton
from ..canaries import guarded
from ..emulated import seen_there, without_faults
from ..exercise import Exercise, expect, expect_close
from ..watch import launched

BLOCK = 16
PARTS = ("sum", "sum_out")  # what torch may do besides moving memory: add the parts that programs made of a long sum


# 07.5


@triton.jit
def _fused_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, y_ptr, scale, M, N, K, R, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_sm, stride_sr, stride_bn, stride_br, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    n = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    r = tl.arange(0, BLOCK_R)
    s = tl.load(s_ptr + m * stride_sm + r[None, :] * stride_sr, mask=(m < M) & (r < R)[None, :], other=0.0)
    b = tl.load(b_ptr + n * stride_bn + r[:, None] * stride_br, mask=(n < N) & (r < R)[:, None], other=0.0)
    acc = tl.dot(s, b)
    if FORM != 1:
        acc *= scale
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + m * stride_xm + k[None, :] * stride_xk, mask=(m < M) & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + n * stride_wn + k[:, None] * stride_wk, mask=(n < N) & (k < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc)
    if FORM == 1:
        acc *= scale
    tl.store(y_ptr + m * N + n, acc, mask=(m < M) & (n < N))


def _fused(form=0):
    def fused_forward(x, W, S, B, scale, y):
        (M, K), N, R = x.shape, W.shape[0], S.shape[1]
        strides = (*x.stride(), *W.stride(), *S.stride(), *B.stride())
        blocks = {"BLOCK": BLOCK, "BLOCK_R": max(16, triton.next_power_of_2(R))}
        grid = (triton.cdiv(M, BLOCK), triton.cdiv(N, BLOCK))
        _fused_kernel[grid](x, W, S, B, y, scale, M, N, K, R, *strides, **blocks, FORM=form)

    return fused_forward


base_and_low_rank = _fused()


def _base_alone(x, W, S, B, scale, y):
    _fused()(x, W, S, B, 0.0, y)


def _two_passes(x, W, S, B, scale, y):
    _fused()(x, W, S, B, 0.0, y)
    low_rank = torch.empty_like(y)
    _fused()(S, B, S, B, 0.0, low_rank)
    _add_kernel[(triton.cdiv(y.numel(), 64),)](y, low_rank, scale, y.numel(), BLOCK=64)


@triton.jit
def _add_kernel(y_ptr, z_ptr, scale, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < N
    total = tl.load(y_ptr + offs, mask=inside) + scale * tl.load(z_ptr + offs, mask=inside)
    tl.store(y_ptr + offs, total, mask=inside)


def _check_fused(fused_forward):
    for M, K, N, R, turned in (
        (16, 16, 16, 16, 0),
        (33, 20, 17, 3, 0),
        (1, 65, 5, 1, 0),
        (18, 33, 20, 8, 1),
        (70, 150, 20, 20, 0),
    ):
        what = f"x {M} × {K}, W {N} × {K}, r = {R}" + (", all of them transposed views" if turned else "")
        shapes = {"x": (M, K), "W": (N, K), "S": (M, R), "B": (N, R)}
        given = {
            name: guarded(size[::-1], values=torch.randn(size[::-1])).t()
            if turned
            else guarded(size, values=torch.randn(size))
            for name, size in shapes.items()
        }
        (x, W, S, B), y = given.values(), guarded((M, N))
        inputs = {name: tensor.t() if turned else tensor for name, tensor in given.items()}
        watch = launched(fused_forward, x, W, S, B, 0.3, y, inputs=inputs, outputs={"y": y}, what=what)
        hint = "Use both strides of each." if turned else "y = x Wᵀ + scale · S Bᵀ."
        base, low_rank = x @ W.t(), S @ B.t()
        times = (((y - base) * low_rank).sum() / low_rank.square().sum()).item()
        if torch.allclose(y, base + times * low_rank, rtol=1e-4, atol=1e-4):
            hint = f"S Bᵀ is in it {times:.3g} times, and scale is 0.3: is it added once, before the loop over K?"
        for mistake, value in (
            ("The base product alone is in it.", base),
            (
                "The scale belongs to S Bᵀ alone: multiply the accumulator before the loop over K.",
                0.3 * (base + low_rank),
            ),
            ("The scale is missing.", base + low_rank),
            ("Only 16 of r are in S Bᵀ: BLOCK_R is r or more.", base + 0.3 * S[:, :16] @ B[:, :16].t()),
        ):
            if torch.allclose(y, value, rtol=1e-4, atol=1e-4):
                hint = mistake
        expect_close(y, base + 0.3 * low_rank, f"y ({what})", rtol=1e-4, atol=1e-4, hint=hint)
        expect(
            not watch.loads or (watch.stores == y.numel() and not watch.read("y")),
            f"The values are right, but elements of y were written {watch.stores / y.numel():.1f} times and "
            f"read {'again' if watch.read('y') else 'never'}: begin the accumulator with scale · S Bᵀ, and y is "
            "written once.",
        )
        expect(watch.dots > 0 or not watch.loads, "No tl.dot was used: it is what reaches the tensor cores.")

    def call():
        x, W, S, B = (torch.randn(size) for size in ((33, 20), (17, 20), (33, 3), (17, 3)))
        fused_forward(x, W, S, B, 0.5, torch.empty(33, 17))

    return f"tried 5 shapes with tails, one of transposed views; y is written once{seen_there(without_faults(call))}"


# 07.6


@triton.jit
def _skinny_kernel(
    left_ptr, right_ptr, out_ptr, scale, P, Q, R, stride_lp, stride_lq, stride_rq, stride_rr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (P, R) = scale · left (P, Q) right (Q, R)."""
    p = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    r = tl.arange(0, BLOCK_R)[None, :]
    acc = tl.zeros([BLOCK, BLOCK_R], dtype=tl.float32)
    for start in range(0, Q, BLOCK):
        q = start + tl.arange(0, BLOCK)
        left = tl.load(left_ptr + p * stride_lp + q[None, :] * stride_lq, mask=(p < P) & (q < Q)[None, :], other=0.0)
        right = tl.load(right_ptr + q[:, None] * stride_rq + r * stride_rr, mask=(q < Q)[:, None] & (r < R), other=0.0)
        acc = tl.dot(left, right, acc)
    tl.store(out_ptr + p * R + r, acc * scale, mask=(p < P) & (r < R))


def skinny_product(left, right, scale, out):
    (P, Q), R = left.shape, right.shape[1]
    strides, block_r = (*left.stride(), *right.stride()), max(16, triton.next_power_of_2(R))
    _skinny_kernel[(triton.cdiv(P, BLOCK),)](left, right, out, scale, P, Q, R, *strides, BLOCK=BLOCK, BLOCK_R=block_r)


def up_grads(dy, S, B, scale, dS, dB):
    skinny_product(dy, B, scale, dS)
    skinny_product(dy.t(), S, scale, dB)


def _scale_once(dy, S, B, scale, dS, dB):
    skinny_product(dy, B, scale, dS)
    skinny_product(dy.t(), S, 1.0, dB)


def _one_alone(dy, S, B, scale, dS, dB):
    skinny_product(dy, B, scale, dS)


def _sixteen(dy, S, B, scale, dS, dB):
    for left, right, out in ((dy, B, dS), (dy.t(), S, dB)):
        (P, Q), R, strides = left.shape, right.shape[1], (*left.stride(), *right.stride())
        _skinny_kernel[(triton.cdiv(P, BLOCK),)](left, right, out, scale, P, Q, R, *strides, BLOCK=BLOCK, BLOCK_R=16)


@triton.jit
def _racing_kernel(dy_ptr, s_ptr, db_ptr, scale, N, R, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """A program for each row, which adds its part of dB to what lies there."""
    m = tl.program_id(0)
    n, r = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_R)[None, :]
    dy, s = tl.load(dy_ptr + m * N + n, mask=n < N, other=0.0), tl.load(s_ptr + m * R + r, mask=r < R, other=0.0)
    inside = (n < N) & (r < R)
    tl.store(db_ptr + n * R + r, tl.load(db_ptr + n * R + r, mask=inside) + scale * dy * s, mask=inside)


def _racing(dy, S, B, scale, dS, dB):
    skinny_product(dy, B, scale, dS)
    (M, N), R = dy.shape, S.shape[1]
    blocks = {"BLOCK_N": triton.next_power_of_2(N), "BLOCK_R": triton.next_power_of_2(R)}
    _racing_kernel[(M,)](dy, S, dB.zero_(), scale, N, R, **blocks)


def _check_up_grads(candidate):
    for M, N, R in ((16, 16, 16), (33, 20, 3), (5, 65, 1), (70, 150, 5), (20, 33, 17)):
        sizes, what = {"dy": (M, N), "S": (M, R), "B": (N, R)}, f"dy {M} × {N}, r = {R}"
        given = {name: guarded(size, values=torch.randn(size)) for name, size in sizes.items()}
        (dy, S, B), dS, dB = given.values(), guarded((M, R)), guarded((N, R))
        outputs = {"dS": dS, "dB": dB}
        launched(candidate, dy, S, B, 0.5, dS, dB, inputs=given, outputs=outputs, what=what, torch_may=PARTS)
        for name, got, want in (("dS", dS, dy @ B), ("dB", dB, dy.t() @ S)):
            hint = "dS = scale · dy B, dB = scale · dyᵀ S."
            if torch.allclose(got, want, rtol=1e-4, atol=1e-4):
                hint = "The scale is missing: it belongs to both."
            expect_close(got, 0.5 * want, f"{name} ({what})", rtol=1e-4, atol=1e-4, hint=hint)

    def call():
        dy, S, B = torch.randn(33, 20), torch.randn(33, 3), torch.randn(20, 3)
        candidate(dy, S, B, 0.5, torch.empty(33, 3), torch.empty(20, 3))

    return f"tried 5 shapes with tails in M, N and r{seen_there(without_faults(call))}"


EXERCISES = {
    "07.5": Exercise(
        title="the fused forward pass",
        specification="fused_forward(x, W, S, B, scale, y): y = x Wᵀ + scale · S Bᵀ in one kernel; any strides, fp32.",
        checker=_check_fused,
        solution=_fused(),
        wrong={
            "base product alone": (_base_alone, "base product alone"),
            "scales all of it": (_fused(1), "The scale belongs to S Bᵀ alone"),
            "three kernels": (_two_passes, "begin the accumulator with"),
        },
        hints=(
            "Your tiled product of 02.6 or 03.4, with W read as its transpose: W's tile lies at n * stride_wn + k * "
            "stride_wk.",
            "Before the loop over K: s [BLOCK_M, BLOCK_R], b [BLOCK_R, BLOCK_N] with zeros beyond r (BLOCK_R is 16 or "
            "more), acc = tl.dot(s, b) * scale.",
            "Then acc = tl.dot(x, w, acc) for each tile of K, and one store.",
        ),
    ),
    "07.6": Exercise(
        title="dS and dB",
        specification="up_grads(dy, S, B, scale, dS, dB): dS = scale · dy B (M, r), dB = scale · dyᵀ S (N, r), fp32.",
        checker=_check_up_grads,
        solution=up_grads,
        wrong={
            "scale in one of them": (_scale_once, "The scale is missing"),
            "dB forgotten": (_one_alone, "No kernel read S"),
            "r of 16 at most": (_sixteen, "no program wrote element [0, 16]"),
            "programs add to one place": (_racing, "a GPU need not. race"),
        },
        hints=(
            "Both are a product with a short side of r: out (P, r) = scale · left (P, Q) right (Q, r).",
            "One kernel, launched twice, does both: left is dy, then dy.t(): only the strides are exchanged.",
            "One program makes BLOCK rows of out and walks along all of Q: nobody else adds to its rows.",
        ),
    ),
}
