"""Variants of LoRA: each a few lines that set up or read a model's active adapter, in place.

| call | what differs from LoRA | what is saved |
|---|---|---|
| `use_rslora(model)` | scaling α/√r, so that large ranks learn as fast as small ones | `use_rslora` |
| `lora_plus_groups(model, lr)` | B learns `ratio` times as fast as A | plain LoRA |
| `freeze_A(model)` | LoRA-FA: A stays random, only B learns | plain LoRA |
| `pissa_init(model)` | starts at the r largest singular directions of W instead of at zero | plain LoRA of rank 2r |
| `loftq_init(model, original)` | starts at what NF4 rounding took from W | plain LoRA |
| `dora_init(model)` | direction and length of each row of W + ΔW learn separately | `use_dora` |

Call them after `apply_lora_to_model` and before making the optimizer.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..quant import NF4Linear
from .adapter_math import delta_weight, leading_factors
from .inject import lora_layers, lora_parameters
from .lora import LoRALinear, dense_weight


def use_rslora(model: nn.Module) -> None:
    """Scale every adapter by lora_alpha / √rank instead of lora_alpha / rank.

    BA grows like √r for random factors, so α/r shrinks the update as the rank grows, α/√r keeps it.

    Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA".
    """
    for _, layer in _active_layers(model):
        layer.scaling = layer.lora_alpha / math.sqrt(layer.rank)


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0) -> list[dict]:
    """Parameter groups for any optimizer, with a learning rate of lr · ratio for B and lr for the rest.

    A meets inputs of width `in` and B meets S of width r, so with equal rates A moves the output far
    less than B could; the paper finds a ratio of about 16.

    Args:
        lr: of A, and of modules trained whole.
        ratio: λ, at least 1 in the paper.
        weight_decay: of the matrices; vectors (DoRA's magnitudes, which learn at B's rate) get none.

    Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section 4.
    """
    trained = [parameter for parameter in lora_parameters(model) if parameter.requires_grad]
    Bs = {id(layer.lora_B) for _, layer in _active_layers(model)}
    fast = [parameter for parameter in trained if id(parameter) in Bs]
    vectors = [parameter for parameter in trained if parameter.dim() == 1]
    slow = [parameter for parameter in trained if id(parameter) not in Bs and parameter.dim() != 1]
    groups = [
        {"params": slow, "lr": lr, "weight_decay": weight_decay},
        {"params": fast, "lr": lr * ratio, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr * ratio, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def freeze_A(model: nn.Module) -> None:
    """LoRA-FA: train B alone. ΔW then lives in the r directions that A was born with.

    Half as many gradients and optimizer states; and since dA is not needed, the input x of each layer
    need not be kept for backward, only S = x Aᵀ.

    Source: Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation".
    """
    for _, layer in _active_layers(model):
        layer.lora_A.requires_grad_(False)


@torch.no_grad()
def pissa_init(model: nn.Module, iterations: int | None = None) -> None:
    """Start at the principal singular directions: s·B₀A₀ is W cut to rank r, and the rest of W stays frozen.

    PiSSA usually writes the rest, W − s·B₀A₀, over the base weight. Here W is left alone and the layer
    computes W + s·(BA − B₀A₀), the same function, with B₀A₀ kept beside the adapter (`start_A`,
    `start_B`). So the base can still be shared with other adapters, `disable_lora` shows the true
    base, and what `save_adapter` writes, [A; A₀] and [B, −B₀], is a plain LoRA of rank 2r on the
    untouched base.

    Args:
        iterations: None for the exact singular value decomposition; a number for torch's randomized one
            with so many power iterations (much faster on large layers).

    Raises:
        ValueError: an NF4 base; its rounding error is what `loftq_init` starts from.

    Source: Meng et al. 2024, "PiSSA", section 3.
    """
    for path, layer in _active_layers(model):
        if isinstance(layer.base_layer, NF4Linear):
            raise ValueError(f"{path!r} is quantized; pissa_init needs dense weights (for NF4 there is loftq_init)")
    for _, layer in _active_layers(model):
        A, B = leading_factors(dense_weight(layer.base_layer), layer.rank, layer.scaling, iterations)
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
        layer.start_A, layer.start_B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()


@torch.no_grad()
def loftq_init(
    model: nn.Module, original: Mapping[str, torch.Tensor] | str | Path, iterations: int | None = None
) -> dict[str, tuple[float, float]]:
    """Start at the best rank-r correction of the quantization error W − NF4(W), leaving NF4(W) as it is.

    This is LoftQ with one iteration. Its further iterations re-quantize the base to something other
    than NF4(W), which nobody who loads the adapter would have.

    Args:
        model: NF4 layers with adapters.
        original: the weights before quantization, `<path>.weight` by name: a state dict, or the directory of
            the model's safetensors files.
        iterations: as in `pissa_init`.

    Returns:
        Path → (‖W − NF4(W)‖ / ‖W‖ before, ‖W − NF4(W) − s·BA‖ / ‖W‖ after).

    Raises:
        ValueError: no NF4 layer with an adapter, or a weight that is missing or of another shape.

    Source: Li et al. 2023, "LoftQ", section 3.2.
    """
    layers = {path: layer for path, layer in _active_layers(model) if isinstance(layer.base_layer, NF4Linear)}
    if not layers:
        raise ValueError("the model has no NF4 layer with an adapter; quantize_model comes first")
    errors = {}
    with _Weights(original) as weights:
        for path, layer in layers.items():
            weights.check(f"{path}.weight", (layer.out_features, layer.in_features))
        for path, layer in layers.items():
            quantized = dense_weight(layer.base_layer).float()
            W = weights[f"{path}.weight"].to(quantized)
            lost = W - quantized
            A, B = leading_factors(lost, layer.rank, layer.scaling, iterations)
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
            left = lost - delta_weight(layer)
            errors[path] = tuple((part.norm() / W.norm()).item() for part in (lost, left))
    return errors


@torch.no_grad()
def dora_init(model: nn.Module) -> None:
    """DoRA: give every adapter a trainable magnitude m, (out,), starting at the row lengths of W + s·BA.

    The layer then computes with m · (W + s·BA) / ‖W + s·BA‖, row by row; at the start this is W + s·BA.
    Dropout acts on the input of BA alone.

    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", section 4.
    """
    for _, layer in _active_layers(model):
        layer.lora_magnitude = None
        moved = delta_weight(layer).add_(dense_weight(layer.base_layer))
        layer.lora_magnitude = nn.Parameter(moved.norm(dim=1).to(layer.lora_A.dtype))


def _active_layers(model) -> list[tuple[str, LoRALinear]]:
    layers = [(path, layer) for path, layer in lora_layers(model) if layer.lora_A is not None]
    if not layers:
        raise ValueError("the model has no active adapter; call apply_lora_to_model first")
    merged = [path for path, layer in layers if layer.merged]
    if merged:
        raise ValueError(f"the adapter is merged into {merged[0]!r}; call unmerge_lora first")
    return layers


class _Weights:
    """Weights by name, out of a mapping or, one at a time, out of a directory of safetensors files."""

    def __init__(self, source):
        self.source, self.files = source, {}

    def __enter__(self):
        if not isinstance(self.source, Mapping):
            from safetensors import safe_open

            for path in sorted(Path(self.source).glob("*.safetensors")):
                file = safe_open(path, framework="pt").__enter__()
                self.files |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *error):
        for file in set(self.files.values()):
            file.__exit__(*error)

    def __getitem__(self, name):
        return self.source[name] if isinstance(self.source, Mapping) else self.files[name].get_tensor(name)

    def check(self, name, shape):
        if name not in (self.source if isinstance(self.source, Mapping) else self.files):
            raise ValueError(f"original has no {name!r}")
        if tuple(self[name].shape) != shape:
            raise ValueError(f"original: {name!r} must be {shape}, got {tuple(self[name].shape)}")
