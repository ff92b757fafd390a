"""Lesson 02, what a memory access costs: a transposition within so many sectors, and within so many wavefronts."""

import torch

from ...kernels.runtime import tl, triton
from ..canaries import guarded
from ..emulated import without_faults
from ..exercise import Exercise, WrongAnswer, expect, expect_close
from ..watch import launched

# 02.7


@triton.jit
def _transpose_kernel(x_ptr, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (m < M) & (n < N)
    tl.store(out_ptr + n * M + m, tl.load(x_ptr + m * N + n, mask=inside), mask=inside)


def _transpose(block_m=32, block_n=32):
    def transpose(x, out):
        M, N = x.shape
        grid = (triton.cdiv(M, block_m), triton.cdiv(N, block_n))
        _transpose_kernel[grid](x, out, M, N, BLOCK_M=block_m, BLOCK_N=block_n)

    return transpose


def _copied(x, out):
    _transpose()(x.view(out.shape), out.view(x.shape))


MOST_SECTORS = 16


def _check_transpose(transpose):
    for M, N in ((64, 64), (33, 70), (1, 5), (130, 97)):
        x, out = guarded((M, N), values=torch.randn(M, N)), guarded((N, M))
        what = f"{M} × {N}"
        launched(transpose, x, out, inputs={"x": x}, outputs={"out": out}, what=what, torch_moves=False)
        expect_close(out, x.t(), f"out ({M} × {N})", hint="out[n, m] = x[m, n]; a row of out has M elements.")
    counted = _counted(lambda: transpose(torch.randn(128, 128), torch.empty(128, 128)))
    for side in ("load", "store"):
        sectors = getattr(counted, f"global_{side}s").per_request
        expect(
            sectors <= MOST_SECTORS,
            f"The result is right, but a {side} takes {sectors:.1f} sectors per request, and at most {MOST_SECTORS} "
            f"are allowed: the 32 threads of a warp {side} at addresses far apart. Let a program move a tile with both "
            "sides of 16 or more, so that rows are whole sectors on both sides.",
        )
    return (
        f"tried 4 shapes, and counted on an A100, emulated: {counted.global_loads.per_request:.1f} sectors per load, "
        f"{counted.global_stores.per_request:.1f} per store"
    )


def _counted(call):
    """Counters of all launches of `call`; a count was asked for, so without the emulator there is no answer."""
    gpu = without_faults(call)
    if gpu is None:
        raise WrongAnswer(
            "The emulator, which counts, cannot run this: it does not know an instruction of your compiled kernel, or "
            "this version of Triton (3.6 and 3.7 will do)."
        )
    total = gpu.launches[0].counters
    for launch in gpu.launches[1:]:
        total.add(launch.counters)
    return total


# 02.8

SIDE = 32


@triton.jit
def _columns_kernel(x_ptr, out_ptr, SIDE: tl.constexpr, SWIZZLED: tl.constexpr):
    start = tl.program_id(0) * SIDE * SIDE
    place = tl.arange(0, SIDE * SIDE)
    row, column = place // SIDE, place % SIDE
    if SWIZZLED:
        tile = tl.load(x_ptr + start + row * SIDE + (column ^ row))
        tile = tl.gather(tile, column * SIDE + (row ^ column), 0)
    else:
        tile = tl.gather(tl.load(x_ptr + start + place), column * SIDE + row, 0)
    tl.store(out_ptr + start + place, tile)


def _columns(swizzled):
    def transpose_tiles(x, out):
        _columns_kernel[(x.shape[0],)](x, out, SIDE=SIDE, SWIZZLED=swizzled)

    return transpose_tiles


@triton.jit
def _scattered_kernel(x_ptr, out_ptr, SIDE: tl.constexpr, TURNED: tl.constexpr):
    start = tl.program_id(0) * SIDE * SIDE
    column = tl.program_id(1)
    row = tl.arange(0, SIDE)
    tile = tl.load(x_ptr + start + column * SIDE + row)
    tl.store(out_ptr + start + (row * SIDE + column if TURNED else column * SIDE + row), tile)


def _rows_scattered(x, out):
    _scattered_kernel[(x.shape[0], SIDE)](x, out, SIDE=SIDE, TURNED=True)


def _tiles_copied(x, out):
    _scattered_kernel[(x.shape[0], SIDE)](x, out, SIDE=SIDE, TURNED=False)


MOST_WAVEFRONTS = 2


def _check_columns(transpose_tiles):
    for tiles in (1, 5):
        x, out = guarded((tiles, SIDE, SIDE), values=torch.randn(tiles, SIDE, SIDE)), guarded((tiles, SIDE, SIDE))
        launched(
            transpose_tiles, x, out, inputs={"x": x}, outputs={"out": out}, what=f"{tiles} tiles", torch_moves=False
        )
        expect_close(out, x.transpose(1, 2), f"out ({tiles} tiles)", hint="out[t, n, m] = x[t, m, n].")
    counted = _counted(lambda: transpose_tiles(torch.randn(2, SIDE, SIDE), torch.empty(2, SIDE, SIDE)))
    loads, waves = counted.global_loads.per_request, counted.shared.per_request
    expect(
        counted.shared.requests > 0 or max(loads, counted.global_stores.per_request) <= MOST_SECTORS,
        f"Nothing went through shared memory, so global memory pays: {loads:.1f} sectors per load, "
        f"{counted.global_stores.per_request:.1f} per store.",
    )
    expect(
        loads <= MOST_SECTORS and counted.global_stores.per_request <= MOST_SECTORS,
        f"Shared memory is fine, {waves:.1f} wavefronts per request, but global memory is not: {loads:.1f} sectors "
        f"per load, {counted.global_stores.per_request:.1f} per store; at most {MOST_SECTORS}.",
    )
    expect(
        waves <= MOST_WAVEFRONTS,
        f"The result is right, but a request of shared memory takes {waves:.1f} wavefronts, and at most "
        f"{MOST_WAVEFRONTS} are allowed: a column's elements lie 32 words apart, so all in one bank. Let row r keep "
        "its element of column c at place c ^ r: then a column touches every bank once.",
    )
    return (
        f"tried 1 and 5 tiles, and counted on an A100, emulated: {waves:.1f} wavefronts per request of shared memory, "
        f"{loads:.1f} sectors per load"
    )


EXERCISES = {
    "02.7": Exercise(
        title="Sectors: a transposition",
        specification="transpose(x, out): out (N, M) = xᵀ, with at most 16 sectors per load and per store (A100).",
        checker=_check_transpose,
        solution=_transpose(),
        wrong={
            "a program reads a column": (_transpose(128, 1), "sectors per request"),
            "a program reads a row": (_transpose(1, 128), "sectors per request"),
            "only another shape": (_copied, "out[n, m] = x[m, n]"),
        },
        hints=(
            "lessons.profile(kernel, grid, …) shows the sectors of each line.",
            "A program that moves one row stores a column: each element in a sector of its own. Give it a tile.",
            "Load m[:, None] * N + n[None, :], store to n[None, :] * M + m[:, None]: 32 × 32 is a good tile.",
        ),
    ),
    "02.8": Exercise(
        title="Wavefronts: banks",
        specification="transpose_tiles(x, out): out[t] = x[t]ᵀ for x (T, 32, 32), at most 2 wavefronts per request.",
        checker=_check_columns,
        solution=_columns(True),
        wrong={
            "all in one bank": (_columns(False), "all in one bank"),
            "not transposed": (_tiles_copied, "out[t, n, m] = x[t, m, n]"),
            "through global memory": (_rows_scattered, "Nothing went through shared memory"),
        },
        hints=(
            "With place = tl.arange(0, 1024), row = place // 32 and column = place % 32, the lesson's kernel gathers "
            "place column * 32 + row: for the 32 threads of a warp these are 32 words apart.",
            "Which element is loaded to which place is yours to choose: load row * 32 + (column ^ row), and element "
            "(row, column) lies at place row * 32 + (column ^ row).",
            "Then gather column * 32 + (row ^ column).",
        ),
    ),
}
