"""scaled_matmul: FP32 accumulation, one rounding after the scale, and a flag for what overflowed."""


import pytest
import torch
from handtuned.amp import autocast, scaled_matmul
from helpers import assert_computes
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
SHAPES = [(1, 1, 1), (63, 65, 64), (64, 63, 65), (65, 1, 1000), (1, 200, 63), (130, 64, 33), (128, 256, 64)]


def inputs(M, N, K, dtype, device):
    return torch.randn(M, K).to(device, dtype), torch.randn(K, N).to(device, dtype)


def assert_is_the_product(a, b, scale=1.0):
    assert_computes(scaled_matmul(a, b, scale)[0], lambda a, b: (a @ b) * scale, (a, b), a.shape[-1])


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward(each_backend, device, shape, dtype):
    a, b = inputs(*shape, dtype, device)
    assert_is_the_product(a, b, 0.125)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 65, 64), (1, 200, 63)], ids=lambda s: "x".join(map(str, s)))
def test_backward(each_backend, device, shape, dtype):
    """da = s dc bᵀ and db = s aᵀ dc, each within its own budget."""
    a, b = (t.requires_grad_() for t in inputs(*shape, dtype, device))
    c, _ = scaled_matmul(a, b, 2.0)
    dc = torch.randn_like(c)
    c.backward(dc)
    for what, ours, left, right in (("da", a.grad, dc, b.t()), ("db", b.grad, a.t(), dc)):
        assert_computes(ours, lambda left, right: (left @ right) * 2, (left, right), left.shape[1], what)


def test_gradcheck():
    a, b = (t.requires_grad_() for t in inputs(3, 4, 5, torch.float64, "cpu"))
    assert torch.autograd.gradcheck(lambda a, b: scaled_matmul(a, b, 1.7)[0], (a, b))


@pytest.mark.parametrize("layout", ["nt", "tn", "tt", "slice", "expanded"])
def test_any_strides(each_backend, device, layout):
    a, b = inputs(40, 50, 60, torch.float16, device)
    if layout == "slice":
        a, b = torch.randn(40, 120).to(device).half()[:, ::2], torch.randn(70, 50).to(device).half()[5:65]
    elif layout == "expanded":
        a = a[:1].expand(40, 60)
    else:
        a = a.t().contiguous().t() if layout[0] == "t" else a
        b = b.t().contiguous().t() if layout[1] == "t" else b
    assert_is_the_product(a, b)


def test_leading_dimensions(each_backend, device):
    a, b = torch.randn(2, 3, 4, 8).to(device).half(), torch.randn(8, 5).to(device).half()
    assert scaled_matmul(a, b)[0].shape == (2, 3, 4, 5)
    assert_is_the_product(a, b)


@pytest.mark.parametrize(("M", "N", "K"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty(each_backend, device, M, N, K):
    a, b = (t.requires_grad_() for t in inputs(M, N, K, torch.float16, device))
    c, found_inf = scaled_matmul(a, b)
    assert torch.equal(c, torch.zeros(M, N, device=device).half()) and found_inf.item() == 0
    c.backward(torch.ones_like(c))
    assert a.grad.eq(0).all() and b.grad.eq(0).all()


def test_scale_meets_the_accumulator(each_backend, device):
    """A product of 2⁻³⁰ underflows in FP16, and one of 2¹⁶ overflows; scaled before the rounding both are exact."""
    tiny, large = torch.full((2, 1), 2.0**-15), torch.full((2, 1), 2.0**8)
    for value, scale, exact in ((tiny, 2.0**16, 2.0**-14), (large, 2.0**-3, 2.0**13)):
        a, b = value.half().to(device), value.half().t().to(device)
        c, found_inf = scaled_matmul(a, b, scale)
        assert c.eq(exact).all() and found_inf.item() == 0
        assert not ((a @ b) * scale).eq(exact).any()


def test_sums_are_kept_in_fp32(each_backend, device):
    """2048 + 1 + … + 1: an FP16 accumulator stops at 2048, where the spacing is 2."""
    a = torch.cat([torch.tensor([2048.0]), torch.ones(1000)])[None].half().to(device)
    c, _ = scaled_matmul(a, torch.ones(1001, 1).half().to(device))
    assert c.item() == 3048.0


@pytest.mark.parametrize("shape", [(5, 7, 3), (70, 130, 65)], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 6e4], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_overflow_is_flagged(each_backend, device, shape, value):
    """inf or NaN in an operand, or finite operands whose product is beyond 65504."""
    a, b = inputs(*shape, torch.float16, device)
    assert scaled_matmul(a, b)[1].item() == 0
    a[-1, -1], b[-1, -1] = value, 2.0
    c, found_inf = scaled_matmul(a, b)
    assert not torch.isfinite(c).all()
    assert found_inf.item() == 1 and found_inf.dtype == torch.float32 and found_inf.dim() == 0


def test_flag_ignores_what_lies_outside(each_backend, device):
    """Poison around the operands must not reach the result or the flag."""
    frame_a, frame_b = (torch.full((80, 80), float("nan")).half().to(device) for _ in range(2))
    a, b = frame_a[3:36, 5:38], frame_b[7:40, 9:50]
    a.copy_(torch.randn(33, 33))
    b.copy_(torch.randn(33, 41))
    c, found_inf = scaled_matmul(a, b)
    assert torch.isfinite(c).all() and found_inf.item() == 0


@pytest.mark.parametrize("scale", [8.0, torch.tensor(8.0), torch.tensor([8.0]), torch.tensor(8.0).half()], ids=repr)
def test_scale_may_be_a_tensor(each_backend, device, scale):
    a, b = inputs(4, 5, 6, torch.float16, device)
    if isinstance(scale, torch.Tensor):
        scale = scale.to(device)
    assert torch.equal(scaled_matmul(a, b, scale)[0], scaled_matmul(a, b, 8.0)[0])


@pytest.mark.parametrize(
    "scope", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: autocast(torch.bfloat16)], ids=["torch", "ours"]
)
def test_autocast_leaves_the_fp32_inside_alone(each_backend, device, scope):
    """FP16 operands taken to bf16 would lose three bits, and the sum its FP32."""
    a, b = (t.requires_grad_() for t in inputs(33, 17, 100, torch.float16, device))
    expected = scaled_matmul(a, b, 2.0)[0]
    gradients = torch.autograd.grad(expected.sum(), (a, b))
    with scope():
        c = scaled_matmul(a, b, 2.0)[0]
        again = torch.autograd.grad(c, (a, b), torch.ones_like(c))
    assert torch.equal(c, expected)
    assert all(torch.equal(x, y) for x, y in zip(again, gradients, strict=True))


def test_the_vendors_library_sums_16_bits_in_fp32():
    """On a device without our kernel FP16 operands are not made FP32 (tensor cores would be lost), but the sum is."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append((func, *(t.dtype for t in args if isinstance(t, torch.Tensor))))
            return func(*args, **(kwargs or {}))

    a, b = torch.empty(4, 8, dtype=torch.float16, device="meta"), torch.empty(8, 5, dtype=torch.float16, device="meta")
    with Record():
        c, found_inf = scaled_matmul(a, b, 2.0)
    assert c.shape == (4, 5) and c.dtype == torch.float16 and found_inf.dtype == torch.float32
    assert (torch.ops.aten.mm.dtype, torch.float16, torch.float16) in calls
    assert (torch.ops.aten.mul_.Tensor, torch.float32, torch.float32) in calls


def test_the_flag_is_fp32_whatever_torchs_default(each_backend, device):
    a, b = inputs(4, 5, 6, torch.float16, device)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert scaled_matmul(a, b)[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_only_where_wanted(each_backend, device):
    a, b = inputs(4, 5, 6, torch.float16, device)
    scaled_matmul(a.requires_grad_(), b)[0].sum().backward()
    assert a.grad is not None and b.grad is None
    c, found_inf = scaled_matmul(a, b.requires_grad_())
    assert c.requires_grad and not found_inf.requires_grad


@pytest.mark.parametrize(
    ("a", "b", "scale", "error", "name"),
    [
        (torch.ones(2, 3), torch.ones(4, 2), 1.0, ValueError, "K"),
        (torch.ones(3), torch.ones(3, 2), 1.0, ValueError, "M, K"),
        (torch.ones(2, 3), torch.ones(1, 3, 2), 1.0, ValueError, "K, N"),
        (torch.ones(2, 3).half(), torch.ones(3, 2), 1.0, TypeError, "dtype"),
        ([[1.0]], torch.ones(3, 2), 1.0, TypeError, "tensors, got list"),
        (torch.ones(2, 3).int(), torch.ones(3, 2).int(), 1.0, TypeError, "dtype"),
        (torch.ones(2, 3), torch.ones(3, 2), torch.ones(2), ValueError, "scale"),
        (torch.ones(2, 3), torch.ones(3, 2), torch.ones((), requires_grad=True), ValueError, "scale"),
        (torch.ones(2, 3), torch.ones(3, 2, device="meta"), 1.0, ValueError, "device"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors_name_the_argument(a, b, scale, error, name):
    with pytest.raises(error, match=name):
        scaled_matmul(a, b, scale)
