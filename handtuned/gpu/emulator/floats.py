"""Floating point: what a GPU rounds, and how.

An fp32 `fma` rounds once: a·b is exact in fp64 (24 + 24 bits fit into 53), the sum with c then rounds to fp64 and
again to fp32. Two roundings may differ from one where the first lands exactly between two fp32 numbers. There the sum
is nudged to the side on which the exact one lies ("round to odd": Boldo and Melquiond 2008).

`.ftz` flushes subnormal operands and results to zero. `.approx` functions are computed by numpy to about one unit in
the last place; the card's own error is up to two.
"""

from fractions import Fraction
from functools import partial

import numpy as np

from .integers import COMPARISONS
from .types import F16, F32, F64, S64, U16, U32, U64, bf16_to_f32, f32_to_bf16, f32_to_f16, halves

ROUNDINGS = ("rn", "rz", "rm", "rp")


def two_sum(a, b):
    """a + b as s + error, exactly (Knuth)."""
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


def to_odd(s, error):
    """fp64 s where s + error is the exact value: inexact results get an odd last bit, so that they stay off ties."""
    bits = s.view(S64)
    step = np.where((error > 0) == (s > 0), 1, -1)
    even = (error != 0) & ((bits & 1) == 0) & np.isfinite(s) & np.isfinite(error)
    return np.where(even, bits + step, bits).view(F64)


def _directed(rounded, error, mode):
    """`rounded` (nearest), to which the exact value would add `error`, moved to the neighbour that `mode` asks for."""
    zero, infinity = rounded.dtype.type(0), rounded.dtype.type(np.inf)
    if mode == "rz":
        return np.where((rounded > 0) & (error < 0) | (rounded < 0) & (error > 0), np.nextafter(rounded, zero), rounded)
    if mode == "rm":
        return np.where(error < 0, np.nextafter(rounded, -infinity), rounded)
    return np.where(error > 0, np.nextafter(rounded, infinity), rounded)


def narrow(x, to, mode="rn"):
    """fp64, inexact ones rounded to odd → fp32, fp16 (as numpy's) or bf16 (its bits)."""
    if to == "bf16":
        single = narrow(x, F32, "rz")  # cut, then mark as inexact: 24 bits keep what 8 need for one rounding
        bits = single.view(U32) | ((single.astype(F64) != x) & np.isfinite(single)).astype(U32)
        if mode == "rn":
            return f32_to_bf16(bits.view(F32))
        cut = bits & U32.type(0xFFFF0000)
        away = (bits & U32.type(0xFFFF)) != 0
        up = away & ((x > 0) if mode == "rp" else (x < 0) if mode == "rm" else False)
        out = ((cut + np.where(up, U32.type(0x10000), U32.type(0))) >> U32.type(16)).astype(U16)
        return np.where(np.isnan(x), U16.type(0x7FFF), out)
    rounded = x.astype(to)
    return rounded if mode == "rn" else _directed(rounded, x - rounded.astype(F64), mode)


def fma32(a, b, c):
    product = a.astype(F64) * b.astype(F64)
    s = np.asarray(product + c)
    tie = ((s.view(U64) & U64.type(0x1FFFFFFF)) == U64.type(0x10000000)) | (np.abs(s) < 2.4e-38)
    if tie.any():
        s, error = two_sum(product, c.astype(F64))
        s = to_odd(s, error)
    return s.astype(F32)


def _two_product(a, b):
    def split(x):
        t = 134217729.0 * x
        high = t - (t - x)
        return high, x - high

    p = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def fma64(a, b, c):
    high, low = _two_product(a, b)
    t, t_error = two_sum(c, low)
    v, v_error = two_sum(high, t)
    rest = to_odd(*two_sum(t_error, v_error))
    return np.where(np.isfinite(rest), v + rest, a * b + c)


def flush(x):
    tiny = np.finfo(x.dtype).tiny
    return np.where(np.abs(x) < tiny, np.copysign(x.dtype.type(0), x), x)


def compare(name):
    """Ordered comparisons are false if either side is NaN; those with a u behind are true."""
    if name in ("nan", "num"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if name in COMPARISONS:
        return COMPARISONS[name]
    fn = COMPARISONS[name[:-1]]
    return lambda a, b: fn(a, b) | np.isnan(a) | np.isnan(b)


def one_over(x):
    return x.dtype.type(1) / x


SPECIAL = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": one_over, "rsqrt": lambda x: one_over(np.sqrt(x)), "sqrt": np.sqrt,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip
_EXACT = {
    # (s, error) of the operation in fp64
    "add": lambda a, b: two_sum(a, b), "sub": lambda a, b: two_sum(a, -b),
    "mul": lambda a, b: (a * b, np.zeros(1)), "fma": lambda a, b, c: two_sum(a * b, c),
}  # fmt: skip


_BESIDE = {
    # what has the sign of the exact result minus r
    "add": lambda r, a, b: a + b - r, "sub": lambda r, a, b: a - b - r, "mul": lambda r, a, b: a * b - r,
    "fma": lambda r, a, b, c: a * b + c - r, "div": lambda r, a, b: a / b - r, "rcp": lambda r, a: 1 / a - r,
    "sqrt": lambda r, a: a - r * r,
}  # fmt: skip


def _beside(base, r, *args):
    """1 where the exact result is above r, -1 below; 0 where there is none."""
    if np.isnan(r) or not np.isfinite(args).all() or (base in ("div", "rcp") and args[-1] == 0):
        return 0
    error = -r if np.isinf(r) else _BESIDE[base](Fraction(float(r)), *[Fraction(float(x)) for x in args])
    return (error > 0) - (error < 0)


def _min_max(base, parts):
    absolute, nan = "xorsign" in parts, "NaN" in parts
    fn = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[base][nan]
    if absolute:
        return lambda a, b: np.copysign(
            fn(np.abs(a), np.abs(b)), np.where(np.signbit(a) != np.signbit(b), a.dtype.type(-1), a.dtype.type(1))
        )
    return fn


def _plain(base, parts, t):
    """The operation on fp32 or fp64 arrays, rounded to nearest; None if there is none."""
    if base in SPECIAL:
        return SPECIAL[base]
    if base in ("min", "max"):
        return _min_max(base, parts)
    return {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
        "fma": fma32 if t == F32 else fma64, "mad": fma32 if t == F32 else fma64,
        "copysign": lambda sign, a: np.copysign(a, sign),
    }.get(base)  # fmt: skip


def _rounded_elsewhere(base, mode, t):
    """Directed rounding: sums and products of fp32 exactly in fp64; the rest, which is rare, by fractions."""
    if base in _EXACT and t == F32:
        exact = _EXACT[base]
        return lambda *args: narrow(to_odd(*np.broadcast_arrays(*exact(*[a.astype(F64) for a in args]))), F32, mode)
    if base not in _BESIDE:
        return None
    nearest, sign = _plain(base, (), t), np.vectorize(partial(_beside, base), otypes=[np.int8])

    def fn(*args):
        rounded = nearest(*args)
        return _directed(rounded, sign(rounded, *args), mode)

    return fn


def clamp_to_one(x):
    return np.clip(np.where(np.isnan(x), x.dtype.type(0), x), x.dtype.type(0), x.dtype.type(1))


def operation(base, parts, t):
    """Function of fp32 or fp64 arrays for an opcode, modifiers included; None if there is none."""
    mode = next((m for m in parts if m in ROUNDINGS), "rn")
    fn = _plain(base, parts, t) if mode == "rn" else _rounded_elsewhere(base, mode, t)
    if fn is None:
        return None
    if "ftz" in parts:
        inner = fn
        fn = lambda *args: flush(inner(*[flush(a) for a in args]))  # noqa: E731
    if "sat" in parts:
        unclamped = fn
        fn = lambda *args: clamp_to_one(unclamped(*args))  # noqa: E731
    return fn


def operation16(base, parts, kind):
    """The same for "f16", "bf16" and their x2: arrays of bits in and out.

    Each result is rounded once from one that fp32 holds exactly, or that fp64 holds rounded to odd (fma).
    """
    to_bits = f32_to_bf16 if kind.startswith("bf16") else f32_to_f16
    to_wide = bf16_to_f32 if kind.startswith("bf16") else (lambda bits: bits.view(F16).astype(F32))
    if base == "fma":

        def fn(a, b, c):
            exact = to_odd(*two_sum(a.astype(F64) * b.astype(F64), c.astype(F64)))
            return narrow(exact, "bf16") if kind.startswith("bf16") else f32_to_f16(exact)

        rounded = True
    else:
        fn, rounded = _plain(base, parts, F32), False
        if base in ("add", "sub") and kind.startswith("bf16"):  # bf16's exponents reach further than fp32's digits
            exact = _EXACT[base]
            fn, rounded = (lambda a, b: narrow(to_odd(*exact(a.astype(F64), b.astype(F64))), "bf16")), True
        if fn is None:
            return None

    def on_bits(*args):
        if base in ("neg", "abs"):  # only the sign bit changes, of a NaN too
            sign = U16.type(0x8000)
            return args[0] ^ sign if base == "neg" else args[0] & ~sign
        out = fn(*[to_wide(a) for a in args])
        out = out if rounded else to_bits(out)
        if "relu" in parts:
            out = np.where((out & U16.type(0x8000)) != 0, U16.type(0), out)
        return to_bits(clamp_to_one(to_wide(out))) if "sat" in parts else out

    if not kind.endswith("x2"):
        return on_bits

    def on_pairs(*args):
        args = np.broadcast_arrays(*args)
        return np.ascontiguousarray(on_bits(*[halves(a) for a in args])).view(U32)

    return on_pairs
