"""The gradients of a LoRA pair: dS = s dy B and dB = s dyᵀ S from one read of dy; dA = dSᵀ x̂.

With y = x Wᵀ + s S Bᵀ and S = x̂ Aᵀ:

    dS = s dy B          (M, r)      sums over N
    dB = s dyᵀ S         (N, r)      sums over M
    dA = dSᵀ x̂           (r, K)      sums over M
    dx = dy W + dS A     (M, K)      `lora_product`, with W and A read along their other side

dS and dB both need all of dy (M, N), the largest array here, so one kernel makes both: a
program loads a tile of dy once and multiplies it by B on one side and by S on the other. One of
the two sums crosses programs whichever way the tiles run. Atomic additions would finish it in an
order that changes from run to run; here each program writes its part and a sum in fixed order
follows, so gradients are the same bits every time. With slabs of 256 rows the parts of dB are
4 r N M / 256 bytes, that is r / 128 of the bytes of an fp16 dy.

FLOPs: 2MNr for each of dS and dB, 2MKr for dA. Bytes: dy once, x once.
"""

import torch

from .dropout import ROUNDS, keep_tile
from .runtime import KernelSpec, on_device, tl, triton
from .tiles import block_of, cdiv, dot_settings, kernel_spec, runs_kernel, splits_of, stored_dtype


def lora_up_grads_reference(dy, S, lora_B, scale):
    """dy (M, N), S (M, r), B (N, r) → dS (M, r) in dy's dtype and dB (N, r) in B's."""
    B = lora_B.to(dy.dtype)
    # Each in one call that scales as it goes; with beta=0 the first operand lends its shape alone.
    dS = torch.addmm(S, dy, B, beta=0, alpha=scale)
    dB = torch.addmm(B.t(), S.t(), dy, beta=0, alpha=scale)  # dyᵀ S is slower on a CPU
    return dS, dB.to(lora_B.dtype).t()


def lora_down_grad_reference(dS, x, dtype, keep=None):
    """dS (M, r), x (M, K) → dA = dSᵀ x̂ (r, K) in `dtype`."""
    return (dS.t() @ (x if keep is None else x * keep)).to(dtype)


@triton.jit
def _up_grads_kernel(
    dy_ptr,  # (M, N)
    s_ptr,  # (M, r)
    b_ptr,  # (N, r)
    ds_ptr,  # (splits, M, r)
    db_ptr,  # (slabs, N, r)
    M,
    N,
    r,
    stride_ym,
    stride_yn,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    n_per_split,  # a multiple of BLOCK_N
    scale,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    slab, split, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = slab * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
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
        ds = tl.dot(dy, b, ds, input_precision=PRECISION)
        db = tl.dot(tl.trans(dy), s, input_precision=PRECISION) * scale  # [BLOCK_N, BLOCK_R]
        db_ptrs = db_ptr + (slab.to(tl.int64) * N + offs_n[:, None]) * r + offs_r[None, :]
        tl.store(db_ptrs, db, mask=in_n[:, None] & in_r[None, :])
    ds_ptrs = ds_ptr + (split.to(tl.int64) * M + rows[:, None]) * r + offs_r[None, :]
    tl.store(ds_ptrs, ds * scale, mask=in_m[:, None] & in_r[None, :])


def up_grads_blocks(M: int, N: int, r: int) -> dict:
    """Tile sizes of `lora_up_grads`, and into how many parts N is split. Tall slabs keep the parts of dB few."""
    block_r = block_of(r, 16, 128)
    blocks = {"BLOCK_M": block_of(M, 16, max(64, 4096 // block_r)), "BLOCK_N": 64, "BLOCK_R": block_r}
    programs = cdiv(M, blocks["BLOCK_M"]) * cdiv(r, block_r)
    steps = cdiv(N, blocks["BLOCK_N"])
    per_split = cdiv(steps, splits_of(programs, steps))
    return blocks | {"n_per_split": per_split * blocks["BLOCK_N"], "splits": cdiv(steps, per_split)}


def _launch_up_grads(
    dy: torch.Tensor, S: torch.Tensor, lora_B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    (M, N), r = dy.shape, S.shape[1]
    if M == 0 or N == 0:
        return torch.zeros_like(S), torch.zeros_like(lora_B)
    blocks = up_grads_blocks(M, N, r)
    splits, slabs = blocks.pop("splits"), cdiv(M, blocks["BLOCK_M"])
    dS = torch.empty((splits, M, r), dtype=torch.float32 if splits > 1 else stored_dtype(dy.dtype), device=dy.device)
    dB = torch.empty((slabs, N, r), dtype=torch.float32 if slabs > 1 else stored_dtype(lora_B.dtype), device=dy.device)
    with on_device(dy):
        _up_grads_kernel[(slabs, splits, cdiv(r, blocks["BLOCK_R"]))](
            dy, S, lora_B, dS, dB, M, N, r, *dy.stride(), *S.stride(), *lora_B.stride(), scale=scale,
            **blocks, **dot_settings(dy.dtype), num_warps=8, num_stages=3,
        )  # fmt: skip
    dS, dB = (parts.sum(0) if len(parts) > 1 else parts[0] for parts in (dS, dB))
    return dS.to(dy.dtype), dB.to(lora_B.dtype)


@triton.jit
def _down_grad_kernel(
    ds_ptr,  # (M, r)
    x_ptr,  # (M, K)
    da_ptr,  # (splits, r, K)
    seed_ptr,  # (1,) or None: no dropout
    M,
    K,
    r,
    stride_sm,
    stride_sr,
    stride_xm,
    stride_xk,
    m_per_split,  # a multiple of BLOCK_M
    threshold,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid_k, split, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_k = (pid_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    in_k, in_r = offs_k < K, offs_r < r
    acc = tl.zeros([BLOCK_K, BLOCK_R], dtype=tl.float32)
    for m in range(split * m_per_split, min(M, (split + 1) * m_per_split), BLOCK_M):
        rows = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_m = rows < M
        x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=in_m[:, None] & in_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if seed_ptr is not None:
            x = tl.where(keep_tile(seed_ptr, threshold, m, pid_k * BLOCK_K, BLOCK_M, BLOCK_K, ROUNDS), x, 0.0)
        ds_ptrs = ds_ptr + rows[:, None] * stride_sm + offs_r[None, :] * stride_sr
        ds = tl.load(ds_ptrs, mask=in_m[:, None] & in_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        acc = tl.dot(tl.trans(x.to(DOT)), ds.to(DOT), acc, input_precision=PRECISION)
    da_ptrs = da_ptr + (split.to(tl.int64) * r + offs_r[None, :]) * K + offs_k[:, None]
    tl.store(da_ptrs, acc, mask=in_k[:, None] & in_r[None, :])


def down_grad_blocks(M: int, K: int, r: int) -> dict:
    """Tile sizes of `lora_down_grad`, and into how many parts M is split."""
    blocks = {"BLOCK_M": block_of(M, 16, 64), "BLOCK_K": 64, "BLOCK_R": block_of(r, 16, 128)}
    programs = cdiv(K, blocks["BLOCK_K"]) * cdiv(r, blocks["BLOCK_R"])
    steps = cdiv(M, blocks["BLOCK_M"])
    per_split = cdiv(steps, splits_of(programs, cdiv(steps, 4)))
    return blocks | {"m_per_split": per_split * blocks["BLOCK_M"], "splits": cdiv(steps, per_split)}


def _launch_down_grad(
    dS: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, seed: torch.Tensor | None, threshold: int
) -> torch.Tensor:
    (M, K), r = x.shape, dS.shape[1]
    if M == 0:
        return torch.zeros((r, K), dtype=dtype, device=x.device)
    blocks = down_grad_blocks(M, K, r)
    splits = blocks.pop("splits")
    dA = torch.empty((splits, r, K), dtype=torch.float32 if splits > 1 else stored_dtype(dtype), device=x.device)
    with on_device(x):
        _down_grad_kernel[(cdiv(K, blocks["BLOCK_K"]), splits, cdiv(r, blocks["BLOCK_R"]))](
            dS, x, dA, seed, M, K, r, *dS.stride(), *x.stride(), threshold=threshold,
            ROUNDS=ROUNDS, **blocks, **dot_settings(x.dtype), num_warps=4, num_stages=4,
        )  # fmt: skip
    return (dA.sum(0) if splits > 1 else dA[0]).to(dtype)


up_grads_op = torch.library.custom_op("handtuned::lora_up_grads", _launch_up_grads, mutates_args=())
down_grad_op = torch.library.custom_op("handtuned::lora_down_grad", _launch_down_grad, mutates_args=())


@up_grads_op.register_fake
def _(dy, S, lora_B, scale):
    return torch.empty_like(S), torch.empty_like(lora_B)


@down_grad_op.register_fake
def _(dS, x, dtype, seed, threshold):
    return x.new_empty(dS.shape[1], x.shape[1], dtype=dtype)


def lora_up_grads(
    dy: torch.Tensor, S: torch.Tensor, lora_B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dS = scale · dy B (M, r) in dy's dtype, and dB = scale · dyᵀ S (N, r) in B's, from one read of dy (M, N)."""
    if not runs_kernel(dy):
        return lora_up_grads_reference(dy, S, lora_B, scale)
    return (up_grads_op if torch.compiler.is_compiling() else _launch_up_grads)(dy, S, lora_B, scale)


def lora_down_grad(
    dS: torch.Tensor,
    x: torch.Tensor,
    dtype: torch.dtype,
    mask: torch.Tensor | None = None,
    threshold: int = 0,
) -> torch.Tensor:
    """dA = dSᵀ x̂ (r, K) in `dtype`, from dS (M, r) and x (M, K); `mask` and `threshold` as in `lora_down`."""
    if not runs_kernel(x):
        return lora_down_grad_reference(dS, x, dtype, mask)
    return (down_grad_op if torch.compiler.is_compiling() else _launch_down_grad)(dS, x, dtype, mask, threshold)


def xray_specs() -> list[KernelSpec]:
    """M = N = K = 4096, r = 16, fp32 adapter."""
    up, down = up_grads_blocks(4096, 4096, 16), down_grad_blocks(4096, 4096, 16)
    del up["splits"], up["n_per_split"], down["splits"], down["m_per_split"]
    specs = []
    for low, dtype in (("fp16", tl.float16), ("bf16", tl.bfloat16)):
        dot = {"DOT": dtype, "PRECISION": "ieee", "stride_sr": 1}
        specs.append(
            kernel_spec(
                f"lora_up_grads[{low}]", _up_grads_kernel, {"dy_ptr": low, "s_ptr": low},
                dot | {"stride_yn": 1, "stride_br": 1} | up, up["BLOCK_M"] * 4096, 8, 3, "dy",
            )
        )  # fmt: skip
        for what, seed in (("", {"seed_ptr": None}), (",dropout", {})):
            specs.append(
                kernel_spec(
                    f"lora_down_grad[{low}{what}]", _down_grad_kernel,
                    {"ds_ptr": low, "x_ptr": low, "seed_ptr": "i64"},
                    dot | {"stride_xk": 1, "ROUNDS": ROUNDS} | seed | down, down["BLOCK_K"] * 4096, 4, 4, "x",
                )
            )  # fmt: skip
    return specs
