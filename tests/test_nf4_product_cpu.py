"""The compiled CPU product with an NF4 weight: its values, its reach in memory, its independence, and when it runs."""

import pytest
import torch
from handtuned.kernels import lora, nf4_cpu, nf4_matmul, runtime
from handtuned.kernels.lora import lora_linear
from handtuned.kernels.nf4 import NF4_CODE, nf4_dequantize_reference
from handtuned.kernels.nf4_cpu import nf4_product_native
from handtuned.nn import LoRALinear
from handtuned.quant import NF4Linear, quantize_nf4
from helpers import assert_computes, assert_within_budget, run_uninterpreted
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.skipif(nf4_cpu.LEVEL == nf4_cpu.PLAIN, reason="built only where there is a C compiler")
LEVELS = {"AVX2": nf4_cpu.AVX2, "AVX-512": nf4_cpu.AVX512, "AVX512-BF16": nf4_cpu.AVX512_BF16}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # M, N, K, r, block_size
    (1, 1, 32, 0, 32),
    (2, 3, 64, 0, 64),  # fewer columns than a tile
    (3, 70, 128, 2, 64),
    (7, 15, 64, 1, 64),
    (8, 16, 96, 8, 64),  # blocks cross rows
    (9, 17, 64, 3, 4096),  # one block for many rows
    (65, 49, 544, 64, 64),
    (513, 70, 160, 65, 128),  # more rows than a batch
    (40, 1100, 32, 300, 64),  # sums over N longer than a panel of fp32
    (3, 20, 1536, 2, 512),  # sums over K longer than that, blocks half as long
    (5, 20, 4160, 2, 1024),  # and longer than one of bf16
    (4, 2100, 64, 1100, 64),  # and over N; more terms of the adapter than a panel holds
    (16, 130, 576, 8, 64),  # most rows that need no panel
    (17, 67, 2240, 8, 64),  # one more
    (2, 5, 66560, 0, 64),  # more scales than a panel has room for
]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """The C is held to these instructions."""
    if LEVELS[request.param] > nf4_cpu.LEVEL:
        pytest.skip(f"this CPU, or ATEN_CPU_CAPABILITY, has no {request.param}")
    monkeypatch.setattr(nf4_cpu, "LEVEL", LEVELS[request.param])


@pytest.fixture
def native(monkeypatch):
    """CPU tensors take the way of a user's process, not the interpreter."""
    monkeypatch.delenv("HANDTUNED_BACKEND")
    monkeypatch.setattr(runtime, "INTERPRETED", False)


@pytest.fixture
def products(native, monkeypatch):
    """Which products ran in C: True for one with Wᵀ, False for one with W."""
    ran, product = [], nf4_matmul.nf4_product_native
    monkeypatch.setattr(nf4_matmul, "nf4_product_native", lambda *args: ran.append(args[3]) or product(*args))
    return ran


def check_product(product, M, N, K, r, block_size, transposed, dtype):
    """Against fp64, from W as `nf4_dequantize` gives it in x's dtype."""
    q = quantize_nf4(torch.randn(N, K), block_size, double_quant=block_size != 128)
    W, x = nf4_dequantize_reference(q, dtype), torch.randn(M, K if transposed else N).to(dtype)
    bias, S = torch.randn(N if transposed else K).to(dtype), torch.randn(r, M).t().to(dtype)
    low = torch.randn((N, r) if transposed else (r, K)).to(dtype)
    weight, L = (W.t(), low.t()) if transposed else (W, low)
    y = product(x, q, transposed, bias, S, low, 0.5)
    inputs, terms = (x, weight, bias, S, L), x.shape[1] + r + 1
    assert_computes(y, lambda x, W, b, S, L: x @ W + b + 0.5 * S @ L, inputs, terms, "y", torch.float32)


def _native(x, q, *rest):
    return nf4_product_native(x, q, NF4_CODE, *rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [True, False], ids=["x Wᵀ", "x W"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(level, shape, transposed, dtype):
    check_product(_native, *shape, transposed, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("transposed", [True, False], ids=["x Wᵀ", "x W"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 600, 63, 2, 64), (2, 1100, 48, 0, 4096), (0, 5, 64, 1, 64)], ids=str)
def test_in_torch_against_fp64(shape, transposed, dtype):
    """16-bit rows without a compiler."""
    if shape[2] * shape[1] % 2 == 0:
        check_product(nf4_matmul.nf4_product_tiled, *shape, transposed, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("M", [1, 9])
@pytest.mark.parametrize("N", [1, 17, 47, 64, 100])
def test_nothing_is_written_beside_y(level, monkeypatch, N, M, dtype):
    q, x = quantize_nf4(torch.randn(N, 64)), torch.randn(M, 64).to(dtype)
    expected, memory = _native(x, q, True), []

    def between_canaries(x, *shape):
        count = torch.Size(shape).numel()
        memory.append(torch.full((count + 200,), 123.0, dtype=x.dtype))
        return memory[-1][100 : count + 100].view(shape)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", between_canaries)
        y = _native(x, q, True)
    assert torch.equal(y, expected)
    (block,) = memory
    assert (block[:100] == 123).all() and (block[-100:] == 123).all()


def test_y_lies_in_memory_whatever_the_default_device(level):
    q, x = quantize_nf4(torch.randn(40, 64)), torch.randn(5, 64)
    expected = _native(x, q, True)
    with torch.device("meta"):
        y = _native(x, q, True)
    assert y.is_cpu and torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [True, False], ids=["x Wᵀ", "x W"])
def test_bits_depend_on_neither_threads_nor_other_rows(level, transposed, dtype):
    q, x = quantize_nf4(torch.randn(192, 4224)), torch.randn(37, 4224).to(dtype)
    x = x if transposed else x[:, :192]
    S, low = torch.randn(37, 3).to(dtype), torch.randn(192, 3) if transposed else torch.randn(3, 4224)
    y, threads = _native(x, q, transposed, None, S, low), torch.get_num_threads()
    try:
        for count in (1, 3, 16):
            torch.set_num_threads(count)
            assert torch.equal(_native(x, q, transposed, None, S, low), y)
    finally:
        torch.set_num_threads(threads)
    for i, count in ((0, 1), (8, 1), (36, 1), (3, 2), (4, 3), (5, 4), (6, 7), (2, 16), (1, 17)):
        rows = slice(i, i + count)
        assert torch.equal(_native(x[rows], q, transposed, None, S[rows], low), y[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_contiguous(level, dtype):
    q, x = quantize_nf4(torch.randn(48, 64)), torch.randn(10, 128).to(dtype)
    square = torch.randn(64, 10).to(dtype)
    for strided in (x[:, :64], x[::2, 64:], x.t()[:64].t(), square.t(), square[:, 0].expand(10, 64), x[:0, :64]):
        assert torch.equal(_native(strided, q, True), _native(strided.contiguous(), q, True))
        given = strided[:, :48]
        assert torch.equal(_native(given, q, False), _native(given.contiguous(), q, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inf_and_nan_stay_in_their_rows(level, dtype):
    q, x = quantize_nf4(torch.randn(33, 64)), torch.randn(9, 64).to(dtype)
    clean = _native(x, q, True)
    x[2, 5], x[8, 0] = float("inf"), float("nan")
    y = _native(x, q, True)
    assert not y[2].isfinite().any() and y[8].isnan().all()
    kept = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(y[kept], clean[kept])


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF - (1 << 32), 0x7F800000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_that_are_not_finite_reach_their_columns(level, dtype, bits):
    q, x = quantize_nf4(torch.randn(33, 64), double_quant=False), torch.rand(2, 64).to(dtype)
    q.absmax.view(torch.int32)[7] = bits
    y = _native(x, q, True)
    assert not y[:, 7].isfinite().any()
    assert y[:, :7].isfinite().all() and y[:, 8:].isfinite().all()


def test_weights_of_zeros_and_rows_of_zeros(level):
    q = quantize_nf4(torch.zeros(5, 64))
    for dtype in DTYPES:
        assert (_native(torch.randn(3, 64).to(dtype), q, True) == 0).all()
        assert (_native(torch.zeros(3, 64, dtype=dtype), quantize_nf4(torch.randn(5, 64)), True) == 0).all()


def test_when_it_runs(native, monkeypatch):
    def way(q, dtype=torch.float32, M=3):
        return nf4_matmul.plan(torch.empty(M, q.shape[1], dtype=dtype), q)

    q = quantize_nf4(torch.randn(8, 64))
    for dtype in DTYPES:
        assert [way(q, dtype, M) for M in (0, 1, 17, 4096)] == ["native"] * 4
    assert way(q, torch.float64) == "exact"
    assert way(quantize_nf4(torch.randn(8, 48))) == "exact"
    assert way(quantize_nf4(torch.randn(8, 48)), torch.bfloat16) == "tiled"
    assert way(quantize_nf4(torch.randn(0, 64))) == "exact"
    monkeypatch.setattr(nf4_cpu, "LEVEL", nf4_cpu.PLAIN)
    assert [way(q, dtype) for dtype in DTYPES] == ["exact", "tiled", "tiled"]
    monkeypatch.undo()
    monkeypatch.setenv("HANDTUNED_BACKEND", "torch")
    assert way(q) == "exact"


@pytest.mark.parametrize(("held_to", "level"), [("default", "0"), ("avx2", "1"), ("", "2 or 3")])
def test_it_obeys_the_variable_that_torch_obeys(monkeypatch, held_to, level):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", held_to)
    code = "import torch; from handtuned.kernels import nf4_cpu; print(nf4_cpu.LEVEL)"
    printed = run_uninterpreted(code).split()[-1]
    assert printed in level or (held_to == "" and printed == "1")


@pytest.mark.parametrize("lies", ["where it lay", "elsewhere"])
@pytest.mark.parametrize("part", ["packed", "absmax", "nested"])
def test_too_few_codes_or_scales_are_refused_and_not_read(native, part, lies):
    def multiply():
        with torch.no_grad():
            return lora_linear(torch.randn(3, 64), q, None, torch.randn(2, 64), torch.randn(64, 2), 1.0)

    q = quantize_nf4(torch.randn(64, 64))
    multiply()
    whole = q.nested.absmax if part == "nested" else getattr(q, part)
    less = whole[:-1] if lies == "where it lay" else whole[:-1].clone()
    setattr(q, part, q.nested._replace(absmax=less) if part == "nested" else less)
    with pytest.raises(ValueError, match="needs"):
        multiply()


@pytest.mark.parametrize("elsewhere", ["bias", "lora_A", "lora_B"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("M", [1, 200])
def test_what_lies_on_another_device_is_refused_and_not_read(native, elsewhere, grad, M):
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(64, 40)), 4)
    owner = layer.base_layer if elsewhere == "bias" else layer
    setattr(owner, elsewhere, nn.Parameter(getattr(owner, elsewhere).to("meta")))
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError), match="meta"):
        layer(torch.randn(M, 64))
    if elsewhere == "bias":
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="on meta"):
            layer.base_layer(torch.randn(M, 64))


@pytest.mark.parametrize("fake", ["lora_A", "lora_B"])
def test_what_is_fake_is_refused_and_not_read(native, fake):
    given = {"lora_A": torch.randn(2, 64), "lora_B": torch.randn(40, 2)}
    given[fake] = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(given[fake])
    with torch.no_grad(), pytest.raises(ValueError, match="without memory"):
        lora_linear(torch.randn(1, 64), quantize_nf4(torch.randn(40, 64)), None, **given, scaling=1.0)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(33,), (2, 63), (2, 3, 65)], ids=str)
def test_rows_of_another_length_are_refused_and_not_read(native, shape, transposed):
    with pytest.raises(ValueError, match="x must be"):
        nf4_matmul.nf4_matmul(torch.randn(shape), quantize_nf4(torch.randn(32, 64)), None, transposed)


ROWS = {
    "one": lambda K: torch.randn(K),
    "a sequence of one token": lambda K: torch.randn(1, 1, K),
    "three of two": lambda K: torch.randn(3, 2, K),
    "five of one": lambda K: torch.randn(1, 5, K).transpose(0, 1),  # contiguous, with a stride that says nothing
    "the last of each": lambda K: torch.randn(3, 4, K)[:, -1],
    "columns of a wider one": lambda K: torch.randn(4, 2 * K)[:, K:],
    "none": lambda K: torch.randn(0, 2, K),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [1, 3, 4, 9, 64, 65])
@pytest.mark.parametrize("rows", ROWS)
def test_few_rows_of_a_lora_layer_in_one_call(native, level, monkeypatch, rows, r, dtype):
    N, K = 37, 96 if r % 2 else 128
    x, q, bias = ROWS[rows](K).to(dtype), quantize_nf4(torch.randn(N, K)), torch.randn(N).to(dtype)
    A, B = torch.randn(K, r).t().to(dtype), torch.randn(N, r).to(dtype)  # A does not lie as the C reads it
    calls, product = [], lora.nf4_product_native
    monkeypatch.setattr(lora, "nf4_product_native", lambda *given: calls.append(given) or product(*given))
    with torch.no_grad():
        y = lora_linear(x, q, bias, A, B, 0.5)
    assert len(calls) == (x.numel() // K * r <= 64)
    inputs = x, nf4_dequantize_reference(q, dtype), bias, A, B
    assert_computes(y, lambda x, W, b, A, B: x @ W.t() + b + 0.5 * (x @ A.t()) @ B.t(), inputs, 2 * K + r + 1, "y")


def test_a_row_of_a_lora_layer_has_its_bits_among_others(native, level):
    q, x = quantize_nf4(torch.randn(70, 192)), torch.randn(7, 192)
    A, B = torch.randn(9, 192), torch.randn(70, 9)
    with torch.no_grad():
        y = lora_linear(x, q, None, A, B, 0.5)
        for rows in (slice(0, 1), slice(3, 5), slice(4, 7)):
            assert torch.equal(lora_linear(x[rows], q, None, A, B, 0.5), y[rows])


@pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["kept", "dropout"])
def test_a_lora_layer_and_its_gradients(products, monkeypatch, dropout):
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(96, 70)), 5, lora_dropout=dropout)
    nn.init.normal_(layer.lora_B)
    x, dy = torch.randn(4, 11, 96), torch.randn(4, 11, 70)

    def run(module, x, dy):
        torch.manual_seed(1)
        x = x.clone().requires_grad_()
        y = module(x)
        return y.detach(), *torch.autograd.grad(y, (x, module.lora_A, module.lora_B), dy)

    ours = run(layer, x, dy)
    assert products == [True, False]
    monkeypatch.setenv("HANDTUNED_BACKEND", "torch")
    low = run(layer, x, dy)
    layer.base_layer, wide = layer.base_layer.dequantize(), torch.float64
    exact = run(layer.to(wide), x.to(wide), dy.to(wide))
    for parameter in layer.parameters():
        parameter.data.abs_()
    magnitudes = run(layer, x.abs().to(wide), dy.abs().to(wide))
    terms = {"y": 2 * 96 + 5 + 1, "dx": 2 * 70 + 5, "dA": 70 + 44, "dB": 96 + 44}
    for (what, length), got, *budget in zip(terms.items(), ours, exact, low, magnitudes, strict=True):
        want, rival, magnitude = budget
        assert_within_budget(got, want, rival, length, magnitude, what)


def test_the_plain_layer(native):
    layer = NF4Linear.from_linear(nn.Linear(64, 40))
    x, dy = torch.randn(2, 3, 64, requires_grad=True), torch.randn(2, 3, 40)
    y = layer(x)
    y.backward(dy)
    W = layer.dequantize().weight
    assert_computes(y.detach(), nn.functional.linear, (x, W, layer.bias), 64 + 1, "y")
    assert_computes(x.grad, torch.matmul, (dy, W), 40, "dx")
    rows = nf4_product_native(x.detach().view(6, 64), layer.quantized, NF4_CODE, True, layer.bias)
    assert torch.equal(y, rows.view(y.shape))
