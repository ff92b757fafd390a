"""Merging for good: into dense weights, or into NF4, and what each way costs.

An NF4 weight stands on one of 16 levels, 0.08 to 0.3 of the block's largest value apart. A trained ΔW
is far smaller than that, so that rounding W + ΔW back to 4 bits leaves most codes as they were and
loses most of ΔW, while adding an error of its own. That is why `merge_lora` refuses an
NF4 base unless it may become dense. `merge_errors` measures all ways on the model at hand.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..quant import NF4Linear, quantize_nf4
from .adapter_math import leading_factors
from .inject import lora_layers, merge_lora, shared_weights
from .lora import LoRALinear, dense_weight
from .multi import ModuleToSave, carriers

REFIT_ROUNDS = 5
REFIT_ITERATIONS = 8  # of the randomized decomposition; the exact one takes minutes for a model


def merge_and_unload(model: nn.Module, dequantize: bool = False, untie: bool = False) -> nn.Module:
    """Fold the active adapter into the model and take everything of LoRA out of it, in place.

    Adapters that are not active go too.

    Args:
        dequantize, untie: see `merge_lora`; `untie` is also needed where an adapter has replaced one of two
            modules that shared a weight.

    Returns:
        The model, with plain layers.

    Raises:
        ValueError: as `merge_lora`; nothing is changed then.
    """
    shared, torn = shared_weights(model), False
    for path, carrier in carriers(model).items():
        if isinstance(carrier, ModuleToSave) and carrier.adapter is not None:
            tied = [names for p in carrier.base_layer.parameters() for names in [shared.get(p)] if names]
            if tied and not untie:
                raise ValueError(
                    f"the adapter has replaced {path!r}, whose weight is shared ({', '.join(tied[0])}); "
                    "pass untie=True to keep both"
                )
            torn = torn or bool(tied)
    merge_lora(model, dequantize, untie)
    if torn and hasattr(model, "config"):
        model.config.tie_word_embeddings = False
    return unload(model)


def merge_errors(model: nn.Module, four_bits: bool = True) -> "MergeErrors":
    """Measure, layer by layer and without changing anything, what every way of merging would lose.

    The error of a way is ‖result − (W + ΔW)‖ / ‖ΔW‖ (Frobenius), W being the weight that the adapter was
    trained on (the dequantized one for NF4). 0 is exact; 1 is as wrong as leaving the adapter out.

    Args:
        four_bits: also the ways that stay NF4, which take a second a large layer.

    Raises:
        ValueError: the model has no active adapter.
    """
    return MergeErrors({path: _errors(layer, four_bits) for path, layer in _trained_layers(model)})


def merge_into_nf4(model: nn.Module, method: str) -> "MergeErrors":
    """Merge the active adapter into NF4 layers that stay NF4, in place, and measure what is lost.

    Args:
        method:
            - "requantize": dequantize, add ΔW, quantize again; the adapter is gone.
            - "refit": like LoftQ, quantize and refit A and B (of the same rank) to what quantizing lost, in
              turns. The layer keeps an adapter: for a large ΔW one that holds mostly corrections, for a
              small one the ΔW itself again, since rounding W + ΔW gave W back.

    Returns:
        What `merge_errors` measures for these layers.

    Raises:
        ValueError: no NF4 layer with an adapter, an unknown method, or a DoRA or PiSSA adapter with "refit".
    """
    if method not in ("requantize", "refit"):
        raise ValueError(f"method must be 'requantize' or 'refit', got {method!r}")
    layers = [(path, layer) for path, layer in _trained_layers(model) if isinstance(layer.base_layer, NF4Linear)]
    if not layers:
        raise ValueError("the model has no NF4 layer with an active adapter")
    special = [path for path, layer in layers if layer.start_A is not None or layer.lora_magnitude is not None]
    if method == "refit" and special:
        raise ValueError(f"{special[0]!r}: only plain LoRA can be refitted")
    errors = MergeErrors({path: _errors(layer) for path, layer in layers})
    for path, layer in layers:
        target = _target(layer)
        if method == "requantize":
            layer.base_layer.quantized = _quantized_like(layer.base_layer, target)
            model.set_submodule(path, layer.base_layer)
        else:
            quantized, A, B = _refit(layer, target)
            layer.base_layer.quantized = quantized
            with torch.no_grad():
                layer.lora_A.copy_(A)
                layer.lora_B.copy_(B)
    return errors


@dataclass(frozen=True)
class MergeErrors:
    """Relative errors of merging: path of the layer → way → ‖result − (W + ΔW)‖ / ‖ΔW‖. `print` it."""

    layers: dict[str, dict[str, float]]

    def median(self, way: str) -> float:
        """The median over the layers that can be merged this way."""
        return torch.tensor([errors[way] for errors in self.layers.values() if way in errors]).median().item()

    def worst(self, way: str) -> float:
        return max(errors[way] for errors in self.layers.values() if way in errors)

    def __str__(self):
        ways = list(dict.fromkeys(way for errors in self.layers.values() for way in errors))
        lines = [f"merged into      error, median    worst   (of ‖ΔW‖, over {len(self.layers)} layers)"]
        lines += [f"{way:16} {self.median(way):13.2%} {self.worst(way):8.2%}" for way in ways]
        return "\n".join(lines)


def _trained_layers(model) -> list[tuple[str, LoRALinear]]:
    layers = [(path, layer) for path, layer in lora_layers(model) if layer.lora_A is not None]
    if not layers:
        raise ValueError("the model has no active adapter")
    merged = [path for path, layer in layers if layer.merged]
    if merged:
        raise ValueError(f"the adapter is merged into {merged[0]!r}; call unmerge_lora first")
    return layers


@torch.no_grad()
def _target(layer: LoRALinear) -> torch.Tensor:
    delta = layer.delta_weight()
    return delta.add_(dense_weight(layer.base_layer))


@torch.no_grad()
def _errors(layer: LoRALinear, four_bits: bool = True) -> dict[str, float]:
    target, length = _target(layer), layer.delta_weight().norm()
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    results = {str(dtype).removeprefix("torch."): target.to(dtype) for dtype in dtypes}
    if four_bits and isinstance(layer.base_layer, NF4Linear):
        results["nf4, requantize"] = _quantized_like(layer.base_layer, target).dequantize(torch.float32)
        if layer.start_A is None and layer.lora_magnitude is None and layer.scaling:
            quantized, A, B = _refit(layer, target)
            results["nf4, refit"] = quantized.dequantize(torch.float32) + layer.scaling * (B @ A)
    lost = {way: (result - target).norm() for way, result in results.items()}
    return {way: (norm / length).item() if norm else 0.0 for way, norm in lost.items()}


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


def unload(model: nn.Module) -> nn.Module:
    """Take everything of LoRA out of the model, in place: base layers stand where they stood, merged ones as merged."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LoRALinear):
            model.set_submodule(path, module.base_layer)
        elif isinstance(module, ModuleToSave):
            model.set_submodule(path, module.current)
    return model
