"""FP16 matrix product with the loss scale in its epilogue: c = s · a b, and a flag for overflow.

With a (M, K), b (K, N) and a scale s,

    forward    c  = s · a b           found_inf = any |c| = ∞ or NaN
    backward   da = s · dc bᵀ         db = s · aᵀ dc

so backward is the same kernel on transposed views, which cost nothing but other strides.

Operands have 16 bits, but each of the 2MNK FLOPs is added up in an FP32 accumulator, and the
scale meets that accumulator: one rounding, at the end. Rounding first and scaling afterwards,
as two operations do, loses what underflows in between (a product of 1e-8 is zero in FP16; times
65536 it is not) and moves 4MN bytes more, to read and write c once again.

Floor: max(2MNK / FLOP rate, 2(MK + KN + MN) bytes / bandwidth). At M = N = K = 4096 that is
137 GFLOP against 101 MB: arithmetic, by far. Programs take output tiles in an order that keeps
the operands' tiles in L2: down a group of GROUP_M tiles first, then one to the right.

Saved for backward: a, b and s. The flag is a value on the device; any program with a non-finite
output writes the same 1.0 to it.
"""

from contextlib import nullcontext

import torch
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from .runtime import INTERPRETED, KernelSpec, backend, on_device, tl, triton

TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def scaled_matmul_reference(a, b, scale):
    """a (M, K), b (K, N), scale () → c (M, N) in a's dtype and found_inf (): FP32 products and sums, one rounding."""
    wide = torch.promote_types(a.dtype, torch.float32)
    c = (a.to(wide) @ b.to(wide)).mul_(scale).to(a.dtype)
    return c, (~torch.isfinite(c)).any().float()


def _tile(block_m, block_n, num_warps, num_stages):
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64, "GROUP_M": 8}
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)


# The first is what the tests run.
TILES = [
    _tile(64, 64, 4, 4),
    _tile(128, 256, 8, 3),
    _tile(128, 256, 8, 4),
    _tile(128, 128, 4, 4),
    _tile(64, 128, 4, 4),
    _tile(32, 64, 4, 5),
]


@triton.autotune(TILES[:1] if INTERPRETED else TILES, key=["M_BUCKET", "N", "K", "stride_ak", "stride_bn", "DTYPE"])
@triton.jit
def _scaled_matmul_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N)
    c_ptr,  # (M, N), contiguous
    scale_ptr,  # () fp32
    found_inf_ptr,  # () fp32 or None
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    M_BUCKET: tl.constexpr,  # M up to a power of two: what the tile is tuned for
    EVEN: tl.constexpr,  # every tile is full
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    rows_in_group = min(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % rows_in_group
    pid_n = (pid % (GROUP_M * tiles_n)) // rows_in_group

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # 64-bit arithmetic for where a tile starts, 32-bit within it: half the registers for addresses.
    a_tile = a_ptr + (pid_m * BLOCK_M).to(tl.int64) * stride_am
    b_tile = b_ptr + (pid_n * BLOCK_N).to(tl.int64) * stride_bn
    a_offs = tl.arange(0, BLOCK_M)[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_offs = offs_k[:, None] * stride_bk + tl.arange(0, BLOCK_N)[None, :] * stride_bn

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN:
            a = tl.load(a_tile + a_offs)  # [BLOCK_M, BLOCK_K]
            b = tl.load(b_tile + b_offs)  # [BLOCK_K, BLOCK_N]
        else:
            a = tl.load(a_tile + a_offs, mask=(offs_m[:, None] < M) & (offs_k[None, :] < K - k), other=0.0)
            b = tl.load(b_tile + b_offs, mask=(offs_k[:, None] < K - k) & (offs_n[None, :] < N), other=0.0)
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision="ieee")
        a_tile += tl.cast(BLOCK_K * stride_ak, tl.int64)
        b_tile += tl.cast(BLOCK_K * stride_bk, tl.int64)

    c = (acc * tl.load(scale_ptr)).to(DTYPE)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    c_ptrs = c_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(c_ptrs, c, mask=mask)
    if found_inf_ptr is not None:
        finite = tl.abs(c.to(tl.float32)) < float("inf")  # false for NaN too
        bad = tl.max(tl.where(mask & (finite == 0), 1, 0))  # axis by axis it does not compile for sm_100
        tl.store(found_inf_ptr, 1.0, mask=bad != 0)


def _product(a, b, scale, found_inf):
    """One launch: c = scale · a b for two matrices of any strides; sets `found_inf` unless it is None."""
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty((M, N), dtype=a.dtype, device=a.device)
    if c.numel() == 0:
        return c
    dtype = TRITON_DTYPES[a.dtype]
    upcast = INTERPRETED and a.dtype == torch.bfloat16  # the interpreter multiplies bf16 wrongly

    def grid(tile):
        return (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)

    with on_device(a):
        _scaled_matmul_kernel[grid](
            a, b, c, scale, found_inf, M, N, K, *a.stride(), *b.stride(),
            M_BUCKET=triton.next_power_of_2(M), EVEN=M % 128 == N % 256 == K % 64 == 0,
            DTYPE=dtype, DOT=tl.float32 if upcast else dtype,
        )  # fmt: skip
    return c


def _in_fp32(a, b, scale):
    """The reference, out of reach of `torch.autocast`, which would take its FP32 operands down to 16 bits."""
    with nullcontext() if a.is_meta else torch.autocast(a.device.type, enabled=False):
        return scaled_matmul_reference(a, b, scale)


class _ScaledMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, scale):
        ctx.save_for_backward(a, b, scale)
        if backend(a) == "torch" or a.dtype not in TRITON_DTYPES:
            c, found_inf = _in_fp32(a, b, scale)
        else:
            found_inf = torch.zeros((), dtype=torch.float32, device=a.device)
            c = _product(a, b, scale, found_inf)
        ctx.mark_non_differentiable(found_inf)
        return c, found_inf

    @staticmethod
    @once_differentiable
    def backward(ctx, dc, _):
        a, b, scale = ctx.saved_tensors
        needs_a, needs_b, _ = ctx.needs_input_grad
        if backend(dc) == "torch" or a.dtype not in TRITON_DTYPES:
            product = lambda x, y: _in_fp32(x, y, scale)[0]  # noqa: E731
        else:
            product = lambda x, y: _product(x, y, scale, None)  # noqa: E731
        da = product(dc, b.t()) if needs_a else None
        db = product(a.t(), dc) if needs_b else None
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
        TypeError: a or b is no tensor, or dtypes differ or are no floats.
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


def xray_specs() -> list[KernelSpec]:
    """4096³ of fp16 in the three layouts of forward (nn) and backward (nt, tn), and a ragged product of bf16."""
    strides = {"nn": ("stride_ak", "stride_bn"), "nt": ("stride_ak", "stride_bk"), "tn": ("stride_am", "stride_bn")}
    cases = [("fp16", "nn", True, tile) for tile in TILES]
    cases += [("fp16", "nt", True, TILES[1]), ("fp16", "tn", True, TILES[1])]
    cases += [("fp16", "nn", False, TILES[1]), ("bf16", "nn", True, TILES[1])]
    specs = []
    for low, layout, even, tile in cases:
        dtype = {"fp16": tl.float16, "bf16": tl.bfloat16}[low]
        constexprs = {"M_BUCKET": 4096, "EVEN": even, "DTYPE": dtype, "DOT": dtype, **tile.kwargs}
        constexprs |= dict.fromkeys(strides[layout], 1)
        pointers = {"a_ptr": f"*{low}", "b_ptr": f"*{low}", "c_ptr": f"*{low}"}
        pointers |= {"scale_ptr": "*fp32", "found_inf_ptr": "*fp32"}
        names = _scaled_matmul_kernel.fn.arg_names
        signature = {name: "constexpr" if name in constexprs else pointers.get(name, "i32") for name in names}
        block_m, block_n = tile.kwargs["BLOCK_M"], tile.kwargs["BLOCK_N"]
        shape = f"{block_m}x{block_n}x64,{tile.num_stages} stages"
        specs.append(
            KernelSpec(
                name=f"scaled_matmul[{low},{layout}{'' if even else ',ragged'},{shape}]",
                kernel=_scaled_matmul_kernel,
                signature=signature,
                constexprs=constexprs,
                elements=block_m * block_n,
                options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
                aligned=tuple(name for name in names if name not in constexprs and (even or name != "M")),
                unit="output",
            )
        )
    return specs
