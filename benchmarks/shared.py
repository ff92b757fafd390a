"""What the benchmarks share."""

import torch

from handtuned.training.models import choose_dtype


def low_precision(device):
    """What a model computes in there: bfloat16, or float16 where that is only emulated; float32 on a CPU."""
    return choose_dtype("auto", device)


def short(dtype):
    """torch.bfloat16 → "bf16", as the names of compiled kernels have it."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def lora_bytes(M, N, K, r, low):
    """Bytes that forward and backward must move at least: every array once, adapters in `low` bytes too."""
    forward = low * (M * K + N * K + M * N) + low * r * (N + K)
    return forward, low * (M * N + N * K + 2 * M * K + 2 * r * (N + K) + M * r)


def error(result, expected):
    """The largest error relative to the largest expected value; `expected` is in fp64."""
    return ((result.double() - expected).abs().max() / expected.abs().max()).item()


def tolerance(dtype):
    """Of the largest value: a few roundings of a 16-bit result; the rounding of sums of a thousand terms in fp32."""
    return torch.finfo(dtype).eps * (256 if dtype == torch.float32 else 4)


def computed_in(name, x):
    """The dtype a provider computes in: bitsandbytes' 4-bit products on a CPU may be in bf16 (with AVX512-BF16)."""
    return torch.bfloat16 if "bitsandbytes" in name and x.is_cpu else x.dtype


def close(result, expected, dtype, names):
    """Raise if one of several results is further from its fp64 value than `tolerance`."""
    for got, want, what in zip(result, expected, names, strict=False):
        off = error(got, want)
        assert off < tolerance(dtype), f"{what} is off by {off:.1e}"
