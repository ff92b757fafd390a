"""The dense product in Triton: one tiled loop with two uses, a loss scale after the sum or a LoRA term before it.

    scaled_matmul    c = s · a b, and a flag for overflow       a (M, K), b (K, N), s the loss scale
    lora_product     y = x Wᵀ + b + s S Bᵀ                      x (M, K), W (N, K), S (M, r), B (N, r)

Scale and term meet the FP32 accumulator: one rounding, one write. Rounding first and scaling afterwards loses what
underflows in between (a product of 1e-8 is zero in FP16; times 65536 it is not) and moves 4MN bytes more. Added at the
end, S Bᵀ would need a second accumulator of 128 × 256 fp32 values, and registers would spill; so the first one starts
with it. Backward is the same kernel on transposed views, which cost nothing but other strides:

    da = s · dc bᵀ      db = s · aᵀ dc      dx = dy W + dS A     (in dx a dropout mask falls on dS A alone)

Floor: max(FLOPs / rate, bytes / bandwidth), with 2MNK + 2MNr FLOPs and 2(MK + NK + MN + Mr) + 4Nr bytes (16-bit
operands, fp32 adapter). At M = N = K = 4096 that is 137 GFLOP against 101 MB: arithmetic, by far.

`scaled_matmul` saves a, b and s for backward. Its flag is a value on the device; any program with a non-finite
output writes the same 1.0 to it. `lora_product` is a piece of `lora.py`, which has its backward.
"""

from contextlib import nullcontext
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from .dropout import ROUNDS, Dropout, keep_tile
from .matmul_tma import TMA_TILES, launch_tma, tiles_by_name, tma_fits
from .runtime import (
    TRITON_DTYPES,
    Launch,
    block_of,
    cdiv,
    dot_dtype,
    run_fastest,
    runs_product,
    stored_dtype,
    tl,
    triton,
)


def scaled_matmul_reference(a, b, scale):
    """a (M, K), b (K, N), scale () → c (M, N) in a's dtype and found_inf (): FP32 products and sums, one rounding."""
    wide = torch.promote_types(a.dtype, torch.float32)
    c = (a.to(wide) @ b.to(wide)).mul_(scale).to(a.dtype)
    return c, (~torch.isfinite(c)).any().float()


def lora_product_reference(x, weight, bias, S, lora_B, scale, mask=None):
    """x (M, K), W (N, K), b (N,), S (M, r), B (N, r), mask (M, N) → y = x Wᵀ + b + mask ⊙ s S Bᵀ in x's dtype."""
    low_rank = scale * (S @ lora_B.to(x.dtype).t())
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y + (low_rank if mask is None else low_rank * mask)


def lora_product_addmm(x, weight, bias, S, lora_B, scale, mask=None):
    """`lora_product_reference` with the low-rank term added in place by its product: no further (M, N) array."""
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    B_t = lora_B.t().to(x.dtype)
    if mask is None:
        return y.addmm_(S, B_t, alpha=scale)
    return y.addcmul_(S @ B_t, mask, value=scale)


@triton.jit
def _low_rank(
    acc, s_ptr, up_ptr, seed_ptr, first_m, first_n, M, N, r,
    stride_sm, stride_sr, stride_un, stride_ur, scale, threshold,
    DOT: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N], zero so far, plus s S Bᵀ with dropout."""
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    rows, columns = offs_m.to(tl.int64), offs_n.to(tl.int64)
    for j in tl.range(0, r, BLOCK_R, num_stages=1):  # not prefetched: r has no part in how much memory a tile needs
        offs_r = (j + tl.arange(0, BLOCK_R)).to(tl.int64)
        s_ptrs = s_ptr + rows[:, None] * stride_sm + offs_r[None, :] * stride_sr
        s = tl.load(s_ptrs, mask=(offs_m < M)[:, None] & (offs_r[None, :] < r), other=0.0)  # [BLOCK_M, BLOCK_R]
        up_ptrs = up_ptr + columns[None, :] * stride_un + offs_r[:, None] * stride_ur
        up = tl.load(up_ptrs, mask=(offs_n < N)[None, :] & (offs_r[:, None] < r), other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(s.to(DOT), up.to(DOT), acc)
    acc *= scale
    if seed_ptr is not None:
        keep = keep_tile(seed_ptr, threshold, first_m, first_n, BLOCK_M, BLOCK_N, ROUNDS)
        acc = tl.where(keep, acc, 0.0)
    return acc


@triton.jit
def _matmul_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N)
    c_ptr,  # (M, N), contiguous
    bias_ptr,  # (N,) or None
    s_ptr,  # (M, r) or None: no low-rank term
    up_ptr,  # (N, r), LoRA's B, or None
    seed_ptr,  # (1,) or None: no dropout on the low-rank term
    loss_scale_ptr,  # () fp32 or None
    found_inf_ptr,  # () fp32 or None
    M, N, K, r,
    stride_am, stride_ak, stride_bk, stride_bn, stride_sm, stride_sr, stride_un, stride_ur,
    scale,  # of the low-rank term
    threshold,
    EVEN: tl.constexpr,  # N and K are multiples of the tile's, and M where rows are masked
    WIDE: tl.constexpr,  # a stride is so large that places within one tile are 2³¹ apart
    DOT: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Programs walk down GROUP_M tiles before they move right, so that neighbours share tiles in L2.
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    rows_in_group = min(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % rows_in_group
    pid_n = (pid % (GROUP_M * tiles_n)) // rows_in_group

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_m, in_n = offs_m < M, offs_n < N
    # 64-bit arithmetic for where a tile starts, 32-bit within it if possible: half the registers for addresses.
    a_tile = a_ptr + (pid_m * BLOCK_M).to(tl.int64) * stride_am
    b_tile = b_ptr + (pid_n * BLOCK_N).to(tl.int64) * stride_bn
    if s_ptr is None:  # a may be transposed, so its rows stay consecutive
        a_rows, read = tl.arange(0, BLOCK_M), in_m
    else:  # a mask costs registers: rows past the end read the last one, and are not stored
        a_rows, read = tl.minimum(offs_m, M - 1) - pid_m * BLOCK_M, tl.full([BLOCK_M], 1, tl.int1)
    b_columns, steps = tl.arange(0, BLOCK_N), offs_k
    if WIDE:
        a_rows, b_columns, steps = a_rows.to(tl.int64), b_columns.to(tl.int64), offs_k.to(tl.int64)
    a_offs = a_rows[:, None] * stride_am + steps[None, :] * stride_ak
    b_offs = steps[:, None] * stride_bk + b_columns[None, :] * stride_bn

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if s_ptr is not None:
        acc = _low_rank(
            acc, s_ptr, up_ptr, seed_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, r, stride_sm, stride_sr, stride_un,
            stride_ur, scale, threshold, DOT, ROUNDS, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    for k in range(0, K, BLOCK_K):
        if EVEN:  # masks in this loop cost registers that the largest tile does not have
            a = tl.load(a_tile + a_offs)  # [BLOCK_M, BLOCK_K]
            b = tl.load(b_tile + b_offs)  # [BLOCK_K, BLOCK_N]
        else:
            a = tl.load(a_tile + a_offs, mask=read[:, None] & (offs_k[None, :] < K - k), other=0.0)
            b = tl.load(b_tile + b_offs, mask=(offs_k[:, None] < K - k) & in_n[None, :], other=0.0)
        acc = tl.dot(a.to(DOT), b.to(DOT), acc)
        a_tile += tl.cast(stride_ak, tl.int64) * BLOCK_K
        b_tile += tl.cast(stride_bk, tl.int64) * BLOCK_K

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if loss_scale_ptr is not None:
        acc *= tl.load(loss_scale_ptr)
    c = acc.to(c_ptr.dtype.element_ty)
    c_tile = c_ptr + (pid_m * BLOCK_M).to(tl.int64) * N + pid_n * BLOCK_N
    c_rows = tl.arange(0, BLOCK_M).to(tl.int64) if WIDE else tl.arange(0, BLOCK_M)
    c_offs = c_rows[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    mask = in_m[:, None] & in_n[None, :]
    tl.store(c_tile + c_offs, c, mask=mask)
    if found_inf_ptr is not None:
        finite = tl.abs(c.to(tl.float32)) < float("inf")  # false for NaN too
        bad = tl.max(tl.where(mask & (finite == 0), 1, 0))  # axis by axis it does not compile for sm_100
        tl.store(found_inf_ptr, 1.0, mask=bad != 0)


SCALED_TILES = tiles_by_name(
    (64, 64, 4, 4), (128, 256, 8, 3), (128, 256, 8, 4), (128, 128, 4, 4), (64, 128, 4, 4), (32, 64, 4, 5)
)  # fmt: skip
LORA_TILES = tiles_by_name(
    (64, 128, 4, 4), (128, 256, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (16, 128, 4, 5), (16, 64, 4, 6)
)  # fmt: skip


def _launch(tile, a, b, c, bias=None, S=None, up=None, scale=1.0, loss_scale=None, flag=None, dropout=None, b_t=False):
    """One launch into c (M, N); what is None has no part in it. `b_t`: b is given as (N, K)."""
    low_rank = () if S is None else (S.shape[1], S.stride(), up.stride())
    kind = a.dtype, float(scale), dropout and dropout.threshold, a.stride(), b.stride()[::-1] if b_t else b.stride()
    run = _prepared(tile, *c.shape, a.shape[1], *kind, *low_rank)
    run(a, b, c, bias, S, up, dropout and dropout.seed, loss_scale, flag)


@lru_cache(4096)
def _prepared(tile, M, N, K, dtype, scale, threshold, a, b, r=0, s=(0, 0), up=(0, 0)):
    """The launch; a, b, s and up are strides."""
    return Launch(
        _matmul_kernel, (cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N), 1, 1),
        (M, N, K, r, *a, *b, *s, *up, scale, threshold or 0),
        EVEN=N % 256 == 0 and K % 64 == 0 and (r > 0 or M % 128 == 0), WIDE=256 * max(*a, *b, N) >= 2**31,
        DOT=dot_dtype(dtype), ROUNDS=ROUNDS, BLOCK_R=block_of(r, 16, 64), **tile._asdict(),
    )  # fmt: skip


def _lora(launch_tiles, tile, x, weight, bias, S, lora_B, scale, dropout=None):
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=stored_dtype(x.dtype))
    rest = {} if dropout is None else {"dropout": dropout}
    launch_tiles(tile, x, weight, y, bias, S, lora_B, scale, b_t=True, **rest)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # this asks a microsecond of the host even then


def _by_torch(x, weight, bias, S, lora_B, scale, dropout=None):
    mask = dropout and dropout.mask(x.shape[0], weight.shape[0], x.dtype)
    return lora_product_addmm(x, weight, bias, S, lora_B, scale, mask)


LORA_WAYS = {name: partial(_lora, _launch, tile) for name, tile in LORA_TILES.items()} | {"torch": _by_torch}
LORA_WAYS_TMA = LORA_WAYS | {name: partial(_lora, launch_tma, tile) for name, tile in TMA_TILES.items()}
# A mask of 128 × 256 does not fit into registers beside the accumulator.
LORA_WAYS_WITH_DROPOUT = {name: way for name, way in LORA_WAYS.items() if "x 256" not in name}


def lora_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, S: torch.Tensor, lora_B: torch.Tensor,
    scale: float, dropout: Dropout | None = None,
) -> torch.Tensor:  # fmt: skip
    """y = x Wᵀ + b + mask ⊙ (scale · S Bᵀ), in one pass.

    Args:
        x: (M, K), any strides.
        weight: (N, K), of any floating dtype and strides. So dx = dy W + dS A is
            `lora_product(dy, W.t(), None, dS, A.t(), 1.0)`.
        bias: (N,) or None.
        S: (M, r) in x's dtype.
        lora_B: (N, r), of any floating dtype.
        scale: a number.
        dropout: over (M, N), on the low-rank term alone, or None.

    Returns:
        (M, N) in x's dtype, contiguous.
    """
    M, (N, K), r = x.shape[0], weight.shape, S.shape[1]
    if not runs_product(x) or M == 0 or N == 0:
        return _by_torch(x, weight, bias, S, lora_B, scale, dropout)
    sizes = block_of(M, 16, 8192), N, K, r, weight.stride(1) == 1, dropout is not None
    operation, ways = "lora_product", LORA_WAYS if dropout is None else LORA_WAYS_WITH_DROPOUT
    if dropout is None and tma_fits(N, x, weight, S, lora_B):
        operation, ways = "lora_product, descriptors", LORA_WAYS_TMA
    return run_fastest(operation, sizes, ways, x, weight, bias, S, lora_B, scale, dropout)


def _scaled(launch_tiles, tile, a, b, scale, want_flag):
    c = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    found_inf = torch.zeros((), dtype=torch.float32, device=a.device) if want_flag else None
    launch_tiles(tile, a, b, c, loss_scale=scale, flag=found_inf)
    return c, found_inf


def _scaled_by_torch(a, b, scale, want_flag):
    # Out of reach of `torch.autocast`, which would take the FP32 operands down to 16 bits.
    with nullcontext() if a.is_meta else torch.autocast(a.device.type, enabled=False):
        if a.is_cpu or not (a.dtype == torch.float16 or runs_product(a)):
            return scaled_matmul_reference(a, b, scale)
        c = torch.mm(a, b, out_dtype=torch.float32).mul_(scale).to(a.dtype)  # on tensor cores; not on a CPU
        return c, (~torch.isfinite(c)).any().float()


SCALED_WAYS = {name: partial(_scaled, _launch, tile) for name, tile in SCALED_TILES.items()}
SCALED_WAYS["torch"] = _scaled_by_torch
SCALED_WAYS_TMA = SCALED_WAYS | {name: partial(_scaled, launch_tma, tile) for name, tile in TMA_TILES.items()}


def _scaled_product(a, b, scale, want_flag):
    """scale · a b (M, N), and found_inf if it is wanted (in torch it comes anyway)."""
    (M, K), N = a.shape, b.shape[1]
    if not runs_product(a) or M == 0 or N == 0:
        return _scaled_by_torch(a, b, scale, want_flag)
    sizes = block_of(M, 16, 8192), N, K, a.stride(1) == 1, b.stride(1) == 1
    if tma_fits(N, a, b):
        return run_fastest("scaled_matmul, descriptors", sizes, SCALED_WAYS_TMA, a, b, scale, want_flag)
    return run_fastest("scaled_matmul", sizes, SCALED_WAYS, a, b, scale, want_flag)


class _ScaledMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, scale):
        ctx.save_for_backward(a, b, scale)
        c, found_inf = _scaled_product(a, b, scale, want_flag=True)
        ctx.mark_non_differentiable(found_inf)
        return c, found_inf

    @staticmethod
    @once_differentiable
    def backward(ctx, dc, _):
        a, b, scale = ctx.saved_tensors
        da = _scaled_product(dc, b.t(), scale, want_flag=False)[0] if ctx.needs_input_grad[0] else None
        db = _scaled_product(a.t(), dc, scale, want_flag=False)[0] if ctx.needs_input_grad[1] else None
        return da, db, None


def scaled_matmul(
    a: torch.Tensor, b: torch.Tensor, scale: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """c = scale · a b with FP32 accumulation, the scale applied before the only rounding; differentiable in a and b.

    Args:
        a: (…, M, K), float16 or bfloat16; float32 and float64 work too. Any strides.
        b: (K, N) of a's dtype and device. Any strides.
        scale: a number, or a 1-element tensor (a loss scale that lives on the GPU), not differentiated.

    Returns:
        c: (…, M, N) in a's dtype.
        found_inf: () float32 on a's device, 1.0 if any value of c is infinite or NaN, else 0.0.

    Raises:
        ValueError: shapes or devices do not fit, or `scale` has several elements or requires a gradient.
        TypeError: a or b is not a tensor, or dtypes differ or are not floats.
    """
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        raise TypeError(f"a and b must be tensors, got {type(a).__name__} and {type(b).__name__}")
    if has_torch_function((a, b)):  # `amp.autocast` sees one operation then, and not the reference's own
        return handle_torch_function(scaled_matmul, (a, b), a, b, scale)
    if a.dim() < 2 or b.dim() != 2 or a.shape[-1] != b.shape[0]:
        raise ValueError(f"a must be (..., M, K) and b (K, N), got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"b must be on a's device {a.device}, got {b.device}")
    if a.dtype != b.dtype or a.dtype not in (*TRITON_DTYPES, torch.float64):
        raise TypeError(f"a and b must have one dtype of float16, bfloat16, float32, float64, got {a.dtype}, {b.dtype}")
    if not isinstance(scale, torch.Tensor):
        scale = torch.full((), scale, dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    elif scale.numel() != 1 or scale.requires_grad:
        raise ValueError("scale must be a number or a 1-element tensor that requires no gradient")
    scale = scale.reshape(()).to(a.device, torch.promote_types(a.dtype, torch.float32))
    c, found_inf = _ScaledMatmul.apply(a.flatten(0, -2), b, scale)
    return c.view(*a.shape[:-1], b.shape[1]), found_inf
