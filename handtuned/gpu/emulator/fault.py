"""What goes wrong on a GPU without a word, said here.

A GPU that reads past the end of a tensor gets some other tensor's bytes; two warps that miss a barrier get right
answers on most days. Nothing stops, so nothing is learned. Here the first such access stops the launch and names the
kernel, the source line, the program, the thread and the address.
"""

KINDS = ("out of bounds", "never written", "race", "not arrived", "misaligned", "conflicting writes", "deadlock")


class KernelFault(RuntimeError):
    """An error in a kernel that a GPU would hide.

    Attributes:
        kind: one of KINDS.
        kernel: name of the kernel.
        file, line: where in its source; for a function of Triton's own library, the line that called it.
        program: the program's number, counted as the grid is (x first).
        thread: number of the thread within its program.
        address: in bytes; of shared memory, the offset from its start. None where no address is concerned.
    """

    def __init__(self, kind, detail, instruction, kernel, program, thread, address=None):
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind, self.kernel, self.detail = kind, kernel, detail
        self.file, self.line = instruction.file, instruction.line
        self.program, self.thread, self.address = program, thread, address
        at = "" if address is None else f", address {address:#x}"
        super().__init__(
            f"{kind}: {detail}\n  in {kernel}, {self.file}:{self.line}, program {program}, thread {thread}{at}\n"
            f"  machine instruction: {instruction.text}"
        )


class Unsupported(NotImplementedError):
    """An instruction that the emulator does not know."""

    def __init__(self, instruction, why=""):
        because = f" ({why})" if why else ""
        super().__init__(
            f"the emulator does not know {instruction.op!r}{because}: {instruction.text!r}, from {instruction.file}:"
            f"{instruction.line}. Please report it with the kernel, its launch and the versions of triton and "
            "handtuned; CONTRIBUTING.md shows how to add an instruction"
        )
