"""What holds while a reader's code runs: loops end, autotuning takes the first configuration."""

import contextlib
import signal
import sys
import threading
from collections import Counter

from .exercise import WrongAnswer
from .places import own, told

MOST_LINES = 20_000  # of one call
UNCOUNTED = 30.0  # seconds


@contextlib.contextmanager
def patched(owner, name, wrap):
    """`owner.name` is `wrap` of itself inside."""
    real = getattr(owner, name)
    setattr(owner, name, wrap(real))
    try:
        yield
    finally:
        setattr(owner, name, real)


def untuned():
    """Inside, @triton.autotune measures nothing, which takes a GPU: the first configuration is the best."""
    from triton.runtime.autotuner import Autotuner

    def first(real):
        def run(self, *args, **settings):
            before, self.configs = self.configs, self.configs[:1]
            try:
                return real(self, *args, **settings)
            finally:
                self.configs = before

        return run

    return patched(Autotuner, "run", first)


@contextlib.contextmanager
def ending():
    """Stop whoever runs more than MOST_LINES lines of the reader's code in one call.

    To count lines slows Python down: it begins after UNCOUNTED seconds of the processor's time. Not counted is where
    the system has no such alarm, outside of the main thread, and what a debugger steps through.

    Raises:
        WrongAnswer: with the line that the loop had come to.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer") or sys.gettrace() is not None:
        yield
        return
    lines = Counter()

    def trace(frame, event, arg):
        return count if own(frame) else None

    def count(frame, event, arg):
        if event == "return":
            lines.pop(frame, None)
            return count
        lines[frame] += 1
        if lines[frame] > MOST_LINES:
            raise WrongAnswer(
                f"{frame.f_code.co_name} does not end: one call ran more than {MOST_LINES:,} lines and was stopped"
                f"{told(frame.f_code.co_filename, frame.f_lineno)}. Which line of the loop makes its condition false?"
            )
        return count

    def begin(number, frame):
        sys.settrace(trace)
        while frame is not None:
            frame.f_trace = trace(frame, "call", None)
            frame = frame.f_back

    before = signal.signal(signal.SIGVTALRM, begin)
    signal.setitimer(signal.ITIMER_VIRTUAL, UNCOUNTED)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        if sys.gettrace() is trace:
            sys.settrace(None)
