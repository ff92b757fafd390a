"""Tensor cores of Hopper: four warps (a warpgroup) multiply a 64-row matrix by one of up to 256 columns.

`wgmma.mma_async.m64n128k16` computes D (64 × N, in registers) = A (64 × K) · B (K × N) + D. B, and mostly A, are read
straight from shared memory, described by 64 bits: where the matrix starts, how far apart its 8-row blocks lie, how it
is swizzled. A swizzle permutes the 16-byte chunks of a row by the row's number, so that reading a column of chunks
touches all banks.

It runs asynchronously. `commit_group` closes what was issued; `wait_group n` waits until n groups are left. Until then
neither may D be read nor the shared memory be overwritten: D is kept aside as `InFlight` here, and its reader told.
`wgmma.fence` stands between other instructions that touch registers of D, or of A, and the wgmma that uses them.
"""

import re
from dataclasses import dataclass

import numpy as np

from .access import ListedAccess
from .copies import Transfer
from .fault import KernelFault, Unsupported
from .registers import Undefined
from .tensor import alike, matrix_a, per_warp
from .types import F16, F32, PRED, S32, U32, U64, small_floats

_SHAPE = re.compile(r"m64n(\d+)k(\d+)")
_SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a descriptor → bytes of a row that are permuted
_CHUNK = 16


class InFlight:
    """A register that a wgmma which nobody has waited for will write."""

    def __init__(self, value, group, instruction, kernel, ids):
        self.value, self.group, self.instruction, self.kernel, self.ids = value, group, instruction, kernel, ids

    @property
    def dtype(self):
        raise KernelFault("not arrived", "the result of a wgmma is read before it was waited for", self.instruction,
                          self.kernel, int(self.ids[0]), 0)  # fmt: skip

    view = shape = dtype

    def select(self, keep, new):
        return InFlight(self.value[keep], self.group, self.instruction, self.kernel, self.ids[keep])


def swizzled(offset, span):
    """Byte offsets with the chunk index (bits 4 to 6) XORed by the row index (bits 7 to 9), as far as `span` allows."""
    bits = {0: 0, 32: 1, 64: 3, 128: 7}[span]
    return offset ^ (((offset >> 7) & bits) << 4)


@dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory, as 64 bits describe it; all in bytes."""

    start: int
    leading: int
    stride: int
    span: int

    @classmethod
    def of(cls, bits: int):
        field = [((bits >> at) & 0x3FFF) << 4 for at in (0, 16, 32)]
        return cls(*field, _SWIZZLE[bits >> 62 & 3])

    def chunks(self, outer: int, depth: int, itemsize: int, transposed: bool):
        """Addresses of the 16-byte chunks, flat.

        outer is M or N. Not transposed ("K-major"): a chunk runs along K. Blocks of 8 rows, each row `span` bytes, lie
        `stride` apart. Transposed: a chunk runs along outer, a block is `span` bytes of outer by 8 of K; blocks
        lie `leading` apart along outer and `stride` along K.
        """
        per = _CHUNK // itemsize
        if not transposed:
            o, c = np.arange(outer)[:, None], np.arange(depth // per)[None]
            step = self.leading if self.span == 0 else _CHUNK
            at = o // 8 * self.stride + o % 8 * (self.span or _CHUNK) + c * step
        else:
            c, k = np.arange(outer // per)[:, None], np.arange(depth)[None]
            row = self.span or _CHUNK
            in_block = row // _CHUNK
            at = c // in_block * self.leading + c % in_block * _CHUNK + k // 8 * self.stride + k % 8 * row
        return swizzled(self.start + at, self.span).reshape(-1)


class _Operand:
    """Reads [P, warpgroups, outer, depth] fp32 of an operand in shared memory, with all checks."""

    def __init__(self, i, read, outer, depth, kind, transposed):
        self.i, self.read, self.outer, self.depth, self.kind, self.transposed = i, read, outer, depth, kind, transposed
        self.known = {}

    def _chunks(self, bits):
        if bits not in self.known:
            nbytes = {"tf32": 4, "f16": 2, "bf16": 2}.get(self.kind, 1)
            self.known[bits] = Descriptor.of(bits).chunks(self.outer, self.depth, nbytes, self.transposed)
        return self.known[bits]

    def values(self, b, groups):
        """`groups` (P, warpgroups) bool: those that take part."""
        bits = np.broadcast_to(self.read(b.values), (b.programs, b.threads)).reshape(b.programs, -1, 128)
        if (bits != bits[:, :, :1]).any():
            raise Unsupported(self.i, "a descriptor that differs within a warpgroup")
        at = np.argwhere(groups)
        chunks = np.stack([self._chunks(int(bits[p, g, 0])) for p, g in at])  # [n, chunks]
        n, each = chunks.shape
        program, thread = np.repeat(at[:, 0], each), np.repeat(at[:, 1] * 128, each)
        access = ListedAccess(b, self.i, program, thread, chunks.reshape(-1), _CHUNK)
        offset = b.shared.place(access)
        pieces = b.shared.pieces(program, offset, _CHUNK)
        b.shared.check_async_read(access, offset, pieces, "wgmma")
        local = pieces - (program * b.shared.writer.shape[1])[:, None]
        b.multiplying.add(Transfer(program, thread, offset, pieces=local))
        words = b.shared.load(program, offset, 4, 4)  # [n · chunks, 4]
        out = np.zeros((b.programs, groups.shape[1], self.outer, self.depth), F32)
        out[at[:, 0], at[:, 1]] = self._matrix(small_floats(words, self.kind).reshape(n, each, -1))
        return out

    def _matrix(self, chunks):
        n, _, per = chunks.shape
        if not self.transposed:
            return chunks.reshape(n, self.outer, self.depth)
        return chunks.reshape(n, self.outer // per, self.depth, per).swapaxes(2, 3).reshape(n, self.outer, self.depth)


def _wait(most):
    def run(b):
        for t in b.multiplying.wait(b.mask, most, (b.programs, b.threads)):
            pieces = t.pieces + (t.program * b.shared.writer.shape[1])[:, None]
            b.shared.finish_async_read(t.program, pieces, (0b1111 << (t.thread >> 5))[:, None])
        going_on = {b.multiplying.committed, *(number for *_, number in b.multiplying.closed)}
        for slot, value in enumerate(b.values):
            if type(value) is InFlight and value.group not in going_on:
                b.values[slot] = value.value

    return run


def registers_of(code):
    """Names of the registers that wgmma works on asynchronously: D, and A where it is in registers."""
    multiplies = [i for i in code if i.op.startswith("wgmma.mma_async")]
    return {name for i in multiplies for group in i.args[:2] if isinstance(group, list) for name in group}


def _names(operand):
    if isinstance(operand, list | tuple):
        return {name for part in operand for name in _names(part)}
    return {operand} if isinstance(operand, str) else set()


def touching(m, i, step):
    """A step that notes, beside what `step` does, which registers of wgmma an ordinary instruction touches.

    A `mov` does not count: LLVM writes copies after the fence too, which ptxas leaves away.
    """
    slots = [m.slot(name) for name in _names(i.args) & m.wgmma_registers]
    if not slots or i.parts[0] in ("wgmma", "mov"):
        return step

    def run(b):
        step(b)
        for slot in slots:
            before = b.unfenced.get(slot, b.mask)
            b.unfenced[slot] = None if before is None or b.mask is None else before | b.mask

    return run


def _fence(b):
    if b.mask is None:
        b.unfenced = {}
        return
    here = b.here()
    rest = {slot: ~here if mask is None else mask & ~here for slot, mask in b.unfenced.items()}
    b.unfenced = {slot: mask for slot, mask in rest.items() if mask.any()}


def _check_fenced(b, i, slots):
    for slot in slots:
        if slot in b.unfenced:
            bad = b.here() if b.unfenced[slot] is None else b.here() & b.unfenced[slot]
            if bad.any():
                program, thread = np.argwhere(bad)[0]
                raise KernelFault("not arrived", "wgmma uses a register that was touched with no wgmma.fence since", i,
                                  b.kernel.name, int(b.ids[program]), int(thread))  # fmt: skip


def wgmma(m, pc, i):
    if "fence" in i.parts:
        return _fence
    if "commit_group" in i.parts:
        return lambda b: b.multiplying.commit(b.mask, (b.programs, b.threads))
    if "wait_group" in i.parts:
        return _wait(i.args[0])
    if "sp" in i.parts:
        raise Unsupported(i)
    return _multiply(m, pc, i)


def _multiply(m, pc, i):
    columns, depth = map(int, _SHAPE.search(i.op).groups())
    to, kind, kind_b = i.parts[-3:]
    if not alike(kind, kind_b) or to not in ("f32", "f16", "s32"):
        raise Unsupported(i)
    d, a, b_, scale_d, *rest = i.args
    from_registers = isinstance(a, list)
    if tuple(rest[:2]) not in ((), (1, 1)) or "satfinite" in i.parts:
        raise Unsupported(i, "negated operands")
    flags = rest[2:]
    transposed_b = bool(flags[-1]) if flags else False
    transposed_a = bool(flags[0]) if flags and not from_registers else False
    slots, use_old = [m.slot(name) for name in d], m.source(scale_d, PRED, i)
    right = _Operand(i, m.source(b_, U64, i), columns, depth, kind_b, transposed_b)
    own = slots + [m.slot(x) for x in a] if from_registers else slots
    if from_registers:
        read_a = [m.source(x, U32, i) for x in a]
    else:
        left = _Operand(i, m.source(a, U64, i), 64, depth, kind, transposed_a)
    flops = 2 * 64 * columns * depth

    def run(b):
        here = b.here().reshape(b.programs, -1, 128)
        groups = here.all(-1)
        if (groups != here.any(-1)).any():
            raise Unsupported(i, "threads of a warpgroup are elsewhere")
        if b.unfenced:
            _check_fenced(b, i, own)
        B = right.values(b, groups)
        if from_registers:
            A = matrix_a([per_warp(b, read(b.values)) for read in read_a], kind).reshape(b.programs, -1, 64, depth)
        else:
            A = left.values(b, groups)
        product = (A @ B.swapaxes(-1, -2)).astype(S32 if to == "s32" else F32)
        product = product.reshape(b.programs, -1, 4, 2, 8, columns // 8, 4, 2)
        use = np.broadcast_to(use_old(b.values), (b.programs, b.threads))
        accumulate = True if use.all() else use if use.any() else None
        for n, slot in enumerate(slots):
            new = _register(product, n, to)
            b.values[slot] = _updated(b, b.values[slot], new, accumulate, i)
        b.launch.tally.flops[pc] += flops * int(groups.sum())

    return run


def _register(product, n, to):
    """[P, T] of the n-th result register; product [P, warpgroups, warp, half, g, block, t, pair]."""
    programs = product.shape[0]
    if to != "f16":  # registers: block, half, pair
        value = product[:, :, :, n // 2 % 2, :, n // 4, :, n % 2]
        return np.ascontiguousarray(value).reshape(programs, -1)
    value = product[:, :, :, n % 2, :, n // 2]  # two neighbours in one register
    return np.ascontiguousarray(value).reshape(programs, -1)


def _updated(b, old, new, accumulate, i):
    """What the register will hold: `new`, with the old value added where `accumulate`; in flight from now on."""
    if type(old) is InFlight:
        old = old.value
    elif accumulate is None and isinstance(old, Undefined):
        old = old.one
    two = new.shape[1] == 2 * b.threads
    if accumulate is not None:
        before = np.ascontiguousarray(np.broadcast_to(old.view(U32), (b.programs, b.threads)))
        before = before.view(F16 if two else new.dtype)
        use = accumulate if accumulate is True else np.repeat(accumulate, 2, 1) if two else accumulate
        new = np.where(use, before + new, new)
    value = np.ascontiguousarray(new.astype(F16)).view(U32) if two else new
    if b.mask is not None:
        value = np.where(b.mask, value.view(U32), np.broadcast_to(old, value.shape).view(U32)).view(value.dtype)
    return InFlight(value, b.multiplying.committed, i, b.kernel.name, b.ids)
