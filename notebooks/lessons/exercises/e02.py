"""Lesson 02: three kernels, run on tensors between canaries."""

import torch

from ...kernels.runtime import tl, triton
from ..canaries import guarded
from ..emulated import seen_there, without_faults
from ..exercise import Exercise, expect, expect_close
from ..watch import launched
from . import e02_tiles

BLOCK = 64


# 02.1


@triton.jit
def _axpy_kernel(x_ptr, y_ptr, out_ptr, a, N, BLOCK: tl.constexpr, MASKED: tl.constexpr, SPREAD: tl.constexpr):
    start = tl.program_id(0) * BLOCK if SPREAD else 0
    offs = start + tl.arange(0, BLOCK)
    mask = offs < N if MASKED else offs >= 0
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, a * x + y, mask=mask)


def _axpy(masked=True, spread=True, rounded_up=True):
    def axpy(a, x, y, out):
        programs = triton.cdiv(x.numel(), BLOCK) if rounded_up else max(1, x.numel() // BLOCK)
        _axpy_kernel[(programs,)](x, y, out, a, x.numel(), BLOCK=BLOCK, MASKED=masked, SPREAD=spread)

    return axpy


def _check_axpy(axpy):
    sizes = {64: 3.0, 1: 3.0, 63: -0.5, 65: 3.0, 1000: 0.25, 5000: 3.0}
    for n, a in sizes.items():
        x, y, out = guarded(n, values=torch.randn(n)), guarded(n, values=torch.randn(n)), guarded(n)
        launched(axpy, a, x, y, out, inputs={"x": x, "y": y}, outputs={"out": out}, what=f"N = {n}")
        exchanged = torch.allclose(out, x + a * y, rtol=1e-5, atol=1e-6)
        hint = "a multiplies x, not y." if exchanged else f"Here a is {a}."
        expect_close(out, a * x + y, f"out for N = {n}", rtol=1e-5, atol=1e-6, hint=hint)
    gpu = without_faults(lambda: axpy(3.0, torch.randn(1000), torch.randn(1000), torch.empty(1000)))
    return f"tried N = {', '.join(map(str, sizes))}, with canaries on both sides of every tensor{seen_there(gpu)}"


# 02.2


@triton.jit
def _silu_backward_kernel(x_ptr, dy_ptr, dx_ptr, N, BLOCK: tl.constexpr, FORM: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-x))
    dx = dy * s * (1 + x * (1 - s))
    if FORM == 1:
        dx = dy * s
    if FORM == 2:
        dx = s * (1 + x * (1 - s))
    if FORM == 3:
        dx = dy * s * (1 - s)
    tl.store(dx_ptr + offs, dx, mask=mask)


def _silu_backward(form=0):
    def silu_backward(x, dy, dx):
        grid = (triton.cdiv(x.numel(), BLOCK),)
        _silu_backward_kernel[grid](x, dy, dx, x.numel(), BLOCK=BLOCK, FORM=form)

    return silu_backward


def _check_silu(silu_backward):
    cases = ((64, torch.float32, 12), (37, torch.float32, 12), (130, torch.float16, 12), (5000, torch.float32, 12))
    for n, dtype, reach in (*cases, (9, torch.float32, 100)):
        x = guarded(n, dtype, values=torch.linspace(-reach, reach, n))
        dy = guarded(n, dtype, values=torch.randn(n))
        dx = guarded(n, dtype)
        case = f"N = {n}, {str(dtype).removeprefix('torch.')}"
        hint = "exp(x) is infinite from 89 on, and inf / inf is NaN: take exp(-x)." if reach > 12 else ""
        launched(silu_backward, x, dy, dx, inputs={"x": x, "dy": dy}, outputs={"dx": dx}, what=case, hint=hint)
        leaf, upstream = x.detach().double().cpu().requires_grad_(), dy.double().cpu()
        torch.nn.functional.silu(leaf).backward(upstream)
        s = torch.sigmoid(leaf.detach())
        told = "SiLU'(x) = s + x·s·(1 − s), where s is the sigmoid of x."
        mistakes = {
            "This is dy·s: the sigmoid depends on x too, use the product rule.": upstream * s,
            "The incoming gradient dy is missing (chain rule).": s * (1 + leaf.detach() * (1 - s)),
            "This is dy times the derivative of the sigmoid; SiLU is x times the sigmoid.": upstream * s * (1 - s),
        }
        # In fp32 exp, a quotient, and 1 + x·(1 − s) with |x| up to 12 are a rounding each; fp16 rounds the result once.
        fine = 16 * torch.finfo(torch.float32).eps
        tolerance = {"rtol": 2**-10 if dtype == torch.float16 else fine, "atol": fine}
        for message, value in mistakes.items():
            if torch.allclose(dx.double().cpu(), value, rtol=1e-3, atol=1e-5):
                told = message
        if dtype == torch.float16 and torch.allclose(dx.double().cpu(), leaf.grad, rtol=1e-2, atol=1e-2):
            told = "Nearly: compute in fp32, .to(tl.float32) after the loads, so that only the store rounds to fp16."
        expect_close(dx, leaf.grad.to(dtype).to(dx.device), f"dx ({case})", **tolerance, hint=told)
    gpu = without_faults(lambda: silu_backward(torch.randn(130), torch.randn(130), torch.empty(130)))
    return f"tried 64, 37 and 5000 values of fp32 and 130 of fp16 from -12 to 12, and 9 up to 100{seen_there(gpu)}"


# 02.3


@triton.jit
def _softmax_kernel(
    x_ptr, out_ptr, N, stride_xm, BLOCK: tl.constexpr, SHIFT: tl.constexpr, OTHER: tl.constexpr, ZEROED: tl.constexpr
):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_xm + offs, mask=offs < N, other=OTHER)
    if SHIFT:
        x = x - tl.max(x, axis=0)
    e = tl.exp(x)
    if ZEROED:
        e = tl.where(offs < N, e, 0.0)
    tl.store(out_ptr + row * N + offs, e / tl.sum(e, axis=0), mask=offs < N)


def _softmax(shift=True, other=float("-inf"), strided=True, zeroed=False):
    def softmax(x, out):
        M, N = x.shape
        block = triton.next_power_of_2(N)
        _softmax_kernel[(M,)](
            x, out, N, x.stride(0) if strided else N, BLOCK=block, SHIFT=shift, OTHER=other, ZEROED=zeroed
        )

    return softmax


def _check_softmax(softmax):
    generator = torch.Generator().manual_seed(0)
    cases = {
        "3 rows of 8 values": (8, 0, 8, ""),
        "2 rows of 5 values, all below -1": (5, -8, 5, ""),
        "9 rows of 130 values": (130, 0, 130, "One program per row; BLOCK is a power of two and N or more."),
        "1 row of 2100 values": (2100, 0, 2100, "One program per row; BLOCK is a power of two and N or more."),
        "4 rows of 7 values around 200": (7, 200, 7, "exp(200) overflows. Subtract the row's maximum first."),
        "4 rows of 7 values around -200": (
            7, -200, 7, "What lies beyond the end of a row takes part in the maximum: with 0 for it the maximum is 0, "
            "every exponential 0, and 0 / 0 is NaN. Load it as -inf.",
        ),
        "5 rows of 9 values from -300 to 300": (
            9, 0, 9, "Only without the largest value of the row is every exponential 1 at most: subtract the maximum.",
        ),
        "3 rows of 6 values, every row 10 apart in memory": (
            6, 0, 10, "A row of x begins at row * x.stride(0), not at row * N; out is contiguous: its rows begin at "
            "row * N.",
        ),
    }  # fmt: skip
    for name, (N, middle, stride, hint) in cases.items():
        M = int(name[0])
        values = middle + torch.randn(M, N, generator=generator)
        if "300" in name:
            values = torch.linspace(-300, 300, M * N).view(N, M).t()
        x, out = guarded((M, stride))[:, :N].copy_(values), guarded((M, N))
        want = torch.softmax(x, dim=1)
        launched(softmax, x, out, inputs={"x": x}, outputs={"out": out}, what=name, hint=hint)
        expect(
            stride == N or torch.allclose(out, want, rtol=1e-4, atol=1e-6),
            f"{name}: row 0 may be right, the others are not. {hint}",
        )
        sums = out.sum(1)
        told = "What lies beyond the end of a row counts in the sum: load it as -inf, so that its exponential is 0."
        if not 0 <= sums[0] <= 1:
            told = "Divide by the sum of the row's exponentials."
        right = torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
        expect(right, f"{name}: the first row sums to {sums[0].item():.4f}, not 1. {told}")
        expect_close(out, want, f"out for {name}", rtol=1e-4, atol=1e-6)
    gpu = without_faults(lambda: softmax(torch.randn(4, 10)[:, :6], torch.empty(4, 6)))
    return f"tried {len(cases)} shapes, one with gaps between the rows, three with large values{seen_there(gpu)}"


EXERCISES = {
    "02.1": Exercise(
        title="out = a·x + y",
        specification="axpy(a, x, y, out): launch a kernel that writes a·x + y into out; 1-dimensional, contiguous.",
        checker=_check_axpy,
        solution=_axpy(),
        wrong={
            "no mask": (_axpy(masked=False), "read past its end"),
            "grid rounded down": (_axpy(rounded_up=False), "Does the grid have enough programs"),
            "every program the same block": (_axpy(spread=False), "has each program its own block"),
        },
        hints=(
            "Copy the add kernel. What changes is one argument and one line.",
            "The grid is (triton.cdiv(N, BLOCK),), and the last block needs mask=offs < N in load and store.",
        ),
    ),
    "02.2": Exercise(
        title="SiLU, backward",
        specification="silu_backward(x, dy, dx): launch a kernel that writes dL/dx, given x and dy = dL/dSiLU(x).",
        checker=_check_silu,
        solution=_silu_backward(),
        wrong={
            "no product rule": (_silu_backward(1), "product rule"),
            "no dy": (_silu_backward(2), "chain rule"),
            "sigmoid's derivative": (_silu_backward(3), "SiLU is x times the sigmoid"),
        },
        hints=(
            "SiLU(x) = x·s(x). Differentiate the product; s' = s·(1 − s).",
            "dx = dy · s · (1 + x · (1 − s)). Compute in fp32: .to(tl.float32) after the loads.",
        ),
    ),
    "02.3": Exercise(
        title="Softmax of rows",
        specification="softmax(x, out): launch a kernel with one program per row; x (M, N) may have gaps between rows.",
        checker=_check_softmax,
        solution=_softmax(),
        wrong={
            "no maximum": (_softmax(shift=False), "Subtract the row's maximum"),
            "padding counts": (_softmax(other=0.0), "load it as -inf"),
            "padding in the maximum": (_softmax(other=0.0, zeroed=True), "takes part in the maximum"),
            "no stride": (_softmax(strided=False), "x.stride(0)"),
        },
        hints=(
            "Program i loads row i: x_ptr + i * stride_xm + offs, with offs = tl.arange(0, BLOCK), BLOCK ≥ N.",
            "BLOCK must be a power of two: triton.next_power_of_2(N). Mask with other=-float('inf').",
            "Subtract tl.max(x, axis=0), take tl.exp, divide by tl.sum.",
        ),
    ),
    **e02_tiles.EXERCISES,
}
