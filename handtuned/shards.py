"""Tensors that FSDP has cut: a rank's shard, the whole, and back.

FSDP2 makes every parameter a `DTensor`: it says the whole shape and holds one rank's piece. Files and
one-process tools want whole tensors; the optimizer works on pieces. A tensor that is not cut passes
through all of this unchanged.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .nn.inject import lora_layers


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the elements of every list of layers that hold adapters."""
    adapted = {id(layer) for _, layer in lora_layers(model)}
    found = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    inside = {id(part) for block in found for part in list(block.modules())[1:]}
    return [
        block for block in found if id(block) not in inside and any(id(part) in adapted for part in block.modules())
    ]


def _sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)


@torch.no_grad()
def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, over the same memory; a tensor that is not sharded is its own."""
    return tensor.to_local() if _sharded(tensor) else tensor


@torch.no_grad()
def whole(shard: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole tensor of which every rank gives its shard, cut as `like` is. All ranks call it."""
    if not _sharded(like) or shard.shape != local(like).shape:
        return shard
    sizes = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(shard, like.device_mesh, like.placements, **sizes).full_tensor()


@torch.no_grad()
def part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a whole tensor, cut as `like` is."""
    if not _sharded(like) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(
        tensor.to(local(like).device), like.device_mesh, like.placements, src_data_rank=None
    ).to_local()


@contextlib.contextmanager
def whole_adapter(model: nn.Module) -> Iterator[None]:
    """Within, every adapter parameter of the model is whole on every rank. All ranks call it."""
    kept = [(layer, name, getattr(layer, name)) for _, layer in lora_layers(model) for name in ("lora_A", "lora_B")]
    kept = [entry for entry in kept if _sharded(entry[2])]
    for layer, name, parameter in kept:
        setattr(layer, name, nn.Parameter(whole(local(parameter), parameter), requires_grad=False))
    try:
        yield
    finally:
        for layer, name, parameter in kept:
            setattr(layer, name, parameter)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers that this rank holds."""
    tensors = {id(t): local(t) for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())

