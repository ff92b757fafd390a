"""NF4 for CPU tensors in C: dequantize, to the reference's bits, and the product that leaves W in NF4.

Torch has no operation that looks 4-bit codes up, so the reference casts every byte to a 64-bit
index, gathers, and multiplies: three passes over memory and a dozen calls. `nf4_cpu.c` does it in one
pass and one call. It is built when the package is installed, if there is a C compiler; without one,
and with HANDTUNED_BACKEND=torch, CPU tensors run the reference.

Time for 4096 × 4096 in fp32 (`python benchmarks/bench_nf4.py`) is the memory's: 67 MB to write. A fresh
output would cost more for its page faults than for its values; it is asked for in pages of 2 MiB.

The product goes further: codes become values in the cache, and W is never dense. On a CPU that is
right for any number of rows. Decoding takes four instructions for 16 weights, and 16 weights meet
up to 512 rows of x; on a GPU the decoding would take turns with the units that should multiply.
"""

import ctypes

import torch

from .runtime import reference_is_forced, scratch, traced

# Which instructions the C may use. It obeys ATEN_CPU_CAPABILITY, as torch does.
PLAIN, AVX2, AVX512, AVX512_BF16 = range(4)
_HELD_TO = {"DEFAULT": PLAIN, "NO AVX": PLAIN, "AVX2": AVX2}.get(torch.backends.cpu.get_cpu_capability(), AVX512_BF16)

try:
    from . import _nf4_cpu

    _library = ctypes.CDLL(_nf4_cpu.__file__)
    LEVEL = min(_library.handtuned_nf4_level(), _HELD_TO)
except (ImportError, AttributeError):  # no compiler, or built from older sources than these
    _library, LEVEL = None, PLAIN
else:
    _P, _I, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    _library.handtuned_nf4_dequantize.argtypes = [_P, _P, _I, _INT, _INT, _INT]
    _library.handtuned_nf4_product.argtypes = [
        _P, _I, _I, _INT, _INT, _INT, _P, _I, _I, _P, _P, _P, _P, _I, _I, _I, ctypes.c_float, _P, _INT,
    ]  # fmt: skip

BATCH = 512  # of nf4_cpu.c, as are the numbers of dtypes
_ROUNDED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Weight(ctypes.Structure):
    """`weight` of nf4_cpu.c: addresses, valid as long as the tensors are."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("packed", "absmax", "nested_absmax", "map", "offset", "levels")
    ] + [("block", ctypes.c_int64), ("nested_block", ctypes.c_int64)]


def _weight(weight, levels) -> _Weight:
    scales, nested_block = (None, None, None), 0
    if weight.nested is not None:
        scales, nested_block = [tensor.data_ptr() for tensor in weight.nested[:3]], weight.nested.block_size
    addresses = weight.packed.data_ptr(), weight.absmax.data_ptr(), *scales, levels.data_ptr()
    return _Weight(*addresses, weight.block_size, nested_block)


def has_native() -> bool:
    """Whether the C functions are there and not switched off by HANDTUNED_BACKEND=torch."""
    return _library is not None and not reference_is_forced()


def runs_native(weight) -> bool:
    """Whether the C functions may take it: plain memory of a CPU, laid out as they read it."""
    packed, absmax, nested = weight.packed, weight.absmax, weight.nested
    if not has_native() or traced(packed):
        return False
    if weight.block_size.bit_count() != 1 or (nested is not None and nested.block_size.bit_count() != 1):
        return False  # not powers of two
    codes, numbers = ((packed,), (absmax,)) if nested is None else ((packed, absmax), nested[:3])
    kinds = [(tensor, torch.uint8) for tensor in codes] + [(tensor, torch.float32) for tensor in numbers]
    return all(tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous() for tensor, dtype in kinds)


def nf4_dequantize_native(weight, levels: torch.Tensor, out: torch.Tensor, fresh: bool = False) -> torch.Tensor:
    """`nf4_dequantize_reference` where `runs_native` says so, into an fp32 `out`.

    Args:
        weight: an `NF4Weight` (`nf4.py`).
        levels: (16,) fp32, the values of the codes.
        out: contiguous fp32 CPU tensor to write into.
        fresh: `out` has just been allocated.

    Returns:
        `out`.
    """
    w, threads = _weight(weight, levels), torch.get_num_threads()
    _library.handtuned_nf4_dequantize(ctypes.byref(w), out.data_ptr(), out.numel(), LEVEL, fresh, threads)
    return out


def runs_native_product(x: torch.Tensor, weight) -> bool:
    """Whether `nf4_product_native` may take x (M, ·) and an NF4 weight (N, K): it needs 16 or 32 bits, 32 | K and AVX2.

    Codes or scales that are too few are left to `nf4_dequantize`, which says so.
    """
    values, scales, nested = weight.shape.numel(), weight.absmax.numel(), weight.nested
    return (
        LEVEL > PLAIN
        and x.dtype in _ROUNDED
        and x.is_cpu
        and values > 0
        and weight.shape[1] % 32 == 0
        and weight.packed.numel() == values // 2
        and scales == -(-values // weight.block_size)
        and (nested is None or nested.absmax.numel() == -(-scales // nested.block_size))
        and runs_native(weight)
    )


def nf4_product_native(
    x: torch.Tensor, weight, levels: torch.Tensor, transposed: bool, bias: torch.Tensor | None = None,
    S: torch.Tensor | None = None, low: torch.Tensor | None = None, scale: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """y = x Wᵀ + b + scale · S Lᵀ, or x W + b + scale · S L, with W (N, K) in NF4, where `runs_native_product`.

    Args:
        x: (M, K) if `transposed`, else (M, N); fp32, bf16 or fp16.
        weight: an `NF4Weight` of shape (N, K). Its values are rounded to x's dtype, as `nf4_dequantize` rounds them.
        levels: (16,) fp32, the values of the codes.
        transposed: whether x meets Wᵀ.
        bias: in x's dtype, one value a column of y, or None.
        S: (M, r), or None for no low-rank term.
        low: L (N, r) if `transposed`, else (r, K), any strides; it is rounded to x's dtype.
        scale: of the low-rank term.

    Returns:
        (M, N) or (M, K) in x's dtype, rounded once. Sums are fp32, and so are the terms of S and L; their order, so
        every bit, is the same for any number of threads and for a row whatever other rows x has.
    """
    (N, K), M, dtype = weight.shape, x.shape[0], x.dtype
    pairs = LEVEL == AVX512_BF16 and dtype == torch.bfloat16 and K % 64 == 0 and weight.block_size >= 64
    native = torch.bfloat16 if pairs else torch.float32
    level = LEVEL if pairs else min(LEVEL, AVX512)
    y = torch.empty((M, N if transposed else K), dtype=native, device="cpu")
    x = x.to(native) if x.stride(1) == 1 else x.to(native).contiguous()
    adapter = None, None, 0, 0, 0
    if S is not None:
        S, low = S.float().contiguous(), low.to(dtype).float()
        strides = low.stride() if transposed else (low.stride(1), low.stride(0))
        adapter = S.data_ptr(), low.data_ptr(), S.shape[1], *strides
    bias = None if bias is None else bias.to(dtype).to(native).contiguous()
    unzipped = scratch((min(M, BATCH), K), native, x.device) if transposed else None
    w = _weight(weight, levels)
    _library.handtuned_nf4_product(
        ctypes.byref(w), N, K, transposed, level, _ROUNDED[dtype], x.data_ptr(), x.stride(0), M,
        None if unzipped is None else unzipped.data_ptr(), None if bias is None else bias.data_ptr(),
        *adapter, scale, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y.to(dtype)
