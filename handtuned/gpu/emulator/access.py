"""Loads and stores: who takes part, what it costs, whether it is allowed.

An `Access` is the flat list of the threads that take part in one memory instruction, with the address of each. Where
all threads of a program share an address it holds one entry per program, and where all programs do, one entry.
"""

import numpy as np

from .counters import sectors, wavefronts
from .fault import KernelFault, Unsupported
from .order import EVERYONE
from .registers import both
from .types import S64, U32, U64, UNSIGNED, type_of


class Access:
    """Threads of a batch that touch memory.

    Attributes:
        program: (n,) index within the batch; `ids`: its number in the grid, EVERYONE if one entry stands for all.
        thread: (n,) number within the program; `warp`: -1 if one entry stands for several warps.
        address: (n,) int64; `nbytes` that each thread moves.
    """

    def __init__(self, batch, i, address, mask, nbytes, whole_programs=False):
        """address: uint, broadcasts to [P, T]. whole_programs: keep one row per program (shared memory)."""
        self.batch, self.i, self.nbytes = batch, i, nbytes
        shape = address.shape if mask is None else np.broadcast_shapes(address.shape, mask.shape)
        if whole_programs:
            shape = (batch.programs, shape[1])
        self.shape = shape
        self.pick = None
        if mask is not None:
            full = np.broadcast_to(mask, shape)
            if not full.all():
                self.pick = full.reshape(-1)
        self.table = np.broadcast_to(address, shape).astype(np.int64)  # [rows, columns]
        self.program, self.thread, self.warp, self.ids = batch.lanes(*shape)
        self.address = self.table.reshape(-1)
        if self.pick is not None:
            chosen = np.flatnonzero(self.pick)
            self.program, self.thread, self.warp, self.ids, self.address = (
                a[chosen] for a in (self.program, self.thread, self.warp, self.ids, self.address)
            )

    def fail(self, kind, detail, bad):
        """Stop, naming the first thread for which `bad` (n,) or (n, k) holds."""
        if bad.ndim == 2:
            bad = bad.any(1)
        k = int(bad.argmax())
        program = self.ids[k] if self.ids[k] != EVERYONE else self.batch.ids[0]
        raise KernelFault(kind, detail, self.i, self.batch.kernel.name, int(program), int(self.thread[k]),
                          int(self.address[k]))  # fmt: skip

    def fail_if(self, kind, detail, bad):
        if bad.any():
            self.fail(kind, detail, bad)

    def gather(self, value):
        """A register's values for these threads, (n,)."""
        value = np.broadcast_to(value, self.shape).reshape(-1)
        return value if self.pick is None else value[self.pick]

    def scatter(self, values):
        """(n,) → an array of the access's shape; what lies outside of the mask is not used."""
        if self.pick is not None:
            full = np.zeros(self.pick.size, values.dtype)
            full[self.pick] = values
            values = full
        return values.reshape(self.shape)

    def count(self, name, pc):
        """Count the requests: `name` says whose ("global_loads", "shared", …)."""
        rows, columns = self.shape
        batch = self.batch
        times = batch.programs // rows * (batch.threads // 32 if columns == 1 else 1)
        table, mask = self.table, None if self.pick is None else self.pick.reshape(self.shape)
        cost = wavefronts if name == "shared" else sectors
        if name == "shared" and mask is None and rows > 1 and (table == table[0]).all():
            table, times = table[:1], times * rows  # programs run alike
        batch.launch.tally.traffic[name][pc] += batch.launch.remembered(cost, table, mask, self.nbytes) * times


class ListedAccess(Access):
    """An access whose entries are given one by one."""

    def __init__(self, batch, i, program, thread, address, nbytes):
        self.batch, self.i, self.nbytes = batch, i, nbytes
        self.program, self.thread, self.warp = program, thread, thread >> 5
        self.ids, self.address = batch.ids[program], address.astype(S64)


def _width(i):
    return type_of(i.op).itemsize


def memory_space(i):
    for part in i.parts[1:]:
        space = part.split("::")[0]
        if space in ("shared", "global", "param"):
            return space
    return None


def address_of(m, where, dtype, i):
    """A function of the values that gives base + offset."""
    base, offset = m.source(where.base, dtype, i), dtype.type(where.offset & ((1 << 8 * dtype.itemsize) - 1))
    return base if offset == 0 else lambda values: base(values) + offset


def _parameter(m, i):
    name, write = i.args[1].base, m.destination(i.args[0])
    wide = UNSIGNED[m.kernel.width(i.args[0])]
    t = type_of(i.op)

    def load(b):
        value = b.launch.parameters[name].view(t)
        if t.itemsize < wide.itemsize:
            value = value.astype(f"{t.kind}{wide.itemsize}")
        write(b, value, b.mask)

    return load


def load(m, pc, i):
    space = memory_space(i)
    if space == "param":
        return _parameter(m, i)
    if space is None:
        raise Unsupported(i, "generic address")
    registers = i.args[0] if isinstance(i.args[0], list) else [i.args[0]]
    width, t = _width(i), type_of(i.op)
    nbytes, shared = width * len(registers), space == "shared"
    address, guard = address_of(m, i.args[1], U32 if shared else U64, i), m.guard(i)
    writes = [m.destination(r) for r in registers]
    # a load of 8 or 16 bits may fill a wider register
    wide = [f"{t.kind if t.kind in 'iu' else 'u'}{max(width, m.kernel.width(r) or 0)}" for r in registers]
    acquires = "acquire" in i.parts

    def run(b):
        mask = both(b.mask, guard(b.values))
        access = Access(b, i, address(b.values), mask, nbytes, whole_programs=shared or acquires)
        if access.address.size == 0:
            return
        if shared:
            offset = b.shared.place(access)
            b.shared.check_read(access, offset)
            got = b.shared.load(access.program, offset, width, len(registers))
        else:
            if acquires:
                b.launch.memory.polls += 1
                b.launch.memory.handovers.note(access, acquires=True, releases=False)
            got = b.launch.memory.load(access, width, len(registers), pc)
        for j, write in enumerate(writes):
            value = got[:, j]
            if value.dtype.itemsize != int(wide[j][1:]):
                value = value.view(t if t.kind in "iu" else value.dtype).astype(wide[j])
            write(b, access.scatter(value), mask)
        access.count("shared" if shared else "global_loads", pc)

    return run


def _check_same(access, written, kept, differ):
    """Threads of one instruction wrote different values to one address of shared memory.

    fp32 sums of the same numbers in another order are let pass: Triton has every thread of a reduction store its own.
    """
    if written.dtype.itemsize == 4:
        a, b = written.view(np.float32), kept.view(np.float32)
        differ = differ & ~(np.abs(a - b) <= 1e-4 * np.abs(a)).all(1)
    access.fail_if("conflicting writes", "threads write different values to one address of shared memory", differ)


def store(m, pc, i):
    space = memory_space(i)
    if space not in ("shared", "global"):
        raise Unsupported(i, "generic address")
    registers = i.args[1] if isinstance(i.args[1], list) else [i.args[1]]
    width, shared = _width(i), space == "shared"
    nbytes = width * len(registers)
    address, guard = address_of(m, i.args[0], U32 if shared else U64, i), m.guard(i)
    reads = [m.source(r, UNSIGNED[width], i) for r in registers]
    release = "release" in i.parts

    def run(b):
        mask = both(b.mask, guard(b.values))
        where = address(b.values)
        values = [read(b.values) for read in reads]
        if where.shape[1] == 1 and any(v.shape[1] > 1 for v in values):  # threads of a warp write to one address
            where = np.broadcast_to(where, (where.shape[0], b.threads))
        if not shared:  # each program writes for itself
            where = np.broadcast_to(where, (b.programs, where.shape[1]))
        access = Access(b, i, where, mask, nbytes, whole_programs=True)
        if access.address.size == 0:
            return
        b.acted[pc] = access
        stacked = np.stack([access.gather(v) for v in values], axis=1)
        if shared:
            offset = b.shared.place(access)
            b.shared.check_write(access, offset)
            differ = b.shared.store(access.program, offset, stacked)
            if differ.any():
                access.address = offset
                _check_same(access, stacked, b.shared.load(access.program, offset, width, len(registers)), differ)
        else:
            b.launch.memory.store(access, stacked, pc)
            if release:
                b.launch.memory.handovers.note(access, acquires=False, releases=True)
        access.count("shared" if shared else "global_stores", pc)

    return run
