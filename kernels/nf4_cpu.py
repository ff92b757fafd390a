"""NF4 dequantize for CPU tensors in C: the reference's result to the bit, several times as fast.

Torch has no operation that looks 4-bit codes up, so the reference casts every byte to a 64-bit
index, gathers, and multiplies: three passes over memory and a dozen calls. `nf4_cpu.c` does it in one
pass and one call. It is built when the package is installed, if there is a C compiler; without one,
and with HANDTUNED_BACKEND=torch, CPU tensors run the reference.

Time for 4096 × 4096 in fp32 (`python tests/bench_nf4.py`) is the memory's: 67 MB to write. A fresh
output would cost more for its page faults than for its values; it is asked for in pages of 2 MiB.
"""

import ctypes
import os

import torch

try:
    from . import _nf4_cpu
except ImportError:
    _library = None
else:
    _library = ctypes.CDLL(_nf4_cpu.__file__).handtuned_nf4_dequantize
    _library.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 3 + [ctypes.c_int] * 2
    _library.restype = None


def has_native() -> bool:
    """Whether the C function is there and not switched off by HANDTUNED_BACKEND=torch."""
    return _library is not None and os.environ.get("HANDTUNED_BACKEND") != "torch"


def runs_native(packed: torch.Tensor, absmax: torch.Tensor, nested) -> bool:
    """Whether the C function may take these: plain memory of a CPU, laid out as it reads them."""
    tensors = (packed, absmax) if nested is None else (packed, absmax, *nested[:3])
    return (
        has_native()
        and not torch.compiler.is_compiling()
        and absmax.dtype == (torch.float32 if nested is None else torch.uint8)
        and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        and all(t.dtype == torch.float32 for t in tensors[2:])
    )


def nf4_dequantize_native(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    nested,
    levels: torch.Tensor,
    out: torch.Tensor,
    fresh: bool = False,
) -> torch.Tensor:
    """`nf4_dequantize_reference` where `runs_native` says so, into an fp32 `out`.

    Args:
        packed, absmax, block_size, nested: as for `nf4_dequantize`.
        levels: (16,) fp32, the values of the codes.
        out: contiguous fp32 CPU tensor to write into.
        fresh: `out` has just been allocated.

    Returns:
        `out`.
    """
    scales, nested_block = (None, None, None), 0
    if nested is not None:
        scales, nested_block = [tensor.data_ptr() for tensor in nested[:3]], nested.block_size
    _library(
        packed.data_ptr(), absmax.data_ptr(), *scales, levels.data_ptr(), out.data_ptr(),
        out.numel(), block_size, nested_block, fresh, torch.get_num_threads(),
    )  # fmt: skip
    return out
