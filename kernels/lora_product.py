"""y = x Wᵀ + b + s S Bᵀ in one kernel: a product whose accumulator starts with the adapter's term.

`lora_product` is an ordinary tiled product with one thing more. Its fp32 accumulator does not
start at zero but at s S Bᵀ, computed from an (BLOCK_M, r) and an (r, BLOCK_N) tile:

    acc  = s · (S Bᵀ)          2MNr FLOPs, r / K of the product
    acc += x Wᵀ                2MNK FLOPs
    y    = acc + b             one rounding, one write

Started this way the accumulator exists once; added at the end, S Bᵀ would need a second one of
128 × 256 fp32 values, and registers would spill. The same kernel computes dx = dy W + dS A: it
is the same formula with dy for x, Wᵀ for W, dS for S and Aᵀ for B, so W is passed with its strides
swapped. There a dropout mask falls on the low-rank term alone.

Bytes that must move: 2(MK + NK + MN + Mr) + 4Nr (16-bit x, W and y, fp32 adapter).
"""

import torch
import torch.nn.functional as F

from .dropout import ROUNDS, keep_tile
from .runtime import INTERPRETED, KernelSpec, on_device, tl, triton
from .tiles import LOW, block_of, cdiv, dot_settings, kernel_spec, runs_kernel, stored_dtype


def lora_product_reference(x, weight, bias, S, lora_B, scale, keep=None):
    """x (M, K), W (N, K), b (N,), S (M, r), B (N, r) → y = x Wᵀ + b + keep ⊙ s S Bᵀ.

    The low-rank term is added in place by the product itself, so no further (M, N) array is made.
    """
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    B_t = lora_B.t().to(x.dtype)
    if keep is None:
        return y.addmm_(S, B_t, alpha=scale)
    return y.addcmul_(S @ B_t, keep, value=scale)


def _tile(block_m, block_n, num_warps, num_stages):
    # Every tile steps through K alike, so that the choice of a tile does not change the sum.
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64, "GROUP_M": 8}
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)


# The first is what the tests run.
TILES = [
    _tile(64, 128, 4, 4),
    _tile(128, 256, 8, 3),
    _tile(128, 128, 8, 4),
    _tile(128, 128, 4, 3),
    _tile(16, 128, 4, 5),
    _tile(16, 64, 4, 6),
]


def _without_spills(tiles, arguments, **_):
    """A mask of 128 × 256 elements does not fit into registers beside the accumulator."""
    return [tile for tile in tiles if arguments["seed_ptr"] is None or tile.kwargs["BLOCK_N"] < 256]


@triton.autotune(
    TILES[:1] if INTERPRETED else TILES,
    key=["M_BUCKET", "N", "K", "stride_wk", "DOT", "PRECISION"],
    prune_configs_by={"early_config_prune": _without_spills},
)
@triton.jit
def _product_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    s_ptr,  # (M, r)
    b_ptr,  # (N, r)
    y_ptr,  # (M, N)
    seed_ptr,  # (1,) or None: no dropout
    M,
    N,
    K,
    r,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    scale,
    threshold,
    M_BUCKET: tl.constexpr,  # M up to a power of two: what the tile is tuned for
    EVEN: tl.constexpr,  # N and K are multiples of the tile's
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs walk down GROUP_M tiles before they move right, so that neighbours share tiles in L2.
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    rows_in_group = min(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % rows_in_group
    pid_n = (pid % (GROUP_M * tiles_n)) // rows_in_group

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = offs_m.to(tl.int64)
    columns = offs_n.to(tl.int64)
    in_m, in_n = offs_m < M, offs_n < N

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for j in range(0, r, BLOCK_R):
        offs_r = j + tl.arange(0, BLOCK_R)
        s_ptrs = s_ptr + rows[:, None] * stride_sm + offs_r[None, :] * stride_sr
        s = tl.load(s_ptrs, mask=in_m[:, None] & (offs_r[None, :] < r), other=0.0)  # [BLOCK_M, BLOCK_R]
        b_ptrs = b_ptr + columns[None, :] * stride_bn + offs_r[:, None] * stride_br
        b = tl.load(b_ptrs, mask=in_n[None, :] & (offs_r[:, None] < r), other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(s.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
    acc *= scale
    if seed_ptr is not None:
        keep = keep_tile(seed_ptr, threshold, pid_m * BLOCK_M, pid_n * BLOCK_N, BLOCK_M, BLOCK_N, ROUNDS)
        acc = tl.where(keep, acc, 0.0)

    # 64-bit arithmetic for where a tile starts, 32-bit within it: half the registers for addresses.
    offs_k = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + (pid_m * BLOCK_M).to(tl.int64) * stride_xm
    w_tile = w_ptr + (pid_n * BLOCK_N).to(tl.int64) * stride_wn
    x_rows = tl.minimum(offs_m, M - 1) - pid_m * BLOCK_M  # rows past the end read the last one, and are not stored
    x_offs = x_rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_offs = tl.arange(0, BLOCK_N)[None, :] * stride_wn + offs_k[:, None] * stride_wk
    for k in range(0, K, BLOCK_K):
        if EVEN:  # masks in this loop cost registers that the largest tile does not have
            x = tl.load(x_tile + x_offs)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_tile + w_offs)  # [BLOCK_K, BLOCK_N]
        else:
            x = tl.load(x_tile + x_offs, mask=offs_k[None, :] < K - k, other=0.0)
            w = tl.load(w_tile + w_offs, mask=in_n[None, :] & (offs_k[:, None] < K - k), other=0.0)
        acc = tl.dot(x.to(DOT), w.to(DOT), acc, input_precision=PRECISION)
        x_tile += tl.cast(BLOCK_K * stride_xk, tl.int64)
        w_tile += tl.cast(BLOCK_K * stride_wk, tl.int64)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    y_tile = y_ptr + (pid_m * BLOCK_M).to(tl.int64) * N + pid_n * BLOCK_N
    y_offs = tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(y_tile + y_offs, acc, mask=in_m[:, None] & in_n[None, :])


def _launch_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    S: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float,
    seed: torch.Tensor | None,
    threshold: int,
) -> torch.Tensor:
    (M, K), N, r = x.shape, weight.shape[0], S.shape[1]
    y = torch.empty((M, N), dtype=stored_dtype(x.dtype), device=x.device)
    if y.numel() == 0:
        return y.to(x.dtype)

    def grid(tile):
        return (cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"]),)

    with on_device(x):
        _product_kernel[grid](
            x, weight, bias, S, lora_B, y, seed, M, N, K, r,
            *x.stride(), *weight.stride(), *S.stride(), *lora_B.stride(), scale, threshold,
            M_BUCKET=block_of(M, 16, 8192), EVEN=N % 256 == 0 and K % 64 == 0, ROUNDS=ROUNDS,
            BLOCK_R=block_of(r, 16, 64), **dot_settings(x.dtype),
        )  # fmt: skip
    return y.to(x.dtype)


product_op = torch.library.custom_op("handtuned::lora_product", _launch_product, mutates_args=())


@product_op.register_fake
def _(x, weight, bias, S, lora_B, scale, seed, threshold):
    return x.new_empty(x.shape[0], weight.shape[0])


def lora_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    S: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    threshold: int = 0,
) -> torch.Tensor:
    """y = x Wᵀ + b + keep ⊙ (scale · S Bᵀ), in one pass.

    Args:
        x: (M, K), any strides.
        weight: (N, K), of any floating dtype and strides. So dx = dy W + dS A is
            `lora_product(dy, W.t(), None, dS, A.t(), 1.0)`.
        bias: (N,) or None.
        S: (M, r) in x's dtype.
        lora_B: (N, r), of any floating dtype.
        scale: a number.
        mask, threshold: as for `lora_down`, a mask of shape (M, N) on the low-rank term alone.

    Returns:
        (M, N) in x's dtype, contiguous.
    """
    if not runs_kernel(x):
        return lora_product_reference(x, weight, bias, S, lora_B, scale, mask)
    launch = product_op if torch.compiler.is_compiling() else _launch_product
    return launch(x, weight, bias, S, lora_B, scale, mask, threshold)


def xray_specs() -> list[KernelSpec]:
    """4096 × 4096, r = 16, fp32 adapter: every tile of the product, dx (W read along its other side), dropout."""
    common = {"M_BUCKET": 4096, "EVEN": True, "PRECISION": "ieee", "ROUNDS": ROUNDS, "BLOCK_R": 16}
    forward = common | {"stride_xk": 1, "stride_wk": 1, "stride_sr": 1, "stride_br": 1, "seed_ptr": None}
    dx_dropout = common | {"stride_xk": 1, "stride_wn": 1, "stride_sr": 1, "stride_bn": 1, "bias_ptr": None}
    dx = dx_dropout | {"seed_ptr": None}
    large, masked = TILES[1:3]
    cases = [("y", "fp16", forward, tile) for tile in TILES]
    cases += [("y", "bf16", forward, large), ("dx", "fp16", dx, large), ("dx,dropout", "fp16", dx_dropout, masked)]
    specs = []
    for what, low, constexprs, tile in cases:
        block_m, block_n = tile.kwargs["BLOCK_M"], tile.kwargs["BLOCK_N"]
        specs.append(
            kernel_spec(
                f"lora_product[{low},{what},{block_m}x{block_n},{tile.num_warps} warps]", _product_kernel.fn,
                dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "s_ptr", "y_ptr"), low) | {"seed_ptr": "i64"},
                constexprs | tile.kwargs | {"DOT": LOW[low]},
                block_m * block_n, tile.num_warps, tile.num_stages, "output",
            )
        )  # fmt: skip
    return specs
