"""Adapters on parameters that are not a linear layer's: fused expert weights and routers (PEFT's `target_parameters`).

A weight W_e of one expert gets an adapter of its own, y = x W_eᵀ + (alpha / r) (x A_eᵀ) B_eᵀ. They lie as in PEFT's
files: A (r E, in) expert after expert, B (out, r E) with the experts of one rank side by side. Dropout has no place
there, as PEFT adds the adapter to the weight, which never meets x alone.
"""

import torch
from torch import nn
from torch.func import functional_call

from ..quant.experts import DenseExperts, FusedExperts, adopt, expert_weights, grouped_linear, projections
from ..quant.linear import autocast_input
from .base_layer import is_adaptable
from .lora import LoRALinear
from .names import StandsFor, named_modules


class LoRAWeight(StandsFor, LoRALinear):
    """Wraps a module with a `weight` (out, in) that it uses as it likes, such as a router, and adapts that."""

    @staticmethod
    def fits(module) -> bool:
        return not is_adaptable(module)

    @property
    def current(self):
        return self._modules["base_layer"]

    def forward(self, *args, **kwargs):
        """What the module gives with W + ΔW."""
        if not self.enabled:
            return self.unmerged(*args, **kwargs)
        if self.merged or self.adapter is None:
            return self.base_layer(*args, **kwargs)
        base = self.base_layer
        return functional_call(base, {"weight": (base.weight + self.delta()).to(base.weight.dtype)}, args, kwargs)

    def _merged(self, dense, weight):
        merged = dense.__new__(type(dense))
        vars(merged).update(vars(dense), _parameters=dense._parameters | {"weight": nn.Parameter(weight, False)})
        return merged


class LoRAExperts(FusedExperts, LoRAWeight):
    """Wraps a fused expert weight, in NF4 or dense, with an adapter for each of its E experts.

    Attributes:
        lora_A: Parameter (rank E, in).
        lora_B: Parameter (out, rank E).
    """

    @property
    def flipped(self) -> bool:
        return self.base_layer.flipped

    def forward(self, x, ends):
        """x (S, in), rows sorted by expert, and where those of each end, (E,) → (S, out), same dtype as x."""
        if not self.enabled:
            return self.unmerged(x, ends)
        if self.merged or self.adapter is None:
            return self.base_layer(x, ends)
        x = autocast_input(x)
        A, B = self.by_expert()
        down, up = (B.mT, A.mT) if self.flipped else (A, B)
        term = grouped_linear(grouped_linear(x, down.unbind().__getitem__, ends), up.unbind().__getitem__, ends)
        return self.base_layer(x, ends) + term * self.scaling

    def by_expert(self):
        """A (E, r, in) and B (E, out, r)."""
        A, B = self.factors()
        return A.unflatten(0, (len(self), -1)), B.unflatten(1, (-1, len(self))).permute(2, 0, 1)

    def delta(self):
        """ΔW as the weight lies, (E, out, in) or (E, in, out), in at least fp32."""
        A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self.by_expert())
        delta = (B @ A).mul_(self.scaling)
        return delta.mT if self.is_transposed and not self.flipped else delta

    def _dense(self, base):
        return base if isinstance(base, DenseExperts) else DenseExperts(base.dequantize(), base.is_transposed)

    def _merged(self, dense, weight):
        merged = DenseExperts(weight.contiguous(), dense.is_transposed)
        merged.flipped = self.flipped
        return merged.train(self.training)


def kind_for(module: nn.Module) -> type[LoRALinear]:
    """The class that puts an adapter around `module`, which has none."""
    return LoRAExperts if isinstance(module, FusedExperts) else LoRALinear if is_adaptable(module) else LoRAWeight


def parameter_targets(model: nn.Module) -> dict[str, nn.Module]:
    """Path → module of what is adapted as a parameter: fused expert weights, and modules with a `weight` (out, in)
    that are neither linear layers nor embeddings. A weight that is a parameter has no module in the model yet."""
    found = expert_weights(model)
    inside = tuple(f"{path}." for path, module in named_modules(model) if isinstance(module, LoRALinear))
    for path, module in named_modules(model):
        weight = module._parameters.get("weight")
        plain = weight is not None and weight.dim() == 2 and weight.is_floating_point()
        plain = plain and not is_adaptable(module) and not isinstance(module, nn.Embedding)
        if path and not path.startswith(inside) and (plain or type(module) is LoRAWeight):
            found[path] = module
    return found


def place(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Let DenseExperts out of `parameter_targets` take the places of the parameters, with those of the same layer."""
    layers = {path.rpartition(".")[0] for path, module in modules.items() if isinstance(module, DenseExperts)}
    everything = expert_weights(model) if layers else {}
    for path in layers:
        layer = model.get_submodule(path)
        own = {name: modules.get(f"{path}.{name}", everything[f"{path}.{name}"]) for name in projections(layer)}
        adopt(layer, {name: m for name, m in own.items() if name in layer._parameters})


def parameter_name(path: str, module: nn.Module) -> str:
    """PEFT's name of the parameter that the adapter at `path` of the module (or around it) changes."""
    return path if isinstance(module, FusedExperts) else f"{path}.weight"


def file_prefixes(model: nn.Module, adapted: dict[str, nn.Module]) -> dict[str, str]:
    """Path → how its keys begin in PEFT's files: the path itself, but for experts. Around their layer PEFT puts a
    wrapper for each adapted weight, and the later ones around the first."""
    prefixes, modules = {path: path for path in adapted}, dict(named_modules(model))
    for layer in {path.rpartition(".")[0] for path, module in adapted.items() if isinstance(module, FusedExperts)}:
        order = [name for name in projections(modules[layer]) if f"{layer}.{name}" in adapted]
        for depth, name in enumerate(reversed(order)):
            prefixes[f"{layer}.{name}"] = layer + ".base_layer" * depth
    return prefixes
