"""Launches in the emulator, recorded so that they can run again with their machine code broken in one place."""

import contextlib
import ctypes
import math
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl

from handtuned.gpu import driver, emulate
from handtuned.gpu.emulator.machine import Launch, Machine
from handtuned.gpu.emulator.memory import Global, Unwritten, spans_of, tensors_in_tables
from handtuned.gpu.emulator.parse import Instruction, Kernel


def _bytes(start, end):
    return np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))


@triton.jit
def reader(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y = x: whoever comes next and reads."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


_GAP = 1 << 20  # bytes around a tensor, so that an access outside it never meets another one by chance


@dataclass
class Recorded:
    """A launch, the memory before it (islands in an arena of our own, and where each was), and the memory after it."""

    launch: Launch
    parameters: dict
    starts: list
    islands: list
    before: list
    after: list = None

    @property
    def kernel(self) -> Kernel:
        return self.launch.machine.kernel

    def run(self, kernel: Kernel) -> bool:
        """Run it again with another kernel on the memory of then: whether the memory after it is as the first time.

        Raises:
            KernelFault: as the launch does.
        """
        for island, old in zip(self.islands, self.before, strict=True):
            island.copy_(old)
        launch = self.launch
        machine = Machine(kernel, launch.machine.copies_need_fence)
        unwritten = _Always(launch.memory.unwritten is not None)
        memory = Global(self.islands, unwritten, machine.global_piece)
        programs = np.arange(math.prod(launch.grid))
        Launch(machine, self.parameters, launch.grid, memory, launch.shared_bytes).run(programs)
        if self.after is None:
            self.after = [island.clone() for island in self.islands]
        return all(torch.equal(island, new) for island, new in zip(self.islands, self.after, strict=True))

    def read(self, tensors, arch: str):
        """Read by another kernel what the last run left of those of these tensors that the launch had.

        Raises:
            KernelFault: some of it was never written.
        """
        for tensor in tensors:
            for start, island in zip(self.starts, self.islands, strict=True):
                offset = tensor.data_ptr() - start
                if 0 <= offset < len(island):
                    at = (island.storage_offset() + offset) // tensor.element_size()
                    left = torch.empty(0, dtype=tensor.dtype)
                    left.set_(island.untyped_storage(), at, tensor.shape, tensor.stride())
                    with emulate(arch):
                        x, y = torch.empty_like(tensor).copy_(left), torch.empty_like(tensor)
                        reader[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)


class _Always(Unwritten):
    """The arena comes from no torch.empty that was watched, but holds what came from some."""

    def __init__(self, holds):
        self._holds = holds

    def holds(self, start):
        return self._holds


def _moved(launch: Launch) -> Recorded:
    """The launch on copies of its tensors. Addresses that stand in tables of addresses move as well."""
    memory = launch.memory
    spans = spans_of([*memory.tensors, *tensors_in_tables(memory.tensors)], None)
    arena = torch.zeros(sum(end - start + 2 * _GAP for start, end, _ in spans) + 128, dtype=torch.uint8)
    at, places, islands = arena.data_ptr() + -arena.data_ptr() % 128 + _GAP, {}, []
    for start, end, _ in spans:
        at += (start - at) % 128  # aligned as the original is
        places[start], offset = at, at - arena.data_ptr()
        islands.append(arena[offset : offset + end - start])
        islands[-1].numpy()[:] = _bytes(start, end)
        at += end - start + _GAP

    def move(address):
        return next((at + address - start for start, at in places.items() for s, end, _ in spans
                     if s == start <= address < end), address)  # fmt: skip

    parameters = {name: bits if bits.dtype != np.uint64 else np.vectorize(move, otypes=[np.uint64])(bits.astype(object))
                  for name, bits in launch.parameters.items()}  # fmt: skip
    for table in memory.tensors:
        if table.dtype == torch.int64 and table.data_ptr() in places and table.is_contiguous():
            copy = islands[[start for start, _, _ in spans].index(table.data_ptr())]
            copy.view(torch.int64)[: table.numel()] = torch.tensor([move(a) for a in table.flatten().tolist()])
    return Recorded(launch, parameters, list(places), islands, [island.clone() for island in islands])


@contextlib.contextmanager
def recorded(arch: str):
    """`emulate(arch)`; gives a list that gets a Recorded for each launch, which has run once more by then."""
    launches = []

    class Recorder(Launch):
        def run(self, ids):
            again = _moved(self)
            counters = super().run(ids)
            again.run(again.kernel)
            launches.append(again)
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
    elif i.op.startswith("mbarrier.try_wait"):  # the answer is yes
        yield "wait removed", replace(i, op="setp.eq.s32", args=[i.args[0], 0, 0], text=f"(removed: {i.text})")
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
