"""Merging over a whole model: for a while, for good, into dense weights or into NF4, and what each method costs.

An NF4 weight stands on one of 16 levels, 0.08 to 0.3 of the block's largest value apart. A trained ΔW is far smaller,
so that rounding W + ΔW back to 4 bits leaves most codes as they were and loses most of ΔW. That is why `merge_lora`
refuses an NF4 base unless it may become dense. `merge_errors` measures all methods on the model at hand.
"""

import statistics
from dataclasses import dataclass

import torch
from torch import nn

from ..quant import NF4Linear, quantize_nf4
from .base_layer import dense_weight
from .inject import required_lora_layers
from .lora import LoRALinear
from .multi import ModuleToSave, active_layers, modules_with_adapters, take_out
from .names import may_save_whole, named_modules, replace
from .variants import leading_factors

REFIT_ROUNDS = 5
REFIT_ITERATIONS = 8  # of the randomized decomposition; the exact one takes minutes for a model


def merge_lora(model: nn.Module, dequantize: bool = False, untie: bool = False) -> nn.Module:
    """Fold every adapter into its base weight, in place. Layers already merged are left as they are.

    `dequantize` lets NF4 layers become dense ones; a merge into 4 bits would erase the adapter. `untie` gives a base
    weight that is shared (an output head tied to the embedding) a copy of its own first, for good, and sets
    `model.config.tie_word_embeddings` to False, or loading would tie the two again.

    ValueError: no LoRA layers; NF4 layers without `dequantize`; a shared weight without `untie`; a layer that cannot be
    merged (see `LoRALinear.merge_weights`). Nothing is changed then.
    """
    layers = [(name, layer) for name, layer in required_lora_layers(model) if not layer.merged and layer.adapter]
    shared = _shared_weights(model)
    tied = {name: shared[layer.weight] for name, layer in layers if layer.weight in shared}
    if tied and not untie:
        name, names = next(iter(tied.items()))
        raise ValueError(f"the weight of {name!r} is shared ({', '.join(names)}), and merging the adapter would untie "
                         "it; pass untie=True to give the layer a weight of its own")  # fmt: skip
    for name, layer in layers:
        try:
            layer.merge_weights(dequantize)
        except ValueError as error:
            for _, done in layers:
                done.unmerge_weights()
            raise ValueError(f"{name!r}: {error}") from None
    for base in (layer.unmerged for name, layer in layers if name in tied):
        base.weight = nn.Parameter(base.weight.detach().clone(), base.weight.requires_grad)
    if tied and hasattr(model, "config"):
        model.config.tie_word_embeddings = False
    return model


def _shared_weights(model) -> dict[torch.Tensor, list[str]]:
    """Parameter → its names, for the parameters that several modules hold."""
    names: dict[torch.Tensor, list[str]] = {}
    for path, module in named_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, []).append(f"{path}.{name}")
    return {parameter: found for parameter, found in names.items() if len(found) > 1}


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Put every original base layer back, bit for bit. ValueError: the model has no LoRA layers."""
    for _, layer in required_lora_layers(model):
        layer.unmerge_weights()
    return model


def merge_and_unload(model: nn.Module, dequantize: bool = False, untie: bool = False) -> nn.Module:
    """Fold the active adapter into the model and take everything of LoRA out of it, in place, other adapters too.

    Arguments and errors as for `merge_lora`; `untie` is also needed where an adapter has replaced one of two modules
    that shared a weight. Returns the model, with plain layers.
    """
    shared = _shared_weights(model)
    whole = {path: m for path, m in modules_with_adapters(model).items() if isinstance(m, ModuleToSave) and m.adapter}
    torn = [(path, shared[p]) for path, m in whole.items() for p in m.base_layer.parameters() if p in shared]
    if torn and not untie:
        path, names = torn[0]
        raise ValueError(f"the adapter has replaced {path!r}, whose weight is shared ({', '.join(names)}); pass "
                         "untie=True to keep both")  # fmt: skip
    merge_lora(model, dequantize, untie)
    if torn and hasattr(model, "config"):
        model.config.tie_word_embeddings = False
    return unload(model)


def unload(model: nn.Module) -> nn.Module:
    """Take everything of LoRA out of the model, in place: base layers stand where they stood, merged ones as merged."""
    take_out(model, lambda module: module.base_layer if isinstance(module, LoRALinear) else module.current)
    return model


@dataclass(frozen=True)
class MergeErrors:
    """Relative errors of merging: path of the layer → method → ‖result − (W + ΔW)‖ / ‖ΔW‖. `print` it."""

    layers: dict[str, dict[str, float]]

    def median(self, method: str) -> float:
        """The median over the layers that can be merged by this method."""
        return statistics.median_low(errors[method] for errors in self.layers.values() if method in errors)

    def worst(self, method: str) -> float:
        return max(errors[method] for errors in self.layers.values() if method in errors)

    def __str__(self):
        methods = dict.fromkeys(method for errors in self.layers.values() for method in errors)
        lines = [f"merged into      error, median    worst   (of ‖ΔW‖, over {len(self.layers)} layers)"]
        lines += [f"{method:16} {self.median(method):13.2%} {self.worst(method):8.2%}" for method in methods]
        return "\n".join(lines)


def merge_errors(model: nn.Module, four_bits: bool = True) -> MergeErrors:
    """Measure, layer by layer and without changing anything, what every method of merging would lose.

    The error of a method is ‖result − (W + ΔW)‖ / ‖ΔW‖ (Frobenius), W being the weight that the adapter was trained
    on (the dequantized one for NF4). 0 is exact; 1 is as wrong as leaving the adapter out. `four_bits`: also the
    methods that stay NF4, which take a second for a large layer. ValueError: the model has no active adapter.
    """
    return MergeErrors({path: _errors(layer, four_bits) for path, layer in active_layers(model)})


def merge_into_nf4(model: nn.Module, method: str) -> MergeErrors:
    """Merge the active adapter into NF4 layers that stay NF4, in place, and measure what is lost.

    Returns what `merge_errors` measures for these layers. `method` is

    - "requantize": dequantize, add ΔW, quantize again; the adapter is gone;
    - "refit": like LoftQ, quantize and refit A and B (of the same rank) to what quantizing lost, in turns. The layer
      keeps an adapter: for a large ΔW one of corrections, for a small one ΔW itself, as rounding W + ΔW gave W back.

    ValueError: no NF4 layer with an adapter, another adapter on the same weights, an unknown method, or with "refit" a
    DoRA or PiSSA adapter or one whose scaling is 0. Nothing is changed then.
    """
    if method not in ("requantize", "refit"):
        raise ValueError(f"method must be 'requantize' or 'refit', got {method!r}")
    layers = {path: layer for path, layer in active_layers(model) if isinstance(layer.base_layer, NF4Linear)}
    if not layers:
        raise ValueError("the model has no NF4 layer with an active adapter")
    for path, layer in layers.items():
        if method == "refit" and not _can_be_refitted(layer):
            raise ValueError(f"{path!r}: only plain LoRA can be refitted, of a scaling that is not 0")
    if others := sorted({name for layer in layers.values() for name in layer.resting}):
        raise ValueError(f"the weights under the adapters {', '.join(others)} would change; delete these first")
    errors = MergeErrors({path: _errors(layer) for path, layer in layers.items()})
    for layer in layers.values():
        if method == "requantize":
            layer.base_layer.quantized = _quantized_like(layer.base_layer, _target(layer))
            replace(model, {layer: layer.base_layer})
        else:
            layer.base_layer.quantized, A, B = _refit(layer, _target(layer))
            with torch.no_grad():
                layer.lora_A.copy_(A)
                layer.lora_B.copy_(B)
    may_save_whole(model, not modules_with_adapters(model))
    return errors


def _target(layer: LoRALinear) -> torch.Tensor:
    return layer.delta_weight().add_(dense_weight(layer.base_layer).detach())


@torch.no_grad()
def _errors(layer: LoRALinear, four_bits: bool = True) -> dict[str, float]:
    target, length = _target(layer), layer.delta_weight().norm()
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    results = {str(dtype).removeprefix("torch."): target.to(dtype) for dtype in dtypes}
    if four_bits and isinstance(layer.base_layer, NF4Linear):
        results["nf4, requantize"] = _quantized_like(layer.base_layer, target).dequantize(torch.float32)
        if _can_be_refitted(layer):
            quantized, A, B = _refit(layer, target)
            results["nf4, refit"] = quantized.dequantize(torch.float32) + layer.scaling * (B @ A)
    lost = {method: (result - target).norm() for method, result in results.items()}
    return {method: (norm / length).item() if norm else 0.0 for method, norm in lost.items()}


def _can_be_refitted(layer: LoRALinear) -> bool:
    return layer.PARTS == LoRALinear.PARTS and layer.scaling != 0


def _quantized_like(base: NF4Linear, weight: torch.Tensor):
    quantized = base.quantized
    return quantize_nf4(weight.to(quantized.dtype), quantized.block_size, quantized.nested is not None)


@torch.no_grad()
def _refit(layer: LoRALinear, target: torch.Tensor):
    """(Q, A, B) with Q in NF4 and Q + s·BA near the target, the best of REFIT_ROUNDS rounds."""
    best = None
    update = torch.zeros_like(target)
    with torch.random.fork_rng([target.device] if target.is_cuda else []):
        torch.manual_seed(0)
        for _ in range(REFIT_ROUNDS):
            quantized = _quantized_like(layer.base_layer, target - update)
            lost = target - quantized.dequantize(torch.float32)
            A, B = leading_factors(lost, layer.rank, layer.scaling, REFIT_ITERATIONS)
            update = layer.scaling * (B @ A)
            error = (lost - update).norm()
            if best is None or error < best[0]:
                best = error, quantized, A, B
    return best[1:]
