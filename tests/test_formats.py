"""Float formats, against torch and numpy on every one of their 16-bit numbers."""

import math

import numpy as np
import pytest
import torch
from handtuned.amp import FloatFormat, describe
from handtuned.amp.formats import BF16, FORMATS, FP8_E4M3, FP8_E5M2, FP16, FP32, TF32

TORCH = {fmt: dtype for dtype, fmt in FORMATS.items() if isinstance(dtype, torch.dtype)}
SIXTEEN = pytest.mark.parametrize("fmt", [FP16, BF16], ids=lambda f: f.name)
EVERY = pytest.mark.parametrize("fmt", TORCH, ids=lambda f: f.name)
INTEGERS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}


def all_numbers(fmt):
    """Every bit pattern of a format, and its value by torch."""
    patterns = torch.arange(2**fmt.bits)
    return patterns, patterns.to(INTEGERS[fmt.bits]).view(TORCH[fmt]).double()


def assert_same(a, b):
    """Equal in every value and sign, NaN equal to NaN."""
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
    assert torch.equal(torch.signbit(a)[~a.isnan()], torch.signbit(b)[~b.isnan()])


@pytest.mark.parametrize("fmt", [FP16, BF16, FP8_E4M3, FP8_E5M2], ids=lambda f: f.name)
def test_decode_and_encode_every_pattern(fmt):
    patterns, values = all_numbers(fmt)
    assert_same(fmt.decode(patterns), values)
    assert_same(fmt.round(values), values)
    numbers = ~values.isnan()
    assert torch.equal(fmt.encode(values)[numbers], patterns[numbers])
    assert fmt.decode(fmt.encode(values))[~numbers].isnan().all()


def test_fp16_decodes_as_numpy_does():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    assert_same(FP16.decode(torch.arange(2**16)), torch.from_numpy(values))


@SIXTEEN
@pytest.mark.filterwarnings("ignore:overflow encountered in spacing")
def test_spacing_at_every_number(fmt):
    """The distance to the next number up, which is the next bit pattern."""
    _, values = all_numbers(fmt)
    positive = values[: 2 ** (fmt.bits - 1)]
    finite = positive[torch.isfinite(positive)]
    spacing = fmt.spacing(finite)
    assert torch.equal(spacing[:-1], finite.diff())
    if fmt is FP16:
        assert np.array_equal(spacing[:-1].numpy(), np.spacing(finite.numpy().astype(np.float16))[:-1])


@EVERY
def test_rounding_is_torchs(fmt):
    """Random numbers of every size, all midpoints between neighbours, and the values next to the midpoints."""
    exponents = torch.rand(20_000, dtype=torch.float64) * 300 - 150
    x = (torch.randn(20_000, dtype=torch.float64) * 2**exponents).float()
    if fmt.bits <= 16:
        _, values = all_numbers(fmt)
        finite = values[torch.isfinite(values)].unique()
        middle = ((finite[1:] + finite[:-1]) / 2).float()
        largest = torch.tensor([fmt.max], dtype=torch.float64)
        edge = (largest + fmt.spacing(largest) / 2).float()
        near = [middle, torch.nextafter(middle, middle + 1e38), torch.nextafter(middle, middle - 1e38)]
        x = torch.cat([x, *near, edge, torch.nextafter(edge, edge * 0), edge * 2, -edge])
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])
    if not fmt.has_infinity:  # torch versions differ in whether too large a number becomes NaN or the largest
        x = x[~(fmt.round(x).isnan() & ~x.isnan())]
    assert_same(fmt.round(x), x.to(TORCH[fmt]).double())


@EVERY
def test_range_is_torchs(fmt):
    info = torch.finfo(TORCH[fmt])
    assert (fmt.bits, fmt.max, fmt.epsilon) == (info.bits, info.max, info.eps)
    assert (fmt.smallest_normal, fmt.smallest_subnormal) == (info.tiny, info.smallest_normal * info.eps)


def test_tf32_is_fp32_with_the_mantissa_of_fp16():
    assert (TF32.bits, TF32.epsilon, TF32.smallest_normal) == (19, FP16.epsilon, FP32.smallest_normal)
    x = torch.randn(1000)
    bits = x.view(torch.int32)
    up = (bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF  # round the low 13 bits off, ties to even
    assert torch.equal(TF32.round(x).float(), up.view(torch.float32))


@EVERY
def test_underflow_threshold(fmt):
    threshold = fmt.underflow_threshold
    assert fmt.round(threshold) == 0.0
    assert fmt.round(math.nextafter(threshold, 1.0)) == fmt.smallest_subnormal
    assert describe(threshold, fmt).underflow and not describe(threshold * 1.01, fmt).underflow


def test_fp16_threshold_of_the_study_documents():
    """Document 000: a gradient of -3e-9 underflows, the -3e-8 that it prints would not (2**-25 = 2.98e-8)."""
    assert FP16.underflow_threshold == 2.0**-25
    assert describe(-3e-9, torch.float16).underflow
    assert FP16.round(-3e-8) == -(2.0**-24)


def test_overflow_is_infinity_and_nan_only_in_e4m3():
    """Document 000 says that too large a number becomes NaN: it becomes infinity."""
    assert describe(70000.0, torch.float16).kind == "infinity"
    assert describe(-70000.0, torch.float16).value == -math.inf
    assert describe(500.0, torch.float8_e4m3fn).kind == "nan"
    assert describe(500.0, torch.float8_e4m3fn).overflow and not describe(math.inf, torch.float16).overflow


def test_bf16_loses_small_updates():
    """1 + 1000 × 1e-3 stays 1: each addend is below half of the spacing at 1 (claim "same accuracy", document 002)."""
    total = 1.0
    for _ in range(1000):
        total = BF16.round(total + BF16.round(1e-3))
    assert total == 1.0 and BF16.epsilon / 2 > 1e-3


def test_describe_shows_the_fields():
    d = describe(-0.15625, torch.float16)
    assert (d.sign, d.exponent, d.mantissa) == ("1", "01100", "0100000000")
    assert (d.value, d.kind, d.error, d.spacing) == (-0.15625, "normal", 0.0, 2.0**-13)
    assert "1 01100 0100000000" in str(d)
    assert describe(6e-8, torch.float16).kind == "subnormal"
    assert describe(0.0, torch.bfloat16).kind == "zero" and not describe(0.0, torch.bfloat16).underflow
    assert describe(math.nan, torch.float16).kind == "nan"
    assert describe(0.1, "tf32").mantissa == "1001100110"
    assert describe(torch.tensor(0.1), torch.float32).error == 0.0


def test_own_formats():
    fp4 = FloatFormat("fp4 e2m1", 2, 1)
    assert fp4.decode(torch.arange(6)).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
    assert describe(2.4, fp4).value == 2.0


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="dtype"):
        describe(1.0, torch.int8)
    with pytest.raises(ValueError, match="bits"):
        FP16.decode(2**16)
