"""What a warp may rely on: which writes of other warps happened before.

Warps run in any order. Only a barrier makes the writes before it visible to the reads after it. So every access to
shared memory is stamped with a tick of its program's clock, and a warp may touch what another warp wrote only if it
has since met that warp, directly or through others: it *knows* ticks of it up to some number.

A barrier of all warps makes everyone know everything; that is the usual case and costs one number a program (`base`).
Barriers of some warps and mbarriers (see tma.py) need the whole table, who knows how much of whom (a vector clock:
Lamport 1978, Mattern 1989). It is made when first needed.
"""

import numpy as np


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
