"""8-bit floats and comparisons of 16-bit pairs in the emulator, against torch, every code and every tie."""

import numpy as np
import pytest
import torch
from ptx import apply

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def decoded(kind):
    """The 256 codes as fp32, by torch."""
    return torch.arange(256, dtype=torch.uint8).view(FP8[kind]).float().numpy()


def hard_to_round(kind):
    """Every number, what lies half between two neighbours, a little more or less, and what is far outside."""
    values = np.unique(decoded(kind)[np.isfinite(decoded(kind))]).astype(np.float32)
    ties = (values[1:] + values[:-1]) / 2
    near = [np.nextafter(ties, np.float32(end)) for end in (-np.inf, np.inf)]
    outside = np.float32([1e30, -1e30, np.inf, -np.inf, np.nan, 1e-30, -1e-30, 460, -60000, 3e38])
    return np.concatenate([values, ties, *near, outside]).astype(np.float32)


def rounded(x, kind):
    """By torch; what is beyond the largest number becomes it, NaN has one code."""
    most = float(torch.finfo(FP8[kind]).max)
    codes = torch.from_numpy(x).clamp(-most, most).to(FP8[kind]).view(torch.uint8).numpy().copy()
    codes[np.isnan(x)] = 0x7F
    return codes


@pytest.mark.parametrize("kind", FP8)
def test_pairs_to_halves(kind):
    codes = np.arange(256, dtype=np.uint16)
    pairs = (codes[::-1] << 8 | codes).astype(np.uint16)
    got = apply(f"cvt.rn.f16x2.{kind}x2 d, a;", [pairs], np.uint32).view(np.float16).reshape(-1, 2)
    table = decoded(kind).astype(np.float16)
    assert np.array_equal(got[:, 0], table, equal_nan=True) and np.array_equal(got[:, 1], table[::-1], equal_nan=True)


@pytest.mark.parametrize("kind", FP8)
def test_singles_to_pairs(kind):
    x = hard_to_round(kind)
    got = apply(f"cvt.rn.satfinite.{kind}x2.f32 d, a, b;", [x, x[::-1].copy()], np.uint16)
    assert np.array_equal(got >> 8, rounded(x, kind)) and np.array_equal(got & 0xFF, rounded(x[::-1].copy(), kind))
    relu = apply(f"cvt.rn.satfinite.relu.{kind}x2.f32 d, a, b;", [x, x], np.uint16)
    positive = ~np.signbit(x)
    assert np.array_equal(relu[positive] & 0xFF, rounded(x, kind)[positive]) and not (relu[x < 0]).any()


@pytest.mark.parametrize("kind", FP8)
def test_halves_to_pairs(kind):
    with np.errstate(over="ignore"):
        x = hard_to_round(kind).astype(np.float16)
    pairs = np.stack([x, x[::-1]], 1).copy().view(np.uint32).reshape(-1)
    got = apply(f"cvt.rn.satfinite.{kind}x2.f16x2 d, a;", [pairs], np.uint16)
    assert np.array_equal(got & 0xFF, rounded(x.astype(np.float32), kind))
    assert np.array_equal(got >> 8, rounded(x[::-1].astype(np.float32), kind))


@pytest.mark.parametrize("name", ["lt", "ge", "eq", "ne", "gtu", "neu"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_comparisons_of_pairs(name, kind):
    special = [0.0, -0.0, 1.0, 1.5, -1.5, float("inf"), -float("inf"), float("nan")]
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    x = torch.tensor(special * 8).to(dtype)
    y = torch.tensor([v for v in special for _ in special]).to(dtype)
    words = [t.view(torch.int32).numpy() for t in (x, y)]
    plain = {"lt": x < y, "ge": x >= y, "eq": x == y, "ne": (x != y) & ~x.isnan() & ~y.isnan(), "gtu": ~(x <= y),
             "neu": x != y}[name].reshape(-1, 2)  # fmt: skip
    for half, (p, q) in enumerate((("%p20", "%p21"), ("%p21", "%p20"))):
        got = apply(f"setp.{name}.{kind}x2 {p}|{q}, a, b;", words, np.int32, predicate=True)
        assert np.array_equal(got.astype(bool), plain[:, half].numpy())
