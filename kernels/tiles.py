"""What the tiled products share: which dtypes they take, block sizes, and how work is split between programs."""

import torch

from . import runtime
from .runtime import INTERPRETED, KernelSpec, backend, tl

_DOT = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
LOW = {"fp16": tl.float16, "bf16": tl.bfloat16}
TARGET_PROGRAMS = 256  # what fills a large GPU; a constant, so that sums are split alike on every machine


def runs_kernel(x: torch.Tensor) -> bool:
    """Whether x meets a Triton kernel. FP64 has none (it serves gradient checks) and runs in torch."""
    if x.is_cpu and not INTERPRETED and runtime.emulated_arch is None:
        return False  # at once: a layer asks this four times
    return backend(x) != "torch" and x.dtype in _DOT


def dot_settings(dtype: torch.dtype) -> dict:
    """Operand type and precision of the tensor-core products (the interpreter cannot multiply bf16)."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    upcast = INTERPRETED and dtype == torch.bfloat16
    return {"DOT": tl.float32 if upcast else _DOT[dtype], "PRECISION": "tf32" if tf32 else "ieee"}


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel stores for a result of `dtype`: the same, but the interpreter cuts bf16 instead of rounding it."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def block_of(size: int, low: int, high: int) -> int:
    """The power of two that covers `size`, within [low, high]."""
    return min(max(1 << (size - 1).bit_length() if size > 0 else 1, low), high)


def splits_of(programs: int, steps: int) -> int:
    """Into how many parts to split a loop of `steps` when there are only `programs` of them."""
    return max(1, min(TARGET_PROGRAMS // max(programs, 1), steps))


def kernel_spec(name, kernel, pointers, constexprs, elements, num_warps, num_stages, unit) -> KernelSpec:
    """A spec for a kernel whose pointers are fp32 where `pointers` (name → type) says nothing else."""
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{pointers.get(argument, 'fp32')}"
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    unaligned = ("constexpr", "fp32")
    aligned = tuple(key for key, kind in signature.items() if kind not in unaligned and key != "threshold")
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return KernelSpec(name, kernel, signature, constexprs, elements, options, aligned, unit)
