"""W' = dequantized W + s B A, made in one pass and rounded once.

The tile of s B A comes from the tensor cores while the codes of the same tile are decoded, so the
adapter costs 2NKr FLOPs and 4r(N + K) bytes beside the 2.516 NK bytes of dequantizing to 16 bits.
There is no backward: `nf4_matmul.py` makes W' again and multiplies by it.
"""

import torch

from .nf4_decode import code_table, code_words, dense_tile, tensors_of
from .runtime import KernelSpec, on_device, tl, triton
from .tiles import block_of, cdiv, dot_settings, kernel_spec, stored_dtype

MERGE = {"BLOCK_N": 64, "BLOCK_K": 128}


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
    w = dense_tile(
        words, table, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
        rows, k, K, block_size, nested_block,
    )  # fmt: skip
    w_ptrs = w_ptr + rows[:, None] * K + offs_k[None, :]
    tl.store(w_ptrs, w + acc * scale, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


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
            code_words(packed), absmax, nested_absmax, nested_code, nested_offset, code_table(packed.device),
            lora_A, lora_B, merged, N, K, r, *lora_A.stride(), *lora_B.stride(), scale, block_size, nested_block,
            PRECISION=precision, BLOCK_R=block_of(r, 16, 64), **MERGE, num_warps=8,
        )  # fmt: skip
    return merged.to(dtype)


merge_op = torch.library.custom_op("handtuned::nf4_merge", _launch_merge, mutates_args=())


@merge_op.register_fake
def _(packed, absmax, nested_absmax, nested_code, nested_offset, nested_block, block_size, A, B, scale, dtype):
    return A.new_empty(B.shape[0], A.shape[1], dtype=dtype)


def nf4_merge(weight, lora_A, lora_B, scale, dtype) -> torch.Tensor:
    """dequantized W + scale · B A (N, K) in `dtype`, rounded once. K and the block size are multiples of 64."""
    launch = merge_op if torch.compiler.is_compiling() else _launch_merge
    return launch(*tensors_of(weight), weight.block_size, lora_A, lora_B, scale, dtype)


def xray_specs() -> list[KernelSpec]:
    """4096 × 4096, double quantization, r = 16, fp32 adapter."""
    constexprs = {"stride_br": 1, "stride_ak": 1, "BLOCK_R": 16, "PRECISION": "tf32"} | MERGE
    weights = MERGE["BLOCK_N"] * MERGE["BLOCK_K"]
    return [
        kernel_spec(
            f"nf4_merge[{low}]", _merge_kernel, {"words_ptr": "i32", "absmax_ptr": "u8", "w_ptr": low},
            constexprs, weights, 8, 3, "weight",
        )
        for low in ("fp16", "bf16")
    ]  # fmt: skip
