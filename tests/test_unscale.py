"""Unscaling: every gradient multiplied once, every inf and NaN seen, in one launch."""

import math

import pytest
import torch
from handtuned.kernels import runtime, unscale
from handtuned.kernels.unscale import BLOCK, squared_norm, unscale_

SHAPES = [(1,), (63,), (64,), (65, 3), (1000,), (0,), (), (BLOCK,), (BLOCK + 1,)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def gradients(dtype, device):
    return [torch.randn(shape, device=device).to(dtype) for shape in SHAPES]


def norm_error(grads):
    """Squares are exact to one rounding and added in a tree, so n additions err by at most log2(n) roundings."""
    return (math.log2(sum(g.numel() for g in grads)) + 2) * torch.finfo(torch.float32).eps


def scalar(value, device):
    return torch.tensor(float(value), device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_gradient_is_multiplied_and_rounded_once(each_backend, device, dtype):
    grads = gradients(dtype, device)
    expected = [(g.float() * 0.3).to(dtype) for g in grads]
    found = scalar(0, device)
    unscale_(grads, scalar(0.3, device), found)
    # Triton's interpreter truncates to bf16 where the GPU rounds: up to one place apart.
    truncates = dtype == torch.bfloat16 and runtime.INTERPRETED and each_backend == "kernel"
    slack = torch.finfo(dtype).eps if truncates else 0.0
    for grad, exact in zip(grads, expected, strict=True):
        assert ((grad.float() - exact.float()).abs() <= slack * exact.float().abs()).all()
    assert found.item() == 0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("where", [0, 4, 6, 8], ids=lambda i: f"in-{SHAPES[i]}")
def test_one_bad_value_anywhere_is_found(each_backend, device, value, where):
    grads = gradients(torch.float32, device)
    grads[where].view(-1)[-1] = value
    found = scalar(0, device)
    unscale_(grads, scalar(1, device), found)
    assert found.item() == 1


def test_flag_is_not_taken_back(each_backend, device):
    found = scalar(1, device)
    unscale_([torch.ones(3, device=device)], scalar(1, device), found)
    assert found.item() == 1


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_overflow_of_the_product_is_not_an_overflow_of_the_gradient(each_backend, device):
    """As in torch: the check comes before the multiplication."""
    grad, found = torch.full((2,), 1e38, device=device), scalar(0, device)
    unscale_([grad], scalar(100, device), found)
    assert torch.isinf(grad).all() and found.item() == 0


def test_without_a_factor_gradients_are_only_looked_at(each_backend, device):
    grad, found = torch.tensor([1.0, float("inf")], device=device), scalar(0, device)
    unscale_([grad], None, found)
    assert grad.tolist() == [1.0, float("inf")] and found.item() == 1


def test_strided_gradients(each_backend, device):
    """A transpose has no holes and is done in place; a slice has, and its neighbours must not change."""
    base = torch.randn(8, 10, device=device)
    grads = [torch.randn(5, 7, device=device).t(), base[:, ::2], base[:3, 1::2]]
    expected = [g * 0.5 for g in grads]
    untouched = base[3:, 1::2].clone()
    unscale_(grads, scalar(0.5, device), scalar(0, device))
    for grad, exact in zip(grads, expected, strict=True):
        assert torch.equal(grad, exact)
    assert torch.equal(base[3:, 1::2], untouched)


def test_dtypes_may_be_mixed(each_backend, device):
    grads = [torch.ones(5, dtype=dtype, device=device) for dtype in DTYPES]
    unscale_(grads, scalar(0.25, device), scalar(0, device))
    assert all(g.float().eq(0.25).all() for g in grads)


def test_a_mixture_of_dtypes_is_one_launch(kernel_backend, device, monkeypatch):
    grads = [torch.randn(3, 5, device=device).to(dtype) for dtype in (*DTYPES, torch.float32)]
    launches, launch = [], unscale.launch
    monkeypatch.setattr(unscale, "launch", lambda *a, **k: (launches.append(1), launch(*a, **k)))
    expected = sum(g.double().square().sum() for g in grads)
    assert abs(squared_norm(grads).item() - expected.item()) <= norm_error(grads) * expected
    grads[1][0, 0], found = float("nan"), scalar(0, device)
    unscale_(grads, scalar(1, device), found)
    assert len(launches) == 2 and found.item() == 1


@pytest.mark.parametrize("offset", [1, 2, 8])
def test_an_unaligned_gradient_among_others(each_backend, device, offset):
    """A view that starts in the middle: the same result, in the same launch."""
    grads = [torch.randn(BLOCK + 8, device=device)[offset:], torch.randn(77, device=device)]
    expected = [g * 0.5 for g in grads]
    unscale_(grads, scalar(0.5, device), scalar(0, device))
    assert all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))


def test_same_as_torch(each_backend, device):
    grads = gradients(torch.float32, device)
    theirs = [g.clone() for g in grads]
    inv_scale = scalar(1 / 3, device)
    torch._amp_foreach_non_finite_check_and_unscale_(theirs, scalar(0, device), inv_scale)
    unscale_(grads, inv_scale, scalar(0, device))
    for grad, their in zip(grads, theirs, strict=True):
        assert torch.equal(grad, their)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norm(each_backend, device, dtype):
    grads = gradients(dtype, device)
    exact = sum(g.double().square().sum() for g in grads)
    assert abs(squared_norm(grads).double() - exact) <= norm_error(grads) * exact


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_squared_norm_of_a_bad_gradient_is_bad(each_backend, device, value):
    assert not torch.isfinite(squared_norm([torch.ones(70, device=device), scalar(value, device)]))


def test_nothing_to_do(each_backend, device):
    found = scalar(0, device)
    unscale_([], scalar(1, device), found)
    unscale_([torch.ones(0, device=device)], scalar(1, device), found)
    assert found.item() == 0 and squared_norm([torch.ones(0, device=device)]).item() == 0
    assert squared_norm([]).item() == 0


def test_float64_takes_the_reference(each_backend, device):
    grad, found = torch.ones(3, dtype=torch.float64, device=device), scalar(0, device)
    unscale_([grad], scalar(0.5, device), found)
    assert grad.tolist() == [0.5] * 3
    assert squared_norm([grad]).item() == 0.75


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_other_dtypes_are_refused(each_backend, device, dtype):
    grads = [torch.ones(3, device=device), torch.ones(3, dtype=dtype, device=device)]
    with pytest.raises(TypeError, match=str(dtype)):
        unscale_(grads, scalar(1, device), scalar(0, device))
    with pytest.raises(TypeError, match=str(dtype)):
        squared_norm(grads)


def test_torchs_defaults_of_dtype_and_device_change_nothing(each_backend, device):
    grads = gradients(torch.float32, device)
    norm, found, inv_scale = squared_norm(grads), scalar(0, device), scalar(0.5, device)
    unscale._chunk_table.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.equal(squared_norm(grads), norm)
            unscale_(grads, inv_scale, found)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.item() == 0
