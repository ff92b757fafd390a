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

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .runtime import reference_is_forced, traced

# Which instructions the C may use. It obeys ATEN_CPU_CAPABILITY, as torch does.
PLAIN, AVX2, AVX512, AVX512_BF16 = range(4)
_HELD_TO = {"DEFAULT": PLAIN, "NO AVX": PLAIN, "AVX2": AVX2}.get(torch.backends.cpu.get_cpu_capability(), AVX512_BF16)

try:
    from . import _nf4_cpu as _library

    LEVEL = min(_library.level(), _HELD_TO)
except (ImportError, AttributeError):  # no compiler, or built from older sources than these
    _library, LEVEL = None, PLAIN

_ROUNDED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the numbers of dtypes in nf4_cpu.c


def _weight(weight) -> tuple[int, ...]:
    """`weight` of nf4_cpu.c but for the levels: addresses, valid as long as the tensors are, and two block sizes."""
    packed, absmax, nested = weight.packed.data_ptr(), weight.absmax.data_ptr(), weight.nested
    if nested is None:
        return packed, absmax, 0, 0, 0, weight.block_size, 0
    scales = nested.absmax.data_ptr(), nested.code.data_ptr(), nested.offset.data_ptr()
    return packed, absmax, *scales, weight.block_size, nested.block_size


def _address(tensor: torch.Tensor | None) -> int:
    if tensor is None:
        return 0
    if not tensor.is_cpu or isinstance(tensor, FakeTensor):
        where = "without memory" if tensor.is_cpu else f"on {tensor.device}"
        raise ValueError(f"x is on the CPU, but a bias or an adapter to compute with it is {where}")
    return tensor.data_ptr()


def has_native() -> bool:
    """Whether the C functions are there and not switched off by HANDTUNED_BACKEND=torch."""
    return _library is not None and not reference_is_forced()


def runs_native(weight) -> bool:
    """Whether the C functions may take it: plain memory of a CPU, laid out as they read it."""
    packed, absmax, nested = weight.packed, weight.absmax, weight.nested
    if not has_native() or traced(packed) or not _lies_plainly(packed, torch.uint8):
        return False
    if nested is None:
        return weight.block_size.bit_count() == 1 and _lies_plainly(absmax, torch.float32)
    return (
        weight.block_size.bit_count() == nested.block_size.bit_count() == 1  # powers of two
        and _lies_plainly(absmax, torch.uint8)
        and _lies_plainly(nested.absmax, torch.float32)
        and _lies_plainly(nested.code, torch.float32)
        and _lies_plainly(nested.offset, torch.float32)
    )


def _lies_plainly(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous()


def nf4_dequantize_native(weight, levels: torch.Tensor, out: torch.Tensor, fresh: bool = False) -> torch.Tensor:
    """`nf4_dequantize_reference` where `runs_native` says so, into an `out` in fp32 or bf16.

    Args:
        weight: an `NF4Weight` (`nf4.py`).
        levels: (16,) fp32, the values of the codes.
        out: contiguous CPU tensor in fp32 or bf16 to write into.
        fresh: `out` has just been allocated.

    Returns:
        `out`.
    """
    narrow, threads = out.dtype == torch.bfloat16, torch.get_num_threads()
    _library.dequantize(*_weight(weight), levels.data_ptr(), out.data_ptr(), out.numel(), LEVEL, narrow, fresh, threads)
    return out


def runs_native_product(x: torch.Tensor, weight) -> bool:
    """Whether `nf4_product_native` may take x (M, ·) and an NF4 weight (N, K): it needs 16 or 32 bits, 32 | K and AVX2.

    Codes or scales that are too few are left to `nf4_dequantize`, which says so.
    """
    if not (LEVEL > PLAIN and x.dtype in _ROUNDED and x.is_cpu and has_native()) or traced(x) or traced(weight.packed):
        return False
    seen, absmax, nested = weight.__dict__.get("seen"), weight.absmax, weight.nested
    if seen is None:
        return _is_whole(weight) and runs_native(weight)
    place = _weight(weight), weight.packed.numel(), absmax.numel(), absmax.dtype, nested and nested.absmax.numel()
    if not seen or seen[0][0] != place:  # looked at again only where something lies elsewhere: it takes its time
        seen[:] = [(place, _is_whole(weight) and runs_native(weight))]
    return seen[0][1]


def _is_whole(weight) -> bool:
    values, scales, nested = weight.shape.numel(), weight.absmax.numel(), weight.nested
    return (
        values > 0
        and weight.shape[1] % 32 == 0
        and weight.packed.numel() == values // 2
        and scales == -(-values // weight.block_size)
        and (nested is None or nested.absmax.numel() == -(-scales // nested.block_size))
        and (nested is None or nested.code.numel() == 256)
    )


def nf4_product_native(
    x: torch.Tensor, weight, levels: torch.Tensor, transposed: bool, bias: torch.Tensor | None = None,
    S: torch.Tensor | None = None, low: torch.Tensor | None = None, scale: float = 1.0, A: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y = x Wᵀ + b + scale · S Lᵀ, or x W + b + scale · S L, with W (N, K) in NF4, where `runs_native_product`.

    Args:
        x: (M, K) if `transposed`, else (M, N); fp32, bf16 or fp16. Its rows may be in more dimensions, as those of y.
        weight: an `NF4Weight` of shape (N, K). Its values are rounded to x's dtype, as `nf4_dequantize` rounds them.
        levels: (16,) fp32, the values of the codes.
        transposed: whether x meets Wᵀ.
        bias: in x's dtype, one value a column of y, or None.
        S: (M, r), or None for no low-rank term, or for S = x Aᵀ, made here in fp32.
        low: L (N, r) if `transposed`, else (r, K), any strides; taken in fp32, not rounded to x's dtype.
        scale: of the low-rank term.
        A: (r, K), where S is to be made; only if `transposed`, and best for few rows.

    Returns:
        (M, N) or (M, K) in x's dtype, rounded once. Sums are fp32, and so are the terms of S and L; their order, so
        every bit, is the same for any number of threads and for a row whatever other rows x has.
    """
    (N, K), dtype, rows = weight.shape, x.dtype, x.shape
    pairs = LEVEL == AVX512_BF16 and dtype == torch.bfloat16 and K % 64 == 0 and weight.block_size >= 64
    native = torch.bfloat16 if pairs else torch.float32
    x = x if dtype == native else x.to(native)
    terms, columns = (K, N) if transposed else (N, K)
    if rows[-1] != terms or (bias is not None and bias.numel() != columns):
        got = f"x {tuple(rows)}{'' if bias is None else f' and bias {tuple(bias.shape)}'}"
        raise ValueError(f"x must be (..., {terms}) and bias ({columns},), got {got}")
    apart = len(rows) == 2 and x.stride(1) == 1
    x = x if apart else x.contiguous()
    y = x.new_empty(*rows[:-1], columns)
    bias = None if bias is None else bias.to(dtype).to(native).contiguous()
    adapter = 0, 0, 0, 0, 0, 0
    if low is not None:
        S = S if S is None else S.float().contiguous()
        A = A if A is None else A.float().contiguous()
        low = low.float() if transposed else low.float().t()
        adapter = _address(S), _address(A), _address(low), low.shape[1], *low.stride()
    _library.product(
        *_weight(weight),
        levels.data_ptr(),
        N,
        K,
        transposed,
        LEVEL if pairs else min(LEVEL, AVX512),
        _ROUNDED[dtype],
        x.data_ptr(),
        x.stride(0) if apart else terms,
        x.numel() // terms,
        _address(bias),
        *adapter,
        scale,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y if native == dtype else y.to(dtype)
