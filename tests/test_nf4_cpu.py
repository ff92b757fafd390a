"""The compiled CPU dequantize: the reference's bits, nothing written beside the output, and when it runs."""

from dataclasses import replace

import pytest
import torch
from handtuned.kernels import nf4_cpu
from handtuned.kernels.nf4 import NF4_CODE, NestedScales, nf4_dequantize_reference
from handtuned.quant import NF4Tensor, quantize_nf4
from helpers import run_uninterpreted
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

pytestmark = pytest.mark.skipif(nf4_cpu._library is None, reason="built only where there is a C compiler")


def _native(q, out, fresh=False):
    return nf4_cpu.nf4_dequantize_native(q, NF4_CODE, out, fresh)


def _reference(q, dtype=torch.float32):
    return nf4_dequantize_reference(q, dtype)


DTYPES = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 63, 64, 65, 1000, 4097, 32_769, 600_001])
def test_the_references_bits_between_canaries(n, block_size, double_quant, dtype):
    q = quantize_nf4(torch.randn(n) * torch.rand(n).mul(20).sub(10).exp(), block_size, double_quant)
    memory = torch.full((n + 8,), 123.5, dtype=dtype)
    _native(q, memory[3 : n + 3])  # also an address that is not a multiple of 16
    assert torch.equal(memory[3 : n + 3], _reference(q, dtype))
    assert (memory[:3] == 123.5).all() and (memory[n + 3 :] == 123.5).all()


def test_codes_and_scales_at_odd_addresses():
    q = quantize_nf4(torch.randn(1001))
    codes, scales = torch.zeros(504, dtype=torch.uint8), torch.zeros(19, dtype=torch.uint8)
    codes[3:], scales[3:] = q.packed, q.absmax
    moved = NF4Tensor(codes[3:], scales[3:], q.shape, q.dtype, 64, q.nested)
    assert torch.equal(_native(moved, torch.empty(1001)), _reference(q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-42, 3e38, 3.4e38])
def test_zero_subnormal_and_huge_blocks(value, dtype):
    q = quantize_nf4(torch.randn(1000).clamp(-1, 1) * value, 64, double_quant=False)
    assert torch.equal(_native(q, torch.empty(1000, dtype=dtype)), _reference(q, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_that_are_not_finite_pass_through(dtype):
    q = quantize_nf4(torch.randn(256), 64, double_quant=False)
    q.absmax[:2], q.absmax.view(torch.int32)[2] = torch.tensor([float("inf"), float("nan")]), 0x7F800001
    got, want = _native(q, torch.empty(256, dtype=dtype)), _reference(q, dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("block_size", "nested_block"), [(48, 256), (64, 3)])
def test_blocks_that_are_no_powers_of_two_are_left_to_the_reference(monkeypatch, block_size, nested_block):
    monkeypatch.delenv("HANDTUNED_BACKEND")
    codes, scales = torch.randint(0, 256, (192,), dtype=torch.uint8), -(-384 // block_size)
    map_ = torch.linspace(0, 1, 256)
    nested = NestedScales(torch.rand(-(-scales // nested_block)), map_, torch.tensor(0.5), nested_block)
    q = NF4Tensor(codes, torch.arange(scales, dtype=torch.uint8), torch.Size((384,)), torch.float32, block_size, nested)
    assert not nf4_cpu.runs_native(q)
    assert nf4_cpu.runs_native(replace(q, block_size=64, nested=nested._replace(block_size=256)))
    scale = map_[:scales] * nested.absmax.repeat_interleave(nested_block)[:scales] + 0.5
    values = NF4_CODE[torch.stack([codes >> 4, codes & 15], 1).flatten().long()]
    assert torch.equal(_reference(q), values * scale.repeat_interleave(block_size)[:384])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_memory_of_many_pages(dtype):
    q = quantize_nf4(torch.randn(1024, 4099))
    assert torch.equal(_native(q, torch.empty(q.shape, dtype=dtype), fresh=True), _reference(q, dtype))


def test_one_thread_gives_the_same():
    q, threads = quantize_nf4(torch.randn(300, 1000)), torch.get_num_threads()
    many = _native(q, torch.empty(q.shape))
    try:
        torch.set_num_threads(1)
        assert torch.equal(_native(q, torch.empty(q.shape)), many)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("forced", ["", "torch"])
def test_when_it_runs(forced):
    code = """if True:
        import torch
        from handtuned.kernels import nf4
        from handtuned.quant import quantize_nf4
        calls, native = [], nf4.nf4_dequantize_native
        nf4.nf4_dequantize_native = lambda *args: calls.append(1) or native(*args)
        q = quantize_nf4(torch.randn(100, 100))
        q.dequantize(), q.dequantize(torch.bfloat16), q.dequantize(torch.float16)
        q.absmax = q.absmax.repeat_interleave(2)[::2]
        try:
            q.dequantize()
        except ValueError as error:
            assert "not contiguous" in str(error)
        print(len(calls))
    """
    assert run_uninterpreted(code, backend=forced).split()[-1] == ("0" if forced else "2")


def test_a_tensor_without_memory_never_reaches_c(monkeypatch):
    """Estimates of memory run a model's step on fake tensors: their addresses are nobody's."""
    monkeypatch.setattr(nf4_cpu, "_library", None)  # a call would end in an AttributeError, not in a crash
    weight, mode = quantize_nf4(torch.randn(64, 64)), FakeTensorMode()
    nested = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in weight.nested]
    fake = replace(weight, packed=mode.from_tensor(weight.packed), absmax=mode.from_tensor(weight.absmax),
                   nested=NestedScales(*nested))  # fmt: skip
    monkeypatch.setattr(nf4_cpu, "has_native", lambda: True)
    with mode:
        dense = fake.dequantize()
        assert not nf4_cpu.runs_native(fake) and not nf4_cpu.runs_native_product(torch.empty(4, 64), fake)
    assert isinstance(dense, FakeTensor) and dense.shape == (64, 64)
