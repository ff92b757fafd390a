"""Lesson 09's ladder: dequantize with double-quantized scales, and quantize."""

import torch

from ...kernels.nf4 import NF4_CODE
from ...kernels.runtime import tl, triton
from ..canaries import guarded
from ..emulated import seen_there, without_faults
from ..exercise import Exercise, WrongAnswer, expect, expect_close
from ..watch import launched

# 09.4


@triton.jit
def _nested_kernel(
    packed_ptr, codes_ptr, constants_ptr, map_ptr, offset_ptr, levels_ptr, out_ptr, N, block_size, nested_block,
    BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < N
    block = offs // block_size
    coarse = offs // nested_block if FORM == 1 else block // nested_block
    code = tl.load(codes_ptr + block, mask=inside, other=0).to(tl.int32)
    if FORM == 3:
        code = code.to(tl.int8).to(tl.int32) & 127
    constant = tl.load(constants_ptr + coarse, mask=inside & (coarse < N), other=0.0)
    scale = tl.load(map_ptr + code) * constant
    if FORM != 2:
        scale += tl.load(offset_ptr)
    byte = tl.load(packed_ptr + offs // 2, mask=inside, other=0).to(tl.int32)
    level = tl.load(levels_ptr + tl.where(offs % 2 == 0, byte >> 4, byte & 15))
    tl.store(out_ptr + offs, level * scale, mask=inside)


def _nested(form=0):
    def dequantize(packed, codes, constants, table, offset, levels, out, block_size, nested_block):
        N = out.numel()
        _nested_kernel[(triton.cdiv(N, 128),)](
            packed, codes, constants, table, offset, levels, out, N, block_size, nested_block, BLOCK=128, FORM=form
        )

    return dequantize


dequantize_nested = _nested()


def _nested_weight(count, block_size, nested_block):
    """Random codes of every kind, as name → tensor, and the values that they stand for."""
    blocks = -(-count // block_size)
    packed, codes = (torch.randint(0, 256, (n,), dtype=torch.uint8) for n in ((count + 1) // 2, blocks))
    constants, table = 0.1 + torch.rand(-(-blocks // nested_block)), torch.sort(2 * torch.rand(256) - 1).values
    offset = torch.tensor([0.75])
    scale = table[codes.long()] * constants.repeat_interleave(nested_block)[:blocks] + offset
    level = NF4_CODE[torch.stack([packed >> 4, packed & 15], 1).flatten().long()[:count]]
    given = {"packed": packed, "codes": codes, "constants": constants, "table": table, "offset": offset,
             "levels": NF4_CODE.clone()}  # fmt: skip
    return given, level, scale.repeat_interleave(block_size)[:count]


def _check_nested(dequantize):
    for count, block_size, nested_block in ((64, 32, 2), (1, 32, 4), (1000, 32, 4), (4097, 64, 16)):
        given, level, scale = _nested_weight(count, block_size, nested_block)
        given = {name: guarded(tensor.shape, tensor.dtype, tensor) for name, tensor in given.items()}
        out, what = guarded(count), f"{count} values in blocks of {block_size}, scales in blocks of {nested_block}"
        arguments = (*given.values(), out, block_size, nested_block)
        launched(dequantize, *arguments, inputs=given, outputs={"out": out}, what=what)
        hint = (
            "scale[j] = table[codes[j]] * constants[j // nested_block] + offset, and value i has j = i // block_size."
        )
        expect_close(out.cpu(), level * scale, f"out ({what})", rtol=1e-5, atol=1e-6, hint=hint)

    def call():
        given, *_ = _nested_weight(999, 32, 4)
        dequantize(*given.values(), torch.empty(999), 32, 4)

    return f"tried 4 sizes with short blocks of both kinds{seen_there(without_faults(call))}"


# 09.5


@triton.jit
def _quantize_kernel(
    x_ptr, levels_ptr, packed_ptr, absmax_ptr, N, BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr, FORM: tl.constexpr
):
    block = tl.program_id(0)
    pair = block * HALF + tl.arange(0, HALF)
    first = tl.load(x_ptr + 2 * pair, mask=2 * pair < N, other=0.0)
    second = tl.load(x_ptr + 2 * pair + 1, mask=2 * pair + 1 < N, other=0.0)
    if FORM == 1:
        absmax = tl.maximum(tl.max(first, axis=0), tl.max(second, axis=0))
    else:
        absmax = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(second), axis=0))
    divisor = absmax if FORM == 2 else tl.where(absmax == 0, 1.0, absmax)
    high, low = tl.zeros([HALF], tl.int32), tl.zeros([HALF], tl.int32)
    for i in range(15):
        border = (tl.load(levels_ptr + i) + tl.load(levels_ptr + i + 1)) / 2
        high += (first / divisor > border).to(tl.int32)
        low += (second / divisor > border).to(tl.int32)
    byte = low * 16 + high if FORM == 3 else high * 16 + low
    tl.store(packed_ptr + pair, byte.to(tl.uint8), mask=2 * pair < N)
    tl.store(absmax_ptr + block, absmax)


def _quantize(form=0):
    def quantize(x, levels, packed, absmax, block_size):
        grid = (absmax.numel(),)
        _quantize_kernel[grid](
            x, levels, packed, absmax, x.numel(), BLOCK_SIZE=block_size, HALF=block_size // 2, FORM=form
        )

    return quantize


@triton.jit
def _nibble_kernel(x_ptr, levels_ptr, packed_ptr, absmax_ptr, N, BLOCK_SIZE: tl.constexpr):
    """Two programs for each block: one fills the high nibbles of its bytes, the other the low ones."""
    block, second = tl.program_id(0), tl.program_id(1)
    offs = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    absmax = tl.max(tl.abs(tl.load(x_ptr + offs, mask=offs < N, other=0.0)), axis=0)
    pair = block * BLOCK_SIZE // 2 + tl.arange(0, BLOCK_SIZE // 2)
    x = tl.load(x_ptr + 2 * pair + second, mask=2 * pair + second < N, other=0.0)
    code = tl.zeros([BLOCK_SIZE // 2], tl.int32)
    for i in range(15):
        border = (tl.load(levels_ptr + i) + tl.load(levels_ptr + i + 1)) / 2
        code += (x / tl.where(absmax == 0, 1.0, absmax) > border).to(tl.int32)
    there = tl.load(packed_ptr + pair, mask=2 * pair < N, other=0).to(tl.int32)
    byte = tl.where(second == 0, (there & 15) + code * 16, (there & 240) + code)
    tl.store(packed_ptr + pair, byte.to(tl.uint8), mask=2 * pair < N)
    tl.store(absmax_ptr + block, absmax)


def _nibbles_apart(x, levels, packed, absmax, block_size):
    _nibble_kernel[(absmax.numel(), 2)](x, levels, packed.zero_(), absmax, x.numel(), BLOCK_SIZE=block_size)


def _check_quantize(quantize):
    cases = {
        "64 Gaussian values": (torch.randn(64), 64),
        "999 values, the last block short, the last byte half": (torch.randn(999), 32),
        "a block whose largest magnitude is negative": (torch.linspace(-2.0, 0.5, 32), 32),
        "the levels themselves": (3.0 * NF4_CODE.repeat(2), 32),
        "a block of zeros among others": (torch.cat([torch.randn(32), torch.zeros(32), torch.randn(5)]), 32),
    }
    for what, (values, block_size) in cases.items():
        count = len(values)
        x, levels = guarded(count, values=values), guarded(16, values=NF4_CODE)
        packed, absmax = guarded((count + 1) // 2, torch.uint8), guarded(-(-count // block_size))
        outputs = {"packed": packed, "absmax": absmax}
        launched(
            quantize,
            x,
            levels,
            packed,
            absmax,
            block_size,
            inputs={"x": x, "levels": levels},
            outputs=outputs,
            what=what,
        )
        padded = torch.nn.functional.pad(values, (0, -count % block_size)).view(-1, block_size)
        peak = padded.abs().amax(1)
        hint = "absmax is the largest magnitude of a block, and a block may be all negative."
        if what.startswith("a block of zeros") and absmax[1] != 0:
            hint = "Of a block of zeros it is 0: divide by something else there, and store 0."
        expect_close(absmax.cpu(), peak, f"absmax ({what})", hint=hint)
        codes = torch.stack([packed.cpu() >> 4, packed.cpu() & 15], 1).flatten()
        _check_codes(codes, padded / torch.where(peak == 0, 1.0, peak)[:, None], count, what)

    def call():
        quantize(torch.randn(99), NF4_CODE.clone(), torch.empty(50, dtype=torch.uint8), torch.empty(4), 32)

    return f"tried Gaussian, negative, exact and zero blocks, and an odd count{seen_there(without_faults(call))}"


def _check_codes(codes, scaled, count, what):
    """Each code is that of the nearest level; where two are as near as a rounding, either is right."""
    scaled = scaled.flatten()
    distance = (scaled[:, None] - NF4_CODE[None, :]).abs()
    got = codes[:count].long()
    off = distance[:count].gather(1, got[:, None])[:, 0] - distance[:count].amin(1) > 1e-6
    if off.any():
        i = int(off.nonzero()[0])
        told = f"expected {int(distance[i].argmin())}"
        swapped = codes[: count // 2 * 2].view(-1, 2).flip(1).flatten().long()
        if not (
            distance[: len(swapped)].gather(1, swapped[:, None])[:, 0] - distance[: len(swapped)].amin(1) > 1e-6
        ).any():
            told += ". The nibbles are exchanged: the first value of a pair goes into the high one, code * 16"
        elif scaled[i] == 0:
            told += ". Level 7 is exactly 0: a block of zeros keeps it. Do not divide by a zero absmax"
        raise WrongAnswer(f"{what}: value {i}, scaled {scaled[i].item():.4f}, has code {int(got[i])}, {told}.")
    for code in codes[count:].tolist():
        expect(code == 7, f"{what}: the half byte at the end holds code {code}, not 7, which stands for 0.")


EXERCISES = {
    "09.4": Exercise(
        title="dequantize with double quantization",
        specification=(
            "dequantize(packed, codes, constants, table, offset, levels, out, block_size, nested_block): as 09.3, with "
            "scale[j] = table[codes[j]] * constants[j // nested_block] + offset decoded in the kernel."
        ),
        checker=_check_nested,
        solution=_nested(),
        wrong={
            "constants by value": (_nested(1), "past its end"),
            "offset forgotten": (_nested(2), "No kernel read offset"),
            "codes of seven bits": (_nested(3), "scale[j] = table[codes[j]]"),
        },
        hints=(
            "Your kernel of 09.3: only the line that loads the scale becomes four lines.",
            "block = offs // block_size; code = tl.load(codes_ptr + block, …).to(tl.int32).",
            "scale = tl.load(map_ptr + code) * tl.load(constants_ptr + block // nested_block, …) + tl.load(offset_ptr)",
        ),
    ),
    "09.5": Exercise(
        title="quantize",
        specification="quantize(x, levels, packed, absmax, block_size): NF4 codes of x, two a byte, and fp32 scales.",
        checker=_check_quantize,
        solution=_quantize(),
        wrong={
            "largest value, not magnitude": (_quantize(1), "largest magnitude"),
            "divides by zero": (_quantize(2), "zero absmax"),
            "nibbles exchanged": (_quantize(3), "The nibbles are exchanged"),
            "two programs share a byte": (_nibbles_apart, "a GPU need not. race"),
        },
        hints=(
            "A program for each block. A byte belongs to one program: load the first values of the pairs, 2 * pair, "
            "and the second ones, 2 * pair + 1, as two blocks.",
            "The code is the number of borders below x / absmax; a border lies half-way between two levels: 15 of "
            "them, in a loop.",
            "absmax = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(second), axis=0)); other=0.0 makes code "
            "7 of what is not there.",
        ),
    ),
}
