"""Exercises of lesson 09: one block of NF4, two codes per byte, and the kernel that undoes both."""

import numpy as np
import torch

from ...kernels.nf4 import NF4_CODE
from ...kernels.runtime import tl, triton
from ..canaries import guarded
from ..emulated import seen_there, without_faults
from ..exercise import Exercise, WrongAnswer, expect, expect_close, number, unchanged
from ..watch import launched
from . import e09_kernels

LEVELS = NF4_CODE.numpy()

# 09.1


def _nearest(scaled, levels):
    return np.abs(scaled[:, None] - levels[None, :]).argmin(axis=1).astype(np.uint8)


def quantize_block(x, levels):
    absmax = np.abs(x).max()
    return _nearest(x / absmax if absmax > 0 else x, levels), absmax


def _largest_not_magnitude(x, levels):
    absmax = x.max()
    return _nearest(x / absmax if absmax != 0 else x, levels), absmax


def _next_level_up(x, levels):
    absmax = np.abs(x).max()
    scaled = x / absmax if absmax > 0 else x
    return np.clip(np.searchsorted(levels, scaled), 0, 15).astype(np.uint8), absmax


def _divides_by_zero(x, levels):
    absmax = np.abs(x).max()
    with np.errstate(invalid="ignore", divide="ignore"):
        return _nearest(x / absmax, levels), absmax


def check_quantize_block(candidate):
    rng = np.random.default_rng(9)
    blocks = {
        "64 Gaussian values": rng.normal(size=64).astype(np.float32),
        "5 negative values": -np.array([0.1, 0.9, 0.3, 2.5, 0.02], dtype=np.float32),
        "the 16 levels themselves": LEVELS * np.float32(3.0),
        "one value": np.array([-0.25], dtype=np.float32),
        "64 zeros": np.zeros(64, dtype=np.float32),
    }
    for name, x in blocks.items():
        levels = LEVELS.copy()
        with unchanged(x=x, levels=levels):
            answer = candidate(x, levels)
        expect(isinstance(answer, (tuple, list)) and len(answer) == 2, "Return two things: (codes, absmax).")
        codes, absmax = np.asarray(answer[0]), number(answer[1], f"{name}: absmax")
        expect(codes.dtype == np.uint8, f"{name}: the codes must be uint8, got {codes.dtype}.")
        expect(codes.shape == x.shape, f"{name}: one code for each value, got shape {codes.shape}.")
        expect(
            np.isfinite(absmax) and np.isclose(absmax, np.abs(x).max(), rtol=1e-6),
            f"{name}: absmax must be the largest magnitude, {np.abs(x).max():.4f}, got {absmax:.4f}. "
            "A block may be all negative.",
        )
        if not x.any():
            expect(
                (codes == 7).all(),
                f"{name}: every code must be 7, the level 0.0, so that zeros stay zero; got "
                f"{sorted(set(codes.tolist()))}. Do not divide by a zero absmax.",
            )
            continue
        want = quantize_block(x, LEVELS)[0]
        if (codes != want).any():
            i = int(np.nonzero(codes != want)[0][0])
            scaled = x[i] / np.abs(x).max()
            raise WrongAnswer(
                f"{name}: element {i} scaled is {scaled:.4f}; you chose level {LEVELS[int(codes[i]) % 16]:.4f}, but "
                f"{LEVELS[want[i]]:.4f} is the nearest."
            )
    return "Gaussian, all negative, exact levels, a single value, and a block of zeros."


# 09.2


def pack(codes):
    codes = np.append(codes, 7) if len(codes) % 2 else codes
    return (codes[0::2] * 16 + codes[1::2]).astype(np.uint8)


def _low_nibble_first(codes):
    codes = np.append(codes, 7) if len(codes) % 2 else codes
    return (codes[1::2] * 16 + codes[0::2]).astype(np.uint8)


def _padded_with_zero(codes):
    codes = np.append(codes, 0) if len(codes) % 2 else codes
    return (codes[0::2] * 16 + codes[1::2]).astype(np.uint8)


def _odd_dropped(codes):
    even = codes[: len(codes) // 2 * 2]
    return (even[0::2] * 16 + even[1::2]).astype(np.uint8)


def check_pack(candidate):
    rng = np.random.default_rng(10)
    for count in (2, 1, 64, 65, 1000):
        codes = rng.integers(0, 16, size=count).astype(np.uint8)
        codes[-1] = 12
        with unchanged(codes=codes):
            got, want = np.asarray(candidate(codes)), pack(codes)
        expect(got.dtype == np.uint8, f"The bytes must be uint8, got {got.dtype}.")
        expect(
            got.shape == want.shape,
            f"{count} codes need {len(want)} bytes, got {got.shape}. An odd last code needs a byte too.",
        )
        if (got != want).any():
            i = int(np.nonzero(got != want)[0][0])
            if count % 2 and i == len(want) - 1 and got[i] >> 4 == codes[-1]:
                raise WrongAnswer(
                    f"{count} codes: the last byte is {got[i]:#04x}, expected {want[i]:#04x}. Fill up with code 7, "
                    "which stands for 0.0; code 0 stands for −1."
                )
            raise WrongAnswer(
                f"{count} codes: byte {i} is {got[i]:#04x}, expected {want[i]:#04x} from the codes "
                f"{codes[2 * i : 2 * i + 2].tolist()}. The first of a pair goes into the high nibble."
            )
    return "1, 2, 64, 65 and 1000 codes."


# 09.3


@triton.jit
def _dequantize_kernel(
    packed_ptr, absmax_ptr, levels_ptr, out_ptr, N, block_size, BLOCK: tl.constexpr, FORM: tl.constexpr
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < N if FORM != 1 else offs >= 0
    byte = tl.load(packed_ptr + offs // 2, mask=inside, other=0).to(tl.int32)
    first = offs % 2 == (1 if FORM == 2 else 0)
    code = tl.where(first, byte >> 4, byte & 15)
    level = tl.load(levels_ptr + code)
    scale = tl.load(absmax_ptr + (offs // 2 if FORM == 3 else offs) // block_size, mask=inside, other=0.0)
    tl.store(out_ptr + offs, level * scale, mask=inside)


def _dequantize(form=0):
    def dequantize(packed, absmax, levels, out, block_size):
        N = out.numel()
        grid = (triton.cdiv(N, 128),)
        _dequantize_kernel[grid](packed, absmax, levels, out, N, block_size, BLOCK=128, FORM=form)

    return dequantize


def check_dequantize(candidate):
    rng = np.random.default_rng(12)
    for count, block_size in ((1, 32), (64, 64), (63, 32), (65, 32), (1000, 64), (5000, 32)):
        codes = rng.integers(0, 16, size=count).astype(np.uint8)
        scales = rng.uniform(0.5, 2.0, size=-(-count // block_size)).astype(np.float32)
        bytes_ = torch.from_numpy(pack(codes))
        given = {
            "packed": guarded(len(bytes_), torch.uint8, bytes_),
            "absmax": guarded(len(scales), torch.float32, torch.from_numpy(scales)),
            "levels": guarded(16, torch.float32, NF4_CODE),
        }
        out, what = guarded(count), f"{count} values, block_size {block_size}"
        launched(candidate, *given.values(), out, block_size, inputs=given, outputs={"out": out}, what=what)
        got, of_block = out.cpu().numpy(), np.repeat(scales, block_size)[:count]
        want = LEVELS[codes] * of_block
        hint = ""
        swapped = pack(codes)
        swapped = np.stack([swapped & 15, swapped >> 4], axis=1).reshape(-1)[:count]
        if np.allclose(got, LEVELS[swapped] * of_block):
            hint = "The two values of each byte are exchanged: the first lies in the high nibble, byte >> 4."
        elif np.allclose(np.abs(got) > 0, np.abs(want) > 0) and np.allclose(np.sign(got), np.sign(want)):
            hint = "Only the scales are wrong: value i has absmax[i // block_size], counted in values, not bytes."
        expect_close(got, want, f"out ({what})", rtol=1e-6, hint=hint)

    def call():
        packed = torch.randint(0, 256, (50,), dtype=torch.uint8)
        candidate(packed, torch.rand(4), NF4_CODE.clone(), torch.empty(99), 32)

    return f"1, 63, 64, 65, 1000 and 5000 values between canaries, two block sizes{seen_there(without_faults(call))}."


EXERCISES = {
    "09.1": Exercise(
        title="one block of NF4",
        specification="quantize_block(x, levels) → (uint8 codes, absmax): the level nearest to each x / absmax.",
        checker=check_quantize_block,
        solution=quantize_block,
        wrong={
            "largest value, not magnitude": (_largest_not_magnitude, "largest magnitude"),
            "next level up": (_next_level_up, "is the nearest"),
            "divides by zero": (_divides_by_zero, "zero absmax"),
        },
        hints=(
            "absmax = np.abs(x).max(); what if it is zero?",
            "np.abs(scaled[:, None] - levels[None, :]) holds the distance of every value to every level.",
            "argmin(axis=1) of it is the code.",
        ),
    ),
    "09.2": Exercise(
        title="two codes per byte",
        specification="pack(codes) → uint8, the first of a pair in the high nibble; an odd count is filled up with 7.",
        checker=check_pack,
        solution=pack,
        wrong={
            "low nibble first": (_low_nibble_first, "high nibble"),
            "filled up with 0": (_padded_with_zero, "code 0 stands for −1"),
            "odd code dropped": (_odd_dropped, "needs a byte too"),
        },
        hints=(
            "codes[0::2] are the first of each pair, codes[1::2] the second.",
            "The high nibble is worth 16.",
            "np.append(codes, 7) if the count is odd: level 7 is exactly 0.",
        ),
    ),
    "09.3": Exercise(
        title="the dequantize kernel",
        specification=(
            "dequantize(packed, absmax, levels, out, block_size): launch your Triton kernel so that "
            "out[i] = levels[code i] * absmax[i // block_size] for every i, and nothing else is touched."
        ),
        checker=check_dequantize,
        solution=_dequantize(),
        wrong={
            "nibbles exchanged": (_dequantize(2), "high nibble"),
            "no masks": (_dequantize(1), "past its end"),
            "scale by byte": (_dequantize(3), "absmax[i // block_size]"),
        },
        hints=(
            "A program makes BLOCK values: offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), inside = offs < N.",
            "byte = tl.load(packed_ptr + offs // 2, mask=inside, other=0).to(tl.int32); tl.where takes byte >> 4 for "
            "even offs, byte & 15 for odd ones.",
            "tl.load(levels_ptr + code) looks the level up; store with mask=inside; grid: (triton.cdiv(N, BLOCK),).",
        ),
    ),
    **e09_kernels.EXERCISES,
}
