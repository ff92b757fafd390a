"""PTX's types as numpy's, and numbers of fewer bits than 32 as fp32.

A register is 16, 32 or 64 bits of anything; the instruction says how to read it. So a register here is an array of
whatever type it was written as, and reading it as another type of that size is a view. bf16 has no numpy type: it is
kept as its 16 bits, the upper half of an fp32. A 32-bit register may hold two 16-bit numbers (f16x2, bf16x2).
"""

import numpy as np

U8, U16, U32, U64 = (np.dtype(f"u{n}") for n in (1, 2, 4, 8))
S8, S16, S32, S64 = (np.dtype(f"i{n}") for n in (1, 2, 4, 8))
F16, F32, F64 = (np.dtype(f"f{n}") for n in (2, 4, 8))
PRED = np.dtype(bool)

TYPES = {
    "b8": U8, "u8": U8, "s8": S8, "b16": U16, "u16": U16, "s16": S16, "b32": U32, "u32": U32, "s32": S32, "b64": U64,
    "u64": U64, "s64": S64, "f16": F16, "f32": F32, "f64": F64, "pred": PRED, "bf16": U16, "tf32": U32,
    "f16x2": U32, "bf16x2": U32, "s16x2": U32, "u16x2": U32,
}  # fmt: skip
UNSIGNED = {1: U8, 2: U16, 4: U32, 8: U64}
WIDER = {U8: U16, S8: S16, U16: U32, S16: S32, U32: U64, S32: S64}
_CODES = np.arange(128)
E5M2 = (_CODES.astype(U16) << U16.type(8)).view(F16).astype(F32)  # the upper half of an fp16
E4M3 = np.where(_CODES < 8, _CODES * 2.0**-9, (1 + _CODES % 8 / 8) * 2.0 ** (_CODES // 8 - 7)).astype(F32)
E4M3[127] = np.nan  # no infinity, one NaN
FP8 = {kind: np.concatenate([table, -table]) for kind, table in (("e4m3", E4M3), ("e5m2", E5M2))}  # by their bits
NAN16 = U16.type(0x7FFF)  # the NaN that hardware writes, fp16's and bf16's alike


def type_of(op: str):
    """dtype of the last part of an opcode."""
    return TYPES[op.rsplit(".", 1)[-1]]


def bf16_to_f32(bits):
    return (bits.astype(U32) << U32.type(16)).view(F32)


def f32_to_bf16(x):
    """Round to nearest even."""
    bits = np.ascontiguousarray(x).view(U32)
    out = ((bits + U32.type(0x7FFF) + ((bits >> U32.type(16)) & U32.type(1))) >> U32.type(16)).astype(U16)
    return np.where(np.isnan(x), NAN16, out)


def f32_to_f16(x):
    """Round to nearest even; the bits."""
    return np.where(np.isnan(x), NAN16, x.astype(F16).view(U16))


def to_tf32(bits):
    """fp32 bits → what a tensor core reads of them: it ignores the low 13."""
    return (bits & U32.type(0xFFFFE000)).view(F32)


def halves(words):
    """[..., n] 32-bit words → [..., 2n] 16-bit ones, the low half first."""
    return np.ascontiguousarray(words).view(U16)


def small_floats(words, kind):
    """[..., n] 32-bit words → the fp32 values in them: n of "tf32", 2n of "f16" or "bf16", 4n of 8 bits."""
    if kind in FP8:
        return FP8[kind][np.ascontiguousarray(words).view(U8)]
    if kind in ("s8", "u8"):
        return np.ascontiguousarray(words).view(TYPES[kind]).astype(F32)
    if kind == "tf32":
        return to_tf32(np.ascontiguousarray(words).view(U32))
    pairs = halves(words)
    return bf16_to_f32(pairs) if kind == "bf16" else pairs.view(F16).astype(F32)
