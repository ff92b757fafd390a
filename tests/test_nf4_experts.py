"""Experts in NF4: the grouped product against a loop over dense experts, by every way, and its gradients."""

import pytest
import torch
from handtuned.kernels import nf4_cpu
from handtuned.kernels.nf4 import flatten
from handtuned.kernels.nf4_experts import expert_of, nf4_experts_reference
from handtuned.kernels.nf4_matmul import EXPERTS_WAYS, nf4_experts_grouped
from handtuned.kernels.runtime import runs_product
from handtuned.quant import NF4Experts, quantize_nf4
from handtuned.quant.linear import NF4Product
from helpers import assert_computes, run_uninterpreted
from lora_layers import each_dtype

COUNTS = [[3, 0, 64, 1], [0, 0, 5, 0], [17, 65, 63, 130]]  # rows of four experts


def experts(E, N, K, block_size=64, double_quant=True, device="cpu"):
    weight = torch.randn(E, N, K, device=device) * 0.05 * torch.arange(1, E + 1, device=device)[:, None, None]
    return NF4Experts.from_weight(weight, False, block_size, double_quant)


def nf4_experts(x, ends, weight, transposed=True):
    return NF4Product.apply(x, *flatten(weight), None, transposed, ends)


def ends_of(counts, device="cpu"):
    return torch.tensor(counts, device=device).cumsum(0).int()


def dense(ends, transposed):
    """The product of sorted rows with dense experts (E, N, K), as a formula."""

    def formula(x, W):
        rows = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
        return torch.cat([h @ (w.t() if transposed else w) for h, w in zip(rows, W, strict=True)])

    return formula


@each_dtype
@pytest.mark.parametrize("transposed", [True, False], ids=["x Wᵀ", "x W"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_row_meets_its_expert(each_backend, device, counts, transposed, dtype):
    """y and dx, the fused layouts (out, in) and (in, out)."""
    N, K, ends = 72, 128, ends_of(counts, device)
    q = experts(4, N, K, device=device)
    x = torch.randn(sum(counts), K if transposed else N, device=device).to(dtype).requires_grad_()
    dy = torch.randn(sum(counts), N if transposed else K, device=device).to(dtype)
    y = nf4_experts(x, ends, q.quantized, transposed)
    W = q.dequantize(torch.float32)
    assert_computes(y.detach(), dense(ends, transposed), (x, W), x.shape[1], "y")
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_computes(dx, dense(ends, not transposed), (dy, W), dy.shape[1], "dx")


@pytest.mark.parametrize("way", EXPERTS_WAYS)
@pytest.mark.parametrize(("block_size", "double_quant"), [(128, True), (64, False), (2048, True)],
                         ids=["128", "single", "last block cut short"])  # fmt: skip
def test_every_way_gives_the_same(kernel_backend, device, way, block_size, double_quant):
    q, ends = experts(3, 40, 128, block_size, double_quant, device), ends_of([2, 0, 19], device)
    x = torch.randn(21, 128, device=device, dtype=torch.float16)
    if way == "grouped" and not runs_product(x):
        pytest.skip("no tensor cores for this dtype here")
    y = EXPERTS_WAYS[way](x, q.quantized, True, ends)
    assert_computes(y, dense(ends, True), (x, q.dequantize(torch.float32)), 128)


def test_sizes_that_fill_no_tile(each_backend, device):
    """Rows of 96 values: a block of 64 crosses them, and the way is that of single experts."""
    weight = torch.randn(2, 50, 96, device=device)
    q, ends = NF4Experts.from_weight(weight), ends_of([1, 4], device)
    x = torch.randn(5, 96, device=device)
    assert_computes(nf4_experts(x, ends, q.quantized), dense(ends, True), (x, q.dequantize()), 96)
    none = nf4_experts(x[:0], ends_of([0, 0], device), q.quantized)
    assert none.shape == (0, 50)


def test_rows_that_are_not_contiguous_and_what_is_not_finite(kernel_backend, device):
    """A NaN stays in its row, and an infinite row gives what the dense product gives."""
    q, ends = experts(2, 64, 64, device=device), ends_of([3, 2], device)
    x = torch.randn(5, 128, device=device, dtype=torch.float16)[:, ::2]
    clean = nf4_experts(x, ends, q.quantized)
    assert torch.equal(clean, nf4_experts(x.contiguous(), ends, q.quantized))
    spoilt = x.clone()
    spoilt[1, 5] = float("nan")
    y = nf4_experts(spoilt, ends, q.quantized)
    assert y[1].isnan().all() and torch.equal(y[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])


def test_the_reference_is_a_loop_over_experts():
    q, ends = experts(3, 8, 64), ends_of([2, 0, 3])
    x, W = torch.randn(5, 64), q.dequantize()
    wanted = torch.cat([x[:2] @ W[0].t(), x[2:] @ W[2].t()])
    assert torch.equal(nf4_experts_reference(x, q.quantized, True, ends), wanted)


@pytest.mark.parametrize("shape", [(3, 24, 64), (3, 5, 7), (2, 33, 40)], ids=str)
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
def test_no_block_reaches_into_the_next_expert(shape, double_quant):
    """Each expert has the codes and scales that it would have alone, also where it fills no whole block."""
    weight = torch.randn(shape) * torch.tensor([1.0, 1e-3, 30.0])[: shape[0], None, None]
    q = NF4Experts.from_weight(weight, double_quant=double_quant)
    for e, W in enumerate(weight):
        alone, ours = quantize_nf4(W, 64, double_quant), expert_of(q.quantized, e)
        assert torch.equal(ours.packed, alone.packed) and torch.equal(ours.absmax, alone.absmax)
    assert torch.equal(q.dequantize(), torch.stack([quantize_nf4(W, 64, double_quant).dequantize() for W in weight]))


ON_A_CPU = """
import torch
from handtuned.kernels import nf4_matmul
from handtuned.quant import NF4Experts
calls, product = [], nf4_matmul.nf4_product_native
nf4_matmul.nf4_product_native = lambda x, *rest: calls.append(len(x)) or product(x, *rest)
torch.manual_seed(0)
q = NF4Experts.from_weight(torch.randn(4, 40, 64))
x, ends = torch.randn(9, 64, requires_grad=True), torch.tensor([2, 2, 6, 9])
y = q(x, ends)
(dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
W = q.dequantize().double()[[0, 0, 2, 2, 2, 2, 3, 3, 3]]
exact = (W @ x.detach().double()[:, :, None])[:, :, 0], W.sum(1)
print(calls, max((one - two).abs().max().item() for one, two in zip((y, dx), exact)))
"""


@pytest.mark.skipif(nf4_cpu.LEVEL == nf4_cpu.PLAIN, reason="no compiled product on this CPU")
def test_a_cpu_runs_the_compiled_product_for_each_expert_with_rows():
    calls, error = run_uninterpreted(ON_A_CPU).rsplit(" ", 1)
    assert calls == "[2, 4, 3, 2, 4, 3]" and float(error) < 1e-4


def test_gradients_of_gradients():
    """The product is linear in x, so its second derivative is the product again."""
    q, ends = experts(3, 16, 64), ends_of([2, 1, 2])
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nf4_experts(x, ends, q.quantized), x)
    assert torch.autograd.gradgradcheck(lambda x: nf4_experts(x, ends, q.quantized) ** 2, x)


def test_a_compiled_model_sees_one_operation():
    q, ends = experts(3, 16, 64), ends_of([2, 1, 2])
    x = torch.randn(5, 64)
    compiled = torch.compile(lambda x: nf4_experts(x, ends, q.quantized), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), nf4_experts(x, ends, q.quantized))


def test_nothing_dense_is_kept_between_forward_and_backward():
    q, ends = experts(4, 64, 128), ends_of([8, 8, 8, 8])
    x, saved = torch.randn(32, 128, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = nf4_experts(x, ends, q.quantized)
    assert sum(t.nbytes for t in saved) < 0.6 * q.shape.numel()
    y.sum().backward()


def test_the_tile_of_rows_follows_the_rows_per_expert(kernel_backend, device):
    """From one row to many per expert every tile is used, and each finds its rows."""
    q = experts(2, 64, 64, device=device)
    x = torch.randn(300, 64, device=device, dtype=torch.float16)
    if not runs_product(x):
        pytest.skip("no tensor cores here")
    for counts in ([9, 1], [40, 30], [297, 3]):
        ends = ends_of(counts, device)
        part = x[: sum(counts)]
        y = nf4_experts_grouped(part, q.quantized, True, ends)
        assert_computes(y, dense(ends, True), (part, q.dequantize(torch.float32)), 64, str(counts))
