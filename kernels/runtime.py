"""What all kernels share: whether a tensor meets a GPU, Triton's interpreter or plain torch; dtypes and tile sizes.

Every kernel file imports `triton` and `tl` from here, so that the package also imports on a machine without Triton
(macOS, Windows): there the decorators do nothing and every tensor runs the torch reference.

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

Where several ways compute the same (tiles of our product, the vendor's library), `run_fastest` measures them on the
card at the first call for a kind of size, and keeps the answer in memory and in a file of the user's cache directory,
so that later runs choose alike and a resumed one gives the same bits.
"""

import contextlib
import inspect
import json
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from ctypes import PYFUNCTYPE, c_char_p, pythonapi
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor

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
# What runs where nothing can be measured: on a CPU, in the emulator, while a CUDA graph is captured or a model traced.
FIXED = {
    "lora_down": "kernel",
    "lora_up_grads": "kernel",
    "lora_down_grad": "kernel",
    "lora_product": "64 x 128, 4 warps, 4 stages",
    "lora_product, descriptors": "persistent 64 x 128, 4 warps, 3 stages",
    "scaled_matmul": "64 x 64, 4 warps, 4 stages",
    "scaled_matmul, descriptors": "persistent 64 x 128, 4 warps, 3 stages",
    "nf4 product, up to 16 rows": "stream",
    "nf4 product, up to 256 rows": "fused",
    "nf4 product": "exact",
    "nf4 product, from 1024 rows, without dropout": "merged",
    "nf4 experts": "grouped",
}

# The architecture that `handtuned.gpu` emulates at the moment ("sm_90"), which sets it; None: none.
emulated_arch: str | None = None


# For a name that is not set `os.environ` raises two exceptions inside, and a layer asks five times.
_getenv = PYFUNCTYPE(c_char_p, c_char_p)(("getenv", pythonapi)) if os.name == "posix" else None


def reference_is_forced() -> bool:
    """Whether HANDTUNED_BACKEND=torch is set; a value that names no backend is a ValueError."""
    if not torch.compiler.is_compiling() and _getenv and not _getenv(b"HANDTUNED_BACKEND"):
        return False
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


def traced(x: torch.Tensor) -> bool:
    """Whether an operation on x only leaves its trace: `torch.compile` looks on, or x is fake and has no memory."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


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
    return x.dtype != torch.float32 and capability(x.device) >= 80


def capability(device: torch.device) -> int:
    """Of a GPU or of the one emulated: 90 for sm_90."""
    return _capability(device, emulated_arch)


@lru_cache
def _capability(device: torch.device, arch: str | None) -> int:
    if device.type != "cuda":
        return int(arch.removeprefix("sm_"))
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dot_dtype(dtype: torch.dtype):
    """Operand type of the tensor-core products (the interpreter cannot multiply bf16)."""
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else TRITON_DTYPES[dtype]


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel stores for a result of `dtype`: the same, but the interpreter cuts bf16 instead of rounding it."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def block_of(size: int, low: int, high: int) -> int:
    """The power of two that covers `size`, within [low, high]."""
    covering = 1 << (size - 1).bit_length() if size > 0 else 1
    return low if covering < low else min(covering, high)


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


_compiled: dict[tuple, tuple] = {}  # of `Launch`


class Launch:
    """`kernel[grid](*tensors, *numbers, **constants)` for any tensors, without Triton's dispatch if seen before.

    Triton binds, specializes and looks a kernel up anew in each call, which takes longer than the launch. What its
    choice depends on besides numbers and constants is the key here: dtypes, and whether addresses are multiples of 16.
    Constants are the constexprs, which stand last in the signature, and Triton's options.
    """

    def __init__(self, kernel, grid: tuple, numbers: tuple, **constants):
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise TypeError(f"a launch of {kernel.__name__} may keep numbers alone, got {numbers}")
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """On the device of the first tensor."""
        device = tensors[0].device
        if tensors[0].is_cuda and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(*tensors)
        if INTERPRETED:
            return self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        key = (self, emulated_arch, device, *[x if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors])
        known = _compiled.get(key)
        if known is None:
            if len(_compiled) >= 4096:  # lengths of batches, mostly
                _compiled.clear()
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            _compiled[key] = compiled, compiled[self.grid], (*self.numbers, *(self.constants[name] for name in names))
        else:
            known[1](*tensors, *known[2])


_prepared = lru_cache(4096)(Launch)


def launch(kernel, grid: tuple, *args, **constants) -> None:
    """The `Launch` of a kernel whose pointers stand first, on `args`; numbers are of the same type in every call."""
    pointers = _pointers(kernel.fn)
    _prepared(kernel, grid, args[pointers:], **constants)(*args[:pointers])


@lru_cache
def _pointers(function: Callable) -> int:
    return sum(name.endswith("_ptr") for name in inspect.signature(function).parameters)


_chosen: dict[tuple, str] = {}  # of `run_fastest`
every_way = False  # set by `handtuned.gpu`: run all that fit, so that each can be looked at


def run_fastest(operation: str, sizes: tuple, ways: dict[str, Callable], *args):
    """`ways[name](*args)` by the `fastest` way."""
    return ways[fastest(operation, sizes, ways, *args)](*args)


def fastest(operation: str, sizes: tuple, ways: dict[str, Callable], *args) -> str:
    """Name of the fastest way on this card for an operation on sizes like these.

    Args:
        operation: key of FIXED.
        sizes: what the choice may depend on besides dtype and card: numbers, rounded so that few kinds are measured.
        ways: each gives the same result on `args`, the first of which is a tensor, without other effects.
    """
    if len(ways) == 1:
        return next(iter(ways))
    x = args[0]
    key = (operation, x.device, x.dtype, sizes)
    name = _chosen.get(key)
    if name is None:
        card = _card(x)
        name = FIXED[operation] if card is None else _measured(card, operation, key, ways, args)
        if every_way:
            for other in ways.keys() - {"torch"}:
                with contextlib.suppress(triton.OutOfResources):
                    ways[other](*args)
    return name


def _card(x: torch.Tensor) -> str | None:
    """The GPU where ways can be timed now, or None."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.get_device_name(x.device)


def _measured(card, operation, key, ways, args):
    """The fastest way, from the file of earlier runs if one of them measured it."""
    parts = [card, *(f"{name}{version(name)}" for name in ("torch", "triton", "handtuned"))]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handtuned"
    path = cache / (re.sub(r"[^\w.+]+", "-", "-".join(parts)) + ".json")
    entry = ", ".join(map(str, (operation, str(key[2])[6:], *key[3])))
    name = _known(path).get(entry)
    if name not in ways:
        times = {name: _seconds(way, args) for name, way in ways.items()}
        name = _kept(path, entry, min(times, key=times.get), ways)
    _chosen[key] = name
    return name


def _known(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _kept(path, entry, name, ways):
    """Write a choice down, unless another process was earlier: then take its."""
    import fcntl  # where there is no Triton, there may be no such module

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = _known(path)
            if known.get(entry) not in ways:
                temporary = path.with_suffix(".new")
                temporary.write_text(json.dumps(known | {entry: name}, indent=0, sort_keys=True), encoding="utf-8")
                temporary.replace(path)
                return name
            return known[entry]
    except OSError as error:
        warnings.warn(f"what was fastest is not kept for the next run: {error}", stacklevel=2)
        return name


def _seconds(way: Callable, args: tuple) -> float:
    """Of one call among others: what takes longer, the GPU or the host. Infinite where it does not fit."""
    try:
        way(*args)
        turns = []
        for _ in range(3):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                way(*args)
            stop.record()
            stop.synchronize()
            turns.append(start.elapsed_time(stop) / 5000)
        return min(turns)
    except (triton.OutOfResources, torch.OutOfMemoryError):
        return math.inf
