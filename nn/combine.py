"""New adapters made of those in the model: weighted sums, by three recipes."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from .lora import LoRALinear
from .multi import ModuleToSave, RestingAdapter, adapter_names, adapter_of, check_name, modules_with_adapters
from .parameters import LoRAWeight


def add_weighted_adapter(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str,
                         combination_type: str = "svd", svd_rank: int | None = None) -> None:  # fmt: skip
    """Add an adapter that is a weighted sum of others, PEFT's function of this name. It is not activated, and frozen.

    A layer that only some of the adapters touch gets the sum of those; negative weights subtract. `combination_type` is

    - "svd": Σ wᵢ sᵢ BᵢAᵢ, cut to its `svd_rank` (by default the largest rank there is) largest singular values;
    - "cat": the same sum exactly, of rank Σ rᵢ;
    - "linear": A = Σ √|wᵢsᵢ| Aᵢ and B = Σ ±√|wᵢsᵢ| Bᵢ. Cheap and of the same rank, which must be equal, but the
      product also holds every mixed BᵢAⱼ, which nobody trained.

    ValueError: an unknown name, a new name that is in use, a weight that is missing or not finite, different ranks with
    "linear", or adapters that are more than A and B (DoRA, `modules_to_save`).
    """
    check_name(adapter_name)
    known = adapter_names(model)
    if adapter_name in known:
        raise ValueError(f"the model has an adapter {adapter_name!r} already")
    if not adapters or set(adapters) - set(known):
        raise ValueError(f"adapters must name some of {', '.join(known) or 'none'}, got {list(adapters)}")
    numbers = all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights)
    if len(weights) != len(adapters) or not numbers:
        raise ValueError(f"weights must be {len(adapters)} finite numbers, got {list(weights)}")
    if combination_type not in ("svd", "cat", "linear"):
        raise ValueError(f"combination_type must be one of svd, cat, linear, got {combination_type!r}")
    if svd_rank is not None and (not isinstance(svd_rank, int) or svd_rank < 1):
        raise ValueError(f"svd_rank must be an integer of at least 1, got {svd_rank!r}")

    modules = modules_with_adapters(model)
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for path, module in modules.items():
        held = [(adapter, weight) for name, weight in zip(adapters, weights, strict=True)
                if (adapter := adapter_of(module, name)) is not None]  # fmt: skip
        if not held:
            continue
        of_more = any(hasattr(adapter, "lora_magnitude") for adapter, _ in held)
        if isinstance(module, (ModuleToSave, LoRAWeight)) or of_more:
            raise ValueError(f"{path!r}: only adapters of A and B on linear layers can be combined, not DoRA, "
                             "modules_to_save or target_parameters")  # fmt: skip
        pairs[path] = [_weighted(adapter, weight) for adapter, weight in held]
        ranks = [A.shape[0] for A, _ in pairs[path]]
        if combination_type == "linear" and len(set(ranks)) > 1:
            raise ValueError(f"combination_type 'linear' needs equal ranks, but {path!r} has {ranks}")
    rank = svd_rank or max(A.shape[0] for held in pairs.values() for A, _ in held)
    made = {}
    for path, held in pairs.items():
        if combination_type == "linear" or (len(adapters) == 1 and not svd_rank):
            A, B = sum(A for A, _ in held), sum(B for _, B in held)
        else:
            A, B = torch.cat([A for A, _ in held]), torch.cat([B for _, B in held], dim=1)
            if combination_type == "svd":
                A, B = best_of_rank(A, B, rank)
        contents = {name: nn.Parameter(f.contiguous(), False) for name, f in (("lora_A", A), ("lora_B", B))}
        contents |= {"rank": len(A), "lora_alpha": len(A), "scaling": 1.0, "lora_dropout": 0.0}
        made[path] = RestingAdapter(LoRALinear, contents)
    for path, adapter in made.items():
        modules[path].resting[adapter_name] = adapter


def _weighted(adapter, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B whose product is weight · s · BA, the factor and its sign shared out as PEFT does."""
    A, B = (factor.detach() for factor in adapter.factors())
    root = math.sqrt(abs(weight * adapter.scaling))
    return A * math.copysign(root, weight * adapter.scaling), B * root


def best_of_rank(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The A' (rank, in) and B' (out, rank) whose product comes closest to BA.

    BA is never formed: with B = Q₁R₁ and Aᵀ = Q₂R₂ it is Q₁ (R₁R₂ᵀ) Q₂ᵀ, and the singular values are
    those of the small matrix in the middle.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    Q1, R1 = torch.linalg.qr(B.to(dtype))
    Q2, R2 = torch.linalg.qr(A.to(dtype).t())
    U, S, Vh = torch.linalg.svd(R1 @ R2.t(), full_matrices=False)
    return (Vh[:rank] @ Q2.t()).to(A.dtype), (Q1 @ U[:, :rank] * S[:rank]).to(B.dtype)
