"""Tensors between canaries: a kernel that reads or writes out of bounds gives itself away.

Triton's interpreter, like a GPU, checks no bounds: a block that hangs over the end of a tensor reads
whatever lies there, and overwrites it. So a checker puts each tensor in the middle of a larger buffer
whose rest holds known NaNs. What is read out of bounds is NaN and spoils the result; what is written
there destroys a canary. The NaNs of each buffer carry a number of their own in the mantissa, so that
a NaN copied from one buffer's edge onto another's is noticed as well. Under the interpreter `watch.py` sees every
address besides, however far out, and whether or not the value is used.
"""

import itertools

import torch

from .exercise import WrongAnswer

PAD = 1 << 16  # elements on each side: more than a block of one dimension has, as a rule
_serial = itertools.count(1)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_patterns: dict[int, tuple[torch.Tensor, int]] = {}


def place() -> str:
    """Where kernels run: "cuda" if there is a GPU and they are not interpreted, else "cpu"."""
    from ..kernels.runtime import INTERPRETED

    return "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def guarded(shape, dtype: torch.dtype = torch.float32, values: torch.Tensor | None = None, device=None) -> torch.Tensor:
    """A contiguous tensor of `shape` with canaries on both sides.

    Args:
        shape: an int or a tuple.
        dtype: of float or integer kind.
        values: what it holds; without, poison (NaN, or a large pattern for integers), for outputs.
        device: `place()` by default.
    """
    device = place() if device is None else device
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
            "there, or one added to what lay there before, or read past the end of its input, where the checker put "
            "NaNs, or what it computed has no value (0 / 0, inf - inf)."
        )
