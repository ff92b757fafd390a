"""A warp: 32 threads that run one instruction together and can see each other's registers.

`shfl` hands a register from lane to lane without memory, `redux` adds or compares over the warp, `vote` asks all
lanes a yes-or-no question, `elect` picks one of them. All lanes that the instruction names must take part: one that
went another way is waited for in vain.
"""

import numpy as np

from .fault import KernelFault, Unsupported
from .registers import both
from .types import F32, PRED, S64, U32, U64, type_of

_LANES = np.arange(32)


def by_warp(b, value):
    """[P, warps, 32] of a register."""
    return np.broadcast_to(value, (b.programs, b.threads)).reshape(b.programs, -1, 32)


def by_thread(b, value):
    """[P, warps, 32 or 1] → [P, T]."""
    value = np.broadcast_to(value, (b.programs, b.threads // 32, 32))
    return np.ascontiguousarray(value).reshape(b.programs, b.threads)


def all_lanes_here(b, i, members=0xFFFFFFFF):
    """Error where some, but not all lanes that the instruction names have come."""
    if b.mask is None:
        return
    here, named = by_warp(b, b.mask), (members >> _LANES & 1).astype(bool)
    missing = here.any(-1) & (named & ~here).any(-1)
    if missing.any():
        program, warp = np.argwhere(missing)[0]
        thread = int(warp) * 32 + int((named & ~here[program, warp]).argmax())
        raise KernelFault("deadlock", "a warp waits for a thread that went another way", i, b.kernel.name,
                          int(b.ids[program]), thread)  # fmt: skip


def _members(i, operand):
    return operand & 0xFFFFFFFF if isinstance(operand, int) else 0


def _sources(mode, lane, clamp):
    """shfl: (lane read by each lane, whether it is in range); lane and clamp broadcast to [.., 32]."""
    lane = lane & 31  # the other bits do not count
    segment = (clamp >> 8) & 31
    lowest = _LANES & segment
    highest = lowest | (clamp & 31 & ~segment)
    if mode == "up":
        source = _LANES - lane
        inside = source >= np.broadcast_to(highest, source.shape)
    else:
        source = {"down": _LANES + lane, "bfly": _LANES ^ lane, "idx": lowest | (lane & ~segment)}[mode]
        inside = source <= np.broadcast_to(highest, source.shape)
    return np.where(inside, source, _LANES), inside


def shuffle(m, pc, i):
    mode = i.parts[2]
    name, in_range = i.args[0] if isinstance(i.args[0], tuple) else (i.args[0], "_")
    value, lane, clamp = (m.source(operand, U32, i) for operand in i.args[1:4])
    write, write_range, guard = m.destination(name), m.destination(in_range), m.guard(i)
    members = _members(i, i.args[4])
    constant = isinstance(i.args[2], int) and isinstance(i.args[3], int)
    fixed = _sources(mode, np.array(i.args[2]), np.array(i.args[3])) if constant else None

    def run(b):
        mask = both(b.mask, guard(b.values))
        all_lanes_here(b, i, members)
        v = value(b.values)
        if constant:
            source, inside = fixed
            if v.shape[1] > 1:
                v = v.reshape(v.shape[0], -1, 32)[:, :, source].reshape(v.shape)
            inside = np.tile(inside, b.threads // 32)[None]
        else:
            source, inside = _sources(mode, by_warp(b, lane(b.values)).astype(S64),
                                      by_warp(b, clamp(b.values)).astype(S64))  # fmt: skip
            v = np.take_along_axis(by_warp(b, v), source, 2).reshape(b.programs, b.threads)
            inside = by_thread(b, inside)
        write(b, v, mask)
        write_range(b, inside, mask)

    return run


_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def reduce(m, pc, i):
    """redux.sync.max.s32, and on Blackwell of f32 (.abs, .NaN)."""
    t, fn = type_of(i.op), _REDUCTIONS[i.parts[2]]
    if t == F32 and "NaN" not in i.parts:
        fn = {"min": np.fmin, "max": np.fmax}[i.parts[2]]
    value, write, members = m.source(i.args[1], t, i), m.destination(i.args[0]), _members(i, i.args[2])

    def run(b):
        all_lanes_here(b, i, members)
        v = by_warp(b, value(b.values))
        v = np.abs(v) if "abs" in i.parts else v
        write(b, by_thread(b, fn.reduce(v, axis=2, keepdims=True, dtype=v.dtype)), b.mask)

    return run


def vote(m, pc, i):
    mode = i.parts[2]
    value, write, members = m.source(i.args[1], PRED, i), m.destination(i.args[0]), _members(i, i.args[2])

    def run(b):
        all_lanes_here(b, i, members)
        v, here = by_warp(b, value(b.values)), by_warp(b, True if b.mask is None else b.mask)
        if mode == "ballot":
            out = ((v & here).astype(U64) << _LANES.astype(U64)).sum(-1, keepdims=True).astype(U32)
        elif mode == "uni":
            out = (v | ~here).all(-1, keepdims=True) | (~v | ~here).all(-1, keepdims=True)
        else:
            out = (v & here).any(-1, keepdims=True) if mode == "any" else (v | ~here).all(-1, keepdims=True)
        write(b, by_thread(b, out), b.mask)

    return run


def elect(m, pc, i):
    """One lane of the warp, the first that is here, is told that it is the one."""
    lane, chosen = (m.destination(name) for name in i.args[0])
    first = (_LANES == 0)[None, None]

    def run(b):
        if b.mask is None:
            winner = np.tile(first[0], b.threads // 32)
            number = np.zeros((1, 1), U32)
        else:
            here = by_warp(b, b.mask)
            at = here.argmax(-1)[..., None]
            winner, number = by_thread(b, (at == _LANES) & here), by_thread(b, at.astype(U32))
        lane(b, number, b.mask)
        chosen(b, winner, b.mask)

    return run


def active(m, pc, i):
    write = m.destination(i.args[0])

    def run(b):
        here = by_warp(b, True if b.mask is None else b.mask)
        bits = (here.astype(U64) << _LANES.astype(U64)).sum(-1, keepdims=True).astype(U32)
        write(b, by_thread(b, bits), b.mask)

    return run


def match(m, pc, i):
    """match.any: which lanes hold the same value as I do."""
    if "any" not in i.parts:
        raise Unsupported(i)
    value, write = m.source(i.args[1], type_of(i.op), i), m.destination(i.args[0])

    def run(b):
        all_lanes_here(b, i, _members(i, i.args[2]))
        v = by_warp(b, value(b.values))
        same = (v[..., :, None] == v[..., None, :]).astype(U64)
        write(b, by_thread(b, (same << _LANES.astype(U64)).sum(-1).astype(U32)), b.mask)

    return run
