"""How a number is stored in few bits: sign, exponent, mantissa (IEEE 754-2008, section 3).

With E exponent bits, M mantissa bits and bias b = 2^(E−1) − 1, the fields s, e, f mean

    e = 0                 (−1)^s · 2^(1−b) · f / 2^M            zero and the subnormals
    0 < e < 2^E − 1       (−1)^s · 2^(e−b) · (1 + f / 2^M)      the normal numbers
    e = 2^E − 1           f = 0: infinity, else NaN

so neighbours are 2^(e−b−M) apart: exponent bits buy range, mantissa bits buy resolution.

    format     bits  E  M   largest     smallest normal  smallest  to zero below
    fp32         32  8  23  3.4e38      1.2e-38          1.4e-45   7.0e-46
    tf32         19  8  10  3.4e38      1.2e-38          1.1e-41   5.7e-42
    bf16         16  8   7  3.4e38      1.2e-38          9.2e-41   4.6e-41
    fp16         16  5  10  65504       6.1e-5           6.0e-8    3.0e-8
    fp8 e5m2      8  5   2  57344       6.1e-5           1.5e-5    7.6e-6
    fp8 e4m3      8  4   3  448         1.6e-2           2.0e-3    9.8e-4

fp8 e4m3 has no infinity: its largest exponent holds numbers too, and only f = 2^M − 1 is NaN (Micikevicius et al. 2022,
"FP8 formats for deep learning", section 3). tf32 is how tensor cores read fp32 operands.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format; the sign takes one bit more than E and M."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    has_infinity: bool = True  # False where the largest exponent is used for numbers (fp8 e4m3)

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def max(self) -> float:
        """The largest finite number."""
        if self.has_infinity:
            return (2 - 2.0**-self.mantissa_bits) * 2.0**self.bias
        return (2 - 2 * 2.0**-self.mantissa_bits) * 2.0 ** (self.bias + 1)

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest number above zero."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def underflow_threshold(self) -> float:
        """Magnitudes up to this one round to zero (a tie goes to the even side)."""
        return self.smallest_subnormal / 2

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next number."""
        return 2.0**-self.mantissa_bits

    def spacing(self, x):
        """Distance between neighbours around |x|: a float for a number, a float64 tensor for a tensor."""
        x64 = torch.as_tensor(x, dtype=torch.float64)
        step = torch.ldexp(torch.ones_like(x64), self._exponent(x64) - self.mantissa_bits)
        return _like(x, torch.where(torch.isfinite(x64), step, math.nan))

    def round(self, x):
        """The nearest number of the format, ties to the even mantissa; beyond the largest: infinity (NaN in e4m3, where
        torch 2.13 saturates instead). A float for a number, a float64 tensor for a tensor."""
        x64 = torch.as_tensor(x, dtype=torch.float64)
        step = self.spacing(x64)
        rounded = torch.where(torch.isfinite(x64), torch.round(x64 / step) * step, x64)
        beyond = torch.copysign(torch.tensor(math.inf if self.has_infinity else math.nan, dtype=torch.float64), x64)
        return _like(x, torch.where(rounded.abs() > self.max, beyond, rounded))

    def encode(self, x):
        """The bits of `round(x)`, sign first, as an integer (an int64 tensor for a tensor)."""
        value = torch.as_tensor(self.round(x), dtype=torch.float64)
        # Counted in the spacing, a normal number is 2^M and its mantissa, a subnormal (field e = 0) its mantissa alone.
        exponent = self._exponent(value)
        units = (value.abs() / self.spacing(value)).nan_to_num(0).to(torch.int64)
        field = exponent.to(torch.int64) + self.bias
        bits = (field << self.mantissa_bits) + units - 2**self.mantissa_bits
        top = (2**self.exponent_bits - 1) << self.mantissa_bits
        quiet = 2 ** (self.mantissa_bits - 1) if self.has_infinity else 2**self.mantissa_bits - 1
        bits = torch.where(torch.isinf(value), top, torch.where(torch.isnan(value), top + quiet, bits))
        return _like(x, bits + (torch.signbit(value).to(torch.int64) << self.bits - 1))

    def decode(self, bits):
        """The number that an integer's bits stand for (float64 for a tensor); ValueError if they do not fit."""
        whole = torch.as_tensor(bits, dtype=torch.int64)
        if ((whole < 0) | (whole >= 2**self.bits)).any():
            raise ValueError(f"bits must lie in 0…{2**self.bits - 1} for {self.name}, got {bits}")
        sign, field, mantissa = self.split(whole)
        units = (mantissa + torch.where(field > 0, 2**self.mantissa_bits, 0)).double()
        value = torch.ldexp(units, field.clamp(min=1) - self.bias - self.mantissa_bits)
        highest = field == 2**self.exponent_bits - 1
        if self.has_infinity:
            value = torch.where(highest, torch.where(mantissa == 0, math.inf, math.nan), value)
        else:
            value = torch.where(highest & (mantissa == 2**self.mantissa_bits - 1), math.nan, value)
        return _like(bits, torch.where(sign == 1, -value, value))

    def split(self, bits):
        """The three fields of encoded numbers: sign, exponent, mantissa."""
        exponent = bits >> self.mantissa_bits & 2**self.exponent_bits - 1
        return bits >> (self.bits - 1), exponent, bits & 2**self.mantissa_bits - 1

    def _exponent(self, x: torch.Tensor) -> torch.Tensor:
        """The power of two below |x|, and that of the subnormals for anything smaller."""
        lowest = 1 - self.bias
        return torch.where(x == 0, lowest, (torch.frexp(x).exponent - 1).clamp(min=lowest))


def _like(x, result: torch.Tensor):
    """A tensor for a tensor, a Python number for a number."""
    return result if isinstance(x, torch.Tensor) else result.item()


FP32 = FloatFormat("fp32", 8, 23)
TF32 = FloatFormat("tf32", 8, 10)
BF16 = FloatFormat("bf16", 8, 7)
FP16 = FloatFormat("fp16", 5, 10)
FP8_E5M2 = FloatFormat("fp8 e5m2", 5, 2)
FP8_E4M3 = FloatFormat("fp8 e4m3", 4, 3, has_infinity=False)

FORMATS: dict[torch.dtype | str, FloatFormat] = {  # torch has no dtype for tf32
    torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16, torch.float8_e5m2: FP8_E5M2,
    torch.float8_e4m3fn: FP8_E4M3, "tf32": TF32,
}  # fmt: skip


@dataclass(frozen=True)
class Description:
    """One number as a format stores it; printed, it is a line for a notebook."""

    x: float
    format: FloatFormat
    value: float  # what is stored
    sign: str  # the fields, as strings of bits
    exponent: str
    mantissa: str
    kind: str  # "normal", "subnormal", "zero", "infinity" or "nan"
    error: float  # value − x
    spacing: float  # distance to the neighbours (NaN where there are none)
    underflow: bool  # x was not zero and became zero
    overflow: bool  # x was finite and became infinity or NaN

    def __str__(self) -> str:
        lost = "  underflow" if self.underflow else "  overflow" if self.overflow else ""
        return (
            f"{self.format.name}  {self.sign} {self.exponent} {self.mantissa}  = {self.value:.9g}  "
            f"({self.kind}, neighbours {self.spacing:.3g} apart){lost}"
        )


def describe(x: float, dtype: torch.dtype | str | FloatFormat) -> Description:
    """How `dtype` stores the number x: its bits, what became of it, and the spacing there.

    `dtype` is a float dtype of torch up to 32 bits, "tf32", or a `FloatFormat`. ValueError: no such format.
    """
    if not isinstance(dtype, FloatFormat) and dtype not in FORMATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FORMATS))} or a FloatFormat, got {dtype!r}")
    fmt = dtype if isinstance(dtype, FloatFormat) else FORMATS[dtype]
    x = float(x)
    value = fmt.round(x)
    sign, exponent, mantissa = fmt.split(fmt.encode(x))
    if not math.isfinite(value):
        kind = "nan" if math.isnan(value) else "infinity"
    else:
        kind = "zero" if value == 0 else "normal" if abs(value) >= fmt.smallest_normal else "subnormal"
    fields = str(sign), f"{exponent:0{fmt.exponent_bits}b}", f"{mantissa:0{fmt.mantissa_bits}b}"
    error = value - x if math.isfinite(value) else math.nan
    underflow, overflow = value == 0 and x != 0, math.isfinite(x) and not math.isfinite(value)
    return Description(x, fmt, value, *fields, kind, error, fmt.spacing(value), underflow, overflow)
