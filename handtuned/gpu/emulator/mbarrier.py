"""mbarriers: barriers that live in shared memory, and that copies can arrive at as well as threads.

An mbarrier is told how many arrivals make a phase. `arrive.expect_tx` arrives and announces bytes that TMA will bring;
the phase ends when all have arrived and all bytes have landed. Then the next phase begins, with the other parity, so
that `try_wait.parity` can ask whether the phase with a given parity is over. Who has waited knows all that those who
arrived had done before.

As with cp.async, bytes land here only when somebody waits.
"""

import numpy as np

from .access import Access, address_of
from .fault import Unsupported
from .registers import both
from .types import S64, U32


class MBarrier:
    """One mbarrier, at the same offset in each program of a batch.

    Attributes:
        expected: (P,) arrivals of a phase; 0: not initialized.
        pending: (P,) arrivals that the running phase still needs.
        bytes: (P,) announced and not yet landed.
        flying: (P,) bytes of copies under way.
        phase: (P,) phases that are over.
        known: (P, W) ticks that the arrivals hand on (see order.py).
        transfers: copies under way.
    """

    def __init__(self, programs, warps):
        self.expected, self.pending, self.bytes, self.flying, self.phase = np.zeros((5, programs), S64)
        self.known = np.zeros((programs, warps), S64)
        self.transfers = []

    def select(self, keep, new):
        other = object.__new__(MBarrier)
        for name in ("expected", "pending", "bytes", "flying", "phase", "known"):
            setattr(other, name, getattr(self, name)[keep])
        other.transfers = [t.select(new) for t in self.transfers]
        return other

    def init(self, program, count):
        self.expected[program] = self.pending[program] = count
        self.bytes[program] = self.phase[program] = 0

    def arrive(self, b, program, warp, count, announced):
        self.advance(b, program)
        self.bytes[program] += announced
        self.pending[program] -= count
        known = b.order.release(program, np.array([warp]))
        self.known[program] = np.maximum(self.known[program], known)
        if not self.flying[program]:
            self.advance(b, program)

    def advance(self, b, program):
        """End the phase if everybody and every byte is there."""
        if self.pending[program] != 0 or self.bytes[program] != self.flying[program]:
            return
        if self.flying[program]:
            self._land(b, program)
        self.bytes[program] = self.flying[program] = 0
        self.phase[program] += 1
        self.pending[program] = self.expected[program]

    def _land(self, b, program):
        rest = []
        for t in self.transfers:
            mine = t.program == program
            landed = t.pick(mine)
            if mine.any():
                b.shared.store(landed.program, landed.offset, landed.data)
                b.shared.arrive(landed.program, landed.offset, 16, landed.thread >> 5, fenced=True)
                known = b.order.release(program, np.array([int(landed.thread[0]) >> 5]))
                self.known[program] = np.maximum(self.known[program], known)
            if not mine.all():
                rest.append(t.pick(~mine))
        self.transfers = rest


def barrier_at(b, offset) -> MBarrier:
    if offset not in b.mbarriers:
        b.mbarriers[offset] = MBarrier(b.programs, b.threads // 32)
    return b.mbarriers[offset]


def _entries(b, i, address, mask):
    """The access, and (program, thread, warp, offset) of each thread that takes part."""
    where = np.broadcast_to(address, (b.programs, b.threads))
    access = Access(b, i, where, mask, 8, whole_programs=True)
    offset = b.shared.place(access)
    return access, list(zip(access.program.tolist(), access.thread.tolist(), access.warp.tolist(), offset.tolist(),
                            strict=True)), offset  # fmt: skip


def check_initialized(b, access, offsets):
    bad = np.array([barrier_at(b, int(at)).expected[p] == 0 for p, at in zip(access.program, offsets, strict=True)])
    if bad.size:
        access.fail_if("never written", "an mbarrier that was not initialized", bad)
        b.shared.check_read(access, offsets)


def mbarrier(m, pc, i):
    """init, inval, arrive, expect_tx; the waits end a block (`try_wait`)."""
    parts = i.parts
    what = parts[1]
    if what not in ("init", "inval", "arrive", "expect_tx") or "noComplete" in parts:
        raise Unsupported(i)
    operands = i.args[1:] if what == "arrive" and not hasattr(i.args[0], "base") else i.args
    address, guard = address_of(m, operands[0], U32, i), m.guard(i)
    number = m.source(operands[1], U32, i) if len(operands) > 1 else None
    expects = "expect_tx" in parts

    def run(b):
        access, entries, offsets = _entries(b, i, address(b.values), both(b.mask, guard(b.values)))
        if not entries:
            return
        given = np.full(len(entries), 1) if number is None else access.gather(number(b.values)).astype(S64)
        if what in ("init", "inval"):
            b.shared.check_write(access, offsets)
        else:
            check_initialized(b, access, offsets)
        for (program, _, warp, offset), n in zip(entries, given.tolist(), strict=True):
            bar = barrier_at(b, offset)
            if what == "init":
                bar.init(program, n)
                b.shared.arrive(*(np.array([x]) for x in (program, offset)), 8, np.array([warp]), fenced=True)
            elif what == "inval":
                bar.expected[program] = 0
            elif what == "expect_tx":
                bar.bytes[program] += n
            else:
                bar.arrive(b, program, warp, 1 if expects else n, n if expects else 0)
        b.moved = True

    return run


def try_wait(m, pc, i):
    """Threads whose phase is not over wait, and ask again when others have run."""
    if "parity" not in i.parts:
        raise Unsupported(i)
    write, address, parity = m.destination(i.args[0]), address_of(m, i.args[1], U32, i), m.source(i.args[2], U32, i)
    guard = m.guard(i)

    def run(b):
        mask = guard(b.values)
        here = b.here() if mask is None else b.here() & mask
        access, entries, offsets = _entries(b, i, address(b.values), here)
        check_initialized(b, access, offsets)
        wanted = access.gather(parity(b.values)).tolist()
        done, asked = np.zeros((b.programs, b.threads), bool), {}
        for (program, thread, warp, offset), want in zip(entries, wanted, strict=True):
            key = program, offset, want
            if key not in asked:
                bar = barrier_at(b, offset)
                bar.advance(b, program)
                asked[key] = bool(bar.phase[program] & 1 != want), set()
            over, warps = asked[key]
            done[program, thread] = over
            warps.add(warp)
        for (program, offset, _), (over, warps) in asked.items():
            if over:
                b.order.acquire(program, sorted(warps), barrier_at(b, offset).known[program])
        waiting = here & ~done
        write(b, done, None if here.all() else here)
        if not waiting.any():
            b.moved = True
            return b.go(pc + 1)
        b.moved |= bool(done.any())
        b.send(pc + 1, b.here() & ~waiting)
        b.polling[pc] = b.polling[pc] | waiting if pc in b.polling else waiting
        return b.next_path()

    return run
