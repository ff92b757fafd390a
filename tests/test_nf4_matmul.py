"""LoRA on an NF4 weight: the fused and merging kernels, the choice between them, and gradients."""

import pytest
import torch
import torch.nn.functional as F
from handtuned.kernels import lora
from handtuned.kernels.lora import lora_linear, lora_linear_reference
from handtuned.kernels.nf4_matmul import (
    dense_weight,
    nf4_fused,
    nf4_matmul,
    nf4_matmul_reference,
    nf4_merge,
    plan,
    quantized_product,
    quantized_product_dx,
)
from handtuned.kernels.runtime import runs_product
from helpers import assert_computes, assert_same_function, assert_within_budget
from lora_layers import each_dtype, layer, quantized


@each_dtype
@pytest.mark.parametrize(
    ("M", "N", "K", "r", "block_size"), [(17, 33, 64, 1, 64), (65, 70, 192, 17, 128), (130, 200, 128, 0, 64)],
    ids=["M17", "M65", "M130"],
)  # fmt: skip
def test_decoding_beside_the_tensor_cores(kernel_backend, device, M, N, K, r, block_size, dtype):
    """y and dx from tiles of W that are never written to memory."""
    q = quantized(N, K, block_size, True, device)
    x, dy, S, dS, b = (torch.randn(size, device=device).to(dtype) for size in ((M, K), (M, N), (M, r), (M, r), (N,)))
    if not runs_product(x):
        pytest.skip("no tensor cores for this dtype here: the vendor's library does it")
    A, B = torch.randn(r, K, device=device), torch.randn(N, r, device=device)
    W = q.dequantize(torch.float32)
    assert_computes(nf4_fused(x, q, b, S, B, 0.5), layer, (x, W, S, B, b), K + r + 1, "y")
    dx = nf4_fused(dy, q, None, dS, A.t(), 1.0, transposed=False)
    assert_computes(dx, lambda dy, W, dS, A: dy @ W + dS @ A, (dy, W, dS, A), N + r, "dx")


@each_dtype
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
def test_merging_while_dequantizing(kernel_backend, device, dtype, double_quant):
    """One rounding of W + s·BA: at least as close as dequantizing, rounding, and adding."""
    q = quantized(70, 192, 64, double_quant, device)
    A, B = torch.randn(5, 192, device=device) * 0.1, torch.randn(70, 5, device=device) * 0.1
    merged = nf4_merge(q, A, B, 0.5, dtype)
    assert_computes(merged, lambda W, A, B: W + 0.5 * (B @ A), (q.dequantize(torch.float32), A, B), 5 + 1, "W'")


def test_the_plan_by_shape(kernel_backend, device):
    q, ragged = quantized(8, 128), quantized(8, 96)
    small_blocks = quantized(8, 128, block_size=32)

    def rows(M, K=128):
        return torch.empty(M, K, device=device, dtype=torch.float16)

    ways = [plan(rows(M).half(), q, dropout=False) for M in (1, 16, 17, 256, 257, 1023, 1024)]
    tensor_cores = runs_product(rows(1).half())
    wanted = ["stream", "stream", "fused", "fused", "exact", "exact", "merged"]
    assert ways == (wanted if tensor_cores else ["stream"] + 6 * ["exact"])
    assert plan(rows(2048), q, True) == "exact"  # a merge has no place for a dropout mask
    assert plan(rows(1, 96), ragged, False) == "exact"
    assert plan(rows(1), small_blocks, False) == "exact"
    assert plan(rows(1).double(), q, False) == "exact"


@each_dtype
@pytest.mark.parametrize("transposed", [True, False], ids=["x Wᵀ", "x W"])
@pytest.mark.parametrize("M", [1, 16, 33])
def test_the_product_without_an_adapter(each_backend, device, M, transposed, dtype):
    q = quantized(600, 128, device=device)
    x, b = (torch.randn(size, device=device).to(dtype) for size in ((M, 128 if transposed else 600), 600))
    W = q.dequantize(torch.float32).double()
    exact = x.double() @ W.t() + b.double() if transposed else x.double() @ W
    sizes = x.double().abs() @ W.abs().t() + b.double().abs() if transposed else x.double().abs() @ W.abs()
    b = b if transposed else None
    low = nf4_matmul_reference(x, q, b, transposed)
    assert_within_budget(nf4_matmul(x, q, b, transposed), exact, low, x.shape[1] + 1, sizes, "y")


def test_the_plan_in_torch():
    assert [plan(torch.empty(M, 128), quantized(8, 128), False) for M in (1, 2048)] == ["exact", "exact"]


@pytest.mark.parametrize("way", ["stream", "fused", "merged", "exact"])
def test_every_way_gives_the_same(kernel_backend, device, way):
    M, N, K, r = 7, 40, 128, 3
    if way == "fused" and not runs_product(torch.empty(M, K, device=device)):
        pytest.skip("fp32 products on a GPU are the vendor's library's")
    q = quantized(N, K, device=device)
    x, dy, b = (torch.randn(size, device=device) for size in ((M, K), (M, N), (N,)))
    A, B = torch.randn(r, K, device=device), torch.randn(N, r, device=device)
    S, dS = x @ A.t(), 0.5 * dy @ B
    W = q.dequantize(torch.float32)
    y = quantized_product(way, x, q, b, S, A, B, 0.5)
    merged = lambda x, W, b, A, B: F.linear(x, W, b) + 0.5 * (x @ A.t()) @ B.t()  # noqa: E731
    assert_computes(y, merged, (x, W, b, A, B), 2 * K + r + 1, "y")
    dx = quantized_product_dx(way, dy, q, dS, A, B, 0.5)
    assert_computes(dx, lambda dy, W, A, B: dy @ W + 0.5 * (dy @ B) @ A, (dy, W, A, B), 2 * N + r, "dx")


@each_dtype
@pytest.mark.parametrize("M", [1, 3, 40])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no-dropout", "dropout"])
def test_gradients_through_a_quantized_weight(each_backend, device, dtype, M, p):
    """Against the same layer on the dequantized weight; the same seed gives the same mask."""
    q = quantized(24, 64, device=device)
    W = q.dequantize(torch.float32)
    x, dy, b = (torch.randn(size, device=device).to(dtype) for size in ((M, 64), (M, 24), (24,)))
    A, B = torch.randn(3, 64, device=device), torch.randn(24, 3, device=device)

    def run(weight, kind, sign=torch.clone):
        leaves = [sign(t.detach().to(kind)).requires_grad_() for t in (x, A, B)]
        if kind != torch.double:
            leaves[1:] = [sign(t.detach()).requires_grad_() for t in (A, B)]
        torch.manual_seed(7)
        y = lora_linear(leaves[0], weight, sign(b.to(kind)), *leaves[1:], 0.5, p)
        y.backward(sign(dy.to(kind)))
        return y.detach(), *(leaf.grad for leaf in leaves)

    wide = torch.double if not p or each_backend == "torch" else torch.float32  # the kernels' mask is theirs alone
    exact, low, magnitudes = run(W.to(wide), wide), run(W.to(dtype), dtype), run(W.abs().to(wide), wide, torch.abs)
    terms = {"y": 2 * 64 + 3 + 1, "dx": 2 * 24 + 3, "dA": 24 + M, "dB": 64 + M}
    for (name, length), got, *budget in zip(terms.items(), run(q, dtype), exact, low, magnitudes, strict=True):
        want, rival, magnitude = budget
        assert_within_budget(got.to(dtype), want, rival.to(dtype), length, magnitude, name)


def test_nothing_dense_is_kept_between_forward_and_backward():
    q = quantized(64, 128)
    x = torch.randn(8, 128, requires_grad=True)
    A, B = torch.randn(2, 128, requires_grad=True), torch.randn(64, 2, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x, q, None, A, B, 1.0)
    own = [t for t in saved if t.data_ptr() not in (A.data_ptr(), B.data_ptr())]
    assert sorted(tuple(t.shape) for t in own) == [(8, 2), (8, 128)]
    y.sum().backward()


def test_the_scratch_is_reused_and_never_escapes():
    """Two layers of different sizes share one block, and results live on after it is overwritten."""
    small, large = quantized(8, 64), quantized(16, 64)
    x = torch.randn(5, 64).double()
    assert dense_weight(large, x).data_ptr() == dense_weight(small, x).data_ptr()
    A, Bs, Bl = (torch.randn(size).double() for size in ((2, 64), (8, 2), (16, 2)))
    first = lora_linear(x, small, None, A, Bs, 1.0)
    kept = first.clone()
    lora_linear(x, large, None, A, Bl, 1.0)
    assert torch.equal(first, kept)
    assert_same_function(first, lora_linear_reference(x, small.dequantize().double(), None, A, Bs, 1.0))


def test_small_updates_survive_a_merge_into_bf16(kernel_backend, device, monkeypatch):
    """ΔW lies 100 times below bf16's step at W. Gradients are exact all the same, so training converges alike."""
    torch.manual_seed(0)
    N, K, r, M = 32, 64, 2, 64
    q = quantized(N, K, device=device)
    x = torch.randn(M, K, device=device).bfloat16()
    target = (torch.randn(N, r, device=device) @ torch.randn(r, K, device=device)) * 0.02
    goal = F.linear(x.float(), q.dequantize(torch.float32) + target)

    def loss_after(way, steps=30):
        monkeypatch.setattr(lora, "plan", lambda *_: way)
        torch.manual_seed(1)
        A = (torch.randn(r, K, device=device) * 0.1).requires_grad_()
        B = torch.full((N, r), 1e-6, device=device).requires_grad_()
        optimizer = torch.optim.Adam([A, B], lr=0.02)
        losses = []
        for _ in range(steps):
            loss = (lora_linear(x, q, None, A, B, 1.0).float() - goal).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    exact, merged = loss_after("exact"), loss_after("merged")
    assert merged[-1] < 0.2 * merged[0]
    assert merged[-1] < 1.1 * exact[-1] + 1e-5
