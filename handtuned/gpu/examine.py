"""The X-ray: an operation is called in the emulator, and what it launched is described."""

import os
import warnings
from dataclasses import dataclass, field

from ..kernels.runtime import HAS_TRITON, INTERPRETED
from .cards import Occupancy, number
from .emulator.counters import Counters
from .emulator.parse import parse
from .machine_code import MachineCode, read_machine_code
from .operations import Operation, Size
from .session import LaunchRecord, emulate

WHOLE = Size(128, 512, 512, 16, 2**17)  # at which every program is executed in a second or two


@dataclass(frozen=True)
class Launched:
    """One kernel of a call.

    Attributes:
        tile: of a tuned kernel, "128 x 256, 8 warps, 3 stages"; else "".
        registers, spill_bytes: of a thread.
        shared_bytes, threads: of a program.
        executed: how many programs were; none of a kernel with the tensor cores of sm_100.
        counters: of the programs executed; `scale` times that is the launch.
        ptx_instructions: static count, as `code.instructions` is that of the machine code.
    """

    kernel: str
    tile: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    programs: int
    executed: int
    occupancy: Occupancy
    counters: Counters
    code: MachineCode
    ptx_instructions: int
    sass: str = field(repr=False)

    @property
    def scale(self) -> float:
        return self.programs / self.executed if self.executed else 0.0

    @property
    def warp_instructions(self) -> float:
        """Machine instructions of all warps: PTX instructions executed, in the proportion of the static counts."""
        return self.counters.warp_instructions * self.scale * self.code.instructions / self.ptx_instructions


@dataclass(frozen=True)
class Xray:
    """What one operation launches on one architecture at one size (one tile, where its kernel is tuned).

    `error` is set, and the rest empty, where it does not compile or does not fit on the card.
    """

    operation: Operation
    arch: str
    size: Size
    launches: tuple[Launched, ...] = ()
    error: str = ""

    @property
    def name(self) -> str:
        tile = self.launches[0].tile if self.launches else ""
        return f"{self.operation.name[:-1]}, {tile}]" if tile else self.operation.name

    @property
    def spill_bytes(self) -> int:
        return max((launch.spill_bytes for launch in self.launches), default=0)

    @property
    def executed(self) -> bool:
        return all(launch.executed for launch in self.launches)

    @property
    def whole(self) -> bool:
        """Whether every program was."""
        return all(launch.executed == launch.programs for launch in self.launches)


def _described(launch: LaunchRecord, tuned: bool) -> Launched:
    launch.counters.lines.clear()
    blocks, tile = launch.constants, ""
    if tuned:
        tile = f"{blocks['BLOCK_M']} x {blocks['BLOCK_N']}, {launch.warps} warps, {launch.metadata.num_stages} stages"
    return Launched(
        launch.name, tile, launch.registers, launch.spill_bytes, launch.shared_bytes, 32 * launch.warps,
        launch.programs, launch.sampled, launch.occupancy, launch.counters, read_machine_code(launch.sass),
        len(parse(launch.ptx).code), launch.sass,
    )  # fmt: skip


def examine(
    operation: Operation, arch: str, size: Size, programs: int | None = None, every_tile: bool = False
) -> list[Xray]:
    """Call an operation in the emulator and describe what it launches.

    Args:
        arch: of `cards.ARCHS`.
        programs: of each launch to execute; None: all; 0: none.
        every_tile: each tile of a tuned kernel that fits, not the first alone.

    Returns:
        One, or one for each tile.

    Raises:
        RuntimeError: without Triton, or in a process where kernels are interpreted or references are forced.
        ValueError: unknown architecture.
    """
    if not HAS_TRITON:
        raise RuntimeError("xray needs Triton, which is not installed")
    if INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET is set, so the kernels of this process are interpreted and cannot be compiled; "
            "run xray in a process without it: TRITON_INTERPRET=0 handtuned xray"
        )
    if os.environ.get("HANDTUNED_BACKEND"):
        raise RuntimeError("HANDTUNED_BACKEND is set, which decides where kernels run; xray needs it unset")
    number(arch)
    call = operation.prepare(size)
    try:
        with warnings.catch_warnings(), emulate(arch, programs, every_tile and operation.tuned) as gpu:
            warnings.simplefilter("ignore")  # that sm_100's tensor cores are not emulated stands in the report
            call()
        launches = [_described(launch, operation.tuned) for launch in gpu.launches]
    except Exception as error:
        # Triton raises whatever its passes raise; one kernel that an old chip cannot run must not hide the others.
        lines = [line for line in str(error).splitlines() if line.strip()]
        return [Xray(operation, arch, size, error=f"{type(error).__name__}: {lines[-1] if lines else ''}")]
    if operation.tuned:
        tiles = {launch.tile: launch for launch in launches}  # the one that was chosen is launched once more
        return [Xray(operation, arch, size, (launch,)) for launch in tiles.values()]
    return [Xray(operation, arch, size, tuple(launches))]
