"""S = x̂ Aᵀ: the skinny product of a LoRA forward pass.

x (M, K) meets A (r, K): 2MKr FLOPs for MK elements read, far below what a GPU needs to be busy with
arithmetic. Reading x once is the limit, so the adapters of several layers on the same x (q, k, v)
go through here stacked, and dropout happens in registers, on the tile of x just loaded.

With few rows there are few programs; then K is split between programs, each writes its part of S
in fp32, and a sum in fixed order follows.

Bytes that must move: 2MK + 4rK + 2Mr (16-bit x, fp32 A).
"""

import torch

from .dropout import ROUNDS, keep_tile, seeded_keep
from .runtime import KernelSpec, on_device, tl, triton
from .tiles import LOW, block_of, cdiv, dot_settings, kernel_spec, runs_kernel, splits_of, stored_dtype


def drawn_mask(seed, x, columns, threshold):
    """The dropout mask (M, columns) for x's M rows as the products here take it: see `lora_down`. No seed: None."""
    if seed is None or runs_kernel(x):
        return seed
    return seeded_keep(seed, x.shape[0], columns, threshold).to(x.dtype)  # products with bool are slow on a CPU


def lora_down_reference(x, lora_A, keep=None):
    """x (M, K), A (r, K) → S = x̂ Aᵀ (M, r)."""
    return (x if keep is None else x * keep) @ lora_A.to(x.dtype).t()


@triton.jit
def _down_kernel(
    x_ptr,  # (M, K)
    a_ptr,  # (r, K)
    s_ptr,  # (splits, M, r)
    seed_ptr,  # (1,) or None: no dropout
    M,
    K,
    r,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    k_per_split,  # a multiple of BLOCK_K
    threshold,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid_m, split, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    a_rows = a_ptr + offs_r.to(tl.int64)[None, :] * stride_ar
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(split * k_per_split, min(K, (split + 1) * k_per_split), BLOCK_K):
        offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        x_mask = (offs_m[:, None] < M) & (offs_k[None, :] < K)
        x = tl.load(x_rows + offs_k[None, :] * stride_xk, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if seed_ptr is not None:
            x = tl.where(keep_tile(seed_ptr, threshold, pid_m * BLOCK_M, k, BLOCK_M, BLOCK_K, ROUNDS), x, 0.0)
        a_mask = (offs_k[:, None] < K) & (offs_r[None, :] < r)
        a = tl.load(a_rows + offs_k[:, None] * stride_ak, mask=a_mask, other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = tl.dot(x.to(DOT), a.to(DOT), acc, input_precision=PRECISION)
    s_ptrs = s_ptr + (split.to(tl.int64) * M + offs_m[:, None]) * r + offs_r[None, :]
    tl.store(s_ptrs, acc, mask=(offs_m[:, None] < M) & (offs_r[None, :] < r))


def down_blocks(M: int, K: int, r: int) -> dict:
    """Tile sizes of `lora_down`, and into how many parts K is split (few rows leave a GPU idle otherwise)."""
    blocks = {"BLOCK_M": block_of(M, 16, 128), "BLOCK_K": 64, "BLOCK_R": block_of(r, 16, 128)}
    if blocks["BLOCK_R"] == 128:
        blocks["BLOCK_M"] = min(blocks["BLOCK_M"], 64)
    programs = cdiv(M, blocks["BLOCK_M"]) * cdiv(r, blocks["BLOCK_R"])
    steps = max(1, cdiv(K, blocks["BLOCK_K"]))
    per_split = cdiv(steps, splits_of(programs, steps // 4))
    return blocks | {"k_per_split": per_split * blocks["BLOCK_K"], "splits": cdiv(steps, per_split)}


def _launch_down(
    x: torch.Tensor, lora_A: torch.Tensor, seed: torch.Tensor | None, threshold: int
) -> torch.Tensor:
    (M, K), r = x.shape, lora_A.shape[0]
    if M == 0:
        return x.new_empty(0, r)
    blocks = down_blocks(M, K, r)
    splits = blocks.pop("splits")
    S = torch.empty((splits, M, r), dtype=torch.float32 if splits > 1 else stored_dtype(x.dtype), device=x.device)
    grid = (cdiv(M, blocks["BLOCK_M"]), splits, cdiv(r, blocks["BLOCK_R"]))
    with on_device(x):
        _down_kernel[grid](
            x, lora_A, S, seed, M, K, r, *x.stride(), *lora_A.stride(), threshold=threshold,
            ROUNDS=ROUNDS, **blocks, **dot_settings(x.dtype), num_warps=4, num_stages=4,
        )  # fmt: skip
    return (S.sum(0) if splits > 1 else S[0]).to(x.dtype)


down_op = torch.library.custom_op("handtuned::lora_down", _launch_down, mutates_args=())


@down_op.register_fake
def _(x, lora_A, seed, threshold):
    return x.new_empty(x.shape[0], lora_A.shape[0])


def lora_down(
    x: torch.Tensor, lora_A: torch.Tensor, mask: torch.Tensor | None = None, threshold: int = 0
) -> torch.Tensor:
    """S = x̂ Aᵀ.

    Args:
        x: (M, K), any strides.
        lora_A: (r, K), of any floating dtype.
        mask: None, or what `drawn_mask` gives for a dropout mask over x: kernels take its seed and `threshold`
            and draw it themselves, the torch path takes the mask, (M, K) of zeros and ones in x's dtype.
            Dropped elements become zero, the others are *not* rescaled.

    Returns:
        (M, r) in x's dtype, accumulated in fp32; its strides are not specified.
    """
    if not runs_kernel(x):
        return lora_down_reference(x, lora_A, mask)
    return (down_op if torch.compiler.is_compiling() else _launch_down)(x, lora_A, mask, threshold)


def xray_specs() -> list[KernelSpec]:
    """4096 × 4096, r = 16, fp32 adapter, with and without dropout."""
    blocks = down_blocks(4096, 4096, 16)
    del blocks["splits"], blocks["k_per_split"]
    specs = []
    for low, what, seed in (("fp16", "", {"seed_ptr": None}), ("fp16", ",dropout", {}), ("bf16", ",dropout", {})):
        constexprs = {"stride_xk": 1, "stride_ak": 1, "DOT": LOW[low], "PRECISION": "ieee", "ROUNDS": ROUNDS}
        specs.append(
            kernel_spec(
                f"lora_down[{low}{what}]", _down_kernel, {"x_ptr": low, "s_ptr": low, "seed_ptr": "i64"},
                constexprs | seed | blocks, blocks["BLOCK_M"] * 4096, 4, 4, "x",
            )
        )  # fmt: skip
    return specs
