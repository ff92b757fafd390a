"""Lesson 02, blocks with two dimensions: an outer sum, masks at both edges, a tiled product."""

import torch

from ...kernels.runtime import tl, triton
from ..canaries import guarded
from ..emulated import seen_there, without_faults
from ..exercise import Exercise, expect, expect_close
from ..watch import launched
from . import e02_memory

# 02.4


@triton.jit
def _outer_kernel(x_ptr, y_ptr, out_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORM: tl.constexpr):
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    x, y = tl.load(x_ptr + m), tl.load(y_ptr + n)
    if FORM == 1:
        tl.store(out_ptr + n[:, None] * BLOCK_M + m[None, :], y[:, None] + x[None, :])
    elif FORM == 2:
        tl.store(out_ptr + m[:, None] + n[None, :], x[:, None] + y[None, :])
    else:
        tl.store(out_ptr + m[:, None] * BLOCK_N + n[None, :], x[:, None] + y[None, :])


def _outer(form=0):
    def outer_sum(x, y, out):
        _outer_kernel[(1,)](x, y, out, BLOCK_M=x.numel(), BLOCK_N=y.numel(), FORM=form)

    return outer_sum


def _one_dimension(x, y, out):
    _row_by_row_kernel[(1,)](x, y, out, BLOCK=x.numel())


@triton.jit
def _row_by_row_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) + tl.load(y_ptr + offs))


def _check_outer(outer_sum):
    for M, N in ((8, 4), (2, 16), (16, 16)):
        x, y, out = guarded(M, values=torch.randn(M)), guarded(N, values=torch.randn(N)), guarded((M, N))
        launched(outer_sum, x, y, out, inputs={"x": x, "y": y}, outputs={"out": out}, what=f"{M} × {N}")
        hint = "out[i, j] lies at i * N + j, and holds x[i] + y[j]."
        if torch.allclose(out.flatten(), (x[None, :] + y[:, None]).flatten(), atol=1e-6):
            hint = "The sum is there with rows and columns exchanged: the row's number is the one that N multiplies."
        expect_close(out, x[:, None] + y[None, :], f"out ({M} × {N})", atol=1e-6, hint=hint)
    gpu = without_faults(lambda: outer_sum(torch.randn(8), torch.randn(4), torch.empty(8, 4)))
    return f"tried 8 × 4, 2 × 16 and 16 × 16{seen_there(gpu)}"


# 02.5


@triton.jit
def _scaled_rows_kernel(
    x_ptr, w_ptr, out_ptr, M, N, stride_xm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORM: tl.constexpr
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    if FORM == 1:
        inside = (m < M)[:, None] & (n >= 0)[None, :]
    if FORM == 2:
        inside = (m >= 0)[:, None] & (n < N)[None, :]
    x = tl.load(x_ptr + m[:, None] * (N if FORM == 3 else stride_xm) + n[None, :], mask=inside)
    w = tl.load(w_ptr + n, mask=n < N)
    tl.store(out_ptr + m[:, None] * N + n[None, :], x * w[None, :], mask=inside)


def _scaled_rows(form=0):
    def scale_columns(x, w, out):
        (M, N), blocks = x.shape, {"BLOCK_M": 16, "BLOCK_N": 32}
        grid = (triton.cdiv(M, 16), triton.cdiv(N, 32))
        _scaled_rows_kernel[grid](x, w, out, M, N, x.stride(0), **blocks, FORM=form)

    return scale_columns


def _check_scaled_rows(scale_columns):
    for M, N, stride in ((16, 32, 32), (17, 33, 33), (1, 1, 1), (5, 100, 100), (40, 3, 7), (150, 300, 300)):
        x = guarded((M, stride))[:, :N].copy_(torch.randn(M, N))
        w, out = guarded(N, values=torch.randn(N)), guarded((M, N))
        what = f"{M} × {N}" + (f", rows {stride} apart" if stride != N else "")
        hint = "A row of x begins at m * x.stride(0), one of out at m * N." if stride != N else ""
        launched(scale_columns, x, w, out, inputs={"x": x, "w": w}, outputs={"out": out}, what=what, hint=hint)
        hint = hint or "Column n times w[n]."
        expect_close(out, x * w, f"out ({what})", rtol=1e-6, hint=hint)
    gpu = without_faults(lambda: scale_columns(torch.randn(17, 33), torch.randn(33), torch.empty(17, 33)))
    return f"tried 6 shapes with tails on both edges, one with gaps between the rows{seen_there(gpu)}"


# 02.6


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float16 if FORM == 3 else tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < K if FORM != 1 else k >= 0
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & in_k[None, :], other=0.0)
        b = tl.load(b_ptr + k[:, None] * N + n[None, :], mask=in_k[:, None] & (n < N)[None, :], other=0.0)
        if FORM == 2:
            acc = tl.dot(a, b)
        elif FORM == 4:
            acc += tl.sum(a[:, :, None].to(tl.float32) * b[None, :, :].to(tl.float32), axis=1)
        else:
            acc = (acc + tl.dot(a, b)).to(acc.dtype)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


def _product(form=0):
    def matmul(a, b, c):
        (M, K), N = a.shape, b.shape[1]
        blocks = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
        _product_kernel[(triton.cdiv(M, 16), triton.cdiv(N, 16))](a, b, c, M, N, K, **blocks, FORM=form)

    return matmul


def _mistake(a, b, c):
    """What is wrong with c, which should be a · b, in fp64."""
    (M, K), N, told = a.shape, b.shape[1], "acc collects one tl.dot for each tile of K."
    for long in (16, 32, 64, 128):
        last = (K - 1) // long * long
        if last and torch.allclose(c, a[:, last:] @ b[last:], atol=1e-2):
            told = "Only the last tile of K is in it: add each tile's product to the accumulator."
        elif last and torch.allclose(c, a[:, :last] @ b[:last], atol=1e-2):
            told = "The last tile of K is missing: there are tl.cdiv(K, BLOCK_K), the last of which need not be full."
    if (off := c - a @ b).std() < 1e-2:
        told = f"Every entry is off by {off.mean().item():.0f}: beyond K both tiles must be 0, other=0.0."
    elif M == K == N and torch.allclose(c, b @ a, atol=1e-2):
        told = "This is b · a."
    elif M == N and torch.allclose(c, (a @ b).t(), atol=1e-2):
        told = "It lies transposed: c[m, n] is stored at m * N + n."
    return told


def _check_product(matmul):
    for M, K, N in ((16, 16, 16), (33, 20, 17), (1, 65, 5), (40, 3, 64), (70, 150, 20), (17, 20, 140)):
        a, b = (guarded(size, torch.float16, torch.randn(size)) for size in ((M, K), (K, N)))
        c, what = guarded((M, N)), f"{M} × {K} times {K} × {N}"
        watch = launched(matmul, a, b, c, inputs={"a": a, "b": b}, outputs={"c": c}, what=what)
        wide = a.double() @ b.double()
        hint = _mistake(a.double(), b.double(), c.double())
        near = "Nearly: the accumulator is FP16, or is rounded to FP16 for the store. Let acc be tl.float32, as c is."
        expect_close(c, wide.float(), f"c ({what})", rtol=1e-5, atol=1e-5 * K**0.5, hint=hint, near=near)
        expect(
            watch.dots > 0 or not watch.loads,
            "The product is right, but no tl.dot made it: ordinary units do a multiplication per thread, tensor cores "
            "a whole small product.",
        )

    def call():
        matmul(torch.randn(33, 20).half(), torch.randn(20, 17).half(), torch.empty(33, 17))

    gpu = without_faults(call)
    return f"tried 6 products with tails in M, N and K{seen_there(gpu)}"


EXERCISES = {
    "02.4": Exercise(
        title="An outer sum",
        specification="outer_sum(x, y, out): out[i, j] = x[i] + y[j], one program; sizes are powers of two.",
        checker=_check_outer,
        solution=_outer(),
        wrong={
            "rows and columns exchanged": (_outer(1), "rows and columns exchanged"),
            "row stride forgotten": (_outer(2), "no program wrote element"),
            "one dimension": (_one_dimension, "y was read past its end"),
        },
        hints=(
            "m = tl.arange(0, BLOCK_M) has the shape [BLOCK_M]; m[:, None] has [BLOCK_M, 1], a column.",
            "m[:, None] * N + n[None, :] is a block of offsets, [BLOCK_M, BLOCK_N]: row m begins at m * N.",
            "tl.store(out_ptr + m[:, None] * N + n[None, :], x[:, None] + y[None, :])",
        ),
    ),
    "02.5": Exercise(
        title="Masks at both edges",
        specification="scale_columns(x, w, out): out[m, n] = x[m, n] · w[n], any M, N; x may have gaps between rows.",
        checker=_check_scaled_rows,
        solution=_scaled_rows(),
        wrong={
            "no mask along N": (_scaled_rows(1), "past its end"),
            "no mask along M": (_scaled_rows(2), "past its end"),
            "rows without gaps": (_scaled_rows(3), "m * x.stride(0)"),
        },
        hints=(
            "A grid of two dimensions: (triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N)); tl.program_id(0) is the row "
            "of tiles, tl.program_id(1) the column.",
            "inside = (m < M)[:, None] & (n < N)[None, :], for the load of x and for the store.",
        ),
    ),
    "02.6": Exercise(
        title="A tiled product",
        specification="matmul(a, b, c): c (M, N) = a (M, K) · b (K, N); a and b FP16, c FP32; with tl.dot, any sizes.",
        checker=_check_product,
        solution=_product(),
        wrong={
            "no mask along K": (_product(1), "was read past its end"),
            "only the last tile": (_product(2), "Only the last tile"),
            "a narrow accumulator": (_product(3), "the accumulator is FP16"),
            "no tensor cores": (_product(4), "no tl.dot made it"),
        },
        hints=(
            "acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32) before the loop over K, one store after it.",
            "In the loop: k = start + tl.arange(0, BLOCK_K); a's tile lies at m[:, None] * K + k[None, :], b's at "
            "k[:, None] * N + n[None, :]. Beyond K both are 0.",
            "acc = tl.dot(a, b, acc). Every side of a tile is 16 or more.",
        ),
    ),
    **e02_memory.EXERCISES,
}
