"""cp.async: from global to shared memory without a stop in a register.

The copy runs on its own. A thread closes what it has issued into a group (`commit_group`) and later waits until at
most n groups of its own are under way (`wait_group n`): so the next tiles are fetched while this one is multiplied.
Only the wait makes the bytes be there, and only for the thread that waits; a barrier then tells the others. Here they
arrive at the wait, not earlier: whoever reads without one finds what was there before, and is told.
"""

from dataclasses import dataclass

import numpy as np

from .access import Access, address_of
from .fault import Unsupported
from .registers import both
from .types import S64, U32, U64


@dataclass
class Transfer:
    """An asynchronous copy or read that is under way; entry by entry, with the program and thread that issued it.

    Attributes:
        offset: (n,) in shared memory.
        data: (n, words) to be delivered; None if it only reads.
        pieces: (n, k) index of the pieces within the program; None for a delivery.
    """

    program: np.ndarray
    thread: np.ndarray
    offset: np.ndarray
    data: np.ndarray | None = None
    pieces: np.ndarray | None = None

    def pick(self, keep):
        return Transfer(self.program[keep], self.thread[keep], self.offset[keep],
                        None if self.data is None else self.data[keep],
                        None if self.pieces is None else self.pieces[keep])  # fmt: skip

    def select(self, new):
        """For a part of the batch: `new` gives each program's new index, -1 for one that is not in it."""
        part = self.pick(new[self.program] >= 0)
        part.program = new[part.program]
        return part


class Groups:
    """Transfers in the order of their commits, for each thread its own."""

    def __init__(self):
        self.open, self.closed = [], []  # transfers; (mask or None, transfers, number)
        self.committed = 0

    def add(self, transfer: Transfer):
        self.open.append(transfer)

    def commit(self, mask, shape):
        """Close a group of what the threads in `mask` have issued; what others have stays open."""
        mine, others = self.open, []
        if mask is not None:
            here = np.broadcast_to(mask, shape)
            ours = [here[t.program, t.thread] for t in self.open]
            mine, others = ([t.pick(own == wanted) for t, own in zip(self.open, ours, strict=True)
                             if (own == wanted).any()] for wanted in (True, False))  # fmt: skip
        self.closed.append((mask, mine, self.committed))
        self.open, self.committed = others, self.committed + 1

    def wait(self, mask, most: int, shape):
        """Take out the transfers that are done when threads in `mask` have at most `most` groups left."""
        if mask is None and all(m is None for m, *_ in self.closed):
            done = self.closed[: max(0, len(self.closed) - most)]
            self.closed = self.closed[len(done) :]
            return [transfer for _, transfers, _ in done for transfer in transfers]
        mask = np.broadcast_to(True if mask is None else mask, shape)
        later, out, kept = np.zeros(shape, S64), [], []
        for members, transfers, number in reversed(self.closed):
            members = np.broadcast_to(True if members is None else members, shape)
            over = mask & members & (later >= most)
            out += [t.pick(over[t.program, t.thread]) for t in transfers]
            rest = members & ~over
            if rest.any():
                kept.append((rest, [t.pick(rest[t.program, t.thread]) for t in transfers], number))
            later += members
        self.closed = kept[::-1]
        return out

    def select(self, keep, new):
        other = Groups()
        other.committed = self.committed
        other.open = [t.select(new) for t in self.open]
        other.closed = [(m[keep] if m is not None and m.shape[0] > 1 else m, [t.select(new) for t in transfers], number)
                        for m, transfers, number in self.closed]  # fmt: skip
        return other


def copy(m, pc, i):
    """cp.async and its groups."""
    parts = i.parts
    if parts[1] != "async" or "bulk" in parts or "mbarrier" in parts:
        from .tma import bulk

        return bulk(m, pc, i)
    if "commit_group" in parts:
        return lambda b: b.copies.commit(b.mask, (b.programs, b.threads))
    if "wait_group" in parts:
        return lambda b: _arrive(b, b.copies.wait(b.mask, i.args[0], (b.programs, b.threads)))
    if "wait_all" in parts:
        return _wait_for_all
    return _issue(m, pc, i)


def _wait_for_all(b):
    """Of copies without a commit, too."""
    b.copies.commit(b.mask, (b.programs, b.threads))
    _arrive(b, b.copies.wait(b.mask, 0, (b.programs, b.threads)))


def _arrive(b, transfers):
    for t in transfers:
        b.shared.store(t.program, t.offset, t.data)
        fenced = not b.launch.machine.copies_need_fence
        b.shared.arrive(t.program, t.offset, t.data.shape[1] * 4, t.thread >> 5, fenced)


def _issue(m, pc, i):
    to, of, size = i.args[:3]
    rest = [r for r in i.args[3:] if not (isinstance(r, str) and m.kernel.width(r) == 8)]  # without a cache policy
    if not isinstance(size, int) or len(rest) > 1:
        raise Unsupported(i)
    target, source, guard = address_of(m, to, U32, i), address_of(m, of, U64, i), m.guard(i)
    given = m.source(rest[0], U32, i) if rest else None  # bytes that are copied; the rest becomes zero

    def run(b):
        mask = both(b.mask, guard(b.values))
        where = np.broadcast_to(target(b.values), (b.programs, b.threads))
        into = Access(b, i, where, mask, size, whole_programs=True)
        if into.address.size == 0:
            return
        data = np.zeros((into.address.size, size // 4), U32)
        n = np.full(into.address.size, size) if given is None else into.gather(given(b.values)).astype(S64)
        if ((n != 0) & (n != size)).any():
            raise Unsupported(i, "a copy of a part")
        some = n > 0
        if some.any():
            taken = into.pick.copy() if into.pick is not None else np.ones(some.size, bool)
            taken[taken] = some
            from_mask = None if taken.all() else taken.reshape(b.programs, b.threads)
            origin = Access(b, i, np.broadcast_to(source(b.values), (b.programs, b.threads)), from_mask, size)
            data[some] = b.launch.memory.load(origin, 4, size // 4, pc)
            origin.count("global_loads", pc)
        offset = b.shared.place(into)
        b.shared.check_write(into, offset, asynchronous=True)
        b.copies.add(Transfer(into.program, into.thread, offset, data))
        into.count("shared", pc)

    return run
