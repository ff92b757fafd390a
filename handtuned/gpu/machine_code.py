"""What the compiler made of each kernel, read from the machine code; no GPU is needed.

Triton compiles for any NVIDIA architecture on any machine, and its wheel brings `cuobjdump` and `nvdisasm`. So a
change that spills registers, halves a store's width or loses the tensor cores shows here, before anything is timed.

Instructions per element = machine instructions of one thread, times the threads of a program, over the elements that
one program produces (its `KernelSpec.elements`). All instructions up to the last EXIT count, masked ones and both
sides of a branch too, so it is an upper bound. It is given for code without a loop only; where there is a loop, its
static size is reported instead. Subroutines that the compiler adds for rare cases (the slow path of a division) are
not counted.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .. import kernels
from ..kernels.runtime import HAS_TRITON, INTERPRETED, KernelSpec, triton
from .cards import ARCHS, Occupancy, occupancy

# Machine instructions that feed the tensor cores, and the PTX family they come from.
TENSOR_CORE = {
    "HMMA": "mma.sync", "IMMA": "mma.sync", "DMMA": "mma.sync", "QMMA": "mma.sync", "OMMA": "mma.sync",
    "HGMMA": "wgmma", "IGMMA": "wgmma", "QGMMA": "wgmma",
    "UTCHMMA": "tcgen05", "UTCIMMA": "tcgen05", "UTCQMMA": "tcgen05", "UTCOMMA": "tcgen05", "UTCMXQMMA": "tcgen05",
}  # fmt: skip
MEMORY = {
    "LDG": "load global", "STG": "store global", "LDS": "load shared", "LDSM": "load matrix", "STS": "store shared",
    "LDGSTS": "copy async", "UTMALDG": "load tensor (TMA)", "UTMASTG": "store tensor (TMA)",
    "UBLKCP": "copy bulk", "ATOMG": "atomic", "ATOM": "atomic", "RED": "reduce", "REDG": "reduce",
    "LDL": "load local", "STL": "store local",
}  # fmt: skip

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+|\$\w+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Loop:
    """One loop: instructions from its first label to the branch back, inner loops included; depth 0: outermost."""

    instructions: int
    tensor_core: int
    depth: int = 0


@dataclass(frozen=True)
class MachineCode:
    """Counts taken from a disassembly (static: each instruction once).

    Attributes:
        instructions: up to the last EXIT, without padding and compiler subroutines.
        memory: (kind, bits a thread moves) → how many, for example ("store global", 128) → 4.
        tensor_core: family → how many ("mma.sync", "wgmma", "tcgen05").
        opcodes: leading opcode → how many.
        loops: outermost first.
    """

    instructions: int
    memory: Counter
    tensor_core: Counter
    opcodes: Counter
    loops: tuple[Loop, ...]


@dataclass(frozen=True)
class Xray:
    """What one kernel became on one architecture; `error` is set, and the rest empty, where it does not compile.

    Attributes:
        registers, spill_bytes: of a thread; spilled are stack and local memory.
        shared_bytes, threads: of a program.
        instructions_per_element: None where the code loops.
        sass: the disassembly.
    """

    name: str
    arch: str
    unit: str = "element"
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    threads: int = 0
    code: MachineCode | None = None
    instructions_per_element: float | None = None
    sass: str = field(default="", repr=False)
    error: str = ""

    @property
    def occupancy(self) -> Occupancy:
        """What one multiprocessor holds at once."""
        return occupancy(self.arch, self.threads, self.registers, self.shared_bytes)

    def widths(self, kind: str) -> dict[int, int]:
        """Bits → count of the accesses of one kind, for example `widths("store global")`."""
        return {bits: n for (k, bits), n in sorted(self.code.memory.items(), reverse=True) if k == kind}


def all_specs() -> list[KernelSpec]:
    """Every kernel that a module of `handtuned.kernels` offers through `xray_specs()`."""
    specs = []
    for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
        offer = getattr(importlib.import_module(module.name), "xray_specs", None)
        if offer is not None:
            specs += offer()
    return specs


def _bits(opcode: str) -> int:
    """How many bits one thread moves: the width suffix, 32 if there is none."""
    for part in reversed(opcode.split(".")[1:]):
        if part in ("256", "128", "64"):
            return int(part)
        if part in ("U8", "S8", "8"):
            return 8
        if part in ("U16", "S16", "16"):
            return 16
    return 32


def read_machine_code(sass: str) -> MachineCode:
    """Count what `nvdisasm -c` printed."""
    code, labels = [], {}  # code: (opcode, operands); labels: name → index of the next instruction
    for line in sass.splitlines():
        if label := _LABEL.match(line.strip()):
            if label[1].startswith("$") and code:
                break
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.search(line):
            code.append((found[2], found[3]))
    ends = [i for i, (opcode, _) in enumerate(code) if opcode.startswith("EXIT")]
    code = code[: ends[-1] + 1] if ends else code

    loops = []
    for i, (opcode, operands) in enumerate(code):
        target = _TARGET.search(operands)
        start = labels.get(target[1]) if target and opcode.startswith("BRA") else None
        if start is not None and start < i:
            body = code[start : i + 1]
            loops.append((start, i, sum(op.split(".")[0] in TENSOR_CORE for op, _ in body)))
    loops.sort(key=lambda loop: (loop[0], -loop[1]))
    depths = [sum(a <= start and end <= b for a, b, _ in loops[:at]) for at, (start, end, _) in enumerate(loops)]

    opcodes = Counter(opcode.split(".")[0] for opcode, _ in code if opcode != "NOP")
    memory, tensor_core = Counter(), Counter()
    for opcode, _ in code:
        head = opcode.split(".")[0]
        if head in MEMORY:
            memory[MEMORY[head], _bits(opcode)] += 1
        if head in TENSOR_CORE:
            tensor_core[TENSOR_CORE[head]] += 1
    found = tuple(Loop(end - start + 1, n, depth) for (start, end, n), depth in zip(loops, depths, strict=True))
    return MachineCode(sum(opcodes.values()), memory, tensor_core, opcodes, found)


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout


def _compile(spec: KernelSpec, arch: str):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = spec.kernel
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn  # under @triton.autotune or @triton.heuristics
    signature = {name: "constexpr" if name in spec.constexprs else spec.signature[name] for name in kernel.arg_names}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned}
    source = ASTSource(kernel, signature, dict(spec.constexprs), attrs)
    return triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=spec.options)


def xray(spec: KernelSpec, arch: str = "sm_90") -> Xray:
    """Compile a kernel for an architecture (of `cards.ARCHS`) and read its machine code.

    Where the compiler refuses, the `error` of the result says why.

    Raises:
        RuntimeError: without Triton, or in a process where kernels are interpreted.
        ValueError: unknown architecture.
    """
    if not HAS_TRITON:
        raise RuntimeError("xray needs Triton, which is not installed")
    if INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET is set, so the kernels of this process are interpreted and cannot be compiled; "
            "run xray in a process without it: TRITON_INTERPRET=0 handtuned xray"
        )
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {arch!r}")
    try:
        compiled = _compile(spec, arch)
    except Exception as error:
        # Triton raises whatever its passes raise; one kernel that an old chip cannot run must not hide the others.
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Xray(spec.name, arch, spec.unit, error=f"{type(error).__name__}: {lines[-1] if lines else ''}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        sass = _tool("nvdisasm", "-c", str(cubin))
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    code = read_machine_code(sass)
    threads = compiled.metadata.num_warps * 32
    per_element = None if code.loops else code.instructions * threads / spec.elements
    return Xray(spec.name, arch, spec.unit, resources["REG"], resources["STACK"] + resources["LOCAL"],
                compiled.metadata.shared, threads, code, per_element, sass)  # fmt: skip
