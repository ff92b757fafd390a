"""Machine code (SASS) read from a disassembly: how many instructions, loops, memory accesses, tensor-core instructions.

Triton compiles for any NVIDIA architecture on any machine, and its wheel brings `ptxas` and `nvdisasm`. So a change
that halves a store's width or loses the tensor cores shows here, before anything is timed. Subroutines that the
compiler adds for rare cases (the slow path of a division) are not counted.
"""

import re
from collections import Counter
from dataclasses import dataclass

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
    """Counts taken from a disassembly (static: each instruction once)."""

    instructions: int  # up to the last EXIT, without padding and compiler subroutines
    memory: Counter  # (kind, bits that a thread moves) → how many, for example ("store global", 128) → 4
    tensor_core: Counter  # family → how many ("mma.sync", "wgmma", "tcgen05")
    opcodes: Counter  # leading opcode → how many
    loops: tuple[Loop, ...]  # outermost first

    def widths(self, kind: str) -> dict[int, int]:
        """Bits → count of the accesses of one kind, for example `widths("store global")`."""
        return {bits: n for (k, bits), n in sorted(self.memory.items(), reverse=True) if k == kind}


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
            loops.append((start, i, sum(op.split(".")[0] in TENSOR_CORE for op, _ in code[start : i + 1])))
    loops.sort(key=lambda loop: (loop[0], -loop[1]))
    depths = [sum(a <= start and end <= b for a, b, _ in loops[:at]) for at, (start, end, _) in enumerate(loops)]

    heads = [(opcode.split(".")[0], opcode) for opcode, _ in code if opcode != "NOP"]
    opcodes = Counter(head for head, _ in heads)
    memory = Counter((MEMORY[head], _bits(opcode)) for head, opcode in heads if head in MEMORY)
    tensor_core = Counter(TENSOR_CORE[head] for head, _ in heads if head in TENSOR_CORE)
    found = tuple(Loop(end - start + 1, n, depth) for (start, end, n), depth in zip(loops, depths, strict=True))
    return MachineCode(sum(opcodes.values()), memory, tensor_core, opcodes, found)
