"""LoRA over a whole model: put adapters into the layers that are named, freeze the rest, leave adapters out."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

from .lora import LoRALinear, check_settings, lora_layers
from .multi import active_adapter, ending_in, linear_layers, lora_parameters, modules_with_adapters


def apply_lora_to_model(
    model: nn.Module,
    rank: int = 8,
    lora_alpha: float = 16.0,
    target_modules: Sequence[str] | str = ("q_proj", "v_proj"),
    lora_dropout: float = 0.0,
) -> nn.Module:
    """Replace the linear layers that `target_modules` names by LoRALinear, in place, and freeze everything else.

    `target_modules` is one of

    - names: each selects the layers whose path ends in it, by whole components ("q_proj" or "self_attn.q_proj";
      "proj" does not select "q_proj"), and must select at least one;
    - a regular expression, matched against the whole path;
    - "all-linear" (in any case): every linear layer but the output head.

    Returns the model. Calling again with other targets adds to it; the adapters that exist stay trainable.

    ValueError: a setting out of range; a name that selects nothing (the message lists near misses); a layer that has an
    adapter already, or whose parent would bypass one. Nothing is changed then.
    """
    check_settings(rank, lora_alpha, lora_dropout)
    selected = _select(model, target_modules)
    for name, module in selected.items():
        if isinstance(module, LoRALinear):
            raise ValueError(f"{name!r} has a LoRA adapter already; adapters do not nest")
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise ValueError(f"{name!r}: nn.MultiheadAttention reads this weight itself and would bypass the adapter")
    active = active_adapter(model) or "default"
    made: dict[nn.Module, LoRALinear] = {}  # a layer used under two names gets one adapter
    for module in dict.fromkeys(selected.values()):
        made[module] = LoRALinear(module, rank, lora_alpha, lora_dropout)
        made[module].adapter = active
    for name, module in selected.items():
        model.set_submodule(name, made[module])
    mark_only_lora_as_trainable(model)
    return model


def _select(model: nn.Module, target_modules) -> dict[str, nn.Module]:
    """Path → module of the linear (or already adapted) layers that the targets select, in the model's order."""
    linear = linear_layers(model, in_attention=True)
    last = sorted({name.rpartition(".")[2] for name in linear})
    available = f" (linear layers: {', '.join(last) or 'none'})"
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        selected = set(linear) - output_heads(model, linear)
        if not selected:
            raise ValueError("target_modules 'all-linear': the model has no linear layer besides its output head")
    elif isinstance(target_modules, str):
        try:
            selected = {name for name in linear if re.fullmatch(target_modules, name)}
        except re.error as error:
            raise ValueError(f"target_modules is not a regular expression: {target_modules!r}: {error}") from None
        if not selected:
            hint = f"; did you mean the name, [{target_modules!r}]?" if ending_in(linear, [target_modules]) else ""
            raise ValueError(
                f"target_modules: the regular expression {target_modules!r} matches the whole path of "
                f"no linear layer{hint}{available}"
            )
    elif isinstance(target_modules, Iterable):
        patterns, selected = list(target_modules), set()
        if not patterns:
            raise ValueError("target_modules must name at least one layer, got an empty sequence")
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise ValueError(f"target_modules must hold strings, got {pattern!r}")
            found = ending_in(linear, [pattern])
            if not found:
                raise ValueError(f"target_modules: {pattern!r} {_no_match(pattern, linear, model)}{available}")
            selected |= found
    else:
        raise TypeError(f"target_modules must be names, a regular expression or 'all-linear', got {target_modules!r}")
    return {name: module for name, module in linear.items() if name in selected}


def output_heads(model, linear) -> set[str]:
    """The layer that makes the logits: what the model itself names, else any "lm_head"."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return ending_in(linear, ["lm_head"])
    return {name for name, module in linear.items() if module is head}


def _no_match(pattern, linear, model) -> str:
    other = sorted({type(module).__name__ for name, module in model.named_modules() if ending_in([name], [pattern])})
    if other:
        return f"names no linear layer but {', '.join(other)}"
    names = {name.rpartition(".")[2] for name in linear} | set(linear)
    near = difflib.get_close_matches(pattern, sorted(names), n=3)
    return "matches no linear layer" + (f"; did you mean {', '.join(map(repr, near))}?" if near else "")


def required_lora_layers(model) -> list[tuple[str, LoRALinear]]:
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layers; call apply_lora_to_model first")
    return layers


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Let lora_A and lora_B require gradients and nothing else. ValueError: the model has no LoRA layers."""
    required_lora_layers(model)
    model.requires_grad_(False)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)


@contextlib.contextmanager
def disable_lora(model: nn.Module):
    """Within this context the model computes as if it had no adapters, merged or not; nothing else changes.

    Contexts nest. Raises ValueError for a model without LoRA layers.
    """
    required_lora_layers(model)
    enabled = [module for module in modules_with_adapters(model).values() if module.enabled]
    for module in enabled:
        module.enabled = False
    try:
        yield model
    finally:
        for module in enabled:
            module.enabled = True
