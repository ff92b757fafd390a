"""The compiled CPU product with an NF4 weight: its values, its reach in memory, its independence, and when it runs."""

import ctypes

import pytest
import torch
from handtuned.kernels import nf4_cpu, nf4_matmul, runtime
from handtuned.kernels.lora import lora_linear
from handtuned.kernels.nf4 import NF4_CODE
from handtuned.kernels.nf4_cpu import nf4_product_native
from handtuned.nn import LoRALinear
from handtuned.quant import NF4Linear, quantize_nf4
from helpers import assert_computes, assert_within_budget
from torch import nn

pytestmark = pytest.mark.skipif(
    not nf4_cpu.HAS_PRODUCT, reason="built only where there is a C compiler, and for AVX-512"
)


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


@pytest.mark.parametrize("transposed", [True, False], ids=["x Wᵀ", "x W"])
@pytest.mark.parametrize(
    ("M", "N", "K", "r", "block_size"),
    [
        (1, 1, 32, 0, 32),
        (7, 15, 64, 1, 64),
        (8, 16, 96, 8, 64),  # blocks cross rows
        (9, 17, 64, 3, 4096),  # one block for many rows
        (65, 49, 544, 64, 64),  # sums longer than a panel
        (513, 70, 160, 65, 128),  # more rows than a batch, more terms of the adapter than a panel holds
        (40, 1100, 32, 300, 64),
        (3, 20, 1536, 2, 512),  # blocks as long as a panel
        (3, 20, 2048, 2, 1024),  # and longer
    ],
    ids=str,
)
def test_against_fp64(M, N, K, r, block_size, transposed):
    q = quantize_nf4(torch.randn(N, K), block_size, double_quant=block_size != 128)
    W, x, bias = q.dequantize(), torch.randn(M, K if transposed else N), torch.randn(N if transposed else K)
    S, low = torch.randn(r, M).t(), torch.randn(N, r) if transposed else torch.randn(r, K)

    weight, L = (W.t(), low.t()) if transposed else (W, low)
    y = nf4_product_native(x, q, NF4_CODE, transposed, bias, S, low, 0.5)
    inputs, terms = (x, weight, bias, S, L), x.shape[1] + r + 1
    assert_computes(y, lambda x, W, b, S, L: x @ W + b + 0.5 * S @ L, inputs, terms, "y")


@pytest.mark.parametrize("N", [1, 17, 47, 48, 100])
def test_nothing_is_written_beside_y(N):
    M, K = 9, 64
    q, x = quantize_nf4(torch.randn(N, K)), torch.randn(M, K)
    memory = torch.full((M * N + 200,), 123.25)
    w = nf4_cpu._weight(q, NF4_CODE)
    nf4_cpu._library.handtuned_nf4_product(
        ctypes.byref(w), N, K, True, x.data_ptr(), K, M, None, None, None, 0, 0, 0, 1.0, memory[100:].data_ptr(), 2
    )
    assert torch.equal(memory[100 : 100 + M * N].view(M, N), nf4_product_native(x, q, NF4_CODE, True))
    assert (memory[:100] == 123.25).all() and (memory[100 + M * N :] == 123.25).all()


def test_bits_depend_on_neither_threads_nor_other_rows():
    q, x = quantize_nf4(torch.randn(200, 576)), torch.randn(37, 576)
    y, threads = nf4_product_native(x, q, NF4_CODE, True), torch.get_num_threads()
    try:
        for count in (1, 3, 16):
            torch.set_num_threads(count)
            assert torch.equal(nf4_product_native(x, q, NF4_CODE, True), y)
    finally:
        torch.set_num_threads(threads)
    for i in (0, 8, 36):
        assert torch.equal(nf4_product_native(x[i : i + 1], q, NF4_CODE, True), y[i : i + 1])


def test_rows_that_are_not_contiguous():
    q, x = quantize_nf4(torch.randn(48, 64)), torch.randn(10, 128)
    for strided in (x[:, :64], x[::2, 64:], x.t()[:64].t(), torch.randn(64, 10).t(), torch.randn(64).expand(10, 64)):
        given = nf4_product_native(strided, q, NF4_CODE, True)
        assert torch.equal(given, nf4_product_native(strided.contiguous(), q, NF4_CODE, True))


def test_inf_and_nan_stay_in_their_rows():
    q, x = quantize_nf4(torch.randn(33, 64)), torch.randn(9, 64)
    clean = nf4_product_native(x, q, NF4_CODE, True)
    x[2, 5], x[8, 0] = float("inf"), float("nan")
    y = nf4_product_native(x, q, NF4_CODE, True)
    assert not y[2].isfinite().any() and y[8].isnan().all()
    kept = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(y[kept], clean[kept])


def test_when_it_runs(native, monkeypatch):
    def way(q, dtype=torch.float32, M=3):
        return nf4_matmul.plan(torch.empty(M, q.shape[1], dtype=dtype), q)

    q = quantize_nf4(torch.randn(8, 64))
    assert [way(q, M=M) for M in (0, 1, 17, 4096)] == ["native"] * 4
    assert way(q, torch.bfloat16) == way(q, torch.float64) == "exact"
    assert way(quantize_nf4(torch.randn(8, 48))) == "exact"
    assert way(quantize_nf4(torch.randn(0, 64))) == "exact"
    monkeypatch.setenv("HANDTUNED_BACKEND", "torch")
    assert way(q) == "exact"


@pytest.mark.parametrize("part", ["packed", "absmax"])
def test_too_few_codes_or_scales_are_refused_and_not_read(native, part):
    q = quantize_nf4(torch.randn(64, 64))
    setattr(q, part, getattr(q, part)[:-1])
    with pytest.raises(ValueError, match="needs"):
        lora_linear(torch.randn(3, 64), q, None, torch.randn(2, 64), torch.randn(64, 2), 1.0)


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
