"""Rows meet an NF4 weight: y = x Wᵀ + b + s S Bᵀ, by the way that suits the number of rows M of x.

    M ≤ 16        stream: the kernel reads packed codes, decodes them in registers and multiplies
    larger M      a dense W is made for this product alone, and thrown away after it

Decoding tokens is limited by reading W: 0.516 bytes a weight against 2 in fp16, so streaming the codes
may be four times as fast as any dense product. At 4.3 TB/s that is 2.0 µs for 4096 × 4096, which leaves about 4
instructions a weight before arithmetic is the limit instead. So decoding must be cheap (a shift, a mask and one
read of a table of 16 fp32 values, which lie in 16 different banks of shared memory), and with one row the
scale is applied to sums over 64 weights. `handtuned xray nf4_` counts the instructions.

With many rows it is the other way round. Every tile of W would be decoded once for each tile of rows,
by the units that should multiply; making W dense once costs 2.5 bytes a weight (6 % of a product with
4096 rows) and the product then runs at full speed. In backward W is made a second time, which is
cheaper than keeping it: kept dense weights are what 4 bits are there to avoid.

A dense W is made anyway, so with many rows the adapter is added to it on the way:

    W' = round(dequantized W + s B A)      y = x W'ᵀ + b      dx = dy W'

"merged" costs no (M, N) traffic for LoRA at all and leaves the product to the vendor's library. It
rounds W + ΔW once, as it would round W; where ΔW is far below W's rounding step its effect on y
is rounded off, as it would be in y itself, while dA and dB never see W' and stay exact. The tile of s B A comes
from the tensor cores while the codes of the same tile are decoded: 2NKr FLOPs and 4r(N + K) bytes beside the
2.516 NK of dequantizing. With dropout there is no W' (each row of x has its own ΔW), so then, and for middle
M, W alone is made dense and `lora_product` starts its accumulator at S Bᵀ: the exact path.

A CPU has one way for any M, "native": a product in C that decodes W as it goes (`nf4_cpu.py`). Without AVX2 or a
compiler torch takes the exact path; 16-bit rows a tile of W at a time, in fp32 arithmetic ("tiled"), as torch's own
16-bit products are several times slower there. There is no gradient here; `lora.py` and
`quant/linear.py` call the product with W for dx.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from .dropout import Dropout
from .matmul import lora_product
from .nf4 import (
    NF4_CODE,
    NF4Weight,
    decode,
    decode_scales,
    dense_tile,
    load_scales,
    nf4_dequantize,
    nf4_dequantize_reference,
)  # fmt: skip
from .nf4_cpu import nf4_product_native, runs_native_product
from .runtime import (
    block_of,
    cdiv,
    dot_settings,
    on_device,
    runs_kernel,
    scratch,
    stored_dtype,
    tl,
    triton,
)  # fmt: skip

TILE_ROWS = 512  # of W, dense at a time where torch multiplies on a CPU
ON_CPU = ("native", "tiled")
ONE_ROW = {"BLOCK_N": 8, "BLOCK_K": 1024}
FEW_ROWS = {"BLOCK_N": 32, "BLOCK_K": 256}
MERGE = {"BLOCK_N": 64, "BLOCK_K": 128}


def nf4_matmul_reference(x, weight, bias=None, transposed=True):
    """x Wᵀ + bias, or x W where not `transposed`, with a weight (N, K) that is made dense first."""
    W = nf4_dequantize_reference(weight, x.dtype)
    return F.linear(x, W, bias) if transposed else x @ W


@triton.jit
def _one_row_kernel(
    x_ptr,  # (1, K)
    words_ptr,  # (N, K / 8) int32
    absmax_ptr,  # (N K / block_size,)
    nested_absmax_ptr, nested_code_ptr, offset_ptr,  # fp32 (·,), (256,), (), or None
    table_ptr,  # (16,)
    bias_ptr,  # (N,) or None
    s_ptr,  # (1, r)
    b_ptr,  # (N, r)
    y_ptr,  # (1, N)
    N, K, r, stride_xk, stride_sr, stride_bn, stride_br,
    scale, block_size, nested_block,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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
        products = tl.reshape(decode(words, table) * x[None, :], [BLOCK_N, GROUPS, 64])
        groups = k // 64 + tl.arange(0, GROUPS)
        blocks = (rows[:, None] * (K // 64) + groups[None, :]) // (block_size // 64)
        in_row = groups[None, :] < K // 64
        scales = load_scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, in_row, nested_block)
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
    words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, table_ptr,  # as above
    bias_ptr,
    s_ptr,  # (M, r)
    b_ptr,
    y_ptr,  # (M, N)
    M, N, K, r, stride_xm, stride_xk, stride_sm, stride_sr, stride_bn, stride_br,
    scale, block_size, nested_block,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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
        w = dense_tile(
            words_ptr, table, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
            rows, k, K, block_size, nested_block, BLOCK_K,
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
    words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, table_ptr,  # as above
    a_ptr,  # (r, K)
    b_ptr,  # (N, r)
    w_ptr,  # (N, K)
    N, K, r, stride_ar, stride_ak, stride_bn, stride_br,
    scale, block_size, nested_block,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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
    table = tl.load(table_ptr + tl.arange(0, 16))
    w = dense_tile(
        words_ptr, table, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
        rows, k, K, block_size, nested_block, BLOCK_K,
    )  # fmt: skip
    w_ptrs = w_ptr + rows[:, None] * K + offs_k[None, :]
    tl.store(w_ptrs, w + acc * scale, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


@lru_cache
def _code_table(device: torch.device) -> torch.Tensor:
    return NF4_CODE.to(device)


def _arguments(weight: NF4Weight) -> tuple:
    """The six pointers of a kernel, and its two block sizes. Codes that do not start at a word are copied."""
    packed = weight.packed.clone() if weight.packed.data_ptr() % 4 else weight.packed
    *decoding, nested_block = weight.nested or (None, None, None, 1)
    pointers = packed.view(-1).view(torch.int32), weight.absmax, *decoding, _code_table(packed.device)
    return pointers, {"block_size": weight.block_size, "nested_block": nested_block}


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
    (M, K), N, r = x.shape, weight.shape[0], S.shape[1]
    y = torch.empty((M, N), dtype=stored_dtype(x.dtype), device=x.device)
    if y.numel() == 0:
        return y.to(x.dtype)
    pointers, blocks = _arguments(weight)
    blocks |= {"BLOCK_R": block_of(r, 16, 64)} | (ONE_ROW if M == 1 else FEW_ROWS)
    tensors, grid = (x, *pointers, bias, S, lora_B, y), (cdiv(N, blocks["BLOCK_N"]),)
    with on_device(x):
        if M == 1:
            strides = (x.stride(1), S.stride(1), *lora_B.stride())
            _one_row_kernel[grid](*tensors, N, K, r, *strides, scale=scale, **blocks)
        else:
            strides = (*x.stride(), *S.stride(), *lora_B.stride())
            _few_rows_kernel[grid](*tensors, M, N, K, r, *strides, scale=scale, **blocks, **dot_settings(x.dtype))
    return y.to(x.dtype)


def nf4_merge(weight, lora_A, lora_B, scale, dtype) -> torch.Tensor:
    """dequantized W + scale · B A (N, K) in `dtype`, rounded once. K and the block size are multiples of 64."""
    (r, K), N = lora_A.shape, lora_B.shape[0]
    merged = torch.empty((N, K), dtype=stored_dtype(dtype), device=lora_A.device)
    precision = dot_settings(dtype)["PRECISION"] if dtype == torch.float32 else "tf32"  # beside a rounding to 16 bits
    pointers, blocks = _arguments(weight)
    with on_device(merged):
        _merge_kernel[(cdiv(K, MERGE["BLOCK_K"]), cdiv(N, MERGE["BLOCK_N"]))](
            *pointers, lora_A, lora_B, merged, N, K, r, *lora_A.stride(), *lora_B.stride(), scale=scale,
            PRECISION=precision, BLOCK_R=block_of(r, 16, 64), **blocks, **MERGE, num_warps=8,
        )  # fmt: skip
    return merged.to(dtype)


def plan(x: torch.Tensor, weight: torch.Tensor | NF4Weight, dropout: bool = False) -> str:
    """How a product of x (M, ·) with a weight goes: "native", "tiled", "stream", "merged" or (a dense one) "exact".

    In torch there is no merge: the adapter's part costs one in-place product on y, and a merge would
    cost one on W, which is the larger array for all but very long batches.
    """
    if isinstance(weight, torch.Tensor):
        return "exact"
    M, K = x.shape[0], weight.shape[1]
    if not runs_kernel(x):
        exact = "tiled" if x.is_cpu and x.dtype.itemsize == 2 else "exact"
        return "native" if runs_native_product(x, weight) else exact
    if K % 64 or weight.block_size % 64:
        return "exact"
    if M <= 16:
        return "stream"
    return "merged" if M >= 1024 and not dropout else "exact"


def quantized_product(way, x, weight, bias, S, lora_A, lora_B, scale):
    """y = x Wᵀ + b + scale · S Bᵀ (M, N) with W (N, K) in NF4, by the `plan`; S = x̂ Aᵀ.

    Otherwise as `lora_product`.
    """
    if way in ON_CPU:
        return _on_cpu(way, x, weight, True, bias, S, lora_B, scale)
    if way == "stream":
        return nf4_stream(x, weight, bias, S, lora_B, scale)
    if way == "merged":
        merged = nf4_merge(weight, lora_A, lora_B, scale, x.dtype)
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype))
    return lora_product(x, dense_weight(weight, x), bias, S, lora_B, scale)


def quantized_product_dx(way, dy, weight, dS, lora_A, lora_B, scale, dropout: Dropout | None = None):
    """dx = dy W + mask ⊙ (dS A) (M, K) with W (N, K) in NF4, by forward's plan; dS = scale · dy B."""
    if way in ON_CPU and dropout is None:
        return _on_cpu(way, dy, weight, False, None, dS, lora_A)
    if way in ON_CPU:
        mask = dropout.mask(len(dy), lora_A.shape[1], dy.dtype)
        return _on_cpu(way, dy, weight, False).addcmul_(dS @ lora_A.to(dy.dtype), mask)
    if way == "merged":
        return dy @ nf4_merge(weight, lora_A, lora_B, scale, dy.dtype)
    return lora_product(dy, dense_weight(weight, dy).t(), None, dS, lora_A.t(), 1.0, dropout)


def nf4_matmul(x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None = None, transposed: bool = True):
    """y = x Wᵀ + bias with W (N, K) in NF4, or x W where not `transposed`, without an adapter.

    Args:
        x: (M, K), or (M, N) where not `transposed`; floating point.
        weight: NF4, (N, K).
        bias: (N,) in x's dtype or None; only where `transposed`.
        transposed: whether x meets Wᵀ.

    Returns:
        (M, N), or (M, K), in x's dtype.
    """
    way = plan(x, weight)
    if way in ON_CPU:
        return _on_cpu(way, x, weight, transposed, bias)
    if transposed and way == "stream":  # with an adapter of rank 0
        return nf4_stream(x, weight, bias, x.new_empty(len(x), 0), x.new_empty(weight.shape[0], 0), 0.0)
    W = dense_weight(weight, x)
    return F.linear(x, W, bias) if transposed else x @ W


def _on_cpu(way, x, weight, transposed, *rest):
    """`nf4_product_native`, or what it computes without it."""
    if way == "native":
        return nf4_product_native(x, weight, NF4_CODE, transposed, *rest)
    return nf4_product_tiled(x, weight, transposed, *rest)


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
        y.addmm_(S.float(), low.float().t() if transposed else low.float(), alpha=scale)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def dense_weight(weight: torch.Tensor | NF4Weight, x: torch.Tensor) -> torch.Tensor:
    """The weight (N, K) in x's dtype. One in NF4 lies in the scratch: use it before the next call."""
    if isinstance(weight, torch.Tensor):
        return weight.to(x.dtype)
    return nf4_dequantize(weight, x.dtype, out=scratch(torch.Size(weight.shape), x.dtype, x.device))
