"""Checkpoints around the layers of a model that somebody else wrote.

A decoder repeats one block; each block becomes a checkpoint of its own by a new `forward` in the block itself. Hooks,
wrappers and FSDP, which act where a module is called, stay outside of the checkpoint and run once.
"""

import functools
from collections.abc import Collection

import torch
from torch import nn

from .checkpoint import checkpoint

CACHES = ("use_cache", "past_key_values", "past_key_value", "layer_past", "cache_params")  # keywords of layers


def repeated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path → layer of the blocks that a model repeats, in the order in which it holds them.

    They are what lies in an `nn.ModuleList` or `nn.Sequential` that lies in no other, has submodules and parameters of
    its own, and is not a list itself: the layers of a decoder, of an encoder and of a vision tower, whatever their
    names, but not the experts or the projections within one.
    """
    found, lists = {}, (nn.ModuleList, nn.Sequential)

    def visit(module, path):
        for name, child in module.named_children():
            within = f"{path}.{name}" if path else name
            block = isinstance(module, lists) and not isinstance(child, lists)
            if block and any(child.children()) and any(True for _ in child.parameters()):
                if all(child is not known for known in found.values()):  # shared by several places
                    found[within] = child
            else:
                visit(child, within)

    visit(model, "")
    return found


def checkpoint_layers(model: nn.Module, paths: Collection[str] | None = None) -> None:
    """Make checkpoints of a model's `repeated_layers`, or of those of them at `paths`, and of no others.

    They act in training mode, when gradients are recorded. There a layer does not write into a cache of keys and
    values (`use_cache`): computed again, it would write twice.

    ValueError: the model has no such layers, or none at a path.
    """
    layers = repeated_layers(model)
    wanted = layers.keys() if paths is None else paths
    if not layers or not layers.keys() >= set(wanted):
        missing = sorted(set(wanted) - layers.keys())
        raise ValueError(f"{type(model).__name__} must have repeated layers{f' {missing}' if missing else ''} to "
                         "checkpoint, got none")  # fmt: skip
    for path, layer in layers.items():
        if hasattr(vars(layer).get("forward"), "within"):
            layer.forward = layer.forward.within
        if path in wanted:
            layer.forward = _checkpointed(layer, layer.forward)


def _checkpointed(layer: nn.Module, forward):
    run = functools.partial(_run, layer, forward)  # no closure, which a copy of the model would share
    run.within = forward
    return run


def _run(layer: nn.Module, forward, /, *args, **kwargs):
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    no_cache = {name: None for name in CACHES if name in kwargs}
    return checkpoint(forward, *args, **kwargs | no_cache)
