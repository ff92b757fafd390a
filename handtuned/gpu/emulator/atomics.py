"""Atomics: read, change and write one word with nobody in between.

They are how programs meet each other: a counter says who comes last, a lock who may write. `.acq_rel` makes what a
program wrote before visible to whoever reads the word after it; `.relaxed` only counts. Which thread comes first is
not known on a card; here the threads come in order, so a float sum has one of the orders that a card may choose.
"""

import numpy as np

from .access import Access, address_of, memory_space
from .fault import Unsupported
from .registers import both
from .types import F16, TYPES, U16, U32, U64, UNSIGNED, bf16_to_f32, f32_to_bf16, halves

_INTEGER = {
    "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "min": np.minimum,
    "max": np.maximum, "exch": lambda old, new: new,
}  # fmt: skip


def _wrap_inc(old, limit):
    return np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1))


def _wrap_dec(old, limit):
    return np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))


def _small_floats(fn, kind):
    """On words of one or two 16-bit floats, rounded after each step."""
    if kind.startswith("bf16"):
        one = lambda a, b: f32_to_bf16(fn(bf16_to_f32(a), bf16_to_f32(b)))  # noqa: E731
    else:
        one = lambda a, b: fn(a.view(F16), b.view(F16)).astype(F16).view(U16)  # noqa: E731
    if not kind.endswith("x2"):
        return one
    return lambda a, b: np.ascontiguousarray(one(halves(a), halves(b))).view(U32)


def operation(parts, kind):
    """(function of old words and operands, type of them) of an opcode's parts; cas is handled apart."""
    t, name = TYPES[kind], next(p for p in parts if p in (*_INTEGER, "inc", "dec", "cas"))
    if name == "cas":
        return None, UNSIGNED[t.itemsize]
    if name in ("inc", "dec"):
        return (_wrap_inc if name == "inc" else _wrap_dec), t
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return _small_floats({"add": np.add, "min": np.fmin, "max": np.fmax}[name], kind), t if kind[-1] == "2" else U16
    return _INTEGER[name], t


def _rounds(address):
    """Turns in which no address occurs twice: the number of each entry among those of its address."""
    order = np.argsort(address, kind="stable")
    sorted_ = address[order]
    first = np.r_[True, sorted_[1:] != sorted_[:-1]]
    rank = np.arange(len(order)) - np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    out = np.empty(len(order), np.int64)
    out[order] = rank
    return out


def _apply(view, index, change, operands):
    """Old words (n, count), and the memory changed, one thread after another where they meet."""
    old = np.empty_like(operands[0])
    turn = _rounds(index)
    for r in range(int(turn.max()) + 1):
        mine = turn == r
        at = index[mine]
        old[mine] = view[at]
        if change is None:
            compare, new = operands[0][mine], operands[1][mine]
            view[at] = np.where(old[mine] == compare, new, old[mine])
        else:
            view[at] = change(old[mine], operands[0][mine])
    return old


def atomic(m, pc, i):
    space = memory_space(i)
    if space not in ("shared", "global") or "async" in i.parts:
        raise Unsupported(i)
    change, t = operation(i.parts, i.parts[-1])
    result, where, *operands = i.args if i.parts[0] == "atom" else ("_", *i.args)
    operands = [x if isinstance(x, list) else [x] for x in operands[: 2 if change is None else 1]]
    results = result if isinstance(result, list) else [result]
    results += ["_"] * (len(operands[0]) - len(results))
    word = UNSIGNED[t.itemsize]
    reads, writes = [[m.source(x, word, i) for x in group] for group in operands], [m.destination(r) for r in results]
    wide = [UNSIGNED[max(word.itemsize, m.kernel.width(r) or 0)] for r in results]
    shared, count = space == "shared", len(operands[0])
    address, guard = address_of(m, where, U32 if shared else U64, i), m.guard(i)
    acquires = bool({"acquire", "acq_rel"} & set(i.parts))
    releases = bool({"release", "acq_rel"} & set(i.parts))

    def run(b):
        mask = both(b.mask, guard(b.values))
        at = np.broadcast_to(address(b.values), (b.programs, b.threads))  # each thread counts, at one address too
        access = Access(b, i, at, mask, word.itemsize * count, whole_programs=True)
        if access.address.size == 0:
            return
        b.acted[pc] = access
        values = [np.stack([access.gather(read(b.values)) for read in group], axis=1).view(t) for group in reads]
        if shared:
            old = _shared(b, access, change, values, t)
        else:
            old = apply_global(b, access, change, values, t, pc)
            if acquires or releases:
                b.launch.memory.handovers.note(access, acquires, releases)
        for j, write in enumerate(writes):
            write(b, access.scatter(np.ascontiguousarray(old[:, j]).view(word).astype(wide[j])), mask)
        access.count("shared" if shared else "global_stores", pc)

    return run


def _shared(b, access, change, values, t):
    """Among themselves atomics need no barrier; against plain writes before them they do."""
    offset = b.shared.place(access)
    b.shared.check_read(access, offset)
    view = b.shared.data.reshape(-1).view(t).reshape(-1, values[0].shape[1])
    return _apply(view, (access.program * b.shared.size + offset) // access.nbytes, change, values)


def apply_global(b, access, change, values, t, pc):
    memory = b.launch.memory
    memory.load(access, t.itemsize, values[0].shape[1], pc, atomic=True)  # the checks of a read, and its traffic
    old = np.empty_like(values[0])
    for region, pick in memory.parts(access):
        offset = access.address[pick] - region.first
        view = region.views[t.itemsize].view(t).reshape(-1, old.shape[1])
        index = offset // access.nbytes
        before = view[index].copy()
        old[pick] = _apply(view, index, change, [v[pick] for v in values])
        if (view[index] != before).any():
            memory.version += 1
        else:
            memory.polls += 1
        memory.touch_written(region, offset, access.nbytes, pc)
    return old
