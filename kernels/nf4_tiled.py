"""16-bit rows meet an NF4 weight by torch, on a CPU where `nf4_cpu.py` has no product: without a compiler or AVX2.

torch multiplies 16-bit matrices several times more slowly there than fp32 ones, so fp32 multiplies operands that were
rounded to 16 bits: what a GPU does with its fp32 accumulators. W is dense a tile at a time, which stays in the cache.
"""

import torch

from .nf4 import NF4Weight, decode_scales, nf4_dequantize
from .runtime import cdiv, scratch

TILE_ROWS = 512  # of W


def nf4_product_tiled(x, weight, transposed, bias=None, S=None, low=None, scale=1.0) -> torch.Tensor:
    """As `nf4_product_native` in torch: fp32 arithmetic, W rounded to x's dtype, TILE_ROWS of its rows at a time."""
    (N, K), block_size = weight.shape, weight.block_size
    rows = TILE_ROWS if TILE_ROWS * K % block_size == 0 else N
    scales, wide = decode_scales(weight.absmax, weight.nested), x.float()
    y = wide.new_zeros(len(x), N if transposed else K)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        packed, absmax = weight.packed[start * K // 2 :], scales[start * K // block_size :]
        packed, absmax = packed[: cdiv((stop - start) * K, 2)], absmax[: cdiv((stop - start) * K, block_size)]
        part = NF4Weight(packed, absmax, torch.Size((stop - start, K)), x.dtype, block_size)
        tile = nf4_dequantize(part, torch.float32, out=scratch(part.shape, torch.float32, x.device))
        tile.copy_(tile.to(x.dtype))
        if transposed:
            torch.mm(wide, tile.t(), out=y[:, start:stop])
        else:
            y.addmm_(wide[:, start:stop], tile)
    if S is not None:
        low = low.to(x.dtype).float()
        y.addmm_(S.float(), low.t() if transposed else low, alpha=scale)
    return (y if bias is None else y.add_(bias.to(x.dtype))).to(x.dtype)
