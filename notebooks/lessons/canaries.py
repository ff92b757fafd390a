"""Tensors between canaries: a kernel that reads or writes out of bounds gives itself away.

Triton's interpreter, like a GPU, checks no bounds: a block that hangs over the end of a tensor reads
whatever lies there, and overwrites it. So a checker puts each tensor in the middle of a larger buffer
whose rest holds known NaNs. What is read out of bounds is NaN and spoils the result; what is written
there destroys a canary. The NaNs of each buffer carry a number of their own in the mantissa, so that
a NaN copied from one buffer's edge onto another's is noticed as well. A value that is read out of bounds and then
used for nothing spoils no result; under the interpreter `watched_loads` notes every address that is read.
"""

import contextlib
import itertools

import numpy as np
import torch

from .exercise import WrongAnswer

PAD = 4096  # elements on each side: more than the blocks of the exercises
_serial = itertools.count(1)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_patterns: dict[int, tuple[torch.Tensor, int]] = {}


def guarded(shape, dtype: torch.dtype = torch.float32, values: torch.Tensor | None = None, device=None) -> torch.Tensor:
    """A contiguous tensor of `shape` with canaries on both sides.

    Args:
        shape: an int or a tuple.
        dtype: of float or integer kind.
        values: what it holds; without, poison (NaN, or a large pattern for integers), for outputs.
        device: by default the GPU if there is one and kernels are not interpreted, else the CPU.
    """
    from ..kernels.runtime import INTERPRETED

    if device is None:
        device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = torch.Size(shape).numel()
    buffer = torch.zeros(PAD + count + PAD, dtype=dtype, device=device)
    bits = buffer.view(_BITS[buffer.element_size()])
    pattern = _pattern(dtype)
    bits.fill_(pattern)
    inside = buffer[PAD : PAD + count].view(shape)
    if values is not None:
        inside.copy_(values)
    _patterns[buffer.data_ptr()] = (buffer, pattern)
    if len(_patterns) > 64:  # old buffers are let go
        del _patterns[next(iter(_patterns))]
    return inside


def _pattern(dtype: torch.dtype) -> int:
    """The bits of a NaN with a serial number in the mantissa; any odd number for integers."""
    serial = 1 + next(_serial) % 60
    if not dtype.is_floating_point:
        return 60 + serial if dtype.itemsize == 1 else 23100 + serial
    return torch.tensor([float("nan")], dtype=dtype).view(_BITS[dtype.itemsize]).item() | serial


def check_canaries(name: str, tensor: torch.Tensor) -> None:
    """Make sure that nothing around a `guarded` tensor was overwritten.

    Args:
        name: what the reader calls the tensor.
        tensor: as `guarded` returned it.

    Raises:
        WrongAnswer: a canary is gone; the message says on which side and how far out.
    """
    size = tensor.element_size()
    buffer, pattern = _patterns[tensor.data_ptr() - PAD * size]
    gone = (buffer.view(_BITS[size]) != pattern).cpu()
    after, before = gone[len(gone) - PAD :], gone[:PAD]
    if after.any():
        raise WrongAnswer(
            f"{name} was written past its end: {int(after.sum())} elements, as far as element "
            f"{tensor.numel() + int(after.nonzero()[-1])} of {tensor.numel()}. "
            "The last block hangs over: mask the store."
        )
    if before.any():
        raise WrongAnswer(
            f"{name} was written before its beginning: {int(before.sum())} elements, as far as element "
            f"{int(before.nonzero()[0]) - PAD}."
        )


@contextlib.contextmanager
def watched_loads():
    """A list that fills with the addresses of every load that kernels make inside the block; empty on a GPU."""
    from ..kernels.runtime import INTERPRETED

    loads = []
    if not INTERPRETED:
        yield loads
        return
    from triton.runtime.interpreter import InterpreterBuilder

    real = InterpreterBuilder.create_masked_load

    def noting(self, ptrs, mask, *rest):
        loads.append(np.atleast_1d(ptrs.data)[np.atleast_1d(mask.data).astype(bool)])
        return real(self, ptrs, mask, *rest)

    InterpreterBuilder.create_masked_load = noting
    try:
        yield loads
    finally:
        InterpreterBuilder.create_masked_load = real


def check_reads(name: str, tensor: torch.Tensor, loads: list) -> None:
    """Make sure that no load of `watched_loads` lies among the canaries around a `guarded` tensor.

    Raises:
        WrongAnswer: with the side and how far out.
    """
    size = tensor.element_size()
    start = tensor.data_ptr()
    for addresses in loads:
        index = (addresses.astype(np.int64) - start) // size
        before, after = index[(index < 0) & (index >= -PAD)], index[index >= tensor.numel()]
        after = after[after < tensor.numel() + PAD]
        if len(before) or len(after):
            side, far = ("past its end", after.max()) if len(after) else ("before its beginning", before.min())
            raise WrongAnswer(
                f"{name} was read {side}, as far as element {int(far)} of {tensor.numel()}. The result is right, "
                "for what was read there is not used. But on a GPU that memory may not be yours: mask the load."
            )


def no_holes(name: str, tensor: torch.Tensor) -> None:
    """Make sure that a float tensor holds no NaN: one was never written, or comes from a read out of bounds.

    Raises:
        WrongAnswer: with the first place.
    """
    nan = torch.isnan(tensor)
    if nan.any():
        first = nan.nonzero()[0].tolist()
        raise WrongAnswer(
            f"{name} holds NaN at {first} ({int(nan.sum())} of {tensor.numel()} values): either no program wrote "
            "there, or a program read past the end of its input, where the checker put NaNs. "
            "Mask the load, and look at the grid."
        )


def need_interpreter() -> None:
    """Refuse to check a kernel where none can run.

    Raises:
        WrongAnswer: no GPU, and `TRITON_INTERPRET` was not set before the imports.
    """
    from ..kernels.runtime import HAS_TRITON, INTERPRETED

    if not HAS_TRITON:
        raise WrongAnswer("Triton is not installed on this machine, so no kernel can run.")
    if not INTERPRETED and not torch.cuda.is_available():
        raise WrongAnswer('There is no GPU: set os.environ["TRITON_INTERPRET"] = "1" in the first cell and restart.')
