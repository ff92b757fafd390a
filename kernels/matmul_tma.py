"""The product of `matmul.py` for Hopper and later: tiles fetched by the copy engine, by programs that stay.

One program for each multiprocessor walks over the tiles of c. A descriptor, made on the device, says how an operand
lies in memory; one thread then asks for a whole tile, and the copy engine (TMA) brings it into shared memory, zeros
where the tensor ends. So the other threads hold no addresses and no masks, and while a finished tile is scaled and
stored, the operands of the next are on their way: that is what `matmul.py`, a program for each tile, cannot do.

    c = s · (a b + b' + (scale · S) Bᵀ)       a (M, K), b (K, N), S (M, r), B (N, r); parts may be missing

Here the low-rank term comes last, into the same accumulator, its scale multiplied into B before B is rounded
(`matmul.py` starts with the term, since it may drop elements of it; this one has no dropout). FLOPs, bytes and what is
saved are those of `matmul.py`, which has the references and the Functions.
"""

from collections import namedtuple
from functools import lru_cache

import torch

from .runtime import INTERPRETED, Launch, block_of, capability, cdiv, dot_dtype, tl, triton


def matmul_tma_reference(a, b, bias, S, up, scale, loss_scale):
    """c (M, N) = loss_scale · (a b + bias + scale · S upᵀ): a (M, K), b (K, N), bias (N,), S (M, r), up (N, r)."""
    return (loss_scale * (a.float() @ b.float() + bias + scale * (S.float() @ up.float().t()))).to(a.dtype)


@triton.jit
def _matmul_tma_kernel(
    a_ptr,  # (M, K), or (K, M) if A_T
    b_ptr,  # (K, N), or (N, K) if B_T
    c_ptr,  # (M, N), contiguous
    bias_ptr,  # (N,) or None
    s_ptr,  # (M, r) or None: no low-rank term
    up_ptr,  # (N, r), LoRA's B, or (r, N) if UP_T, or None
    loss_scale_ptr,  # () fp32 or None
    found_inf_ptr,  # () fp32 or None
    M, N, K, r,
    stride_a, stride_b, stride_s, stride_up,  # between rows as they lie in memory
    scale,  # of the low-rank term
    A_T: tl.constexpr, B_T: tl.constexpr, UP_T: tl.constexpr, DOT: tl.constexpr, PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr, R_PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    if A_T:
        a_tiles = tl.make_tensor_descriptor(a_ptr, [K, M], [stride_a, 1], [BLOCK_K, BLOCK_M])
    else:
        a_tiles = tl.make_tensor_descriptor(a_ptr, [M, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
    if B_T:
        b_tiles = tl.make_tensor_descriptor(b_ptr, [N, K], [stride_b, 1], [BLOCK_N, BLOCK_K])
    else:
        b_tiles = tl.make_tensor_descriptor(b_ptr, [K, N], [stride_b, 1], [BLOCK_K, BLOCK_N])
    if s_ptr is not None:
        s_tiles = tl.make_tensor_descriptor(s_ptr, [M, r], [stride_s, 1], [BLOCK_M, BLOCK_R])
        if UP_T:
            up_tiles = tl.make_tensor_descriptor(up_ptr, [r, N], [stride_up, 1], [BLOCK_R, BLOCK_N])
        else:
            up_tiles = tl.make_tensor_descriptor(up_ptr, [N, r], [stride_up, 1], [BLOCK_N, BLOCK_R])
    c_tiles = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N // 2])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        # As in `matmul.py`: down GROUP_M tiles before moving right.
        group = tile // (GROUP_M * tiles_n)
        rows_in_group = min(tiles_m - group * GROUP_M, GROUP_M)
        m = (group * GROUP_M + (tile % (GROUP_M * tiles_n)) % rows_in_group) * BLOCK_M
        n = ((tile % (GROUP_M * tiles_n)) // rows_in_group) * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            k = step * BLOCK_K
            a = a_tiles.load([k, m]).T if A_T else a_tiles.load([m, k])  # [BLOCK_M, BLOCK_K]
            b = b_tiles.load([n, k]).T if B_T else b_tiles.load([k, n])  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(a.to(DOT), b.to(DOT), acc)

        if s_ptr is not None:
            for j in tl.static_range(0, R_PADDED, BLOCK_R):
                up = up_tiles.load([j, n]) if UP_T else up_tiles.load([n, j]).T  # [BLOCK_R, BLOCK_N]
                acc = tl.dot(s_tiles.load([m, j]).to(DOT), (up.to(tl.float32) * scale).to(DOT), acc)
        if bias_ptr is not None:
            offs_n = n + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        if loss_scale_ptr is not None:
            acc *= tl.load(loss_scale_ptr)
        # In halves: a whole tile would need the shared memory of another stage.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        left, right = left.to(c_ptr.dtype.element_ty), right.to(c_ptr.dtype.element_ty)
        c_tiles.store([m, n], left)
        c_tiles.store([m, n + BLOCK_N // 2], right)
        if found_inf_ptr is not None:
            # Past the end are zeros, or NaN where within it is one too.
            finite = (tl.abs(left.to(tl.float32)) < float("inf")) & (tl.abs(right.to(tl.float32)) < float("inf"))
            bad = tl.max(tl.where(finite, 0, 1))
            tl.store(found_inf_ptr, 1.0, mask=bad != 0)


# All step through K alike, so that sums are split alike.
Tile = namedtuple("Tile", "BLOCK_M BLOCK_N num_warps num_stages BLOCK_K GROUP_M", defaults=(64, 8))


def tiles_by_name(*tiles, prefix=""):
    """By name: rows, columns, warps and stages."""
    return {"{}{} x {}, {} warps, {} stages".format(prefix, *tile): Tile(*tile) for tile in tiles}


TMA_TILES = tiles_by_name((128, 256, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (64, 128, 4, 3), prefix="persistent ")


def tma_fits(N: int, a: torch.Tensor, b: torch.Tensor, *low_rank: torch.Tensor) -> bool:
    """Whether descriptors can describe a, b, their product of N columns, and S and B: multiples of 16 bytes.

    From sm_90 on. The loop over the rank is unrolled and takes shared memory for each turn, so for r up to 64.
    """
    if N % 8 or a.element_size() != 2 or b.dtype != a.dtype or INTERPRETED or capability(a.device) < 90:
        return False
    for x in (a, b, *low_rank):
        (step, row), address = sorted(x.stride()), x.data_ptr()  # transposed or not
        if step != 1 or address == 0 or (address | row * x.element_size()) % 16:
            return False
    return not low_rank or low_rank[0].shape[1] <= 64


def launch_tma(tile, a, b, c, bias=None, S=None, up=None, scale=1.0, loss_scale=None, flag=None, b_t=False):
    """One launch into c (M, N), for operands that `tma_fits`; what is None has no part in it. `b_t`: b is (N, K)."""
    if c.is_cuda:  # where the descriptors are written; backward runs in a thread with settings of its own
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=c.device))
    card = 0 if INTERPRETED else capability(c.device), _multiprocessors(c.device)
    low_rank = () if S is None else (S.shape[1], S.stride(), up.stride())
    kind = a.dtype, float(scale), a.stride(), b.stride()[::-1] if b_t else b.stride()
    _prepared(tile, *card, *c.shape, a.shape[1], *kind, *low_rank)(a, b, c, bias, S, up, loss_scale, flag)


@lru_cache(4096)
def _prepared(tile, arch, programs, M, N, K, dtype, scale, a, b, r=0, s=(0, 0), up=(0, 1)):
    """The launch; a, b, s and up are strides."""
    block_r, grid = block_of(r, 16, 32), (min(programs, cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)), 1, 1)
    return Launch(
        _matmul_tma_kernel, grid, (M, N, K, r, max(a), max(b), max(s), max(up), scale),
        A_T=a[1] != 1, B_T=b[1] != 1, UP_T=up[1] != 1, DOT=dot_dtype(dtype), PROGRAMS=programs,
        FLATTEN=r == 0 or arch // 10 != 10,  # sm_100: two products on one accumulator
        R_PADDED=cdiv(r, block_r) * block_r, BLOCK_R=block_r, **tile._asdict(),
    )  # fmt: skip


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
