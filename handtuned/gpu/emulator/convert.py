"""cvt: from one number format to another, with the rounding that the opcode names.

`cvt.rni.s32.f32` reads: to s32, from f32, round to the nearest integer. Integers that do not fit are clamped, and NaN
becomes 0, or the highest bit alone where the source is f64 or the destination has 64 bits; fp16 and bf16 overflow to
infinity unless `.satfinite` asks for the largest finite number.
"""

import numpy as np

from .floats import ROUNDINGS, clamp_to_one, flush, narrow
from .types import F16, F32, F64, FP8, TYPES, U8, U16, U32, UNSIGNED, bf16_to_f32, f32_to_bf16, f32_to_f16, halves

_TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
_LARGEST = {"f16": 0x7BFF, "bf16": 0x7F7F}


def _read(of):
    return bf16_to_f32 if of == "bf16" else (lambda a: a)


def _float_to_integer(to, of, parts):
    rounding = _TO_INTEGER[next(m for m in parts if m in _TO_INTEGER)]
    dst, read, info = TYPES[to], _read(of), np.iinfo(TYPES[to])
    highest_bit = UNSIGNED[dst.itemsize].type(1 << 8 * dst.itemsize - 1).view(dst)
    of_nan = highest_bit if of == "f64" or dst.itemsize == 8 else dst.type(0)

    def run(a):
        x = rounding(read(a).astype(F64))
        nan, low, high = np.isnan(x), x <= float(info.min), x >= float(info.max)
        inside = np.where(nan | low | high, 0.0, x).astype(dst)
        return np.select([nan, low, high], [of_nan, dst.type(info.min), dst.type(info.max)], inside)

    return run


def to_16_bits(to, mode, parts):
    """Function of fp32 or fp64 (exact, or rounded to odd) → the bits of f16 or bf16."""
    plain = f32_to_bf16 if to == "bf16" else f32_to_f16

    def run(x):
        if x.dtype == F32:
            if mode == "rn" and not {"satfinite", "relu"} & set(parts):
                return plain(x)
            x = x.astype(F64)
        if to == "bf16":
            bits = narrow(x, "bf16", mode)
        else:
            bits = np.where(np.isnan(x), U16.type(0x7FFF), narrow(x, F16, mode).view(U16))
        if "satfinite" in parts:
            magnitude = bits & U16.type(0x7FFF)
            infinite = ~np.isnan(x) & (magnitude > U16.type(_LARGEST[to]))
            bits = np.where(infinite, (bits & U16.type(0x8000)) | U16.type(_LARGEST[to]), bits)
        if "relu" in parts:
            bits = np.where((bits & U16.type(0x8000)) != 0, U16.type(0), bits)
        return bits

    return run


def _to_tf32(mode):
    def run(a):
        bits = a.view(U32)
        if mode == "rz":
            rounded = bits
        elif mode == "rna":  # to nearest, ties away from zero
            rounded = bits + U32.type(0x1000)
        else:
            rounded = bits + U32.type(0xFFF) + ((bits >> U32.type(13)) & U32.type(1))
        return np.where(np.isnan(a), U32.type(0x7FFFFFFF), rounded) & U32.type(0xFFFFE000)

    return run


def _to_float(to, of, parts):
    dst, read = TYPES[to], _read(of)
    mode = next((m for m in parts if m in ROUNDINGS), "rn")
    whole = next((_TO_INTEGER[m] for m in parts if m in _TO_INTEGER), None)
    if to in ("f16", "bf16"):
        finish = to_16_bits(to, mode, parts)
    elif mode == "rn" or dst == F64:
        finish = lambda x: x.astype(dst)  # noqa: E731
    else:
        finish = lambda x: narrow(x, dst, mode)  # noqa: E731
    # 64-bit integers do not fit into fp64: numpy rounds them straight to the type asked for
    direct = TYPES[of].kind in "iu" and of != "bf16" and TYPES[of].itemsize == 8 and mode == "rn" and dst.kind == "f"

    def run(a):
        x = read(a)
        if direct:
            return x.astype(dst) if to != "f16" else finish(x.astype(F64))
        if "ftz" in parts and x.dtype == F32:
            x = flush(x)
        if whole is not None:
            x = whole(x)
        if mode != "rn" or (to in ("f16", "bf16") and x.dtype != F32):
            x = x.astype(F64)
        out = finish(x)
        if "sat" in parts:
            out = clamp_to_one(out if out.dtype != U16 else out.view(F16))
            out = out.view(U16) if to == "f16" else out
        return flush(out) if "ftz" in parts and out.dtype == F32 else out

    return run


def to_fp8(kind, x):
    """Bits of the nearest "e4m3" or "e5m2", ties to even; what is beyond the largest becomes the largest."""
    finite = FP8[kind][:128][np.isfinite(FP8[kind][:128])].astype(F64)
    between, size = (finite[1:] + finite[:-1]) / 2, np.abs(x.astype(F64))
    code = np.searchsorted(between, size)
    code += (code & 1) & (size == between[np.minimum(code, between.size - 1)])
    return np.where(np.isnan(x), 0x7F, code | np.signbit(x) << 7).astype(U8)


def _fp8_pair(to, of, parts):
    """Two numbers of 8 bits in a 16-bit register, the first operand above; from f32, or from and to f16x2."""
    relu = (lambda x: np.where(x < 0, F32.type(0), x)) if "relu" in parts else (lambda x: x)
    if to == "f16x2":
        table = FP8[of[:-2]]
        return (lambda a: f32_to_f16(relu(table[np.ascontiguousarray(a).view(U8)])).view(U32)), [U16], U32
    if "satfinite" not in parts:
        return None
    if of == "f16x2":
        return (lambda a: to_fp8(to[:-2], relu(halves(a).view(F16).astype(F32))).view(U16)), [U32], U16

    def from_f32(high, low):
        return to_fp8(to[:-2], relu(high)).astype(U16) << U16.type(8) | to_fp8(to[:-2], relu(low))

    return (from_f32, [F32, F32], U16) if of == "f32" else None


def convert(parts):
    """(function, source dtypes, destination dtype) of the parts of a cvt; None if it is not known."""
    to, of = parts[-2], parts[-1]
    if (to if to != "f16x2" else of) in ("e4m3x2", "e5m2x2"):
        return _fp8_pair(to, of, parts)
    if to not in TYPES or of not in TYPES:
        return None
    modes = parts[1:-2]
    if to in ("f16x2", "bf16x2"):
        half = to_16_bits(to[:-2], next((m for m in modes if m in ROUNDINGS), "rn"), modes)

        def pair(high, low):
            return (half(high).astype(U32) << U32.type(16)) | half(low).astype(U32)

        return pair, [F32, F32], U32
    if to == "tf32":
        return _to_tf32(next(m for m in modes if m in ("rna", "rn", "rz"))), [F32], U32
    is_float = {name: name in ("f16", "bf16", "f32", "f64") for name in (to, of)}
    if is_float[to]:
        return _to_float(to, of, modes), [TYPES[of]], U16 if to in ("f16", "bf16") else TYPES[to]
    if is_float[of]:
        return _float_to_integer(to, of, modes), [TYPES[of]], TYPES[to]
    dst = TYPES[to]
    if "sat" in modes:
        info = np.iinfo(dst)
        low, high = max(info.min, np.iinfo(TYPES[of]).min), min(info.max, np.iinfo(TYPES[of]).max)
        return (lambda a: np.clip(a, low, high).astype(dst)), [TYPES[of]], dst
    return (lambda a: a.astype(dst)), [TYPES[of]], dst
