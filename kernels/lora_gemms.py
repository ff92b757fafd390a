"""The skinny products of a LoRA layer: S = x̂ Aᵀ forward; dS = s dy B, dB = s dyᵀ S and dA = dSᵀ x̂ backward.

With y = x Wᵀ + s S Bᵀ and x̂ = x after dropout:

    S  = x̂ Aᵀ            (M, r)      sums over K
    dS = s dy B          (M, r)      sums over N
    dB = s dyᵀ S         (N, r)      sums over M
    dA = dSᵀ x̂           (r, K)      sums over M

(y and dx = dy W + dS A are products with W: `matmul.py`.) Each has 2r FLOPs for an element of x or dy
read, far below what a GPU needs to be busy with arithmetic, so reading x and dy once is the limit:

    bytes (16-bit x and dy, fp32 A and B)    S, dA: 2MK + 4rK + 2Mr each       dS and dB: 2MN + 8rN + 4Mr

dA is made by the kernel of S, on transposed views: dAᵀ = x̂ᵀ dS. Dropout happens in registers, on the tile of x just
loaded. dS and dB both need all of dy (M, N), so one kernel makes both: a program loads a tile of dy once and multiplies
it by B on one side and by S on the other. One of the two sums crosses programs whichever way the tiles run; S and dA,
with few tiles, would leave a GPU idle, so their loops are split between programs too. Atomic additions would finish
such sums in an order that changes from run to run; here each program writes its part in fp32 and a sum in fixed order
follows, so results are the same bits every time. With slabs of 128 rows the parts of dB are 4 r N M / 128 bytes, that
is r / 64 of the bytes of an fp16 dy. They are written and read, so at twice that rank a second read of dy costs no
more: from r = 17 on dS and dB are two products, made by the kernel of S. No sum's parts are larger than half of what
was read for it.

Compiled kernels multiply in 16 bits from sm_80 on (`runtime.runs_product`); each fits into the 99 KB of shared memory
that the smallest of those cards allows. The vendor's library is the other way of each, and the measured choice
(`runtime.run_fastest`) takes whichever is faster.
"""

from functools import lru_cache

import torch

from .dropout import ROUNDS, Dropout, keep_tile
from .nf4_cpu import AVX512_BF16, LEVEL
from .runtime import Launch, block_of, cdiv, dot_dtype, run_fastest, runs_product, splits_of, stored_dtype, tl, triton


def lora_down_reference(x, lora_A, mask=None):
    """x (M, K), A (r, K), mask (M, K) → S = x̂ Aᵀ (M, r)."""
    return (x if mask is None else x * mask) @ lora_A.to(x.dtype).t()


def lora_up_grads_reference(dy, S, lora_B, scale):
    """dy (M, N), S (M, r), B (N, r) → dS = s dy B (M, r) in dy's dtype and dB = s dyᵀ S (N, r) in B's."""
    return scale * (dy @ lora_B.to(dy.dtype)), (scale * (dy.t() @ S)).to(lora_B.dtype)


def lora_down_grad_reference(dS, x, dtype, mask=None):
    """dS (M, r), x (M, K), mask (M, K) → dA = dSᵀ x̂ (r, K) in `dtype`."""
    return (dS.t() @ (x if mask is None else x * mask)).to(dtype)


def _wide(x):
    """x, in fp32 where it is 16-bit on a CPU: its own 16-bit products take longer, but for bf16 with AVX512-BF16."""
    narrow = x.is_cpu and x.dtype.itemsize == 2
    return x.float() if narrow and (len(x) <= 64 or x.dtype != torch.bfloat16 or LEVEL < AVX512_BF16) else x


def lora_up_grads_addmm(dy, S, lora_B, scale):
    """`lora_up_grads_reference` in one call for each, that scales as it goes: Bᵀ dyᵀ and Sᵀ dy, with Bᵀ laid out anew,
    because on a CPU dy B takes two to three times as long, and dyᵀ S too."""
    dtype, dy = dy.dtype, _wide(dy)
    S, B = S.to(dy.dtype).t(), lora_B.to(dtype).to(dy.dtype).t().contiguous()
    dS = torch.addmm(S, B, dy.t(), beta=0, alpha=scale)  # with beta=0 the first operand lends its shape alone
    dB = torch.addmm(B, S, dy, beta=0, alpha=scale)
    return dS.to(dtype).t(), dB.to(dtype).to(lora_B.dtype).t()


def _parts(x, dtype, count, *shape):
    """Room beside x for `count` parts of a sum: in fp32, or, of one, without a dimension and in the result's dtype."""
    if count == 1:
        return x.new_empty(*shape, dtype=stored_dtype(dtype))
    return x.new_empty(count, *shape, dtype=torch.float32)


def _sum(parts, dtype):
    whole = parts if parts.dim() == 2 else parts.sum(0)
    return whole if whole.dtype == dtype else whole.to(dtype)


@triton.jit
def _down_kernel(
    x_ptr,  # (M, K)
    a_ptr,  # (r, K)
    s_ptr,  # (splits, M, r), or (splits, r, M)
    seed_ptr,  # (1,) or None: no dropout
    M, K, r,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_sm, stride_sr,
    k_per_split,  # a multiple of BLOCK_K
    scale,
    threshold,
    TRANSPOSED: tl.constexpr,  # the mask is over (K, M)
    DOT: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, split, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = (pid_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    a_rows = a_ptr + offs_r[None, :] * stride_ar
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(split * k_per_split, min(K, (split + 1) * k_per_split), BLOCK_K):
        offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        x_mask = (offs_m[:, None] < M) & (offs_k[None, :] < K)
        x = tl.load(x_rows + offs_k[None, :] * stride_xk, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if seed_ptr is not None:
            if TRANSPOSED:
                keep = tl.trans(keep_tile(seed_ptr, threshold, k, pid_m * BLOCK_M, BLOCK_K, BLOCK_M, ROUNDS))
            else:
                keep = keep_tile(seed_ptr, threshold, pid_m * BLOCK_M, k, BLOCK_M, BLOCK_K, ROUNDS)
            x = tl.where(keep, x, 0.0)
        a_mask = (offs_k[:, None] < K) & (offs_r[None, :] < r)
        a = tl.load(a_rows + offs_k[:, None] * stride_ak, mask=a_mask, other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = tl.dot(x.to(DOT), a.to(DOT), acc)
    s_ptrs = s_ptr + split.to(tl.int64) * M * r
    s_ptrs += offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :] * stride_sr
    tl.store(s_ptrs, acc * scale, mask=(offs_m[:, None] < M) & (offs_r[None, :] < r))


def ragged(columns, strides, aligned) -> bool:
    """Whether rows do not begin and end at 16 elements: loads are narrow then, and many places fill registers."""
    row, step = strides
    return step != 1 or bool(row % 16 or columns % 16) or not aligned


def down_blocks(M: int, K: int, r: int, transposed: bool = False, narrow: bool = False) -> tuple[dict, int, int]:
    """Tile sizes of `_down`; in how many parts K is summed (few rows leave a GPU idle otherwise), their size.

    `narrow`: x is ragged.
    """
    most, deep = 64 if transposed or r > 64 else 128, 32 if narrow else 64
    blocks = {"BLOCK_M": block_of(M, 16, most), "BLOCK_K": block_of(K, 16, deep), "BLOCK_R": block_of(r, 16, 128)}
    programs = cdiv(M, blocks["BLOCK_M"]) * cdiv(r, blocks["BLOCK_R"])
    steps = max(1, cdiv(K, blocks["BLOCK_K"]))
    per_split = cdiv(steps, splits_of(programs, steps * deep // (64 * max(4, cdiv(r, 16)))))
    return blocks, cdiv(steps, per_split), per_split * blocks["BLOCK_K"]


@lru_cache(4096)
def _prepared_down(M, K, r, x, a, dtype, aligned, scale, threshold, transposed=False):
    """In how many parts K is summed, and the launch. x and a: strides; `transposed`: x is a view, and so is S."""
    blocks, splits, k_per_split = down_blocks(M, K, r, transposed, not transposed and ragged(K, x, aligned))
    strides, few = (1, M) if transposed else (r, 1), r <= 32 or transposed
    return splits, Launch(
        _down_kernel, (cdiv(M, blocks["BLOCK_M"]), splits, cdiv(r, blocks["BLOCK_R"])),
        (M, K, r, *x, *a, *strides, k_per_split, scale, threshold or 0), TRANSPOSED=transposed,
        DOT=dot_dtype(dtype), ROUNDS=ROUNDS, **blocks, num_warps=4 if few else 8, num_stages=4 if few else 3,
    )  # fmt: skip


def _down(x, lora_A, dropout=None, scale=1.0, dtype=None, turn=1):
    """scale · x̂ Aᵀ (M, r) in `dtype`, x's if None; with turn = -1 it is transposed, and so are x and lora_A."""
    (M, K), r, dtype = x.shape[::turn], lora_A.shape[::turn][0], dtype or x.dtype
    kind = x.dtype, x.data_ptr() % 16 == 0, float(scale), dropout and dropout.threshold, turn == -1
    splits, run = _prepared_down(M, K, r, x.stride()[::turn], lora_A.stride()[::turn], *kind)
    S = _parts(x, dtype, splits, *(M, r)[::turn])
    run(x, lora_A, S, dropout and dropout.seed)
    return _sum(S, dtype)


def _down_grad(dS, x, dtype, dropout=None, scale=1.0):
    return _down(x, dS, dropout, scale, dtype, turn=-1)


def _down_by_torch(x, lora_A, dropout=None):
    return lora_down_reference(_wide(x), lora_A, dropout and dropout.mask(*x.shape, x.dtype)).to(x.dtype)


def lora_down(x: torch.Tensor, lora_A: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
    """S = x̂ Aᵀ.

    Args:
        x: (M, K), any strides.
        lora_A: (r, K), of any floating dtype.
        dropout: over x, or None. Dropped elements become zero, the others are *not* rescaled.

    Returns:
        (M, r) in x's dtype, accumulated in fp32; its strides are not specified.
    """
    (M, K), r = x.shape, lora_A.shape[0]
    if not runs_product(x):
        return _down_by_torch(x, lora_A, dropout)
    if M == 0:
        return x.new_empty(0, r)
    sizes = block_of(M, 16, 8192), K, r, dropout is not None
    return run_fastest("lora_down", sizes, {"kernel": _down, "torch": _down_by_torch}, x, lora_A, dropout)


@triton.jit
def _up_grads_kernel(
    dy_ptr,  # (M, N)
    s_ptr,  # (M, r)
    b_ptr,  # (N, r)
    ds_ptr,  # (splits, M, r)
    db_ptr,  # (slabs, N, r)
    M, N, r,
    stride_ym, stride_yn, stride_sm, stride_sr, stride_bn, stride_br,
    n_per_split,  # a multiple of BLOCK_N
    scale,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    slab, split = tl.program_id(0), tl.program_id(1)
    offs_m = slab * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    rows = offs_m.to(tl.int64)
    in_m, in_r = offs_m < M, offs_r < r
    s_ptrs = s_ptr + rows[:, None] * stride_sm + offs_r[None, :] * stride_sr
    s = tl.load(s_ptrs, mask=in_m[:, None] & in_r[None, :], other=0.0).to(DOT)  # [BLOCK_M, BLOCK_R]
    ds = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for n in range(split * n_per_split, min(N, (split + 1) * n_per_split), BLOCK_N):
        offs_n = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_n = offs_n < N
        dy_ptrs = dy_ptr + rows[:, None] * stride_ym + offs_n[None, :] * stride_yn
        dy = tl.load(dy_ptrs, mask=in_m[:, None] & in_n[None, :], other=0.0).to(DOT)  # [BLOCK_M, BLOCK_N]
        b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=in_n[:, None] & in_r[None, :], other=0.0).to(DOT)  # [BLOCK_N, BLOCK_R]
        ds = tl.dot(dy, b, ds)
        db = tl.dot(tl.trans(dy), s) * scale  # [BLOCK_N, BLOCK_R]
        db_ptrs = db_ptr + (slab.to(tl.int64) * N + offs_n[:, None]) * r + offs_r[None, :]
        tl.store(db_ptrs, db, mask=in_n[:, None] & in_r[None, :])
    ds_ptrs = ds_ptr + (split.to(tl.int64) * M + rows[:, None]) * r + offs_r[None, :]
    tl.store(ds_ptrs, ds * scale, mask=in_m[:, None] & in_r[None, :])


@lru_cache(4096)
def _prepared_up_grads(M, N, r, dy, s, b, dtype, aligned, scale):
    """Into how many parts N and M are split, and the launch; dy, s and b are strides.

    Both sums of a tile have 128 rows, 16 for each warp: of fewer some are computed twice, as those of dB are for a
    ragged dy, whose loads do not fit into registers otherwise.
    """
    blocks = {"BLOCK_M": block_of(M, 16, 128), "BLOCK_N": 64 if ragged(N, dy, aligned) else 128, "BLOCK_R": 16}
    slabs, steps = cdiv(M, 128), cdiv(N, 128)
    per_split = cdiv(steps, splits_of(slabs, steps))
    splits = cdiv(steps, per_split)
    return splits, slabs, Launch(
        _up_grads_kernel, (slabs, splits, 1), (M, N, r, *dy, *s, *b, 128 * per_split, scale),
        DOT=dot_dtype(dtype), **blocks, num_warps=8, num_stages=3,
    )  # fmt: skip


def _up_grads(dy, S, lora_B, scale):
    (M, N), r = dy.shape, S.shape[1]
    if r > 16:
        return _down(dy, lora_B.t(), None, scale), _down_grad(S, dy, lora_B.dtype, None, scale).t()
    kind = dy.stride(), S.stride(), lora_B.stride(), dy.dtype, dy.data_ptr() % 16 == 0, float(scale)
    splits, slabs, run = _prepared_up_grads(M, N, r, *kind)
    dS, dB = _parts(dy, dy.dtype, splits, M, r), _parts(dy, lora_B.dtype, slabs, N, r)
    run(dy, S, lora_B, dS, dB)
    return _sum(dS, dy.dtype), _sum(dB, lora_B.dtype)


def lora_up_grads(
    dy: torch.Tensor, S: torch.Tensor, lora_B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dS = scale · dy B (M, r) in dy's dtype, and dB = scale · dyᵀ S (N, r) in B's.

    Up to r = 16 from one read of dy (M, N).
    """
    if not runs_product(dy):
        return lora_up_grads_addmm(dy, S, lora_B, scale)
    (M, N), r = dy.shape, S.shape[1]
    if M == 0 or N == 0:
        return torch.zeros_like(S), torch.zeros_like(lora_B)
    ways = {"kernel": _up_grads, "torch": lora_up_grads_addmm}
    return run_fastest("lora_up_grads", (block_of(M, 16, 8192), N, r), ways, dy, S, lora_B, scale)


def _down_grad_by_torch(dS, x, dtype, dropout=None):
    mask = dropout and dropout.mask(*x.shape, x.dtype)
    return lora_down_grad_reference(_wide(dS), _wide(x), x.dtype, mask).to(dtype)


def lora_down_grad(
    dS: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, dropout: Dropout | None = None
) -> torch.Tensor:
    """dA = dSᵀ x̂ (r, K) in `dtype`, from dS (M, r) and x (M, K); `dropout` as in `lora_down`."""
    (M, K), r = x.shape, dS.shape[1]
    if not runs_product(x):
        return _down_grad_by_torch(dS, x, dtype, dropout)
    if M == 0:
        return torch.zeros((r, K), dtype=dtype, device=x.device)
    sizes = block_of(M, 16, 8192), K, r, dropout is not None
    ways = {"kernel": _down_grad, "torch": _down_grad_by_torch}
    return run_fastest("lora_down_grad", sizes, ways, dS, x, dtype, dropout)
