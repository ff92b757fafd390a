"""Arithmetic, logic, comparison and conversion: opcode → what it computes.

`find("fma.rn.f32")` gives a function of numpy arrays, the type that each source is read as, and the type of the
result. Threads do not see each other here: every function works element by element, and arrays of shape (1, 1) (a
value that all threads share) stay so.
"""

from dataclasses import dataclass

import numpy as np

from . import floats, integers
from .convert import convert
from .types import F32, F64, PRED, S32, TYPES, U16, U32, U64, UNSIGNED, WIDER, bf16_to_f32, halves


@dataclass(frozen=True)
class Operation:
    function: object
    sources: list
    destination: np.dtype


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_UNSIGNED_ALIKE = {"add": np.add, "sub": np.subtract, **_LOGIC}  # the same bits whatever the sign
_SIGNED_TOO = {"div": integers.divide, "rem": integers.remainder, "min": np.minimum, "max": np.maximum}
_UNARY = {"neg": np.negative, "abs": np.abs, "not": np.invert, "cnot": lambda a: (a == 0).astype(a.dtype)}
_TO_U32 = {"popc": integers.count_ones, "clz": integers.leading_zeros, "bfind": integers.highest_bit}


def _as_float(kind):
    """How a 16-bit float is read for comparing; None for other types."""
    if kind == "bf16":
        return bf16_to_f32
    return (lambda bits: bits.view(np.float16)) if kind == "f16" else None


def _compare(parts):
    """setp.lt.f32, also joined with a predicate: setp.lt.and.f32 p, a, b, c; of f16x2 [.., 2T] predicates."""
    kind, name = parts[-1], parts[1]
    if kind.endswith("x2"):
        half = _compare([*parts[:-1], kind[:-2]])
        if len(half.sources) == 3:
            return None
        return Operation(lambda a, b: half.function(*map(halves, np.broadcast_arrays(a, b))), [U32, U32], PRED)
    t = TYPES[kind]
    read = _as_float(kind)
    fn = floats.compare(name) if read or t.kind == "f" else integers.COMPARISONS[name]
    if read:
        inner, t = fn, U16
        fn = lambda a, b: inner(read(a), read(b))  # noqa: E731
    if "ftz" in parts:
        plain = fn
        fn = lambda a, b: plain(floats.flush(a), floats.flush(b))  # noqa: E731
    joined = next((_LOGIC[p] for p in parts[2:-1] if p in _LOGIC), None)
    if joined is None:
        return Operation(fn, [t, t], PRED)
    return Operation(lambda a, b, c: joined(fn(a, b), c), [t, t, PRED], PRED)


def _predicate(base):
    if base == "not":
        return Operation(np.logical_not, [PRED], PRED)
    return Operation(_LOGIC[base], [PRED, PRED], PRED) if base in _LOGIC else None


def _multiply(base, parts, t):
    kind = parts[1]
    unsigned = UNSIGNED[t.itemsize]
    if kind == "wide":
        wide = WIDER[t]
        if base == "mul":
            return Operation(integers.multiply_wide, [t, t], wide)
        return Operation(lambda a, b, c: integers.multiply_wide(a, b) + c, [t, t, wide], wide)
    if kind == "hi":
        if base == "mul":
            return Operation(integers.multiply_high, [t, t], t)
        return Operation(lambda a, b, c: integers.multiply_high(a, b) + c, [t] * 3, t)
    if base == "mul":
        return Operation(np.multiply, [unsigned] * 2, unsigned)
    return Operation(lambda a, b, c: a * b + c, [unsigned] * 3, unsigned)


def _integer(base, parts, kind):
    t = TYPES[kind]
    unsigned = UNSIGNED[t.itemsize]
    if kind in ("s16x2", "u16x2"):
        fn = {"add": np.add, "min": np.minimum, "max": np.maximum}.get(base)
        return fn and Operation(integers.two_shorts(fn, kind[0] == "s"), [U32, U32], U32)
    if base in ("mul", "mad") and "sat" not in parts:
        return _multiply(base, parts, t)
    if base in _UNSIGNED_ALIKE and "sat" not in parts and "cc" not in parts:
        return Operation(_UNSIGNED_ALIKE[base], [unsigned] * 2, unsigned)
    if base in ("shl", "shr"):
        t = unsigned if base == "shl" or kind[0] == "b" else t
        return Operation(integers.shift_left if base == "shl" else integers.shift_right, [t, U32], t)
    if base in _SIGNED_TOO and "relu" not in parts:
        return Operation(_SIGNED_TOO[base], [t, t], t)
    if base in _UNARY:
        return Operation(_UNARY[base], [t], t)
    if base in _TO_U32:
        return Operation(integers.shift_amount if "shiftamt" in parts else _TO_U32[base], [t], U32)
    return {
        "bfe": Operation(integers.bit_field, [t, U32, U32], t),
        "bfi": Operation(integers.insert_field, [unsigned, unsigned, U32, U32], unsigned),
        "brev": Operation(integers.reverse_bits, [unsigned], unsigned),
        "lop3": Operation(integers.logic3, [U32] * 4, U32),
        "sad": Operation(integers.absolute_difference, [t] * 3, t),
        "prmt": Operation(integers.permute(parts[2] if len(parts) > 2 else None), [U32] * 3, U32),
        "shf": Operation(integers.funnel(parts[1] == "l", "wrap" in parts), [U32] * 3, U32),
    }.get(base)


def _arity(base):
    if base in floats.SPECIAL or base in ("neg", "abs"):
        return 1
    return 3 if base in ("fma", "mad") else 2


def _on_pairs(fn):
    """An fp32 operation on the two halves of 64-bit registers."""

    def run(*args):
        args = [np.ascontiguousarray(a).view(F32) for a in np.broadcast_arrays(*args)]
        return np.ascontiguousarray(fn(*args)).view(U64)

    return run


def _mixed(base, parts, kind):
    """add.f32.bf16 (Blackwell): 16-bit operands, but for the last one and the sum, which are fp32."""
    fn, n = floats.operation(base, parts, F32), _arity(base)
    widen = bf16_to_f32 if kind == "bf16" else (lambda bits: bits.view(np.float16).astype(F32))
    return fn and Operation(lambda *args: fn(*map(widen, args[:-1]), args[-1]), [U16] * (n - 1) + [F32], F32)


def find(op: str, operands: int = 0) -> Operation | None:
    """The operation of an opcode with so many operands, where that decides; None if it is none of this kind."""
    parts = op.split(".")
    base, kind = parts[0], parts[-1]
    if base == "cvt":
        found = convert(parts)
        return found and Operation(*found)
    if base == "prmt":
        return _integer(base, parts, "b32")
    if kind == "f32x2":
        fn = floats.operation(base, parts, F32)
        return fn and Operation(_on_pairs(fn), [U64] * _arity(base), U64)
    if len(parts) > 2 and parts[-2] == "f32" and kind in ("f16", "bf16"):
        return _mixed(base, parts[:-1], kind)
    t = TYPES.get(kind)
    if t is None:
        return None
    if base == "setp":
        return _compare(parts)
    if base == "selp":
        return Operation(lambda a, b, p: np.where(p, a, b), [t, t, PRED], t)
    if base == "slct":
        choice = F32 if parts[-1] == "f32" else S32
        t = TYPES[parts[-2]]
        return Operation(lambda a, b, c: np.where(c >= 0, a, b), [t, t, choice], t)
    if t == PRED:
        return _predicate(base)
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        fn, t = floats.operation16(base, parts, kind), U32 if kind.endswith("x2") else U16
    elif t in (F32, F64):
        fn = floats.operation(base, parts, t)
        if operands == 3 and base in ("min", "max"):  # Blackwell has them for three
            return Operation(lambda a, b, c: fn(fn(a, b), c), [t] * 3, t)
    else:
        return _integer(base, parts, kind)
    return fn and Operation(fn, [t] * _arity(base), t)
