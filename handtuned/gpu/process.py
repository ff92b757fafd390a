"""HANDTUNED_BACKEND=sm_90: the whole process runs its kernels in the emulator."""

import atexit
import contextlib
import os

from .session import Emulator, emulate

_stack = contextlib.ExitStack()
_gpu: Emulator | None = None


def emulate_process(arch: str | None = None) -> Emulator:
    """Start emulating until the process ends; a second call gives the same emulator.

    Args:
        arch: "sm_90"; None: what HANDTUNED_BACKEND says.
    """
    global _gpu
    if _gpu is None:
        _gpu = _stack.enter_context(emulate(arch or os.environ["HANDTUNED_BACKEND"]))
        atexit.register(_stack.close)
    return _gpu
