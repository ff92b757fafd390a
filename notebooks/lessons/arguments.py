"""What `step`, `profile` and the exercises' keys are given, checked before anything runs: one line that names it."""

import inspect
import re
from numbers import Integral

import numpy as np

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")  # of a launch, not of the kernel


def grid_of(kernel, grid, args, constants):
    """The grid as Triton wants it, once the arguments of a launch fit the kernel.

    Args:
        kernel: a @triton.jit kernel, autotuned or not.
        grid, args, constants: as in `kernel[grid](*args, **constants)`.

    Raises:
        ValueError: `kernel` is none; the grid is neither numbers nor a function; an argument is missing, unknown or an
            array of numpy.
    """
    function = kernel
    tuned = {}
    while hasattr(function, "fn") and not inspect.isfunction(function):
        tuned |= function.configs[0].kwargs if hasattr(function, "configs") else getattr(function, "values", {})
        function = function.fn
    if function is kernel:
        got = f"{type(kernel).__name__}: give the kernel without its grid, and the grid after it"
        raise ValueError(f"kernel must be a @triton.jit function, got {got}")
    if isinstance(grid, list):
        grid = tuple(grid)
    numbers = isinstance(grid, tuple) and all(isinstance(n, Integral) and n > 0 for n in grid)
    if not callable(grid) and not (numbers and 0 < len(grid) <= 3):
        told = repr(grid) if isinstance(grid, (tuple, int, float)) else type(grid).__name__
        raise ValueError(
            "grid must be a tuple of one to three whole numbers, such as (4,), or a function of the constants that "
            f"gives one, got {told}"
        )
    named = {name: value for name, value in (tuned | constants).items() if name not in OPTIONS}
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **named).arguments
    except TypeError as error:
        raise ValueError(f"{function.__name__}({', '.join(signature.parameters)}): {error}") from None
    for name, value in given.items():
        if isinstance(value, np.ndarray):
            raise ValueError(f"{name} must be a tensor, got an array of numpy: torch.from_numpy makes it one")
    return grid


def lesson_key(key, pattern: str, kind: str) -> str:
    """`key` itself, if it is a text as `pattern` says.

    Args:
        kind: for the message: 'a lesson and a letter, such as "07.a"'.

    Raises:
        ValueError: it is not.
    """
    if not (isinstance(key, str) and re.fullmatch(pattern, key)):
        raise ValueError(f"key must be {kind}, got {key!r}")
    return key
