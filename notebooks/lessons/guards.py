"""What holds while a reader's code runs: loops end, autotuning takes the first configuration."""

import contextlib
import signal
import sys
import threading
from collections import Counter

from .exercise import WrongAnswer
from .places import own, told

MOST_STEPS = 2_000_000  # of one call: instructions of Python; in a kernel, where each computes on blocks, a tenth
UNCOUNTED = 20.0  # seconds


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
    """Stop whoever runs more than MOST_STEPS in one call of the reader's code.

    To count them slows Python down: it begins after UNCOUNTED seconds of the processor's time. Not counted is where
    the system has no such alarm, outside of the main thread, and what a debugger steps through.

    Raises:
        WrongAnswer: with the line that the loop had come to.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer") or sys.gettrace() is not None:
        yield
        return
    steps = Counter()

    def trace(frame, event, arg):
        frame.f_trace_opcodes = own(frame)
        return count if own(frame) else None

    def count(frame, event, arg):
        if event == "return":
            steps.pop(frame, None)
            return count
        steps[frame] += 1
        in_kernel = frame.f_back is not None and "triton" in frame.f_back.f_globals.get("__name__", "")
        if steps[frame] > (MOST_STEPS // 10 if in_kernel else MOST_STEPS):
            raise WrongAnswer(
                f"{frame.f_code.co_name} does not end: one call was stopped after {steps[frame]:,} steps"
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
