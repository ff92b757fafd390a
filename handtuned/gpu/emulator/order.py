"""What a warp may rely on: which writes of other warps, and of other programs, happened before.

Warps run in any order. Only a barrier makes the writes before it visible to the reads after it. So every access to
shared memory, and every write to global memory, is stamped with a tick of its program's clock, and a warp may touch
what another warp wrote only if it has since met that warp, directly or through others: it *knows* ticks of it up to
some number.

A barrier of all warps makes everyone know everything; that is the usual case and costs one number per program (`base`).
Barriers of some warps and mbarriers (see tma.py) need the whole table, who knows how much of whom (a vector clock:
Lamport 1978, Mattern 1989). It is made when first needed.

Programs meet through words of global memory. An atomic that releases leaves at its word what its warp knows; one that
acquires takes from the word what others left there (`Handovers`).
"""

import numpy as np

EVERYONE = -2  # in place of a program: one entry stands for all programs of a batch
_WARPS = (1 << 32) - 1


class Order:
    """Clocks of the programs of a batch.

    Attributes:
        tick: (P,) the present; grows with every barrier.
        base: (P,) the tick that all warps know of each other.
        table: None, or (P, W, W): what warp w knows of warp u.
    """

    def __init__(self, programs: int, warps: int):
        self.warps = warps
        self.tick = np.ones(programs, np.int64)
        self.base = np.zeros(programs, np.int64)
        self.table = None

    def select(self, keep):
        other = object.__new__(Order)
        other.warps, other.tick, other.base = self.warps, self.tick[keep], self.base[keep]
        other.table = None if self.table is None else self.table[keep]
        return other

    def meet_all(self, programs=slice(None)):
        """All warps of these programs met."""
        self.base[programs] = self.tick[programs]
        if self.table is not None:
            self.table[programs] = self.tick[programs][:, None, None]
        self.tick[programs] += 1

    def _need_table(self):
        if self.table is None:
            self.table = np.broadcast_to(self.base[:, None, None], (len(self.base), self.warps, self.warps)).copy()

    def meet(self, program: int, warps):
        """Some warps (a list) of one program met."""
        self._need_table()
        self.table[program, warps] = self.release(program, warps)

    def release(self, program: int, warps):
        """(W,) what these warps together know, themselves up to now included: an mbarrier hands it on."""
        self._need_table()
        known = self.table[program, warps].max(0)
        known[warps] = self.tick[program]
        self.tick[program] += 1
        return known

    def known_by(self, access):
        """(n, W) what the warp of each entry of an access knows, itself up to now included."""
        program, warp = access.program, access.warp
        if self.table is None:
            known = np.repeat(self.base[program][:, None], self.warps, 1)
        else:
            known = self.table[program, np.maximum(warp, 0)]
        mine = (np.arange(self.warps) == warp[:, None]) | (warp < 0)[:, None]  # -1: every warp makes this access
        return np.where(mine, self.tick[program][:, None], known)

    def acquire(self, program: int, warps, known):
        self._need_table()
        self.table[program, warps] = np.maximum(self.table[program, warps], known)

    def knows(self, program, warp, of):
        """Up to which tick `warp` knows warp `of`; warp -1: the least that any other warp knows."""
        if self.table is None:
            return self.base[program]
        named = self.table[program, np.maximum(warp, 0), of]
        if (warp >= 0).all():
            return named
        hidden = self.table[program, :, of]  # (n, W)
        hidden = np.where(np.arange(self.warps) == np.asarray(of)[..., None], np.iinfo(np.int64).max, hidden)
        return np.where(warp >= 0, named, hidden.min(-1))

    def note_readers(self, words, pieces, program, warp, same=True):
        """Note in `words` (tick << 32 | a bit for each warp) which warps read; entries of the same program are kept.

        Args:
            pieces: (n, k) index into `words`.
            program, warp: (n,); -1: all warps.
            same: (n, k), where what a word holds is about the same program.
        """
        bit = np.where(warp < 0, _WARPS >> (32 - self.warps), 1 << np.maximum(warp, 0))[:, None]
        old = words[pieces]
        kept = np.where((old >= (self.base[program] + 1 << 32)[:, None]) & same, old & _WARPS, 0)
        words[pieces] = (self.tick[program] << 32)[:, None] | kept | bit
        lost = (words[pieces] & bit) != bit  # several warps read one piece in this very instruction
        if lost.any():
            np.bitwise_or.at(words, pieces[lost], np.broadcast_to(bit, pieces.shape)[lost])

    def unmet_readers(self, words, program, warp):
        """Of words as above, (n, k): the bits of the warps that `warp` has not met since they read."""
        mine = np.where(warp < 0, 0, 1 << np.maximum(warp, 0))[:, None]
        bits = np.where(words >= (self.base[program] + 1 << 32)[:, None], words & _WARPS & ~mine, 0)
        if self.table is not None and bits.any():
            for u in range(self.warps):
                met = words >> 32 <= self.knows(program[:, None], warp[:, None], np.full_like(words, u))
                bits = np.where(met, bits & ~(1 << u), bits)
        return bits


def _join(mine, other):
    """What both know: program → (W,) ticks of its warps."""
    return {**mine, **{p: np.maximum(ticks, mine[p]) if p in mine else ticks for p, ticks in other.items()}}


class Handovers:
    """What programs of a launch told each other by releasing and acquiring.

    Most kernels with atomics never read what another program wrote. So the events are only noted, and gone through
    when a program first touches memory of another one.

    Attributes:
        events: (program numbers, addresses, what their warps knew if they release or None, whether they acquire).
        left: address → what was released there, as `_join` has it.
        known: program → what it has acquired. Its own warps are taken to have met since.
    """

    def __init__(self):
        self.events, self.left, self.known = [], {}, {}

    @property
    def used(self) -> bool:
        return bool(self.events or self.left)

    def note(self, access, acquires: bool, releases: bool):
        order = access.batch.order
        known = order.known_by(access) if releases else None
        self.events.append((access.ids, access.address, known, acquires))
        if releases:
            order.tick[np.unique(access.program)] += 1  # what is written from now on was not released

    def _go_through(self):
        for programs, addresses, known, acquires in self.events:
            for k, (program, address) in enumerate(zip(programs.tolist(), addresses.tolist(), strict=True)):
                if acquires and address in self.left:
                    self.known[program] = _join(self.known.get(program, {}), self.left[address])
                if known is not None:
                    told = _join(self.known.get(program, {}), {program: known[k]})
                    self.left[address] = _join(self.left.get(address, {}), told)
        self.events = []

    def hidden(self, reader, writer, tick, warp):
        """Whether a write by `warp` of program `writer` at `tick` is unknown to program `reader`; arrays of (n,)."""
        self._go_through()
        out = np.ones(len(reader), bool)
        if self.known:
            for k, (r, w, t, u) in enumerate(zip(*(a.tolist() for a in (reader, writer, tick, warp)), strict=True)):
                ticks = self.known.get(r, {}).get(w)
                out[k] = ticks is None or t > ticks[u]
        return out
