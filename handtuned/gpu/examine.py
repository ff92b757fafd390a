"""The X-ray: an operation is called in the emulator, and what it launched is described."""

import os
import warnings
from dataclasses import dataclass

from ..kernels.runtime import HAS_TRITON, INTERPRETED
from .cards import number
from .operations import Operation, Size
from .session import LaunchRecord, emulate

WHOLE = Size(128, 512, 512, 16, 2**17)  # at which every program is executed in a second or two


@dataclass(frozen=True)
class Xray:
    """What one operation launches on one architecture at one size (one tile, where its kernel is tuned).

    `error` is set, and the rest empty, where it does not compile or does not fit on the card.
    """

    operation: Operation
    arch: str
    size: Size
    launches: tuple[LaunchRecord, ...] = ()
    error: str = ""

    @property
    def name(self) -> str:
        tuned = self.operation.tuned and self.launches
        return f"{self.operation.name[:-1]}, {self.launches[0].tile}]" if tuned else self.operation.name

    @property
    def spill_bytes(self) -> int:
        return max((launch.spill_bytes for launch in self.launches), default=0)

    @property
    def whole(self) -> bool:
        """Whether every program was."""
        return all(launch.sampled == launch.programs for launch in self.launches)


def examine(operation: Operation, arch: str, size: Size, programs: int | None = None,
            every_tile: bool = False) -> list[Xray]:  # fmt: skip
    """Call an operation in the emulator; what it launches is one X-ray, or with `every_tile` (that fits) one for each.

    `programs`: how many of each launch to execute; None: all; 0: none.

    ValueError: an unknown architecture, no Triton, or a process where HANDTUNED_BACKEND or TRITON_INTERPRET decides
    where kernels run.
    """
    if not HAS_TRITON:
        raise ValueError("xray needs Triton, which is not installed")
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, so the kernels of this process are interpreted and cannot be "
                         "compiled; run xray in a process without it: TRITON_INTERPRET=0 handtuned xray")  # fmt: skip
    if os.environ.get("HANDTUNED_BACKEND"):
        raise ValueError("HANDTUNED_BACKEND is set, which decides where kernels run; xray needs it unset")
    number(arch)
    call = operation.prepare(size)
    try:
        with warnings.catch_warnings(), emulate(arch, programs, every_tile and operation.tuned) as gpu:
            warnings.simplefilter("ignore")  # that sm_100's tensor cores are not emulated stands in the report
            call()
        for launch in gpu.launches:
            launch.counters.lines.clear()
            _ = launch.code  # assembled here, as an error of ptxas is one of the operation
    except Exception as error:
        # Triton raises whatever its passes raise; one kernel that an old chip cannot run must not hide the others.
        lines = [line for line in str(error).splitlines() if line.strip()]
        return [Xray(operation, arch, size, error=f"{type(error).__name__}: {lines[-1] if lines else ''}")]
    if operation.tuned:
        tiles = {launch.tile: launch for launch in gpu.launches}  # the one that was chosen is launched once more
        return [Xray(operation, arch, size, (launch,)) for launch in tiles.values()]
    return [Xray(operation, arch, size, tuple(gpu.launches))]
