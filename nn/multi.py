"""Several adapters in one model, of which one is active.

Every LoRALinear carries the active adapter in `lora_A`, `lora_B` and its settings, and the others in
`layer.resting`, by name. Switching exchanges the Parameter objects themselves: no value is copied, so
every bit stays, `requires_grad` and optimizer state stay with their parameter, and `.to()` and
`state_dict()` reach all adapters because all are registered in the module. What is active and what
is trained are two things.

An adapter need not touch every layer: where the active one is absent, `lora_A` is None and the layer
computes as its base.
"""

import contextlib
import copy
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .lora import LoRALinear, is_adaptable

PARTS = ("lora_A", "lora_B", "lora_magnitude", "start_A", "start_B")
SETTINGS = ("rank", "lora_alpha", "scaling", "lora_dropout")


class RestingAdapter(nn.Module):
    """One layer's share of an adapter that is not active, under the same attribute names as in LoRALinear."""

    def __init__(self, lora_A, lora_B, rank, lora_alpha, scaling, lora_dropout=0.0, lora_magnitude=None,
                 start_A=None, start_B=None):  # fmt: skip
        super().__init__()
        self.lora_A, self.lora_B = lora_A, lora_B
        self.rank, self.lora_alpha, self.scaling, self.lora_dropout = rank, lora_alpha, scaling, lora_dropout
        self.register_parameter("lora_magnitude", lora_magnitude)
        self.register_buffer("start_A", start_A)
        self.register_buffer("start_B", start_B)


class ModuleToSave(nn.Module):
    """A module that adapters replace whole (PEFT's `modules_to_save`): the original, and a copy for each adapter.

    Attributes:
        base_layer: the original module, frozen.
        copies: the copies by adapter name.
        adapter: the name of the copy in use; None: the original is.
        enabled: False puts the original in use (see `disable_lora`).
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.base_layer = module.requires_grad_(False)
        self.copies = nn.ModuleDict()
        self.adapter = None
        self.enabled = True
        self.train(module.training)

    @property
    def current(self) -> nn.Module:
        return self.copies[self.adapter] if self.enabled and self.adapter is not None else self.base_layer

    @property
    def weight(self):
        return self.current.weight

    def forward(self, *args, **kwargs):
        return self.current(*args, **kwargs)


def carriers(model: nn.Module) -> dict[str, LoRALinear | ModuleToSave]:
    """Path → module of everything in the model that adapters live in."""
    return {path: module for path, module in model.named_modules() if isinstance(module, (LoRALinear, ModuleToSave))}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path → module of the layers that LoRA can adapt or has adapted.

    Left out are those inside adapters, and those inside nn.MultiheadAttention, which reads their weights itself.
    """
    closed = [path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    inside = tuple(f"{path}." for path in [*carriers(model), *closed])
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if path and not path.startswith(inside) and (isinstance(module, LoRALinear) or is_adaptable(module))
    }


def outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path → module of everything but the insides of adapted layers and modules."""
    inside = tuple(f"{path}." for path in carriers(model))
    return {path: module for path, module in model.named_modules() if path and not path.startswith(inside)}


def without_adapter(layer: nn.Module) -> LoRALinear:
    """A LoRALinear around `layer` in which no adapter is active yet. Torch's random state is left as it was."""
    devices = [layer.weight.device] if layer.weight.is_cuda else []
    with torch.random.fork_rng(devices):
        wrapped = LoRALinear(layer, rank=1)
    for part in PARTS + SETTINGS:
        setattr(wrapped, part, None)
    wrapped.adapter = None
    return wrapped


def names_of(carrier: LoRALinear | ModuleToSave) -> list[str]:
    """The adapters that live in one layer, the active one first."""
    if isinstance(carrier, ModuleToSave):
        return list(carrier.copies)
    return ([] if carrier.adapter is None else [carrier.adapter]) + list(carrier.resting)


def share_of(carrier: LoRALinear | ModuleToSave, name: str):
    """One layer's share of the adapter `name`: what has lora_A, lora_B and the settings; None where it is absent."""
    if isinstance(carrier, ModuleToSave):
        return dict(carrier.copies).get(name)
    return carrier if carrier.adapter == name else dict(carrier.resting).get(name)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters in the model, sorted."""
    return sorted({name for carrier in carriers(model).values() for name in names_of(carrier)})


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter; None if the model has none."""
    return next((c.adapter for c in carriers(model).values() if c.adapter is not None), None)


def set_adapter(model: nn.Module, name: str) -> None:
    """Make the adapter `name` the active one, in place. What is trained (`requires_grad`) stays as it is.

    Raises:
        ValueError: there is no such adapter (the message lists those there are), or it is merged.
    """
    _check_present(model, name)
    check_unmerged(model)
    for carrier in carriers(model).values():
        activate(carrier, name)


def activate(carrier: LoRALinear | ModuleToSave, name: str) -> None:
    """Put the adapter `name` to work in one layer; where it is absent the layer computes as its base."""
    if isinstance(carrier, ModuleToSave):
        carrier.adapter = name if name in carrier.copies else None
        return
    if carrier.adapter == name:
        return
    if carrier.adapter is not None:
        parts = {part: getattr(carrier, part) for part in PARTS + SETTINGS}
        carrier.resting[carrier.adapter] = RestingAdapter(**parts)
    coming = carrier.resting.pop(name) if name in carrier.resting else None
    carrier.adapter = None if coming is None else name
    for part in PARTS + SETTINGS:
        setattr(carrier, part, None if coming is None else getattr(coming, part))


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter that is not active, and give its memory back.

    Raises:
        ValueError: there is no such adapter, or it is the active one.
    """
    _check_present(model, name)
    if name == active_adapter(model):
        raise ValueError(f"adapter {name!r} is active; activate another with set_adapter before deleting it")
    for carrier in carriers(model).values():
        if share_of(carrier, name) is not None:
            del (carrier.copies if isinstance(carrier, ModuleToSave) else carrier.resting)[name]


@contextlib.contextmanager
def adapters_by_row(model: nn.Module, names: Sequence[str | None]):
    """Within this context each row of the batch goes through an adapter of its own, in one forward pass.

    The base product is computed once for the whole batch; then every adapter adds its term to its rows.
    Contexts nest; the inner one is in force.

    Args:
        names: for each row of the batch the adapter's name, or None for the base model alone.

    Raises:
        ValueError: an unknown name, an adapter that is merged, or one that replaces whole modules
            (`modules_to_save`). In the forward pass: a batch of another size.
    """
    for name in set(names) - {None}:
        _check_present(model, name)
    check_unmerged(model)
    layers = carriers(model)
    whole = [path for path, c in layers.items() if isinstance(c, ModuleToSave) and set(names) & set(c.copies)]
    if whole:
        raise ValueError(f"{whole[0]!r} is replaced whole by one of the adapters, which cannot be done row by row")
    rows = [(name, torch.tensor([i for i, n in enumerate(names) if n == name])) for name in dict.fromkeys(names)]
    layers = [layer for layer in layers.values() if isinstance(layer, LoRALinear)]
    before = [layer.rows for layer in layers]
    for layer in layers:
        layer.rows = rows
    try:
        yield model
    finally:
        for layer, outer in zip(layers, before, strict=True):
            layer.rows = outer


def save_modules(model: nn.Module, names: Iterable[str]) -> None:
    """Train whole modules beside the active adapter and save them with it (PEFT's `modules_to_save`).

    Each gets a trainable copy that belongs to the adapter; the original stays in the model.

    Args:
        names: each selects the modules whose path ends in it, by whole components, such as "lm_head".

    Raises:
        ValueError: no active adapter; a name that selects nothing, or something that holds an adapter.
    """
    active = active_adapter(model)
    if active is None:
        raise ValueError("the model has no adapter; call apply_lora_to_model first")
    chosen = {}
    for name in names:
        found = {p: m for p, m in model.named_modules() if p and f".{p}".endswith(f".{name}")}
        if not found:
            raise ValueError(f"no module's path ends in {name!r}")
        chosen |= found
    for path, module in chosen.items():
        if any(isinstance(child, LoRALinear) for child in module.modules()):
            raise ValueError(f"{path!r} holds a LoRA adapter and cannot be trained whole")
    for path, module in chosen.items():
        if not isinstance(module, ModuleToSave):
            module = ModuleToSave(module)
            model.set_submodule(path, module)
        if active not in module.copies:
            module.copies[active] = copy.deepcopy(module.base_layer).requires_grad_(True)
            module.adapter = active


def check_name(name: str) -> None:
    """An adapter's name becomes part of parameter names and, with PEFT, of a folder's: it must be a plain word."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        raise ValueError(f"an adapter's name must be of letters, digits, '_' and '-', got {name!r}")
    if hasattr(nn.ModuleDict, name) or name in ("training", *nn.Module().__dict__):
        raise ValueError(f"an adapter cannot be called {name!r}: torch uses the word")


def _check_present(model, name) -> None:
    if name not in adapter_names(model):
        raise ValueError(f"the model has no adapter {name!r}, only: {', '.join(adapter_names(model)) or 'none'}")


def check_unmerged(model) -> None:
    merged = [path for path, carrier in carriers(model).items() if getattr(carrier, "merged", False)]
    if merged:
        raise ValueError(f"the active adapter is merged into {merged[0]!r}; call unmerge_lora first")
