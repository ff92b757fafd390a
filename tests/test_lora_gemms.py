"""The LoRA kernels against fp64: each primitive, then the whole Function; references and kernels alike."""

import pytest
import torch
from handtuned.kernels import dropout
from handtuned.kernels.lora import lora_linear, lora_linear_reference
from handtuned.kernels.lora_gemms import lora_down, lora_down_grad, lora_up_grads
from handtuned.kernels.matmul import lora_product
from helpers import assert_computes, assert_same_function, assert_within_budget
from lora_layers import each_dtype, layer, operands

# M, N, K, r: ones, tails on every side of a tile, ranks that are not a power of two, several tiles and splits
SHAPES = [(1, 1, 1, 1), (3, 65, 64, 5), (70, 130, 67, 3), (65, 63, 129, 17)]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "M{}-N{}-K{}-r{}".format(*shape))


def product(a, b):
    return a @ b


@each_dtype
@each_shape
def test_each_product_is_within_the_budget(each_backend, device, shape, dtype):
    M, N, K, r = shape
    x, W, b, A, B, dy = operands(shape, dtype, device)
    S = lora_down(x, A)
    assert_computes(S, product, (x, A.t()), K, "S")
    assert_computes(lora_product(x, W, b, S, B, 0.5), layer, (x, W, S, B, b), K + r + 1, "y")
    dS, dB = lora_up_grads(dy, S, B, 0.5)
    assert_computes(dS, lambda dy, B: 0.5 * (dy @ B), (dy, B), N, "dS")
    assert_computes(dB.to(dtype), lambda dy, S: 0.5 * (dy.t() @ S), (dy, S), M, "dB")
    assert_computes(lora_down_grad(dS, x, dtype), product, (dS.t(), x), M, "dA")
    dx = lora_product(dy, W.t(), None, dS, A.t(), 1.0)
    assert_computes(dx, lambda dy, W, dS, A: dy @ W + dS @ A, (dy, W, dS, A), N + r, "dx")


@pytest.mark.parametrize("rank", [1, 8, 33, 100, 256])
def test_any_rank_up_to_256(kernel_backend, device, rank):
    M, N, K = 5, 20, 40
    x, W, b, A, B, dy = operands((M, N, K, rank), torch.float32, device)
    S = lora_down(x, A)
    assert_computes(S, product, (x, A.t()), K, "S")
    assert_computes(lora_product(x, W, b, S, B, 0.5), layer, (x, W, S, B, b), K + rank + 1, "y")
    dS, dB = lora_up_grads(dy, S, B, 1.0)
    assert_computes(dS, product, (dy, B), N, "dS")
    assert_computes(dB, product, (dy.t(), S), M, "dB")
    assert_computes(lora_down_grad(dS, x, x.dtype), product, (dS.t(), x), M, "dA")


def test_long_sums_that_are_split_between_programs(kernel_backend, device):
    """K of the first, N and M of the second, M of the third: more than one split, with a ragged last one."""
    x, _, _, A, B, dy = operands((1, 1, 3000, 4), torch.float16, device)
    assert_computes(lora_down(x, A), product, (x, A.t()), 3000, "S")
    x, _, _, A, B, dy = operands((300, 200, 20, 4), torch.float32, device)
    S = x @ A.t()
    dS, dB = lora_up_grads(dy, S, B, 1.0)
    assert_computes(dS, product, (dy, B), 200, "dS")
    assert_computes(dB, product, (dy.t(), S), 300, "dB")
    x = torch.randn(700, 20, device=device)
    dS = torch.randn(700, 4, device=device)
    assert_computes(lora_down_grad(dS, x, x.dtype), product, (dS.t(), x), 700, "dA")


def test_strides_other_than_contiguous(kernel_backend, device):
    _, W, b, A, B, _ = operands((9, 12, 20, 3), torch.float32, device)
    wide = torch.randn(9, 40, device=device)
    x_view, W_view, b = wide[:, ::2], W.t().contiguous().t(), b[:1].expand(12).contiguous()
    S = lora_down(x_view, A.t().contiguous().t())
    assert_computes(S, product, (x_view, A.t()), 20, "S")
    y = lora_product(x_view, W_view, b, S, B.t().contiguous().t(), 0.5)
    assert_computes(y, layer, (x_view, W, S, B, b), 20 + 3 + 1, "y")
    broadcast = torch.ones((), device=device).expand(9, 12)
    dS, dB = lora_up_grads(broadcast, S, B, 1.0)
    assert_computes(dS, product, (broadcast, B), 12, "dS")
    assert_computes(dB, product, (broadcast.t(), S), 9, "dB")


def gradients(function, dy, *leaves):
    y = function()
    for leaf in leaves:
        leaf.grad = None
    y.backward(dy)
    return y.detach(), *[leaf.grad for leaf in leaves]


@each_dtype
@pytest.mark.parametrize("p", [0.0, 0.4], ids=["no-dropout", "dropout"])
def test_the_function_and_all_its_gradients(each_backend, device, dtype, p):
    """Against the reference in fp64 and in `dtype`, both with the mask that the Function must have drawn."""
    shape = (2, 33, 70, 50, 5)
    M, N, K, r = 66, *shape[2:]
    x, W, b, A, B, dy = operands((M, N, K, r), dtype, device)
    x, dy = x.view(2, 33, K), dy.view(2, 33, N)
    leaves = [t.requires_grad_() for t in (x, W, b, A, B)]
    keep, threshold = None, dropout.threshold_of(p)
    if p:
        torch.manual_seed(1)
        seed = dropout.new_seed(x.device)
        draw = dropout.dropout_mask if each_backend == "torch" else dropout.dropout_mask_reference
        keep = draw(seed, M, K, threshold).view(2, 33, K)
    torch.manual_seed(1)
    ours = gradients(lambda: lora_linear(x, W, b, A, B, 0.5, p), dy, *leaves)

    def reference(kind, sign=torch.clone):
        copies = [sign(t.detach().to(kind)).requires_grad_() for t in leaves]
        return gradients(
            lambda: lora_linear_reference(*copies, 0.5, keep, threshold / 65536), sign(dy.to(kind)), *copies
        )

    exact, low, magnitudes = reference(torch.double), reference(dtype), reference(torch.double, torch.abs)
    # The length of the longest chain of sums, through S or dS where there is one.
    terms = {"y": 2 * K + r + 1, "dx": 2 * N + r, "dW": M, "db": M, "dA": N + M, "dB": K + M}
    for (name, length), got, *budget in zip(terms.items(), ours, exact, low, magnitudes, strict=True):
        assert got.dtype == (torch.float32 if name in ("dA", "dB") else dtype), name
        want, rival, magnitude = budget
        assert_within_budget(got.to(dtype), want, rival, length, magnitude, name)


@pytest.mark.parametrize("wanted", ["A", "B", "x", "W", "b", "AB", "xAB"])
def test_only_the_gradients_asked_for(wanted):
    x, W, b, A, B, dy = (t.double() for t in operands((4, 6, 5, 2), torch.float32))
    tensors = {"x": x, "W": W, "b": b, "A": A, "B": B}
    for name in wanted:
        tensors[name].requires_grad_()
    lora_linear(x, W, b, A, B, 2.0).backward(dy)
    theirs = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    lora_linear_reference(*theirs.values(), 2.0).backward(dy)
    for name, tensor in tensors.items():
        if name in wanted:
            assert_same_function(tensor.grad, theirs[name].grad, name)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["no-dropout", "dropout"])
def test_gradcheck_in_fp64(p):
    x, W, b, A, B, _ = (t.double().requires_grad_() for t in operands((3, 4, 5, 2), torch.float32))

    def seeded(*tensors):
        torch.manual_seed(0)
        return lora_linear(*tensors, 0.7, p)

    assert torch.autograd.gradcheck(seeded, (x, W, b, A, B))


def test_the_same_bits_every_time(each_backend, device):
    x, W, b, A, B, dy = operands((130, 70, 90, 6), torch.float16, device)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    first, second = (gradients(lambda: lora_linear(x, W, b, A, B, 1.0), dy, *leaves) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_only_x_and_S_are_saved():
    x, W, b, A, B, _ = operands((64, 48, 32, 4), torch.float32)
    A.requires_grad_()
    B.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, W, b, A, B, 1.0)
    inputs = {t.data_ptr() for t in (W, A, B)}
    own = [t for t in saved if t.data_ptr() not in inputs]
    assert sorted(tuple(t.shape) for t in own) == [(64, 4), (64, 32)]
    assert {t.data_ptr() for t in own} >= {x.data_ptr()}
    assert sum(t.numel() * t.element_size() for t in own) == 4 * 64 * (32 + 4)


def test_not_finite_values_pass_through(each_backend, device):
    x, W, b, A, B, _ = operands((3, 4, 5, 2), torch.float32, device)
    x[0, 0] = float("inf")
    x[1, 1] = float("nan")
    y = lora_linear(x, W, b, A, B, 1.0)
    assert not torch.isfinite(y[0]).any() and y[1].isnan().all() and torch.isfinite(y[2]).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_empty_batches(each_backend, device, shape):
    x = torch.empty(shape, device=device).requires_grad_()
    A, B = torch.randn(2, 5, device=device).requires_grad_(), torch.randn(4, 2, device=device).requires_grad_()
    y = lora_linear(x, torch.randn(4, 5, device=device), None, A, B, 1.0)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 4) and x.grad.shape == shape
    assert not A.grad.any() and not B.grad.any() and A.grad.shape == A.shape and B.grad.shape == B.shape


def test_a_single_row_vector():
    x, W, b, A, B, _ = (t.double() for t in operands((1, 4, 5, 2), torch.float32))
    y = lora_linear(x[0], W, b, A, B, 1.0)
    assert y.shape == (4,)
    assert_same_function(y, lora_linear_reference(x[0], W, b, A, B, 1.0))


def test_wrong_arguments_are_named():
    x, W, b, A, B, _ = operands((3, 4, 5, 2), torch.float32)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 5\)"):
        lora_linear(x[:, :4], W, b, A, B, 1.0)
    with pytest.raises(ValueError, match="lora_A must be"):
        lora_linear(x, W, b, A.t(), B, 1.0)
    with pytest.raises(ValueError, match="lora_B"):
        lora_linear(x, W, b, A, B[:2], 1.0)
    with pytest.raises(ValueError, match="bias"):
        lora_linear(x, W, b[:2], A, B, 1.0)
    with pytest.raises(ValueError, match="dropout_p"):
        lora_linear(x, W, b, A, B, 1.0, 1.0)
    with pytest.raises(TypeError, match="floating"):
        lora_linear(x.long(), W, b, A, B, 1.0)


def test_kernels_neither_read_nor_write_out_of_bounds(kernel_backend, device):
    """Inputs sit between NaN canaries, which would poison every sum that read them."""
    M, N, K, r = 5, 19, 37, 3

    def guarded(*size):
        numel = torch.Size(size).numel()
        whole = torch.full((numel + 2048,), float("nan"), device=device)
        inner = whole[1024 : 1024 + numel].view(size)
        inner.normal_()
        return whole, inner

    (x_, x), (_, W), (_, b), (_, A), (_, B), (_, dy) = (
        guarded(*s) for s in ((M, K), (N, K), (N,), (r, K), (N, r), (M, N))
    )
    for t in (x, A, B):
        t.requires_grad_()
    got = gradients(lambda: lora_linear(x, W, b, A, B, 1.0), dy, x, A, B)
    assert all(torch.isfinite(t).all() for t in got)
    assert_computes(got[0], lambda x, W, b, A, B: x @ W.t() + b + (x @ A.t()) @ B.t(), (x, W, b, A, B), 2 * K + r + 1)
    assert_computes(got[1], lambda dy, W, A, B: dy @ W + (dy @ B) @ A, (dy, W, A, B), 2 * N + r, "dx")
    assert_computes(got[2], lambda x, dy, B: (dy @ B).t() @ x, (x, dy, B), N + M, "dA")
    assert_computes(got[3], lambda x, dy, A: dy.t() @ (x @ A.t()), (x, dy, A), K + M, "dB")
    assert x_[:1024].isnan().all() and x_[-1024:].isnan().all()


def test_torch_path_is_as_accurate_as_separate_layers():
    inputs = operands((256, 192, 160, 8), torch.float32)[:5]
    ours = lora_linear(*inputs, 2.0)
    assert_computes(ours, lambda *inputs: lora_linear_reference(*inputs, 2.0), inputs, 2 * 160 + 8 + 1)
