"""What an adapter computes besides A and B: the start of PiSSA, the magnitude of DoRA, another adapter in each row.

An adapter here is whatever has `lora_A`, `lora_B`, `scaling`, `lora_dropout`, `lora_magnitude`,
`start_A` and `start_B`: a LoRALinear (its active one) or one of those resting in it.
"""

import math

import torch
import torch.nn.functional as F


def factors(adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """The A (r, in) and B (out, r) to compute with.

    For a PiSSA adapter they are of rank 2r: what it has become, less what it started as, so that
    together with the untouched W they make W − s·B₀A₀ + s·BA.
    """
    if adapter.start_A is None:
        return adapter.lora_A, adapter.lora_B
    return torch.cat([adapter.lora_A, adapter.start_A]), torch.cat([adapter.lora_B, -adapter.start_B], dim=1)


def dora_gain(weight: torch.Tensor, adapter) -> torch.Tensor:
    """g = m / ‖W + s·BA‖, one number for each output row, (out,); the gradient goes to m alone.

    DoRA replaces W + s·BA by g · (W + s·BA): the update turns each row of the weight, and m alone sets its
    length. The norm of row i is taken without forming the sum, from
    ‖wᵢ + s·bᵢA‖² = ‖wᵢ‖² + 2s·bᵢ(A wᵢ) + s²·bᵢ(AAᵀ)bᵢ, which costs two skinny products.

    Args:
        weight: W, (out, in), dense.

    Source: Liu et al. 2024, "DoRA", section 4.3 for the norm held constant in backward.
    """
    with torch.no_grad():
        A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in factors(adapter))
        W = weight.to(A.dtype)
        square = torch.linalg.vector_norm(W, dim=1).square()
        square += 2 * adapter.scaling * ((W @ A.t()) * B).sum(1)
        square += adapter.scaling**2 * ((B @ (A @ A.t())) * B).sum(1)
        norm = square.clamp_min_(0).sqrt_()
    return adapter.lora_magnitude / norm


def delta_weight(adapter, weight: torch.Tensor | None = None) -> torch.Tensor:
    """What the adapter adds to W when merged, (out, in), in at least fp32: s·BA; for DoRA g·(W + s·BA) − W.

    Args:
        weight: W, (out, in), dense; needed for DoRA only.
    """
    A, B = factors(adapter)
    dtype = torch.promote_types(A.dtype, torch.float32)
    delta = (B.to(dtype) @ A.to(dtype)).mul_(adapter.scaling)
    if adapter.lora_magnitude is None:
        return delta
    return (delta + weight).mul_(dora_gain(weight, adapter).to(dtype)[:, None]).sub_(weight)


def leading_factors(target: torch.Tensor, rank: int, scaling: float, iterations: int | None = None):
    """A (rank, in) and B (out, rank) such that scaling · BA is `target` cut to its largest singular values.

    The values are shared out evenly between A and B, as PiSSA and LoftQ do.

    Args:
        iterations: None for the exact decomposition, else for torch's randomized one.

    Raises:
        ValueError: scaling is 0.
    """
    if scaling == 0:
        raise ValueError("lora_alpha is 0, so that the adapter adds nothing, whatever A and B are")
    target = target.to(torch.promote_types(target.dtype, torch.float32))
    if iterations is None:
        U, S, Vh = torch.linalg.svd(target, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(target, min(rank, *target.shape), niter=iterations)
        Vh = V.t()
    root = (S[:rank] / abs(scaling)).sqrt()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * math.copysign(1, scaling) * root
    missing = rank - len(root)  # a rank above both sides of the matrix
    return F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))


def added_term(y: torch.Tensor, x: torch.Tensor, adapter, weight, bias, training: bool) -> torch.Tensor:
    """What the adapter adds to y (..., out), the base layer's output for x (..., in), in x's dtype.

    Args:
        weight: a function that returns the dense W (out, in), called for DoRA only.
        bias: the base layer's, or None.
    """
    A, B = (factor.to(x.dtype) for factor in factors(adapter))
    term = F.linear(F.linear(F.dropout(x, adapter.lora_dropout, training), A), B) * adapter.scaling
    if adapter.lora_magnitude is None:
        return term
    product = y if bias is None else y - bias.to(x.dtype)
    return dora_gain(weight(), adapter).to(x.dtype) * (product + term) - product


def add_rows(y: torch.Tensor, x: torch.Tensor, adapter, rows: torch.Tensor, weight, bias, training: bool):
    """y, the base layer's output for the batch x, with the adapter's term added in some rows of it.

    Args:
        y: (batch, ..., out).
        x: (batch, ..., in), same dtype.
        rows: (n,) int64, indices into the batch.
        weight, bias: as for `added_term`.
    """
    term = added_term(y.index_select(0, rows), x.index_select(0, rows), adapter, weight, bias, training)
    return y.index_add(0, rows, term)
