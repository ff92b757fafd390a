"""A few rows meet an NF4 weight: y = x Wᵀ + b + s S Bᵀ with W read as codes, as when tokens are generated.

Up to 16 rows the time goes into reading W: 0.516 bytes per weight, 2.0 µs for 4096 × 4096 at 4.3 TB/s. At that
speed a multiprocessor has some 4 instructions per weight to spend, so the kernel is about not spending them:

- **A byte picks both of its values** from a table of 256 pairs in 16 bits, which is how the tensor cores take them.
- **Nothing changes threads.** Of sixteen columns of W an mma instruction wants four, 4q … 4q + 3, in the threads with
  lane % 4 = q. In which order a block of 64 is summed is free, though, if x follows: thread q takes the 16
  columns 16q … 16q + 15 instead, eight bytes of codes in one load and two loads of x, straight into place.
- **A scale is applied to a sum** over its 64 weights, not to weights. So the levels alone are rounded to 16 bits.
- **Each warp has a slice of K** of its own; no warp waits for another, and x is read once by each program.
- **Splitting K further** fills the card: 512 programs of four warps for 4096 × 4096. Parts go to memory, and whoever
  comes last (a counter tells) adds them in their order, so that every run gives the same bits.

Counted in machine code for sm_90 at 4096 × 4096, r 16 (`handtuned xray nf4_ --arch sm_90`): 4.4 instructions per weight
with one row, 5.0 with 16. The price of pairs are bank conflicts, 3.1 wavefronts per look-up of 32 bytes.

FP32, and cards before sm_80, have no tensor cores that Triton reaches: the same kernel multiplies one row per
program with plain FP32 arithmetic, and `nf4_matmul.py` sends no more than four rows here.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from .nf4 import nf4_dequantize_reference, nf4_pointers, pair_table, scale_of
from .runtime import block_of, cdiv, dot_dtype, launch, runs_product, stored_dtype, tl, triton

BLOCK = {"BLOCK_N": 32, "SLICES": 4}  # a warp for each slice of K
PROGRAMS = 396  # three, of four warps, on each of 132 multiprocessors; a constant, so that sums are split alike
MOST_SPLITS = 16


def nf4_stream_reference(x, weight, bias, S, lora_B, scale):
    """x (M, K), W (N, K) in NF4, b (N,), S (M, r), B (N, r) → y = x Wᵀ + b + s S Bᵀ in x's dtype."""
    W = nf4_dequantize_reference(weight, x.dtype)
    return F.linear(x, W, bias) + scale * (S @ lora_B.to(x.dtype).t())


@triton.jit
def _pairs_of(words, pairs, DOT: tl.constexpr):
    """Words [...] of eight codes → their values in order, [..., 2, 2, 2]."""
    halves = tl.join(words, words >> 16)
    byte = tl.join(halves, halves >> 8) & 255
    pair = tl.reshape(tl.gather(pairs, tl.reshape(byte, [byte.numel]), 0), byte.shape)
    BITS: tl.constexpr = DOT.primitive_bitwidth
    HALF: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    return tl.join(pair.to(HALF).to(DOT, bitcast=True), (pair >> BITS).to(HALF).to(DOT, bitcast=True))


@triton.jit
def _product(w, x, TENSOR: tl.constexpr):
    """[S, BLOCK_N, k] by [S, k, ROWS] → [S, BLOCK_N, ROWS] fp32. Without tensor cores there is one row."""
    if TENSOR:
        y = tl.dot(w, x, input_precision="ieee")
    else:
        y = tl.sum(w * tl.permute(x, (0, 2, 1)), axis=2)[:, :, None]
    return y


@triton.jit
def _stream_kernel(
    x_ptr,  # (M, K)
    words_ptr,  # (N, K / 8) int32
    absmax_ptr,  # (N K / BLOCK_SIZE,)
    nested_absmax_ptr, nested_code_ptr, offset_ptr,  # fp32 (·,), (256,), (), or None
    pairs_ptr,  # (256,)
    bias_ptr,  # (N,) or None
    s_ptr,  # (M, r)
    b_ptr,  # (N, r)
    y_ptr,  # (M, N)
    parts_ptr,  # (SPLITS · SLICES, M, N) fp32
    turns_ptr,  # (programs but for the splits,) int32, zeros before and after
    M, N, K, r, stride_xm, stride_xk, stride_sm, stride_sr, stride_bn, stride_br,
    scale, steps,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK: tl.constexpr, DOT: tl.constexpr, TENSOR: tl.constexpr,
    SPLITS: tl.constexpr, SLICES: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = min(ROWS, 8)
    split, slices = tl.program_id(1), tl.arange(0, SLICES)
    first_n, first_m = tl.program_id(0) * BLOCK_N, tl.program_id(2) * ROWS
    offs_n, offs_m = first_n + tl.arange(0, BLOCK_N), first_m + tl.arange(0, ROWS)
    rows = tl.minimum(offs_n, N - 1) - first_n  # rows past the end read the last one, and are not stored
    pairs = tl.load(pairs_ptr + tl.arange(0, 256))

    # A thread's share of W: [BLOCK_N / 8, SLICES, 8, 4, 2] words; of x: [2, ROWS / LANES, SLICES, LANES, 4, 8].
    four, eight = tl.arange(0, 4)[:, None], tl.arange(0, 8)[None, :]
    pair = four * 2 + tl.arange(0, 2)[None, :]
    w_offs = tl.reshape(rows, [BLOCK_N // 8, 1, 8, 1, 1]) * (K // 8) + pair[None, None, None, :, :]
    w_offs += (slices * 8)[None, :, None, None, None]
    w_ptr = words_ptr + first_n.to(tl.int64) * (K // 8)
    m = tl.reshape(offs_m, [1, ROWS // LANES, 1, LANES, 1, 1])
    k = (slices * 64)[:, None, None, None] + (four * 16 + eight)[None, None, :, :]
    k = (tl.arange(0, 2) * 8)[:, None, None, None, None, None] + k[None, None, :, :, :, :]
    x_ptrs = x_ptr + m.to(tl.int64) * stride_xm + k.to(tl.int64) * stride_xk
    first_block = tl.minimum(offs_n, N - 1) * (K // 64)  # a number below 2^31 for any weight that fits a card

    acc = tl.zeros([SLICES, BLOCK_N, ROWS], dtype=tl.float32)
    start = split * steps * SLICES
    stop = min(start + steps * SLICES, K // 64)
    inside = start + slices < stop
    words = tl.load(w_ptr + start * 8 + w_offs, mask=inside[None, :, None, None, None], other=0)
    for first in range(start, stop, SLICES):
        in_k = first + slices < stop
        block = (first_block[:, None] + (first + slices)[None, :]).to(tl.uint32) // (BLOCK_SIZE // 64)
        code = tl.load(absmax_ptr + block, mask=in_k[None, :], other=0)
        x_mask = (m < M) & in_k[None, None, :, None, None, None]
        x = tl.load(x_ptrs + tl.cast(first, tl.int64) * 64 * stride_xk, mask=x_mask, other=0.0).to(DOT)
        w = tl.reshape(_pairs_of(words, pairs, DOT), [BLOCK_N // 8, SLICES, 8, 4, 4, 4])
        ahead = first + SLICES + slices < stop  # the next words are on their way while these are multiplied
        words = tl.load(w_ptr + (first + SLICES) * 8 + w_offs, mask=ahead[None, :, None, None, None], other=0)
        scales = scale_of(code, block, in_k[None, :], nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED_BLOCK)
        w = tl.reshape(tl.permute(w, (1, 0, 2, 4, 3, 5)), [SLICES, BLOCK_N, 64])
        x = tl.reshape(x, [2, ROWS // LANES, SLICES, LANES, 4, 2, 4])
        x = tl.reshape(tl.permute(x, (2, 0, 5, 4, 6, 1, 3)), [SLICES, 64, ROWS])
        acc += _product(w, x, TENSOR) * tl.permute(scales, (1, 0))[:, :, None]
    in_n, in_m = offs_n < N, offs_m < M
    if split == 0:
        for j in range(0, r, 16 * SLICES):
            offs_r = (j + slices[:, None] * 16 + tl.arange(0, 16)[None, :]).to(tl.int64)  # [SLICES, 16]
            b_ptrs = b_ptr + offs_n.to(tl.int64)[None, :, None] * stride_bn + offs_r[:, None, :] * stride_br
            b = tl.load(b_ptrs, mask=in_n[None, :, None] & (offs_r < r)[:, None, :], other=0.0).to(DOT)
            s_ptrs = s_ptr + offs_m.to(tl.int64)[None, None, :] * stride_sm + offs_r[:, :, None] * stride_sr
            s = tl.load(s_ptrs, mask=in_m[None, None, :] & (offs_r < r)[:, :, None], other=0.0).to(DOT)
            acc += _product(b, s, TENSOR) * scale

    # Every slice leaves its part in memory; whoever comes last adds them in their order: the same bits in every run.
    mask = in_n[:, None] & in_m[None, :]
    part, out = tl.cast(M, tl.int64) * N, offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    parts = parts_ptr + (split * SLICES + slices)[:, None, None] * part + out[None, :, :]
    tl.store(parts, acc, mask=tl.broadcast_to(mask[None, :, :], [SLICES, BLOCK_N, ROWS]))
    tl.debug_barrier()
    turn = turns_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(turn, 1, sem="acq_rel") == SPLITS - 1:
        y = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
        for i in tl.static_range(SPLITS * SLICES):
            y += tl.load(parts_ptr + i * part + out, mask=mask, other=0.0, cache_modifier=".cg")
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + out, y, mask=mask)
        tl.store(turn, 0)


def _turns(x: torch.Tensor, count: int) -> torch.Tensor:
    """`count` zeros, which a kernel leaves as zeros, so that they serve the next one on the same stream."""
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    return _zeros(x.device, torch.cuda.current_stream(x.device).cuda_stream, block_of(count, 4096, 1 << 30))


@lru_cache
def _zeros(device: torch.device, stream: int, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def nf4_stream(x, weight, bias, S, lora_B, scale) -> torch.Tensor:
    """y = x Wᵀ + b + scale · S Bᵀ with W read as codes.

    Args:
        x: (M, K), few rows, K a multiple of 64; fp32, fp16 or bf16.
        weight: NF4, (N, K), with a block size that is a multiple of 64.
        bias: (N,) or None.
        S: (M, r) in x's dtype.
        lora_B: (N, r).
        scale: a number.

    Returns:
        (M, N) in x's dtype.
    """
    (M, K), N, r = x.shape, weight.shape[0], S.shape[1]
    y = torch.empty((M, N), dtype=stored_dtype(x.dtype), device=x.device)
    if y.numel() == 0:
        return y.to(x.dtype)
    tensor = x.dtype != torch.float32 and runs_product(x)
    rows = (8 if M <= 8 else 16) if tensor else 1
    tiles, deep = cdiv(N, BLOCK["BLOCK_N"]), max(cdiv(K // 64, BLOCK["SLICES"]), 1)
    steps = max(deep // cdiv(PROGRAMS, tiles), cdiv(deep, MOST_SPLITS))
    splits = cdiv(deep, steps)
    weights, blocks = nf4_pointers(weight)
    dot = dot_dtype(x.dtype) if tensor else tl.float32
    pairs = pair_table(x.device, x.dtype if tensor and dot != tl.float32 else torch.float32)
    parts = torch.empty((splits * BLOCK["SLICES"], M, N), dtype=torch.float32, device=x.device)
    launch(
        _stream_kernel, (tiles, splits, cdiv(M, rows)),
        x, *weights, pairs, bias, S, lora_B, y, parts, _turns(x, tiles * cdiv(M, rows)),
        M, N, K, r, *x.stride(), *S.stride(), *lora_B.stride(), float(scale), steps, **blocks, DOT=dot,
        TENSOR=tensor, SPLITS=splits, ROWS=rows, **BLOCK, num_warps=BLOCK["SLICES"], num_stages=1,
    )  # fmt: skip
    return y.to(x.dtype)
