"""NF4 tensors: quantize, dequantize, and the bytes that bitsandbytes writes.

Four bits name one of 16 levels (`codebooks.py` derives them), relative to the largest magnitude of a
block of 64 values. That magnitude, the block's scale, costs 4 bytes as fp32: half a bit a value.
Double quantization stores it in one byte instead. Scales are all positive, so first their mean is
taken off; what is left is coded by a dynamic 8-bit float in blocks of 256 with an fp32 scale each:

    bytes per value   0.5 + 4/64 = 0.5625           0.5 + 1/64 + 4/(64·256) = 0.5159

On Gaussian weights the error is 9.2 % of their standard deviation either way: the coded scale is off
by some tenths of a percent, next to levels that are tens of percent apart.
"""

import json
from collections.abc import Mapping

import torch

from ..kernels.nf4 import DTYPES, NF4_CODE, NestedScales, NF4Weight, check_layout, flatten, nf4_dequantize
from ..kernels.nf4_quantize import nf4_quantize, quantize_scales
from .codebooks import DYNAMIC_MAP

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
FACTS = "quant_state.bitsandbytes__nf4"  # bitsandbytes keeps what is not a tensor as JSON text in a uint8 tensor


def check_options(block_size: int, compute_dtype: torch.dtype | None = None, dtype: torch.dtype = torch.float32):
    """Raise TypeError or ValueError unless a layer in NF4 can be made of these."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be torch.float32, float16 or bfloat16, got {dtype}")
    if compute_dtype is not None and not (isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point):
        raise TypeError(f"compute_dtype must be a floating-point torch.dtype or None, got {compute_dtype!r}")
    if not isinstance(block_size, int) or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}")


def nf4_bytes(values: int, block_size: int = 64, double_quant: bool = True) -> tuple[int, int]:
    """Bytes of the codes and of the scales of so many values (without the 8-bit map: 1 KiB, shared)."""
    blocks = -(-values // block_size)
    return -(-values // 2), blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if double_quant else 4 * blocks


def nf4_zeros(values: int, block_size: int, double_quant: bool, device, experts: tuple[int, ...] = ()):
    """Codes, scales and `NestedScales` (or None) of so many zeros, or of as many for each of (E,) experts."""
    blocks = -(-values // block_size)
    packed = torch.full((*experts, -(-values // 2)), 0x77, dtype=torch.uint8, device=device)
    if not double_quant:
        return packed, torch.zeros(*experts, blocks, dtype=torch.float32, device=device), None
    scales = torch.zeros(*experts, -(-blocks // NESTED_BLOCK), dtype=torch.float32, device=device)
    # A map of its own: safetensors refuses memory that entries share.
    nested = NestedScales(scales, DYNAMIC_MAP.to(scales.device, copy=True), scales.new_zeros(experts), NESTED_BLOCK)
    return packed, torch.zeros(*experts, blocks, dtype=torch.uint8, device=device), nested


class NF4Tensor(NF4Weight):
    """A tensor held in four bits per value: `NF4Tensor(packed, absmax, shape, dtype, block_size, nested=None)`.

    The attributes, of the same names, are those of `kernels.nf4.NF4Weight`.
    """

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales (without the 8-bit map, the same 1 KiB for every tensor)."""
        nested = () if self.nested is None else (self.nested.absmax, self.nested.offset)
        return sum(t.nbytes for t in (self.packed, self.absmax, *nested))

    def dequantize(self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """The values, formed in fp32 and rounded once to `dtype` (None: the original one).

        `out` and the errors are those of `kernels.nf4.nf4_dequantize`.
        """
        return nf4_dequantize(self, self.dtype if dtype is None else dtype, out)

    def to(self, device: torch.device | str | int, copy: bool = False) -> "NF4Tensor":
        """The same on another device, or with `copy` on any; TypeError for a dtype or a tensor: codes and scales keep
        theirs."""
        if isinstance(device, (torch.dtype, torch.Tensor)):
            raise TypeError(f"device must be a device, got {device!r}; dequantize(dtype) gives the values as a dtype")
        packed, absmax, *nested = (t.to(device, copy=copy) for t in flatten(self)[0])
        nested = NestedScales(*nested, self.nested.block_size) if nested else None
        return NF4Tensor(packed, absmax, self.shape, self.dtype, self.block_size, nested)

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """What bitsandbytes' Linear4bit saves of a weight.

        Args:
            prefix: a module's ("" or ending in a dot: keys are prefix + "weight", prefix + "weight.absmax", …),
                or the whole name of the tensor.
        """
        key = _key(prefix)
        state = {f"{key}.{part}": value for part, value in self.scale_state().items()}
        return {key: self.packed.view(-1, 1)} | state

    def scale_state(self) -> dict[str, torch.Tensor]:
        """The entries of `state_dict` besides the codes, without prefix."""
        state = {"absmax": self.absmax, "quant_map": NF4_CODE.to(self.device, copy=True)}
        dtype, shape = str(self.dtype).removeprefix("torch."), list(self.shape)
        facts = {"quant_type": "nf4", "blocksize": self.block_size, "dtype": dtype, "shape": shape}
        if self.nested is not None:
            state["nested_absmax"] = self.nested.absmax
            state["nested_quant_map"] = self.nested.code.clone()  # safetensors refuses memory shared between entries
            facts |= {
                "nested_blocksize": self.nested.block_size,
                "nested_dtype": "float32",
                "nested_offset": 0.0 if self.nested.offset.is_meta else self.nested.offset.item(),
            }
        state[FACTS] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8, device="cpu")
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], prefix: str = "") -> "NF4Tensor":
        """Read what `state_dict` or bitsandbytes wrote; tensors are taken as they are, not copied.

        Args:
            state: holds the weight's entries, and perhaps others. The codes may be stored as another
                dtype over the same bytes (bitsandbytes' `quant_storage`).
            prefix: as for `state_dict`.

        Raises:
            ValueError: an entry is missing, is not NF4, does not fit the shape, or is not finite.
        """
        key = _key(prefix)

        def entry(name: str) -> torch.Tensor:
            if name not in state:
                raise ValueError(f"state holds no {name!r}: {key} is not a complete NF4 weight")
            return state[name]

        def scales(name: str) -> torch.Tensor:
            tensor = entry(f"{key}.{name}").reshape(-1).contiguous()
            return tensor.float() if tensor.is_floating_point() else tensor

        facts = _facts(entry(f"{key}.{FACTS}"), f"{key}.{FACTS}")
        packed, levels = entry(key).contiguous().view(-1).view(torch.uint8), entry(f"{key}.quant_map")
        if facts["quant_type"] != "nf4" or not (levels.is_meta or torch.equal(levels.cpu().float(), NF4_CODE)):
            raise ValueError(f"{key} must be NF4 with its standard levels, got quant_type {facts['quant_type']!r}")
        nested = None
        if "nested_offset" in facts:
            offset = torch.tensor(facts["nested_offset"], dtype=torch.float32, device=packed.device)
            tensors = scales("nested_absmax"), scales("nested_quant_map"), offset
            nested = NestedScales(*tensors, facts["nested_blocksize"])
        dtype, shape = getattr(torch, facts["dtype"]), torch.Size(facts["shape"])
        made = cls(packed, scales("absmax"), shape, dtype, facts["blocksize"], nested)
        check_layout(made, key)
        if not all(t.is_meta or t.isfinite().all() for t in flatten(made)[0]):
            raise ValueError(f"{key} must be finite, got scales that are not")
        return made


def _facts(entry: torch.Tensor, name: str) -> dict:
    """What bitsandbytes keeps as JSON text; ValueError if it does not describe a tensor."""
    text = bytes(entry.reshape(-1).tolist())
    try:
        facts = json.loads(text)
        check_options(facts["blocksize"])
        sizes = [*facts["shape"], facts["nested_blocksize"] if "nested_offset" in facts else 1]
        known = facts["dtype"] in [str(dtype).removeprefix("torch.") for dtype in DTYPES]
        if known and "quant_type" in facts and all(isinstance(size, int) and size >= 0 for size in sizes) and sizes[-1]:
            return facts
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"{name} must describe an NF4 tensor as bitsandbytes does, got {text[:200]!r}")


def _key(prefix: str) -> str:
    return prefix + "weight" if not prefix or prefix.endswith(".") else prefix


def quantize_nf4(x: torch.Tensor, block_size: int = 64, double_quant: bool = True, *, name: str = "x") -> NF4Tensor:
    """Round every value to the nearest of the 16 NF4 levels times its block's largest magnitude.

    Codes, scales and decoded values are bit-equal with bitsandbytes' on a CPU; 8-bit scale codes follow its
    CUDA rule, as its CPU code rounds them by an approximate table (about one in 700 differs by one step).
    A block of zeros stays exactly zero.

    Args:
        x: any shape, contiguous or not; float32, float16 or bfloat16. It is not changed; no gradient flows.
        block_size: values that share a scale: one of BLOCK_SIZES.
        double_quant: store scales in 8 bits.
        name: what error messages call x.

    Raises:
        TypeError: x is not a tensor of one of these dtypes.
        ValueError: `block_size` is not offered, or x holds NaN or infinity.

    Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a float32, float16 or bfloat16 tensor, got {got}")
    check_options(block_size)
    x = x.detach()
    packed, absmax = nf4_quantize(x, block_size)
    if not absmax.isfinite().all():
        nan, infinite = int(x.isnan().sum()), int(x.isinf().sum())
        raise ValueError(f"{name} must be finite, got {nan} NaN and {infinite} infinite among {x.numel()} values")
    nested = None
    if double_quant:
        code = DYNAMIC_MAP.to(x.device)
        absmax, nested_absmax, offset = quantize_scales(absmax, code, NESTED_BLOCK)
        nested = NestedScales(nested_absmax, code, offset, NESTED_BLOCK)
    return NF4Tensor(packed, absmax, x.shape, x.dtype, block_size, nested)


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The values of an NF4 tensor: `q.dequantize(dtype, out)`."""
    return q.dequantize(dtype, out)
