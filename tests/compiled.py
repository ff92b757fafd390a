"""Tests of compiled kernels, on a machine without a GPU.

Kernels are compiled only where they were decorated without the interpreter, so in a run with TRITON_INTERPRET=1 a file
of such tests starts itself again without. It holds

    def test_this_file_without_the_interpreter(pytestconfig):
        run_again(__file__, pytestconfig)

and its other tests are marked `@compiled`.
"""

import os
import subprocess
import sys

import pytest
import triton

from handtuned.gpu import KernelFault, emulate

INTERPRETED = bool(triton.knobs.runtime.interpret)
# What differs in PTX between the others is little: they are for --slow.
ALL = [pytest.param(arch, marks=() if arch in ("sm_75", "sm_90", "sm_120") else pytest.mark.slow)
       for arch in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")]  # fmt: skip
compiled = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here")


def run_again(file: str, config, *options: str):
    """The tests of a file in a process without the interpreter, with the same --slow and more of pytest's options."""
    if not INTERPRETED:
        pytest.skip("this is the process without the interpreter")
    slow = ["--slow"] if config.getoption("--slow") else []
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *slow, *options, file]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def fault_of(arch: str, call) -> KernelFault:
    """The fault that a call ends with in the emulator."""
    with pytest.raises(KernelFault) as caught, emulate(arch):
        call()
    return caught.value
