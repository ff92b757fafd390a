"""Which line of the reader's own code is meant: the innermost that is neither Triton's, torch's nor this package's."""

import linecache
import os
import sys

_LESSONS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PACKAGE = __name__.partition(".")[0] + "."
_PYTHON = os.path.dirname(os.__file__) + os.sep


def own_line() -> str:
    """Of the code that runs now: ', line 3: `x = tl.load(x_ptr)`', or nothing."""
    frame = sys._getframe(1)
    while frame is not None and not _is_verdict(frame):
        if own(frame):
            return told(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return ""


def line_of(error: BaseException) -> str:
    """Of what raised: likewise."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        if own(trace.tb_frame):
            found = told(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return (line_of(error.__cause__) if error.__cause__ else "") or found


def told(file: str, line: int) -> str:
    """', line 3: `x = tl.load(x_ptr)`'."""
    text = linecache.getline(file, line).strip()
    return f", line {line}: `{text}`" if text else f", line {line}"


def own(frame) -> bool:
    """Whether a frame is the reader's."""
    file = frame.f_code.co_filename
    if frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        return False
    return not (f"{os.sep}site-packages{os.sep}" in file or file.startswith((_PYTHON, "<frozen")))


def _is_verdict(frame) -> bool:
    return frame.f_code.co_name == "verdict" and frame.f_code.co_filename.startswith(_LESSONS)
