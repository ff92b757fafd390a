"""The scheduler: which threads run next, where a branch sends them, who waits for whom.

Code between two labels or branches (a block) runs straight through. At its end stands one of a few instructions that
decide how it goes on: a branch, a return, a barrier, a question to an mbarrier.

Nobody can run and somebody waits: that is a deadlock.
"""

import numpy as np

from .calls import stop
from .fault import KernelFault, Unsupported
from .readers import settle
from .registers import Undefined, UndefinedRead
from .types import U32

ENDS_BLOCK = ("bra", "ret", "exit", "bar", "barrier", "trap")
_SLICE = 512  # blocks that a batch runs before others get their turn: one may wait for what another writes
_QUESTIONS = 8  # and fewer, if it asks memory again and again for a value that is not there
_LONG = 8 * _SLICE  # blocks, after which a batch is watched: it may go round in a circle
_PATIENCE = 20  # turns of each batch in which it asked memory for a value that nobody wrote


def ends_block(i) -> bool:
    base = i.parts[0]
    if base in ("bar", "barrier"):
        return "warp" not in i.parts
    return base in ENDS_BLOCK or i.op.startswith("mbarrier.try_wait")


def terminator(m, pc, i):
    """A function of a batch that sends its threads on; it gives the parts that split off, or False if none can run."""
    base = i.parts[0]
    if base == "bra":
        return _branch(m, pc, i)
    if base in ("ret", "exit"):
        return _return(m, pc, i)
    if base == "trap":
        return _trap(m, pc, i)
    if base == "mbarrier":
        from .mbarrier import try_wait

        return try_wait(m, pc, i)
    return _barrier(m, pc, i)


def _branch(m, pc, i):
    target, after, guard = m.kernel.labels[i.args[0]], pc + 1, m.guard(i)

    def run(b):
        taken = guard(b.values)
        if taken is None:
            return b.go(target)
        if b.mask is None:
            if taken.all():
                return b.go(target)
            if not taken.any():
                return b.go(after)
        here = b.here()
        there, stay = here & taken, here & ~taken
        leave, remain = there.any(1), stay.any(1)
        if leave.any() and remain.any() and not (leave & remain).any():
            first, second = b.select(np.flatnonzero(~leave)), b.select(np.flatnonzero(leave))
            first.go(after)
            second.go(target)
            return [first, second]  # straight on comes first: who goes back may be waiting for it
        torn = there.reshape(-1, 32).any(-1) & stay.reshape(-1, 32).any(-1)
        b.launch.tally.divergent[pc] += int(torn.sum())
        b.send(target, there)
        b.send(after, stay)
        return b.next_path()

    return run


def _return(m, pc, i):
    guard = m.guard(i)

    def run(b):
        leave = guard(b.values)
        if leave is None and b.mask is None:
            return False
        b.ended = True
        if leave is not None:
            b.send(pc + 1, b.here() & ~leave)
        return b.next_path()

    return run


def _trap(m, pc, i):
    guard = m.guard(i)

    def run(b):
        hit = b.here() if guard(b.values) is None else b.here() & guard(b.values)
        if hit.any():
            stop(b, i, hit, "device assertion failed")
        return b.go(pc + 1)

    return run


def _barrier(m, pc, i):
    """bar.sync name[, threads]: wait until so many threads (or all) have come; bar.arrive: come, do not wait."""
    if "red" in i.parts:
        raise Unsupported(i)
    wait, guard = "arrive" not in i.parts, m.guard(i)
    name = m.source(i.args[0], U32, i)
    count = m.source(i.args[1], U32, i) if len(i.args) > 1 else None

    def run(b):
        mask = guard(b.values)
        expected = b.threads if count is None else count(b.values).max()
        if b.mask is None and mask is None and expected == b.threads and name(b.values).size == 1 and not b.arrived:
            b.launch.tally.barriers[pc] += b.programs
            b.order.meet_all()
            b.pc = pc + 1
            return True
        here = b.here()
        if mask is not None:
            b.send(pc + 1, here & ~mask)
            here = here & mask
        names = np.broadcast_to(name(b.values), here.shape)
        for each in np.unique(names[here]):
            _come(b, pc, int(each), here & (names == each), int(expected), wait)
        return b.next_path()

    return run


def _come(b, pc, name, here, expected, wait):
    """Threads `here` come to barrier `name`; where enough have, they go on."""
    if wait:
        b.at_barrier.setdefault(name, []).append((pc + 1, here))
    else:
        b.send(pc + 1, here)
    arrived = b.arrived.get(name, False) | here
    full = arrived.sum(1) >= expected
    for program in np.flatnonzero(full):
        warps = np.unique(np.flatnonzero(arrived[program]) >> 5)
        if len(warps) == b.threads // 32:
            b.order.meet_all([program])
        else:
            b.order.meet(program, warps)
        b.launch.tally.barriers[pc] += 1
    b.arrived[name] = arrived & ~full[:, None]
    if not b.arrived[name].any():
        del b.arrived[name]
    still = []
    for resume, waiting in b.at_barrier.pop(name, []):
        b.send(resume, waiting & full[:, None])
        if (waiting & ~full[:, None]).any():
            still.append((resume, waiting & ~full[:, None]))
    if still:
        b.at_barrier[name] = still


def _deadlock(b, code):
    """Nobody of the batch can run: say who waits."""
    for name, waiting in b.at_barrier.items():
        resume, mask = waiting[0]
        program, thread = np.argwhere(mask)[0]
        n = sum(int(m[program].sum()) for _, m in waiting)
        raise KernelFault("deadlock", f"{n} of {b.threads} threads wait at barrier {name} for others that never come",
                          code[resume - 1], b.kernel.name, int(b.ids[program]), int(thread))  # fmt: skip
    for pc, mask in b.polling.items():
        program, thread = np.argwhere(mask)[0]
        raise KernelFault("deadlock", "threads wait for an mbarrier that nobody completes", code[pc], b.kernel.name,
                          int(b.ids[program]), int(thread))  # fmt: skip


def _advance(b, machine):
    """Run one block; gives what its terminator gave."""
    start = b.pc
    block = machine.blocks[start]
    machine_runs = b.launch.block_runs
    machine_runs[start] = machine_runs.get(start, 0) + b.active_warps()
    pc = start
    try:
        for step in block.steps:
            step(b)
            pc += 1
        b.steps += 1
        return block.end(b) if block.end else b.go(block.after)
    except UndefinedRead:
        raise KernelFault("never written", "a register is used that no instruction wrote", machine.kernel.code[pc],
                          b.kernel.name, int(b.ids[0]), int(b.here()[0].argmax())) from None  # fmt: skip


def _alike(a, b):
    if a is b or not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return a is b or (type(a) is type(b) and not isinstance(a, Undefined) and a == b)
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def run_batch(b, machine, memory):
    """Run until the batch ends (gives []), splits (its parts) or has had its turn ([itself])."""
    asked, start = memory.polls, list(b.state()) if b.steps > _LONG else None
    for turn in range(_SLICE):
        if memory.polls > asked + _QUESTIONS:
            break
        if start and turn and all(map(_alike, b.state(), start)):  # it has come round and learnt nothing
            memory.polls += 1
            break
        went = _advance(b, machine)
        if isinstance(went, list):
            return went
        if went:
            continue
        if b.polling and b.moved:  # ask again: something has happened since
            b.moved = False
            for pc, mask in b.polling.items():
                b.send(pc, mask)
            b.polling = {}
            b.next_path()
            continue
        if b.polling or b.at_barrier:
            _deadlock(b, machine.kernel.code)
        settle(b)
        return []
    return [b]


def run_all(batches, machine, memory):
    """Run batches (an iterable that makes each when it is first needed) in turns until all have ended."""
    waiting, source = [], iter(batches)
    quiet, seen = 0, (memory.version, memory.polls)
    while True:
        b = waiting.pop(0) if waiting else next(source, None)
        if b is None:
            return
        parts = run_batch(b, machine, memory)
        if parts == [b]:  # its turn is over: start another program before it goes on, it may be waited for
            fresh = next(source, None)
            waiting += [*([fresh] if fresh else []), b]
            only_asked = memory.version == seen[0] and memory.polls > seen[1]
            quiet, seen = quiet + 1 if only_asked else 0, (memory.version, memory.polls)
            if quiet > _PATIENCE * len(waiting):
                here = next(i for i in machine.kernel.code[b.pc :] if i.line or i is machine.kernel.code[-1])
                raise KernelFault("deadlock", "programs wait for a value in memory that nobody writes", here,
                                  b.kernel.name, int(b.ids[0]), int(b.here()[0].argmax()))  # fmt: skip
        else:
            waiting = parts + waiting
            quiet = 0 if not parts else quiet
