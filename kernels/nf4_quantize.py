"""NF4 quantize: the nearest of sixteen levels for each value, relative to its block's largest magnitude.

    absmax[j] = max |x| over block j                         fp32
    code[i]   = number of thresholds below x[i] * (1 / absmax[j])

The thresholds are the 15 fp32 midpoints of neighbouring levels; a value exactly on one takes the
lower level. Every step is fp32 for every input dtype, and the same as in bitsandbytes' CPU code, bit
for bit: 1 / absmax is rounded before it is multiplied, a magnitude under 1e-38 counts as 1e-38, and
the last block, if it is short, is divided by its absmax instead (and stores at least 1e-38); the reference does that.

A search through 15 thresholds costs a comparison each. Neighbours are at least 0.08 apart, so 32
equal cells over [-1, 1], 0.067 wide, hold one threshold at most, and two look-ups replace the search:

    cell = ⌊15 x + 16.0625⌋        code = levels below the cell + (x > the cell's threshold)

A value within a rounding of a cell's edge may land on either side: both cells give the same code there.

Bytes: 2 (fp16, bf16) or 4 (fp32) in, 0.5 + 4/block_size out, one pass. The kernel holds its values in
registers between the maximum and the codes. The maximum is taken over the bits as integers, so that
NaN, whose bits lie above those of infinity, cannot hide. There is no gradient.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from .nf4 import NF4_CODE
from .runtime import backend, cdiv, launch, tl, triton

THRESHOLDS = (NF4_CODE[:-1] + NF4_CODE[1:]) / 2
SMALLEST = 1e-38
CELL_SLOPE, CELL_START = 15.0, 16.0625
BLOCK = 4096  # values per program
TILE = 1 << 17  # values per step of `nf4_quantize_tiled`


def nf4_quantize_reference(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide each block by its largest magnitude, search the thresholds, pack two codes per byte."""
    flat = x.reshape(-1).float()
    blocks = F.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, None]
    if flat.numel() % block_size:
        absmax[-1] = absmax[-1].clamp(min=SMALLEST)
        scaled[-1] = blocks[-1] / absmax[-1]
    codes = torch.bucketize(scaled.view(-1), THRESHOLDS.to(x.device)).to(torch.uint8)  # on a threshold: the lower level
    codes = F.pad(codes[: flat.numel()], (0, flat.numel() % 2), value=7)  # 7 is exact zero
    return codes[0::2] << 4 | codes[1::2], absmax


def nf4_quantize_tiled(flat: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's bits, fast on a CPU: two look-ups instead of a search, a tile at a time while it is in cache.

    `flat` holds whole blocks. Where an absmax is not finite, codes are arbitrary.
    """
    packed = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(flat.numel() // block_size, dtype=torch.float32, device=flat.device)
    threshold_of, below = _cells(flat.device)
    memory = torch.empty(2, min(TILE, flat.numel()), dtype=torch.float32, device=flat.device)  # of every tile
    for start in range(0, flat.numel(), TILE):
        blocks = flat[start : start + TILE].float().view(-1, block_size)
        scaled, other = memory[:, : blocks.numel()]
        peak = torch.abs(blocks, out=other.view_as(blocks)).amax(dim=1)
        absmax[start // block_size :][: len(blocks)] = peak
        if not peak.isfinite().all():
            continue
        torch.mul(blocks, (1.0 / peak.clamp(min=SMALLEST))[:, None], out=scaled.view_as(blocks))
        cell = torch.mul(scaled, CELL_SLOPE, out=other).add_(CELL_START).int()
        codes = below.index_select(0, cell)
        codes += (scaled > torch.index_select(threshold_of, 0, cell, out=other)).view(torch.uint8)
        # Two codes as one little-endian int16: 4097 adds the first, four bits up, to the high byte.
        codes.view(torch.int16).mul_(4097)
        packed[start // 2 :][: codes.numel() // 2] = codes[1::2]
    return packed, absmax


@lru_cache
def _cells(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of the 32 cells: the threshold in it (2, out of reach, if none), and the thresholds below it."""
    start = (torch.arange(33, dtype=torch.float32, device="cpu") - CELL_START) / CELL_SLOPE
    below = torch.searchsorted(THRESHOLDS, start, out_int32=True)
    threshold = torch.where(below[:-1] < below[1:], THRESHOLDS[below[:-1].clamp(max=14)], 2.0)
    return threshold.to(device), below[:-1].to(torch.uint8).to(device)


@lru_cache
def _cell_words(device: torch.device) -> torch.Tensor:
    """(32,) int64: a cell's threshold as fp32 bits in the low half, the number of thresholds below in the high half."""
    threshold, below = _cells(torch.device("cpu"))
    return torch.stack([threshold.view(torch.int32), below.int()], dim=1).view(torch.int64).view(32).to(device)


@triton.jit
def _nf4_quantize(
    x_ptr, packed_ptr, absmax_ptr, cells_ptr, N, N_BLOCKS,
    SLOPE: tl.constexpr, START: tl.constexpr, SMALLEST: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    SCALES: tl.constexpr = BLOCK // BLOCK_SIZE
    RUNS: tl.constexpr = BLOCK_SIZE // 32
    run = tl.arange(0, RUNS)[:, None, None]
    block = tl.arange(0, SCALES)[None, :, None]
    start = block * BLOCK_SIZE + run * 32  # [RUNS, SCALES, 1]
    left = N - pid * BLOCK
    left = tl.where(left < BLOCK, left, BLOCK).to(tl.int32)
    offs = start + tl.arange(0, 32)[None, None, :]  # [RUNS, SCALES, 32]
    inside = tl.broadcast_to(start < left, (RUNS, SCALES, 32))
    x = tl.load(x_ptr + pid * BLOCK + offs, mask=inside, other=0.0).to(tl.float32)

    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    peak = tl.max(tl.max(bits, axis=2), axis=0).to(tl.float32, bitcast=True)  # [SCALES]
    smallest = tl.full((SCALES,), SMALLEST, tl.float32)
    floored = tl.where(peak < smallest, smallest, peak)
    scaled = x * tl.div_rn(tl.full((SCALES,), 1.0, tl.float32), floored)[None, :, None]
    offs_s = pid * SCALES + tl.arange(0, SCALES)
    tl.store(absmax_ptr + offs_s, peak, mask=offs_s < N_BLOCKS)

    # Adding 2^23 leaves 8 cells of x in the low bits; a conversion to int runs at a quarter of the speed.
    cell = ((scaled * (8 * SLOPE) + (8 * START - 0.5 + 8388608.0)).to(tl.int32, bitcast=True) >> 3) & 31
    word = tl.gather(tl.load(cells_ptr + tl.arange(0, 32)), tl.reshape(cell, (BLOCK,)), 0)
    word = tl.reshape(word, (RUNS, SCALES, 32))
    threshold = word.to(tl.int32).to(tl.float32, bitcast=True)
    code = (word >> 32).to(tl.int32) + (scaled > threshold).to(tl.int32)

    # Eight codes make a 32-bit word: the first two in its lowest byte, the earlier one in the high nibble.
    place = tl.arange(0, 8)
    shift = ((place // 2) * 8 + 4 - (place % 2) * 4)[None, None, None, :]
    words = tl.sum(tl.reshape(code, (RUNS, SCALES, 4, 8)) << shift, axis=3)  # [RUNS, SCALES, 4]
    words = tl.reshape(tl.permute(words, (1, 0, 2)), (BLOCK // 8,))  # in the order of memory: whole sectors
    offs_w = tl.arange(0, BLOCK // 8)
    tl.store(packed_ptr + pid * (BLOCK // 8) + offs_w, words, mask=offs_w // 4 * 32 < left)


def _launch(x, block_size):
    """Codes of x, a flat tensor of whole blocks, and one absmax a block."""
    words = torch.empty(x.numel() // 8, dtype=torch.int32, device=x.device)  # of eight codes
    absmax = torch.empty(x.numel() // block_size, dtype=torch.float32, device=x.device)
    if x.numel():
        launch(
            _nf4_quantize, (cdiv(x.numel(), BLOCK), 1, 1),
            x, words, absmax, _cell_words(x.device), x.numel(), absmax.numel(), SLOPE=CELL_SLOPE, START=CELL_START,
            SMALLEST=SMALLEST, BLOCK_SIZE=block_size, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return words.view(torch.uint8), absmax


def nf4_quantize(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a tensor.

    Args:
        x: any shape; float32, float16 or bfloat16. Blocks run over x flattened in row-major order.
        block_size: a power of two, 32 to 4096.

    Returns:
        packed: (⌈n / 2⌉,) uint8, the first code of a pair in the high nibble; an odd count is padded with 7.
        absmax: (⌈n / block_size⌉,) fp32. It is not finite where the block holds NaN or infinity;
            the block's codes are arbitrary then.
    """
    where = backend(x)
    flat = x.reshape(-1).contiguous()  # of every other value, for one, reshape makes a view that skips them
    if where == "interpreter" and x.dtype == torch.bfloat16:
        flat = flat.float()  # exact; the interpreter has no bf16 of its own
    whole = flat.numel() // block_size * block_size
    packed, absmax = (nf4_quantize_tiled if where == "torch" else _launch)(flat[:whole], block_size)
    if whole < flat.numel():
        last, last_absmax = nf4_quantize_reference(flat[whole:], block_size)
        packed, absmax = torch.cat([packed, last]), torch.cat([absmax, last_absmax])
    return packed, absmax


def quantize_scales(
    absmax: torch.Tensor, code: torch.Tensor, block_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization: scales to 8-bit codes, as bitsandbytes' CUDA kernel does it. Plain torch: 1/64 of the data.

    offset = mean of the scales; d = scale - offset; code = the nearest entry of the map to
    d * (1 / max |d| over its block), the lower one on a tie.

    Args:
        absmax: (n,) fp32 scales.
        code: (256,) fp32, the sorted 8-bit map.
        block_size: scales that share an absmax of their own.

    Returns:
        codes: (n,) uint8.
        nested_absmax: (⌈n / block_size⌉,) fp32.
        offset: () fp32.
    """
    if absmax.numel() == 0:
        return absmax.to(torch.uint8), absmax.clone(), absmax.new_zeros(())
    offset = absmax.mean()
    if not offset.isfinite():
        offset = absmax.double().mean().float()  # only the sum of huge scales overflows, not their mean
    padding = -absmax.numel() % block_size
    centred = F.pad(absmax - offset, (0, padding)).view(-1, block_size)
    peak = centred.abs().amax(dim=1)
    scaled = centred * (1.0 / peak.clamp(min=SMALLEST))[:, None]
    codes = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: absmax.numel()].clone(), peak, offset  # no view of the padding: safetensors refuses one
