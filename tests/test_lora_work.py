"""The counted work: against what the kernels execute in the interpreter, and against what is promised for it."""

import lora_work
import pytest
import torch
from handtuned.kernels import matmul, runtime
from handtuned.kernels.lora import lora_linear

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="counts the interpreter's loads and stores")


@pytest.fixture
def executed(monkeypatch):
    """Bytes loaded and stored, and FLOPs of all tile products, as the interpreter executes them."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = {"bytes": 0, "flops": 0}

    def count(name, size):
        real = getattr(InterpreterBuilder, name)

        def counted(self, *args):
            key, amount = size(*args)
            counts[key] += amount
            return real(self, *args)

        monkeypatch.setattr(InterpreterBuilder, name, counted)

    def moved(ptrs, mask):
        return "bytes", int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8

    count("create_masked_load", lambda ptrs, mask, *rest: moved(ptrs, mask))
    count("create_masked_store", lambda ptrs, value, mask, *rest: moved(ptrs, mask))
    count("create_dot", lambda a, b, *rest: ("flops", 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]))
    return counts


@pytest.mark.parametrize("shape", [(130, 300, 200, 5), (64, 256, 128, 16)], ids=["ragged", "even"])
def test_the_count_is_what_the_kernels_execute(kernel_backend, executed, shape):
    M, N, K, r = shape
    tile = matmul.LORA_TILES[0].kwargs
    x, W = torch.randn(M, K).half().requires_grad_(), torch.randn(N, K).half()
    A, B = torch.randn(r, K, requires_grad=True), torch.randn(N, r, requires_grad=True)
    y = lora_linear(x, W, None, A, B, 1.0)
    work = lora_work.forward(M, N, K, r, tile=tile)
    sums = sum(size for (_, array), size in work.arrays.items() if array.startswith("sum"))  # summed by torch
    assert executed["bytes"] == work.requested - sums
    assert executed["flops"] == work.flops
    executed.update(bytes=0, flops=0)
    y.backward(torch.randn_like(y))
    work = lora_work.backward(M, N, K, r, tile=tile)
    sums = sum(size for (_, array), size in work.arrays.items() if array.startswith("sum"))
    assert executed["bytes"] == work.requested - sums
    assert executed["flops"] == work.flops


@pytest.mark.parametrize("count", [lora_work.forward, lora_work.backward])
def test_what_lora_adds_at_4096(count):
    base, full = count(4096, 4096, 4096, 0), count(4096, 4096, 4096, 16)
    assert full.flops <= 1.03 * base.flops
    assert full.requested <= 1.10 * base.requested


def test_the_floor_is_below_every_count():
    for shape in ((4096, 4096, 4096, 16), (1, 4096, 4096, 16), (512, 14336, 4096, 64)):
        floors = lora_work.floors(*shape)
        for name, count in (("forward", lora_work.forward), ("backward", lora_work.backward)):
            work = count(*shape, adapter=2)
            assert floors[name] <= work.cold <= work.requested
    # x Wᵀ in fp16 at 4096³, and r (N + K) more: the figures of any roofline
    assert lora_work.floors(4096, 4096, 4096, 16)["forward"] == 3 * 2 * 4096**2 + 2 * 16 * 2 * 4096


def test_the_report_shows_both_passes():
    text = lora_work.report(4096, 4096, 4096, 16)
    assert text.count("floor") == 2 and "forward" in text and "backward" in text
