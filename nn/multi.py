"""Several adapters in one model, of which one is active; where it has no part, a layer computes as its base.

Every LoRALinear holds the active adapter in `lora_A`, `lora_B` and its settings, and the others in `layer.resting`, by
name. Switching exchanges the Parameter objects themselves: no value is copied, so every bit stays, `requires_grad` and
optimizer state stay with their parameter, and `.to()` and `state_dict()` reach all adapters. What is active and what is
trained are two things.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from ..quant.experts import dequantize_experts
from ..quant.linear import FrozenNF4
from .base_layer import base_forward
from .lora import LoRALinear, autocast_input, lora_layers
from .names import StandsFor, ending_in, may_save_whole, named_modules, outermost, replace
from .parameters import LoRAWeight, kind_for

SETTINGS = ("rank", "lora_alpha", "scaling", "lora_dropout")


class RestingAdapter(nn.Module):
    """What one layer has of an adapter that is not active; `kind` is the layer's class when it is."""

    def __init__(self, kind: type[LoRALinear], contents: dict):
        super().__init__()
        self.kind, self.PARTS = kind, kind.PARTS
        _hold(self, contents)

    @classmethod
    def of(cls, layer: LoRALinear) -> "RestingAdapter":
        return cls(type(layer), {name: getattr(layer, name) for name in layer.PARTS + SETTINGS})

    def factors(self):
        return self.kind.factors(self)

    def added_term(self, x, y, base, training):
        return self.kind.added_term(self, x, y, base, training)


def _hold(module: nn.Module, contents: dict) -> None:
    for name, value in contents.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            module.register_buffer(name, value)
        else:
            setattr(module, name, value)


class ModuleToSave(StandsFor):
    """A module that adapters replace whole (PEFT's `modules_to_save`): the original, and a copy for each adapter.

    `adapter` is the name of the copy in use (None: the original is); `enabled` False puts the original in use.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.base_layer = module.requires_grad_(False)
        self.copies = nn.ModuleDict()
        self.adapter, self.enabled = None, True
        self.train(module.training)

    @property
    def current(self) -> nn.Module:
        return self.copies[self.adapter] if self.enabled and self.adapter is not None else self.base_layer

    def _holder(self, name):
        own = name in ("base_layer", "copies", "adapter", "enabled", "training", "forward") or name.startswith("_")
        return super() if own else self.current

    def __setattr__(self, name, value):
        self._holder(name).__setattr__(name, value)

    def __delattr__(self, name):
        self._holder(name).__delattr__(name)

    def forward(self, *args, **kwargs):
        return self.current(*args, **kwargs)


def modules_with_adapters(model: nn.Module) -> dict[str, LoRALinear | ModuleToSave]:
    """Path → module of everything in the model that adapters live in."""
    return {path: module for path, module in named_modules(model) if isinstance(module, (LoRALinear, ModuleToSave))}


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters, active or not."""
    modules = modules_with_adapters(model).values()
    return [p for module in modules for name, p in module.named_parameters() if not name.startswith("base_layer.")]


def original(module: nn.Module) -> nn.Module:
    """The model's own module, without the adapters around it."""
    return module.base_layer if isinstance(module, (LoRALinear, ModuleToSave)) else module


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter of the active adapter, also of the modules that it replaces whole: what the optimizer gets."""
    for module in modules_with_adapters(model).values():
        if isinstance(module, LoRALinear):
            yield from module.parameters(recurse=False)
        elif module.adapter is not None:
            yield from module.copies[module.adapter].parameters()


def put_in(model: nn.Module, name: str, new: dict[nn.Module, nn.Module]) -> None:
    """Give modules, adapted already or not, their parts of the adapter `name` (RestingAdapters and copies), and make it
    active. A module that has a part of it keeps this, which takes the values."""
    wrappers: dict[nn.Module, nn.Module] = {}
    for module, part in new.items():
        of_layer = isinstance(part, RestingAdapter)
        if not isinstance(module, (LoRALinear, ModuleToSave)):
            wrappers[module] = _without_adapter(module) if of_layer else ModuleToSave(module)
        module = wrappers.get(module, module)
        if (held := adapter_of(module, name)) is None:
            _parts(module)[name] = part
            continue
        held.load_state_dict(part.state_dict(), strict=False)  # a layer has its base beside it
        if of_layer:
            vars(held).update({setting: getattr(part, setting) for setting in SETTINGS})
    replace(model, wrappers)
    may_save_whole(model, False)
    for module in modules_with_adapters(model).values():
        _activate(module, name)


def take_out(model: nn.Module, inner: Callable[[nn.Module], nn.Module]) -> None:
    """Put `inner(module)` in the place of every module that adapters live in, which makes the model plain again."""
    replace(model, {module: inner(module) for module in modules_with_adapters(model).values()})
    dequantize_experts(model, quantized=False)
    may_save_whole(model, True)


def adapter_of(module: LoRALinear | ModuleToSave, name: str) -> nn.Module | None:
    """What one module has of the adapter `name`: the layer itself, a RestingAdapter, or the copy; None without it."""
    active = isinstance(module, LoRALinear) and module.adapter == name
    return module if active else dict(_parts(module)).get(name)


def _parts(module: LoRALinear | ModuleToSave) -> nn.ModuleDict:
    """What one module has of adapters, by name; without the active one if it is a layer."""
    return module.copies if isinstance(module, ModuleToSave) else module.resting


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters in the model, sorted."""
    modules = modules_with_adapters(model).values()
    return sorted({name for module in modules for name in (module.adapter, *_parts(module))} - {None})


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter; None if the model has none."""
    return next((m.adapter for m in modules_with_adapters(model).values() if m.adapter is not None), None)


def active_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """(path, layer) of every layer with an active adapter. Raises ValueError: there is none, or it is merged."""
    layers = [(path, layer) for path, layer in lora_layers(model) if layer.adapter is not None]
    if not layers:
        raise ValueError("the model has no active adapter; call apply_lora_to_model first")
    check_unmerged(model)
    return layers


def set_adapter(model: nn.Module, name: str) -> None:
    """Make the adapter `name` the active one, in place. What is trained (`requires_grad`) stays as it is.

    ValueError: there is no such adapter (the message lists those there are), or it is merged.
    """
    _check_present(model, name)
    check_unmerged(model)
    for module in modules_with_adapters(model).values():
        _activate(module, name)


def _activate(module: LoRALinear | ModuleToSave, name: str) -> None:
    if isinstance(module, ModuleToSave):
        module.adapter = name if name in module.copies else None
    elif module.adapter != name:
        _set_aside(module)
        if name in module.resting:
            coming = module.resting.pop(name)
            module.__class__, module.adapter = coming.kind, name
            _hold(module, {part: getattr(coming, part) for part in coming.PARTS + SETTINGS})


def _set_aside(layer: LoRALinear) -> None:
    """Leave one layer without an active adapter; the one that was is kept in `resting`."""
    if layer.adapter is not None:
        layer.resting[layer.adapter] = RestingAdapter.of(layer)
    for part in layer.PARTS:
        delattr(layer, part)
    layer.__class__, layer.adapter = kind_for(layer.base_layer), None
    _hold(layer, dict.fromkeys(LoRALinear.PARTS + SETTINGS))


def _without_adapter(linear: nn.Module) -> LoRALinear:
    """A LoRALinear around `linear` in which no adapter is active yet. Torch's random state is left as it was."""
    with torch.random.fork_rng([linear.weight.device] if linear.weight.is_cuda else []):
        layer = kind_for(linear)(linear, rank=1)
    _set_aside(layer)
    layer.resting.clear()
    return layer


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter that is not active, or the last there is, after which the model is plain again.

    ValueError: there is no such adapter, or it is the active one of several, or merged.
    """
    _check_present(model, name)
    if adapter_names(model) == [name]:
        check_unmerged(model)
        return take_out(model, original)
    if name == active_adapter(model):
        raise ValueError(f"adapter {name!r} is active; activate another with set_adapter before deleting it")
    for module in modules_with_adapters(model).values():
        if name in _parts(module):
            del _parts(module)[name]


@contextlib.contextmanager
def disabled(modules: Iterable[LoRALinear | ModuleToSave]):
    """Within this context, which nests, these modules compute as if they had no adapters."""
    enabled = [module for module in modules if module.enabled]
    for module in enabled:
        module.enabled = False
    try:
        yield
    finally:
        for module in enabled:
            module.enabled = True


@contextlib.contextmanager
def adapters_by_row(model: nn.Module, names: Sequence[str | None]):
    """Within this context each row of the batch goes through the adapter of its name (None: the base model alone).

    The base product is computed once for the whole batch. Contexts nest; the inner one is in force. With gradient
    checkpointing, which runs layers again, the backward pass belongs inside, too.

    ValueError: an unknown name, an adapter that is merged, or one that replaces whole modules (`modules_to_save`) or
    adapts parameters (`target_parameters`). In the forward pass: a batch of another size.
    """
    chosen = [name for name in dict.fromkeys(names) if name is not None]
    for name in chosen:
        _check_present(model, name)
    check_unmerged(model)
    modules = modules_with_adapters(model)
    for path, module in modules.items():
        if isinstance(module, LoRAWeight):
            raise ValueError(f"{path!r} is not a linear layer, and its adapters cannot be chosen row by row")
        if isinstance(module, ModuleToSave) and set(names) & set(module.copies):
            raise ValueError(f"{path!r} is replaced whole by one of the adapters, which cannot be done row by row")
    rows = {name: torch.tensor([i for i, n in enumerate(names) if n == name]) for name in chosen}
    layers = [layer for _, layer in lora_layers(model)]
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(_forward_by_row, layer, len(names), rows)
    try:
        with disabled(module for module in modules.values() if isinstance(module, ModuleToSave)):
            yield model
    finally:
        for layer, outer in zip(layers, before, strict=True):
            del layer.forward
            if outer is not None:
                layer.forward = outer


def _forward_by_row(layer: LoRALinear, batch: int, rows: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """x: (batch, ..., in) → (batch, ..., out), the rows with these indices through the adapter of that name."""
    if not layer.enabled:
        return base_forward(layer.unmerged, x)
    x = autocast_input(x)
    if x.shape[0] != batch:
        raise ValueError(f"adapters are given for {batch} rows, but the batch has shape {tuple(x.shape)}")
    y = base_forward(layer.unmerged, x)
    for name, places in rows.items():
        if (adapter := adapter_of(layer, name)) is not None:
            places = places.to(x.device)
            own = x.index_select(0, places), y.index_select(0, places)
            y = y.index_add(0, places, adapter.added_term(*own, layer.unmerged, layer.training))
    return y


def save_modules(model: nn.Module, names: Iterable[str]) -> None:
    """Train whole modules beside the active adapter and save them with it (PEFT's `modules_to_save`).

    Each gets a trainable copy that belongs to the adapter; the original stays in the model. A name selects the
    modules whose path ends in it, by whole components, such as "lm_head".

    ValueError: no active adapter; a name that selects nothing, or something that holds an adapter or is in 4 bits.
    """
    active = active_adapter(model)
    if active is None:
        raise ValueError("the model has no adapter; call apply_lora_to_model first")
    modules = {path: module for path, module in named_modules(model) if path}
    names = list(names)
    for name in names:
        if not ending_in(modules, [name]):
            raise ValueError(f"no module's path ends in {name!r}")
    chosen = outermost(ending_in(modules, names))
    for path in chosen:
        if isinstance(modules[path], (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
            raise TypeError(f"{path!r} is a mere container ({type(modules[path]).__name__}); name what it holds")
        if any(isinstance(child, LoRALinear) for child in modules[path].modules()):
            raise ValueError(f"{path!r} holds a LoRA adapter and cannot be trained whole")
        if any(isinstance(child, FrozenNF4) for child in modules[path].modules()):
            raise ValueError(f"{path!r} is in 4 bits and cannot be trained whole; leave it out in quantize_model")
    new = [m for m in map(modules.get, chosen) if not (isinstance(m, ModuleToSave) and active in m.copies)]
    put_in(model, active, {module: copy.deepcopy(original(module)).requires_grad_(True) for module in new})


def check_name(name: str) -> None:
    """An adapter's name becomes part of parameter names: one that torch takes for a module, as in PEFT."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"an adapter's name must be a string without '.', got {name!r}")
    if hasattr(nn.ModuleDict, name) or name in ("training", *nn.Module().__dict__):
        raise ValueError(f"an adapter cannot be called {name!r}: torch uses the word")


def _check_present(model, name) -> None:
    if name not in adapter_names(model):
        raise ValueError(f"the model has no adapter {name!r}, only: {', '.join(adapter_names(model)) or 'none'}")


def check_unmerged(model) -> None:
    merged = [path for path, module in modules_with_adapters(model).items() if getattr(module, "merged", False)]
    if merged:
        raise ValueError(f"the active adapter is merged into {merged[0]!r}; call unmerge_lora first")
