"""Long arrays of which little is touched.

A tensor of far-apart rows reaches over more memory than a machine has, and each piece of it has its entries here.
"""

import mmap

import numpy as np

_FREELY = 1 << 28  # bytes that the system gives without asking whether it has them
_NO_RESERVE = 0x4000  # Linux; Python names it from 3.13 on


def zeros(count: int, dtype) -> np.ndarray:
    """As np.zeros (count,), but memory is taken when it is touched, not reserved."""
    nbytes = count * np.dtype(dtype).itemsize
    if nbytes < _FREELY:
        return np.zeros(count, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype)
