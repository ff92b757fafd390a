"""The NF4 format, bit for bit against bitsandbytes on a CPU; the real kernels against the references."""

import json
import zlib
from dataclasses import replace

import pytest
import torch
from handtuned.kernels import runtime
from handtuned.kernels.nf4 import NF4_CODE, nf4_dequantize, nf4_dequantize_reference, pair_table
from handtuned.kernels.nf4_quantize import (
    THRESHOLDS,
    _cell_words,
    _cells,
    nf4_quantize_reference,
)
from handtuned.quant import (
    NF4Tensor,
    dequantize_nf4,
    dynamic_map,
    normal_quantile_levels,
    quantize_nf4,
)
from handtuned.quant.nf4 import nf4_bytes

FACTS = "weight.quant_state.bitsandbytes__nf4"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@pytest.fixture
def bnb():
    """bitsandbytes' functions; its torch.compile fallbacks run eagerly (the same arithmetic, without the wait)."""
    functional = pytest.importorskip("bitsandbytes").functional
    with torch.compiler.set_stance("force_eager"):
        yield functional


def _values(kind, n, dtype):
    x = torch.randn(n)
    limit = torch.finfo(dtype).max
    return {
        "random": x,
        "heavy_tailed": x / torch.rand(n).clamp(min=1e-4),
        "constant": torch.full((n,), 0.37),
        "zero": torch.zeros(n),
        "half_zero": x * (torch.arange(n) // 64 % 2),
        "subnormal": x * 1e-40 if dtype != torch.float16 else x * 1e-6,
        "huge": x.clamp(-1, 1) * limit,
        "levels": NF4_CODE[torch.randint(16, (n,))],
        "thresholds": THRESHOLDS[torch.randint(15, (n,))],
    }[kind].to(dtype)


KINDS = ("random", "heavy_tailed", "constant", "zero", "half_zero", "subnormal", "huge", "levels", "thresholds")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_bitsandbytes(bnb, kind, dtype):
    x = _values(kind, 4096 * 2, dtype)
    for block_size in BLOCK_SIZES:
        q = quantize_nf4(x, block_size, double_quant=False)
        packed, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type="nf4")
        assert torch.equal(q.packed, packed.flatten())
        assert torch.equal(q.absmax, state.absmax)
        assert torch.equal(dequantize_nf4(q), bnb.dequantize_4bit(packed, state).view(x.shape))


@pytest.mark.parametrize("n", [1, 2, 31, 63, 64, 65, 71, 1000, 4097, 131072 + 33, 600_001])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_ragged_sizes_are_those_of_bitsandbytes(bnb, n, block_size):
    for x in (torch.randn(n), torch.randn(n).half(), torch.zeros(n)):
        q = quantize_nf4(x, block_size, double_quant=False)
        packed, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type="nf4")
        assert torch.equal(q.packed, packed.flatten())
        assert torch.equal(q.absmax, state.absmax)
        assert torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state).view(-1))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
def test_double_quantized_states_of_bitsandbytes_decode_to_its_bits(bnb, dtype, block_size, each_backend, device):
    x = torch.randn(64, 4096).to(dtype)
    packed, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type="nf4", compress_statistics=True)
    saved = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    q = NF4Tensor.from_state_dict({k: v.to(device) for k, v in saved.items()})
    assert torch.equal(q.dequantize().cpu(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 1000, 8192, 8193, 20_001])
def test_kernels_give_the_references_bits(n, double_quant, dtype, device, monkeypatch):
    x = torch.randn(n).to(dtype)
    expected = quantize_nf4(x, 64, double_quant)
    dense = expected.dequantize()
    assert torch.equal(nf4_dequantize_reference(expected, dtype), dense)
    monkeypatch.delenv("HANDTUNED_BACKEND")
    q = quantize_nf4(x.to(device), 64, double_quant)
    assert torch.equal(q.packed.cpu(), expected.packed)
    assert torch.equal(q.absmax.cpu(), expected.absmax)
    assert torch.equal(q.dequantize().cpu(), dense)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_give_the_references_bits_on_hard_values(kind, block_size, device, monkeypatch):
    x = _values(kind, 9000, torch.float32)
    expected = quantize_nf4(x, block_size, False)
    assert torch.equal(nf4_quantize_reference(x, block_size)[0], expected.packed)
    dense = {out: expected.dequantize(out) for out in DTYPES.values()}
    monkeypatch.delenv("HANDTUNED_BACKEND")
    q = quantize_nf4(x.to(device), block_size, False)
    assert torch.equal(q.packed.cpu(), expected.packed)
    assert torch.equal(q.absmax.cpu(), expected.absmax)
    for out, values in dense.items():
        assert torch.equal(q.dequantize(out).cpu(), values)


def assert_same_map(ours, theirs):
    """To the bit; bitsandbytes takes its 8-bit map from torch.linspace, which has other last bits without AVX2."""
    last_bit = 2**-22 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 0
    torch.testing.assert_close(ours, theirs, rtol=last_bit, atol=0)


def test_levels_and_map_are_derived_to_the_bit(bnb):
    assert torch.equal(normal_quantile_levels(), NF4_CODE)
    assert torch.equal(NF4_CODE, bnb.get_4bit_type("nf4", device="cpu"))
    assert (dynamic_map() < 0).sum() == 127
    assert_same_map(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize(("signed", "checksum"), [(True, 454261483), (False, 3899729807)])
def test_the_map_has_the_same_bits_on_every_cpu(signed, checksum):
    assert zlib.crc32(dynamic_map(signed).numpy().tobytes()) == checksum


def test_example_bytes():
    x = torch.tensor([-1.0, 1.0, 0.0, 0.5, 0.09])
    q = quantize_nf4(x, double_quant=False)
    assert q.packed.tolist() == [0x0F, 0x7C, 0x87]  # high nibble first; the odd one is padded with 7
    assert q.absmax.tolist() == [1.0]
    assert q.dequantize().tolist() == NF4_CODE[[0, 15, 7, 12, 8]].tolist()


def test_shapes_layouts_and_originals_are_kept(each_backend, device):
    x = torch.randn(33, 70, device=device)
    kept = x.clone()
    matrices = (x, x.t(), x[::2, 1::3], x[None, :, None], x.expand(2, 33, 70), x[3:, 5:])
    strided = (x[:, 3], x.flatten()[::3], x.flatten()[5:], x[0, 0].expand(100))  # flat, and yet not one after the other
    for view in (*matrices, *strided):
        q, expected = quantize_nf4(view), quantize_nf4(view.clone(memory_format=torch.contiguous_format))
        assert q.shape == view.shape
        assert torch.equal(q.packed, expected.packed) and torch.equal(q.dequantize(), expected.dequantize())
    assert torch.equal(x, kept)
    assert quantize_nf4(torch.tensor(-3.0, device=device)).dequantize().shape == ()
    assert quantize_nf4(torch.empty(0, 5, device=device)).dequantize().shape == (0, 5)
    assert not quantize_nf4(x.requires_grad_()).dequantize().requires_grad


def test_out_is_filled_and_checked(each_backend, device):
    q = quantize_nf4(torch.randn(65, 64, device=device))
    buffer = torch.full((65 * 64 + 3,), float("nan"), device=device)
    out = buffer[1:-2].view(65, 64)  # starts between the reference's quads
    assert dequantize_nf4(q, out=out) is out
    assert torch.equal(out, q.dequantize())
    assert buffer[[0, -2, -1]].isnan().all()
    for wrong in (torch.empty(64, 65), torch.empty(65, 64).half(), torch.empty(64, 65).t()):
        with pytest.raises(ValueError, match="out must be a contiguous"):
            q.dequantize(out=wrong.to(device))
    with pytest.raises(ValueError, match="needs"):
        nf4_dequantize(replace(q, packed=q.packed[1:]), torch.float32)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_torchs_defaults_of_dtype_and_device_change_nothing(default, each_backend, device):
    x = torch.randn(70, 130, device=device)
    expected, plain = quantize_nf4(x), quantize_nf4(x, double_quant=False)
    dense = {dtype: expected.dequantize(dtype) for dtype in DTYPES.values()}
    for table in (pair_table, _cells, _cell_words):
        table.cache_clear()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            q = quantize_nf4(x)
            assert quantize_nf4(x, double_quant=False).absmax.dtype == plain.absmax.dtype == torch.float32
            for dtype, values in dense.items():
                assert torch.equal(q.dequantize(dtype), values)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_was_made_in_inference_mode_serves_outside_of_it():
    q = quantize_nf4(torch.randn(100, 100))
    runtime._local.__dict__.clear()
    with torch.inference_mode():
        expected = q.dequantize(torch.bfloat16)
    assert torch.equal(q.dequantize(torch.bfloat16), expected)


def test_zeros_stay_exactly_zero_with_double_quantization():
    x = torch.randn(4096)
    x[64:256] = 0
    assert torch.all(quantize_nf4(x).dequantize()[64:256] == 0)


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda: quantize_nf4(torch.arange(64)), TypeError),
        (lambda: quantize_nf4(torch.randn(64).double()), TypeError),
        (lambda: quantize_nf4([1.0]), TypeError),
        (lambda: quantize_nf4(torch.randn(64), block_size=48), ValueError),
        (lambda: quantize_nf4(torch.randn(64), block_size=16), ValueError),
        (lambda: quantize_nf4(torch.randn(64), block_size=64.0), ValueError),
        (lambda: quantize_nf4(torch.randn(64)).dequantize(torch.int8), TypeError),
        (lambda: quantize_nf4(torch.randn(64)).to(torch.float16), TypeError),
    ],
)
def test_bad_arguments(call, error):
    with pytest.raises(error):
        call()


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_state_dict_is_bitsandbytes_own(bnb, double_quant, storage):
    x = torch.randn(512, 256)
    q = quantize_nf4(x, double_quant=double_quant)
    ours = q.state_dict("a.b.")
    packed, state = bnb.quantize_4bit(
        x, quant_type="nf4", compress_statistics=double_quant, quant_storage=storage, blocksize=64
    )
    theirs = {"a.b.weight": packed} | {f"a.b.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    assert ours.keys() == theirs.keys()
    if double_quant:
        assert_same_map(ours["a.b.weight.nested_quant_map"], theirs["a.b.weight.nested_quant_map"])
    for key, value in ours.items():
        # The first is stored otherwise, the second coded by its approximate CPU table.
        if key not in ("a.b.weight", "a.b.weight.absmax", "a.b.weight.nested_quant_map"):
            assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key
    assert json.loads(bytes(ours["a.b.weight.quant_state.bitsandbytes__nf4"].tolist()))["shape"] == [512, 256]
    back = NF4Tensor.from_state_dict(theirs, "a.b.")
    assert torch.equal(back.packed, q.packed)
    assert torch.equal(back.dequantize(), bnb.dequantize_4bit(packed, state))
    read = bnb.QuantState.from_dict({k.removeprefix("a.b.weight."): v for k, v in list(ours.items())[1:]}, "cpu")
    assert torch.equal(bnb.dequantize_4bit(ours["a.b.weight"], read), q.dequantize())


def test_incomplete_and_foreign_states_are_refused(bnb):
    state = quantize_nf4(torch.randn(64, 64)).state_dict()
    for key in state:
        with pytest.raises(ValueError, match="not a complete NF4 weight"):
            NF4Tensor.from_state_dict({k: v for k, v in state.items() if k != key})
    packed, fp4 = bnb.quantize_4bit(torch.randn(64, 64), quant_type="fp4")
    saved = {"weight": packed} | {f"weight.{k.replace('fp4', 'nf4')}": v for k, v in fp4.as_dict(packed=True).items()}
    with pytest.raises(ValueError, match="fp4"):
        NF4Tensor.from_state_dict(saved)
    for facts in ({"nested_blocksize": 0}, {"blocksize": 48}, {"blocksize": None}, {"dtype": "int8"}, {"shape": None}):
        with pytest.raises(ValueError, match="must describe an NF4 tensor"):
            NF4Tensor.from_state_dict(_with_facts(state, **facts))


def _with_facts(state, **changes):
    facts = json.loads(bytes(state[FACTS].tolist())) | changes
    text = json.dumps({key: value for key, value in facts.items() if value is not None}).encode()
    return state | {FACTS: torch.tensor(list(text), dtype=torch.uint8)}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s | {"weight": s["weight"][1:]}, "needs 2048 .* as its codes, got 2047"),
        (lambda s: s | {"weight.absmax": s["weight.absmax"].half()}, "needs 64 .*uint8 as its absmax"),
        (lambda s: s | {"weight.nested_absmax": s["weight.nested_absmax"][:0]}, "needs 1 .* as its nested absmax"),
        (lambda s: s | {"weight.nested_quant_map": s["weight.nested_quant_map"][:99]}, "needs 256 .* its nested map"),
        (lambda s: s | {FACTS: s[FACTS][:9]}, "must describe an NF4 tensor"),
        (lambda s: s | {"weight.nested_absmax": s["weight.nested_absmax"] / 0}, "weight must be finite"),
        (lambda s: _with_facts(s, nested_offset=torch.nan), "weight must be finite"),
        (lambda s: _with_facts(s, nested_offset=None), "needs 64 .*float32 as its absmax, got 64 .*uint8"),
    ],
)
def test_states_that_do_not_fit_together_are_refused(change, message):
    """A kernel reads by address: with too few scales it would read past their end."""
    state = quantize_nf4(torch.randn(64, 64)).state_dict()
    with pytest.raises(ValueError, match=message):
        NF4Tensor.from_state_dict(change(state))


def test_tensors_of_a_state_may_lie_anyhow():
    q = quantize_nf4(torch.randn(64, 64))
    state = q.state_dict()
    state["weight"] = state["weight"].t()
    state["weight.absmax"] = state["weight.absmax"].repeat_interleave(2)[::2]
    assert torch.equal(NF4Tensor.from_state_dict(state).dequantize(), q.dequantize())


def test_bytes_and_moving():
    q = quantize_nf4(torch.randn(1024, 1024))
    assert q.nbytes == 2**19 + 2**14 + 4 * 64 + 4
    for n, block_size, double in ((1001, 64, True), (1001, 64, False), (20_001, 32, True), (0, 64, False)):
        assert quantize_nf4(torch.randn(n), block_size, double).nbytes == sum(nf4_bytes(n, block_size, double))
    moved = q.to("cpu")
    assert torch.equal(moved.dequantize(), q.dequantize()) and moved.nested.block_size == 256
    meta = q.to("meta")
    assert meta.dequantize().is_meta and meta.dequantize().shape == q.shape
