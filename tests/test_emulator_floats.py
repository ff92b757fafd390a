"""Floating-point instructions of the emulator against exact arithmetic (fractions), rounded once; conversions too."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import apply

FORMATS = {
    "f16": (11, -14, 15, 16),
    "bf16": (8, -126, 127, 16),
    "f32": (24, -126, 127, 32),
    "f64": (53, -1022, 1023, 64),
}
NUMPY = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def as_floats(bits, kind):
    """Bits (or numpy floats) as fp64, exactly."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(NUMPY[kind]).astype(np.float64)


def numbers(kind, seed=0, count=320, scale=1.0):
    """Bits of random numbers of all sizes, of ordinary ones, and of the special ones."""
    rng = np.random.default_rng(seed)
    size = FORMATS[kind][3]
    ordinary = torch.from_numpy(rng.normal(0, scale, count // 2))
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}[kind]
    ints = {16: torch.int16, 32: torch.int32, 64: torch.int64}[size]
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 0.5, 1.5, 2.5, 65504.0, 1e-8])
    parts = [ordinary.to(dtype), special.to(dtype)]
    bits = torch.cat([part.view(ints) for part in parts]).numpy().view(f"u{size // 8}")
    wild = rng.integers(0, (1 << size) - 1, count - bits.size, dtype=np.uint64, endpoint=True).astype(bits.dtype)
    return rng.permutation(np.concatenate([bits, wild]))


def rounded(x, kind, mode="rn"):
    """An exact Fraction in a format, as fp64 (f64: as float); overflow as the mode says."""
    digits, lowest, highest, _ = FORMATS[kind]
    if x == 0:
        return 0.0
    sign, x = (-1, -x) if x < 0 else (1, x)
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= x < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, lowest) - digits + 1)
    n, rest = divmod(x, unit)
    up = {"rn": rest * 2 > unit or (rest * 2 == unit and n % 2 == 1), "rz": False, "rp": rest > 0 and sign > 0,
          "rm": rest > 0 and sign < 0}[mode]  # fmt: skip
    out = (n + up) * unit
    largest = (Fraction(2) - Fraction(2) ** (1 - digits)) * Fraction(2) ** highest
    if out > largest:
        away = mode == "rn" or (mode == "rp" and sign > 0) or (mode == "rm" and sign < 0)
        return sign * (math.inf if away else float(largest))
    return sign * float(out)


def same(got, want):
    """Equal, or both NaN; zeros of either sign are equal."""
    return np.array_equal(np.asarray(got, np.float64), np.asarray(want, np.float64), equal_nan=True)


EXACT = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
         "fma": lambda a, b, c: a * b + c, "div": lambda a, b: a / b}  # fmt: skip


def expected(op, rows, kind, mode="rn"):
    out = []
    for row in rows:
        row = [float(x) for x in row]
        if all(map(math.isfinite, row)) and not (op == "div" and row[1] == 0):
            out.append(rounded(EXACT[op](*map(Fraction, row)), kind, mode))
        else:
            with np.errstate(all="ignore"):
                out.append(float(EXACT[op](*map(np.float64, row))))
    return out


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "fma"])
def test_rounded_once(op, kind):
    n = 3 if op == "fma" else 2
    inputs = [numbers(kind, seed) for seed in range(n)]
    letters = ", ".join("abc"[:n])
    got = apply(f"{op}.rn.{kind} d, {letters};", inputs, NUMPY[kind])
    rows = zip(*(as_floats(x, kind) for x in inputs), strict=True)
    want = expected(op, rows, kind)
    if op == "fma" and kind == "f64":  # products that overflow or lose bits below 2**-1022 are not split exactly
        wide = np.abs(as_floats(inputs[0], kind) * as_floats(inputs[1], kind))
        fine = ~((wide > 1e290) | (wide < 1e-290) | ~np.isfinite(as_floats(inputs[0], kind)))
        fine &= (np.abs(as_floats(inputs[0], kind)) < 1e290) & (np.abs(as_floats(inputs[1], kind)) < 1e290)
        got, want = got[fine], np.array(want)[fine]
    assert same(got, want)


def test_fma_rounds_once_where_two_roundings_differ():
    """1 + 2⁻²³ · (2⁻²⁴ …): the fp64 sum lies exactly between two fp32 numbers and the exact one beside it."""
    a = np.array([1 + 2**-23, 1 + 2**-23, 2**-24, 1.5], np.float32)
    b = np.array([1 + 2**-23, 1 - 2**-24, 1 + 2**-23, 2**-60], np.float32)
    c = np.array([2**-60, 2**-70, 1.0, 1 + 2**-23], np.float32)
    got = apply("fma.rn.f32 d, a, b, c;", [a, b, c], np.float32)
    assert got.tolist() == expected("fma", zip(a, b, c, strict=True), "f32")


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma", "div", "rcp"])
def test_directed_rounding(op, kind, mode):
    n = {"fma": 3, "rcp": 1}.get(op, 2)
    inputs = [numbers(kind, seed) for seed in range(n)]
    got = apply(f"{op}.{mode}.{kind} d, {', '.join('abc'[:n])};", inputs, NUMPY[kind])
    rows = zip(*(as_floats(x, kind) for x in inputs), strict=True)
    want = expected("div", ((1.0, *row) for row in rows), kind, mode) if op == "rcp" else expected(op, rows, kind, mode)
    assert same(got, want)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_directed_roots(kind, mode):
    x = numbers(kind)
    got, x = apply(f"sqrt.{mode}.{kind} d, a;", [x], NUMPY[kind]), as_floats(x, kind)
    fine = np.isfinite(x) & (x > 0)
    assert same(got[~fine], np.sqrt(x[~fine]))
    to = np.nextafter(got[fine], NUMPY[kind](np.inf if mode != "rp" else 0))
    for a, r, beyond in zip(x[fine], got[fine], to, strict=True):
        exact, r, beyond = Fraction(a), Fraction(float(r)), Fraction(float(beyond))
        assert beyond**2 < exact <= r**2 if mode == "rp" else r**2 <= exact < beyond**2


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("packed", [False, True])
def test_sixteen_bits(op, kind, packed):
    n = 3 if op == "fma" else 2
    inputs = [numbers(kind, seed, scale=8.0) for seed in range(n)]
    given = [x.view(np.uint32) if packed else x for x in inputs]
    got = apply(f"{op}.rn.{kind}{'x2' if packed else ''} d, {', '.join('abc'[:n])};", given, given[0].dtype)
    want = expected(op, zip(*(as_floats(x, kind) for x in inputs), strict=True), kind)
    assert same(as_floats(got.view(np.uint16), kind), want)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_sixteen_bit_rest(kind):
    a, b = numbers(kind, 0), numbers(kind, 1)
    x, y = as_floats(a, kind), as_floats(b, kind)
    for op, fn in (("max", np.fmax), ("min", np.fmin), ("max.NaN", np.maximum), ("min.NaN", np.minimum)):
        assert same(as_floats(apply(f"{op}.{kind} d, a, b;", [a, b], np.uint16), kind), fn(x, y))
    assert same(as_floats(apply(f"neg.{kind} d, a;", [a], np.uint16), kind), -x)
    assert same(as_floats(apply(f"abs.{kind} d, a;", [a], np.uint16), kind), np.abs(x))
    assert apply(f"setp.lt.{kind} d, a, b;", [a, b], np.int32, predicate=True).tolist() == (x < y).astype(int).tolist()
    relu = as_floats(apply(f"fma.rn.relu.{kind} d, a, b, b;", [a, b], np.uint16), kind)
    assert (relu[~np.isnan(relu)] >= 0).all() and (relu > 0).any()


def test_mixed_precision_sum():
    for kind in ("f16", "bf16"):
        a, c = numbers(kind, 0), numbers("f32", 1)
        got = apply(f"add.rn.f32.{kind} d, a, b;", [a, c], np.float32)
        rows = zip(as_floats(a, kind), as_floats(c, "f32"), strict=True)
        assert same(got, expected("add", rows, "f32"))


def test_pairs_of_singles():
    a, b = numbers("f32", 0), numbers("f32", 1)
    got = apply("add.rn.f32x2 d, a, b;", [a.view(np.uint64), b.view(np.uint64)], np.uint64).view(np.float32)
    assert same(got, expected("add", zip(as_floats(a, "f32"), as_floats(b, "f32"), strict=True), "f32"))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_signs_and_extremes(kind):
    a, b = (numbers(kind, seed).view(NUMPY[kind]) for seed in (0, 1))
    for op, fn in (("max", np.fmax), ("min", np.fmin)):
        assert same(apply(f"{op}.{kind} d, a, b;", [a, b], NUMPY[kind]), fn(a, b))
    assert same(apply(f"neg.{kind} d, a;", [a], NUMPY[kind]), -a)
    assert same(apply(f"abs.{kind} d, a;", [a], NUMPY[kind]), np.abs(a))
    assert same(apply(f"copysign.{kind} d, a, b;", [a, b], NUMPY[kind]), np.copysign(b, a))
    if kind == "f32":
        assert same(apply("max.NaN.f32 d, a, b;", [a, b], np.float32), np.maximum(a, b))


@pytest.mark.parametrize("op,fn", [
    ("sqrt.rn.f32", np.sqrt), ("rcp.rn.f32", lambda x: 1 / x), ("ex2.approx.ftz.f32", np.exp2),
    ("lg2.approx.f32", np.log2), ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)), ("sin.approx.f32", np.sin),
    ("cos.approx.f32", np.cos), ("tanh.approx.f32", np.tanh), ("sqrt.approx.f32", np.sqrt),
])  # fmt: skip
def test_special_functions(op, fn):
    a = np.random.default_rng(0).uniform(0.01, 20, 300).astype(np.float32)
    got, want = apply(f"{op} d, a;", [a], np.float32).astype(np.float64), fn(a.astype(np.float64))
    budget = 0.5000001 if ".rn" in op else 2.0  # of a unit in the last place: rounded right, or NVIDIA's own bound
    assert (
        np.abs(got - want) <= budget * np.spacing(np.abs(want).astype(np.float32)) + 1e-7 * ("sin" in op or "cos" in op)
    ).all()


def test_subnormals_are_flushed():
    a = np.array([1e-40, -1e-40, 1.0, 2e-38], np.float32)
    assert apply("mul.ftz.f32 d, a, b;", [a, np.ones(4, np.float32)], np.float32).tolist() == [0, 0, 1, float(a[3])]
    assert apply("mul.f32 d, a, b;", [a, np.ones(4, np.float32)], np.float32).tolist() == a.tolist()


def test_saturation():
    a = np.array([-1, 0.25, 3, np.nan], np.float32)
    assert apply("add.sat.f32 d, a, b;", [a, np.zeros(4, np.float32)], np.float32).tolist() == [0, 0.25, 1, 0]


@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_comparisons(name):
    a, b = (numbers("f32", seed).view(np.float32) for seed in (0, 1))
    b[::2] = a[::2]
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        want = unordered == (name == "nan")
    else:
        fn = {
            "eq": np.equal,
            "ne": np.not_equal,
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
        }
        want = np.where(unordered, name.endswith("u"), fn[name[:2]](a, b))
    assert apply(f"setp.{name}.f32 d, a, b;", [a, b], np.int32, predicate=True).tolist() == want.astype(int).tolist()


@pytest.mark.parametrize("to", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_narrowing(to, mode):
    a = numbers("f32", 3, scale=100.0)
    x = as_floats(a, "f32")
    want = [rounded(Fraction(v), to, mode) if math.isfinite(v) else v for v in x]
    assert same(as_floats(apply(f"cvt.{mode}.{to}.f32 d, a;", [a], np.uint16), to), want)
    pair = apply(f"cvt.{mode}.{to}x2.f32 d, a, b;", [a, a[::-1].copy()], np.uint32).view(np.uint16)
    assert same(as_floats(pair[1::2], to), want) and same(as_floats(pair[::2], to), want[::-1])
    finite = as_floats(apply(f"cvt.{mode}.satfinite.{to}.f32 d, a;", [a], np.uint16), to)
    assert np.isfinite(finite[~np.isnan(x)]).all()
    relu = as_floats(apply(f"cvt.{mode}.relu.{to}.f32 d, a;", [a], np.uint16), to)
    assert same(relu[~np.isnan(x)], np.maximum(want, 0)[~np.isnan(x)])


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_double_to_single(mode):
    a = numbers("f64", 3)
    want = [rounded(Fraction(v), "f32", mode) if math.isfinite(v) else v for v in as_floats(a, "f64")]
    assert same(apply(f"cvt.{mode}.f32.f64 d, a;", [a], np.float32), want)


@pytest.mark.parametrize("to,of", [("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16")])
def test_widening(to, of):
    a = numbers(of)
    assert same(apply(f"cvt.{to}.{of} d, a;", [a], NUMPY[to]), as_floats(a, of))


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32(mode):
    """tf32 has 11 significant bits and fp32's exponents."""
    a = np.random.default_rng(0).normal(0, 100, 300).astype(np.float32)
    got = apply(f"cvt.{mode}.tf32.f32 d, a;", [a], np.uint32)
    unit = 2.0 ** (np.floor(np.log2(np.abs(a))) - 10)
    ratio = np.abs(a).astype(np.float64) / unit
    steps = {"rna": np.floor(ratio + 0.5), "rn": np.rint(ratio), "rz": np.floor(ratio)}[mode]
    assert (got & 0x1FFF == 0).all() and same(got.view(np.float32), np.copysign(steps * unit, a))


ROUNDS = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("mode", ROUNDS)
@pytest.mark.parametrize("to", ["s8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("of", ["f32", "f64"])
def test_to_integers(to, of, mode):
    a = numbers(of, 5, scale=1000.0)
    a = a[~np.isnan(as_floats(a, of))]
    bits, low = int(to[1:]), -(1 << int(to[1:]) - 1) if to[0] == "s" else 0
    high = (1 << bits - (to[0] == "s")) - 1
    want = [low if v <= low else high if v >= high else ROUNDS[mode](v) for v in as_floats(a, of)]
    out = np.dtype(f"{'i' if to[0] == 's' else 'u'}{max(bits, 16) // 8}")
    assert apply(f"cvt.{mode}.{to}.{of} d, a;", [a], out).tolist() == want


@pytest.mark.parametrize("of", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
def test_from_integers(to, of):
    bits = int(of[1:])
    a = np.random.default_rng(1).integers(0, (1 << bits) - 1, 300, dtype=np.uint64, endpoint=True)
    a = (a >> np.random.default_rng(2).integers(0, bits, 300).astype(np.uint64)).astype(f"u{bits // 8}")
    a = a.view(f"{'i' if of[0] == 's' else 'u'}{bits // 8}")
    got = apply(f"cvt.rn.{to}.{of} d, a;", [a], np.uint16 if to in ("f16", "bf16") else NUMPY[to])
    assert same(as_floats(got, to), [rounded(Fraction(int(v)), to) for v in a])


def test_rounding_to_whole_numbers():
    a = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e9, np.inf], np.float32)
    for mode, fn in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        assert same(apply(f"cvt.{mode}.f32.f32 d, a;", [a], np.float32), fn(a))
    assert same(apply("cvt.sat.f32.f32 d, a;", [a], np.float32), [0, 0, 0, 0.5, 1, 1, 1, 1])


@pytest.mark.parametrize(
    "to,of", [("s16", "s8"), ("s32", "s8"), ("u32", "u16"), ("s64", "s32"), ("u16", "u32"), ("s32", "s64")]
)
def test_between_integers(to, of):
    size = max(int(of[1:]) // 8, 2)
    a = np.random.default_rng(3).integers(0, 1 << 8 * size - 1, 300).astype(f"u{size}")
    narrow = a.astype(f"{'i' if of[0] == 's' else 'u'}{int(of[1:]) // 8}")
    want = narrow.astype(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}")
    assert apply(f"cvt.{to}.{of} d, a;", [a], want.dtype).tolist() == want.tolist()
    clipped = apply("cvt.sat.s8.s32 d, a;", [narrow.astype(np.int32)], np.int16)
    assert clipped.tolist() == np.clip(narrow.astype(np.int64).astype(np.int32), -128, 127).tolist()


def test_the_largest_of_three():
    """Blackwell's max.f32 and min.f32 of three operands: a NaN loses, and with .NaN it wins."""
    values = [numbers("f32", seed).view(np.float32) for seed in range(3)]
    for op, fn in (("max", np.fmax), ("min", np.fmin), ("max.NaN", np.maximum), ("min.NaN", np.minimum)):
        assert same(apply(f"{op}.f32 d, a, b, c;", values, np.float32), fn(fn(values[0], values[1]), values[2]))


def test_nan_as_an_integer():
    """0, or the highest bit alone where the source is f64 or the destination has 64 bits."""
    for of, to in (("f32", "s32"), ("f32", "u32"), ("f32", "s64"), ("f32", "u64"), ("f64", "s32"), ("f64", "u32"),
                   ("f64", "s64"), ("f64", "u16")):  # fmt: skip
        bits = int(to[1:])
        got = apply(f"cvt.rzi.{to}.{of} d, a;", [np.array([np.nan, 3.0], NUMPY[of])], f"u{bits // 8}")
        assert got.tolist() == [1 << bits - 1 if of == "f64" or bits == 64 else 0, 3]
