"""Integers of more bits than a register: what does not fit is carried, in a bit of its own, to the next instruction.

`add.cc` leaves its carry there, `addc` adds it, `addc.cc` does both; `sub` borrows instead. sin and cos of large fp32
numbers multiply by 192 bits of 2/π so.
"""

from .integers import multiply_high
from .registers import both
from .types import PRED, UNSIGNED, type_of

BIT = "%cc"


def carry(m, pc, i):
    base, t = i.parts[0], type_of(i.op)
    word = UNSIGNED[t.itemsize]
    takes, leaves = base.endswith("c"), "cc" in i.parts
    multiplies, subtracts = base.startswith("mad"), base.startswith("sub")
    reads = [m.source(operand, t, i) for operand in i.args[1:]]
    bit, write, write_bit, guard = m.source(BIT, PRED, i), m.destination(i.args[0]), m.destination(BIT), m.guard(i)

    def operands(values):
        first, second, *third = [read(values) for read in reads]
        if not multiplies:
            return first.view(word), second.view(word)
        product = multiply_high(first, second) if "hi" in i.parts else first * second
        return product.view(word), third[0].view(word)

    def run(b):
        mask = both(b.mask, guard(b.values))
        x, y = operands(b.values)
        more = bit(b.values).astype(word) if takes else word.type(0)
        if subtracts:
            part, out = x - y, x < y
            result, out = part - more, out | (part < more)
        else:
            part = x + y
            result, out = part + more, part < x
            out = out | (result < part)
        write(b, result, mask)
        if leaves:
            write_bit(b, out, mask)

    return run
