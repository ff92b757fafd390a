"""TMA: one thread asks for a whole tile, a copy engine fetches it.

A tensor is described once by 128 bytes (a tensor map): where it starts, its sizes and strides, the box to copy, and how
the box is swizzled in shared memory. Then one thread names a map and coordinates, and the engine works out all
addresses, fills what lies outside of the tensor with zeros, and arrives at an mbarrier when the bytes have landed.
Stores go the other way, leave out what lies outside, and are waited for in groups as cp.async is; `cp.reduce` adds to
what is there, or takes the larger, as an atomic does.

A map's layout is NVIDIA's secret, and kernels write it field by field (`tensormap.replace`), so here it has a layout
of its own.
"""

from dataclasses import dataclass

import numpy as np

from .access import Access, ListedAccess, address_of
from .atomics import apply_global, operation
from .copies import Transfer
from .fault import Unsupported
from .mbarrier import barrier_at, check_initialized
from .registers import SHARED_BASE, both
from .types import S64, TYPES, U8, U32, U64
from .wgmma import swizzled

MAP_BYTES = 128
_FIELDS = {  # name → (byte offset, bytes of an entry)
    "global_address": (0, 8), "global_stride": (8, 8), "global_dim": (40, 4), "box_dim": (60, 4),
    "element_stride": (80, 4), "rank": (100, 4), "elemtype": (104, 4), "interleave_layout": (108, 4),
    "swizzle_mode": (112, 4), "fill_mode": (116, 4),
}  # fmt: skip
_ELEMENTS = ("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f32", "f64", "bf16")
_SPAN = {0: 0, 1: 32, 2: 64, 3: 128}
_CHUNK = 16


@dataclass
class TensorMap:
    """A tensor as its map describes it; the innermost dimension first, strides in bytes."""

    address: int
    shape: list
    strides: list
    box: list
    kind: str
    span: int
    nan: bool

    @classmethod
    def read(cls, raw):
        """From the 128 bytes of a map (uint8)."""

        def field(name, n=1):
            at, size = _FIELDS[name]
            return raw[at : at + n * size].view(f"u{size}").tolist()

        rank = field("rank")[0] + 1
        kind = _ELEMENTS[field("elemtype")[0]]
        strides = [TYPES[kind].itemsize, *field("global_stride", rank - 1)]
        return cls(field("global_address")[0], field("global_dim", rank), strides, field("box_dim", rank), kind,
                   _SPAN[field("swizzle_mode")[0]], bool(field("fill_mode")[0]))  # fmt: skip

    @property
    def itemsize(self) -> int:
        return TYPES[self.kind].itemsize

    def nbytes(self, coordinates) -> int:
        rows = len(coordinates) - 1 if len(coordinates) > len(self.box) else 1
        return rows * int(np.prod(self.box)) * self.itemsize

    def unit(self, coordinates) -> int:
        """Bytes that may be moved as one: chunks of 16 where none of them crosses the tensor's edge."""
        edges = (coordinates[0] * self.itemsize, self.shape[0] * self.itemsize, self.box[0] * self.itemsize)
        return _CHUNK if all(edge % _CHUNK == 0 for edge in edges) else self.itemsize

    def places(self, coordinates, unit):
        """(global address, inside the tensor) of each unit of the box, row by row; of four rows with gather4."""
        if len(coordinates) > len(self.box):
            rows = [self.places([coordinates[0], row], unit) for row in coordinates[1:]]
            return tuple(np.concatenate(column) for column in zip(*rows, strict=True))
        per = unit // self.itemsize
        index = np.indices([self.box[0] // per, *self.box[1:]][::-1]).reshape(len(self.box), -1)[::-1]
        position = [index[0] * per + coordinates[0]] + [i + c for i, c in zip(index[1:], coordinates[1:], strict=True)]
        inside = np.ones(index.shape[1], bool)
        address = np.full(index.shape[1], self.address, S64)
        for x, size, stride in zip(position, self.shape, self.strides, strict=True):
            inside &= (x >= 0) & (x < size)
            address += x * stride
        return address, inside


def encoded(address, shape, strides, box, element, swizzle, nan):
    """The 128 bytes of a map, as the host writes it; the innermost dimension last, strides in elements."""
    raw = np.zeros(MAP_BYTES, U8)
    size = TYPES[_ELEMENTS[element]].itemsize
    fields = {"global_address": [address], "global_stride": [s * size for s in strides[-2::-1]],
              "global_dim": shape[::-1], "box_dim": box[::-1], "rank": [len(shape) - 1], "elemtype": [element],
              "swizzle_mode": [swizzle], "fill_mode": [nan]}  # fmt: skip
    for name, entries in fields.items():
        at, nbytes = _FIELDS[name]
        raw[at : at + nbytes * len(entries)].view(f"u{nbytes}")[:] = entries
    return raw


def tensormap(m, pc, i):
    """tensormap.replace writes one field, cp_fenceproxy copies a map from shared to global memory."""
    guard = m.guard(i)
    if "cp_fenceproxy" in i.parts:
        return _publish(m, pc, i)
    if i.parts[1] != "replace":
        raise Unsupported(i)
    start, size = _FIELDS[i.parts[3]]
    index = i.args[1] if len(i.args) == 3 else 0
    if "shared" not in i.parts[4] or not isinstance(index, int):
        raise Unsupported(i)
    address, value = address_of(m, i.args[0], U32, i), m.source(i.args[-1], U64 if size == 8 else U32, i)
    dtype = U64 if size == 8 else U32

    def run(b):
        where = np.broadcast_to(address(b.values), (b.programs, b.threads)) + U32.type(start + index * size)
        access = Access(b, i, where, both(b.mask, guard(b.values)), size, whole_programs=True)
        if access.address.size:
            offset = b.shared.place(access)
            b.shared.check_write(access, offset)
            b.shared.store(access.program, offset, access.gather(value(b.values)).astype(dtype)[:, None])

    return run


def _first_lanes(b, mask):
    """Where the first active lane of each warp is; the whole warp runs the instruction as one."""
    here = np.broadcast_to(True if mask is None else mask, (b.programs, b.threads)).reshape(b.programs, -1, 32)
    first = (here.argmax(-1)[..., None] == np.arange(32)) & here
    return first.reshape(b.programs, b.threads)


def _publish(m, pc, i):
    to, of, guard = address_of(m, i.args[0], U64, i), address_of(m, i.args[1], U32, i), m.guard(i)

    def run(b):
        mask = _first_lanes(b, both(b.mask, guard(b.values)))
        if not mask.any():
            return
        shape = (b.programs, b.threads)
        source = Access(b, i, np.broadcast_to(of(b.values), shape), mask, MAP_BYTES, whole_programs=True)
        offset = b.shared.place(source)
        b.shared.check_read(source, offset)
        words = b.shared.load(source.program, offset, 8, MAP_BYTES // 8)
        b.launch.memory.store(Access(b, i, np.broadcast_to(to(b.values), shape), mask, MAP_BYTES, True), words, pc)

    return run


def fence(m, pc, i):
    """fence.proxy.async: what threads wrote to shared memory becomes visible to wgmma and TMA."""
    if "async" not in [part.split("::")[0] for part in i.parts]:
        return lambda b: None

    def run(b):
        b.shared.fence(None if b.mask is None else b.here().reshape(b.programs, -1, 32).any(-1))

    return run


def bulk(m, pc, i):
    """cp.async.bulk: tensor loads, tensor stores and the groups of these."""
    parts, guard = [part.split("::")[0] for part in i.parts], m.guard(i)
    if "commit_group" in parts:
        return lambda b: b.bulk.commit(both(b.mask, guard(b.values)), (b.programs, b.threads))
    if "wait_group" in parts:
        return _wait(i, guard)
    if "tensor" not in parts or parts[0] != "cp" or "im2col" in parts:
        raise Unsupported(i)
    if "prefetch" in parts:
        return lambda b: None
    return _store(m, pc, i) if parts.index("global") < parts.index("shared") else _load(m, pc, i)


def _wait(i, guard):
    def run(b):
        mask = both(b.mask, guard(b.values))
        for t in b.bulk.wait(mask, i.args[0], (b.programs, b.threads)):
            pieces = t.pieces + (t.program * b.shared.writer.shape[1])[:, None]
            b.shared.finish_async_read(t.program, pieces, (1 << (t.thread >> 5))[:, None])

    return run


class _Request:
    """What a tensor copy names: maps and coordinates, of each thread that issues one."""

    def __init__(self, m, i, where):
        self.i, self.map = i, m.source(where.base, U64, i)
        self.coordinates = [m.source(c, U32, i) for c in where.coordinates]

    def read(self, b, mask, pc):
        """[(program, thread, map, coordinates)]."""
        where = np.broadcast_to(self.map(b.values), (b.programs, b.threads))
        access = Access(b, self.i, where, mask, MAP_BYTES, whole_programs=True)
        if access.address.size == 0:
            return []
        raw = b.launch.memory.load(access, 8, MAP_BYTES // 8, pc).view(U8)
        coordinates = np.stack([access.gather(c(b.values)).view("i4") for c in self.coordinates], 1).tolist()
        return [(int(p), int(t), TensorMap.read(r), c)
                for p, t, r, c in zip(access.program, access.thread, raw, coordinates, strict=True)]  # fmt: skip


def _shared_places(b, i, program, thread, start, nbytes, span):
    """(access, offsets) of the 16-byte chunks of a box in shared memory, in the order of the box."""
    at = swizzled(start + np.arange(0, nbytes, _CHUNK), span)
    access = ListedAccess(b, i, np.full(at.size, program), np.full(at.size, thread), at, _CHUNK)
    return access, b.shared.place(access)


def _check_alignment(b, i, program, thread, start, tensor):
    need = 128 if tensor.span else 16
    one = ListedAccess(b, i, np.array([program]), np.array([thread]), np.array([start - SHARED_BASE]), need)
    one.fail_if("misaligned", f"a TMA box in shared memory must be aligned to {need} bytes", one.address % need != 0)
    bad = sum(n % 16 for n in (tensor.address, *tensor.strides[1:]))
    one.fail_if("misaligned", "TMA needs starts and strides that are multiples of 16 bytes", np.array([bad > 0]))


def _count(b, pc, name, address, inside, unit, nbytes):
    """TMA asks for whole sectors and fills shared memory without conflicts."""
    sectors = len(np.unique(address[inside] >> 5))
    traffic = b.launch.tally.traffic
    traffic[name][pc] += (1, sectors, -(-int(inside.sum()) * unit // 32))
    traffic["shared"][pc] += (1, -(-nbytes // 128), -(-nbytes // 128))


def _load(m, pc, i):
    target, request, guard = address_of(m, i.args[0], U32, i), _Request(m, i, i.args[1]), m.guard(i)
    barrier = address_of(m, i.args[2], U32, i)

    def run(b):
        mask = both(b.mask, guard(b.values))
        shape = (b.programs, b.threads)
        starts, bars = (np.broadcast_to(x(b.values), shape) for x in (target, barrier))
        for program, thread, tensor, coordinates in request.read(b, mask, pc):
            start, bar = int(starts[program, thread]), int(bars[program, thread])
            _check_alignment(b, i, program, thread, start, tensor)
            unit = tensor.unit(coordinates)
            address, inside = tensor.places(coordinates, unit)
            width = min(unit, 8)
            data = np.zeros((address.size, unit), U8)
            if tensor.nan:
                data.reshape(-1, tensor.itemsize)[:] = [0xFF] * (tensor.itemsize - 1) + [0x7F]
            data = data.view(f"u{width}")
            who = np.full(int(inside.sum()), program), np.full(int(inside.sum()), thread)
            origin = ListedAccess(b, i, *who, address[inside], unit)
            data[inside] = b.launch.memory.load(origin, width, unit // width, pc)
            nbytes = tensor.nbytes(coordinates)
            access, offset = _shared_places(b, i, program, thread, start, nbytes, tensor.span)
            b.shared.check_write(access, offset, asynchronous=True)
            one = ListedAccess(b, i, np.array([program]), np.array([thread]), np.array([bar]), 8)
            at = b.shared.place(one)
            check_initialized(b, one, at)
            waited = barrier_at(b, int(at[0]))
            words = np.ascontiguousarray(data).reshape(-1).view(U32).reshape(-1, 4)
            waited.transfers.append(Transfer(access.program, access.thread, offset, words))
            waited.flying[program] += nbytes
            _count(b, pc, "global_loads", address, inside, unit, nbytes)

    return run


def _store(m, pc, i):
    request, source, guard = _Request(m, i, i.args[0]), address_of(m, i.args[1], U32, i), m.guard(i)
    reduces = "reduce" in i.parts

    def run(b):
        starts = np.broadcast_to(source(b.values), (b.programs, b.threads))
        for program, thread, tensor, coordinates in request.read(b, both(b.mask, guard(b.values)), pc):
            start = int(starts[program, thread])
            _check_alignment(b, i, program, thread, start, tensor)
            nbytes = tensor.nbytes(coordinates)
            access, offset = _shared_places(b, i, program, thread, start, nbytes, tensor.span)
            pieces = b.shared.pieces(access.program, offset, _CHUNK)
            b.shared.check_async_read(access, offset, pieces, "TMA")
            local = pieces - program * b.shared.writer.shape[1]
            b.bulk.add(Transfer(access.program, access.thread, offset, pieces=local))
            unit = tensor.itemsize if reduces else tensor.unit(coordinates)
            width = min(unit, 8)
            values = np.ascontiguousarray(b.shared.load(access.program, offset, 8, 2)).reshape(-1).view(f"u{width}")
            address, inside = tensor.places(coordinates, unit)
            who = np.full(int(inside.sum()), program), np.full(int(inside.sum()), thread)
            target, values = ListedAccess(b, i, *who, address[inside], unit), values.reshape(-1, unit // width)[inside]
            if reduces:
                change, t = operation(i.parts, tensor.kind)
                apply_global(b, target, change, [values.view(t)], t, pc)
            else:
                b.launch.memory.store(target, values, pc)
            _count(b, pc, "global_stores", address, inside, unit, nbytes)

    return run
