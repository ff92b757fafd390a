"""Which linear layers of a model an adapter goes into: names, an expression, "all-linear", or what is usual."""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Collection, Iterable

from torch import nn

from ..quant import quantization_summary
from ..quant.experts import FusedExperts, dense_experts
from ..quant.readers import listed, new_heads, weights_read
from . import peft_rules
from .adapter_config import chosen_settings, full_matches, is_all_linear, matching
from .base_layer import is_adaptable
from .lora import LoRALinear
from .multi import ModuleToSave
from .names import ending_in, named_modules, outermost, unwrapped
from .parameters import LoRAWeight, parameter_name, parameter_targets
from .text_path import idle_layers

CHOICES = {"rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern",
           "target_parameters"}  # fmt: skip
# The projections that are usually adapted, by the names that architectures give them; the first that are there count.
USUAL = (("q_proj", "v_proj"), ("query", "value"), ("q", "v"), ("q_lin", "v_lin"), ("query_proj", "value_proj"),
         ("query_key_value",), ("qkv_proj",), ("c_attn",), ("Wqkv",), ("wqkv",), ("att_proj",), ("qkv",),
         ("in_proj", "out_proj"), ("key", "receptance"))  # fmt: skip


def select(model: nn.Module, target_modules, rank: int, lora_alpha: float, choices: dict):
    """What the targets and `apply_lora_to_model`'s choices select: path → module, in the model's order, linear or
    adapted already, and path → (rank, alpha, scaling)."""
    for choice in choices.keys() - CHOICES:
        raise TypeError(f"{choice!r} is not a setting of an adapter; those are {', '.join(sorted(CHOICES))}")
    config = chosen_settings(r=rank, lora_alpha=lora_alpha, **choices)
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("layers_pattern needs layers_to_transform")
    linear = _select(model, target_modules, bool(config.target_parameters))
    usual = peft_rules.all_linear_parameters(model) if is_all_linear(target_modules) else ()
    parameters = _parameters(model, config.target_parameters or (), usual)
    found, names = linear | parameters, {path: parameter_name(path, module) for path, module in parameters.items()}
    patterns = {**config.rank_pattern, **config.alpha_pattern}
    if is_all_linear(target_modules):
        _say_which_experts_are_left_out(model, found)
        if usual:  # a rank for each half, as in PEFT
            ranks, alphas = ({r".*\.gate_up_proj": 2 * value} for value in (rank, lora_alpha))
            config = dataclasses.replace(config, rank_pattern={**config.rank_pattern, **ranks},
                                         alpha_pattern={**config.alpha_pattern, **alphas})  # fmt: skip
    kept, excluded = config.narrowed(found, target_modules), matching(config.exclude_modules or [], found)
    chosen = {path: names.get(path, path) for path in kept - excluded}  # patterns are for the parameter's name
    matches = full_matches([rf"(?:.*\.)?(?:{pattern})" for pattern in patterns], chosen.values())
    for name, value, fitting in (
        ("layers_to_transform", config.layers_to_transform, kept),
        ("exclude_modules", config.exclude_modules, excluded),
        *(("rank_pattern or alpha_pattern", key, m) for key, m in zip(patterns, matches, strict=True)),
    ):
        if value not in (None, []) and not fitting:
            raise ValueError(f"{name}: {value!r} fits none of the layers that target_modules selects")
    _check_each(model, config)
    if not chosen:
        raise ValueError(f"exclude_modules {config.exclude_modules!r} leaves none of the layers that are selected")
    values = config.settings(chosen.values())
    return ({path: module for path, module in found.items() if path in chosen},
            {path: values[name] for path, name in chosen.items()})  # fmt: skip


def _check_each(model: nn.Module, config) -> None:
    """That each name and number of a list is there in the model, if not among the selected layers."""
    numbers, left_out = config.layers_to_transform, config.exclude_modules
    linear = linear_layers(model) if isinstance(numbers, list) else ()
    for number in numbers if isinstance(numbers, list) else ():
        if not dataclasses.replace(config, layers_to_transform=[number]).narrowed(linear, None):
            raise ValueError(f"layers_to_transform: {numbers!r}: {number} fits none of the layers")
    if isinstance(left_out, list):
        paths = {*dict(named_modules(model, remove_duplicate=False)), *parameter_targets(model)}
        for name in left_out:
            if not ending_in(paths, [name]):
                raise ValueError(f"exclude_modules: {name!r} fits none of the model's modules")


def linear_layers(model: nn.Module, in_attention: bool = False) -> dict[str, nn.Module]:
    """Path → module of the layers that LoRA can adapt or has adapted; not those inside adapters, nor, unless
    `in_attention`, inside nn.MultiheadAttention, which reads their weights itself."""
    closed = (LoRALinear, ModuleToSave) if in_attention else (LoRALinear, ModuleToSave, nn.MultiheadAttention)
    outer = _outside(dict(named_modules(model, remove_duplicate=False)), closed)
    return {path: module for path, module in outer.items() if not isinstance(module, LoRAWeight)
            if isinstance(module, LoRALinear) or is_adaptable(module)}  # fmt: skip


def outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path → module of everything but the insides of adapted layers and modules."""
    return _outside(dict(named_modules(model)), (LoRALinear, ModuleToSave))


def _outside(modules: dict[str, nn.Module], closed: tuple[type, ...]) -> dict[str, nn.Module]:
    inside = tuple(f"{path}." for path, module in modules.items() if isinstance(module, closed))
    return {path: module for path, module in modules.items() if path and not path.startswith(inside)}


def _parameters(model: nn.Module, names: Collection[str], usual: Collection[str]) -> dict[str, nn.Module]:
    """Path → module of what holds parameters with these names, each of which must be there, or these usual ones."""
    modules = linear_layers(model) | parameter_targets(model)
    known = {parameter_name(path, module): path for path, module in modules.items()}
    for name in names:
        if not ending_in(known, [name]):
            others = ", ".join(sorted({last_two(full) for full in known}))
            raise ValueError(f"target_parameters: {name!r} is not a parameter that can be adapted; those are {others}")
    chosen = {known[name] for name in ending_in(known, [*names, *usual])}
    return {path: module for path, module in modules.items() if path in chosen}


def last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _select(model: nn.Module, target_modules, may_be_none: bool) -> dict[str, nn.Module]:
    """Path → module of the linear (or already adapted) layers that the targets select, in the model's order."""
    linear = linear_layers(model, in_attention=True)
    last = sorted({name.rpartition(".")[2] for name in linear})
    available = f" (linear layers: {', '.join(last) or 'none'})"
    if target_modules is None:
        target_modules = next((names for names in USUAL if all(ending_in(linear, [name]) for name in names)), None)
        if target_modules is None:
            raise ValueError(f"target_modules=None: nothing is usual for {type(model).__name__}{available}")
    if is_all_linear(target_modules):
        heads = tuple(f"{head}." for head in new_heads(unwrapped(model)))
        selected = set(linear_layers(model)) - output_heads(model, linear)
        selected = {path for path in selected if not f"{path}.".startswith(heads)}
        read = weights_read(model, selected)
        idle = idle_layers(model, {path: linear[path] for path in selected - read})
        _say_what_is_left_out(model, heads, read, idle)
        selected -= read | idle
        if not selected:
            raise ValueError("target_modules 'all-linear': the model has no linear layer besides its output head")
    elif isinstance(target_modules, str):
        try:
            selected = {name for name in linear if re.fullmatch(target_modules, name)}
        except re.error as error:
            raise ValueError(f"target_modules is not a regular expression: {target_modules!r}: {error}") from None
        if not selected:
            hint = f"; did you mean the name, [{target_modules!r}]?" if ending_in(linear, [target_modules]) else ""
            raise ValueError(f"target_modules: the regular expression {target_modules!r} matches the whole path of no "
                             f"linear layer{hint}{available}")  # fmt: skip
    elif isinstance(target_modules, Iterable):
        patterns, selected = list(target_modules), set()
        if not patterns and not may_be_none:
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
    for name in selected - linear_layers(model).keys():
        raise ValueError(f"{name!r}: nn.MultiheadAttention reads this weight itself and would bypass the adapter")
    return {name: module for name, module in linear.items() if name in selected}


def _say_what_is_left_out(model: nn.Module, heads: tuple[str, ...], read: set[str], idle: set[str]) -> None:
    """Warnings about the linear layers, attention and subclasses of nn.Linear that "all-linear" does not adapt."""
    linear, outer = linear_layers(model), outer_modules(model)
    kinds = nn.Linear, nn.MultiheadAttention
    left = outermost(path for path, module in outer.items() if isinstance(module, kinds) and path not in linear)
    left = [path for path in left if not f"{path}.".startswith(heads)]
    named = ", ".join(f"{path} ({type(outer[path]).__name__})" for path in left[:5])
    ways = f"which compute in ways of their own: {named}{', …' * (len(left) > 5)}"
    for paths, why in ((idle, "which text does not train"), (read, "whose weights the model's code reads itself"),
                       (left, ways)):  # fmt: skip
        if paths:
            which = f"{len(left)} modules" if paths is left else listed(paths)
            part = f"{share(model, paths):.1%} of the parameters"
            warnings.warn(f"all-linear leaves out {which} with {part}, {why}", stacklevel=6)


def _say_which_experts_are_left_out(model: nn.Module, found: Collection[str]) -> None:
    experts = {path: m for path, m in parameter_targets(model).items() if isinstance(m, FusedExperts)}
    left = {path: m.shape.numel() for path, m in experts.items() if path not in found}
    names, layers = sorted({last_two(path) for path in left}), {path.rpartition(".")[0] for path in experts}
    left |= {path: count for path, (_, count) in dense_experts(model).items() if path not in layers}
    if left:
        part = f"{sum(left.values()) / quantization_summary(model).total.parameters:.1%} of the parameters"
        which = f"experts, of which target_parameters reaches {', '.join(names) or 'none'}"
        warnings.warn(f"all-linear leaves out {listed(left)} with {part}, {which}", stacklevel=4)


def share(model: nn.Module, paths: Collection[str]) -> float:
    """The part of the model's parameters that these modules hold; of a weight in 4 bits its elements count."""
    modules = dict(named_modules(model, remove_duplicate=False))
    held = sum(quantization_summary(module).total.parameters for module in {modules[path] for path in paths})
    return held / quantization_summary(model).total.parameters


def output_heads(model, linear) -> set[str]:
    """The layer that makes the logits: what the model itself names, else any "lm_head"."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return ending_in(linear, ["lm_head"])
    return {name for name, module in linear.items() if module is head}


def _no_match(pattern, linear, model) -> str:
    whole = [module for module in model.modules() if isinstance(module, ModuleToSave)]
    if any(ending_in(dict(module.base_layer.named_modules()), [pattern]) for module in whole):
        return "names layers inside a module that is trained whole"
    if parameters := ending_in(parameter_targets(model), [pattern]):
        return f"names no linear layer but parameters, {listed(parameters)}; put it in target_parameters"
    other = sorted({type(module).__name__ for name, module in named_modules(model) if ending_in([name], [pattern])})
    if other:
        return f"names no linear layer but {', '.join(other)}"
    names = {name.rpartition(".")[2] for name in linear} | set(linear)
    near = difflib.get_close_matches(pattern, sorted(names), n=3)
    return "matches no linear layer" + (f"; did you mean {', '.join(map(repr, near))}?" if near else "")
