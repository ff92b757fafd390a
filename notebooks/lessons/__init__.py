"""What the notebooks use: claims, exercises, pictures, and `python -m handtuned.lessons` to build them.

    from handtuned import lessons

    lessons.claim(4, f"g = {g:.1e}", holds=g == 0)      # a note's claim beside the measurement
    lessons.check("01.2", my_function)                   # an exercise
    lessons.guess("07.d", "by what factor?")              # first the guess, then lessons.measured("07.d", "16 ×")
    lessons.step(kernel, grid, x, y, N, BLOCK=4)         # a launch, line by line
    lessons.profile(kernel, grid, x, y, N, BLOCK=4)      # and counted, as on an A100
    fig, ax = lessons.figure(); lessons.show(fig, alt="…")

matplotlib and IPython are imported when a picture or a claim is shown.
"""

from ..kernels.runtime import INTERPRETED
from .claims import CLAIMS, Claim, claim
from .emulated import Profile, emulated, profile
from .exercise import Exercise, WrongAnswer, check, exercises_of, expect, expect_close, hint
from .guesses import guess, guesses, measured
from .notebook import gpu, skipped, source
from .plots import ACCENT, COLORS, GREYS, HATCHES, LINES, bars, bit_row, dots, figure, show, stacked, who_reads
from .reader import progress
from .solutions import solution
from .step import Steps, step

__all__ = [
    "ACCENT",
    "CLAIMS",
    "COLORS",
    "GREYS",
    "HATCHES",
    "LINES",
    "Claim",
    "Exercise",
    "Profile",
    "Steps",
    "WrongAnswer",
    "bars",
    "bit_row",
    "check",
    "claim",
    "dots",
    "emulated",
    "exercises_of",
    "expect",
    "expect_close",
    "figure",
    "gpu",
    "guess",
    "guesses",
    "hint",
    "measured",
    "profile",
    "progress",
    "show",
    "skipped",
    "solution",
    "source",
    "stacked",
    "step",
    "who_reads",
]

if INTERPRETED:  # an error in a kernel is then raised as it is, and its traceback ends in the kernel's own line
    import triton

    triton.knobs.compilation.front_end_debugging = True
