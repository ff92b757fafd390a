"""Rows meet NF4 weights that are decoded tile by tile: those of one layer, or of many experts in one launch.

    forward     y[m] = x[m] W[e(m)]ᵀ + b + s S[m] Bᵀ          x (M, K) → y (M, N); or x W[e], weights lying as (in, out)
    backward    dx[m] = dy[m] W[e(m)] + dS[m] A               the same product the other way; no dW: weights are frozen

A tile of W is decoded beside the tensor cores, rounded as dequantizing would, and never written to memory. A linear
layer has one W, and there the accumulator starts at s S Bᵀ (`nf4_matmul.py` says when this is the way).

A mixture of experts sends each token to a few of its E experts, so a layer holds E small products, of as many rows as
the router chose. Rows come sorted by expert, and `ends` (E,) says where those of each end: expert e has the rows
ends[e - 1] … ends[e] - 1, none if it was not chosen. Which tile of rows a program has it finds out itself, from the
running sum of ⌈rows / BLOCK_M⌉: nobody on the host has to know how many rows an expert got, and there is one launch.
The weights (E, N, K) lie expert after expert, each with scales of its own: no block of 64 reaches into the next expert,
so one can be quantized, read or given back without the others. A program moves its five pointers to its expert.

Bytes: 0.516 N K for each expert that has rows, 2 M (K + N) for x and y; FLOPs: 2 M N K. 1024 tokens, each sent to 8 of
128 experts, are 64 rows for an expert: few FLOPs for the bytes of a W, so these are the floor, and codes are a quarter
of a dense W's. Programs of one tile of rows stand next to each other and share x in L2, as the tiles of one expert
share its codes; what comes from DRAM is counted in `tests/test_kernels_on_cards.py`.

With many rows per expert decoding W again for every 128 of them costs more than a dense W does: then every expert is a
product of its own, and no more than one is ever dense. `nf4_matmul.py` chooses. Nothing but `ends` and the weights is
kept for backward. Not here: gathering rows, the gate, the routing weights (`quant/experts.py`), and gradients of W.
"""

import torch

from .matmul import _low_rank
from .nf4 import NestedScales, NF4Weight, code_table, levels_of, nf4_dequantize_reference, nf4_pointers, scale_of
from .runtime import block_of, cdiv, dot_dtype, launch, stored_dtype, tl, triton

TILES = {
    16: {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4},
    64: {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4},
    128: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8},
}  # by rows per expert


def nf4_experts_reference(x, weight, transposed, ends):
    """x (M, ·) sorted by expert, W (E, N, K) in NF4 → each row by its expert's Wᵀ, or W where not `transposed`."""
    y, start = [], 0
    for e, end in enumerate(ends.tolist()):
        W = nf4_dequantize_reference(expert_of(weight, e), x.dtype)
        y.append(x[start:end] @ (W.t() if transposed else W))
        start = end
    return torch.cat(y)


def expert_of(weight: NF4Weight, e: int) -> NF4Weight:
    """One expert's (N, K) of the stacked (E, N, K), over the same memory."""
    E, nested = weight.shape[0], weight.nested
    if nested is not None:
        nested = NestedScales(nested.absmax.view(E, -1)[e], nested.code, nested.offset[e], nested.block_size)
    packed, absmax = weight.packed.view(E, -1)[e], weight.absmax.view(E, -1)[e]
    return NF4Weight(packed, absmax, weight.shape[1:], weight.dtype, weight.block_size, nested)


@triton.jit
def dense_tile(
    words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, table, first_n, k, N, K,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """W[first_n : first_n + ROWS, k : k + COLUMNS] as fp32; rows past the end repeat the last one."""
    GROUPS: tl.constexpr = (COLUMNS + 63) // 64
    rows = tl.minimum(tl.arange(0, ROWS), N - 1 - first_n)
    offs_w, groups = k // 8 + tl.arange(0, COLUMNS // 8), k // 64 + tl.arange(0, GROUPS)
    words_ptr += tl.cast(first_n, tl.int64) * (K // 8)
    words = tl.load(words_ptr + rows[:, None] * (K // 8) + offs_w[None, :], mask=offs_w[None, :] < K // 8, other=0)
    w = levels_of(tl.join(words, words >> 16), table)
    block = ((first_n + rows)[:, None] * (K // 64) + groups[None, :]).to(tl.uint32) // (BLOCK_SIZE // 64)
    in_row = groups[None, :] < K // 64
    code = tl.load(absmax_ptr + block, mask=in_row, other=0)
    scales = scale_of(code, block, in_row, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED_BLOCK)
    w = tl.reshape(w, [ROWS, GROUPS, COLUMNS // GROUPS]) * scales[:, :, None]
    return tl.reshape(w, [ROWS, COLUMNS])


@triton.jit
def _fused_kernel(
    x_ptr,  # (M, K); for dx dy (M, N)
    ends_ptr,  # (E,), or None: one weight for all rows
    words_ptr,  # (E, N, K / 8) int32
    absmax_ptr,  # (E, N K / BLOCK_SIZE)
    nested_absmax_ptr, nested_code_ptr, offset_ptr,  # fp32 (E, ·), (256,), (E,), or None
    table_ptr,  # (16,)
    bias_ptr,  # (N,) or None
    s_ptr,  # (M, r)
    up_ptr,  # (N, r); for dx (K, r)
    y_ptr,  # (M, N); for dx (M, K)
    M, E, N, K, r, stride_xm, stride_xk, stride_sm, stride_sr, stride_un, stride_ur,
    scale,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK: tl.constexpr, DOT: tl.constexpr, DX: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if ends_ptr is None:
        first_m, first_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    else:  # the expert of this tile of rows is the first that has more tiles, with those before it, than lie before
        tile, first_n, experts = tl.program_id(1), tl.program_id(0) * BLOCK_N, tl.arange(0, EXPERTS)
        ends = tl.load(ends_ptr + experts, mask=experts < E, other=0).to(tl.int32)
        starts = tl.load(ends_ptr + experts - 1, mask=(experts > 0) & (experts < E), other=0).to(tl.int32)
        tiles = tl.cdiv(ends - starts, BLOCK_M)
        expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
        if expert >= E:
            return
        tile -= tl.sum(tl.where(experts < expert, tiles, 0), 0)
        first_m = tl.sum(tl.where(experts == expert, starts, 0), 0) + tile * BLOCK_M
        M = tl.sum(tl.where(experts == expert, ends, 0), 0)
        blocks = tl.cdiv(N * (K // 64), BLOCK_SIZE // 64)  # of an expert; the last may be cut short
        words_ptr += expert.to(tl.int64) * N * (K // 8)
        absmax_ptr += expert.to(tl.int64) * blocks
        if nested_code_ptr is not None:
            nested_absmax_ptr += expert * tl.cdiv(blocks, NESTED_BLOCK)
            offset_ptr += expert
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    width, depth = (K, N) if DX else (N, K)
    in_m, in_n = offs_m < M, offs_n < width
    rows = offs_m.to(tl.int64)
    table = tl.load(table_ptr + tl.arange(0, 16))
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc = _low_rank(
        acc, s_ptr, up_ptr, None, first_m, first_n, M, width, r, stride_sm, stride_sr, stride_un, stride_ur, scale, 0,
        DOT, 0, BLOCK_M, BLOCK_N, 16,
    )  # fmt: skip
    ROWS: tl.constexpr = 64 if DX else BLOCK_N  # of a tile of W
    COLUMNS: tl.constexpr = BLOCK_N if DX else 64
    offs_k = tl.arange(0, 64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
    for k in range(0, depth, 64):
        x = tl.load(x_ptrs, mask=in_m[:, None] & (offs_k < depth - k)[None, :], other=0.0)  # [BLOCK_M, 64]
        x_ptrs += tl.cast(stride_xk, tl.int64) * 64
        w = dense_tile(
            words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, table,
            k if DX else first_n, first_n if DX else k, N, K, BLOCK_SIZE, NESTED_BLOCK, ROWS, COLUMNS,
        ).to(DOT)  # fmt: skip
        acc = tl.dot(x.to(DOT), w if DX else tl.trans(w), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * width + offs_n[None, :]
    tl.store(y_ptrs, acc, mask=in_m[:, None] & in_n[None, :])


def nf4_fused(x, weight, bias, S, up, scale, transposed=True, ends=None) -> torch.Tensor:
    """x Wᵀ + b + scale · S upᵀ, or x W + scale · S upᵀ where not `transposed`; W is decoded tile by tile.

    Args:
        x: (M, K), or (M, N) where not `transposed`; fp16 or bf16, on tensor cores (`runs_product`).
        weight: NF4, (N, K), K and the block size multiples of 64; or, with `ends`, (E, N, K).
        bias: (N,) or None; only where `transposed`.
        S: (M, r) in x's dtype.
        up: (N, r), or (K, r) where not `transposed`.
        scale: a number.
        ends: (E,), where the rows of each expert end; None: there is one weight.

    Returns:
        (M, N), or (M, K), in x's dtype.
    """
    M, (*experts, N, K) = len(x), weight.shape
    E, width = (experts or [1])[0], N if transposed else K
    y = torch.empty((M, width), dtype=stored_dtype(x.dtype), device=x.device)
    if y.numel() == 0:
        return y.to(x.dtype)
    weights, blocks = nf4_pointers(weight)
    if ends is None:
        tile = TILES[64 if M <= 64 else 128]
        grid = cdiv(M, tile["BLOCK_M"]), cdiv(width, tile["BLOCK_N"]), 1
    else:
        tile = TILES[16 if M <= 16 * E else 64 if M <= 64 * E else 128]
        grid = cdiv(width, tile["BLOCK_N"]), min(M, M // tile["BLOCK_M"] + E), 1  # the last tile of each may be short
    launch(
        _fused_kernel, grid,
        x, ends, *weights, code_table(x.device), bias, S, up, y, M, E, N, K, S.shape[1], *x.stride(), *S.stride(),
        *up.stride(), float(scale), **blocks, DOT=dot_dtype(x.dtype), DX=not transposed,
        EXPERTS=block_of(E, 2, 1 << 16), **tile, num_stages=3,
    )  # fmt: skip
    return y.to(x.dtype)
