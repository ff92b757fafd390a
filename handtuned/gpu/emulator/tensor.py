"""Tensor cores up to Ampere and Ada: one warp multiplies small matrices that lie in its registers.

`mma.sync.m16n8k16` computes D (16 × 8) = A (16 × 16) · B (16 × 8) + C. No thread holds a matrix; each of the 32 lanes
holds a few elements, and which ones is fixed. With g = lane / 4 and t = lane % 4, for two-byte types:

    A: four registers, each two neighbours of a row: rows g and g + 8, columns 2t, 2t + 1 and the same + 8
    B: two registers: rows 2t, 2t + 1 and the same + 8 of column g
    C and D: fp32, rows g and g + 8, columns 2t and 2t + 1

`ldmatrix` brings 8 × 8 blocks of two-byte elements from shared memory into that layout: lane 8j + i names the row i
of block j (16 bytes), and every lane gets two elements of each block.

Products are summed here in fp32 by numpy; the order within one instruction is not documented by NVIDIA.
"""

import re

import numpy as np

from .access import Access, address_of
from .fault import Unsupported
from .registers import both
from .types import F16, F32, F64, FP8, S32, S64, TYPES, U32, small_floats
from .warp import all_lanes_here

_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")


def per_warp(b, value):
    """A register as [warps, 32]."""
    return np.ascontiguousarray(np.broadcast_to(value, (b.programs, b.threads))).reshape(-1, 32)


def _fragment(registers, kind):
    """Registers [n, 32] → their elements [n, registers, 8 (g), 4 (t), elements of one register]."""
    elements = {"tf32": 1, "f64": 1, "f16": 2, "bf16": 2}.get(kind, 4)
    values = np.stack([_elements(r, kind) for r in registers], axis=1)
    return values.reshape(values.shape[0], len(registers), 8, 4, elements)


def _elements(words, kind):
    if kind in ("s8", "u8"):
        return np.ascontiguousarray(words).view(TYPES[kind]).astype(S32)
    return words if kind == "f64" else small_floats(words, kind)


def matrix_a(registers, kind):
    """[n, 16, K] of registers [n, 32]; they alternate between the upper and the lower 8 rows."""
    f = _fragment(registers, kind)
    n, count, _, _, elements = f.shape
    f = f.reshape(n, max(1, count // 2), min(2, count), 8, 4, elements)
    return f.transpose(0, 2, 3, 1, 4, 5).reshape(n, 8 * min(2, count), -1)


def matrix_b(registers, kind):
    """[n, K, 8]."""
    f = _fragment(registers, kind)
    return f.transpose(0, 1, 3, 4, 2).reshape(f.shape[0], -1, 8)


def _add_clamped(a, b):
    return np.clip(a.astype(S64) + b, -(1 << 31), (1 << 31) - 1).astype(S32)


def alike(kind, kind_b):
    """Whether a tensor core multiplies these types with each other."""
    known = {"f16"}, {"bf16"}, {"tf32"}, {"f64"}, {"s8", "u8"}, {*FP8}
    return any({kind, kind_b} <= kinds for kinds in known)


def multiply(m, pc, i):
    """mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 and its relatives."""
    if i.parts[1] != "sync" or "sp" in i.op or "block_scale" in i.op:
        raise Unsupported(i)
    to, kind, kind_b, of = i.parts[-4:]
    rows, columns, depth = map(int, _SHAPE.search(i.op).groups())
    if not alike(kind, kind_b) or columns != 8:
        raise Unsupported(i)
    packed = to == "f16"  # accumulator of two fp16 in a register
    accumulate = {"f32": F32, "f16": U32, "s32": S32, "f64": F64}[to]
    if of != to or rows != (8 if (kind, depth) == ("f64", 4) and len(i.args[1]) == 1 else 16):
        raise Unsupported(i)
    d, a, b_, c = i.args
    word = F64 if kind == "f64" else U32
    read_a, read_b = [m.source(x, word, i) for x in a], [m.source(x, word, i) for x in b_]
    read_c, writes = [m.source(x, accumulate, i) for x in c], [m.destination(x) for x in d]
    flops, add = 2 * rows * columns * depth, _add_clamped if "satfinite" in i.parts else np.add

    def run(b):
        all_lanes_here(b, i)
        left = matrix_a([per_warp(b, r(b.values)) for r in read_a], kind)
        right = matrix_b([per_warp(b, r(b.values)) for r in read_b], kind_b)
        product = (left @ right).reshape(-1, rows // 8, 8, 4, 2)  # [n, half, g, t, pair]
        old = [per_warp(b, r(b.values)) for r in read_c]
        if packed:
            sums = [product[:, half].reshape(-1, 64) + old[half].view(F16) for half in (0, 1)]
            new = [np.ascontiguousarray(s.astype(F16)).view(U32) for s in sums]
        else:
            new = [add(old[n], product[:, n // 2, :, :, n % 2].reshape(-1, 32)) for n in range(len(old))]
        for write, value in zip(writes, new, strict=True):
            write(b, value.reshape(b.programs, b.threads), b.mask)
        b.launch.tally.flops[pc] += flops * b.active_warps()

    return run


def _rows(b, i, address, blocks, mask):
    """(access, offsets) of the 16-byte rows that the lanes of each warp name, [warps, blocks, 8]."""
    lanes = np.arange(b.threads) % 32 < 8 * blocks
    mask = both(mask, lanes[None]) if blocks < 4 else mask
    where = np.broadcast_to(address, (b.programs, b.threads))
    access = Access(b, i, where, mask, 16, whole_programs=True)
    return access, b.shared.place(access)


def _blocks(i):
    if not {"m8n8", "b16"} <= set(i.parts):
        raise Unsupported(i)
    return int(next(p for p in i.parts if re.fullmatch(r"x\d", p))[1])


def load_matrix(m, pc, i):
    blocks, transposed = _blocks(i), "trans" in i.parts
    address, guard = address_of(m, i.args[1], U32, i), m.guard(i)
    writes = [m.destination(r) for r in i.args[0]]

    def run(b):
        all_lanes_here(b, i)
        mask = both(b.mask, guard(b.values))
        access, offset = _rows(b, i, address(b.values), blocks, mask)
        b.shared.check_read(access, offset)
        matrices = b.shared.load(access.program, offset, 2, 8).reshape(-1, blocks, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(-1, -2)
        words = np.ascontiguousarray(matrices).view(U32)  # [warps, blocks, 8, 4]: lane 4g + t
        for j, write in enumerate(writes):
            write(b, _to_threads(b, words[:, j].reshape(-1, 32), mask), mask)
        access.count("shared", pc)  # a block of 8 rows costs at least one wavefront

    return run


def _to_threads(b, values, mask):
    """[active warps, 32] → [P, T]."""
    if len(values) * 32 == b.programs * b.threads:
        return values.reshape(b.programs, b.threads)
    out = np.zeros((b.programs * b.threads // 32, 32), values.dtype)
    out[np.broadcast_to(mask, (b.programs, b.threads)).reshape(-1, 32)[:, 0]] = values
    return out.reshape(b.programs, b.threads)


def store_matrix(m, pc, i):
    blocks, transposed = _blocks(i), "trans" in i.parts
    address, guard = address_of(m, i.args[0], U32, i), m.guard(i)
    reads = [m.source(r, U32, i) for r in i.args[1]]

    def run(b):
        all_lanes_here(b, i)
        mask = both(b.mask, guard(b.values))
        access, offset = _rows(b, i, address(b.values), blocks, mask)
        words = np.stack([per_warp(b, r(b.values)).reshape(-1, 8, 4) for r in reads], axis=1)
        if mask is not None:
            words = words[np.broadcast_to(mask, (b.programs, b.threads)).reshape(-1, 32)[:, 0]]
        matrices = np.ascontiguousarray(words).view(np.uint16)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(-1, -2))
        b.shared.check_write(access, offset)
        differ = b.shared.store(access.program, offset, matrices.reshape(-1, 8))
        access.fail_if("conflicting writes", "rows of a matrix are written to one address", differ)
        access.count("shared", pc)  # a block of 8 rows costs at least one wavefront

    return run
