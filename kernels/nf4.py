"""NF4 dequantize (first delivery: the reference path; the Triton kernel follows)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

NF4_CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
)


class NestedScales(NamedTuple):
    """What decodes 8-bit scale codes c: `code[c] * absmax[i // block_size] + offset`, rounded after each step.

    Attributes:
        absmax: (number of scales / block_size, rounded up) fp32.
        code: (256,) fp32, the dynamic 8-bit map.
        offset: () fp32, the mean of the scales, on their device.
        block_size: scales that share one `absmax`.
    """

    absmax: torch.Tensor
    code: torch.Tensor
    offset: torch.Tensor
    block_size: int = 256


@lru_cache
def _quads() -> torch.Tensor:
    """(65536, 4) fp32: the four values held by two bytes, read as one little-endian uint16."""
    pair = torch.arange(65536)
    nibbles = torch.stack([(pair >> 4) & 15, pair & 15, pair >> 12, (pair >> 8) & 15], dim=1)
    return NF4_CODE[nibbles]


def decode_scales(absmax: torch.Tensor, nested: NestedScales | None) -> torch.Tensor:
    """One fp32 scale a block, whether they are stored as fp32 or as 8-bit codes."""
    if nested is None:
        return absmax
    per_scale = nested.absmax.repeat_interleave(nested.block_size)[: absmax.numel()]
    return nested.code[absmax.int()] * per_scale + nested.offset


TILE = 1 << 18


def nf4_dequantize_reference(packed, absmax, shape, dtype, block_size, nested=None, out=None):
    """Plain torch: two bytes at a time through a table of four values, then the scales, a tile at a time."""
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    flat, size = out.view(-1), out.numel()
    scales = decode_scales(absmax, nested)
    quads = _quads().to(packed.device)
    whole = size // 4 * 4
    index = torch.empty(min(TILE, whole) // 4, dtype=torch.int32, device=packed.device)
    scratch = None if out.dtype == torch.float32 else torch.empty(min(TILE, size), device=packed.device)
    for start in range(0, size, TILE):
        stop = min(start + TILE, size)
        tile = flat[start:stop] if scratch is None else scratch[: stop - start]
        full = (stop - start) // 4 * 4
        if full:
            i = index[: full // 4]
            i.copy_(packed[start // 2 : (start + full) // 2].view(torch.uint16))
            torch.index_select(quads, 0, i, out=tile[:full].view(-1, 4))
        if full < stop - start:
            last = packed[(start + full) // 2 : (stop + 1) // 2].int()
            nibbles = torch.stack([last >> 4, last & 15], dim=1).view(-1)[: stop - start - full]
            tile[full:] = NF4_CODE.to(packed.device)[nibbles]
        blocks = (stop - start) // block_size
        first = start // block_size
        if blocks:
            tile[: blocks * block_size].view(blocks, block_size).mul_(scales[first : first + blocks, None])
        if blocks * block_size < stop - start:
            tile[blocks * block_size :].mul_(scales[first + blocks])
        if scratch is not None:
            flat[start:stop].copy_(tile)
    return out


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
    nested: NestedScales | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values from NF4 codes: `NF4_CODE[code] * scale` in fp32, rounded once to `dtype`.

    Args:
        packed: uint8, any shape, contiguous: two codes a byte, the first in the high nibble.
        absmax: (blocks,) fp32 scales, or uint8 scale codes when `nested` is given.
        shape: shape of the result; its product is the number of codes.
        dtype: torch.float32, float16 or bfloat16.
        block_size: codes that share a scale, running over the flattened tensor.
        nested: how to decode `absmax`, or None.
        out: contiguous tensor of `shape` and `dtype` to write into.
    """
    return nf4_dequantize_reference(packed.view(-1), absmax, shape, dtype, block_size, nested, out)
