"""What a cell shows: rich output in a notebook, plain text anywhere else."""

import inspect
import sys


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this code."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def display(bundle: dict, metadata: dict | None = None) -> None:
    """Show a bundle (mimetype → content) in a notebook; print its text/plain elsewhere."""
    if in_notebook():
        from IPython.display import display as show

        show(bundle, raw=True, metadata=metadata or {})
    else:
        print(bundle["text/plain"])


def gpu() -> bool:
    """Whether this machine has a CUDA GPU, for cells that show more there."""
    import torch

    return torch.cuda.is_available()


def skipped(what: str) -> None:
    """Say what a GPU cell would have shown."""
    print(f"needs a CUDA GPU: {what}")


def source(thing, first: str | None = None, last: str | None = None) -> None:
    """Show the library's own source of a function, class, module or Triton kernel.

    Args:
        thing: what `inspect.getsource` takes, or a `@triton.jit` kernel.
        first, last: a piece of the first and of the last line wanted; the whole source without them.

    Raises:
        ValueError: no line contains `first` or `last`.
    """
    for name in ("fn", "__wrapped__"):  # @triton.autotune and @triton.jit keep what they decorate
        while hasattr(thing, name) and not inspect.isfunction(thing):
            thing = getattr(thing, name)
    lines = inspect.getsource(thing).splitlines()
    begin = _line(lines, first, 0) if first else 0
    end = _line(lines, last, begin) if last else len(lines) - 1
    text = inspect.cleandoc("\n" + "\n".join(lines[begin : end + 1]))
    display({"text/plain": text, "text/markdown": f"```python\n{text}\n```"})


def _line(lines: list[str], piece: str, start: int) -> int:
    for number in range(start, len(lines)):
        if piece in lines[number]:
            return number
    raise ValueError(f"no line of the source contains {piece!r}")
