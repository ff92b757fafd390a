"""One linear layer with a low-rank adapter: y = x Wᵀ + b + (alpha / r) (x Aᵀ) Bᵀ.

W stays frozen (4-bit if you like), A (r, in) starts random and B (out, r) starts at zero, so that
training starts from the base model exactly: ΔW = B A = 0. At that point dA is zero and dB is not,
which is why one of them must not be zero.
"""

import functools
import math

import torch
from torch import nn
from torch.func import functional_call

from ..kernels.lora import lora_linear
from ..quant import NF4Linear
from ..quant.model import is_conv1d, is_linear
from .adapter_math import add_rows, added_term, delta_weight, dora_gain, factors


class LoRALinear(nn.Module):
    """Wraps `nn.Linear`, `NF4Linear` or GPT-2's `Conv1D` and adds a low-rank adapter, computed in one fused operation.

    Args:
        original_linear: the layer to adapt. It is kept as `base_layer` and frozen.
        rank: r ≥ 1.
        lora_alpha: the adapter's output is scaled by `scaling = lora_alpha / rank`.
        lora_dropout: probability in [0, 1) that an element of the *adapter's* input is dropped in
            training; the base layer always sees all of x.

    Attributes:
        lora_A: Parameter (rank, in_features), Kaiming-uniform with a = √5 (that is ±1/√in_features).
        lora_B: Parameter (out_features, rank), zeros.
        scaling, rank, lora_dropout: plain numbers; they and the two parameters may be replaced.
        adapter: the name of the adapter that lies in `lora_A` and `lora_B`. `resting` holds further
            ones by name (see `set_adapter`). Where the active adapter does not touch this layer, both
            parameters and the name are None and the layer computes as its base.
        lora_magnitude, start_A, start_B: None but for DoRA and PiSSA (see `variants`).
        enabled: False leaves the adapter out of the forward pass (see `disable_lora`).

    Dtypes, whatever mixture comes:
        - The adapter is fp32 (fp64 on an fp64 base), so small updates are not lost and gradient
          scaling works; `.to(dtype)` changes it as usual.
        - The output has the dtype of the input; under autocast, autocast's.
        - That is also the dtype computed in, except on an NF4 base with a `compute_dtype` of its own.

    Merging writes W + scaling·B A into a copy and keeps the original, so that unmerging restores
    every bit after any number of rounds; it costs a second copy of W while merged. The state dict is
    that of the unmerged layer, merged or not: with W + ΔW beside A and B, ΔW would count twice on loading.

    Forward hooks on the base layer act as they do without an adapter; the base is then computed by a call
    of its own.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

    Raises:
        TypeError: `original_linear` is none of these (or acts unlike them); a setting is no number.
        ValueError: rank, lora_alpha or lora_dropout out of range.
    """

    def __init__(self, original_linear, rank=8, lora_alpha=16.0, lora_dropout=0.0):
        super().__init__()
        check_adaptable(original_linear)
        check_settings(rank, lora_alpha, lora_dropout)
        self.base_layer = original_linear.requires_grad_(False)
        self.out_features, self.in_features = features(original_linear)
        self.rank = rank
        self.lora_alpha = lora_alpha
        self.scaling = lora_alpha / rank
        self.lora_dropout = lora_dropout
        self.enabled = True
        self.adapter = "default"
        self.rows = None  # while `adapters_by_row` is in force: [(adapter name, indices of its rows), ...]
        self.resting = nn.ModuleDict()
        self._kept = []  # the unmerged base layer while merged; in a list, so that it is no submodule
        like = adapter_like(original_linear)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **like))
        self.register_parameter("lora_magnitude", None)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.reset_parameters()
        self.train(original_linear.training)

    def reset_parameters(self):
        """Make the adapter new: A random, B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def weight(self):
        """The base layer's weight (with ΔW while merged)."""
        return self.base_layer.weight

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
        return self._kept[0] if self.merged else self.base_layer

    def forward(self, x):
        """x: (..., in_features) → (..., out_features).

        Raises:
            RuntimeError: merged, in training mode and with dropout: a merged adapter cannot drop
                its input, so the forward pass would silently not be the one asked for.
        """
        if self.rows is not None and self.enabled:
            return self._forward_rows(x)
        if not self.enabled or self.lora_A is None:
            return _base_forward(self.unmerged, x)
        if self.merged:
            if self.training and self.lora_dropout > 0:
                raise RuntimeError("the adapter is merged, so its dropout cannot act: call unmerge_weights() or eval()")
            return _base_forward(self.base_layer, x)
        x = _autocast(x)
        base = self.base_layer
        if _is_watched(base):
            y = _base_forward(base, x)
            return y + added_term(y, x, self, functools.partial(dense_weight, base), base.bias, self.training)
        if isinstance(base, NF4Linear):
            weight, dtype = base.quantized, base.compute_dtype or x.dtype
        else:
            weight, dtype = _dense(base), x.dtype
        A, B = factors(self)
        dropout = self.lora_dropout if self.training else 0.0
        inputs = x if dtype == x.dtype else x.to(dtype)  # asked first: `.to` takes time even where it changes nothing
        if self.lora_magnitude is None:
            y = lora_linear(inputs, weight, base.bias, A, B, self.scaling, dropout)
            return y if dtype == x.dtype else y.to(x.dtype)
        y = lora_linear(inputs, weight, None, A, B, self.scaling, dropout)
        y = y * dora_gain(dense_weight(base), self).to(dtype)
        return (y if base.bias is None else y + base.bias.to(dtype)).to(x.dtype)

    def _forward_rows(self, x):
        """Every row of the batch with an adapter of its own: the base once, then each adapter's term in its rows."""
        x = _autocast(x)
        if x.shape[0] != sum(len(rows) for _, rows in self.rows):
            expected = sum(len(rows) for _, rows in self.rows)
            raise ValueError(f"adapters are given for {expected} rows, but the batch has shape {tuple(x.shape)}")
        y = _base_forward(self.unmerged, x)
        for name, rows in self.rows:
            adapter = self if name == self.adapter else dict(self.resting).get(name)
            if name is not None and adapter is not None:
                weight = functools.partial(dense_weight, self.unmerged)
                y = add_rows(y, x, adapter, rows.to(x.device), weight, self.base_layer.bias, self.training)
        return y

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """ΔW = scaling · B A, (out_features, in_features), in the adapter's dtype but at least fp32."""
        return delta_weight(self, None if self.lora_magnitude is None else dense_weight(self.unmerged))

    @torch.no_grad()
    def merge_weights(self, dequantize=False):
        """Fold the adapter into the base weight: one product at inference. Does nothing when merged already.

        Args:
            dequantize: allow an NF4 base, which becomes a dense `nn.Linear` until unmerged.

        Raises:
            ValueError: an NF4 base without `dequantize`; a base whose `forward` has been replaced; an adapter that
                is not finite, or that leaves the range of the weight's dtype. Nothing is changed then.
        """
        if self.merged or self.lora_A is None:
            return
        base = self.base_layer
        if isinstance(base, NF4Linear):
            if not dequantize:
                raise ValueError(
                    "merging into a 4-bit weight rounds most of the adapter away (the steps between NF4 levels are "
                    "larger than ΔW); pass dequantize=True to merge into a dense layer"
                )
            base = base.dequantize()
        if "forward" in vars(self.base_layer):
            raise ValueError("the base layer's forward has been replaced, which the merged layer could not follow")
        delta = self.delta_weight()
        if not torch.isfinite(delta).all():
            raise ValueError("the adapter holds values that are not finite; it was not merged")
        with torch.device("meta"):
            if is_conv1d(base):
                merged, delta = type(base)(base.nf, base.nx), delta.t()
            else:
                merged = nn.Linear(self.in_features, self.out_features, bias=False)
        weight = delta.add_(base.weight).to(base.weight.dtype).contiguous()
        if not torch.isfinite(weight).all():
            raise ValueError(f"W + ΔW leaves the range of {weight.dtype}; the adapter was not merged")
        merged.weight = nn.Parameter(weight, requires_grad=False)
        merged.bias = base.bias
        merged.train(self.training)
        if isinstance(base.weight, nn.Parameter):  # else a hook may make the weight (pruning), and would undo ΔW
            for hooks in WATCHERS:
                setattr(merged, hooks, getattr(self.base_layer, hooks))
        self._kept.append(self.base_layer)
        self.base_layer = merged

    def unmerge_weights(self):
        """Put the original base layer back, bit for bit. Does nothing when it is there already."""
        if self.merged:
            self.base_layer = self._kept.pop()

    def state_dict(self, *args, **kwargs):
        """As always in torch; that of the unmerged layer while merged."""
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

    def extra_repr(self):
        state = "".join(f", {word}" for word, on in (("merged", self.merged), ("disabled", not self.enabled)) if on)
        if self.lora_A is None:
            return "no active adapter"
        return f"rank={self.rank}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}{state}"


class LoRALayer(LoRALinear):
    """A LoRA linear layer with a frozen weight of its own (initialized as nn.Linear is; no bias)."""

    def __init__(self, in_features, out_features, rank=8, lora_alpha=16.0, lora_dropout=0.0):
        super().__init__(nn.Linear(in_features, out_features, bias=False), rank, lora_alpha, lora_dropout)


def is_adaptable(module: nn.Module) -> bool:
    """Whether LoRALinear can wrap `module`: an NF4Linear, a Conv1D, or what computes as nn.Linear does."""
    return (
        isinstance(module, NF4Linear)
        or is_linear(module)
        or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)
    )


def features(linear) -> tuple[int, int]:
    """(out_features, in_features) of anything adaptable."""
    return (linear.nf, linear.nx) if is_conv1d(linear) else (linear.out_features, linear.in_features)


def check_adaptable(module) -> None:
    if isinstance(module, LoRALinear):
        raise TypeError("original_linear is a LoRALinear already; adapters do not nest")
    if not is_adaptable(module):
        raise TypeError(f"original_linear must be an nn.Linear, NF4Linear or Conv1D, got {type(module).__name__}")


def check_settings(rank, lora_alpha, lora_dropout) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be finite, got {lora_alpha!r}")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must lie in [0, 1), got {lora_dropout!r}")


def adapter_like(base) -> dict:
    """Device of the base's weight, and fp32, or fp64 on an fp64 base."""
    weight = base.weight
    return {"device": weight.device, "dtype": torch.float64 if weight.dtype == torch.float64 else torch.float32}


WATCHERS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip


def _is_watched(base) -> bool:
    """Whether calling `base` does more than its class's forward, which the fused operation would leave out."""
    own = vars(base)
    return "forward" in own or any(own[hooks] for hooks in WATCHERS)


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that a linear layer would see: under autocast, autocast's (which leaves fp64 alone)."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def dense_weight(base) -> torch.Tensor:
    """The weight of any base layer as a dense (out, in) tensor; that of an NF4Linear is made for the call."""
    return base.quantized.dequantize() if isinstance(base, NF4Linear) else _dense(base)


def _dense(base) -> torch.Tensor:
    """The weight of a layer that is not quantized, as (out, in)."""
    return base.weight.t() if is_conv1d(base) else base.weight


def _base_forward(base, x):
    if isinstance(base, NF4Linear) or base.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return base(x)
    return functional_call(base, {name: p.to(x.dtype) for name, p in base.named_parameters()}, (x,))
