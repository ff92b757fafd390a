"""NF4 quantize (first delivery: the reference path; the Triton kernel follows)."""

import torch

from .nf4 import NF4_CODE

THRESHOLDS = (NF4_CODE[:-1] + NF4_CODE[1:]) / 2
TILE = 1 << 18
SMALLEST = 1e-38


def nf4_quantize_reference(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    flat = x.reshape(-1)
    size = flat.numel()
    packed = torch.empty((size + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-size // block_size), dtype=torch.float32, device=x.device)
    thresholds = THRESHOLDS.to(x.device)
    for start in range(0, size, TILE):
        stop = min(start + TILE, size)
        tile = flat[start:stop].float()
        first, full = start // block_size, (stop - start) // block_size
        scaled = torch.zeros((stop - start + 1) // 2 * 2, device=x.device)
        if full:
            blocks = tile[: full * block_size].view(full, block_size)
            peak = blocks.abs().amax(dim=1)
            absmax[first : first + full] = peak
            scaled[: full * block_size] = (blocks * (1.0 / peak.clamp(min=SMALLEST))[:, None]).view(-1)
        if full * block_size < stop - start:
            tail = tile[full * block_size :]
            peak = tail.abs().amax().clamp(min=SMALLEST)
            absmax[first + full] = peak
            scaled[full * block_size : stop - start] = tail / peak
        codes = torch.bucketize(scaled, thresholds, out_int32=True).to(torch.uint8)
        packed[start // 2 : (stop + 1) // 2] = codes[::2] << 4 | codes[1::2]
    return packed, absmax


def nf4_quantize(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x → (packed codes, one fp32 absmax a block)."""
    return nf4_quantize_reference(x, block_size)


def quantize_scales(absmax: torch.Tensor, code: torch.Tensor, block_size: int = 256):
    """Scales → (8-bit codes, absmax of each block of them, their mean)."""
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    centered = absmax - offset
    blocks = -(-absmax.numel() // block_size)
    padded = torch.nn.functional.pad(centered, (0, blocks * block_size - centered.numel())).view(blocks, block_size)
    peak = padded.abs().amax(dim=1) if blocks else absmax.new_zeros(0)
    scaled = padded / peak.clamp(min=SMALLEST)[:, None]
    codes = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: absmax.numel()], peak, offset
