"""What the notebooks use: claims, exercises, pictures, and `python -m handtuned.lessons` to build them.

    from handtuned import lessons

    lessons.claim(4, f"g = {g:.1e}", holds=g == 0)      # a note's claim beside the measurement
    lessons.check("01.2", my_function)                   # an exercise
    fig, ax = lessons.figure(); lessons.show(fig, alt="…")

matplotlib and IPython are imported when a picture or a claim is shown.
"""

from .claims import CLAIMS, Claim, claim
from .exercise import Exercise, WrongAnswer, check, exercises_of, expect, expect_close, hint
from .notebook import gpu, skipped, source
from .plots import ACCENT, COLORS, GREYS, HATCHES, LINES, bars, bit_row, figure, show, stacked, who_reads

__all__ = [
    "ACCENT",
    "CLAIMS",
    "COLORS",
    "GREYS",
    "HATCHES",
    "LINES",
    "Claim",
    "Exercise",
    "WrongAnswer",
    "bars",
    "bit_row",
    "check",
    "claim",
    "exercises_of",
    "expect",
    "expect_close",
    "figure",
    "gpu",
    "hint",
    "show",
    "skipped",
    "source",
    "stacked",
    "who_reads",
]
