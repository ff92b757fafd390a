"""Integer arithmetic: wraps around, never fails. Each function takes and gives arrays of one type."""

import numpy as np

from .types import S16, S32, S64, U8, U16, U32, U64, WIDER


def bits_of(dtype):
    return dtype.itemsize * 8


def divide(a, b):
    """Toward zero. Division by zero gives all ones, as on the card."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    q = a // safe
    if a.dtype.kind == "i":  # numpy rounds down
        q = q + ((a - q * safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(zero, np.array(-1).astype(a.dtype), q)


def remainder(a, b):
    return a - divide(a, b) * b


def shift_left(a, n):
    bits = bits_of(a.dtype)
    return np.where(n >= bits, a.dtype.type(0), a << np.minimum(n, bits - 1).astype(a.dtype))


def shift_right(a, n):
    """Arithmetic for signed types; more than the width shifts everything out."""
    bits = bits_of(a.dtype)
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), shifted)


def _low32(x):
    return x & U64.type(0xFFFFFFFF)


def _high_u64(a, b):
    half = U64.type(32)
    middle = (a >> half) * _low32(b) + ((_low32(a) * _low32(b)) >> half)
    other = _low32(a) * (b >> half) + _low32(middle)
    return (a >> half) * (b >> half) + (middle >> half) + (other >> half)


def multiply_high(a, b):
    t = a.dtype
    if t.itemsize < 8:
        wide = WIDER[t]
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits_of(t))).astype(t)
    high = _high_u64(a.view(U64), b.view(U64))
    if t == S64:
        high = high - np.where(a < 0, b.view(U64), U64.type(0)) - np.where(b < 0, a.view(U64), U64.type(0))
    return high.view(t)


def multiply_wide(a, b):
    wide = WIDER[a.dtype]
    return a.astype(wide) * b.astype(wide)


def _small(x):
    """Field positions and lengths use 8 bits of their operand."""
    return (x & U32.type(255)).astype(S64)


def bit_field(a, position, length):
    """`length` bits of `a` from `position`, sign-extended for signed types."""
    bits = bits_of(a.dtype)
    position, length = _small(position), _small(length)
    kept = np.clip(np.minimum(length, bits - position), 0, bits)
    up, down = np.clip(bits - position - kept, 0, bits - 1), np.clip(bits - kept, 0, bits - 1)
    field = (a << up.astype(a.dtype)) >> down.astype(a.dtype)
    if a.dtype.kind == "i":  # beyond the top the sign bit goes on
        field = np.where((kept == 0) & (length > 0), a >> a.dtype.type(bits - 1), field)
    return np.where((length == 0) | ((kept == 0) & (a.dtype.kind == "u")), a.dtype.type(0), field)


def insert_field(a, b, position, length):
    """`b` with `length` bits from `position` replaced by the low bits of `a`."""
    bits, t = bits_of(a.dtype), a.dtype
    position, length = _small(position), np.minimum(_small(length), bits)
    ones = np.where(length >= bits, ~t.type(0), (t.type(1) << np.minimum(length, bits - 1).astype(t)) - t.type(1))
    mask = shift_left(ones, position)
    return (b & ~mask) | (shift_left(a, position) & mask)


_PERMUTE_MODES = {
    "f4e": lambda s: [s, s + 1, s + 2, s + 3],
    "b4e": lambda s: [s, (s - 1) & 7, (s - 2) & 7, (s - 3) & 7],
    "rc8": lambda s: [s] * 4,
    "ecl": lambda s: [np.maximum(s, i) for i in range(4)],
    "ecr": lambda s: [np.minimum(s, i) for i in range(4)],
    "rc16": lambda s: [(s & 1) * 2, (s & 1) * 2 + 1] * 2,
}


def permute(mode):
    """prmt: four bytes picked out of eight; bit 3 of a selector repeats the byte's sign bit instead."""

    def run(a, b, selector):
        shape = np.broadcast_shapes(a.shape, b.shape, selector.shape)
        pool = np.stack([np.broadcast_to(x, shape) for x in (a, b)], -1)
        pool = np.ascontiguousarray(pool).view(U8)  # [..., 8]
        selector = np.broadcast_to(selector, shape).astype(S64)
        if mode is None:
            nibbles = np.stack([(selector >> 4 * i) & 15 for i in range(4)], -1)
        else:
            nibbles = np.stack(_PERMUTE_MODES[mode](selector & (7 if mode in ("f4e", "b4e") else 3)), -1) & 7
        picked = np.take_along_axis(pool, nibbles & 7, -1)
        sign = np.where(picked & 128, U8.type(255), U8.type(0))
        return np.ascontiguousarray(np.where(nibbles & 8, sign, picked)).view(U32)[..., 0]

    return run


def logic3(a, b, c, table):
    """lop3: bit i of the table is the result where a, b, c hold the bits of i."""
    table, out = int(table.flat[0]), U32.type(0)
    for i in range(8):
        if table >> i & 1:
            out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return np.asarray(out, U32)


def funnel(left, wrap):
    """shf: shift the 64 bits `high:low`, keep the upper (left) or lower word."""

    def run(low, high, n):
        n = ((n & U32.type(31)) if wrap else np.minimum(n, U32.type(32))).astype(U64)
        both = (high.astype(U64) << U64.type(32)) | low
        return ((both << n) >> U64.type(32)).astype(U32) if left else (both >> n).astype(U32)

    return run


def two_shorts(fn, signed):
    """An operation on the two 16-bit halves of 32-bit words."""
    t = S16 if signed else U16

    def run(a, b):
        a, b = np.broadcast_arrays(a, b)
        return fn(np.ascontiguousarray(a).view(t), np.ascontiguousarray(b).view(t)).view(U32)

    return run


def count_ones(a):
    return np.bitwise_count(a).astype(U32)


def highest_bit(a):
    """bfind: position of the highest set bit (of a negative number: clear bit); all ones if there is none."""
    if a.dtype.kind == "i":
        a = np.where(a < 0, ~a, a)
    x = a.astype(U64)
    for n in (1, 2, 4, 8, 16, 32):
        x = x | (x >> U64.type(n))
    return (np.bitwise_count(x).astype(S32) - 1).view(U32)


def shift_amount(a):
    """bfind.shiftamt: by how much that bit must be shifted to the left to be the first."""
    found = highest_bit(a)
    return np.where(found == U32.type(0xFFFFFFFF), found, U32.type(bits_of(a.dtype) - 1) - found)


def leading_zeros(a):
    return (U32.type(bits_of(a.dtype) - 1) - highest_bit(a)).astype(U32)


def reverse_bits(a):
    out = np.zeros_like(a)
    for i in range(bits_of(a.dtype)):
        out |= ((a >> a.dtype.type(i)) & a.dtype.type(1)) << a.dtype.type(bits_of(a.dtype) - 1 - i)
    return out


def absolute_difference(a, b, c):
    return c + np.maximum(a, b) - np.minimum(a, b)


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
