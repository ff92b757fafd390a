"""`emulate`: inside it, or in a whole process, Triton kernels launched on CPU tensors run as GPU code."""

import atexit
import contextlib
import inspect
import math
import os
import threading
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels import runtime
from . import cards
from .emulator.counters import Counters
from .emulator.memory import Unwritten
from .emulator.parse import parse
from .machine_code import MachineCode, read_machine_code
from .report import source_listing, table


@dataclass
class LaunchRecord:
    """One launch of a kernel."""

    name: str
    arch: str  # "sm_90"
    grid: tuple  # programs in x, y, z
    sampled: int  # how many of them ran; the counters are theirs
    warps: int  # of a program, as are the bytes
    shared_bytes: int
    counters: Counters  # what it did; where tcgen05 is used, every instruction counted once (see `executed`)
    function: object = field(repr=False)  # of Python, that was compiled
    ptx: str = field(repr=False)
    constants: dict = field(repr=False)  # values of its constexpr arguments
    metadata: object = field(repr=False)

    @property
    def executed(self) -> bool:
        """False for a kernel with Blackwell's tensor cores: compiled and counted statically only."""
        return "tcgen05." not in self.ptx

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def threads(self) -> int:
        """Of a program."""
        return 32 * self.warps

    @property
    def scale(self) -> float:
        """The launch is so many times what ran and was counted; 0: nothing ran."""
        return self.programs / self.sampled if self.sampled else 0.0

    @property
    def tile(self) -> str:
        """Of a tuned product's kernel: "128 x 256, 8 warps, 3 stages"."""
        rows, columns = (self.constants[f"BLOCK_{side}"] for side in "MN")
        return f"{rows} x {columns}, {self.warps} warps, {self.metadata.num_stages} stages"

    @cached_property
    def code(self) -> MachineCode:
        return read_machine_code(self.sass)

    @cached_property
    def ptx_instructions(self) -> int:
        """Static count, as `code.instructions` is that of the machine code."""
        return len(parse(self.ptx).code)

    @property
    def warp_instructions(self) -> float:
        """Machine instructions of all warps: PTX instructions executed, in the proportion of the static counts."""
        return self.counters.warp_instructions * self.scale * self.code.instructions / self.ptx_instructions

    @cached_property
    def _assigned(self):
        from .driver import assembled

        return assembled(self.ptx, self.metadata)

    @property
    def registers(self) -> int:
        """Of a thread; asks ptxas when it is first read (seconds)."""
        return self._assigned[0]

    @property
    def spill_bytes(self) -> int:
        """Of a thread: what did not fit into registers."""
        return self._assigned[1]

    @property
    def sass(self) -> str:
        """The disassembly."""
        return self._assigned[2]

    @cached_property
    def occupancy(self):
        """Programs and warps that one multiprocessor holds at once, and what allows no more (`cards.Occupancy`)."""
        return cards.occupancy(self.arch, self.threads, self.registers, self.shared_bytes)


class Emulator:
    """What `emulate` gives: `launches`, a LaunchRecord each, in order; `arch`, "sm_90"."""

    def __init__(self, arch: str):
        self.arch, self.launches = arch, []

    def _ran(self, launch, src, metadata, sampled, counters):
        constants = {src.fn.arg_names[at[0]]: value for at, value in src.constants.items() if len(at) == 1}
        made = metadata.name, self.arch, launch.grid, sampled, metadata.num_warps, metadata.shared, counters
        self.launches.append(LaunchRecord(*made, src.fn.fn, launch.machine.ptx, constants, metadata))

    def counters(self, kernel: str) -> Counters:
        """The sum over all launches of a kernel, lines included."""
        total = Counters()
        for launch in self.of_kernel(kernel):
            total.add(launch.counters)
            for place, line in launch.counters.lines.items():
                total.lines.setdefault(place, Counters()).add(line)
        return total

    def of_kernel(self, kernel) -> list[LaunchRecord]:
        """The launches of a kernel, given by its name or as the @triton.jit function."""
        name = kernel if isinstance(kernel, str) else getattr(kernel, "__name__", None) or kernel.fn.__name__
        found = [launch for launch in self.launches if launch.name == name]
        if not found:
            names = ", ".join(sorted({launch.name for launch in self.launches})) or "none"
            raise ValueError(f"kernel must be one that was launched ({names}), got {name!r}")
        return found

    def source(self, kernel) -> str:
        """The kernel's lines with what each cost beside it; `kernel`: its name, or the @triton.jit function."""
        function = self.of_kernel(kernel)[0].function
        return source_listing(self.counters(kernel), inspect.getsourcefile(function), *inspect.getsourcelines(function))

    def __str__(self):
        return table(self)


class _WatchEmpty(TorchDispatchMode):
    """Fills what torch.empty gives, in backward too, with a pattern, so that a kernel that reads it unwritten is found.
    """

    def __init__(self, unwritten):
        super().__init__()
        self.unwritten = unwritten

    @classmethod
    def is_infra_mode(cls):
        return True  # torch.compile works inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        makes_empty = "empty" in func.overloadpacket.__name__
        if makes_empty and type(out) is torch.Tensor and not out.is_meta:  # a FakeTensor has no memory
            self.unwritten.add(out)
        return out


# Triton has one driver in a process: emulators of several threads at once would leave it in each other's state.
_gate = threading.RLock()


@contextlib.contextmanager
def emulate(arch: str = "sm_90", programs: int | None = None, every_tile: bool = False):
    """Run Triton kernels on CPU tensors as machine code of `arch`.

    Every launch inside is specialized, compiled and checked as on a card, executed, and counted.

    Args:
        arch: "sm_75", "sm_80", "sm_86", "sm_89", "sm_90" or "sm_120"; "sm_100" without its tensor cores.
        programs: execute no more than so many programs of each launch, which is enough to count a large one, but
            leaves holes in what it writes (they may be read). 0: only compile and check what it needs.
        every_tile: launch all configurations of a tuned kernel that fit, instead of one.

    Yields:
        Emulator: its `launches`, `print(gpu)`, `gpu.source(kernel)`.

    ValueError: an unknown architecture.
    RuntimeError: another version of Triton; another thread is inside; or (at the launch) a kernel decorated under
        TRITON_INTERPRET=1.
    KernelFault: at a launch, where the kernel does what a GPU would hide.
    triton.OutOfResources: at a launch that needs more shared memory than the card has.
    """
    if not _gate.acquire(blocking=False):
        raise RuntimeError("another thread has entered emulate, and a process holds one emulator at a time; launches "
                           "of this thread run in that one as well")  # fmt: skip
    try:
        with _emulated(arch, programs, every_tile) as gpu:
            yield gpu
    finally:
        _gate.release()


@contextlib.contextmanager
def _emulated(arch, programs=None, every_tile=False):
    cards.number(arch)
    from .driver import EmulatedDriver, installed

    unwritten, gpu = Unwritten(), Emulator(arch)
    before = runtime.emulated_arch, runtime.every_way
    watch = _WatchEmpty(unwritten) if programs is None else contextlib.nullcontext()
    with installed(EmulatedDriver(arch, unwritten, gpu._ran, programs, every_tile)), watch:
        runtime.emulated_arch, runtime.every_way = arch, every_tile
        try:
            yield gpu
        finally:
            runtime.emulated_arch, runtime.every_way = before


_stack = contextlib.ExitStack()
_gpu: Emulator | None = None


def emulate_process(arch: str | None = None) -> Emulator:
    """Emulate `arch` (default: what HANDTUNED_BACKEND says) until the process ends; a second call gives the same."""
    global _gpu
    if _gpu is None:
        # Past the gate: no thread leaves it before the end, so that each may enter another.
        _gpu = _stack.enter_context(_emulated(arch or os.environ["HANDTUNED_BACKEND"]))
        atexit.register(_stack.close)
    return _gpu
