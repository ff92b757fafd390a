"""Lesson 02: three kernels, run on tensors between canaries."""

import torch

from ...kernels.runtime import tl, triton
from ..canaries import check_canaries, check_reads, guarded, need_interpreter, no_holes, watched_loads
from ..exercise import Exercise, WrongAnswer, expect, expect_close

BLOCK = 64


def _stub(*args):
    raise NotImplementedError


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
    need_interpreter()
    sizes = (64, 1, 63, 65, 1000)
    for n in sizes:
        x, y = guarded(n, values=torch.randn(n)), guarded(n, values=torch.randn(n))
        out = guarded(n)
        with watched_loads() as loads:
            axpy(3.0, x, y, out)
        check_canaries(f"out (N = {n})", out)
        no_holes(f"out (N = {n})", out)
        expect_close(out, 3.0 * x + y, f"out for N = {n}", rtol=1e-5, atol=1e-6, hint="a multiplies x, not y.")
        for name, tensor in (("x", x), ("y", y)):
            check_canaries(name, tensor)
            check_reads(f"{name} (N = {n})", tensor, loads)
    return f"tried N = {', '.join(map(str, sizes))}, with canaries on both sides of every tensor"


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
    need_interpreter()
    for n, dtype in ((64, torch.float32), (37, torch.float32), (130, torch.float16)):
        x = guarded(n, dtype, values=torch.linspace(-12, 12, n))
        dy = guarded(n, dtype, values=torch.randn(n))
        dx = guarded(n, dtype)
        with watched_loads() as loads:
            silu_backward(x, dy, dx)
        what = f"dx (N = {n}, {str(dtype).removeprefix('torch.')})"
        check_canaries(what, dx)
        no_holes(what, dx)
        leaf, upstream = x.detach().double().cpu().requires_grad_(), dy.double().cpu()
        torch.nn.functional.silu(leaf).backward(upstream)
        s = torch.sigmoid(leaf.detach())
        told = "SiLU'(x) = s + x·s·(1 − s), where s is the sigmoid of x."
        mistakes = {
            "This is dy·s: the sigmoid depends on x too, use the product rule.": upstream * s,
            "The incoming gradient dy is missing (chain rule).": s * (1 + leaf.detach() * (1 - s)),
            "This is dy times the derivative of the sigmoid; SiLU is x times the sigmoid.": upstream * s * (1 - s),
        }
        # fp16: one rounding of the result. fp32: exp, a quotient, and 1 + x·(1 − s) with |x| up to 12, a rounding each.
        steps = 2 if dtype == torch.float16 else 16
        tolerance = {"rtol": steps * torch.finfo(dtype).eps, "atol": steps * torch.finfo(dtype).eps}
        for message, value in mistakes.items():
            if torch.allclose(dx.double().cpu(), value, rtol=1e-3, atol=1e-5):
                told = message
        expect_close(dx, leaf.grad.to(dtype).to(dx.device), what, **tolerance, hint=told)
        for name, tensor in (("x", x), ("dy", dy)):
            check_reads(f"{name} (N = {n})", tensor, loads)
    return "tried 64 and 37 values of fp32 and 130 of fp16, from -12 to 12"


# 02.3


@triton.jit
def _softmax_kernel(x_ptr, out_ptr, N, stride_xm, BLOCK: tl.constexpr, SHIFT: tl.constexpr, OTHER: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_xm + offs, mask=offs < N, other=OTHER)
    if SHIFT:
        x = x - tl.max(x, axis=0)
    e = tl.exp(x)
    tl.store(out_ptr + row * N + offs, e / tl.sum(e, axis=0), mask=offs < N)


def _softmax(shift=True, other=float("-inf"), strided=True):
    def softmax(x, out):
        M, N = x.shape
        stride = x.stride(0) if strided else N
        _softmax_kernel[(M,)](x, out, N, stride, BLOCK=triton.next_power_of_2(N), SHIFT=shift, OTHER=other)

    return softmax


def _check_softmax(softmax):
    need_interpreter()
    generator = torch.Generator().manual_seed(0)
    cases = {
        "3 rows of 8 values": (torch.randn(3, 8, generator=generator), 8),
        "2 rows of 5 values, all below -1": (torch.randn(2, 5, generator=generator) - 8, 5),
        "4 rows of 7 values around 200": (200 + torch.randn(4, 7, generator=generator), 7),
        "3 rows of 6 values, every row 10 apart in memory": (torch.randn(3, 6, generator=generator), 10),
    }
    for name, (values, stride) in cases.items():
        M, N = values.shape
        whole = guarded((M, stride))
        x = whole[:, :N].copy_(values)
        out = guarded((M, N))
        with watched_loads() as loads:
            softmax(x, out)
        try:
            check_canaries(f"out ({name})", out)
        except WrongAnswer as caught:
            gaps = " Or did you store with x's stride? out is contiguous: its rows begin at row * N."
            raise WrongAnswer(f"{caught}{gaps if stride != N else ''}") from None
        want = torch.softmax(x, dim=1)
        if "200" in name:
            expect(
                torch.isfinite(out).all().item(),
                f"{name}: out holds {out[0, 0].item()}, because exp(200) overflows. Subtract the row's maximum first.",
            )
        if stride != N:
            expect(
                not torch.isnan(out).any().item() and torch.allclose(out, want, rtol=1e-4, atol=1e-6),
                f"{name}: row 0 may be right, the others are not. A row begins at row * x.stride(0), not at row * N.",
            )
        no_holes(f"out ({name})", out)
        sums = out.sum(1)
        expect(
            torch.allclose(sums, torch.ones_like(sums), atol=1e-4),
            f"{name}: the first row sums to {sums[0].item():.4f}, not 1. What lies beyond the end of a row counts "
            "in the sum: load it as -inf, so that its exponential is 0.",
        )
        expect_close(out, want, f"out for {name}", rtol=1e-4, atol=1e-6)
        check_reads(f"x ({name})", whole, loads)
    return f"tried {len(cases)} shapes, one with gaps between the rows, one with large values"


EXERCISES = {
    "02.1": Exercise(
        title="out = a·x + y",
        specification="axpy(a, x, y, out): launch a kernel that writes a·x + y into out; 1-dimensional, contiguous.",
        stub=_stub,
        checker=_check_axpy,
        solution=_axpy(),
        wrong={
            "no mask": (_axpy(masked=False), "written past its end"),
            "grid rounded down": (_axpy(rounded_up=False), "either no program wrote there"),
            "every program the same block": (_axpy(spread=False), "look at the grid"),
        },
        hints=(
            "Copy the add kernel. What changes is one argument and one line.",
            "The grid is (triton.cdiv(N, BLOCK),), and the last block needs mask=offs < N in load and store.",
        ),
    ),
    "02.2": Exercise(
        title="SiLU, backward",
        specification="silu_backward(x, dy, dx): launch a kernel that writes dL/dx, given x and dy = dL/dSiLU(x).",
        stub=_stub,
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
        stub=_stub,
        checker=_check_softmax,
        solution=_softmax(),
        wrong={
            "no maximum": (_softmax(shift=False), "Subtract the row's maximum"),
            "padding counts": (_softmax(other=0.0), "load it as -inf"),
            "no stride": (_softmax(strided=False), "x.stride(0)"),
        },
        hints=(
            "Program i loads row i: x_ptr + i * stride_xm + offs, with offs = tl.arange(0, BLOCK), BLOCK ≥ N.",
            "BLOCK must be a power of two: triton.next_power_of_2(N). Mask with other=-float('inf').",
            "Subtract tl.max(x, axis=0), take tl.exp, divide by tl.sum.",
        ),
    ),
}
