"""Error budgets: how wrong a kernel may be, derived and not guessed. Also a process without the interpreter."""

import os
import subprocess
import sys

import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])  # what older ones cannot do is not asked of them


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


def assert_within_budget(ours, exact, torch_low, what="result"):
    """Our error against fp64 is at most twice torch's own error at the same precision, plus one rounding.

    Args:
        ours: the kernel's result, in the low dtype.
        exact: the same computed in fp64 from the same (rounded) inputs.
        torch_low: the same computed by plain torch in the low dtype.
    """
    assert ours.dtype == torch_low.dtype, f"{what}: dtype {ours.dtype}, expected {torch_low.dtype}"
    assert torch.isfinite(ours).all(), f"{what}: {(~torch.isfinite(ours)).sum().item()} values are not finite"
    if exact.numel() == 0:
        assert ours.shape == exact.shape
        return
    rounding = torch.finfo(ours.dtype).eps * exact.double().abs().max().item()
    budget = 2 * max_error(torch_low, exact) + rounding
    error = max_error(ours, exact)
    assert error <= budget, f"{what}: error {error:.3e} is above the budget {budget:.3e}"
