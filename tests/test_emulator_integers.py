"""Integer instructions of the emulator against Python's own integers, which never overflow."""

import numpy as np
import pytest
from ptx import apply

RNG = np.random.default_rng(0)
EDGES = [0, 1, 2, 3, 5, 31, 32, 33, 63, 64, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000,
         0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF]  # fmt: skip
BITS = {"s16": 16, "u16": 16, "b16": 16, "s32": 32, "u32": 32, "b32": 32, "s64": 64, "u64": 64, "b64": 64}


def numbers(kind, seed=0, count=300):
    """Edge cases and random bits, as unsigned numpy numbers of the type's size."""
    bits = BITS[kind]
    rng = np.random.default_rng(seed)
    edges = rng.permutation(np.array([e % (1 << bits) for e in EDGES] * 6, dtype=np.uint64))
    random = rng.integers(0, (1 << bits) - 1, count - len(edges), dtype=np.uint64, endpoint=True)
    return np.concatenate([edges, random]).astype(f"u{bits // 8}")


def value(x, kind):
    """The Python integer that bits mean."""
    x, bits = int(x), BITS[kind]
    return x - (1 << bits) if kind[0] == "s" and x >> bits - 1 else x


def wrap(x, kind):
    return x & (1 << BITS[kind]) - 1


def cut(a, b):
    """Division toward zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


TWO = {
    "add": lambda a, b, bits: a + b, "sub": lambda a, b, bits: a - b, "mul.lo": lambda a, b, bits: a * b,
    "mul.hi": lambda a, b, bits: a * b >> bits, "min": lambda a, b, bits: min(a, b),
    "max": lambda a, b, bits: max(a, b), "div": lambda a, b, bits: cut(a, b) if b else -1,
    "rem": lambda a, b, bits: a - cut(a, b) * b if b else a,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("op", TWO)
def test_two_operands(op, kind):
    a, b = numbers(kind, 1), numbers(kind, 2)
    if op in ("div", "rem"):
        b[b == 0] = 7  # a division by zero has no defined result
    got = apply(f"{op}.{kind} d, a, b;", [a, b], a.dtype)
    want = [wrap(TWO[op](value(x, kind), value(y, kind), BITS[kind]), kind) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == want


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_products(kind):
    a, b = numbers(kind, 1), numbers(kind, 2)
    wide = f"{kind[0]}{2 * BITS[kind]}"
    c = numbers(wide, 3)
    products = [value(x, kind) * value(y, kind) for x, y in zip(a, b, strict=True)]
    assert apply(f"mul.wide.{kind} d, a, b;", [a, b], c.dtype).tolist() == [wrap(p, wide) for p in products]
    sums = [wrap(p + int(z), wide) for p, z in zip(products, c, strict=True)]
    assert apply(f"mad.wide.{kind} d, a, b, c;", [a, b, c], c.dtype).tolist() == sums


@pytest.mark.parametrize("kind", ["s32", "u32", "s64"])
@pytest.mark.parametrize("half", ["lo", "hi"])
def test_multiply_and_add(kind, half):
    a, b, c = (numbers(kind, seed) for seed in (1, 2, 3))
    shift = BITS[kind] if half == "hi" else 0
    want = [wrap((value(x, kind) * value(y, kind) >> shift) + int(z), kind) for x, y, z in zip(a, b, c, strict=True)]
    assert apply(f"mad.{half}.{kind} d, a, b, c;", [a, b, c], a.dtype).tolist() == want


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
@pytest.mark.parametrize("op,fn", [("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)])
def test_logic(op, fn, kind):
    a, b = numbers(kind, 1), numbers(kind, 2)
    want = [fn(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    assert apply(f"{op}.{kind} d, a, b;", [a, b], a.dtype).tolist() == want


ONE = {
    "neg.s32": lambda x: -x, "neg.s64": lambda x: -x, "abs.s32": abs, "abs.s64": abs, "not.b32": lambda x: ~x,
    "not.b64": lambda x: ~x, "not.b16": lambda x: ~x, "cnot.b32": lambda x: int(x == 0),
    "brev.b32": lambda x: int(f"{x:032b}"[::-1], 2), "brev.b64": lambda x: int(f"{x:064b}"[::-1], 2),
}  # fmt: skip


@pytest.mark.parametrize("op", ONE)
def test_one_operand(op):
    kind = op.split(".")[1]
    a = numbers(kind)
    want = [wrap(ONE[op](value(x, kind)), kind) for x in a]
    assert apply(f"{op} d, a;", [a], a.dtype).tolist() == want


def highest(x):
    return x.bit_length() - 1


COUNTS = {
    "popc.b32": lambda x: x.bit_count(), "popc.b64": lambda x: x.bit_count(), "clz.b32": lambda x: 32 - x.bit_length(),
    "clz.b64": lambda x: 64 - x.bit_length(), "bfind.u32": highest, "bfind.u64": highest,
    "bfind.s32": lambda x: highest(x if x >= 0 else ~x),
}  # fmt: skip


@pytest.mark.parametrize("op", COUNTS)
def test_counts(op):
    kind = op.split(".")[1]
    a = numbers(kind)
    assert apply(f"{op} d, a;", [a], np.uint32).tolist() == [wrap(COUNTS[op](value(x, kind)), "u32") for x in a]


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_shifts(kind):
    a, n = numbers(kind, 1), RNG.integers(0, 80, 300).astype(np.uint32)
    if kind[0] == "b":
        want = [wrap(int(x) << int(k), kind) for x, k in zip(a, n, strict=True)]
        assert apply(f"shl.{kind} d, a, b;", [a, n], a.dtype).tolist() == want
    want = [wrap(value(x, kind) >> int(k), kind) for x, k in zip(a, n, strict=True)]
    assert apply(f"shr.{kind} d, a, b;", [a, n], a.dtype).tolist() == want


def field(x, position, length, kind):
    """PTX's own description of bfe: bits beyond the top repeat the sign bit of the field, or 0 for unsigned."""
    bits, x = BITS[kind], int(x)
    if length == 0:
        return 0
    sign = (x >> min(position + length - 1, bits - 1) & 1) if kind[0] == "s" else 0
    out = 0
    for i in range(bits):
        bit = x >> position + i & 1 if i < length and position + i < bits else sign
        out |= bit << i
    return out


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    a, top = numbers(kind), BITS[kind] + 8
    position, length = (RNG.integers(0, top, 300).astype(np.uint32) for _ in range(2))
    want = [field(x, int(p), int(n), kind) for x, p, n in zip(a, position, length, strict=True)]
    assert apply(f"bfe.{kind} d, a, b, c;", [a, position, length], a.dtype).tolist() == want


@pytest.mark.parametrize("kind", ["b32", "b64"])
@pytest.mark.parametrize("position,length", [(0, 8), (8, 16), (31, 5), (4, 0), (0, 32), (20, 40)])
def test_insert_field(kind, position, length):
    a, b, bits = numbers(kind, 1), numbers(kind, 2), BITS[kind]
    want = []
    for x, y in zip(a, b, strict=True):
        out = int(y)
        for i in range(min(length, bits - position)):
            out = out & ~(1 << position + i) | (int(x) >> i & 1) << position + i
        want.append(out)
    assert apply(f"bfi.{kind} d, a, b, {position}, {length};", [a, b], a.dtype).tolist() == want


def picked(a, b, selectors):
    pool, out = (int(b) << 32 | int(a)).to_bytes(8, "little"), 0
    for i, selector in enumerate(selectors):
        byte = pool[selector & 7]
        out |= ((0xFF if byte & 0x80 else 0) if selector & 8 else byte) << 8 * i
    return out


def test_permute():
    a, b, s = (numbers("b32", seed) for seed in (1, 2, 3))
    want = [picked(x, y, [int(z) >> 4 * i & 15 for i in range(4)]) for x, y, z in zip(a, b, s, strict=True)]
    assert apply("prmt.b32 d, a, b, c;", [a, b, s], np.uint32).tolist() == want


PERMUTE = {
    "f4e": lambda s: [s, s + 1, s + 2, s + 3], "b4e": lambda s: [s, s - 1, s - 2, s - 3], "rc8": lambda s: [s] * 4,
    "ecl": lambda s: [max(s, i) for i in range(4)], "ecr": lambda s: [min(s, i) for i in range(4)],
    "rc16": lambda s: [(s & 1) * 2, (s & 1) * 2 + 1] * 2,
}  # fmt: skip


@pytest.mark.parametrize("mode", PERMUTE)
def test_permute_modes(mode):
    a, b, s = (numbers("b32", seed) for seed in (1, 2, 3))
    low = 7 if mode in ("f4e", "b4e") else 3
    want = [picked(x, y, [k & 7 for k in PERMUTE[mode](int(z) & low)]) for x, y, z in zip(a, b, s, strict=True)]
    assert apply(f"prmt.b32.{mode} d, a, b, c;", [a, b, s], np.uint32).tolist() == want


@pytest.mark.parametrize("table", [0x80, 0xFE, 0x96, 0xE8, 0x1B, 0x00, 0xFF])
def test_logic_of_three(table):
    a, b, c = (numbers("b32", seed) for seed in (1, 2, 3))
    want = [
        sum((table >> ((int(x) >> i & 1) << 2 | (int(y) >> i & 1) << 1 | int(z) >> i & 1) & 1) << i for i in range(32))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert apply(f"lop3.b32 d, a, b, c, {table};", [a, b, c], np.uint32).tolist() == want


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(side, mode):
    low, high, n = numbers("b32", 1), numbers("b32", 2), RNG.integers(0, 70, 300).astype(np.uint32)
    want = []
    for x, y, k in zip(low, high, n, strict=True):
        both, k = int(y) << 32 | int(x), int(k) & 31 if mode == "wrap" else min(int(k), 32)
        want.append(((both << k) >> 32 if side == "l" else both >> k) & 0xFFFFFFFF)
    assert apply(f"shf.{side}.{mode}.b32 d, a, b, c;", [low, high, n], np.uint32).tolist() == want


@pytest.mark.parametrize("op,fn", [("add", int.__add__), ("min", min), ("max", max)])
@pytest.mark.parametrize("kind", ["s16x2", "u16x2"])
def test_two_shorts_in_a_word(op, fn, kind):
    a, b, half = numbers("b32", 1), numbers("b32", 2), kind[:3]
    parts = [[(int(x) >> s) & 0xFFFF for s in (0, 16)] for x in (*a, *b)]
    want = []
    for x, y in zip(parts[:300], parts[300:], strict=True):
        low, high = (wrap(fn(value(p, half), value(q, half)), half) for p, q in zip(x, y, strict=True))
        want.append(high << 16 | low)
    assert apply(f"{op}.{kind} d, a, b;", [a, b], np.uint32).tolist() == want


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name,fn", [("eq", int.__eq__), ("ne", int.__ne__), ("lt", int.__lt__), ("le", int.__le__),
                                     ("gt", int.__gt__), ("ge", int.__ge__)])  # fmt: skip
def test_comparisons(name, fn, kind):
    a, b = numbers(kind, 1), numbers(kind, 1)
    b[::2] = numbers(kind, 2)[::2]
    want = [int(fn(value(x, kind), value(y, kind))) for x, y in zip(a, b, strict=True)]
    assert apply(f"setp.{name}.{kind} d, a, b;", [a, b], np.int32, predicate=True).tolist() == want


def test_comparison_joined_with_a_predicate():
    a, b, p = numbers("s32", 1), numbers("s32", 2), RNG.integers(0, 2, 300).astype(bool)
    less = [value(x, "s32") < value(y, "s32") for x, y in zip(a, b, strict=True)]
    for op, fn in (("and", bool.__and__), ("or", bool.__or__), ("xor", bool.__xor__)):
        want = [int(fn(x, bool(y))) for x, y in zip(less, p, strict=True)]
        assert apply(f"setp.lt.{op}.s32 d, a, b, c;", [a, b, p], np.int32, predicate=True).tolist() == want


def test_select():
    a, b, p = numbers("b32", 1), numbers("b32", 2), RNG.integers(0, 2, 300).astype(bool)
    assert apply("selp.b32 d, a, b, c;", [a, b, p], np.uint32).tolist() == np.where(p, a, b).tolist()
    c = numbers("s32", 3).view(np.int32)
    assert apply("slct.b32.s32 d, a, b, c;", [a, b, c], np.uint32).tolist() == np.where(c >= 0, a, b).tolist()


def test_absolute_difference():
    a, b, c = (numbers("s32", seed) for seed in (1, 2, 3))
    want = [wrap(abs(value(x, "s32") - value(y, "s32")) + int(z), "u32") for x, y, z in zip(a, b, c, strict=True)]
    assert apply("sad.s32 d, a, b, c;", [a, b, c], np.uint32).tolist() == want


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_the_shift_that_normalizes(kind):
    bits = int(kind[1:])
    numbers = np.array([0, 1, 2, 5, 1 << (bits - 2), (1 << (bits - 1)) - 1], np.uint64)
    a = numbers.astype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
    want = [0xFFFFFFFF, *(bits - int(x).bit_length() for x in a[1:])]
    assert apply(f"bfind.shiftamt.{kind} d, a;", [a], np.uint32).tolist() == want


def _carried(instructions, a, b, c=None):
    """The second result of two instructions; %r40 or %d40 takes the first."""
    register = "%r40" if a.itemsize == 4 else "%d40"
    return apply(instructions.replace("first", register), [a, b] if c is None else [a, b, c], a.dtype)


@pytest.mark.parametrize("bits", [32, 64])
def test_carries(bits):
    """(high, low) + (high, low) is exact mod 2 to the double width, and so with minus; signs make no difference."""
    edges = [0, 1, (1 << bits) - 1, 1 << (bits - 1), 0x9E3779B97F4A7C15 % (1 << bits)]
    a, b = (np.array(v, f"u{bits // 8}") for v in zip(*[(x, y) for x in edges for y in edges], strict=True))
    for kind in (f"u{bits}", f"s{bits}"):
        for op, sign in (("add", 1), ("sub", -1)):
            got = _carried(f"{op}.cc.{kind} first, a, b;\n{op}c.{kind} d, a, b;", a, b)
            for x, y, high in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
                double = (x << bits | x) + sign * (y << bits | y)
                assert high == double >> bits & (1 << bits) - 1
            got = _carried(f"{op}.cc.{kind} first, a, b;\n{op}c.cc.{kind} first, a, b;\n{op}c.{kind} d, 0, 0;", a, b)
            for x, y, top in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
                assert top == (x << bits | x) + sign * (y << bits | y) >> 2 * bits & (1 << bits) - 1


@pytest.mark.parametrize("bits", [32, 64])
def test_products_that_carry(bits):
    """mad.lo.cc and madc.hi: a · b + c in two registers."""
    edges = [0, 1, 3, (1 << bits) - 1, 0x9E3779B97F4A7C15 % (1 << bits)]
    a, b, c = (np.array(v, f"u{bits // 8}")
               for v in zip(*[(x, y, z) for x in edges for y in edges for z in edges], strict=True))  # fmt: skip
    body = f"mad.lo.cc.u{bits} first, a, b, c;\nmadc.hi.u{bits} d, a, b, 0;"
    for x, y, z, high in zip(*(v.tolist() for v in (a, b, c, _carried(body, a, b, c))), strict=True):
        assert high == x * y + z >> bits
