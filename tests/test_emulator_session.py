"""Where `emulate` is entered and left, and which threads may."""

import threading

import pytest
import torch
import triton
import triton.language as tl
from compiled import compiled, run_again

from handtuned.gpu import emulate


def test_this_file_without_the_interpreter(pytestconfig):
    run_again(__file__, pytestconfig)


@triton.jit
def double(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs))


def in_a_thread(call):
    """What `call` gave in another thread, or the error that ended it."""
    out = []

    def run():
        try:
            out.append(call())
        except RuntimeError as error:
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return out[0]


def launches(arch):
    with emulate(arch) as gpu:
        double[(1,)](torch.randn(64), torch.empty(64), BLOCK=64)
    return [launch.arch for launch in gpu.launches]


@compiled
def test_one_emulator_at_a_time():
    """Another thread may launch in it, not enter a second one, whose end would leave Triton with a driver of nobody."""
    with emulate("sm_90") as gpu:
        in_a_thread(lambda: double[(1,)](torch.randn(64), torch.empty(64), BLOCK=64))
        assert isinstance(in_a_thread(lambda: launches("sm_80")), RuntimeError)
        assert launches("sm_80") == ["sm_80"]  # within each other, of one thread
    assert [launch.arch for launch in gpu.launches] == ["sm_90"]
    assert in_a_thread(lambda: launches("sm_80")) == ["sm_80"]
    with pytest.raises(ValueError, match="mine"), emulate("sm_75"):
        raise ValueError("mine")
    assert in_a_thread(lambda: launches("sm_80")) == ["sm_80"]
