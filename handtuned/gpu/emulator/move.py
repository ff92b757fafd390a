"""Moves: between registers, into and out of wider ones, and of what a thread knows about itself."""

import numpy as np

from .fault import Unsupported
from .registers import both
from .types import U32, U64, UNSIGNED, type_of


def _pack(m, i, parts, write, guard):
    """mov.b64 %rd, {%r1, %r2}: the first is the lowest."""
    whole = UNSIGNED[type_of(i.op).itemsize]
    part = UNSIGNED[whole.itemsize // len(parts)]
    reads, bits = [m.source(p, part, i) for p in parts], 8 * part.itemsize

    def join(values):
        value = reads[0](values).astype(whole)
        for j, read in enumerate(reads[1:], 1):
            value = value | (read(values).astype(whole) << whole.type(bits * j))
        return value

    joined = m.tolerant(join)
    return lambda b: write(b, joined(b.values), both(b.mask, guard(b.values)))


def _unpack(m, i, parts, guard):
    whole = UNSIGNED[type_of(i.op).itemsize]
    part = UNSIGNED[whole.itemsize // len(parts)]
    read, bits = m.source(i.args[1], whole, i), 8 * part.itemsize

    def piece(at):
        return m.tolerant(lambda values: (read(values) >> whole.type(at)).astype(part))

    pieces = [(m.destination(name), piece(bits * j)) for j, name in enumerate(parts)]

    def run(b):
        mask = both(b.mask, guard(b.values))
        for write, value in pieces:
            write(b, value(b.values), mask)

    return run


def _u32(value):
    return np.array([[value]], U32)


def _identity(name, threads):
    """A function of a batch: what a special register such as %tid.x holds."""
    register, _, axis = name[1:].partition(".")
    tid = np.arange(threads, dtype=U32)[None]
    axis_index = "xyz".find(axis) if axis else 0
    return {
        "tid": lambda b: tid if axis_index == 0 else _u32(0),
        "laneid": lambda b: tid & U32.type(31),
        "warpid": lambda b: tid >> U32.type(5),
        "ctaid": lambda b: b.coordinates[axis_index],
        "nctaid": lambda b: _u32(b.launch.grid[axis_index]),
        "ntid": lambda b: _u32(threads if axis_index == 0 else 1),
        "cluster_ctarank": lambda b: _u32(0),
        "cluster_ctaid": lambda b: _u32(0),
        "smid": lambda b: b.coordinates[0],
        "clock": lambda b: _u32(b.steps & 0xFFFFFFFF),
        "clock64": lambda b: np.array([[b.steps]], U64),
        "globaltimer": lambda b: np.array([[b.steps]], U64),
    }.get(register)


def move(m, pc, i):
    guard = m.guard(i)
    to, of = i.args
    if isinstance(of, list):
        return _pack(m, i, of, m.destination(to), guard)
    if isinstance(to, list):
        return _unpack(m, i, to, guard)
    write = m.destination(to)
    if isinstance(of, str) and of.startswith("%") and m.kernel.width(of) is None:
        read = _identity(of, m.kernel.threads)
        if read is None:
            raise Unsupported(i, "special register")
        return lambda b: write(b, read(b), both(b.mask, guard(b.values)))
    if m.kernel.width(of) if isinstance(of, str) else None:
        slot = m.slot(of)  # as it is: a result that is still in flight stays so

        def copy(b):
            write(b, b.values[slot], both(b.mask, guard(b.values)))

        return copy
    if of in [name for _, name, _ in m.kernel.params]:  # the address of a parameter: a tensor map
        return lambda b: write(b, b.launch.parameters[of], both(b.mask, guard(b.values)))
    value = m.source(of, type_of(i.op), i)
    return lambda b: write(b, value(b.values), both(b.mask, guard(b.values)))


def convert_address(m, pc, i):
    """cvta: addresses of global memory are the same with and without a name of the memory."""
    read, write, guard = m.source(i.args[1], U64, i), m.destination(i.args[0]), m.guard(i)
    return lambda b: write(b, read(b.values), both(b.mask, guard(b.values)))
