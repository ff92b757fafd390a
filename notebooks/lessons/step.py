"""Step through a launch: program by program and line by line, with values, masks and addresses.

The kernel runs in Triton's interpreter under `sys.settrace`. After each line stands what it changed; a load or store
says which elements of which tensor it touched. In a notebook it is a table, with ipywidgets a slider moves through it,
anywhere else it is text. (triton-viz draws loads, stores and products in a browser; it knows neither the lines nor the
values between them, and brings a web server, Z3 and Arrow along. Lesson 02 shows how to use it beside this.)
"""

import html
import inspect
import linecache
import sys
from dataclasses import dataclass, field

import numpy as np
import torch

from ..kernels.runtime import HAS_TRITON, INTERPRETED
from .arguments import grid_of
from .guards import patched
from .notebook import display
from .places import line_of

SHOWN = 16  # values of a block; of more, the first and the last


@dataclass
class Access:
    """A load or store of a block.

    Attributes:
        kind: "load" or "store".
        tensor: name of the kernel's argument that its addresses begin in, or the nearest.
        index: int64, elements from the tensor's first one, of the block's shape.
        mask: bool, of the block's shape: which take part.
        outside: how many of those lie beyond the tensor.
    """

    kind: str
    tensor: str
    index: np.ndarray
    mask: np.ndarray
    outside: int

    def __str__(self):
        some = "" if self.mask.all() else f", mask {_values(self.mask.astype(int))}"
        beyond = f", {self.outside} OUTSIDE of it" if self.outside else ""
        count = f"{int(self.mask.sum())} of {self.mask.size}"
        return f"{self.kind} {self.tensor}[{_values(self.index)}]{some} ({count} elements{beyond})"


@dataclass
class Step:
    """One line, after it ran.

    Attributes:
        program: its place in the grid, (x, y, z).
        line: number in the kernel's file or cell.
        source: its text.
        changed: name → value, of what it assigned: arrays of blocks, numbers of scalars.
        accesses: its loads and stores.
    """

    program: tuple
    line: int
    source: str
    changed: dict = field(default_factory=dict)
    accesses: list = field(default_factory=list)

    def told(self) -> list[str]:
        """What it did, a line each."""
        return [*map(str, self.accesses), *(f"{name} = {_described(value)}" for name, value in self.changed.items())]


@dataclass(repr=False)
class Steps:
    """A launch, line by line; `print` it, or let a notebook show it.

    Attributes:
        kernel: its name.
        grid: programs in x, y, z.
        steps: a Step each.
        error: what stopped it, with the kernel's line; or "".
    """

    kernel: str
    grid: tuple
    steps: list
    error: str = ""

    def of(self, program) -> list:
        """The steps of one program, given by its number in a one-dimensional grid or its (x, y, z)."""
        place = (program, 0, 0) if isinstance(program, int) else (*program, 0, 0)[:3]
        return [step for step in self.steps if step.program == place]

    def __str__(self):
        size = f"{' × '.join(map(str, self.grid))} programs" if self.grid else "no program began"
        out, before = [f"{self.kernel}, {size}"], None
        for step in self.steps:
            if step.program != before:
                out += ["", f"program {step.program}"]
                before = step.program
            out.append(f"{step.line:4}  {step.source}")
            out += [f"        {line}" for line in step.told()]
        return "\n".join([*out, *([f"stopped: {self.error}"] if self.error else [])])

    __repr__ = __str__

    def html(self, steps=None) -> str:
        """A table of all steps, or of some."""
        rows = []
        for step in self.steps if steps is None else steps:
            done = "<br>".join(map(html.escape, step.told()))
            cells = f"<td>{step.program}</td><td>{step.line}</td><td><code>{html.escape(step.source)}</code></td>"
            rows.append(f'<tr style="text-align:left">{cells}<td style="text-align:left">{done}</td></tr>')
        head = "<tr><th>program</th><th>line</th><th>source</th><th>what it did</th></tr>"
        stopped = f"<p>stopped: {html.escape(self.error)}</p>" if self.error else ""
        return f"<table>{head}{''.join(rows)}</table>{stopped}"

    def _ipython_display_(self):
        try:
            from ipywidgets import HTML, IntSlider, VBox, jslink  # noqa: F401  the last says that it is whole
        except ImportError:
            display({"text/plain": str(self), "text/html": self.html()})
            return
        from IPython.display import display as show

        slider = IntSlider(min=1, max=max(1, len(self.steps)), description="step")
        table = HTML()

        def move(_=None):
            table.value = self.html(self.steps[max(0, slider.value - 4) : slider.value])

        slider.observe(move, "value")
        move()
        show(VBox([slider, table]))


def step(kernel, grid, *args, programs: int | None = 4, **constants) -> Steps:
    """Run a launch in the interpreter and keep what each line of the kernel did. The launch really happens.

    Args:
        kernel: a @triton.jit kernel, decorated under TRITON_INTERPRET=1; of an autotuned one the first configuration.
        grid, args, constants: as in `kernel[grid](*args, **constants)`; tensors on the CPU.
        programs: keep the steps of the first so many; None: of all.

    Returns:
        Steps. An error in the kernel does not raise: `error` says it, after the steps that led there.

    Raises:
        ValueError: the kernel is not interpreted, or cannot be launched so; `programs` is not a number of programs.
    """
    if programs is not None and not (isinstance(programs, int) and programs > 0):
        raise ValueError(f"programs must be a whole number of 1 or more, or None for all, got {programs!r}")
    while hasattr(kernel, "configs"):
        kernel, constants = kernel.fn, kernel.configs[0].all_kwargs() | constants
    if not (HAS_TRITON and INTERPRETED and hasattr(kernel, "rewrite")):
        raise ValueError(
            "kernel must be a @triton.jit function of a process with TRITON_INTERPRET=1 (set it before the imports), "
            f"got {type(kernel).__name__}"
        )
    grid = grid_of(kernel, grid, args, constants)
    from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype, interpreter_builder

    function, names = kernel.rewrite(), list(inspect.signature(kernel.fn).parameters)
    named = dict(zip(names, args, strict=False)) | constants
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    taken, seen = Steps(kernel.fn.__name__, (), []), {}

    def settle(frame):
        """Give the step that has just run what it changed."""
        now = {name: _plain(value) for name, value in frame.f_locals.items()}
        if taken.steps and seen:
            old = seen["locals"]
            taken.steps[-1].changed = {n: v for n, v in now.items() if n not in old or not _same(v, old[n])}
        seen["locals"] = now

    def trace_lines(frame, event, _):
        if event in ("line", "return"):
            settle(frame)
        if event == "line":
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            taken.steps.append(Step(tuple(interpreter_builder.grid_idx), frame.f_lineno, text))
        return trace_lines

    def trace(frame, event, _):
        if frame.f_code is not function.__code__:
            return None
        taken.grid = tuple(interpreter_builder.grid_dim)
        seen.clear()
        x, y, z = interpreter_builder.grid_idx
        number = (x * taken.grid[1] + y) * taken.grid[2] + z
        if programs is not None and number >= programs:
            return None
        seen["locals"] = {name: _plain(value) for name, value in frame.f_locals.items()}
        return trace_lines

    def noting(kind):
        def wrap(real):
            def access(self, ptrs, *rest):
                mask = rest[0] if kind == "load" else rest[1]
                if seen and taken.steps:
                    taken.steps[-1].accesses.append(_access(kind, ptrs, mask, tensors, _get_np_dtype))
                return real(self, ptrs, *rest)

            return access

        return wrap

    before = sys.gettrace()
    with (
        patched(InterpreterBuilder, "create_masked_load", noting("load")),
        patched(InterpreterBuilder, "create_masked_store", noting("store")),
    ):
        sys.settrace(trace)
        try:
            kernel[grid](*args, **constants)
        except Exception as error:
            cause = error.__cause__ or error
            taken.error = f"{type(cause).__name__}: {cause}{line_of(error)}"
        finally:
            sys.settrace(before)
    return taken


def _access(kind, ptrs, mask, tensors, np_dtype):
    """An Access from blocks of addresses and of its mask."""
    addresses = np.atleast_1d(ptrs.data).astype(np.int64)
    taking = np.broadcast_to(np.atleast_1d(mask.data).astype(bool), addresses.shape)
    first = addresses.flat[int(taking.argmax())]
    spans = {name: (t.data_ptr(), t.data_ptr() + _reach(t) * t.element_size()) for name, t in tensors.items()}
    name = min(spans, key=lambda n: max(spans[n][0] - first, first - spans[n][1] + 1, 0), default="?")
    start, end = spans.get(name, (0, 0))
    outside = int((taking & ((addresses < start) | (addresses >= end))).sum())
    size = tensors[name].element_size() if name in tensors else np_dtype(ptrs.get_element_ty()).itemsize
    return Access(kind, name, (addresses - start) // size, taking, outside)


def _reach(tensor):
    """Elements from the first to the last."""
    return sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def _plain(value):
    """A value of the interpreter as a number or an array of its own."""
    handle = getattr(value, "handle", None)
    if handle is None or not hasattr(handle, "data"):
        return value
    if "*" in str(value.type) or "pointer" in str(value.type):
        return f"addresses of {'×'.join(map(str, value.shape)) or 'one'} element{'s' if value.shape else ''}"
    data = np.array(handle.data)
    return data.reshape(-1)[0] if not value.shape else data


def _same(a, b):
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a is b or (type(a) is type(b) and bool(a == b))


def _described(value):
    if isinstance(value, np.ndarray):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]  {_values(value)}"
    return f"{value:g}" if isinstance(value, np.floating) else str(value)


def _values(array):
    """Up to SHOWN values; a range of whole numbers as its ends."""
    flat = np.asarray(array).reshape(-1)
    if flat.dtype.kind in "iu" and flat.size > 4 and (np.diff(flat.astype(np.int64)) == 1).all():
        return f"{flat[0]} … {flat[-1]}"
    if flat.dtype == bool:
        flat = flat.astype(int)
    form = "{:.4g}".format if flat.dtype.kind == "f" else str
    texts = [form(value) for value in flat]
    if len(texts) > SHOWN:
        texts = [*texts[: SHOWN - 2], "…", texts[-1]]
    return " ".join(texts)
