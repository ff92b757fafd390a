"""One linear layer with a low-rank adapter: y = x Wᵀ + b + (alpha / r) (x Aᵀ) Bᵀ.

W stays frozen (4-bit if you like), A (r, in) starts random and B (out, r) starts at zero, so that training starts from
the base model exactly: ΔW = B A = 0. At that point dA is zero and dB is not, which is why one of them must not be zero.

Not here: merging (`base_layer`), and the parameters that only DoRA and PiSSA have (`variants`).
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.lora import lora_linear
from ..quant import NF4Linear
from ..quant.linear import autocast_input
from .base_layer import HOOKS, Mergeable, adapter_like, base_forward, dense_weight, features, is_adaptable, stacked
from .names import named_modules


class LoRALinearReference(nn.Module):
    """The documents' layer, put right: dropout on the adapter's input alone; x meets A, then B, never the whole BA."""

    def __init__(self, original_linear, rank=8, lora_alpha=16.0, lora_dropout=0.0):
        super().__init__()
        self.original = original_linear.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(rank, original_linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(original_linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = lora_alpha / rank
        self.dropout = nn.Dropout(lora_dropout)

    def forward(self, x):
        return self.original(x) + self.scaling * F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)


class LoRALinear(Mergeable):
    """Wraps `nn.Linear`, `NF4Linear` or GPT-2's `Conv1D` and adds a low-rank adapter.

    The same as above in one fused operation, for every mixture of dtypes, on bases that are not plain too.

    Args:
        original_linear: the layer to adapt, kept as `base_layer` and frozen.
        rank: r ≥ 1.
        lora_alpha: the adapter's output is scaled by `scaling = lora_alpha / rank`.
        lora_dropout: probability in [0, 1) that an element of the *adapter's* input is dropped in training.

    Attributes:
        lora_A: Parameter (rank, in_features), Kaiming-uniform with a = √5 (that is ±1/√in_features).
        lora_B: Parameter (out_features, rank), zeros.
        scaling, rank, lora_dropout: plain numbers; they and the two parameters may be replaced.
        adapter: the name of the adapter in `lora_A` and `lora_B`; all three are None where it leaves the layer alone.
        resting, enabled: see `set_adapter` and `disable_lora`.

    Dtypes: the adapter is fp32 (fp64 on an fp64 base), so that small updates are not lost and gradient scaling
    works; `.to(dtype)` changes it as usual. The output has the dtype of the input (under autocast, autocast's),
    which is also the dtype computed in, except on an NF4 base with a `compute_dtype` of its own.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

    TypeError: `original_linear` is none of these (or acts unlike them); a setting is not a number.
    ValueError: rank, lora_alpha or lora_dropout out of range.
    """

    PARTS = ("lora_A", "lora_B")  # what an adapter of this kind consists of
    reads_submodules = True  # the base's weight, without calling the base; asked for by ZeRO-3

    def __init__(self, original_linear, rank=8, lora_alpha=16.0, lora_dropout=0.0):
        if isinstance(original_linear, LoRALinear):
            raise TypeError("original_linear is a LoRALinear already; adapters do not nest")
        if not self.fits(original_linear):
            kind = type(original_linear).__name__
            raise TypeError(f"original_linear must be an nn.Linear, NF4Linear or Conv1D, got {kind}")
        rank, lora_alpha, lora_dropout = check_settings(rank, lora_alpha, lora_dropout)
        super().__init__(original_linear.requires_grad_(False))
        self.out_features, self.in_features = features(original_linear)
        self.rank, self.lora_alpha, self.lora_dropout = rank, lora_alpha, lora_dropout
        self.scaling = lora_alpha / rank
        self.enabled, self.adapter, self.resting = True, "default", nn.ModuleDict()
        like = adapter_like(original_linear)
        self.lora_A = nn.Parameter(torch.empty(rank * stacked(original_linear), self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank * stacked(original_linear), **like))
        self.reset_parameters()
        self.train(original_linear.training)

    @staticmethod
    def fits(module) -> bool:
        """Whether this class can adapt the module."""
        return is_adaptable(module)

    def reset_parameters(self):
        """Make the adapter new: A random, B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x):
        """x: (..., in_features) → (..., out_features).

        RuntimeError: merged, in training mode and with dropout: a merged adapter cannot drop its input.
        """
        if not self.enabled:
            return base_forward(self.unmerged, x)
        if self._kept or self.adapter is None:
            if self._kept and self.training and self.lora_dropout > 0:
                raise RuntimeError("the adapter is merged, so its dropout cannot act: call unmerge_weights() or eval()")
            return base_forward(self.base_layer, x)
        x, base = autocast_input(x), self._modules["base_layer"]  # nn.Module's own look-up takes as long as a small sum
        if "forward" not in base.__dict__ and not any(map(base.__dict__.__getitem__, HOOKS)):
            return self.fused(x)
        y = base_forward(base, x)  # what hangs on the base acts as it does without an adapter
        return y + self.added_term(x, y, base, self.training)

    def added_term(self, x, y, base, training):
        """What the adapter adds to y, the base's output for x, in x's dtype: s · dropout(x) Aᵀ Bᵀ."""
        A, B = (factor.to(x.dtype) for factor in self.factors())
        return F.linear(F.linear(F.dropout(x, self.lora_dropout, training), A), B) * self.scaling

    def fused(self, x):
        """Base and adapter in one operation (`kernels/lora.py`), which does not call the base."""
        base, dropout = self._modules["base_layer"], self.lora_dropout if self.training else 0.0
        h, weight = operands(base, x)
        held = base._parameters
        bias = held["bias"] if "bias" in held else base.bias  # noqa: SIM401 - the slow look-up only where it must be
        y = lora_linear(h, weight, bias, *self.factors(), self.scaling, dropout)
        return y if h.dtype == x.dtype else y.to(x.dtype)  # and not by y's dtype, which `amp.autocast` has chosen

    def factors(self):
        """The A (r, in) and B (out, r) to compute with."""
        held = self._parameters
        A, B = held.get("lora_A"), held.get("lora_B")  # None where something else stands for the parameter
        return self.lora_A if A is None else A, self.lora_B if B is None else B

    def parts(self, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of `PARTS` by name, out of those that `save_adapter` has written of this layer."""
        return saved

    def delta_weight(self) -> torch.Tensor:
        """ΔW = scaling · B A, (out_features, in_features), in the adapter's dtype but at least fp32."""
        with torch.no_grad(), torch.autocast(self.lora_A.device.type, enabled=False):
            return self.delta()

    def delta(self) -> torch.Tensor:
        """`delta_weight` with its gradients."""
        A, B = self.factors()
        dtype = torch.promote_types(A.dtype, torch.float32)
        return (B.to(dtype) @ A.to(dtype)).mul_(self.scaling)

    def extra_repr(self):
        """What `print(model)` shows."""
        if self.adapter is None:
            return "no active adapter"
        state = "".join(f", {word}" for word, on in (("merged", self.merged), ("disabled", not self.enabled)) if on)
        return f"rank={self.rank}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}{state}"


class LoRALayer(LoRALinear):
    """A LoRA linear layer with a frozen weight of its own (initialized as nn.Linear is; no bias)."""

    def __init__(self, in_features, out_features, rank=8, lora_alpha=16.0, lora_dropout=0.0):
        super().__init__(nn.Linear(in_features, out_features, bias=False), rank, lora_alpha, lora_dropout)


def operands(base, x):
    """x in the dtype to compute in, and the weight as `lora_linear` takes it."""
    if not isinstance(base, NF4Linear):
        return x, base.weight if isinstance(base, nn.Linear) else dense_weight(base)
    # Asked first: `.to` takes time even where it changes nothing.
    return x if base.compute_dtype in (None, x.dtype) else x.to(base.compute_dtype), base.operand()


def check_settings(rank, lora_alpha, lora_dropout) -> tuple[int, float, float]:
    """The settings as Python's numbers, where they are numpy's."""
    values = rank, lora_alpha, lora_dropout
    rank, lora_alpha, lora_dropout = (value.item() if isinstance(value, np.generic) else value for value in values)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be finite, got {lora_alpha!r}")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must lie in [0, 1), got {lora_dropout!r}")
    return rank, lora_alpha, lora_dropout


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(path, layer) of every layer that has been given adapters, each layer once."""
    return ((path, module) for path, module in named_modules(model) if isinstance(module, LoRALinear))
