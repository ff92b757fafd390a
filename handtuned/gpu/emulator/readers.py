"""Who has read which piece of global memory, and so who may not write it yet.

A program must not write what another one reads in the same launch, nor a warp what another warp of its program may
still read. One thing looks like the second and is none: where a tile has fewer elements than a program has threads,
Triton gives each element to several of them. All load it, one stores. So a warp may overwrite in place what it has
read itself, if the copies of other warps go nowhere: `acting` follows what was loaded through the registers to the
instructions that act, and a copy was used only if its warp ran one of those.
"""

from collections import defaultdict

import numpy as np

from .order import EVERYONE
from .sparse import zeros

_ANY = np.iinfo(np.int32).max  # in place of 1 + a program: the programs of a batch that all read alike
_LISTED = ("st", "atom", "red")  # whose last access a batch keeps (`acted`)
_ACT = (*_LISTED, "cp", "bra", "ret", "exit", "trap", "bar", "barrier", "call", "mbarrier", "stmatrix", "wgmma")


class Readers:
    """The readers of a region.

    Attributes:
        program: for each piece 1 + the program that read it last, or _ANY; 0: none did. Negative: others did as well.
        warps: for each piece tick << 32 | a bit for each of that program's warps that read it since they all met.
        loads: indices of the instructions that read.
    """

    def __init__(self, pieces: int):
        self.program, self.warps, self.loads = zeros(pieces, np.int32), zeros(pieces, np.int64), set()

    def note(self, access, pick, pieces, pc):
        """Entries `pick` of an access read pieces (n, k)."""
        self.loads.add(pc)
        mine = access.ids[pick][:, None] + 1 if access.ids[0] != EVERYONE else -_ANY
        before = self.program[pieces]
        self.program[pieces] = mine
        after = self.program[pieces]
        several = (before != mine) & (before != 0) | (after != mine)
        if several.any():
            self.program[pieces[several]] = -np.abs(after[several])
        order = access.batch.order
        if order.warps > 1:
            same = np.abs(before) == np.abs(mine)
            order.note_readers(self.warps, pieces, access.program[pick], access.warp[pick], same)

    def before(self, access, pick, pieces):
        """Who reads what entries `pick` of an access write, each (n,): (another program, warps' bits, copies).

        The bits are of other warps of this program that may still read; copies: the writing warp has read it as well.
        """
        program, mine = self.program[pieces], access.ids[pick][:, None] + 1
        others = (program != mine) & (program != 0)
        words, warp = self.warps[pieces], access.warp[pick]
        bits = access.batch.order.unmet_readers(words, access.program[pick], warp)
        bits = np.where((np.abs(program) == mine) | (program == -_ANY), bits, 0)
        own = (words >> np.maximum(warp, 0)[:, None] & 1 == 1) & (warp >= 0)[:, None]
        return others.any(1), np.bitwise_or.reduce(bits, 1), (own | (bits == 0)).all(1)


def suspect(access, pick, readers, warps, which):
    """Entries `which` (n,) of those that `pick` picks overwrite what `warps` (n,) have copies of; `settle` decides."""
    entries, warps = np.arange(access.address.size)[pick][which], warps[which]
    programs = access.ids[entries]
    for program in np.unique(programs):
        here = programs == program
        known = access.batch.suspects.setdefault((program, id(access.i)), [readers, access, entries[here][0], 0])
        known[-1] |= int(np.bitwise_or.reduce(warps[here]))


def settle(b):
    """At the end of a batch: a race if a copy that another warp overwrote was used."""
    for (program, _), (readers, access, k, bits) in b.suspects.items():
        for pc in acting(b.kernel, readers.loads):
            if b.kernel.code[pc].parts[0] not in _LISTED or _ran(b.acted.get(pc), program, bits):
                access.fail("race", "memory is overwritten that another warp may still read",
                            np.arange(access.address.size) == k)  # fmt: skip


def _ran(access, program, bits):
    """Whether one of these warps took part in an access."""
    if access is None:
        return False
    warps = access.warp[access.ids == program]
    return bool(((warps < 0) | (bits >> np.maximum(warps, 0) & 1 == 1)).any())


def _registers(operand):
    if isinstance(operand, str):
        return {operand.lstrip("!")}
    if isinstance(operand, list | tuple):
        return set().union(*map(_registers, operand))
    return _registers([operand.base, operand.coordinates]) if hasattr(operand, "base") else set()


def acting(kernel, loads):
    """Indices of the instructions that act on what the loads (indices) brought: stores, branches, copies, …"""
    users = defaultdict(set)
    for pc, i in enumerate(kernel.code):
        acts = i.parts[0] in _ACT
        for name in _registers([i.guard or "", *(i.args if acts else i.args[1:])]):
            users[name].add(pc)
    found, new = set(), set(loads)
    while new:
        found |= new
        written = _registers([kernel.code[pc].args[0] for pc in new if kernel.code[pc].parts[0] not in _ACT])
        new = set().union(*(users[name] for name in written)) - found
    return {pc for pc in found if kernel.code[pc].parts[0] in _ACT}
