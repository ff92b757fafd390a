"""The two products of a LoRA forward pass: S = x̂ Aᵀ, and y = x Wᵀ + b + s S Bᵀ in one kernel.

`lora_down` is skinny: x (M, K) meets A (r, K), 2MKr FLOPs for MK elements read, far below what
a GPU needs to be busy with arithmetic. It is limited by reading x once, and A of several
adapters on the same x (q, k, v) goes through it stacked.

`lora_product` is an ordinary tiled product with one thing more. Its fp32 accumulator does not
start at zero but at s S Bᵀ, computed from an (BLOCK_M, r) and an (r, BLOCK_N) tile:

    acc  = s · (S Bᵀ)          2MNr FLOPs, r / K of the product
    acc += x Wᵀ                2MNK FLOPs
    y    = acc + b             one rounding, one write

Started this way the accumulator exists once; added at the end, S Bᵀ would need a second one of
128 × 256 fp32 values, and registers would spill. The same kernel computes dx = dy W + dS A: it
is the same formula with dy for x, Wᵀ for W, dS for S and Aᵀ for B, so W is passed with its strides
swapped. There a dropout mask falls on the low-rank term alone.

Bytes that must move: 2(MK + r K + Mr) for S; 2(MK + NK + MN + Mr) + 4Nr for y (fp16, fp32 adapter).
"""

import torch
import torch.nn.functional as F

from .dropout import ROUNDS, keep_tile, seeded_keep
from .runtime import INTERPRETED, KernelSpec, backend, on_device, tl, triton

_DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_TRITON = {"fp16": tl.float16, "bf16": tl.bfloat16}
TARGET_PROGRAMS = 256  # what fills a large GPU; a constant, so that sums are split alike on every machine


def runs_kernel(x: torch.Tensor) -> bool:
    """Whether x meets a Triton kernel. FP64 has none (it serves gradient checks) and runs in torch."""
    return backend(x) != "torch" and x.dtype in _DOT


def dot_settings(dtype: torch.dtype) -> dict:
    """Operand type and precision of the tensor-core products (the interpreter cannot multiply bf16)."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    upcast = INTERPRETED and dtype == torch.bfloat16
    return {"DOT": tl.float32 if upcast else _DOT[dtype], "PRECISION": "tf32" if tf32 else "ieee"}


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel stores for a result of `dtype`: the same, but the interpreter cuts bf16 instead of rounding it."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def block_of(size: int, low: int, high: int) -> int:
    """The power of two that covers `size`, within [low, high]."""
    return min(max(1 << (size - 1).bit_length() if size > 0 else 1, low), high)


def splits_of(programs: int, steps: int) -> int:
    """Into how many parts to split a loop of `steps` when there are only `programs` of them."""
    return max(1, min(TARGET_PROGRAMS // max(programs, 1), steps))


def drawn_mask(seed, x, columns, threshold):
    """The dropout mask (M, columns) for x's M rows as the products here take it: see `lora_down`. No seed: None."""
    if seed is None or runs_kernel(x):
        return seed
    return seeded_keep(seed, x.shape[0], columns, threshold)


def lora_down_reference(x, lora_A, keep=None):
    """x (M, K), A (r, K) → S = x̂ Aᵀ (M, r), as the transpose of a contiguous (r, M).

    Of all layouts, CPU libraries are fastest at skinny products when r counts the *rows* of a
    contiguous left operand (1.5 to 4 times as fast as x Aᵀ); the other skinny products use S so.
    """
    x = x if keep is None else x * keep
    return (lora_A.to(x.dtype) @ x.t()).t()


def lora_product_reference(x, weight, bias, S, lora_B, scale, keep=None):
    """x (M, K), W (N, K), b (N,), S (M, r), B (N, r) → y = x Wᵀ + b + keep ⊙ s S Bᵀ.

    The low-rank term is added in place by the product itself, so no further (M, N) array is made.
    """
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    B_t = lora_B.t().to(x.dtype)
    if keep is None:
        return y.addmm_(S, B_t, alpha=scale)
    return y.addcmul_(S @ B_t, keep, value=scale)


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


down_op = torch.library.custom_op("handtuned::lora_down", _launch_down, mutates_args=())
product_op = torch.library.custom_op("handtuned::lora_product", _launch_product, mutates_args=())


@down_op.register_fake
def _(x, lora_A, seed, threshold):
    return x.new_empty(x.shape[0], lora_A.shape[0])


@product_op.register_fake
def _(x, weight, bias, S, lora_B, scale, seed, threshold):
    return x.new_empty(x.shape[0], weight.shape[0])


def lora_down(
    x: torch.Tensor, lora_A: torch.Tensor, mask: torch.Tensor | None = None, threshold: int = 0
) -> torch.Tensor:
    """S = x̂ Aᵀ.

    Args:
        x: (M, K), any strides.
        lora_A: (r, K), of any floating dtype.
        mask: None, or what `drawn_mask` gives for a dropout mask over x: kernels take its seed and `threshold`
            and draw it themselves, the torch path takes the mask, (M, K) bool. Dropped elements
            become zero, the others are *not* rescaled.

    Returns:
        (M, r) in x's dtype, accumulated in fp32; its strides are not specified.
    """
    if not runs_kernel(x):
        return lora_down_reference(x, lora_A, mask)
    return (down_op if torch.compiler.is_compiling() else _launch_down)(x, lora_A, mask, threshold)


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


def kernel_spec(name, kernel, pointers, constexprs, elements, num_warps, num_stages, unit) -> KernelSpec:
    """A spec for a kernel whose pointers are fp32 where `pointers` (name → type) says nothing else."""
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{pointers.get(argument, 'fp32')}"
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    unaligned = ("constexpr", "fp32")
    aligned = tuple(key for key, kind in signature.items() if kind not in unaligned and key != "threshold")
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return KernelSpec(name, kernel, signature, constexprs, elements, options, aligned, unit)


def xray_specs() -> list[KernelSpec]:
    """4096 × 4096, r = 16, fp32 adapter: every tile of the product, dx (W read along its other side), dropout."""
    down = down_blocks(4096, 4096, 16)
    del down["splits"], down["k_per_split"]
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
                constexprs | tile.kwargs | {"DOT": _TRITON[low]},
                block_m * block_n, tile.num_warps, tile.num_stages, "output",
            )
        )  # fmt: skip
    for low, what, seed in (("fp16", "", {"seed_ptr": None}), ("fp16", ",dropout", {}), ("bf16", ",dropout", {})):
        constexprs = {"stride_xk": 1, "stride_ak": 1, "DOT": _TRITON[low], "PRECISION": "ieee", "ROUNDS": ROUNDS}
        specs.append(
            kernel_spec(
                f"lora_down[{low}{what}]", _down_kernel, {"x_ptr": low, "s_ptr": low, "seed_ptr": "i64"},
                constexprs | seed | down, down["BLOCK_M"] * 4096, 4, 4, "x",
            )
        )  # fmt: skip
    return specs
