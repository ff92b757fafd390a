"""Global memory: the tensors that a launch was given, every access checked.

A launch may touch its tensor arguments, each from its first element to its last, and those tensors whose addresses
stand in an int64 tensor that it was given (a table of addresses, as kernels/adamw.py makes). Everything else is "out
of bounds": the rest of a storage, of which an argument is a view, as well.

DRAM is moved in sectors of 32 bytes. From a cold cache every sector that a launch reads before writing it comes from
DRAM once, and every sector it writes goes back once: those two sums are what any launch must pay at least.

Programs run in no order and nothing orders them but atomics. So a program must not read what another one writes in the
same launch, before or after ("race"), unless it has acquired, by an atomic, what the other released; and where two
write the same address they must write the same value ("conflicting writes"). Between a write of one warp and an access
of another one of the same program, before it or after it, a barrier must stand, as for shared memory ("race").
"""

import ctypes
import gc

import numpy as np
import torch

from .order import EVERYONE, Handovers
from .readers import Readers, suspect
from .registers import POISON
from .sparse import zeros
from .types import U32, UNSIGNED

_BLOCK = 128  # the largest access: views of that width need an aligned start


class Unwritten:
    """Remembers which storages came from torch.empty, filled with POISON: a word that holds it is unwritten."""

    def __init__(self):
        self.starts = set()

    def add(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes() // 4 * 4
        if tensor.device.type == "cpu" and nbytes:
            _bytes_at(storage.data_ptr(), nbytes).view(U32)[:] = POISON
            self.starts.add(storage.data_ptr())

    def holds(self, start: int) -> bool:
        """Whether a storage that begins there was made so; one that took its place later holds no POISON."""
        return start in self.starts


def _bytes_at(address, nbytes):
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


class Region:
    """Bytes [start, end) of tensors, and what the launch did to them.

    Attributes:
        first: start of the arrays, a multiple of 128 bytes not above `start`.
        bytes: the memory itself.
        read_by, written_by: for each sector 1 + the instruction that touched it first; 0: none did.
        owner: for each piece 1 + the program that wrote it last; 0: none did. None: nobody wrote any.
        stamp: for each piece the tick · 32 + warp of that write.
        readers: who read which piece; None: nobody read any.
        poisoned: it came from torch.empty, so POISON in it was never written.
    """

    def __init__(self, start, end, poisoned):
        self.start, self.end = start, end
        self.first = start // _BLOCK * _BLOCK
        self.size = -(-(end - self.first) // _BLOCK) * _BLOCK
        self.bytes = _bytes_at(self.first, self.size)
        self.views = {width: self.bytes.view(t) for width, t in UNSIGNED.items()}
        self.read_by = zeros(self.size // 32, np.int32)
        self.written_by = zeros(self.size // 32, np.int32)
        self.owner = self.stamp = self.readers = None
        self.poisoned = poisoned


def spans_of(tensors, unwritten):
    """Merged (start, end, poisoned) of what CPU tensors reach, from their first element to their last."""
    spans = []
    for t in tensors:
        if isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.layout == torch.strided and t.numel():
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            poisoned = unwritten is not None and unwritten.holds(t.untyped_storage().data_ptr())
            spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), poisoned))
    merged = []
    for start, end, poisoned in sorted(spans):
        if merged and start < merged[-1][1]:
            before = merged[-1]
            merged[-1] = (before[0], max(end, before[1]), before[2] or poisoned)
        else:
            merged.append((start, end, poisoned))
    return merged


def _live_tensors():
    gc.unfreeze()  # what gc.freeze() set aside is not among the objects; this costs the collector time, nothing else
    kinds, more = set(), {torch.Tensor}
    while more:  # a look into a set is far faster than issubclass, and there are many objects
        kinds |= more
        more = {sub for kind in more for sub in type.__subclasses__(kind)} - kinds
    return [o for o in gc.get_objects() if type(o) in kinds]


def tensors_in_tables(tensors):
    """The live tensors whose addresses stand in the int64 tensors among these."""
    tables = [t.detach().reshape(-1) for t in tensors if isinstance(t, torch.Tensor) and t.dtype == torch.int64]
    addresses = {int(a) for table in tables if table.numel() <= 1 << 20 for a in table.tolist()}
    found = []
    for t in _live_tensors():
        try:
            if t.device.type == "cpu" and t.layout == torch.strided and t.data_ptr() in addresses and t.numel():
                found.append(t)
        except RuntimeError:  # a tensor without storage (fake, functional)
            continue
    return found


class Global:
    """The memory of one launch.

    Args:
        tensors: the tensor arguments.
        unwritten: who knows which storages came from torch.empty; or None.
        piece: bytes that `owner` tells apart: the smallest store of the kernel, 16 at most.
    """

    def __init__(self, tensors, unwritten: Unwritten | None, piece: int):
        self.tensors, self.unwritten, self.piece = tensors, unwritten, piece
        self.regions, self.starts, self.tables_read = [], None, False
        self.version = self.polls = 0  # changes, and questions (what waits for one)
        self.handovers = Handovers()
        self._add(tensors)

    def include(self, tensors):
        """More tensors that may be touched."""
        if tensors:
            self.tensors = [*self.tensors, *tensors]
            self._add(self.tensors)

    def _add(self, tensors):
        """Regions for these tensors; what earlier regions recorded is kept where they did not grow."""
        known = {(region.start, region.end): region for region in self.regions}
        spans = spans_of(tensors, self.unwritten)
        self.regions = [known.get((start, end)) or Region(start, end, poisoned) for start, end, poisoned in spans]
        self.starts = np.array([region.start for region in self.regions], np.int64)

    def _region(self, low, high):
        """The region that holds all of [low, high); None."""
        i = int(np.searchsorted(self.starts, low, "right")) - 1
        return self.regions[i] if i >= 0 and high <= self.regions[i].end else None

    def parts(self, access):
        """Yield (region, selector): all in one, nearly always."""
        address, n = access.address, access.nbytes
        if address.size == 0:
            return
        if n > 1 and (address & (n - 1)).any():
            access.fail("misaligned", f"a {n}-byte access", (address & (n - 1)) != 0)
        region = self._region(int(address.min()), int(address.max()) + n)
        if region is not None:
            yield region, slice(None)
            return
        index = self._index(access)
        for i in np.unique(index):
            yield self.regions[i], index == i

    def _index(self, access):
        """Number of the region of each address, all of them checked."""
        ends = np.array([region.end for region in self.regions], np.int64)
        index = np.searchsorted(self.starts, access.address, "right") - 1
        outside = (
            np.ones(index.size, bool)
            if not ends.size
            else ((index < 0) | (access.address + access.nbytes > ends[np.maximum(index, 0)]))
        )
        if not outside.any():
            return index
        if not self.tables_read:
            self.tables_read = True
            self._add([*self.tensors, *tensors_in_tables(self.tensors)])
            return self._index(access)
        access.fail("out of bounds", f"{access.nbytes} bytes that are in no tensor of the launch"
                    f"{self._nearest(int(access.address[outside.argmax()]))} "
                    f"({int(outside.sum())} of {outside.size} threads of this access)", outside)  # fmt: skip

    def _nearest(self, address):
        gaps = [(abs(address - edge), edge, region) for region in self.regions for edge in (region.start, region.end)]
        if not gaps:
            return ""
        gap, edge, region = min(gaps, key=lambda entry: entry[0])
        side = "past the end" if edge == region.end else "before the start"
        return f", {gap} bytes {side} of one of {region.end - region.start} bytes"

    def load(self, access, width, count, pc, atomic=False):
        """(n, count) unsigned of `width` bytes; an atomic may meet what others wrote."""
        out = np.empty((access.address.size, count), UNSIGNED[width])
        for region, pick in self.parts(access):
            offset = access.address[pick] - region.first
            view = region.views[width]
            if count > 1:
                out[pick] = np.take(view.reshape(-1, count), offset // (width * count), axis=0)
            else:
                out[pick, 0] = np.take(view, offset // width)
            self._touch(region.read_by, region, offset, access.nbytes, pc, reading=True)
            if region.poisoned:
                self._check_written(region, access, pick, offset)
            if not atomic:
                if region.owner is not None:
                    self._check_owner(region, access, pick, offset)
                if region.readers is None:
                    region.readers = Readers(region.size // self.piece)
                region.readers.note(access, pick, self._pieces(offset, access.nbytes), pc)
        return out

    @staticmethod
    def _touch(touched, region, offset, nbytes, pc, reading=False):
        sector = offset >> 5
        if nbytes > 32:  # a row of a TMA box
            sector = (sector[:, None] + np.arange((nbytes + 31) // 32)).reshape(-1)
        new = touched[sector] == 0
        if reading:
            new &= region.written_by[sector] == 0
        if new.any():
            touched[sector[new]] = pc + 1

    def touch_written(self, region, offset, nbytes, pc):
        self._touch(region.written_by, region, offset, nbytes, pc)

    def _check_written(self, region, access, pick, offset):
        words = offset[:, None] // 4 + np.arange(max(1, access.nbytes // 4))
        never = region.views[4][words] == U32.type(POISON)
        self._fail(access, pick, "never written", "memory of torch.empty that nobody wrote is read", never.any(1))

    def _pieces(self, offset, nbytes):
        first = offset // self.piece
        return first[:, None] if nbytes <= self.piece else first[:, None] + np.arange(nbytes // self.piece)

    def _unordered(self, region, access, pick, offset):
        """(where another program wrote, where another warp of this one did), (n,), unknown to the access's warp."""
        pieces = self._pieces(offset, access.nbytes)
        owner, stamp = region.owner[pieces], region.stamp[pieces]
        ids, order = access.ids[pick][:, None], access.batch.order
        program, warp = access.program[pick][:, None], access.warp[pick][:, None]
        foreign = (owner > 0) & (owner != ids + 1)
        if foreign.any():
            row, column = np.nonzero(foreign)
            writer, when = owner[row, column] - 1, stamp[row, column]
            hidden = np.zeros(row.size, bool)
            for reader in access.batch.ids if ids[0, 0] == EVERYONE else [ids[row, 0]]:
                readers = np.broadcast_to(reader, row.shape)
                hidden |= self.handovers.hidden(readers, writer, when >> 5, when & 31) & (readers != writer)
            foreign[row, column] = hidden
        other = (owner == ids + 1) & ((stamp & 31) != warp) & (stamp >> 5 > order.base[program])
        if other.any():
            other &= stamp >> 5 > order.knows(program, warp, stamp & 31)
        return foreign.any(1), other.any(1)

    def _check_owner(self, region, access, pick, offset):
        foreign, other = self._unordered(region, access, pick, offset)
        self._fail(access, pick, "race", "memory is read that another program wrote in the same launch", foreign)
        self._fail(access, pick, "race", "memory is read that another warp wrote, with no barrier in between", other)

    @staticmethod
    def _fail(access, pick, kind, detail, bad_here):
        if bad_here.any():
            bad = np.zeros(access.address.size, bool)
            bad[pick] = bad_here
            access.fail(kind, detail, bad)

    def store(self, access, values, pc):
        """Write (n, count)."""
        width, count = values.dtype.itemsize, values.shape[1]
        for region, pick in self.parts(access):
            offset = access.address[pick] - region.first
            v = values[pick]
            view = region.views[width].reshape(-1, count)
            index = offset // (width * count)
            changes = (view[index] != v).any(1)
            self.version += int(changes.any())
            self._own(region, access, pick, offset, changes)
            view[index] = v
            lost = (view[index] != v).any(1)
            if lost.any():
                writers = access.ids[pick][index == index[lost.argmax()]]
                who = "threads" if (writers == writers[0]).all() else "programs"
                self._fail(access, pick, "conflicting writes", f"{who} write different values to one address", lost)
            self.touch_written(region, offset, access.nbytes, pc)

    def _own(self, region, access, pick, offset, changes):
        """Note who wrote; an error where that changes what another program or warp wrote."""
        if region.owner is None:
            region.owner = zeros(region.size // self.piece, np.int32)
            region.stamp = zeros(region.size // self.piece, np.int64)
        else:
            foreign, other = self._unordered(region, access, pick, offset)
            self._fail(access, pick, "conflicting writes", "programs write different values to one address",
                       foreign & changes)  # fmt: skip
            self._fail(access, pick, "race", "memory is overwritten that another warp wrote, with no barrier in "
                       "between", other & changes)  # fmt: skip
        pieces = self._pieces(offset, access.nbytes)
        if region.readers is not None and changes.any():
            self._check_readers(region, access, pick, pieces, changes)
        region.owner[pieces] = access.ids[pick][:, None] + 1
        warp, tick = access.warp[pick], access.batch.order.tick[access.program[pick]]
        region.stamp[pieces] = np.where(warp < 0, 0, tick << 5 | warp)[:, None]  # 0: every warp wrote it

    def _check_readers(self, region, access, pick, pieces, changes):
        others, warps, copies = region.readers.before(access, pick, pieces)
        if not self.handovers.used:
            self._fail(access, pick, "race", "memory is overwritten that another program reads in the same launch",
                       others & changes)  # fmt: skip
        unmet = (warps != 0) & changes
        self._fail(access, pick, "race", "memory is overwritten that another warp may still read", unmet & ~copies)
        if unmet.any():
            suspect(access, pick, region.readers, warps, unmet)

    def dram(self, n_instructions):
        """(sectors read, sectors written) by instruction."""
        sums = np.zeros((2, n_instructions + 1), np.int64)
        for region in self.regions:
            sums[0] += np.bincount(region.read_by, minlength=n_instructions + 1)
            sums[1] += np.bincount(region.written_by, minlength=n_instructions + 1)
        return sums[0, 1:], sums[1, 1:]
