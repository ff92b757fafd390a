"""What all kernels share: whether a tensor meets a GPU, Triton's interpreter or plain torch; dtypes and tile sizes.

Every kernel file imports `triton` and `tl` from here, so that the package also
imports on a machine without Triton (macOS, Windows): there the decorators do
nothing and every tensor runs the torch reference.

Which one runs is decided per call by `backend(tensor)`:

    tensor      environment                  backend
    ----------  ---------------------------  -------------
    any         HANDTUNED_BACKEND=torch      "torch"        (the reference, anywhere)
    any         TRITON_INTERPRET=1           "interpreter"  (the same kernel, run in numpy)
    CUDA        –                            "cuda"         (the compiled kernel)
    CPU         HANDTUNED_BACKEND=sm_90, …   "sm_90", …     (the compiled kernel, in the emulator; handtuned.gpu)
    CPU         –                            "torch"        (the reference; NF4 is decoded by C, see nf4_cpu.py)

Triton reads `TRITON_INTERPRET` at the moment a kernel is decorated, so it must be
set before `handtuned` is imported; setting it later changes nothing.
"""

import contextlib
import os
import threading
from collections.abc import Sequence
from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:

    class _Absent:
        """Stands in for Triton so that decorators and annotations still evaluate."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return args[0] if len(args) == 1 and callable(args[0]) else self

    triton = tl = _Absent()
    HAS_TRITON = INTERPRETED = False

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
TARGET_PROGRAMS = 256  # what fills a large GPU; a constant, so that sums are split alike on every machine


# The architecture that `handtuned.gpu` emulates at the moment ("sm_90"), which sets it; None: none.
emulated_arch: str | None = None


def reference_is_forced() -> bool:
    """Whether HANDTUNED_BACKEND=torch is set; a value that names no backend is a ValueError."""
    forced = os.environ.get("HANDTUNED_BACKEND", "")
    if forced not in ("", "torch") and forced != emulated_arch:
        raise ValueError(
            f"HANDTUNED_BACKEND must be unset, 'torch' or an architecture to emulate such as 'sm_90', got {forced!r}"
        )
    return forced == "torch"


def backend(tensor: torch.Tensor) -> str:
    """Say which implementation a kernel call on `tensor` runs: "cuda", "interpreter", "torch" or, emulated, "sm_90".

    Raises:
        RuntimeError: a CUDA tensor on a machine without Triton. It never falls
            back to the slow reference unasked; `HANDTUNED_BACKEND=torch` asks.
        ValueError: `HANDTUNED_BACKEND` holds an unknown name.
    """
    if reference_is_forced():
        return "torch"
    if emulated_arch is not None and not tensor.is_cuda:
        return emulated_arch
    if INTERPRETED:
        return "interpreter"
    if tensor.is_cuda:
        if not HAS_TRITON:
            raise RuntimeError(
                "a CUDA tensor needs Triton to run its kernel; install triton, "
                "or set HANDTUNED_BACKEND=torch to run the reference"
            )
        return "cuda"
    return "torch"


def on_device(tensor: torch.Tensor):
    """A context in which kernels launch on the GPU that holds `tensor` (nothing to do on a CPU)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def runs_kernel(x: torch.Tensor) -> bool:
    """Whether x meets a Triton kernel. FP64 has none (it serves gradient checks) and runs in torch."""
    if x.is_cpu and not INTERPRETED and emulated_arch is None:
        return False  # at once: a layer asks this four times
    return backend(x) != "torch" and x.dtype in TRITON_DTYPES


def runs_product(x: torch.Tensor) -> bool:
    """Whether a product with x meets our kernel: in 16 bits, from sm_80 on.

    FP32 products on a GPU and all before sm_80, whose tensor cores Triton does not reach, are the vendor's
    library's. The interpreter multiplies in any dtype.
    """
    if not runs_kernel(x):
        return False
    if INTERPRETED and not x.is_cuda:
        return True
    return x.dtype != torch.float32 and _capability(x.device, emulated_arch) >= 80


@lru_cache
def _capability(device: torch.device, arch: str | None) -> int:
    if device.type != "cuda":
        return int(arch.removeprefix("sm_"))
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dot_settings(dtype: torch.dtype) -> dict:
    """Operand type and precision of the tensor-core products (the interpreter cannot multiply bf16)."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    upcast = INTERPRETED and dtype == torch.bfloat16
    return {"DOT": tl.float32 if upcast else TRITON_DTYPES[dtype], "PRECISION": "tf32" if tf32 else "ieee"}


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


_local = threading.local()


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer that is valid until this thread's next call with the same dtype.

    On a CPU it is one reused block: fresh memory costs a page fault for every 4 KiB.
    CUDA's caching allocator reuses blocks by itself, and knows about streams.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    count, blocks = torch.Size(shape).numel(), _local.__dict__.setdefault("blocks", {})
    if dtype not in blocks or blocks[dtype].numel() < count:
        with torch.inference_mode(False):  # made within that mode, it could not be written to outside
            blocks[dtype] = torch.empty(count, dtype=dtype, device="cpu")
    return blocks[dtype][:count].view(shape)
