"""Launches within autograd, and from several threads, in the emulator."""

import threading

import pytest
import torch
import triton
import triton.language as tl
from compiled import compiled, run_again

from handtuned.gpu import KernelFault, emulate


def test_this_file_without_the_interpreter(pytestconfig):
    run_again(__file__, pytestconfig)


@triton.jit
def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs), mask=offs < n)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, written):
        ctx.written, y = written, torch.empty_like(x)
        double[(1,)](x, y, len(x), BLOCK=32)
        return y

    @staticmethod
    def backward(ctx, dy):
        part, dx = torch.empty_like(dy), torch.empty_like(dy)
        double[(1,)](dy.contiguous(), part, ctx.written, BLOCK=32)
        double[(1,)](part, dx, len(dy), BLOCK=32)
        return dx / 2, None


@compiled
@pytest.mark.parametrize("run", [lambda y: y.sum().backward(), lambda y: torch.autograd.backward(y.sum())])
def test_a_gradient_s_kernel_reads_what_nothing_wrote(run):
    """As in forward: the half of `part` that no launch wrote is not to be read."""
    x = torch.randn(32, requires_grad=True)
    with emulate("sm_90") as gpu:
        run(Double.apply(x, 32))
        assert len(gpu.launches) == 3 and torch.equal(x.grad, torch.full((32,), 2.0))
        with pytest.raises(KernelFault) as caught:
            run(Double.apply(x, 16))
    assert (caught.value.kind, caught.value.kernel) == ("never written", "double")


@compiled
def test_one_emulator_at_a_time():
    """A second thread may launch in the one that is there, but not enter another; nested ones of one thread may."""
    said = []

    def enter():
        try:
            with emulate("sm_80"):
                pass
        except RuntimeError as error:
            said.append(str(error))

    x, y = torch.randn(32), torch.empty(32)
    with emulate("sm_90") as gpu:
        for work in (enter, lambda: double[(1,)](x, y, 32, BLOCK=32)):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        with emulate("sm_80") as inner:
            double[(1,)](x, y, 32, BLOCK=32)
    assert torch.equal(y, 2 * x) and len(gpu.launches) == len(inner.launches) == 1
    assert len(said) == 1 and "one emulator at a time" in said[0]
    enter()
    assert len(said) == 1
