"""Lesson 01: how FP16 stores a number, what becomes of it, and what scaling can save."""

import math

import torch

from ..exercise import Exercise, WrongAnswer, expect, number


def _decode(bits):
    sign, exponent, mantissa = bits >> 15, bits >> 10 & 31, bits & 1023
    if exponent == 0:
        value = mantissa * 2.0**-24
    elif exponent == 31:
        value = math.nan if mantissa else math.inf
    else:
        value = (1 + mantissa / 1024) * 2.0 ** (exponent - 15)
    return -value if sign else value


def _only_normal(bits):
    return (-1) ** (bits >> 15) * (1 + (bits & 1023) / 1024) * 2.0 ** ((bits >> 10 & 31) - 15)


def _wrong_bias(bits):
    if bits >> 10 & 31 in (0, 31):
        return _decode(bits)
    return _only_normal(bits) / 2


def _no_hidden_one(bits):
    if bits >> 10 & 31 in (0, 31):
        return _decode(bits)
    return (-1) ** (bits >> 15) * (bits & 1023) / 1024 * 2.0 ** ((bits >> 10 & 31) - 15)


def _check_decode(decode):
    kinds = {
        "a normal number": [0x3C00, 0x3E00, 0xC248, 0x0400, 0x7BFF],
        "a subnormal number": [0x0001, 0x03FF, 0x8200],
        "zero": [0x0000],
        "infinity": [0x7C00, 0xFC00],
        "NaN": [0x7E00],
    }
    told = {
        "a normal number": "Its value is (1 + mantissa/1024) · 2^(exponent − 15).",
        "a subnormal number": "With exponent field 0 there is no leading 1, and the power is that of field 1: 2^-14.",
        "zero": "With exponent field 0 there is no leading 1.",
        "infinity": "Exponent field 31 with mantissa 0 means infinity, with the sign in front.",
        "NaN": "Exponent field 31 with a mantissa other than 0 means NaN.",
    }
    for kind, patterns in kinds.items():
        for bits in patterns:
            want = torch.tensor(bits, dtype=torch.uint16).view(torch.float16).item()
            try:
                got = decode(bits)
            except OverflowError as error:
                raise WrongAnswer(f"decode(0x{bits:04x}), {kind}: {error}. {told[kind]}") from None
            got = float(number(got, f"decode(0x{bits:04x})"))
            same = got == want or (math.isnan(got) and math.isnan(want))
            why = "The highest bit is the sign." if got == -want else told[kind]
            expect(same, f"decode(0x{bits:04x}) is {got:.6g}, expected {want:.6g}, {kind}. {why}")
    return "tried normal and subnormal numbers, zero, both infinities and NaN"


def _fate(x):
    x = abs(x)
    if x <= 2.0**-25:
        return "zero"
    if x >= 65520:
        return "infinity"
    return "subnormal" if x < 2.0**-14 * (1 - 2.0**-11) else "normal"


def _fate_with(zero, infinity, normal):
    def fate(x):
        x = abs(x)
        return "zero" if x <= zero else "infinity" if x >= infinity else "normal" if x >= normal else "subnormal"

    return fate


def _check_fate(fate):
    cases = [1.0, -0.5, 1e-5, 6e-5, 7e-5, 4e-8, -4e-8, 2e-8, 2.0**-25, 0.0, 60000.0, 65519.0, 65520.0, -1e6]
    tiny = 2.0**-14 - 2.0**-25  # half-way between the largest subnormal number and the smallest normal one
    cases += [6.102e-5, tiny, tiny * (1 - 1e-6), -tiny, 2.0**-25 * (1 + 1e-6), 65520.0 * (1 - 1e-6)]
    for x in cases:
        size = torch.tensor(x, dtype=torch.float64).half().abs().item()
        want = "normal" if size >= 2.0**-14 else "subnormal"
        want = "zero" if size == 0 else "infinity" if math.isinf(size) else want
        got = fate(x)
        kinds = ("zero", "subnormal", "normal", "infinity")
        expect(isinstance(got, str) and got in kinds, f"fate({x:.8g}) is {got!r}: return one of {', '.join(kinds)}.")
        if got == want:
            continue
        if x < 0 and fate(-x) == want:
            told = "The sign changes nothing: compare abs(x)."
        elif want == "infinity" or got == "infinity":
            told = "The largest number is 65504, and numbers up to 65519.99… round down to it."
        elif want == "zero" or got == "zero":
            told = "The smallest number is 2^-24 = 5.96e-8; what lies above half of it rounds up to it, not to zero."
        else:
            told = (
                "The smallest normal number is 2^-14 = 6.1035e-5, and what lies half-way to it or beyond, from "
                "2^-14 - 2^-25 = 6.1005e-5 on, rounds up to it; smaller ones are subnormal, not lost."
            )
        raise WrongAnswer(f"fate({x:.8g}) is {got!r}, expected {want!r}. {told}")
    return f"tried {len(cases)} numbers around both ends"


def _fp16(w: float, x: float, y: float, scale: float) -> tuple[float, float]:
    """Residual w·x − y and dL/dw of L = (w·x − y)²/2, every number in FP16, dL scaled; unscaled in fp64."""
    w, x, y, s = (torch.tensor(value, dtype=torch.float64).half() for value in (w, x, y, scale))
    residual = w * x - y
    return residual.item(), (residual * s * x).double().item() / scale


def _check_example(example):
    answer = example()
    four = isinstance(answer, (tuple, list)) and len(answer) == 4
    expect(four, f"Return four numbers, (w, x, y, scale), got {answer!r}.")
    w, x, y, scale = (float(number(value, name)) for value, name in zip(answer, ("w", "x", "y", "scale"), strict=True))
    true = (w * x - y) * x
    expect(true != 0, "The true gradient is 0: nothing is there to be lost.")
    expect(scale != 0, "A scale of 0 leaves nothing of the gradient. Take a larger scale.")
    residual, plain = _fp16(w, x, y, 1.0)
    expect(
        plain == 0,
        f"Without scaling the gradient is {plain:.3g}, not 0: it does not underflow. "
        "Make (w·x − y)·x smaller than 3e-8.",
    )
    _, saved = _fp16(w, x, y, scale)
    expect(
        math.isfinite(saved),
        f"With scale {scale:g} the gradient overflows. Take a smaller scale.",
    )
    expect(
        saved != 0 or residual != 0,
        "Even scaled it is 0, because the residual w·x − y is already 0 in FP16: no scale can rescue it. "
        "Let the residual be large enough for FP16, and make x small instead.",
    )
    expect(saved != 0, f"With scale {scale:g} it still underflows. Take a larger scale.")
    error = abs(saved - true) / abs(true)
    expect(
        error < 0.01,
        f"The rescued gradient {saved:.4g} differs from the true one {true:.4g} by {100 * error:.1f} %; "
        "allowed is 1 %. w, x or y lose too much when they are rounded to FP16.",
    )
    return f"the true gradient is {true:.4g}; FP16 gives 0 unscaled and {saved:.4g} with scale {scale:g}"


EXERCISES = {
    "01.1": Exercise(
        title="Read the bits",
        specification="decode(bits): the number that the 16 bits of an FP16 stand for, as a float.",
        checker=_check_decode,
        solution=_decode,
        wrong={
            "no subnormals": (lambda b: _decode(b) if b >> 10 & 31 == 31 else _only_normal(b), "no leading 1"),
            "bias 16": (_wrong_bias, "2^(exponent − 15)"),
            "no hidden one": (_no_hidden_one, "(1 + mantissa/1024)"),
        },
        hints=(
            "sign = bits >> 15, exponent = (bits >> 10) & 31, mantissa = bits & 1023.",
            "There are three cases: exponent field 0, exponent field 31, and the rest.",
            "Field 0 means mantissa · 2^-24.",
        ),
    ),
    "01.2": Exercise(
        title="The fate of a number",
        specification='fate(x): "zero", "subnormal", "normal" or "infinity": what x becomes in FP16.',
        checker=_check_fate,
        solution=_fate,
        wrong={
            "lost below 6e-8": (_fate_with(2.0**-24, 65520, 2.0**-14), "rounds up to it, not to zero"),
            "full at 65504": (_fate_with(2.0**-25, 65504.5, 2.0**-14), "round down to it"),
            "no subnormals": (_fate_with(2.0**-14, 65520, 2.0**-14), "not to zero"),
            "normal from 2^-14 on": (_fate_with(2.0**-25, 65520, 2.0**-14), "rounds up to it; smaller"),
        },
        hints=(
            "Rounding goes to the nearest number, so each border lies half-way between two numbers.",
            "Zero ends at half of the smallest number; a tie goes to zero. Infinity begins at 65520, half-way between "
            "65504 and the number that would follow.",
            "Normal begins where x rounds to 2^-14: half-way from the largest subnormal, 2^-14 - 2^-24, ties included.",
        ),
    ),
    "01.3": Exercise(
        title="A gradient that scaling rescues",
        specification="example(): (w, x, y, scale) such that the FP16 gradient is 0 unscaled, and right to 1 % scaled.",
        checker=_check_example,
        solution=lambda: (0.5, 2.0**-13, 0.0, 1024.0),
        wrong={
            "the notes' numbers": (lambda: (1e-7, 1.0, 1.03e-7, 1024.0), "residual w·x − y is already 0"),
            "no underflow": (lambda: (0.5, 0.1, 0.0, 1024.0), "does not underflow"),
            "too small a scale": (lambda: (0.5, 2.0**-14, 0.0, 2.0), "still underflows"),
        },
        hints=(
            "The gradient is (w·x − y)·x. In the notes the residual vanishes. What if x is small?",
            "Take y = 0 and x = 2^-13: then the residual is w·x and the gradient w·x².",
        ),
    ),
}
