"""Kernels on NF4 weights that never make W dense in memory, or make it dense with an adapter merged in.

W (N, K) lies as 4-bit codes with one scale for each block of 64 or more. Three kernels read it:

    one row     y = x Wᵀ + b + s S Bᵀ for x (1, K): sums of products on the ordinary units
    few rows    the same for x (M ≤ 16, K) on the tensor cores, W decoded to x's dtype in registers
    merge       W' = dequantized W + s B A, written out in x's dtype

Floor of the first two: the codes and scales are read once, 0.516 bytes a weight with double
quantization, a quarter of what fp16 weights cost. At 4.3 TB/s that is 2.0 µs for 4096 × 4096, which
leaves about 4 instructions a weight before arithmetic is the limit instead. So decoding must be
cheap. Eight codes lie in an int32 word, the first in bits 4 to 7; a shift, a mask and one read
from a table of 16 fp32 values make a weight. The table lies in shared memory, its entries in 16
different banks, so that any pattern of reads is free of conflicts. The scale is applied to sums over
64 weights where that is possible. (`handtuned xray nf4_stream` counts the instructions.)

There is no backward here: gradients go through a dense W (see `nf4_matmul.py`).
"""

from functools import lru_cache

import torch

from .lora_product import block_of, cdiv, dot_settings, kernel_spec, stored_dtype
from .nf4 import NF4_CODE
from .runtime import KernelSpec, on_device, tl, triton


@triton.jit
def _decode(words, table):
    """[ROWS, WORDS] int32, eight codes each → their values in order, [ROWS, 8 · WORDS] fp32."""
    ROWS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    # The last axis joined is the fastest: joins by bit 2, bit 1 and bit 0 of a code's place in the word.
    even = tl.join(tl.join(words >> 4, words >> 20), tl.join(words >> 12, words >> 28))
    odd = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    codes = tl.reshape(tl.join(even, odd) & 15, [ROWS * WORDS * 8])
    return tl.reshape(tl.gather(table, codes, 0), [ROWS, WORDS * 8])


@triton.jit
def _scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, mask, nested_block):
    """fp32 scales of the given blocks."""
    scales = tl.load(absmax_ptr + blocks, mask=mask, other=0)
    if nested_code_ptr is not None:
        nested = tl.load(nested_absmax_ptr + blocks // nested_block, mask=mask, other=0.0)
        scales = tl.load(nested_code_ptr + scales.to(tl.int32)) * nested + tl.load(offset_ptr)
    return scales


@triton.jit
def _dense_tile(
    words, table, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, rows, k, K, block_size, nested_block
):
    """W[rows, k : k + 8 · WORDS] as fp32, from its words [ROWS, WORDS]."""
    ROWS: tl.constexpr = words.shape[0]
    GROUPS: tl.constexpr = words.shape[1] // 8
    groups = k // 64 + tl.arange(0, GROUPS)
    blocks = (rows[:, None] * (K // 64) + groups[None, :]) // (block_size // 64)
    in_row = groups[None, :] < K // 64
    scales = _scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, in_row, nested_block)
    values = tl.reshape(_decode(words, table), [ROWS, GROUPS, 64]) * scales[:, :, None]
    return tl.reshape(values, [ROWS, GROUPS * 64])


@triton.jit
def _one_row_kernel(
    x_ptr,  # (1, K)
    words_ptr,  # (N, K / 8) int32
    absmax_ptr,  # (N K / block_size,)
    nested_absmax_ptr,  # fp32 or None, like the next two
    nested_code_ptr,  # (256,)
    offset_ptr,  # ()
    table_ptr,  # (16,)
    bias_ptr,  # (N,) or None
    s_ptr,  # (1, r)
    b_ptr,  # (N, r)
    y_ptr,  # (1, N)
    N,
    K,
    r,
    stride_xk,
    stride_sr,
    stride_bn,
    stride_br,
    scale,
    block_size,
    nested_block,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)  # rows past the end read the last one, and are not stored
    table = tl.load(table_ptr + tl.arange(0, 16))
    GROUPS: tl.constexpr = BLOCK_K // 64
    acc = tl.zeros([BLOCK_N, GROUPS], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_w = k // 8 + tl.arange(0, BLOCK_K // 8)
        words = tl.load(words_ptr + rows[:, None] * (K // 8) + offs_w[None, :], mask=offs_w[None, :] < K // 8, other=0)
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_k * stride_xk, mask=offs_k < K, other=0.0).to(tl.float32)
        products = tl.reshape(_decode(words, table) * x[None, :], [BLOCK_N, GROUPS, 64])
        groups = k // 64 + tl.arange(0, GROUPS)
        blocks = (rows[:, None] * (K // 64) + groups[None, :]) // (block_size // 64)
        in_row = groups[None, :] < K // 64
        scales = _scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, in_row, nested_block)
        acc += tl.sum(products, axis=2) * scales
    y = tl.sum(acc, axis=1)  # [BLOCK_N]
    for j in range(0, r, BLOCK_R):
        offs_r = j + tl.arange(0, BLOCK_R)
        s = tl.load(s_ptr + offs_r * stride_sr, mask=offs_r < r, other=0.0).to(tl.float32)
        b_ptrs = b_ptr + rows[:, None] * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=offs_r[None, :] < r, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_R]
        y += scale * tl.sum(b * s[None, :], axis=1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows).to(tl.float32)
    tl.store(y_ptr + offs_n, y, mask=offs_n < N)


@triton.jit
def _few_rows_kernel(
    x_ptr,  # (M, K), M ≤ 16
    words_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    table_ptr,
    bias_ptr,
    s_ptr,  # (M, r)
    b_ptr,
    y_ptr,  # (M, N)
    M,
    N,
    K,
    r,
    stride_xm,
    stride_xk,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    scale,
    block_size,
    nested_block,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.arange(0, 16)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)  # rows past the end read the last one, and are not stored
    table = tl.load(table_ptr + tl.arange(0, 16))
    acc = tl.zeros([16, BLOCK_N], dtype=tl.float32)
    for j in range(0, r, BLOCK_R):
        offs_r = j + tl.arange(0, BLOCK_R)
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :] * stride_sr
        s = tl.load(s_ptrs, mask=(offs_m < M)[:, None] & (offs_r < r)[None, :], other=0.0)  # [16, BLOCK_R]
        b_ptrs = b_ptr + rows[None, :] * stride_bn + offs_r[:, None] * stride_br
        b = tl.load(b_ptrs, mask=(offs_r < r)[:, None], other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(s.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
    acc *= scale
    for k in range(0, K, BLOCK_K):
        offs_w = k // 8 + tl.arange(0, BLOCK_K // 8)
        words = tl.load(words_ptr + rows[:, None] * (K // 8) + offs_w[None, :], mask=offs_w[None, :] < K // 8, other=0)
        w = _dense_tile(
            words, table, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
            rows, k, K, block_size, nested_block,
        )  # fmt: skip
        offs_k = k + tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=(offs_m < M)[:, None] & (offs_k < K)[None, :], other=0.0)  # [16, BLOCK_K]
        acc = tl.dot(x.to(DOT), tl.trans(w.to(DOT)), acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _merge_kernel(
    words_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    table_ptr,
    a_ptr,  # (r, K)
    b_ptr,  # (N, r)
    w_ptr,  # (N, K)
    N,
    K,
    r,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    scale,
    block_size,
    nested_block,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = k + tl.arange(0, BLOCK_K)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for j in range(0, r, BLOCK_R):
        offs_r = j + tl.arange(0, BLOCK_R)
        b_ptrs = b_ptr + rows[:, None] * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=(offs_r < r)[None, :], other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_R]
        a_ptrs = a_ptr + offs_r.to(tl.int64)[:, None] * stride_ar + offs_k[None, :] * stride_ak
        a = tl.load(a_ptrs, mask=(offs_r < r)[:, None] & (offs_k < K)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(b, a, acc, input_precision=PRECISION)
    offs_w = k // 8 + tl.arange(0, BLOCK_K // 8)
    words = tl.load(words_ptr + rows[:, None] * (K // 8) + offs_w[None, :], mask=offs_w[None, :] < K // 8, other=0)
    table = tl.load(table_ptr + tl.arange(0, 16))
    w = _dense_tile(
        words, table, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
        rows, k, K, block_size, nested_block,
    )  # fmt: skip
    w_ptrs = w_ptr + rows[:, None] * K + offs_k[None, :]
    tl.store(w_ptrs, w + acc * scale, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


ONE_ROW = {"BLOCK_N": 8, "BLOCK_K": 1024}
FEW_ROWS = {"BLOCK_N": 32, "BLOCK_K": 256}
MERGE = {"BLOCK_N": 64, "BLOCK_K": 128}


@lru_cache
def _table(device: torch.device) -> torch.Tensor:
    return NF4_CODE.to(device)


def _words(packed: torch.Tensor) -> torch.Tensor:
    """The codes as int32 words; copied where they do not start at a multiple of 4 bytes."""
    return (packed.clone() if packed.data_ptr() % 4 else packed).view(-1).view(torch.int32)


def _launch_stream(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    nested_block: int,
    N: int,
    block_size: int,
    bias: torch.Tensor | None,
    S: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    (M, K), r = x.shape, S.shape[1]
    y = torch.empty((M, N), dtype=stored_dtype(x.dtype), device=x.device)
    if y.numel() == 0:
        return y.to(x.dtype)
    blocks = ONE_ROW if M == 1 else FEW_ROWS
    weight = (_words(packed), absmax, nested_absmax, nested_code, nested_offset, _table(x.device))
    tensors = (x, *weight, bias, S, lora_B, y)
    settings = {"scale": scale, "block_size": block_size, "nested_block": nested_block, "BLOCK_R": block_of(r, 16, 64)}
    with on_device(x):
        if M == 1:
            strides = (x.stride(1), S.stride(1), *lora_B.stride())
            _one_row_kernel[(cdiv(N, blocks["BLOCK_N"]),)](*tensors, N, K, r, *strides, **settings, **blocks)
        else:
            strides = (*x.stride(), *S.stride(), *lora_B.stride())
            _few_rows_kernel[(cdiv(N, blocks["BLOCK_N"]),)](
                *tensors, M, N, K, r, *strides, **settings, **blocks, **dot_settings(x.dtype)
            )
    return y.to(x.dtype)


def _launch_merge(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    nested_block: int,
    block_size: int,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    (r, K), N = lora_A.shape, lora_B.shape[0]
    merged = torch.empty((N, K), dtype=stored_dtype(dtype), device=packed.device)
    precision = dot_settings(dtype)["PRECISION"] if dtype == torch.float32 else "tf32"  # beside a rounding to 16 bits
    with on_device(packed):
        _merge_kernel[(cdiv(K, MERGE["BLOCK_K"]), cdiv(N, MERGE["BLOCK_N"]))](
            _words(packed), absmax, nested_absmax, nested_code, nested_offset, _table(packed.device),
            lora_A, lora_B, merged, N, K, r, *lora_A.stride(), *lora_B.stride(), scale, block_size, nested_block,
            PRECISION=precision, BLOCK_R=block_of(r, 16, 64), **MERGE, num_warps=8,
        )  # fmt: skip
    return merged.to(dtype)


stream_op = torch.library.custom_op("handtuned::nf4_stream", _launch_stream, mutates_args=())
merge_op = torch.library.custom_op("handtuned::nf4_merge", _launch_merge, mutates_args=())


@stream_op.register_fake
def _(x, packed, absmax, nested_absmax, nested_code, nested_offset, nested_block, N, block_size, bias, S, B, scale):
    return x.new_empty(x.shape[0], N)


@merge_op.register_fake
def _(packed, absmax, nested_absmax, nested_code, nested_offset, nested_block, block_size, A, B, scale, dtype):
    return A.new_empty(B.shape[0], A.shape[1], dtype=dtype)


def nf4_stream(x, weight, bias, S, lora_B, scale) -> torch.Tensor:
    """y = x Wᵀ + b + scale · S Bᵀ with W read as codes.

    Args:
        x: (M, K), M ≤ 16, K a multiple of 64; fp32, fp16 or bf16.
        weight: NF4, (N, K), with a block size that is a multiple of 64.
        bias: (N,) or None.
        S: (M, r) in x's dtype.
        lora_B: (N, r).
        scale: a number.

    Returns:
        (M, N) in x's dtype.
    """
    launch = stream_op if torch.compiler.is_compiling() else _launch_stream
    return launch(x, *tensors_of(weight), weight.shape[0], weight.block_size, bias, S, lora_B, scale)


def nf4_merge(weight, lora_A, lora_B, scale, dtype) -> torch.Tensor:
    """dequantized W + scale · B A (N, K) in `dtype`, rounded once. K and the block size are multiples of 64."""
    launch = merge_op if torch.compiler.is_compiling() else _launch_merge
    return launch(*tensors_of(weight), weight.block_size, lora_A, lora_B, scale, dtype)


def tensors_of(weight) -> tuple:
    """packed, absmax, and what decodes 8-bit scales (None three times, and 1, without double quantization)."""
    return weight.packed, weight.absmax, *(weight.nested or (None, None, None, 1))


def xray_specs() -> list[KernelSpec]:
    """4096 × 4096, double quantization, r = 16, fp32 adapter."""
    strides = dict.fromkeys(("stride_xk", "stride_sr", "stride_br", "stride_ak"), 1)
    specs = []
    for low, dtype in (("fp16", tl.float16), ("bf16", tl.bfloat16)):
        pointers = dict.fromkeys(("x_ptr", "bias_ptr", "s_ptr", "y_ptr", "w_ptr"), low)
        pointers |= {"words_ptr": "i32", "absmax_ptr": "u8"}
        common = strides | {"BLOCK_R": 16, "PRECISION": "ieee", "DOT": dtype}
        for what, kernel, blocks, warps in (
            ("one_row", _one_row_kernel, ONE_ROW, 4),
            ("few_rows", _few_rows_kernel, FEW_ROWS, 4),
            ("merge", _merge_kernel, MERGE, 8),
        ):
            constexprs = {key: value for key, value in (common | blocks).items() if key in kernel.arg_names}
            weights = blocks["BLOCK_N"] * (blocks["BLOCK_K"] if kernel is _merge_kernel else 4096)
            specs.append(kernel_spec(f"nf4_{what}[{low}]", kernel, pointers, constexprs, weights, warps, 3, "weight"))
    return specs
