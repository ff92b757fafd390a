"""Variants of LoRA: rsLoRA, LoRA+, LoRA-FA, PiSSA, LoftQ, DoRA; each a few lines on a model's active adapter.

Call them after `apply_lora_to_model` and before making the optimizer. DoRA and PiSSA hold more than A and B: their
layers are classes of their own, which a LoRALinear becomes and stops being with the adapter that is active.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.lora import lora_linear
from ..quant import NF4Linear
from ..quant.linear import lies_transposed
from ..quant.readers import listed
from .base_layer import dense_weight
from .lora import LoRALinear, operands
from .multi import active_layers, lora_parameters
from .parameters import LoRAWeight
from .targets import last_two


def use_rslora(model: nn.Module) -> None:
    """Scale every adapter by lora_alpha / √rank instead of lora_alpha / rank: BA grows like √r for random factors.

    Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA".
    """
    for _, layer in active_layers(model):
        layer.scaling = layer.lora_alpha / math.sqrt(layer.rank)


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0) -> list[dict]:
    """Parameter groups for any optimizer, with a learning rate of lr · ratio for B and lr for the rest.

    A meets inputs of width `in` and B meets S of width r, so with equal rates A moves the output far less than B could;
    the paper finds a ratio of about 16. Modules trained whole learn at `lr`, but for their vectors, which like DoRA's
    magnitudes learn at B's rate without weight decay, as in PEFT.

    Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section 4.
    """
    Bs = {id(layer.lora_B) for _, layer in active_layers(model)}
    rates = (lr, weight_decay), (lr * ratio, weight_decay), (lr * ratio, 0.0)
    groups = [{"params": [], "lr": rate, "weight_decay": decay} for rate, decay in rates]
    for parameter in lora_parameters(model):
        if parameter.requires_grad:
            groups[1 if id(parameter) in Bs else 2 if parameter.dim() == 1 else 0]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def freeze_A(model: nn.Module) -> None:
    """LoRA-FA: train B alone. Without dA the input x of a layer need not be kept for backward, only S = x Aᵀ.

    Source: Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation".
    """
    for _, layer in active_layers(model):
        layer.lora_A.requires_grad_(False)


def gaussian_init(model: nn.Module) -> None:
    """Start A from a normal distribution of standard deviation 1 / rank, as PEFT's "gaussian"; B stays as it is."""
    for _, layer in active_layers(model):
        nn.init.normal_(layer.lora_A, std=1 / layer.rank)


class PiSSALinear(LoRALinear):
    """A LoRALinear that computes with W + s·(BA − B₀A₀), B₀A₀ being what the adapter started as."""

    PARTS = (*LoRALinear.PARTS, "start_A", "start_B")

    def factors(self):
        """A (2r, in) and B (out, 2r): what the adapter has become, less what it started as."""
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)

    def parts(self, saved):
        """As `LoRALinear.parts`: the factors cut in two again, to the bit."""
        A, B = saved["lora_A"], saved["lora_B"]
        halves = {"lora_A": A[: self.rank], "start_A": A[self.rank :]}
        return saved | halves | {"lora_B": B[:, : self.rank], "start_B": -B[:, self.rank :]}


@torch.no_grad()
def pissa_init(model: nn.Module, iterations: int | None = None) -> None:
    """Start at the principal singular directions: s·B₀A₀ is W cut to rank r, and the rest of W stays frozen.

    PiSSA usually writes the rest, W − s·B₀A₀, over the base weight. Here W is left alone, for other adapters and
    for `disable_lora`, and B₀A₀ is kept beside the adapter; `save_adapter` writes [A; A₀] and [B, −B₀], a plain
    LoRA of rank 2r on the untouched base.

    `iterations` is None for the exact singular value decomposition, a number for torch's randomized one with so many
    power iterations (much faster on large layers). ValueError: an NF4 base; for that there is `loftq_init`.

    Source: Meng et al. 2024, "PiSSA", section 3.
    """
    for path, layer in _linear_only(model, "PiSSA"):
        if isinstance(layer.base_layer, NF4Linear):
            raise ValueError(f"{path!r} is quantized; pissa_init needs dense weights (for NF4 there is loftq_init)")
    for _, layer in active_layers(model):
        _start_at(layer, dense_weight(layer.base_layer), iterations)
        _become(layer, PiSSALinear)
        layer.register_buffer("start_A", layer.lora_A.detach().clone())
        layer.register_buffer("start_B", layer.lora_B.detach().clone())


@torch.no_grad()
def loftq_init(model: nn.Module, original: Mapping[str, torch.Tensor] | str | Path,
               iterations: int | None = None) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Start at the best rank-r correction of the quantization error W − NF4(W), leaving NF4(W) as it is.

    This is LoftQ with one iteration; further ones would quantize the base anew, which nobody who loads the adapter has.
    `original` are the weights before quantization, `<path>.weight` by name and as they lay: a state dict, or the
    directory of the model's safetensors files; `iterations` as in `pissa_init`.

    Returns path → (‖W − NF4(W)‖ / ‖W‖ before, ‖W − NF4(W) − s·BA‖ / ‖W‖ after).
    ValueError: no NF4 layer with an adapter, or a weight that is missing or of another shape.

    Source: Li et al. 2023, "LoftQ", section 3.2.
    """
    layers = {f"{p}.weight": layer for p, layer in active_layers(model) if isinstance(layer.base_layer, NF4Linear)}
    if not layers:
        raise ValueError("the model has no NF4 layer with an adapter; quantize_model comes first")
    if not isinstance(original, Mapping):
        from safetensors.torch import load_file  # maps the file: what is not looked at takes no memory

        files = map(load_file, sorted(Path(original).glob("*.safetensors")))
        original = {name: tensor for file in files for name, tensor in file.items()}
    transposed = {name for name, layer in layers.items() if lies_transposed(layer.base_layer.dense_class)}
    for name, layer in layers.items():
        if name not in original:
            raise ValueError(f"original has no {name!r}")
        shape = (layer.out_features, layer.in_features)[:: -1 if name in transposed else 1]
        if (found := tuple(original[name].shape)) != shape:
            raise ValueError(f"original: {name!r} must be {shape}, got {found}")
    errors = {}
    for name, layer in layers.items():
        quantized = dense_weight(layer.base_layer).float()
        W = (original[name].t() if name in transposed else original[name]).to(quantized)
        lost = W - quantized
        _start_at(layer, lost, iterations)
        left = lost - layer.delta_weight()
        errors[name.removesuffix(".weight")] = tuple((part.norm() / W.norm()).item() for part in (lost, left))
    return errors


class DoRALinear(LoRALinear):
    """A LoRALinear with a trainable magnitude m, (out,): it computes with m · (W + s·BA) / ‖W + s·BA‖, row by row.

    So the update turns each row of the weight, and m alone sets its length. Dropout acts on the input of BA alone.

    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", section 4.
    """

    PARTS = (*LoRALinear.PARTS, "lora_magnitude")

    def gain(self, weight: torch.Tensor) -> torch.Tensor:
        """g = m / ‖W + s·BA‖, (out,), for a dense W (out, in); the gradient goes to m alone (section 4.3).

        The norm of row i is taken without forming the sum, from
        ‖wᵢ + s·bᵢA‖² = ‖wᵢ‖² + 2s·bᵢ(A wᵢ) + s²·bᵢ(AAᵀ)bᵢ, which costs two skinny products.
        """
        with torch.no_grad():
            A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self.factors())
            W = weight.to(A.dtype)
            square = torch.linalg.vector_norm(W, dim=1).square()
            square += 2 * self.scaling * ((W @ A.t()) * B).sum(1)
            square += self.scaling**2 * ((B @ (A @ A.t())) * B).sum(1)
            norm = square.clamp_min_(0).sqrt_()
        return self.lora_magnitude / norm

    def added_term(self, x, y, base, training):
        """g · (y + s·dropout(x) Aᵀ Bᵀ) − y, without the bias in y."""
        product = y if base.bias is None else y - base.bias.to(x.dtype)
        term = LoRALinear.added_term(self, x, y, base, training)
        return DoRALinear.gain(self, dense_weight(base)).to(x.dtype) * (product + term) - product

    def fused(self, x):
        """Base and adapter in one operation, then the gain, then the bias."""
        h, weight = operands(self.base_layer, x)
        dropout = self.lora_dropout if self.training else 0.0
        y = lora_linear(h, weight, None, *self.factors(), self.scaling, dropout)
        y = y * self.gain(dense_weight(self.base_layer)).to(h.dtype)
        return (y if self.bias is None else y + self.bias.to(h.dtype)).to(x.dtype)

    def delta(self):
        """What merging adds to W: g · (W + s·BA) − W, (out, in), in at least fp32."""
        weight, delta = dense_weight(self.unmerged), super().delta()
        return (delta + weight) * self.gain(weight).to(delta.dtype)[:, None] - weight


class DoRAPiSSALinear(DoRALinear, PiSSALinear):
    """Both: a magnitude, and factors that start at W's singular directions."""

    PARTS = (*PiSSALinear.PARTS, "lora_magnitude")


@torch.no_grad()
def dora_init(model: nn.Module) -> None:
    """DoRA: give every adapter a trainable magnitude m, (out,), starting at the row lengths of W + s·BA.

    At the start the model computes what it did before. ValueError: a row of zeros, which has no direction. Source: see
    `DoRALinear`.
    """
    layers = dict(_linear_only(model, "DoRA"))
    norms = {path: LoRALinear.delta(layer).add_(dense_weight(layer.base_layer)).norm(dim=1)
             for path, layer in layers.items()}  # fmt: skip
    if zeros := [path for path, norm in norms.items() if (norm == 0).any()]:
        raise ValueError(f"DoRA: rows of zeros have no direction; leave out by exclude_modules: {listed(zeros)}")
    for path, layer in layers.items():
        _become(layer, DoRALinear)
        layer.lora_magnitude = nn.Parameter(norms[path].to(layer.lora_A.dtype))


def _linear_only(model: nn.Module, technique: str) -> list[tuple[str, LoRALinear]]:
    layers = list(active_layers(model))
    if others := {last_two(path) for path, layer in layers if isinstance(layer, LoRAWeight)}:
        raise ValueError(f"{technique} is for linear layers; leave out by exclude_modules: {' '.join(sorted(others))}")
    return layers


def _become(layer: LoRALinear, kind: type) -> None:
    other = PiSSALinear if kind is DoRALinear else DoRALinear
    layer.__class__ = DoRAPiSSALinear if isinstance(layer, other) else kind


def _start_at(layer: LoRALinear, target: torch.Tensor, iterations: int | None) -> None:
    A, B = leading_factors(target, layer.rank, layer.scaling, iterations)
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)


def leading_factors(target: torch.Tensor, rank: int, scaling: float, iterations: int | None = None):
    """A (rank, in) and B (out, rank) such that scaling · BA is `target` cut to its largest singular values.

    The values are shared out evenly between A and B, as PiSSA and LoftQ do. `iterations` as in `pissa_init`.
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
