"""Which linear layers of a model an adapter goes into: names, an expression, "all-linear", or what is usual."""

import difflib
import re
import warnings
from collections.abc import Iterable

from torch import nn

from .adapter_config import chosen_settings, full_matches, matching
from .multi import ModuleToSave, ending_in, linear_layers, outer_modules, outermost
from .names import named_modules, unwrapped

CHOICES = {"rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern"}
# The projections that are usually adapted, by the names that architectures give them; the first that are there count.
USUAL = (("q_proj", "v_proj"), ("query", "value"), ("q", "v"), ("q_lin", "v_lin"), ("query_proj", "value_proj"),
         ("query_key_value",), ("qkv_proj",), ("c_attn",), ("Wqkv",), ("wqkv",), ("att_proj",), ("qkv",),
         ("in_proj", "out_proj"), ("key", "receptance"))  # fmt: skip


def select(model: nn.Module, target_modules, rank: int, lora_alpha: float, choices: dict):
    """What the targets and `apply_lora_to_model`'s choices select: path → module, in the model's order, linear or
    adapted already, and path → (rank, alpha, scaling)."""
    for choice in choices.keys() - CHOICES:
        raise TypeError(f"{choice!r} is no setting of an adapter; those are {', '.join(sorted(CHOICES))}")
    config = chosen_settings(r=rank, lora_alpha=lora_alpha, **choices)
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("layers_pattern needs layers_to_transform")
    found = _select(model, target_modules)
    kept, excluded = config.narrowed(found, target_modules), matching(config.exclude_modules or [], found)
    patterns = {**config.rank_pattern, **config.alpha_pattern}
    matches = full_matches([rf"(?:.*\.)?(?:{pattern})" for pattern in patterns], kept - excluded)
    for name, value, fitting in (
        ("layers_to_transform", config.layers_to_transform, kept),
        ("exclude_modules", config.exclude_modules, excluded),
        *(("rank_pattern or alpha_pattern", key, m) for key, m in zip(patterns, matches, strict=True)),
    ):
        if value not in (None, []) and not fitting:
            raise ValueError(f"{name}: {value!r} fits none of the layers that target_modules selects")
    if not kept - excluded:
        raise ValueError(f"exclude_modules {config.exclude_modules!r} leaves none of the layers that are selected")
    return {path: module for path, module in found.items() if path in kept - excluded}, config.settings(kept - excluded)


def _select(model: nn.Module, target_modules) -> dict[str, nn.Module]:
    """Path → module of the linear (or already adapted) layers that the targets select, in the model's order."""
    linear = linear_layers(model, in_attention=True)
    last = sorted({name.rpartition(".")[2] for name in linear})
    available = f" (linear layers: {', '.join(last) or 'none'})"
    if target_modules is None:
        target_modules = next((names for names in USUAL if all(ending_in(linear, [name]) for name in names)), None)
        if target_modules is None:
            raise ValueError(f"target_modules=None: nothing is usual for {type(model).__name__}{available}")
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        heads = tuple(f"{head}." for head in new_heads(model))
        selected = set(linear_layers(model)) - output_heads(model, linear)
        selected = {path for path in selected if not f"{path}.".startswith(heads)}
        if not selected:
            raise ValueError("target_modules 'all-linear': the model has no linear layer besides its output head")
        _say_what_is_left_out(model, heads)
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
    for name in selected - linear_layers(model).keys():
        raise ValueError(f"{name!r}: nn.MultiheadAttention reads this weight itself and would bypass the adapter")
    return {name: module for name, module in linear.items() if name in selected}


def new_heads(model: nn.Module) -> list[str]:
    """What a transformers model has beside its base model, if that makes no logits over a vocabulary: a new head."""
    model = unwrapped(model)
    base = getattr(model, "base_model", model)
    if base is model or not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is not None:
        return []
    heads = {name: child for name, child in model.named_children() if child is not base}
    return [name for name, head in heads.items() if next(head.parameters(), None) is not None]


def _say_what_is_left_out(model: nn.Module, heads: tuple[str, ...]) -> None:
    """A warning about attention and subclasses of nn.Linear that compute in ways of their own."""
    linear, outer = linear_layers(model), outer_modules(model)
    kinds = nn.Linear, nn.MultiheadAttention
    left = outermost(path for path, module in outer.items() if isinstance(module, kinds) and path not in linear)
    left = [path for path in left if not f"{path}.".startswith(heads)]
    if left:
        share = sum(p.numel() for path in left for p in outer[path].parameters())
        share /= sum(p.numel() for p in model.parameters())
        named = ", ".join(f"{path} ({type(outer[path]).__name__})" for path in left[:5])
        warnings.warn(f"all-linear leaves out {len(left)} modules with {share:.1%} of the parameters, which compute in "
                      f"ways of their own: {named}{', …' if len(left) > 5 else ''}", stacklevel=6)  # fmt: skip


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
    other = sorted({type(module).__name__ for name, module in named_modules(model) if ending_in([name], [pattern])})
    if other:
        return f"names no linear layer but {', '.join(other)}"
    names = {name.rpartition(".")[2] for name in linear} | set(linear)
    near = difflib.get_close_matches(pattern, sorted(names), n=3)
    return "matches no linear layer" + (f"; did you mean {', '.join(map(repr, near))}?" if near else "")
