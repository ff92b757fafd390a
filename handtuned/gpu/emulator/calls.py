"""The two functions that a GPU brings along: `tl.device_print` calls vprintf, `tl.device_assert` __assertfail.

All else is inlined (see inline.py). A call takes its arguments from parameters that `st.param` wrote just before.
vprintf wants the address of a format and that of a block of values, each aligned to its size, which the thread has put
into its local memory: memory that only this thread sees.
"""

import re

import numpy as np

from .access import Access, address_of
from .fault import Unsupported
from .registers import TEXT_BASE, both
from .types import U8, U32, UNSIGNED, type_of

_CONVERSION = re.compile(r"%([-+ 0#]*\d*(?:\.\d+)?)(ll|l)?([diuxXfegp%])")


def set_parameter(m, i):
    """st.param: an argument of the call that follows in the same block."""
    name, value = i.args[0].base, m.source(i.args[1], UNSIGNED[type_of(i.op).itemsize], i)

    def run(b):
        b.arguments[name] = value(b.values)

    return run


def _local(b, m):
    if b.local is None:
        size = sum(-(-size // 16) * 16 for _, size in m.kernel.local)
        b.local = np.zeros((b.programs, b.threads, size), U8)
    return b.local


def store_local(m, i):
    registers = i.args[1] if isinstance(i.args[1], list) else [i.args[1]]
    width = type_of(i.op).itemsize
    address, guard = address_of(m, i.args[0], U32, i), m.guard(i)
    reads = [m.source(r, UNSIGNED[width], i) for r in registers]

    def run(b):
        where = np.broadcast_to(address(b.values), (b.programs, b.threads))
        access = Access(b, i, where, both(b.mask, guard(b.values)), width * len(registers), whole_programs=True)
        words = _local(b, m).view(UNSIGNED[width])
        for j, read in enumerate(reads):
            words[access.program, access.thread, access.address // width + j] = access.gather(read(b.values))

    return run


def load_local(m, i):
    registers = i.args[0] if isinstance(i.args[0], list) else [i.args[0]]
    width = type_of(i.op).itemsize
    address, guard = address_of(m, i.args[1], U32, i), m.guard(i)
    writes = [m.destination(r) for r in registers]
    wide = [UNSIGNED[max(width, m.kernel.width(r) or 0)] for r in registers]

    def run(b):
        mask = both(b.mask, guard(b.values))
        where = np.broadcast_to(address(b.values), (b.programs, b.threads))
        access = Access(b, i, where, mask, width * len(registers), whole_programs=True)
        words = _local(b, m).view(UNSIGNED[width])
        for j, write in enumerate(writes):
            got = words[access.program, access.thread, access.address // width + j]
            write(b, access.scatter(got.astype(wide[j])), mask)

    return run


def call(m, pc, i):
    function, names = next(a for a in i.args if not a.startswith("(")), i.args[-1].strip("()").split(", ")
    if function not in ("vprintf", "__assertfail"):
        raise Unsupported(i)
    guard = m.guard(i)

    def run(b):
        here = b.here() if guard(b.values) is None else b.here() & guard(b.values)
        if not here.any():
            return
        which, values = (np.broadcast_to(b.arguments[name], here.shape) for name in names[:2])
        text = m.kernel.texts[int(which[here][0]) - TEXT_BASE]
        if function == "vprintf":
            _print(b, text, values, here)
        else:
            stop(b, i, here, f"device assertion failed: {text}")

    return run


def stop(b, i, here, message):
    program, thread = np.argwhere(here)[0]
    raise AssertionError(f"{message}\n  in {b.kernel.name}, {i.file}:{i.line}, program {b.ids[program]}, "
                         f"thread {thread}")  # fmt: skip


def _print(b, text, starts, here):
    """One line for all threads of a program that print the same."""
    for p in range(b.programs):
        lines = {}
        for t in np.flatnonzero(here[p]):
            lines.setdefault(_filled(text, b.local[p, t], int(starts[p, t])), []).append(int(t))
        for line, threads in lines.items():
            print(f"program {b.ids[p]}, {_named(threads)}: {line.rstrip()}")


def _named(threads):
    if len(threads) == 1:
        return f"thread {threads[0]}"
    if threads[-1] - threads[0] == len(threads) - 1:
        return f"threads {threads[0]} to {threads[-1]}"
    return f"threads {', '.join(map(str, threads))}"


def _filled(text, local, at):
    """A C format with the values that lie in `local` (bytes) from `at` on."""

    def one(match):
        nonlocal at
        flags, long, kind = match.groups()
        if kind == "%":
            return "%"
        size = 8 if long or kind in "fegp" else 4
        at = -(-at // size) * size
        value = local[at : at + size].view(f"{'f' if kind in 'feg' else 'i' if kind in 'di' else 'u'}{size}")[0].item()
        at += size
        return f"%{flags}{'d' if kind in 'iu' else 'x' if kind == 'p' else kind}" % value

    return _CONVERSION.sub(one, text)
