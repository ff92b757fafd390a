"""Launches in the emulator, recorded so that they can run again with their machine code broken in one place."""

import contextlib
import ctypes
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np

from handtuned.gpu import driver, emulate
from handtuned.gpu.emulator.machine import Launch, Machine
from handtuned.gpu.emulator.memory import Global, spans_of, tensors_in_tables
from handtuned.gpu.emulator.parse import Instruction, Kernel


def _bytes(span):
    start, end, _ = span
    return np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))


@dataclass
class Recorded:
    """A launch, the memory before it, and the memory after it."""

    launch: Launch
    tensors: list
    spans: list
    before: list
    after: list

    @property
    def kernel(self) -> Kernel:
        return self.launch.machine.kernel

    def run(self, kernel: Kernel) -> bool:
        """Run it again with another kernel on the memory of then: whether the memory after it is the same.

        Raises:
            KernelFault: as the launch does.
        """
        for span, old in zip(self.spans, self.before, strict=True):
            _bytes(span)[:] = old
        machine, launch = Machine(kernel), self.launch
        memory = Global(self.tensors, launch.memory.unwritten, machine.global_piece)
        Launch(machine, launch.parameters, launch.grid, memory, launch.shared_bytes).run()
        return all(np.array_equal(_bytes(span), new) for span, new in zip(self.spans, self.after, strict=True))


@contextlib.contextmanager
def recorded(arch: str):
    """`emulate(arch)`; gives a list that gets a Recorded for each launch."""
    launches = []

    class Recorder(Launch):
        def run(self):
            tensors = [*self.memory.tensors, *tensors_in_tables(self.memory.tensors)]
            spans = spans_of(tensors, None)
            before = [_bytes(span).copy() for span in spans]
            counters = super().run()
            after = [_bytes(span).copy() for span in spans]
            launches.append(Recorded(self, tensors, spans, before, after))
            return counters

    with mock.patch.object(driver, "Launch", Recorder), emulate(arch):
        yield launches


_WAITS = ("cp.async.wait_group", "cp.async.bulk.wait_group", "wgmma.wait_group")
_MEMORY = ("ld.global", "st.global", "ld.shared", "st.shared", "cp.async", "atom", "red", "ldmatrix", "stmatrix")


def nothing(i: Instruction) -> Instruction:
    """In place of an instruction, one that does nothing."""
    return replace(i, op="bar.warp.sync", args=[-1], guard=None, text=f"(removed: {i.text})")


def _changes(i: Instruction):
    """(what is broken, the instruction in its place)."""
    name = ".".join(i.parts[:3]) if i.parts[0] in ("cp", "wgmma", "fence", "mbarrier") else ".".join(i.parts[:2])
    if i.op.startswith(("bar.sync", "barrier.sync")):
        yield "barrier removed", nothing(i)
    elif i.op.startswith(("fence", "membar", "wgmma.fence")):
        yield "fence removed", nothing(i)
    elif "commit_group" in i.parts:
        yield "commit removed", nothing(i)
    elif i.op.startswith(_WAITS):
        yield "wait removed", nothing(i)
        yield "wait weakened by one group", replace(i, args=[i.args[0] + 1])
    elif i.op.startswith("mbarrier.try_wait"):
        yield "wait removed", nothing(i)
    elif i.op.startswith("mbarrier.arrive"):
        yield "arrival removed", nothing(i)
    if i.op.startswith(_MEMORY) and i.guard:
        yield f"guard removed from {name}", replace(i, guard=None, text=f"(unguarded) {i.text}")
    if i.op.startswith("cp.async.c") and len(i.args) > 3 and isinstance(i.args[3], str):  # zeros for masked threads
        yield "guard removed from cp.async", replace(i, args=i.args[:3], text=f"(unguarded) {i.text}")


def mutants(kernel: Kernel):
    """Yield (what is broken, its instruction, the kernel with it): every barrier, fence, commit, wait and guard."""
    for pc, i in enumerate(kernel.code):
        for what, other in _changes(i):
            yield what, i, replace(kernel, code=[*kernel.code[:pc], other, *kernel.code[pc + 1 :]])
