"""The error budget lets every order of summation pass, and no planted fault."""

from pathlib import Path

import pytest
import torch
from conftest import NUMERICAL
from helpers import assert_computes, assert_same_function, assert_within_budget, order_cost

LENGTHS = pytest.mark.parametrize("K", [64, 256, 1000, 4096])
BLOCK = 64


def product(a, b):
    return a @ b


def chain(a, b):
    """One accumulator and K fused multiply-adds, as a kernel without blocks sums."""
    total = torch.zeros(a.shape[0], b.shape[1])
    for k in range(a.shape[1]):
        total = (total.double() + a[:, k, None].double() * b[k].double()).float()
    return total


def halves(a, b):
    """Products added in pairs, then pairs of pairs, as a tree does."""
    terms = (a[:, :, None] * b).transpose(0, 1)
    while len(terms) > 1:
        rest = terms[len(terms) & ~1 :]
        terms = torch.cat([terms[0::2][: len(terms) // 2] + terms[1::2], rest])
    return terms[0]


def from_small_to_large(a, b):
    """An order that depends on the data."""
    terms = (a[:, :, None] * b).sort(dim=1).values
    return terms.cumsum(1)[:, -1]


def operands(K, dtype=torch.float32, rows=16, columns=24):
    return torch.randn(rows, K).to(dtype), torch.randn(K, columns).to(dtype)


@LENGTHS
@pytest.mark.parametrize("order", [product, chain, halves, from_small_to_large])
@pytest.mark.parametrize("positive", [False, True], ids=["", "positive"])
def test_every_order_of_summation_passes(order, positive, K):
    a, b = operands(K)
    if positive:
        a, b = a.abs(), b.abs()
    assert_computes(order(a, b), product, (a, b), K)


@pytest.mark.parametrize("order", [chain, halves, from_small_to_large])
def test_every_order_passes_beside_a_rival_without_an_error(order):
    """The rival's error is luck: the budget must not hang on it."""
    a, b = operands(1000)
    exact = a.double() @ b.double()
    assert_within_budget(order(a, b), exact, exact.float(), 1000, a.double().abs() @ b.double().abs())


def dropped_term(a, b):
    return a[:, :-1] @ b[:-1]


def bf16_operand(a, b):
    return a.bfloat16().to(a.dtype) @ b


def bf16_result(a, b):
    return (a @ b).bfloat16().to(a.dtype)


def bf16_partial_sum(a, b):
    """One block of K goes through bf16 on its way to the accumulator."""
    return a[:, BLOCK:] @ b[BLOCK:] + (a[:, :BLOCK] @ b[:BLOCK]).bfloat16().to(a.dtype)


def scale_of_the_wrong_block(a, b):
    """The first 64 rows of b are 1 % too large, as with the neighbour's absmax."""
    return a @ torch.cat([b[:BLOCK] * 1.01, b[BLOCK:]])


@LENGTHS
@pytest.mark.parametrize(
    "fault", [dropped_term, bf16_operand, bf16_result, bf16_partial_sum, scale_of_the_wrong_block]
)
def test_planted_faults_are_found_in_fp32(fault, K):
    a, b = operands(K)
    with pytest.raises(AssertionError, match="above the budget"):
        assert_computes(fault(a, b), product, (a, b), K)


@pytest.mark.parametrize(("dtype", "K"), [(torch.float16, 64), (torch.float16, 1000), (torch.bfloat16, 64)], ids=str)
def test_a_dropped_term_is_found_in_16_bits(dtype, K):
    """As far as it is larger than the rounding of the result."""
    a, b = operands(K, dtype)
    with pytest.raises(AssertionError, match="above the budget"):
        assert_computes(dropped_term(a, b), product, (a, b), K)


def test_the_budget_is_one_of_each_element():
    """A row of small numbers is not lent the budget of a row of large ones."""
    a, b = operands(256)
    a[0] *= 1e-3
    y = a @ b
    y[0] += a[0, :1] * b[0]
    exact, magnitudes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    cost = order_cost(256, magnitudes)
    assert (cost[0].max() < 1e-2 * cost[1:].min()) and ((y - exact).abs() > cost)[0].any()


def test_values_shapes_and_dtypes_are_looked_at():
    a, b = operands(64)
    for wrong, message in (((a @ b)[:1], "shape"), (a @ b / 0, "not finite")):
        with pytest.raises(AssertionError, match=message):
            assert_computes(wrong, product, (a, b), 64)
    with pytest.raises(AssertionError, match="dtype"):
        assert_within_budget((a @ b).half(), a @ b, a @ b, 64, a @ b)


def test_functions_are_compared_in_fp64():
    a, b = (t.double() for t in operands(64))
    y = a @ b
    assert_same_function(halves(a, b), y)
    for fault in (dropped_term, bf16_operand, bf16_result, scale_of_the_wrong_block):
        with pytest.raises(AssertionError, match="result"):
            assert_same_function(fault(a, b), y)
    with pytest.raises(AssertionError, match="float64"):
        assert_same_function(y.float(), y.float())


def test_the_numerical_files_are_there():
    """A renamed file would drop out of `make test-portable` unseen."""
    assert all((Path(__file__).parent / f"test_{name}.py").exists() for name in NUMERICAL)
