"""The fused expert weights of a mixture of experts, each expert in NF4.

transformers keeps the experts of a layer as two parameters, gate_up_proj (E, 2I, H) and down_proj (E, H, I), or
transposed, with the input first, as gpt-oss does. They are most of such a model: 57 of Qwen3-30B-A3B's 61 GB.
`quantize_experts` puts an `NF4Experts` into the place of each. The layer stays transformers' own, with its router,
gate and biases: its forward looks its implementation up in `ALL_EXPERTS_FUNCTIONS`, where ours is called "nf4":

    rows sorted by expert → gate_up_proj → gate → down_proj → weighted by the router → added per token

Experts have no part in each other: scales, their mean and codes are one expert's alone, and its bytes are those that
`quantize_nf4` gives for its weight. So they can be quantized one by one as a checkpoint is read.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.nf4 import NestedScales, flatten, nf4_dequantize
from ..kernels.nf4_experts import expert_of
from ..kernels.runtime import traced
from .linear import FrozenNF4, NF4Product, autocast_input
from .nf4 import NESTED_BLOCK, NF4Tensor, check_options, nf4_zeros, quantize_nf4

IMPLEMENTATION = "nf4"  # in transformers' ALL_EXPERTS_FUNCTIONS
# Layers that do not go by that interface, but multiply with their fused weights as NF4Experts lets them.
FUSED = "gate_up_proj", "down_proj"
OWN_LOOP = {"Llama4TextExperts": FUSED, "LongcatFlashExperts": FUSED, "Step3p7Experts": FUSED,
            "JetMoeParallelExperts": ("weight",)}  # fmt: skip


class FusedExperts:
    """What a module in the place of a fused expert weight has in common: `shape` (E, N, K), `is_transposed`, and a
    forward of rows sorted by expert. Layers' own loops over experts take it for the weight.

    Attributes:
        flipped: lies as (in, out), which its layer does not say, so that PEFT takes inputs for outputs.
    """

    flipped = False

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "transformers" in sys.modules:  # of a model that comes from another process
            _register()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, e: int) -> "ExpertWeight":
        """One expert (N, K), for loops over experts such as transformers' eager ones."""
        return ExpertWeight(self, int(e))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """`torch.bmm(x, experts)` of x (E, T, in): what Llama 4 does with weights that lie as (in, out)."""
        if func is not torch.bmm or kwargs or not args[1].is_transposed:
            raise TypeError(f"experts that are a module have no {func.__name__}")
        (E, T, _), experts = args[0].shape, args[1]
        ends = torch.arange(1, E + 1, device=args[0].device, dtype=torch.int32) * T
        return experts(args[0].flatten(0, 1), ends).unflatten(0, (E, T))


class ExpertWeight:
    """One expert's weight (N, K). `F.linear(x, ·)`, or `x @ ·` for one that lies as (in, out), takes it in a tensor's
    place: a layer's own loop over its experts runs as it is, and no dense weight is kept for backward.
    """

    def __init__(self, experts: FusedExperts, e: int):
        self.experts, self.e, self.shape = experts, e, experts.shape[1:]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        x, weight, *bias = args
        experts, rows = weight.experts, x.shape[:-1].numel()
        products = (torch.matmul, torch.Tensor.matmul) if experts.is_transposed else (F.linear,)
        if func not in products or kwargs:
            raise TypeError(f"an expert in a module has no {func.__name__}")
        numbers = torch.arange(len(experts), device=x.device, dtype=torch.int32)
        y = experts(x.flatten(0, -2), (numbers >= weight.e) * rows).unflatten(0, x.shape[:-1])
        return y if not bias or bias[0] is None else y + bias[0]


def grouped_linear(x: torch.Tensor, weight: Callable[[int], torch.Tensor], ends: torch.Tensor) -> torch.Tensor:
    """x (S, in), rows sorted by expert, with each expert's `weight(e)` (out, in) → (S, out) in x's dtype, one by one.
    Experts without rows are not asked for."""
    parts = x.split(torch.diff(ends, prepend=ends.new_zeros(1)).tolist())
    products = [F.linear(part, weight(e).to(x.dtype)) for e, part in enumerate(parts) if len(part)]
    return torch.cat(products or [F.linear(x, weight(0).to(x.dtype))])


class DenseExperts(FusedExperts, nn.Module):
    """A fused expert weight (E, N, K) as a module, so that an adapter can stand around it."""

    def __init__(self, weight: torch.Tensor, is_transposed: bool = False):
        super().__init__()
        self.weight, self.is_transposed = nn.Parameter(weight, requires_grad=False), is_transposed
        self.shape = weight.shape  # the parameter may become a shard

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.weight.detach().to(dtype or self.weight.dtype)

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x (S, in), rows sorted by expert, and where those of each end, (E,) → (S, out), same dtype as x."""
        return grouped_linear(x, (self.weight.mT if self.is_transposed else self.weight).unbind().__getitem__, ends)


class NF4Experts(FusedExperts, FrozenNF4):
    """One projection of all experts of a layer: y[s] = x[s] W[e(s)]ᵀ, or x[s] W[e(s)] if `is_transposed`; W frozen.

    `state_dict` holds codes and scales under the names below. Changing the module's dtype changes nothing.

    Args:
        shape: (E, N, K) of the fused parameter as it lies: N outputs and K inputs, or the reverse if `is_transposed`.
        is_transposed: weights lie as (in, out).
        block_size, double_quant, compute_dtype, device, dtype: as for NF4Linear; no block reaches into the next expert.

    Attributes:
        weight: (E, ⌈N K / 2⌉) uint8, the codes.
        absmax: (E, blocks) uint8, or fp32 without double quantization.
        nested_absmax, nested_code, nested_offset: (E, ⌈blocks / 256⌉), (256,) and (E,) fp32, or None.

    New experts are zero.

    Raises:
        TypeError, ValueError: a dtype, `shape` or `block_size` is not as described.
    """

    def __init__(
        self, shape: Sequence[int], is_transposed: bool = False, block_size: int = 64, double_quant: bool = True,
        compute_dtype: torch.dtype | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__()
        check_options(block_size, compute_dtype, dtype)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape must be (experts, rows, columns), got {tuple(shape)}")
        self.shape, self.is_transposed, self.weight_dtype = torch.Size(shape), is_transposed, dtype
        self.block_size, self.double_quant, self.compute_dtype = block_size, double_quant, compute_dtype
        self._make_room(device)

    def _make_room(self, device) -> None:
        values = self.shape[1:].numel()
        codes, absmax, nested = nf4_zeros(values, self.block_size, self.double_quant, device, self.shape[:1])
        self.weight = nn.Parameter(codes, requires_grad=False)
        parts = absmax, *(nested or (None,) * 3)[:3]
        for name, tensor in zip(("absmax", "nested_absmax", "nested_code", "nested_offset"), parts, strict=True):
            self.register_buffer(name, tensor)

    @classmethod
    def from_weight(
        cls, weight: torch.Tensor, is_transposed: bool = False, block_size: int = 64, double_quant: bool = True,
        compute_dtype: torch.dtype | None = None, *, name: str = "weight",
    ) -> "NF4Experts":  # fmt: skip
        """Quantize a fused parameter (E, N, K), which is not changed. One on the meta device gives a layer on meta.

        Raises:
            TypeError: it is not of a float dtype that NF4 knows.
            ValueError: it is not of three dimensions, or holds NaN or infinity.
        """
        options = is_transposed, block_size, double_quant, compute_dtype
        experts = cls(weight.shape, *options, device=weight.device, dtype=weight.dtype)
        for e in range(0 if weight.is_meta or traced(weight) else len(weight)):
            experts.put(e, weight[e], name=f"{name}[{e}]")
        return experts

    def put(self, e: int, weight: torch.Tensor, *, name: str = "weight") -> None:
        """Quantize the weight (N, K) of one expert into its place. The first one put on a layer on meta makes room."""
        if weight.shape != self.shape[1:]:
            raise ValueError(f"{name} must be {' × '.join(map(str, self.shape[1:]))}, got {tuple(weight.shape)}")
        q = quantize_nf4(weight, self.block_size, self.double_quant, name=name)
        if self.weight.is_meta:
            self._make_room(q.device)
        self.weight_dtype = q.dtype
        self.weight.data[e], self.absmax[e] = q.packed, q.absmax
        if q.nested is not None:
            self.nested_absmax[e], self.nested_offset[e] = q.nested.absmax, q.nested.offset

    @property
    def quantized(self) -> NF4Tensor:
        """All experts (E, N, K) over the same memory, as kernels take them."""
        nested = None
        if self.double_quant:
            nested = NestedScales(self.nested_absmax, self.nested_code, self.nested_offset, NESTED_BLOCK)
        return NF4Tensor(self.weight.data, self.absmax, self.shape, self.weight_dtype, self.block_size, nested)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """All experts (E, N, K) in `dtype` (None: the original one)."""
        return torch.stack([nf4_dequantize(expert_of(self.quantized, e), dtype or self.weight_dtype)
                            for e in range(len(self))])  # fmt: skip

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x (S, in), rows sorted by expert, and where those of each end, (E,) → (S, out), same dtype as x."""
        x = autocast_input(x)
        h = x.to(self.compute_dtype or x.dtype)
        return NF4Product.apply(h, *flatten(self.quantized), None, not self.is_transposed, ends).to(x.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (f"shape={tuple(self.shape)}, is_transposed={self.is_transposed}, block_size={self.block_size}, "
                f"double_quant={self.double_quant}, compute_dtype={self.compute_dtype}")  # fmt: skip


def experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts of one layer, as transformers calls an experts implementation.

    Args:
        self: transformers' own layer. Its projections are modules called with (rows, ends), such as NF4Experts; one
            that is a tensor as before makes the layer run transformers' grouped products.
        hidden_states: (T, H).
        top_k_index, top_k_weights: (T, k), the experts of each token and what they count.

    Returns:
        (T, H) in the dtype of `hidden_states`.
    """
    up, down = (getattr(self, name) for name in projections(self))
    if not isinstance(up, nn.Module):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    k = top_k_index.shape[-1]
    chosen, order = top_k_index.flatten().sort(stable=True)
    numbers = torch.arange(self.num_experts, device=chosen.device, dtype=chosen.dtype)
    ends = torch.searchsorted(chosen, numbers, right=True, out_int32=True)
    h = up(hidden_states[order // k], ends)
    if self.has_bias:
        h = h + getattr(self, f"{projections(self)[0]}_bias")[chosen]
    h = down(self._apply_gate(h) if self.has_gate else self.act_fn(h), ends)
    if self.has_bias:
        h = h + self.down_proj_bias[chosen]
    if getattr(self, "has_post_expert_norm", False):
        h = self.post_expert_norm(h)
    h = h * top_k_weights.flatten()[order, None]
    y = h[order.argsort()].view(*top_k_index.shape, -1).sum(1)
    return y.to(hidden_states.dtype)


def by_interface(layer: nn.Module) -> bool:
    """Whether its forward goes by transformers' experts interface."""
    marks = "has_gate", "has_bias", "is_transposed", "config", "num_experts"
    return all(hasattr(layer, mark) for mark in marks) and not getattr(layer, "_is_expert_parallel", False)


def projections(layer: nn.Module) -> tuple[str, ...]:
    """The names of the fused weights of a layer of experts that can be NF4Experts; none for any other module."""
    if by_interface(layer):
        return "gate_up_proj" if layer.has_gate else "up_proj", "down_proj"
    return OWN_LOOP.get(type(layer).__name__, ())


def experts_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The paths and layers with fused expert weights that can be NF4Experts, and are still dense."""
    for path, module in model.named_modules():
        weights = [module._parameters.get(name) for name in projections(module)]
        if weights and all(weight is not None and weight.dim() == 3 for weight in weights):
            yield path, module


def expert_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Path → module of every fused expert weight; a parameter's is a DenseExperts that is not part of the model."""
    found = {}
    for path, layer in model.named_modules():
        for child in projections(layer):
            weight = getattr(layer, child, None)
            if isinstance(weight, nn.Parameter) and weight.dim() == 3:
                weight = _marked(layer, DenseExperts(weight.data, _is_transposed(layer)))
            if isinstance(weight, nn.Module):
                found[f"{path}.{child}"] = weight
    return found


def _is_transposed(layer: nn.Module) -> bool:
    return layer.is_transposed if by_interface(layer) else type(layer).__name__ == "Llama4TextExperts"


def _marked(layer: nn.Module, experts: FusedExperts) -> FusedExperts:
    experts.flipped = experts.is_transposed and not getattr(layer, "is_transposed", False)
    return experts.train(layer.training)


def adopt(layer: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put modules, by name, in the places of the fused weights of a layer."""
    for child, module in modules.items():
        delattr(layer, child)
        layer.add_module(child, module)
    if by_interface(layer):
        _register()
        layer.config._experts_implementation = IMPLEMENTATION


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def quantize_experts(layer: nn.Module, options: tuple, name: str) -> None:
    """Turn the fused weights of one of `experts_layers` into NF4Experts; `options` are those of `from_weight`."""
    quantized = {}
    for child in projections(layer):
        made = NF4Experts.from_weight(getattr(layer, child).detach(), _is_transposed(layer), *options,
                                      name=f"{name}.{child}")  # fmt: skip
        quantized[child] = _marked(layer, made)
    adopt(layer, quantized)


def dequantize_experts(model: nn.Module, dtype: torch.dtype | None = None, quantized: bool = True) -> None:
    """Turn every module with a fused expert weight back into the parameter that it was, in place; without `quantized`
    only those of layers where none is in 4 bits."""
    left = False
    for layer in list(model.modules()):
        experts = {child: m for child, m in layer.named_children() if isinstance(m, FusedExperts)}
        if not quantized and any(not isinstance(m, DenseExperts) for m in experts.values()):
            left = True
            continue
        for child, module in experts.items():
            delattr(layer, child)
            layer.register_parameter(child, nn.Parameter(module.dequantize(dtype), requires_grad=False))
    if hasattr(model, "dense_conversions") and not left:
        model._weight_conversions = model.__dict__.pop("dense_conversions")


def dense_experts(model: nn.Module) -> dict[str, tuple[str, int]]:
    """The modules with expert weights that are not quantized, by path: their kind, and how many parameters."""
    found = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if re.search("expert|moe", kind, re.IGNORECASE):
            least = 2 if "expert" in kind.lower() else 3  # DBRX keeps (E I, H)
            own = [p for name, p in module.named_parameters(recurse=False) if not re.search("lora_|bias", name)]
            count = sum(p.numel() for p in own if p.dim() >= least and p.is_floating_point())
            found |= {path: (kind, count)} if count else {}
    return found
