"""Small Triton kernels with a mistake in each; where WRONG is False it is mended.

The line of a mistake ends in a comment that begins with the word planted.
"""

import triton
import triton.language as tl


@triton.jit
def load_outside(x_ptr, y_ptr, n, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    """y = 2 x, with the last block read whole."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    if WRONG:
        x = tl.load(x_ptr + offs)  # planted
    else:
        x = tl.load(x_ptr + offs, mask=inside)
    tl.store(y_ptr + offs, 2 * x, mask=inside)


@triton.jit
def store_outside(x_ptr, y_ptr, n, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    """y = 2 x, with the last block written whole."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(y_ptr + offs, 2 * x, mask=(offs < n) | WRONG)  # planted


@triton.jit
def look_up(codes_ptr, table_ptr, y_ptr, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    """y = table[codes]: the table of 256 stands in shared memory, the codes are trusted."""
    offs = tl.arange(0, BLOCK)
    codes = tl.load(codes_ptr + offs)
    if not WRONG:
        codes = codes & 255
    table = tl.load(table_ptr + tl.arange(0, 256))
    tl.store(y_ptr + offs, tl.gather(table, codes, 0))  # planted


@triton.jit
def add_to(x_ptr, sums_ptr, BLOCK: tl.constexpr):
    """sums += x; the sums may not have been set to zero."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(sums_ptr + offs)  # planted
    tl.store(sums_ptr + offs, before + tl.load(x_ptr + offs))


@triton.jit
def row_sum(x_ptr, sums_ptr, BLOCK: tl.constexpr):
    """The sum of each row: warps add what each has through shared memory, with barriers around."""
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    total = tl.sum(x, axis=0)  # planted
    tl.store(sums_ptr + tl.program_id(0), total)


@triton.jit
def multiply(a_ptr, b_ptr, c_ptr, K, BLOCK_K: tl.constexpr, TILE: tl.constexpr):
    """c (TILE, TILE) = a (TILE, K) b (K, TILE), the next tiles fetched while these are multiplied."""
    m, k = tl.arange(0, TILE), tl.arange(0, BLOCK_K)
    acc = tl.zeros([TILE, TILE], tl.float32)
    for done in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + done + k[None, :])
        b = tl.load(b_ptr + (done + k)[:, None] * TILE + m[None, :])
        acc = tl.dot(a, b, acc)  # planted
    tl.store(c_ptr + m[:, None] * TILE + m[None, :], acc)


@triton.jit
def copy_tile(x_ptr, y_ptr, N, TILE: tl.constexpr):
    """y (TILE, N) = x, tile by tile, by descriptors (TMA from sm_90 on)."""
    x = tl.make_tensor_descriptor(x_ptr, [TILE, N], [N, 1], [TILE, TILE])
    offs = tl.arange(0, TILE)
    for n in range(0, N, TILE):
        tile = x.load([0, n])  # planted
        tl.store(y_ptr + offs[:, None] * N + n + offs[None, :], tile)


@triton.jit
def promise_alignment(x_ptr, start_ptr, y_ptr, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    """y = x from a place on that stands in memory, with a promise that it is a multiple of 4 elements."""
    start = tl.load(start_ptr)
    if WRONG:
        start = tl.multiple_of(start, 4)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + start + offs)  # planted
    tl.store(y_ptr + offs, x)


@triton.jit
def everyone_to_one(y_ptr, WRONG: tl.constexpr):
    """Each program writes its number: to a place of its own, or all to one."""
    tl.store(y_ptr + (0 if WRONG else tl.program_id(0)), tl.program_id(0))  # planted


@triton.jit
def read_a_neighbour(x_ptr, WRONG: tl.constexpr):
    """Each program writes x[i] and reads what the next one may or may not have written by then."""
    i = tl.program_id(0)
    tl.store(x_ptr + i, i)
    tl.debug_barrier()
    there = i + 1 if WRONG else i
    tl.store(x_ptr + 64 + i, tl.load(x_ptr + there % tl.num_programs(0)))  # planted


@triton.jit
def push_along(x_ptr, WRONG: tl.constexpr):
    """Each program reads its value and writes one more over it, or over the next one's, which may be read later."""
    i = tl.program_id(0)
    value = tl.load(x_ptr + i)
    tl.store(x_ptr + (i + 1 if WRONG else i), value + 1)  # planted


@triton.jit
def read_then_write(x_ptr, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    """A row moves one place to the left: every warp overwrites what another one reads."""
    row, offs = x_ptr + tl.program_id(0) * BLOCK, tl.arange(0, BLOCK)
    x = tl.load(row + (offs + 1) % BLOCK)
    if not WRONG:
        tl.debug_barrier()
    tl.store(row + offs, x)  # planted


@triton.jit
def write_then_read(x_ptr, y_ptr, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    """x = 2 x, and y gets it, one place to the left: every warp reads what another one wrote."""
    first, offs = tl.program_id(0) * BLOCK, tl.arange(0, BLOCK)
    tl.store(x_ptr + first + offs, 2 * tl.load(x_ptr + first + offs))
    if not WRONG:
        tl.debug_barrier()
    x = tl.load(x_ptr + first + (offs + 1) % BLOCK)  # planted
    tl.store(y_ptr + first + offs, x)


@triton.jit
def write_then_write(x_ptr, y_ptr, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    """y = x, then 2 x, one place to the left: every warp overwrites what another one wrote."""
    row, offs = y_ptr + tl.program_id(0) * BLOCK, tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + offs)
    tl.store(row + offs, x)
    if not WRONG:
        tl.debug_barrier()
    tl.store(row + (offs + BLOCK - 1) % BLOCK, 2 * x)  # planted


@triton.jit
def spread_and_count(count_ptr, y_ptr, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    """Every thread loads a count and writes it into a row; one adds 1 to it, which others may find there."""
    i, offs = tl.program_id(0), tl.arange(0, BLOCK)
    count = tl.load(count_ptr + i)
    tl.store(y_ptr + i * BLOCK + offs, count)
    if not WRONG:
        tl.debug_barrier()
    tl.store(count_ptr + i, count + 1)  # planted


@triton.jit
def count_in_place(count_ptr, few_ptr):
    """Counts go up by 1: of every count each warp has a copy, and none but the one that writes uses its own."""
    i, few = tl.program_id(0), tl.arange(0, 16)
    tl.store(count_ptr + i, tl.load(count_ptr + i) + 1)
    x = tl.load(few_ptr + i * 16 + few)
    tl.store(few_ptr + i * 16 + few, x + tl.sum(x, axis=0))


@triton.jit
def count_behind_a_lock(lock_ptr, count_ptr, WRONG: tl.constexpr):
    """count += 1 by every program; one that takes the lock and keeps it leaves the others waiting."""
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:  # planted
        pass
    tl.store(count_ptr, tl.load(count_ptr) + 1)
    if not WRONG:
        tl.debug_barrier()
        tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def wait_by_loads(flags_ptr, y_ptr, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    """y = 1, when another program has raised a flag; only atomics are known to be questions."""
    if tl.program_id(0) == 0:
        while tl.load(flags_ptr, volatile=True) == 0:  # planted
            pass
        tl.store(y_ptr, 1)
    elif not WRONG:
        tl.atomic_xchg(flags_ptr, 1)


@triton.jit
def wait_and_count(flags_ptr, y_ptr, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    """y = 1, when a flag is up; a loop within a loop, and a store in each round that changes nothing."""
    up = 0
    while up == 0:
        tl.store(y_ptr + 1, 1)
        for i in range(3):
            raised = tl.load(flags_ptr + i * BLOCK + tl.arange(0, BLOCK))
            up += tl.max(raised, 0) + (0 if WRONG else 1)  # planted
    tl.store(y_ptr, 1)
