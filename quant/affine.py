"""The textbook scheme: evenly spaced levels between a group's smallest and largest value.

    scale      = (max - min) / (2^bits - 1)
    zero_point = min                                 the value that code 0 stands for
    code       = round((w - zero_point) / scale)     0 … 2^bits - 1
    w'         = code * scale + zero_point

The name follows the study documents; elsewhere "zero point" is the integer code that stands for zero, round(-min /
scale), which costs a little accuracy and keeps zero exact. For their example, W = [0.123, -0.456, 0.789, -0.234] with 4
bits, scale = 0.083 and the codes are [7, 0, 15, 3]; the smallest value always has code 0.

Against NF4 (groups of 64, relative error): on Gaussian weights 0.090 against 0.092, at the price of two
constants a group instead of one and of zero moving; on uniform weights 0.064 against 0.091. With
one constant, absmax / 7, evenly spaced levels give 0.108 on Gaussian weights: that is what NF4 improves on.
"""

from dataclasses import dataclass

import torch

from ..kernels.nf4 import DTYPES, check_float


def quantize_affine(x: torch.Tensor, bits: int = 4, group_size: int = 64) -> "AffineTensor":
    """Round every value to the nearest of 2^bits evenly spaced levels of its group.

    Args:
        x: any shape; float32, float16 or bfloat16.
        bits: 1 to 8.
        group_size: values that share scale and zero point; at least 1.

    Raises:
        TypeError: x is not a tensor of one of these dtypes.
        ValueError: `bits` or `group_size` is out of range, or x holds NaN or infinity, or spans
            more than fp32's range within a group.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"x must be a float32, float16 or bfloat16 tensor, got {got}")
    if not isinstance(bits, int) or bits not in range(1, 9):
        raise ValueError(f"bits must be a whole number from 1 to 8, got {bits!r}")
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a whole number of at least 1, got {group_size!r}")
    if bad := int((~x.isfinite()).sum()):
        raise ValueError(f"x must be finite, got {bad} values that are not among {x.numel()}")
    groups, levels = _in_groups(x.detach().float(), group_size), 2**bits - 1
    low, high = groups.amin(1), groups.amax(1)
    if ((high - low) == float("inf")).any():
        raise ValueError("x must span less than the fp32 range in every group, got a group whose max - min overflows")
    scale = (high - low) / levels
    # At the very end of fp32 a scale that was rounded up would decode the largest value to infinity.
    scale = torch.where((low + scale * levels).isinf(), scale.nextafter(torch.zeros_like(scale)), scale)
    step = torch.where(scale > 0, scale, 1.0)[:, None]
    codes = ((groups - low[:, None]) / step).round().clamp(0, levels)
    flat = codes.view(-1)[: x.numel()].to(torch.uint8)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).view(-1, per_byte)
    packed = (padded << _shifts(bits, x.device)).sum(1, dtype=torch.uint8)
    return AffineTensor(packed, scale, low, x.shape, x.dtype, bits, group_size)


def dequantize_affine(q: "AffineTensor", dtype: torch.dtype | None = None) -> torch.Tensor:
    """The values of an affine tensor: `q.dequantize(dtype)`."""
    return q.dequantize(dtype)


@dataclass(eq=False)
class AffineTensor:
    """A tensor as evenly spaced codes. Groups run over the flattened tensor; the last may be short."""

    packed: torch.Tensor  # uint8, 8 // bits codes per byte, the first in the highest bits
    scale: torch.Tensor  # (groups,) fp32
    zero_point: torch.Tensor  # (groups,) fp32, the value of code 0: the group's smallest
    shape: torch.Size  # of the tensor that was quantized, like the next
    dtype: torch.dtype
    bits: int  # of a code
    group_size: int  # values that share scale and zero point

    @property
    def codes(self) -> torch.Tensor:
        """The codes, unpacked to one uint8 each, in the tensor's shape."""
        codes = (self.packed[:, None] >> _shifts(self.bits, self.packed.device)) & (2**self.bits - 1)
        return codes.view(-1)[: self.shape.numel()].view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return self.packed.nbytes + self.scale.nbytes + self.zero_point.nbytes

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values, formed in fp32 and rounded to `dtype` (None: the original one).

        Raises:
            TypeError: `dtype` is not a floating-point dtype.
        """
        dtype = self.dtype if dtype is None else dtype
        check_float(dtype)
        groups = _in_groups(self.codes.float(), self.group_size)
        values = groups * self.scale[:, None] + self.zero_point[:, None]
        return values.view(-1)[: self.shape.numel()].view(self.shape).to(dtype)


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    return torch.arange((8 // bits - 1) * bits, -1, -bits, dtype=torch.uint8, device=device)


def _in_groups(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """(groups, group_size), the last group filled up with its last value."""
    flat = x.reshape(-1)
    return torch.cat([flat, flat[-1:].expand(-flat.numel() % group_size)]).view(-1, group_size)
