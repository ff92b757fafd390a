"""y = x Wᵀ + b + s S Bᵀ for a few rows of x and a W in NF4 that is read as codes and never made dense.

    one row     x (1, K): sums of products on the ordinary units
    few rows    x (M ≤ 16, K): on the tensor cores, W decoded to x's dtype in registers

Floor: codes and scales are read once, 0.516 bytes a weight with double quantization, a quarter of what
fp16 weights cost. At 4.3 TB/s that is 2.0 µs for 4096 × 4096, which leaves about 4 instructions
a weight before arithmetic is the limit instead; so decoding must be cheap (`nf4_decode.py`), and with
one row the scale is applied to sums over 64 weights. `handtuned xray nf4_` counts the instructions.
There is no backward here: gradients go through a dense W (`nf4_matmul.py`).
"""

import torch

from .nf4_decode import code_table, code_words, decode, dense_tile, load_scales, tensors_of
from .runtime import KernelSpec, on_device, tl, triton
from .tiles import LOW, block_of, cdiv, dot_settings, kernel_spec, stored_dtype


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
        w = dense_tile(
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


ONE_ROW = {"BLOCK_N": 8, "BLOCK_K": 1024}
FEW_ROWS = {"BLOCK_N": 32, "BLOCK_K": 256}


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
    weight = (code_words(packed), absmax, nested_absmax, nested_code, nested_offset, code_table(x.device))
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


stream_op = torch.library.custom_op("handtuned::nf4_stream", _launch_stream, mutates_args=())
@stream_op.register_fake
def _(x, packed, absmax, nested_absmax, nested_code, nested_offset, nested_block, N, block_size, bias, S, B, scale):
    return x.new_empty(x.shape[0], N)


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


def xray_specs() -> list[KernelSpec]:
    """4096 × 4096, double quantization, r = 16, fp32 adapter."""
    strides = dict.fromkeys(("stride_xk", "stride_sr", "stride_br"), 1)
    specs = []
    for low in ("fp16", "bf16"):
        pointers = dict.fromkeys(("x_ptr", "bias_ptr", "s_ptr", "y_ptr"), low)
        pointers |= {"words_ptr": "i32", "absmax_ptr": "u8"}
        common = strides | {"BLOCK_R": 16, "PRECISION": "ieee", "DOT": LOW[low]}
        for what, kernel, blocks in (
            ("one_row", _one_row_kernel, ONE_ROW),
            ("few_rows", _few_rows_kernel, FEW_ROWS),
        ):
            constexprs = {key: value for key, value in (common | blocks).items() if key in kernel.arg_names}
            weights = blocks["BLOCK_N"] * 4096
            specs.append(kernel_spec(f"nf4_{what}[{low}]", kernel, pointers, constexprs, weights, 4, 3, "weight"))
    return specs
