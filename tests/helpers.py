"""Error budgets: how wrong a result may be, derived and not guessed. Also a process without the interpreter."""

import math
import os
import subprocess
import sys

import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])  # what older ones cannot do is not asked of them
# λ of `order_cost`. Its source saw no error above λ = 1; where roundings are uniform on ±u, whose standard deviation
# is u/√3, and every partial sum is as large as Σ|a||b|, λ = 3 is five standard deviations.
CONFIDENCE = 3.0


def run_uninterpreted(code: str, *arguments: str, backend: str = "") -> str:
    """What `code` prints in a process of its own: kernels that are interpreted here cannot be compiled here."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "HANDTUNED_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def max_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference, computed in fp64; shapes must agree."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return 0.0
    return (actual.double() - exact.double()).abs().max().item()


def order_cost(terms: int, magnitudes, dtype: torch.dtype = torch.float32):
    """How far a sum may lie from the truth for the order of its additions alone: min(K, λ√K) · u · Σ|a||b|.

    K · u is the bound for any order and any data (Higham 2002, "Accuracy and stability of numerical algorithms",
    section 3.1), and so for one chain of K fused multiply-adds. Roundings that do not conspire stay below λ√K · u
    (Higham & Mary 2019, "A new approach to probabilistic rounding error analysis", theorem 2.4).

    Args:
        terms: K, the roundings between an operand and the result: K + r for x Wᵀ + (x Aᵀ) Bᵀ with r short sums.
        magnitudes: Σ|a||b|, the same formula on absolute values; a number or a tensor.
        dtype: of the result; sums of 16-bit numbers are fp32, so u is 2⁻²⁴ for all but float64.
    """
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    return min(terms, CONFIDENCE * math.sqrt(terms)) * unit * magnitudes


def assert_within_budget(ours, exact, torch_low, terms: int, magnitudes, what="result"):
    """Our error against fp64 is at most twice torch's own at the same precision, plus one rounding.

    Torch's error is that of one order of summation on one CPU, so every element may also err by its `order_cost`.
    What this finds is in test_helpers.py. A fault below the rounding of a 16-bit result is found in fp32 only.

    Args:
        ours: the kernel's result, in the low dtype.
        exact: the same computed in fp64 from the same (rounded) inputs.
        torch_low: the same computed by plain torch in the low dtype.
        terms, magnitudes: as for `order_cost`; magnitudes of the shape of `exact`.
    """
    assert ours.dtype == torch_low.dtype, f"{what}: dtype {ours.dtype}, expected {torch_low.dtype}"
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(ours).all(), f"{what}: {(~torch.isfinite(ours)).sum().item()} values are not finite"
    if exact.numel() == 0:
        return
    rounding = torch.finfo(ours.dtype).eps * exact.double().abs().max()
    budget = order_cost(terms, magnitudes.double(), ours.dtype).clamp(min=2 * max_error(torch_low, exact)) + rounding
    error = (ours.double() - exact.double()).abs()
    worst = (error / budget.clamp(min=torch.finfo(torch.float64).tiny)).argmax()
    assert (error <= budget).all(), (
        f"{what}: error {error.flatten()[worst]:.3e} is above the budget {budget.flatten()[worst]:.3e}"
    )


def assert_computes(ours, formula, inputs, terms: int, what="result", compute_dtype=None):
    """`ours` is `formula(*inputs)` within its budget, where `formula` only adds products of its inputs.

    Args:
        ours: the result, in the low dtype.
        formula: plain torch. On fp64 inputs it is the truth, on inputs of the dtype of `ours` the rival, and on
            absolute values it gives the magnitudes.
        inputs: tensors, from which `ours` was computed.
        terms: as for `order_cost`.
        compute_dtype: in which the rival computes, if not in the dtype of `ours`.
    """
    low = formula(*(t.detach().to(compute_dtype or ours.dtype) for t in inputs)).to(ours.dtype)
    exact, magnitudes = (formula(*(take(t.detach().double()) for t in inputs)) for take in (torch.clone, torch.abs))
    assert_within_budget(ours, exact, low, terms, magnitudes, what)


def assert_same_function(actual, expected, what="result", terms: int = 0):
    """Two results of the same function agree, in whatever order they were summed: in fp64 to 1e-10 of their size.

    Models are compared in fp64: an error of logic is as large there as in fp32, but roundings stay
    near 1e-15, which not even a dozen ill-conditioned layers take to 1e-10. No CPU comes near the bound.

    Args:
        terms: for fp32, or if values were rounded to fp32 on the way (a merge, a decomposition): the roundings of the
            longest chain of sums. The two may then be apart by the `order_cost` of the largest value.
    """
    size = expected.abs().max().item() if expected.numel() else 0.0
    if not terms:
        dtypes = actual.dtype, expected.dtype
        assert dtypes == (torch.float64, torch.float64), f"{what}: {dtypes} are not float64"
    bound = order_cost(terms, size) if terms else 1e-10 * size
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound, msg=lambda text: f"{what}: {text}")
