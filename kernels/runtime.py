"""The one place that knows whether a tensor meets a GPU, Triton's interpreter or plain torch.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class KernelSpec:
    """How to compile one kernel ahead of time, without a GPU (read by `handtuned xray`).

    Each kernel file offers `xray_specs() -> list[KernelSpec]`.

    Attributes:
        name: what the report calls it, for example "nf4_dequantize[bf16]".
        kernel: the `@triton.jit` function.
        signature: argument name → Triton type ("*fp16", "i32", "fp32", "constexpr").
        constexprs: values of the constexpr arguments.
        elements: elements that one program produces (the unit of "instructions an element").
        options: `num_warps`, `num_stages`, ….
        aligned: pointer and integer arguments divisible by 16, as the launcher guarantees.
        unit: what an element is, for the report.
    """

    name: str
    kernel: Callable
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    elements: int
    options: Mapping[str, int] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    unit: str = "element"
