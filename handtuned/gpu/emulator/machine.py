"""A kernel made ready to run: every instruction translated into a function of a batch, once, whatever the launch.

HANDLERS says which module knows which instructions; everything else is arithmetic (alu.py). To add an instruction:
give it a handler (or an entry in alu.py), and a test against torch in tests/test_emulator_*.py.
"""

from dataclasses import dataclass

import numpy as np

from . import access, alu, atomics, calls, carry, copies, mbarrier, move, schedule, tensor, tma, warp, wgmma
from .batch import Batch
from .counters import Tally
from .fault import Unsupported
from .memory import Global
from .parse import Kernel
from .registers import Registers, both
from .types import U64, type_of

_THREADS = 8192  # that run together: enough for numpy to be worth its calls, few enough to stay in the cache


def _nothing(m, pc, i):
    return lambda b: None


def _store(m, pc, i):
    if i.parts[1] in ("param", "local"):
        return (calls.set_parameter if i.parts[1] == "param" else calls.store_local)(m, i)
    return access.store(m, pc, i)


def _load(m, pc, i):
    return calls.load_local(m, i) if i.parts[1] == "local" else access.load(m, pc, i)


def _cache_policy(m, pc, i):
    """createpolicy: how long the L2 should keep something; there is none here."""
    write, guard = m.destination(i.args[0]), m.guard(i)
    return lambda b: write(b, np.zeros((1, 1), U64), both(b.mask, guard(b.values)))


HANDLERS = {
    "ld": _load, "st": _store, "atom": atomics.atomic, "red": atomics.atomic, "cp": copies.copy,
    "mov": move.move, "cvta": move.convert_address, "call": calls.call,
    "createpolicy": _cache_policy, "addc": carry.carry, "subc": carry.carry, "madc": carry.carry,
    "shfl": warp.shuffle, "redux": warp.reduce, "vote": warp.vote, "elect": warp.elect, "activemask": warp.active,
    "match": warp.match, "mma": tensor.multiply, "ldmatrix": tensor.load_matrix, "stmatrix": tensor.store_matrix,
    "wgmma": wgmma.wgmma, "mbarrier": mbarrier.mbarrier, "tensormap": tma.tensormap, "fence": tma.fence,
    "membar": _nothing, "bar": _nothing, "barrier": _nothing, "prefetch": _nothing, "griddepcontrol": _nothing,
    "setmaxnreg": _nothing, "pragma": _nothing, "nanosleep": _nothing, "discard": _nothing, "applypriority": _nothing,
}  # fmt: skip


def _compare_halves(m, i, operation, targets, operands):
    """setp.lt.f16x2 p|q: a predicate of each half."""
    if i.parts[0] != "setp" or not i.op.endswith("x2"):
        raise Unsupported(i, "two results")
    reads = [m.source(operand, t, i) for operand, t in zip(operands, operation.sources, strict=True)]
    writes, guard = [m.destination(target) for target in targets], m.guard(i)

    def run(b):
        mask, halves = both(b.mask, guard(b.values)), operation.function(*[read(b.values) for read in reads])
        for half, write in enumerate(writes):
            write(b, halves[:, half::2], mask)

    return run


def _arithmetic(m, pc, i):
    if "cc" in i.parts:
        return carry.carry(m, pc, i)
    operation = alu.find(i.op, len(i.args) - 1)
    if operation is None or isinstance(i.args[0], list):
        raise Unsupported(i)
    target, *operands = i.args
    if isinstance(target, tuple):
        return _compare_halves(m, i, operation, target, operands)
    if len(operands) != len(operation.sources):
        raise Unsupported(i, "number of operands")
    reads = [m.source(operand, t, i) for operand, t in zip(operands, operation.sources, strict=True)]
    write, guard, slot, function = m.destination(target), m.guard(i), m.slot(target), operation.function
    width, t = m.kernel.width(target), operation.destination
    if t.kind in "iu" and width and t.itemsize < width:  # a register of more bits gets the sign, or zeros, in front
        inner = function
        function = lambda *args: inner(*args).astype(f"{t.kind}{width}")  # noqa: E731
    always = i.guard is None
    if len(reads) == 1:
        (first,) = reads
        compute = lambda values: function(first(values))  # noqa: E731
    elif len(reads) == 2:
        first, second = reads
        compute = lambda values: function(first(values), second(values))  # noqa: E731
    else:
        compute = lambda values: function(*[read(values) for read in reads])  # noqa: E731

    compute = m.tolerant(compute)

    def run(b):
        values = b.values
        result = compute(values)
        if always and b.mask is None:
            values[slot] = result
        else:
            write(b, result, both(b.mask, guard(values)))

    return run


@dataclass
class Block:
    """Instructions from a label (or branch) to the next: `steps`, then `end` decides, or `after` follows."""

    steps: list
    end: object
    after: int


def _access_bytes(i, spaces):
    """Bytes that one thread moves, if the instruction touches one of these memories; None."""
    if i.parts[0] not in ("ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix") or "bulk" in i.parts:
        return None
    if not any(part.split("::")[0] in spaces for part in i.parts[1:]):
        return None
    if i.parts[0] == "cp":
        return i.args[2] if len(i.args) > 2 else None
    if "matrix" in i.parts[0]:
        return 16
    count = next((int(p[1:]) for p in i.parts if p in ("v2", "v4", "v8")), 1)
    return type_of(i.op).itemsize * count


class Machine(Registers):
    """One compiled kernel.

    Args:
        copies_need_fence: what cp.async brought is seen by wgmma and TMA only after a fence, as PTX has it.

    Attributes:
        blocks: by the index of their first instruction.
        unwritten: what registers hold at first; `wgmma_registers`, `wgmma_slots`: those that wgmma works on.
        shared_piece, global_piece: bytes of memory that are watched as one.
        executes: False if it uses Blackwell's tensor cores (tcgen05), which are not emulated.
    """

    def __init__(self, kernel: Kernel, copies_need_fence: bool = True):
        super().__init__(kernel)
        self.copies_need_fence = copies_need_fence
        self.shared_piece = min([16, *filter(None, (_access_bytes(i, ("shared",)) for i in kernel.code))])
        writes = [i for i in kernel.code if i.parts[0] != "ld"]
        self.global_piece = min([16, *filter(None, (_access_bytes(i, ("global",)) for i in writes))])
        if any(i.parts[0] == "mbarrier" for i in kernel.code):
            self.shared_piece = min(8, self.shared_piece)
        self.wgmma_registers = wgmma.registers_of(kernel.code)
        self.executes = not any(i.parts[0] == "tcgen05" for i in kernel.code)
        self.wgmma_slots = [self.slot(name) for name in self.wgmma_registers]
        self.blocks = self._blocks()
        self.unwritten = self.fresh()

    def _translate(self, pc, i, how=None):
        """An unknown instruction stops the launch only where it is reached."""
        try:
            return (how or HANDLERS.get(i.parts[0], _arithmetic))(self, pc, i)
        except Unsupported as error:
            stop = error
        except (KeyError, StopIteration, ValueError, TypeError, AttributeError, IndexError) as error:
            stop = Unsupported(i, repr(error))

        def unknown(b):
            raise stop

        return unknown

    def _blocks(self):
        code = self.kernel.code
        starts = {0, *self.kernel.labels.values()}
        starts |= {pc + 1 for pc, i in enumerate(code) if schedule.ends_block(i)}
        starts = sorted(s for s in starts if s < len(code))
        blocks = {}
        for start, after in zip(starts, [*starts[1:], len(code)], strict=True):
            last = code[after - 1]
            ends = schedule.ends_block(last)
            steps = [wgmma.touching(self, code[pc], self._translate(pc, code[pc])) for pc in range(start, after - ends)]
            end = self._translate(after - 1, last, schedule.terminator) if ends else None
            blocks[start] = Block(steps, end, after)
        return blocks


class Launch:
    """One run of a kernel over a grid.

    Args:
        machine: the kernel.
        parameters: name → array (1, 1) of its bits, unsigned.
        grid: programs in x, y, z.
        memory: what it may touch.
        shared_bytes: of a program.
    """

    def __init__(self, machine: Machine, parameters: dict, grid, memory: Global, shared_bytes: int):
        self.machine, self.kernel, self.parameters, self.grid = machine, machine.kernel, parameters, grid
        self.memory, self.shared_bytes = memory, shared_bytes
        memory.include([*machine.tables.values()])
        self.tally, self.block_runs, self._costs = Tally(machine.kernel), {}, {}

    def remembered(self, cost, table, mask, nbytes):
        """cost(table, mask, nbytes) of an access pattern; small patterns are met again and again."""
        if table.size > 1024:
            return cost(table, mask, nbytes)
        key = (cost, nbytes, table.tobytes(), None if mask is None else mask.tobytes())
        if key not in self._costs:
            self._costs[key] = cost(table, mask, nbytes)
        return self._costs[key]

    def count_statically(self):
        """Counters of every instruction once, for each warp of each program, without running any."""
        self.tally.issued[:] = int(np.prod(self.grid)) * self.kernel.threads // 32
        return self.tally.counters(self.memory.dram(len(self.kernel.code)))

    def run(self, ids):
        """Execute the programs `ids`; gives the Counters."""
        together = max(1, _THREADS // self.kernel.threads)
        batches = (Batch(self, ids[first : first + together]) for first in range(0, len(ids), together))
        with np.errstate(all="ignore"):
            schedule.run_all(batches, self.machine, self.memory)
        for start, runs in self.block_runs.items():
            self.tally.issued[start : self.machine.blocks[start].after] += runs
        return self.tally.counters(self.memory.dram(len(self.kernel.code)))
