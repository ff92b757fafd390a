"""Experts in MXFP4, the format that gpt-oss is published in: 32 weights share a scale that is a power of two.

A code of 4 bits (E2M1) is a sign, two bits of exponent and one of mantissa: ±0, 0.5, 1, 1.5, 2, 3, 4 or 6. The scale is
a byte (E8M0), 2 to its value less 127, and 255 is NaN. So a decoded weight is exact in bf16, and 4.25 bits hold
what training made.

Source: OCP Microscaling Formats (MX) specification v1.0, sections 5.2 and 5.3.
"""

from types import SimpleNamespace

import torch
from torch import nn

from .experts import FusedExperts, adopt, grouped_linear
from .linear import FrozenNF4, autocast_input

LEVELS = 0, 0.5, 1, 1.5, 2, 3, 4, 6
NAN = 255  # of a scale
E2M1 = torch.tensor([*LEVELS, *(-level for level in LEVELS)], dtype=torch.float32, device="cpu")
PAIRS = torch.stack([E2M1.repeat(16), E2M1.repeat_interleave(16)], dim=1)  # (256, 2), by the byte that holds two codes
DECODING = 6  # bytes per weight, while an expert is decoded: half an int32 for its place in PAIRS, and fp32


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """blocks (…, G, 16) uint8, the earlier of two codes in the lower bits, and scales (…, G) uint8 → (…, 32 G)."""
    levels = PAIRS.to(blocks.device)[blocks.int()].flatten(-2)
    return torch.ldexp(levels, scales.int()[..., None] - 127, out=levels).flatten(-2).to(dtype)


class MXFP4Experts(FusedExperts, FrozenNF4):
    """One projection of all experts of a layer, y[s] = x[s] W[e(s)]ᵀ, in the bytes that the checkpoint has.

    To its layer W lies as (in, out), as in gpt-oss.

    Attributes:
        weight: (E, out, in / 32, 16) uint8, the codes.
        absmax: (E, out, in / 32) uint8, the scales.
    """

    compute_dtype, is_transposed = None, True

    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight, self.weight_dtype = nn.Parameter(blocks, requires_grad=False), dtype
        self.register_buffer("absmax", scales)

    @property
    def shape(self) -> torch.Size:
        E, out, groups, _ = self.weight.shape
        return torch.Size((E, 32 * groups, out))

    def take_place(self, model: nn.Module, name: str) -> None:
        """Stand where the fused weight `name` of the model is. ValueError: that is of another shape, or this is no
        number."""
        layer, child = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if self.shape != (shape := getattr(layer, child).shape):
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(self.shape)} in MXFP4")
        if (self.absmax == NAN).any():
            raise ValueError(f"{name} must be finite, got MXFP4 scales that are not")
        adopt(layer, {child: self})

    @property
    def quantized(self) -> SimpleNamespace:
        """What `quantization_summary` counts."""
        held = self.weight.numel() + self.absmax.numel()
        return SimpleNamespace(shape=self.shape, dtype=self.weight_dtype, nbytes=held)

    def decoded(self, e: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One expert's weight (out, in)."""
        return decode_mxfp4(self.weight[e], self.absmax[e], dtype or self.weight_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """All experts (E, in, out)."""
        return torch.stack([self.decoded(e, dtype).t() for e in range(len(self))])

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x (S, in), rows sorted by expert, and where those of each end, (E,) → (S, out), same dtype as x."""
        return _Product.apply(autocast_input(x), self, ends, True)


class _Product(torch.autograd.Function):
    """Expert by expert, the weight decoded for the length of a product, in forward and again in backward."""

    @staticmethod
    def forward(ctx, x, experts, ends, transposed):
        ctx.experts, ctx.ends, ctx.transposed = experts, ends, transposed

        def weight(e):
            return experts.decoded(e, x.dtype) if transposed else experts.decoded(e, x.dtype).t()

        return grouped_linear(x, weight, ends)

    @staticmethod
    def backward(ctx, dy):
        return _Product.apply(dy, ctx.experts, ctx.ends, not ctx.transposed), None, None, None
