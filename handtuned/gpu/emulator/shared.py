"""Shared memory: a program's own fast memory, and the mistakes one can make with it.

Beside each piece of it stands who touched it last. A piece is as large as the smallest access of the kernel, 16 bytes
at most.

- A read of a piece that nobody wrote: "never written".
- A read of what another warp wrote, or a write over what another warp wrote or may still read, with no barrier in
  between: "race".
- A read of what `cp.async`, TMA or another asynchronous copy is still bringing, or a write over what one is still
  reading: "not arrived". Copies are delivered only at the wait that the program makes, so a missing wait shows always.
- wgmma and TMA read through a path of their own (the "async proxy"). What threads wrote is visible there only after
  `fence.proxy.async`: "not arrived" as well.
"""

import numpy as np

from .registers import POISON, SHARED_BASE
from .types import UNSIGNED

IN_FLIGHT = 1 << 40  # of a piece's writer: an asynchronous copy
_BEING_READ = 1 << 62  # of a piece's readers: an asynchronous reader
_WARPS = (1 << 32) - 1


class Shared:
    """Shared memory of the programs of a batch.

    Attributes:
        data: (P, size) bytes.
        writer: (P, pieces) int64: tick · 32 + warp of the last write; 0: never written.
        readers: (P, pieces) int64: tick << 32 | one bit for each warp that read since then.
        unfenced: (P, pieces): written by threads, not yet visible to the async proxy.
        order: what the warps know of each other.
    """

    def __init__(self, programs: int, size: int, piece: int, order):
        self.size, self.limit, self.piece = -(-size // 128) * 128, size, piece
        self.data = np.full((programs, self.size // 4), POISON, np.uint32).view(np.uint8)
        self.writer = np.zeros((programs, self.size // piece), np.int64)
        self.readers = np.zeros((programs, self.size // piece), np.int64)
        self.unfenced = np.zeros((programs, self.size // piece), bool)
        self.order = order

    def select(self, keep, order):
        other = object.__new__(Shared)
        other.__dict__ = dict(self.__dict__)
        for name in ("data", "writer", "readers", "unfenced"):
            setattr(other, name, getattr(self, name)[keep])
        other.order = order
        return other

    def place(self, access):
        """Byte offsets of an access within its program's memory, checked."""
        offset = access.address - SHARED_BASE
        n = access.nbytes
        if offset.size and (int(offset.min()) < 0 or int(offset.max()) + n > self.limit):
            access.address = offset
            access.fail("out of bounds", f"{n} bytes of the {self.limit} bytes of shared memory",
                        (offset < 0) | (offset + n > self.limit))  # fmt: skip
        if n > 1 and (offset & (n - 1)).any():
            access.address = offset
            access.fail("misaligned", f"a {n}-byte access of shared memory", (offset & (n - 1)) != 0)
        return offset

    def pieces(self, program, offset, nbytes):
        """Flat indices (n, pieces of one access)."""
        first = program * self.writer.shape[1] + offset // self.piece
        return first[:, None] + np.arange(max(1, nbytes // self.piece))

    def _unordered(self, access, warp, tick, of):
        """Where an event of warp `of` at `tick` is not known to `warp`; all (n, k)."""
        return tick > self.order.knows(access.program[:, None], warp, of)

    def check_read(self, access, offset, pieces=None):
        """Threads read; `access.warp` is -1 where all warps of the program do."""
        pieces = self.pieces(access.program, offset, access.nbytes) if pieces is None else pieces
        order, warp = self.order, access.warp[:, None]
        recent = (order.base[access.program] + 1)[:, None] << 5
        writer = self.writer.reshape(-1)[pieces]
        suspect = (writer == 0) | ((writer >= recent) & ((writer & 31) != warp)) | (writer >= IN_FLIGHT)
        if suspect.any():
            self._explain_read(access, offset, writer, suspect, warp)
        order.note_readers(self.readers.reshape(-1), pieces, access.program, access.warp)

    def _explain_read(self, access, offset, writer, suspect, warp):
        access.address = offset
        access.fail_if("never written", "shared memory that nobody wrote is read", writer == 0)
        access.fail_if("not arrived", "shared memory is read while a copy is still filling it", writer >= IN_FLIGHT)
        unordered = suspect & self._unordered(access, warp, writer >> 5, writer & 31)
        access.fail_if("race", "shared memory is read that another warp wrote, with no barrier in between", unordered)

    def check_write(self, access, offset, pieces=None, asynchronous=False):
        pieces = self.pieces(access.program, offset, access.nbytes) if pieces is None else pieces
        order, warp = self.order, access.warp[:, None]
        recent = (order.base[access.program] + 1)[:, None] << 5
        writer, readers = self.writer.reshape(-1)[pieces], self.readers.reshape(-1)[pieces]
        bit = np.where(access.warp < 0, 0, 1 << np.maximum(access.warp, 0))[:, None]
        other_writer = (writer >= recent) & ((writer & 31) != warp) | (writer >= IN_FLIGHT)
        other_reader = (readers >= recent << 27) & ((readers & _WARPS & ~bit) != 0)
        if other_writer.any() or other_reader.any():
            self._explain_write(access, offset, writer, readers, other_writer, warp)
        mine = ((order.tick[access.program] << 5) | np.maximum(access.warp, 0))[:, None]
        self.writer.reshape(-1)[pieces] = mine | IN_FLIGHT if asynchronous else mine
        self.unfenced.reshape(-1)[pieces] = True

    def _explain_write(self, access, offset, writer, readers, other_writer, warp):
        access.address = offset
        access.fail_if("not arrived", "shared memory is overwritten while a copy is still filling it",
                       other_writer & (writer >= IN_FLIGHT))  # fmt: skip
        access.fail_if("not arrived", "shared memory is overwritten while a tensor core or a copy is still reading it",
                       readers >= _BEING_READ)  # fmt: skip
        unordered = other_writer & self._unordered(access, warp, writer >> 5, writer & 31)
        access.fail_if("race", "shared memory is overwritten that another warp wrote, with no barrier in between",
                       unordered)  # fmt: skip
        unmet = self.order.unmet_readers(readers, access.program, access.warp) != 0
        access.fail_if("race", "shared memory is overwritten that another warp may still read", unmet)

    # asynchronous readers and writers

    def arrive(self, program, offset, nbytes, warp, fenced=False):
        """An asynchronous copy has been waited for: from now on it counts as a write of `warp`."""
        pieces = self.pieces(program, offset, nbytes)
        self.writer.reshape(-1)[pieces] = ((self.order.tick[program] << 5) | warp)[:, None]
        if fenced:
            self.unfenced.reshape(-1)[pieces] = False

    def check_async_read(self, access, offset, pieces, reader):
        """wgmma or TMA reads: `access.warp` is the issuing warp. The pieces stay marked until `finish_async_read`."""
        writer = self.writer.reshape(-1)[pieces]
        warp = access.warp[:, None]
        recent = (self.order.base[access.program] + 1)[:, None] << 5
        bad = (writer == 0) | (writer >= recent) | self.unfenced.reshape(-1)[pieces]
        if bad.any():
            access.address = offset
            access.fail_if("never written", f"{reader} reads shared memory that nobody wrote", writer == 0)
            access.fail_if("not arrived", f"{reader} reads shared memory while a copy is still filling it",
                           writer >= IN_FLIGHT)  # fmt: skip
            other = (writer >= recent) & ((writer & 31) != warp)
            unordered = other & self._unordered(access, warp, writer >> 5, writer & 31)
            access.fail_if("race", f"{reader} reads shared memory that another warp wrote, with no barrier in between",
                           unordered)  # fmt: skip
            access.fail_if("not arrived", f"{reader} reads what threads wrote without a fence.proxy.async in between",
                           self.unfenced.reshape(-1)[pieces])  # fmt: skip
        self.readers.reshape(-1)[pieces] |= _BEING_READ

    def finish_async_read(self, program, pieces, warps):
        """The readers are done, as `warps` (bits) now know: others must meet them before they overwrite."""
        self.readers.reshape(-1)[pieces] = (self.order.tick[program] << 32)[:, None] | warps

    def fence(self, warps=None):
        """Generic writes (of all warps, or (P, W) of some) become visible to the async proxy."""
        if warps is None:
            self.unfenced[:] = False
        else:
            program = np.arange(len(self.data))[:, None]
            self.unfenced &= ~warps[program, self.writer & 31]

    def load(self, program, offset, width, count):
        """(n, count) unsigned of `width` bytes."""
        flat = program * self.size + offset
        view = self.data.reshape(-1).view(UNSIGNED[width])
        if count == 1:
            return np.take(view, flat // width)[:, None]
        return np.take(view.reshape(-1, count), flat // (width * count), axis=0)

    def store(self, program, offset, values):
        """Write (n, count); gives where another lane of the same instruction left something else, (n,) bool."""
        width, count = values.dtype.itemsize, values.shape[1]
        view = self.data.reshape(-1).view(UNSIGNED[width]).reshape(-1, count)
        index = (program * self.size + offset) // (width * count)
        view[index] = values
        return (view[index] != values).any(1)
