"""LoRA over a whole model: put adapters in, freeze the rest, merge, unmerge, leave them out."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from ..quant import NF4Linear
from .lora import LoRALinear, check_settings, is_adaptable
from .multi import active_adapter, carriers


def apply_lora_to_model(
    model: nn.Module,
    rank: int = 8,
    lora_alpha: float = 16.0,
    target_modules: Sequence[str] | str = ("q_proj", "v_proj"),
    lora_dropout: float = 0.0,
) -> nn.Module:
    """Replace the linear layers that `target_modules` names by LoRALinear, in place, and freeze everything else.

    Args:
        model: any module holding nn.Linear or NF4Linear layers below its root.
        rank, lora_alpha, lora_dropout: see LoRALinear.
        target_modules: one of
            - names: each selects the layers whose path ends in it, by whole components ("q_proj" or
              "self_attn.q_proj"; "proj" does not select "q_proj"). Each must select at least one layer.
            - a regular expression, matched against the whole path.
            - "all-linear" (in any case): every linear layer but the output head.

    Returns:
        The model. Calling again with other targets adds to it; the adapters that exist stay trainable.

    Raises:
        ValueError: a setting out of range; a name that selects nothing (the message lists near misses);
            a layer that has an adapter already, or whose parent would bypass one. Nothing is changed then.
    """
    check_settings(rank, lora_alpha, lora_dropout)
    selected = _select(model, target_modules)
    adapted = [name for name, module in selected.items() if isinstance(module, LoRALinear)]
    if adapted:
        raise ValueError(f"{adapted[0]!r} has a LoRA adapter already; adapters do not nest")
    for name in selected:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(f"{name!r}: nn.MultiheadAttention reads this weight itself and would bypass the adapter")
    active = active_adapter(model) or "default"
    made: dict[nn.Module, LoRALinear] = {}  # a layer used under two names gets one adapter
    for name, module in selected.items():
        if module not in made:
            made[module] = LoRALinear(module, rank, lora_alpha, lora_dropout)
            made[module].adapter = active
        model.set_submodule(name, made[module])
    mark_only_lora_as_trainable(model)
    return model


def _select(model: nn.Module, target_modules) -> dict[str, nn.Module]:
    """Path → module of the linear (or already adapted) layers that the targets select, in the model's order."""
    everything = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    inside = tuple(f"{name}." for name, module in everything.items() if isinstance(module, LoRALinear))
    linear = {
        name: module
        for name, module in everything.items()
        if (is_adaptable(module) or isinstance(module, LoRALinear)) and not name.startswith(inside)
    }
    if isinstance(target_modules, str):
        if target_modules.lower() == "all-linear":
            selected = set(linear) - output_heads(model, linear)
            if not selected:
                raise ValueError("target_modules 'all-linear': the model has no linear layer besides its output head")
        else:
            try:
                selected = {name for name in linear if re.fullmatch(target_modules, name)}
            except re.error as error:
                raise ValueError(f"target_modules is no regular expression: {target_modules!r}: {error}") from None
            if not selected:
                hint = f"; did you mean the name, [{target_modules!r}]?" if _ending(linear, target_modules) else ""
                raise ValueError(
                    f"target_modules: the regular expression {target_modules!r} matches the whole path of "
                    f"no linear layer{hint}{_available(linear)}"
                )
        return {name: module for name, module in linear.items() if name in selected}

    if not isinstance(target_modules, Iterable):
        raise TypeError(f"target_modules must be names, a regular expression or 'all-linear', got {target_modules!r}")
    patterns = list(target_modules)
    if not patterns:
        raise ValueError("target_modules must name at least one layer, got an empty sequence")
    selected = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"target_modules must hold strings, got {pattern!r}")
        found = _ending(linear, pattern)
        if not found:
            raise ValueError(_no_match(pattern, linear, everything))
        selected |= found
    return {name: module for name, module in linear.items() if name in selected}


def _ending(names, pattern: str) -> set[str]:
    return {name for name in names if f".{name}".endswith(f".{pattern}")}


def output_heads(model, linear) -> set[str]:
    """The layer that makes the logits: what the model itself names, else any "lm_head"."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return _ending(linear, "lm_head")
    return {name for name, module in linear.items() if module is head}


def _no_match(pattern, linear, everything) -> str:
    other = sorted({type(everything[name]).__name__ for name in _ending(everything, pattern)})
    if other:
        return f"target_modules: {pattern!r} names no linear layer but {', '.join(other)}{_available(linear)}"
    names = {name.rpartition(".")[2] for name in linear} | set(linear)
    near = difflib.get_close_matches(pattern, sorted(names), n=3)
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    return f"target_modules: {pattern!r} matches no linear layer{hint}{_available(linear)}"


def _available(linear) -> str:
    names = sorted({name.rpartition(".")[2] for name in linear})
    return f" (linear layers: {', '.join(names) or 'none'})"


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(path, layer) of every adapted layer, each layer once."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def _required_lora_layers(model) -> list[tuple[str, LoRALinear]]:
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layers; call apply_lora_to_model first")
    return layers


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter of the active adapter, lora_A and lora_B of each layer: what the optimizer gets.

    With `save_modules` also those of the modules that it replaces whole.
    """
    for carrier in carriers(model).values():
        if isinstance(carrier, LoRALinear):
            yield from carrier.parameters(recurse=False)
        elif carrier.adapter is not None:
            yield from carrier.copies[carrier.adapter].parameters()


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Let lora_A and lora_B require gradients and nothing else.

    Raises:
        ValueError: the model has no LoRA layers (everything would be frozen).
    """
    _required_lora_layers(model)
    model.requires_grad_(False)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)


def merge_lora(model: nn.Module, dequantize: bool = False, untie: bool = False) -> nn.Module:
    """Fold every adapter into its base weight, in place. Layers already merged are left as they are.

    Args:
        dequantize: let NF4 layers become dense ones; a merge into 4 bits would erase the adapter.
        untie: give a base weight that is shared (an output head tied to the embedding) a copy of its
            own first, for good, and set `model.config.tie_word_embeddings` to False. Without it, saving
            and loading such a model would tie the two again and lose one of them.

    Raises:
        ValueError: no LoRA layers; NF4 layers without `dequantize`; a shared weight without `untie`; a layer that
            cannot be merged (see `LoRALinear.merge_weights`). Nothing is changed then.
    """
    layers = [(name, layer) for name, layer in _required_lora_layers(model) if not layer.merged]
    layers = [(name, layer) for name, layer in layers if layer.lora_A is not None]
    shared = shared_weights(model)
    tied = {name: shared[layer.weight] for name, layer in layers if layer.weight in shared}
    if tied and not untie:
        name, names = next(iter(tied.items()))
        raise ValueError(
            f"the weight of {name!r} is shared ({', '.join(names)}), and merging the adapter would untie it; "
            "pass untie=True to give the layer a weight of its own"
        )
    packed = [name for name, layer in layers if isinstance(layer.base_layer, NF4Linear)]
    if packed and not dequantize:
        raise ValueError(
            f"{packed[0]!r} holds a 4-bit weight, and merging into 4 bits rounds most of the adapter away; "
            "pass dequantize=True to merge into dense layers"
        )
    for name, layer in layers:
        try:
            layer.merge_weights(dequantize)
        except ValueError as error:
            for _, done in layers:
                done.unmerge_weights()
            raise ValueError(f"{name!r}: {error}") from None
    for name in tied:
        base = model.get_submodule(name).unmerged
        base.weight = nn.Parameter(base.weight.detach().clone(), base.weight.requires_grad)
        if hasattr(model, "config"):
            model.config.tie_word_embeddings = False
    return model


def shared_weights(model) -> dict[torch.Tensor, list[str]]:
    """Parameter → its names, for the parameters that several modules hold."""
    names: dict[torch.Tensor, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, []).append(f"{path}.{name}")
    return {parameter: found for parameter, found in names.items() if len(found) > 1}


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Put every original base layer back, bit for bit.

    Raises:
        ValueError: the model has no LoRA layers.
    """
    for _, layer in _required_lora_layers(model):
        layer.unmerge_weights()
    return model


@contextlib.contextmanager
def disable_lora(model: nn.Module):
    """Within this context the model computes as if it had no adapters, merged or not.

    Nothing about training changes: which parameters require gradients, and what is merged, stay as they were.
    Contexts nest. Raises ValueError for a model without LoRA layers.
    """
    _required_lora_layers(model)
    layers = list(carriers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
