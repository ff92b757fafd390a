"""The linear layer under an adapter: which layers can be one, its weight, and merging ΔW into it."""

import sys

import torch
from torch import nn
from torch.func import functional_call

from ..quant import NF4Linear
from ..quant.experts import FusedExperts
from ..quant.linear import FrozenNF4, dense_layer
from ..quant.model import is_conv1d, is_linear

HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
         "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks")  # fmt: skip


def is_adaptable(module: nn.Module) -> bool:
    """Whether LoRALinear can wrap `module`: an NF4Linear, a Conv1D, or what computes as nn.Linear does."""
    alike = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return isinstance(module, NF4Linear) or is_linear(module) or alike


def features(base) -> tuple[int, int]:
    """(out_features, in_features) of anything adaptable; of experts as PEFT takes them."""
    if isinstance(base, FusedExperts):
        sizes = tuple(base.shape[1:])
        return sizes[::-1] if base.is_transposed and not base.flipped else sizes
    if isinstance(base, (NF4Linear, nn.Linear)):  # whose weight may be a shard
        return base.out_features, base.in_features
    return tuple(base.weight.shape[::-1] if is_conv1d(base) else base.weight.shape)


def stacked(base) -> int:
    """How many weights, each with an adapter of its own, are in one: E of experts, else 1."""
    return len(base) if isinstance(base, FusedExperts) else 1


def adapter_like(base) -> dict:
    """Device of the base's weight, and fp32, or fp64 on an fp64 base."""
    weight = base.weight
    return {"device": weight.device, "dtype": torch.float64 if weight.dtype == torch.float64 else torch.float32}


def dense_weight(base) -> torch.Tensor:
    """The weight of any base layer as a dense (out, in) tensor, of experts as it lies; from NF4 made for the call."""
    if isinstance(base, FrozenNF4):
        return base.dequantize() if isinstance(base, FusedExperts) else base.quantized.dequantize()
    return base.weight.t() if is_conv1d(base) else base.weight


def base_forward(base, x):
    """base(x), its parameters cast to x's dtype for the call where they differ."""
    if isinstance(base, NF4Linear) or base.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return base(x)
    return functional_call(base, {name: p.to(x.dtype) for name, p in base.named_parameters()}, (x,))


def read_in_forward(layer: nn.Module) -> bool:
    """Whether the caller of this function's caller is, at any depth, the forward pass of a module around `layer`.

    torch's encoder layers and attention compute with a child's weight themselves, some state space models too.
    """
    if torch.compiler.is_compiling():
        return True
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "forward":
            module = frame.f_locals.get("self")
            if module is not layer and isinstance(module, nn.Module) and any(m is layer for m in module.modules()):
                return True
        frame = frame.f_back
    return False


class Mergeable(nn.Module):
    """A module around a `base_layer` that its adapter can be merged into, and taken out of again to the bit.

    Merging puts a copy with W + ΔW in the place of the base layer and keeps the original. The state dict is always
    that of the unmerged layer: with W + ΔW beside A and B, whoever loads it would have ΔW twice.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self._kept = []  # the original while merged; in a list, so that it is not a submodule

    @property
    def weight(self):
        """With ΔW while merged; and where a module reads it in its forward pass, in place of calling the layer."""
        if self.adapter is None or not read_in_forward(self):
            return self.base_layer.weight
        if not self.enabled or self.merged:
            return (self.base_layer if self.enabled else self.unmerged).weight
        if (self.training and self.lora_dropout > 0) or "forward" in vars(self):
            what = "choice of adapters by row" if "forward" in vars(self) else "dropout"
            raise RuntimeError(f"a module reads this layer's weight instead of calling it: the {what} cannot act")
        dense = dense_weight(self.base_layer)
        weight = (dense + self.delta()).to(dense.dtype)
        return weight.t() if is_conv1d(self.base_layer) else weight

    @property
    def bias(self):
        """The base layer's bias, or None."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether `base_layer` now holds W + ΔW."""
        return bool(self._kept)

    @property
    def unmerged(self) -> nn.Module:
        """The original base layer, merged or not."""
        return self._kept[0] if self._kept else self.base_layer

    @torch.no_grad()
    def merge_weights(self, dequantize=False):
        """Fold the adapter into the base weight: one product at inference. Does nothing when merged already.

        `dequantize` allows an NF4 base, which becomes a dense `nn.Linear` until unmerged.

        ValueError: an NF4 base without `dequantize`; a base whose `forward` has been replaced; an adapter that is not
        finite, or that leaves the range of the weight's dtype. Nothing is changed then.
        """
        if self.merged or self.adapter is None:
            return
        base = self.base_layer
        if isinstance(base, FrozenNF4) and not dequantize:
            raise ValueError("merging into a 4-bit weight rounds most of the adapter away (the steps between NF4 "
                             "levels are larger than ΔW); pass dequantize=True to merge into a dense layer")
        if "forward" in vars(base):
            raise ValueError("the base layer's forward has been replaced, which the merged layer could not follow")
        delta = self.delta_weight()
        if not torch.isfinite(delta).all():
            raise ValueError("the adapter holds values that are not finite; it was not merged")
        dense = self._dense(base)
        weight = delta.add_(dense_weight(dense)).to(dense.weight.dtype)
        if not torch.isfinite(weight).all():
            raise ValueError(f"W + ΔW leaves the range of {weight.dtype}; the adapter was not merged")
        merged = self._merged(dense, weight)
        if isinstance(dense.weight, nn.Parameter):  # else a hook may make the weight (pruning), and would undo ΔW
            for hooks in HOOKS:
                setattr(merged, hooks, getattr(base, hooks))
        self._kept.append(base)
        self.base_layer = merged

    def _dense(self, base):
        return base.dequantize() if isinstance(base, NF4Linear) else base

    def _merged(self, dense, weight):
        """A layer as `dense` is, with `weight` (out, in)."""
        return dense_layer(type(dense) if is_linear(dense) else nn.Linear, weight, dense.bias, self.training)

    def unmerge_weights(self):
        """Put the original base layer back, bit for bit. Does nothing when it is there already."""
        if self.merged:
            self.base_layer = self._kept.pop()

    def state_dict(self, *args, **kwargs):
        merged, self.base_layer = self.base_layer, self.unmerged
        try:
            return super().state_dict(*args, **kwargs)
        finally:
            self.base_layer = merged

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        if self.merged:
            errors.append(f"{prefix.rstrip('.') or 'the layer'} is merged; call unmerge_weights() before loading")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _apply(self, fn, recurse=True):
        for base in self._kept:  # .to(device) and the like must reach the original too
            base._apply(fn, recurse)
        return super()._apply(fn, recurse)
