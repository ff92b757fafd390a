"""LoRA over a whole model: put adapters into the layers that are named, freeze the rest, leave adapters out."""

import contextlib
import warnings
from collections.abc import Sequence

from torch import nn

from ..quant.readers import listed, new_heads
from . import multi
from .adapter_config import is_all_linear
from .lora import LoRALinear, check_settings, lora_layers
from .multi import active_adapter, lora_parameters
from .names import replace, train_only, unwrapped
from .parameters import kind_for, place
from .targets import select, share
from .text_path import idle_layers

Targets = Sequence[str] | str | None


def apply_lora_to_model(model: nn.Module, rank: int = 8, lora_alpha: float = 16.0,
                        target_modules: Targets = ("q_proj", "v_proj"), lora_dropout: float = 0.0,
                        **choices) -> nn.Module:  # fmt: skip
    """Replace the linear layers that `target_modules` names by LoRALinear, in place, and freeze everything else.

    `target_modules` is one of

    - names: each selects the layers whose path ends in it, by whole components ("q_proj" or "self_attn.q_proj";
      "proj" does not select "q_proj"), and must select at least one;
    - a regular expression, matched against the whole path;
    - "all-linear" (in any case): every linear layer but the output head, and, in a language model of transformers, but
      those that text does not train (a vision tower) and those whose weight the model's code reads instead of calling
      them; also routers and fused experts, where PEFT's does. Warnings name what it leaves out. The head of a
      classifier, which is new, is trained whole (`save_modules`);
    - None: the layers usual for the architecture.

    `choices`: PEFT's `exclude_modules`, `layers_to_transform` with `layers_pattern`, `rank_pattern`, `alpha_pattern`,
    and `target_parameters`, ends of the names of parameters: of fused experts, such as "mlp.experts.down_proj", each
    gets an adapter of its own, without dropout; `target_modules` may then be empty.

    Returns the model. Calling again adds to the active adapter; what exists keeps its `requires_grad`.
    ValueError: a setting out of range; a name or choice that fits nothing (the message lists near misses); a layer that
    has an adapter already, or whose parent would bypass one. Nothing is changed then.
    """
    trained = [p for p in multi.adapter_parameters(model) if p.requires_grad]
    settings = rank, lora_alpha, lora_dropout
    return _put_in(model, active_adapter(model) or "default", settings, target_modules, choices, trained)


def add_adapter(model: nn.Module, name: str, rank: int = 8, lora_alpha: float = 16.0,
                target_modules: Targets = ("q_proj", "v_proj"), lora_dropout: float = 0.0,
                **choices) -> nn.Module:  # fmt: skip
    """A fresh adapter of this name, the model's first or beside others. It becomes active, and the only one trained.

    Arguments and errors as for `apply_lora_to_model`; also ValueError: the name is in use, or an adapter is merged.
    """
    multi.check_name(name)
    if name in multi.adapter_names(model):
        raise ValueError(f"the model has an adapter {name!r} already")
    multi.check_unmerged(model)
    return _put_in(model, name, (rank, lora_alpha, lora_dropout), target_modules, choices, [])


def _put_in(model, name: str, settings: tuple, target_modules, choices: dict, trained: list) -> nn.Module:
    """The adapter `name` into the selected layers; of the parameters that exist, `trained` stay trainable."""
    rank, lora_alpha, lora_dropout = check_settings(*settings)
    selected, values = select(model, target_modules, rank, lora_alpha, choices)
    for path, module in selected.items():
        if isinstance(module, LoRALinear) and multi.adapter_of(module, name) is not None:
            raise ValueError(f"{path!r} has a LoRA adapter already; adapters do not nest")
        if isinstance(module, LoRALinear) and module.merged:
            raise ValueError(f"an adapter is merged into {path!r}; call unmerge_lora first")
        if lora_dropout and kind_for(multi.original(module)) is not LoRALinear:
            raise ValueError(f"lora_dropout must be 0 where experts or routers are adapted, got {lora_dropout}")
    new: dict[nn.Module, multi.RestingAdapter] = {}
    for path, module in selected.items():
        if module not in new:  # a layer used under two names gets one adapter
            base = multi.original(module)
            new[module] = multi.RestingAdapter.of(kind_for(base)(base, *values[path][:2], lora_dropout))
    place(model, selected)
    multi.put_in(model, name, new)
    train_only(model, [*trained, *(p for adapter in new.values() for p in adapter.parameters())])
    if is_all_linear(target_modules):
        multi.save_modules(model, new_heads(unwrapped(model)))
    return model


def leave_out_idle(model: nn.Module) -> None:
    """Take the adapters out of layers that text does not train, and warn. ValueError: it trains none of them."""
    layers = dict(lora_layers(model))
    idle = idle_layers(model, layers)
    if len(idle) == len(layers):
        raise ValueError(f"target_modules: text trains none of the selected layers, {listed(idle)}")
    if idle:
        part = f"{share(model, idle):.1%} of the parameters"
        warnings.warn(f"left without adapters: {listed(idle)} with {part}, which text does not train", stacklevel=2)
        replace(model, {layers[path]: layers[path].base_layer for path in idle})


def required_lora_layers(model) -> list[tuple[str, LoRALinear]]:
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layers; call apply_lora_to_model first")
    return layers


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Let all of the active adapter require gradients and nothing else. ValueError: the model has no LoRA layers."""
    required_lora_layers(model)
    train_only(model, lora_parameters(model))


@contextlib.contextmanager
def disable_lora(model: nn.Module):
    """Within this context, which nests, the model computes as if it had no adapters, merged or not. ValueError: it has
    no LoRA layers."""
    required_lora_layers(model)
    with multi.disabled(multi.modules_with_adapters(model).values()):
        yield model
