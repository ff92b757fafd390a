"""The emulator for lessons: a reader's kernel as machine code of a card that is not here, its faults and its counts.

A lesson decorates kernels under TRITON_INTERPRET=1, and then neither they nor Triton's own library (tl.sum, …) can be
compiled in that process. So each gets a twin, decorated anew; while `emulated` lasts, the twins stand in their places.
"""

import contextlib
import os
import sys
import types

from ..kernels.runtime import HAS_TRITON, INTERPRETED
from .arguments import grid_of
from .exercise import WrongAnswer
from .guards import untuned
from .places import told

FAULTS = {
    "race": "Programs run in any order and at the same time: what one of them writes, no other may read or write in "
    "the same launch, unless by an atomic.",
    "another warp": "The warps of a program run each at its own pace, and a block of fewer elements than they have "
    "threads (128, if num_warps does not say otherwise) lies in several of them at once. Take a larger block or "
    "num_warps=1, or write into another tensor.",
    "conflicting writes": "Programs run in any order, so whoever comes last wins: let only one of them write there.",
    "out of bounds": "Mask what hangs over.",
    "never written": "Memory of torch.empty holds anything. A load with a mask needs other=… where its value is used.",
}


def arch_of(card: str) -> str:
    """ "sm_80" of "A100".

    Raises:
        ValueError: neither a card nor an architecture that is known.
    """
    from ..gpu import cards

    known = {gpu.name: gpu.arch for gpu in cards.GPUS} | {arch: arch for arch in cards.ARCHS}
    if card not in known:
        raise ValueError(f"card must be one of {', '.join(known)}, got {card!r}")
    return known[card]


@contextlib.contextmanager
def emulated(card: str = "A100"):
    """`handtuned.gpu.emulate` for the kernels of a lesson, interpreted or not.

    Args:
        card: "T4", "A100", "L4", "RTX 4090", "H100", "H200", "B200" or an architecture, "sm_80".

    Yields:
        handtuned.gpu.Emulator: `print(gpu)`, `gpu.source(kernel)`, `gpu.launches`.
    """
    from ..gpu import emulate

    arch, forced = arch_of(card), os.environ.pop("HANDTUNED_BACKEND", None)  # or the library would run its references
    try:
        with emulate(arch) as gpu, untuned(), _twins() if INTERPRETED else contextlib.nullcontext():
            yield gpu
    finally:
        if forced is not None:
            os.environ["HANDTUNED_BACKEND"] = forced


@contextlib.contextmanager
def _twins():
    """Inside, whatever was decorated for the interpreter is compiled."""
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    made = {}

    def twin(value):
        if not isinstance(value, InterpretedFunction):
            return value
        fn = value.fn
        if fn not in made:
            names, cells = dict(fn.__globals__), tuple(types.CellType() for _ in fn.__closure__ or ())
            copy = types.FunctionType(fn.__code__, names, fn.__name__, fn.__defaults__, cells)
            copy.__annotations__, copy.__module__ = fn.__annotations__, fn.__module__
            copy.__qualname__, copy.__doc__ = fn.__qualname__, fn.__doc__
            made[fn] = triton.JITFunction(copy, **value.kwargs)  # before what it calls, which may call it
            for name in set(fn.__code__.co_names) & names.keys():
                names[name] = twin(names[name])
                if isinstance(names[name], types.ModuleType):
                    put_twins(names[name])
            for cell, old in zip(cells, fn.__closure__ or (), strict=True):
                cell.cell_contents = twin(old.cell_contents)
        return made[fn]

    changed = []

    def put(owner, name, value):
        changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def put_twins(module):
        for name, value in list(vars(module).items()):
            if isinstance(value, InterpretedFunction):
                put(module, name, twin(value))

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.front_end_debugging = False
        try:
            _undo_the_interpreter(tl)
            for name, module in list(sys.modules.items()):
                if name.startswith("triton.language"):
                    put_twins(module)
            for name, method in list(vars(tl.tensor).items()):
                function = getattr(tl, name, None)  # of which the method is said to be a short form
                if (getattr(method, "__doc__", None) or "").startswith("Forwards to") and function in made.values():
                    put(tl.tensor, name, function)
            put(InterpretedFunction, "run", lambda self, *args, **settings: twin(self).run(*args, **settings))
            yield
        finally:
            for owner, name, value in reversed(changed):
                setattr(owner, name, value)


def _undo_the_interpreter(tl):
    """Calling tl.sum and the like leaves the interpreter's stand-ins in `tl.core` behind; `tl` has the originals."""
    for name, value in list(vars(tl.core).items()):
        original = (getattr(value, "__kwdefaults__", None) or {}).get("member")
        if original is None and callable(value) and not name.startswith("_") and value is not getattr(tl, name, value):
            original = getattr(tl, name)
        if original is not None:
            setattr(tl.core, name, original)


def without_faults(call, card: str = "A100"):
    """Run `call()`, which launches a reader's kernels on fresh CPU tensors, in the emulator.

    Returns:
        The Emulator; None where it does not know Triton's version, or an instruction.

    Raises:
        WrongAnswer: what a GPU would have hidden, or why Triton does not compile it.
    """
    import triton

    from ..gpu import KernelFault
    from ..gpu.driver import WRITTEN_FOR
    from ..gpu.emulator.fault import Unsupported

    if not triton.__version__.startswith(WRITTEN_FOR):
        return None
    try:
        with emulated(card) as gpu:
            call()
        return gpu
    except KernelFault as fault:
        which = "another warp" if "another warp" in fault.detail else fault.kind
        raise WrongAnswer(
            f"The interpreter, which runs one program after the other, gets it right; a GPU need not. {fault.kind}: "
            f"{fault.detail}{told(fault.file, fault.line)}. {FAULTS.get(which, '')}"
        ) from None
    except triton.CompilationError as error:
        raise WrongAnswer(f"The interpreter runs it, but Triton cannot compile it for a GPU: {error}") from None
    except triton.OutOfResources as error:
        raise WrongAnswer(f"It does not fit on an {card}: {error}") from None
    except Unsupported:
        return None


def seen_there(gpu, card: str = "A100") -> str:
    """What `without_faults` found, for the end of a checker's sentence."""
    if gpu is None:
        return "; the emulator could not run it, so races were not looked for"
    return f"; and as machine code of an {card}, emulated: no race, nothing out of bounds"


class Profile:
    """Counters of one launch.

    Attributes:
        launch: the emulator's LaunchRecord, with `.counters`, `.registers`, `.occupancy`.
        sectors_per_load, sectors_per_store: of a warp's request of global memory; 0 without one.
        wavefronts: passes over shared memory of a warp's request; 0 without one.
        tensor_share: share of the floating-point operations that tensor cores do, 0 to 1. Of the others each
            instruction counts as 64, a multiplication and an addition for 32 threads.
    """

    def __init__(self, gpu):
        self.gpu, self.launch = gpu, gpu.launches[-1]
        counters = self.launch.counters
        self.sectors_per_load = counters.global_loads.per_request
        self.sectors_per_store = counters.global_stores.per_request
        self.wavefronts = counters.shared.per_request
        others = 64 * sum(counters.instructions[pipe] for pipe in ("fp16", "fp32", "fp64"))
        total = counters.tensor_flops + others
        self.tensor_share = counters.tensor_flops / total if total else 0.0

    def __str__(self):
        launch, counters = self.launch, self.launch.counters
        rows = {
            "programs, warps of each": f"{launch.programs}, {launch.warps}",
            "sectors per load": f"{self.sectors_per_load:.1f}",
            "sectors per store": f"{self.sectors_per_store:.1f}",
            "wavefronts": f"{self.wavefronts:.1f}" if counters.shared.requests else "–, no shared memory",
            "tensor cores' share": f"{self.tensor_share:.0%}",
            "from DRAM, to DRAM": f"{counters.dram_read_bytes:,} and {counters.dram_written_bytes:,} bytes",
        }
        head = f"{launch.name} on {launch.arch}, emulated"
        return "\n".join([head, *(f"  {name:24} {value}" for name, value in rows.items()), "", self.by_line()])

    __repr__ = __str__

    def by_line(self) -> str:
        """The kernel's lines, each with its costs."""
        return self.gpu.source(self.launch.name)


def profile(kernel, grid, *args, card: str = "A100", **constants) -> Profile:
    """Launch a kernel in the emulator, on CPU tensors, and count: sectors, wavefronts, the tensor cores' share.

    Nothing is timed. What the counters mean, and what they do not, is in docs/emulator.md.

    Args:
        kernel: a @triton.jit kernel.
        grid, args, constants: as in `kernel[grid](*args, **constants)`.
        card: "T4", "A100", "L4", "RTX 4090", "H100", "H200", "B200" or an architecture, "sm_80".

    Raises:
        ValueError: an unknown card, or what cannot be launched.
        RuntimeError: Triton is not installed.
        handtuned.gpu.KernelFault: the kernel does what a GPU would hide.
    """
    if not HAS_TRITON:
        raise RuntimeError("Triton is not installed on this machine, so no kernel can be compiled")
    grid = grid_of(kernel, grid, args, constants)
    with emulated(card) as gpu:
        kernel[grid](*args, **constants)
    return Profile(gpu)
