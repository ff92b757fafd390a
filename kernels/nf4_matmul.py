"""Rows meet an NF4 weight: y = x Wᵀ + b + s S Bᵀ, by the way that suits the number of rows M of x.

    few rows      stream: W is read as codes by a kernel made for it (`nf4_stream.py`)
    more          fused: tiles of W are decoded beside the tensor cores, and W is never dense
    many          a dense W is made for this product alone, and thrown away after it

Reading codes costs 0.516 bytes per weight against 2.5 + 2 for writing a dense W and reading it again. In exchange every
tile of W is decoded once for each tile of 128 rows, by the warps that should multiply. So with many rows a dense W is
better: 6 % of a product with 4096 rows, which then runs at full speed. In between, the card decides. In backward W
is decoded or made a second time: kept dense weights are what 4 bits are there to avoid.

"fused" (`nf4_experts.py`, where one launch serves many weights) rounds a decoded tile to 16 bits as dequantizing
would, starts its accumulator at s S Bᵀ, and walks along K; for dx = dy W + dS A the same kernel walks down W.

A dense W is made anyway, so with many rows the adapter is added to it on the way:

    W' = round(dequantized W + s B A)      y = x W'ᵀ + b      dx = dy W'

"merged" costs no (M, N) traffic for LoRA at all and leaves the product to the vendor's library. It
rounds W + ΔW once, as it would round W; where ΔW is far below W's rounding step its effect on y
is rounded off, as it would be in y itself, while dA and dB never see W' and stay exact. The tile of s B A comes
from the tensor cores while the codes of the same tile are decoded: 2NKr FLOPs and 4r(N + K) bytes beside the
2.516 NK of dequantizing. With dropout there is no W' (each row of x has its own ΔW), so then, and for middle
M, W alone is made dense and `lora_product` starts its accumulator at S Bᵀ: the exact path.

The merging kernel meets no shared memory but the table of levels. An mma instruction leaves two columns of every eight
in a thread (2q and 2q + 1 in lane % 4 = q); a store wants eight in a row, and so does a word of codes. So columns are
named anew: of 32 columns, 4g + t of memory is column g of the t-th instruction. Then thread q holds 8q … 8q + 7, and
four neighbours of A are one load.

A CPU has one way for any M, "native": a product in C that decodes W as it goes (`nf4_cpu.py`). Without AVX2 or a
compiler torch takes the exact path; 16-bit rows a tile of W at a time, in fp32 arithmetic ("tiled"), as torch's own
16-bit products are several times slower there. There is no gradient here.
"""

from functools import partial

import torch
import torch.nn.functional as F

from .dropout import Dropout
from .matmul import lora_product
from .nf4 import (
    NF4_CODE,
    NF4Weight,
    code_table,
    decode_scales,
    levels_of,
    nf4_dequantize,
    nf4_dequantize_reference,
    nf4_pointers,
    scale_of,
)
from .nf4_cpu import nf4_product_native, runs_native_product
from .nf4_experts import expert_of, nf4_fused
from .nf4_stream import nf4_stream
from .runtime import (
    block_of,
    cdiv,
    fastest,
    launch,
    run_fastest,
    runs_kernel,
    runs_product,
    scratch,
    stored_dtype,
    tl,
    triton,
)

ON_CPU = ("native", "tiled")
MERGE = {"BLOCK_N": 16, "WARPS": 4}  # rows of a warp
TILE_ROWS = 512  # of W, in `nf4_product_tiled`


def nf4_matmul_reference(x, weight, bias=None, transposed=True):
    """x Wᵀ + bias, or x W where not `transposed`, with a weight (N, K) that is made dense first."""
    W = nf4_dequantize_reference(weight, x.dtype)
    return F.linear(x, W, bias) if transposed else x @ W


@triton.jit
def _merge_kernel(
    words_ptr,  # (N, K / 8) int32
    absmax_ptr,  # (N K / BLOCK_SIZE,)
    nested_absmax_ptr, nested_code_ptr, offset_ptr,  # fp32 (·,), (256,), (), or None
    table_ptr,  # (16,)
    a_ptr,  # (r, K)
    b_ptr,  # (N, r)
    w_ptr,  # (N, K)
    N, K, r, stride_ar, stride_ak, stride_bn, stride_br,
    scale,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK: tl.constexpr, WARPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = BLOCK_N // 8
    first_n, first_k = tl.program_id(0) * WARPS * BLOCK_N, tl.program_id(1) * 64
    warp, two, four, eight = tl.arange(0, WARPS), tl.arange(0, 2), tl.arange(0, 4), tl.arange(0, 8)
    n = warp[None, :, None] * BLOCK_N + (tl.arange(0, G) * 8)[:, None, None] + eight[None, None, :]  # [G, WARPS, 8]
    in_n = first_n + n < N
    rows = tl.minimum(n, N - 1 - first_n).to(tl.int64)
    acc = tl.zeros([WARPS, BLOCK_N, 64], dtype=tl.float32)
    for j in range(0, r, 16):
        place = (j + four[:, None] * 4 + four[None, :]).to(tl.int64)  # [4 threads, 4 of r each]
        at_r = place[None, None, None, :, :]
        b_ptrs = b_ptr + (first_n + rows)[:, :, :, None, None] * stride_bn + at_r * stride_br
        b = tl.load(b_ptrs, mask=at_r < r, other=0.0).to(tl.float32)  # [G, WARPS, 8, 4, 4]
        b = tl.reshape(tl.permute(b, (1, 0, 2, 4, 3)), [WARPS, BLOCK_N, 16])
        at_r = tl.permute(place, (1, 0))[:, None, None, None, :, None]
        at_k = first_k + (two * 32)[:, None, None] + (eight * 4)[None, :, None] + four[None, None, :]  # [2, 8, 4]
        a_ptrs = a_ptr + at_r * stride_ar + at_k.to(tl.int64)[None, :, None, :, None, :] * stride_ak
        a_ptrs = tl.broadcast_to(a_ptrs, [4, 2, WARPS, 8, 4, 4])  # the same for every warp
        a = tl.load(a_ptrs, mask=tl.broadcast_to(at_r < r, a_ptrs.shape), other=0.0).to(tl.float32)
        a = tl.reshape(tl.permute(a, (2, 0, 4, 1, 5, 3)), [WARPS, 16, 64])
        acc = tl.dot(b, a, acc, input_precision="tf32")
    delta = tl.permute(tl.reshape(acc, [WARPS, G, 8, 2, 4, 4, 2]), (1, 3, 0, 2, 5, 6, 4))
    delta = tl.reshape(delta, [G, 2, WARPS, 8, 4, 8])

    offs_w = rows[:, None, :, :, None] * (K // 8) + (two[:, None] * 4 + four[None, :])[None, :, None, None, :]
    offs_w = tl.max_contiguous(offs_w, [1, 1, 1, 1, 1])
    words = tl.load(words_ptr + first_n.to(tl.int64) * (K // 8) + first_k // 8 + offs_w)  # [G, 2, WARPS, 8, 4]
    w = levels_of(tl.join(words, words >> 16), tl.load(table_ptr + tl.arange(0, 16)))
    row = tl.minimum(first_n + tl.arange(0, WARPS * BLOCK_N), N - 1)
    block = (row * (K // 64) + first_k // 64).to(tl.uint32) // (BLOCK_SIZE // 64)
    code = tl.load(absmax_ptr + block)
    scales = scale_of(code, block, None, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED_BLOCK)
    scales = tl.permute(tl.reshape(scales, [WARPS, G, 8]), (1, 0, 2))[:, None, :, :, None, None]
    w = tl.reshape(w, [G, 2, WARPS, 8, 4, 8]) * scales + delta * scale
    offs_k = (two * 32)[:, None, None] + (four * 8)[None, :, None] + eight[None, None, :]  # [2, 4, 8]
    w_ptrs = w_ptr + (first_n + n).to(tl.int64)[:, None, :, :, None, None] * K + first_k
    w_ptrs += offs_k[None, :, None, None, :, :]
    tl.store(w_ptrs, w, mask=tl.broadcast_to(in_n[:, None, :, :, None, None], [G, 2, WARPS, 8, 4, 8]))


def nf4_merge(weight, lora_A, lora_B, scale, dtype) -> torch.Tensor:
    """dequantized W + scale · B A (N, K) in `dtype`, rounded once. K and the block size are multiples of 64."""
    (r, K), N = lora_A.shape, lora_B.shape[0]
    merged = torch.empty((N, K), dtype=stored_dtype(dtype), device=lora_A.device)
    if dtype == torch.float32 or not runs_product(merged):
        return nf4_dequantize(weight, torch.float32).addmm_(lora_B.float(), lora_A.float(), alpha=scale).to(dtype)
    weights, blocks = nf4_pointers(weight)
    launch(
        _merge_kernel, (cdiv(N, MERGE["WARPS"] * MERGE["BLOCK_N"]), K // 64, 1),
        *weights, code_table(merged.device), lora_A, lora_B, merged, N, K, r, *lora_A.stride(), *lora_B.stride(),
        float(scale), **blocks, **MERGE, num_warps=MERGE["WARPS"], num_stages=1,
    )  # fmt: skip
    return merged.to(dtype)


def takes_rows_as_they_are(x: torch.Tensor, weight: torch.Tensor | NF4Weight) -> bool:
    """Whether the way is "native", which needs neither a `plan` nor rows in two dimensions."""
    return not runs_kernel(x) and isinstance(weight, NF4Weight) and runs_native_product(x, weight)


def plan(x: torch.Tensor, weight: torch.Tensor | NF4Weight, dropout: bool = False, rank: int = 1) -> str:
    """How a product of x (M, ·) with a weight goes: "native", "tiled", "stream", "fused", "merged" or "exact".

    On a GPU what is possible is measured (`runtime.fastest`), elsewhere `runtime.FIXED` says it. A dense weight always
    goes "exact". On a CPU there is no merge: it would cost a pass over W, larger than y for all but very long batches.
    """
    if isinstance(weight, torch.Tensor):
        return "exact"
    M, (N, K) = x.shape[0], weight.shape
    if takes_rows_as_they_are(x, weight):
        return "native"
    if not runs_kernel(x):
        return "tiled" if x.is_cpu and x.dtype.itemsize == 2 else "exact"
    if M == 0 or K == 0 or K % 64 or weight.block_size % 64:
        return "exact"
    tensor_cores, rows, ways = runs_product(x), "", ["exact"]
    if (tensor_cores and M <= 16) or M <= 4:
        rows, ways = ", up to 16 rows", ["exact", "stream"]
    elif tensor_cores and M <= 256:
        rows = ", up to 256 rows"
    if tensor_cores:
        ways.append("fused")
    if tensor_cores and rank and not dropout:
        ways.append("merged")
        rows = ", from 1024 rows, without dropout" if M >= 1024 else rows

    def product(way, x):
        rows = x if x.shape[1] == K else x.new_ones(M, K)  # for x W, of which x is (M, N), the same is chosen
        S, A, B = x.new_ones(M, rank), x.new_ones(rank, K), x.new_ones(N, rank)
        return quantized_product(way, rows, weight, None, S, A, B, 1.0)

    sizes = (block_of(M, 16, 8192), N, K, rank, dropout)
    return fastest("nf4 product" + rows, sizes, {way: partial(product, way) for way in ways}, x)


def quantized_product(way, x, weight, bias, S, lora_A, lora_B, scale):
    """y = x Wᵀ + b + scale · S Bᵀ (M, N) with W (N, K) in NF4, by the `plan`; S = x̂ Aᵀ.

    Otherwise as `lora_product`.
    """
    if way in ON_CPU:
        return _on_cpu(way, x, weight, True, bias, S, lora_B, scale)
    if way == "stream":
        return nf4_stream(x, weight, bias, S, lora_B, scale)
    if way == "fused":
        return nf4_fused(x, weight, bias, S, lora_B, scale)
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
    if way in ("stream", "fused") and dropout is None and runs_product(dy):
        return nf4_fused(dy, weight, None, dS, lora_A.t(), 1.0, transposed=False)
    if way == "merged":
        return dy @ nf4_merge(weight, lora_A, lora_B, scale, dy.dtype)
    return lora_product(dy, dense_weight(weight, dy).t(), None, dS, lora_A.t(), 1.0, dropout)


def nf4_matmul(x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None = None, transposed: bool = True):
    """y = x Wᵀ + bias with W (N, K) in NF4, or x W where not `transposed`, without an adapter.

    Args:
        x: (..., K), or (..., N) where not `transposed`; floating point.
        weight: NF4, (N, K).
        bias: (N,) in x's dtype or None; only where `transposed`.
        transposed: whether x meets Wᵀ.

    Returns:
        (..., N), or (..., K), in x's dtype.
    """
    if takes_rows_as_they_are(x, weight):
        return nf4_product_native(x, weight, NF4_CODE, transposed, bias)
    if x.dim() != 2:
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # also where K is 0
        y = nf4_matmul(rows, weight, bias, transposed)
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])  # no view: callers may change it in place
    way, bias = plan(x, weight, rank=0), None if bias is None else bias.contiguous()
    if way == "tiled":
        return nf4_product_tiled(x, weight, transposed, bias)
    if way == "exact":
        W = dense_weight(weight, x)
        return F.linear(x, W, bias) if transposed else x @ W
    nothing = x.new_empty(len(x), 0), x.new_empty(0, weight.shape[1]), x.new_empty(weight.shape[0], 0), 0.0
    if transposed:
        return quantized_product(way, x, weight, bias, *nothing)
    return quantized_product_dx(way, x, weight, *nothing)


def nf4_experts_each(x, weight, transposed, ends) -> torch.Tensor:
    """`nf4_experts` as a product for each expert that has rows, by the way that suits it."""
    y, start = x.new_empty(len(x), weight.shape[1 if transposed else 2]), 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            y[start:end] = nf4_matmul(x[start:end], expert_of(weight, e), None, transposed)
        start = end
    return y


def nf4_experts_grouped(x, weight, transposed, ends) -> torch.Tensor:
    """`nf4_experts` in one launch, where `runs_product`, and K and the block size are multiples of 64."""
    return nf4_fused(x, weight, None, x.new_empty(len(x), 0), x.new_empty(0, 0), 0.0, transposed, ends)


EXPERTS_WAYS = {"grouped": nf4_experts_grouped, "each": nf4_experts_each}


def nf4_experts(x: torch.Tensor, weight: NF4Weight, transposed: bool, ends: torch.Tensor) -> torch.Tensor:
    """Every row of x by the weight of its expert.

    Args:
        x: (S, K), or (S, N) where not `transposed`; floating point, rows sorted by expert.
        weight: NF4, (E, N, K), each expert quantized by itself: `packed` (E, ⌈N K / 2⌉), `absmax` (E, blocks of one
            expert), and with double quantization `nested.absmax` (E, ·) and `nested.offset` (E,).
        transposed: whether rows meet Wᵀ, weights lying as (out, in), or W, as (in, out).
        ends: (E,) int32 or int64 on x's device: how many rows belong to the experts up to and with each; the last is S.

    Returns:
        (S, N), or (S, K), in x's dtype: sums in fp32, rounded once.

    Source: Gale et al. 2022, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts".
    """
    S, (E, N, K) = len(x), weight.shape
    if not runs_product(x) or K % 64 or weight.block_size % 64:
        return nf4_experts_each(x, weight, transposed, ends)
    sizes = block_of(S, 16, 1 << 17), E, N, K, transposed
    return run_fastest("nf4 experts", sizes, EXPERTS_WAYS, x, weight, transposed, ends)


def _on_cpu(way, x, weight, transposed, *rest):
    """`nf4_product_native`, or what it computes without it."""
    if way == "native":
        return nf4_product_native(x, weight, NF4_CODE, transposed, *rest)
    return nf4_product_tiled(x, weight, transposed, *rest)


def nf4_product_tiled(x, weight, transposed, bias=None, S=None, low=None, scale=1.0) -> torch.Tensor:
    """As `nf4_product_native` in torch: W rounded to x's dtype, TILE_ROWS of its rows at a time, and fp32 arithmetic,
    because torch multiplies 16-bit matrices several times more slowly on the CPUs that come here."""
    (N, K), block_size = weight.shape, weight.block_size
    rows = TILE_ROWS if TILE_ROWS * K % block_size == 0 else N
    scales, wide = decode_scales(weight.absmax, weight.nested), x.float()
    y = wide.new_zeros(len(x), N if transposed else K)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        packed = weight.packed[start * K // 2 : cdiv(stop * K, 2)]
        absmax = scales[start * K // block_size : cdiv(stop * K, block_size)]
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


def dense_weight(weight: torch.Tensor | NF4Weight, x: torch.Tensor) -> torch.Tensor:
    """The weight (N, K) in x's dtype. One in NF4 lies in the scratch: use it before the next call."""
    if isinstance(weight, torch.Tensor):
        return weight if weight.dtype == x.dtype else weight.to(x.dtype)
    return nf4_dequantize(weight, x.dtype, out=scratch(torch.Size(weight.shape), x.dtype, x.device))
