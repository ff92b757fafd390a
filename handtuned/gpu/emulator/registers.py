"""Registers and constants: how an instruction's operands are read and written.

A register of a real GPU is 32 bits in each thread. Here it is one array for all threads of all programs that run
together, and an array only as large as it must be:

    (1, 1)  the same for every thread of every program: a kernel argument, a loop counter
    (P, 1)  depends on the program alone: what follows from tl.program_id
    (1, T)  depends on the thread alone: the offsets of tl.arange
    (P, T)  depends on both: what was loaded

numpy broadcasts them against each other, so an address computation that no program influences is done once for all.
(ptxas does the like with its "uniform registers", one for 32 threads.)
"""

import numpy as np
import torch

from .fault import Unsupported
from .parse import FloatBits, Kernel
from .types import F32, F64, PRED, U32, U64, UNSIGNED

SHARED_BASE = 1024  # shared memory begins here, not at 0, so that a forgotten base address shows
TEXT_BASE = 1 << 56  # the addresses of the messages that a kernel prints, one number each
POISON = 0xFFC5FFD3  # what unwritten memory and registers hold: NaN as f32, as two f16 and as two bf16


def poison_as(dtype):
    if dtype == PRED:
        return np.array([[True]])
    bits = (POISON << 32 | POISON) & ((1 << 8 * dtype.itemsize) - 1)
    return np.array([[bits]], UNSIGNED[dtype.itemsize]).view(dtype)


def both(a, b):
    """The intersection of two masks; None is everyone."""
    return b if a is None else a if b is None else a & b


class UndefinedRead(RuntimeError):
    """A value is needed that no instruction wrote."""


class Undefined:
    """What a register holds of which some bits were never written.

    LLVM leaves a register undefined where its value cannot matter: for Blackwell it joins two of 32 bits into one of
    64, and later takes a half out again; Triton fills up what inline assembly works on together. So such a register
    may be moved, split and computed with. It has two values, which differ in the undefined bits; what comes out the
    same for both is defined (but no comparison is). Whoever needs its value (memory, a branch, a tensor core) asks for
    its dtype, and is stopped. Where threads have parted, the first value stands for both.
    """

    def __init__(self, one, other):
        self.one, self.other = one, other

    @property
    def dtype(self):
        raise UndefinedRead

    view = shape = dtype

    def select(self, keep, new):
        alike = self.one.shape[0] == 1  # for all programs
        return self if alike else Undefined(self.one[keep], self.other[keep])


class Registers:
    """Gives each register of a kernel a slot, and makes the functions that read and write it.

    Readers take the list of slots of a batch (`batch.values`); writers take (batch, value, mask).
    """

    def __init__(self, kernel: Kernel):
        self.kernel, self.slots = kernel, {}
        self.tables = {name: torch.frombuffer(bytearray(codes), dtype=torch.uint8).clone()
                       for name, codes in kernel.tables.items()}  # fmt: skip

    def slot(self, name: str) -> int:
        return self.slots.setdefault(name, len(self.slots))

    def fresh(self):
        """What the registers hold at first."""
        widths = [self.kernel.width(name) or 8 for name in self.slots]
        poison = {width: poison_as(PRED if width == 1 else UNSIGNED[width]) for width in set(widths)}
        return [Undefined(poison[width], ~poison[width]) for width in widths]

    @staticmethod
    def tolerant(compute):
        """`compute`, a function of the values, made to go on where they are undefined."""

        def run(values):
            try:
                return compute(values)
            except UndefinedRead:
                one = compute([v.one if isinstance(v, Undefined) else v for v in values])
                if one.dtype == PRED:
                    return Undefined(one, ~one)
                other = compute([v.other if isinstance(v, Undefined) else v for v in values])
                bits = UNSIGNED[one.itemsize]
                return one if (one.view(bits) == other.view(bits)).all() else Undefined(one, other)

        return run

    def _constant(self, operand, dtype):
        if isinstance(operand, FloatBits):
            bits, number = (U32, F32) if operand.size == 4 else (U64, F64)
            value = np.array([[operand.bits]], bits).view(number)
            return value.view(dtype) if dtype.itemsize == operand.size else value.astype(dtype)
        if dtype == PRED:
            return np.array([[bool(operand)]])
        return np.array([[operand & (1 << 8 * dtype.itemsize) - 1]], UNSIGNED[dtype.itemsize]).view(dtype)

    def _symbol(self, name):
        """The address of an array that the kernel declares; None if `name` is none."""
        if name in self.kernel.text_names:
            return TEXT_BASE + self.kernel.text_names.index(name)
        if name in self.tables:
            return self.tables[name].data_ptr()
        shared = sorted(self.kernel.shared, key=lambda array: array[1] == 0)  # the dynamic one comes last
        for arrays, at in ((self.kernel.local, 0), (shared, SHARED_BASE)):
            for other, size in arrays:
                if other == name:
                    return at
                at += -(-size // 16) * 16
        return None

    def source(self, operand, dtype, i):
        """A function of the registers' values that gives an operand as `dtype`."""
        if isinstance(operand, str) and operand.startswith("!"):
            inner = self.source(operand[1:], dtype, i)
            return lambda values: ~inner(values)
        width = self.kernel.width(operand) if isinstance(operand, str) else None
        if width is None:
            if isinstance(operand, str):
                operand = self._symbol(operand)
            if operand is None or not isinstance(operand, int | FloatBits):
                raise Unsupported(i, "operand")
            constant = self._constant(operand, dtype)
            return lambda values: constant
        slot = self.slot(operand)
        if dtype == PRED or width == dtype.itemsize:

            def read(values):
                value = values[slot]
                return value if value.dtype is dtype else value.view(dtype)

            return read
        if width < dtype.itemsize:
            raise Unsupported(i, f"a {8 * width}-bit register read as {8 * dtype.itemsize} bits")
        unsigned = UNSIGNED[width]  # st and cvt take the low bits of a wider register
        low = self.tolerant(lambda values: values[slot].view(unsigned).astype(UNSIGNED[dtype.itemsize]).view(dtype))

        def read_low(values):
            value = low(values)
            if isinstance(value, Undefined):
                raise UndefinedRead
            return value

        return read_low

    def guard(self, i):
        """A function of the values that gives the mask of an instruction's guard; None: everyone."""
        if i.guard is None:
            return lambda values: None
        read = self.source(i.guard, PRED, i)

        def mask(values):
            m = ~read(values) if i.negated else read(values)
            return None if m.size == 1 and m.flat[0] else m

        return mask

    def destination(self, name: str):
        """A function (batch, value, mask) that writes a register; `_` takes nothing."""
        if name == "_":
            return lambda batch, value, mask: None
        slot = self.slot(name)

        def write(batch, value, mask):
            if mask is not None:
                old, value = (v.one if isinstance(v, Undefined) else v for v in (batch.values[slot], value))
                value = np.where(mask, value, old if old.dtype is value.dtype else old.view(value.dtype))
            batch.values[slot] = value

        return write
