"""`emulate`: inside it, Triton kernels launched on CPU tensors run as GPU code."""

import contextlib
import inspect
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.overrides import TorchFunctionMode

from ..kernels import runtime
from . import cards
from .emulator.counters import Counters
from .emulator.memory import Unwritten
from .report import source_listing, table


@dataclass
class LaunchRecord:
    """One launch of a kernel.

    Attributes:
        name: of the kernel.
        arch: "sm_90".
        grid: programs in x, y, z.
        sampled: how many of them ran; the counters are theirs.
        warps: of a program.
        shared_bytes: of a program.
        counters: what it did; where tcgen05 is used, every instruction counted once (see `executed`).
        function: the Python function that was compiled.
        ptx: its machine code.
        constants: values of its constexpr arguments.
    """

    name: str
    arch: str
    grid: tuple
    sampled: int
    warps: int
    shared_bytes: int
    counters: Counters
    function: object = field(repr=False)
    ptx: str = field(repr=False)
    constants: dict = field(repr=False)
    metadata: object = field(repr=False)

    @property
    def executed(self) -> bool:
        """False for a kernel with Blackwell's tensor cores: compiled and counted statically only."""
        return "tcgen05." not in self.ptx

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

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

    @property
    def occupancy(self):
        """Programs and warps that one multiprocessor holds at once, and what allows no more (`cards.Occupancy`)."""
        return cards.occupancy(self.arch, 32 * self.warps, self.registers, self.shared_bytes)


class Emulator:
    """What `emulate` gives.

    Attributes:
        arch: "sm_90".
        launches: a LaunchRecord each, in order.
    """

    def __init__(self, arch: str):
        self.arch, self.launches = arch, []

    def _ran(self, launch, src, metadata, sampled, counters):
        constants = {src.fn.arg_names[at[0]]: value for at, value in src.constants.items() if len(at) == 1}
        self.launches.append(
            LaunchRecord(
                metadata.name, self.arch, launch.grid, sampled, metadata.num_warps, metadata.shared,
                counters, src.fn.fn, launch.machine.ptx, constants, metadata,
            )
        )  # fmt: skip

    def counters(self, kernel: str) -> Counters:
        """The sum over all launches of a kernel, lines included."""
        total = Counters()
        for launch in self._of(kernel):
            total.add(launch.counters)
            for place, line in launch.counters.lines.items():
                total.lines.setdefault(place, Counters()).add(line)
        return total

    def _of(self, kernel):
        name = kernel if isinstance(kernel, str) else getattr(kernel, "__name__", None) or kernel.fn.__name__
        found = [launch for launch in self.launches if launch.name == name]
        if not found:
            names = ", ".join(sorted({launch.name for launch in self.launches})) or "none"
            raise ValueError(f"kernel must be one that was launched ({names}), got {name!r}")
        return found

    def source(self, kernel) -> str:
        """The kernel's lines with what each cost beside it.

        Args:
            kernel: its name, or the @triton.jit function.
        """
        launches = self._of(kernel)
        function = launches[0].function
        lines, first = inspect.getsourcelines(function)
        return source_listing(self.counters(launches[0].name), inspect.getsourcefile(function), lines, first)

    def by_kernel(self):
        """name → its launches, in the order of the first ones."""
        groups = defaultdict(list)
        for launch in self.launches:
            groups[launch.name].append(launch)
        return dict(groups)

    def __str__(self):
        return table(self)


_MAKES_EMPTY = {
    torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided,
}  # fmt: skip


class _WatchEmpty(TorchFunctionMode):
    """Fills what torch.empty gives with a pattern, so that a kernel that reads it unwritten is found."""

    def __init__(self, unwritten):
        super().__init__()
        self.unwritten = unwritten

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _MAKES_EMPTY and isinstance(out, torch.Tensor) and not out.is_meta:
            self.unwritten.add(out)
        return out


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

    Raises:
        ValueError: an unknown architecture.
        RuntimeError: another version of Triton; or (at the launch) a kernel decorated under TRITON_INTERPRET=1.
        KernelFault: at a launch, where the kernel does what a GPU would hide.
        triton.OutOfResources: at a launch that needs more shared memory than the card has.
    """
    cards.number(arch)
    from .driver import EmulatedDriver, installed

    unwritten = Unwritten()
    gpu = Emulator(arch)
    before = runtime.emulated_arch, runtime.every_way
    watch = _WatchEmpty(unwritten) if programs is None else contextlib.nullcontext()
    with installed(EmulatedDriver(arch, unwritten, gpu._ran, programs, every_tile)), watch:
        runtime.emulated_arch, runtime.every_way = arch, every_tile
        try:
            yield gpu
        finally:
            runtime.emulated_arch, runtime.every_way = before
