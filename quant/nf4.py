"""NF4 tensors: quantize, dequantize, and the bytes that bitsandbytes writes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..kernels.nf4 import NF4_CODE, NestedScales, nf4_dequantize
from ..kernels.nf4_quantize import nf4_quantize, quantize_scales
from .codebooks import dynamic_map

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STATE_KEY = "quant_state.bitsandbytes__nf4"


def _weight_key(prefix: str) -> str:
    return prefix + "weight" if not prefix or prefix.endswith(".") else prefix


@dataclass
class NF4Tensor:
    """A tensor held in four bits a value.

    Attributes:
        packed: (⌈n / 2⌉,) uint8, two codes a byte, the first in the high nibble.
        absmax: (⌈n / block_size⌉,) one scale a block: fp32, or uint8 codes when `nested` is there.
        shape: of the tensor that was quantized.
        dtype: of the tensor that was quantized: float32, float16 or bfloat16.
        block_size: values that share a scale, running over the flattened tensor.
        nested: what decodes 8-bit scales (double quantization), or None.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    nested: NestedScales | None = None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of everything that grows with the tensor (the shared 256-entry code table is left out)."""
        tensors = [self.packed, self.absmax]
        if self.nested is not None:
            tensors += [self.nested.absmax, self.nested.offset]
        return sum(t.numel() * t.element_size() for t in tensors)

    def dequantize(self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """The values as `dtype` (the original dtype if None), into `out` if given."""
        return nf4_dequantize(
            self.packed, self.absmax, self.shape, dtype or self.dtype, self.block_size, self.nested, out
        )

    def to(self, device) -> "NF4Tensor":
        """The same tensor on `device`."""
        nested = self.nested
        if nested is not None:
            nested = NestedScales(*(t.to(device) for t in nested[:3]), nested.block_size)
        return NF4Tensor(
            self.packed.to(device), self.absmax.to(device), self.shape, self.dtype, self.block_size, nested
        )

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors that bitsandbytes' Linear4bit saves, under `prefix` + "weight"."""
        key = _weight_key(prefix)
        state = {
            key: self.packed.view(-1, 1),
            f"{key}.absmax": self.absmax,
            f"{key}.quant_map": NF4_CODE.to(self.device),
        }
        facts = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if self.nested is not None:
            state[f"{key}.nested_absmax"] = self.nested.absmax
            state[f"{key}.nested_quant_map"] = self.nested.code.clone()
            facts["nested_blocksize"] = self.nested.block_size
            facts["nested_dtype"] = "float32"
            facts["nested_offset"] = 0.0 if self.nested.offset.is_meta else self.nested.offset.item()
        state[f"{key}.{STATE_KEY}"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], prefix: str = "") -> "NF4Tensor":
        """Read what `state_dict` or bitsandbytes' Linear4bit wrote under `prefix` + "weight"."""
        key = _weight_key(prefix)
        packed = state[key]
        facts = json.loads(bytes(state[f"{key}.{STATE_KEY}"].tolist()))
        nested = None
        if "nested_offset" in facts:
            nested = NestedScales(
                state[f"{key}.nested_absmax"],
                state[f"{key}.nested_quant_map"],
                torch.tensor(facts["nested_offset"], dtype=torch.float32, device=packed.device),
                facts["nested_blocksize"],
            )
        return cls(
            packed.contiguous().view(torch.uint8).view(-1),
            state[f"{key}.absmax"],
            torch.Size(facts["shape"]),
            getattr(torch, facts["dtype"]),
            facts["blocksize"],
            nested,
        )


def quantize_nf4(x: torch.Tensor, block_size: int = 64, double_quant: bool = True, name: str = "x") -> NF4Tensor:
    """x → NF4."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}")
    x = x.detach()
    packed, absmax = nf4_quantize(x, block_size)
    if not torch.isfinite(absmax).all():
        nan, inf = int(x.isnan().sum()), int(x.isinf().sum())
        raise ValueError(f"{name} must be finite, got {nan} NaN and {inf} infinite of {x.numel()} values")
    nested = None
    if double_quant:
        code = dynamic_map().to(x.device)
        absmax, absmax2, offset = quantize_scales(absmax, code)
        nested = NestedScales(absmax2, code, offset)
    return NF4Tensor(packed, absmax, x.shape, x.dtype, block_size, nested)


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """NF4 → values."""
    return q.dequantize(dtype, out)
