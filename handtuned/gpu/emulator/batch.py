"""A batch: programs that run in step, and the threads of them that are somewhere else.

All programs of a launch run the same instructions, mostly on the same path. So they are run together, one numpy
operation for all their threads. Where a branch sends whole programs different ways the batch is split, and each part
goes on by itself. Where it parts threads of one program, the batch follows one path under a mask, and keeps the
others in `elsewhere` until the paths meet again: a real warp does just that, and its other lanes idle.
"""

import numpy as np

from .copies import Groups
from .order import EVERYONE, Order
from .shared import Shared
from .types import U32


class Batch:
    """Programs `ids` of a launch.

    Attributes:
        values: of the registers, one array each.
        pc: index of the next instruction.
        mask: threads that execute it, broadcasts to [P, T]; None: all of them.
        elsewhere: pc → mask of threads that go on there.
        polling: pc → mask of threads that ask an mbarrier again and again.
        at_barrier: barrier → [(pc to go on at, mask)] of threads that wait there.
        arrived: barrier → (P, T) threads that have come to it.
        copies: cp.async; bulk: TMA stores; multiplying: wgmma.
        order: what its warps know of each other.
        local: (P, T, bytes) memory of each thread; arguments: of the call that comes next (see calls.py).
        unfenced: slot → mask of threads that touched this register of wgmma since their last wgmma.fence.
        steps: blocks of instructions run so far.
        acted: index of a store or atomic → its last Access; suspects: for readers.py.
    """

    def __init__(self, launch, ids):
        self.launch, self.kernel, self.ids = launch, launch.kernel, ids
        self.programs, self.threads = len(ids), launch.kernel.threads
        x, y, _ = launch.grid
        self.coordinates = [c[:, None].astype(U32) for c in (ids % x, ids // x % y, ids // (x * y))]
        self.values = list(launch.machine.unwritten)
        self.pc, self.mask, self.elsewhere, self.polling = 0, None, {}, {}
        self.at_barrier, self.arrived = {}, {}
        self.ended = False  # whether some threads have returned
        self.copies, self.bulk, self.multiplying = Groups(), Groups(), Groups()
        size = launch.shared_bytes
        self.order = Order(len(ids), self.threads // 32)
        self.shared = Shared(len(ids), size, launch.machine.shared_piece, self.order) if size else None
        self.mbarriers = {}
        self.local, self.arguments = None, {}
        self.unfenced = dict.fromkeys(launch.machine.wgmma_slots)
        self.steps, self.moved = 0, True
        self.acted, self.suspects = {}, {}
        self._lanes = {}

    def select(self, keep):
        """The part of the batch that holds the programs `keep`."""
        other = object.__new__(Batch)
        other.__dict__ = dict(self.__dict__)
        n = self.programs
        new = np.full(n, -1)
        new[keep] = np.arange(len(keep))

        def part(a):
            if isinstance(a, np.ndarray):
                return a[keep] if a.shape[0] == n and n > 1 else a
            return a if a is None else a.select(keep, new)

        other.programs, other.ids, other._lanes = len(keep), self.ids[keep], {}
        other.coordinates = [c[keep] for c in self.coordinates]
        other.values = [part(a) for a in self.values]
        other.mask, other.local = part(self.mask), part(self.local)
        for name in ("elsewhere", "polling"):
            setattr(other, name, {pc: part(m) for pc, m in getattr(self, name).items()})
        other.at_barrier = {k: [(pc, part(m)) for pc, m in waiting] for k, waiting in self.at_barrier.items()}
        other.arrived = {k: part(m) for k, m in self.arrived.items()}
        for name in ("copies", "bulk", "multiplying"):
            setattr(other, name, getattr(self, name).select(keep, new))
        other.mbarriers = {k: bar.select(keep, new) for k, bar in self.mbarriers.items()}
        other.order = self.order.select(keep)
        if self.shared:
            other.shared = self.shared.select(keep, other.order)
        other.acted, other.suspects = dict(self.acted), {k: list(v) for k, v in self.suspects.items()}
        other.unfenced = {slot: part(m) for slot, m in self.unfenced.items()}
        return other

    def here(self):
        """The mask as a full (P, T) array."""
        return np.broadcast_to(True if self.mask is None else self.mask, (self.programs, self.threads))

    def active_warps(self) -> int:
        if self.mask is None:
            return self.programs * self.threads // 32
        return int(self.here().reshape(-1, 32).any(-1).sum())

    def lanes(self, rows, columns):
        """(program, thread, warp, program's number in the grid) of the entries of a [rows, columns] access, flat."""
        if (rows, columns) not in self._lanes:
            program = np.repeat(np.arange(rows), columns)
            thread = np.tile(np.arange(columns), rows)
            one_for_many = columns == 1 and self.threads > 32
            warp = np.full(rows, -1) if one_for_many else thread >> 5
            ids = np.full(rows * columns, EVERYONE) if rows == 1 and self.programs > 1 else self.ids[program]
            self._lanes[rows, columns] = program, thread, warp, ids
        return self._lanes[rows, columns]

    def state(self):
        """Where its threads are and what they hold; when all that comes again, a change must come from outside."""
        yield from (self.pc, [*self.elsewhere], self.mask, *self.elsewhere.values(), *self.values)
        for memory in (self.local, self.shared and self.shared.data):
            yield None if memory is None else memory.tobytes()

    # where the threads go

    def send(self, pc, mask):
        """Threads in `mask` (P, T) go on at `pc`, when it is their turn."""
        if mask.any():
            self.elsewhere[pc] = self.elsewhere[pc] | mask if pc in self.elsewhere else mask

    def next_path(self) -> bool:
        """Take up the threads with the lowest pc, which the others may be waiting for; False if there are none."""
        if not self.elsewhere:
            return False
        self.pc = min(self.elsewhere)
        self.mask = self.elsewhere.pop(self.pc)
        if not (self.elsewhere or self.polling or self.at_barrier or self.ended) and self.mask.all():
            self.mask = None
        return True

    def go(self, pc) -> bool:
        """All threads that are here go on at `pc`."""
        if self.mask is None:
            self.pc = pc
            return True
        self.send(pc, self.here())
        return self.next_path()
