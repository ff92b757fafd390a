"""Who really computed? A reader's answer runs while every launch, load and store of Triton's interpreter is noted.

A kernel exercise is answered by a kernel. So torch may allocate, view and copy, and nothing else; the inputs must be
read by a kernel and every element of the outputs written by one. An address that lies in none of a launch's tensors
stops it at once, with the kernel's own line: neither a GPU nor the interpreter would say a word.

On a GPU without the interpreter launches are counted and torch is refused; the canaries around the tensors do the rest.
"""

import contextlib

import numpy as np
import torch

from ..kernels.runtime import HAS_TRITON, INTERPRETED
from .canaries import check_canaries, no_holes
from .exercise import WrongAnswer, expect
from .guards import patched, untuned
from .only_memory import OnlyMemory
from .places import own_line
from .spans import Span, addresses_of, home


class Watch:
    """What happened.

    Attributes:
        launches: names of the kernels, in order.
        loads, stores: elements that kernels read and wrote, every repetition counted.
        dots: tl.dot, of all programs.
    """

    def __init__(self, named, kept):
        self.launches, self.loads, self.stores, self.dots, self.inside = [], 0, 0, 0, False
        self.named, self.spans = [Span(name, tensor) for name, tensor in named.items()], []
        self.kept = [span for span in self.named if span.name in kept]
        self.copies = {home(span.tensor): {span.name} for span in self.named}  # memory → whose copy lies there
        self.made = set()  # memory that kernels wrote, and copies of it
        self.used = set()  # names of what kernels read, themselves or a copy

    def read(self, name: str) -> bool:
        """Whether a kernel read from this tensor."""
        return any(span.read.any() for span in self.named if span.name == name)

    def has(self, tensors) -> bool:
        """Whether one of these holds what the kernel was given or has made."""
        return any(home(tensor) in self.copies or home(tensor) in self.made for tensor in tensors)

    def copied(self, sources, target):
        """torch made `target`, or filled it, from `sources`."""
        for source in sources:
            self.copies.setdefault(home(target), set()).update(self.copies.get(home(source), ()))
        if any(home(source) in self.made for source in sources):
            self.made.add(home(target))
            for span in self.named:
                span.mark(span.written, addresses_of(target), target.element_size())
                span.left = span.now()

    def begin(self, kernel, tensors):
        self.launches.append(kernel)
        for span in self.kept:
            if span.now() != span.left:
                raise WrongAnswer(
                    f"{span.name} was changed before the launch of {kernel}, and by no kernel: leave it as it is."
                )
        names = {span.start: span.name for span in self.named}
        self.spans = [Span(names.get(t.data_ptr(), name), t) for name, t in tensors.items() if t.numel()]
        self.inside = True

    def end(self):
        self.inside, self.spans = False, []
        for span in self.named:
            span.left = span.now()

    def access(self, pointers, mask, width, reading):
        """Note a load or store of a block; raise WrongAnswer where it leaves the launch's tensors."""
        addresses = np.atleast_1d(pointers).astype(np.int64)
        addresses = addresses[np.broadcast_to(np.atleast_1d(mask).astype(bool), addresses.shape)]
        if not addresses.size:
            return
        self.loads, self.stores = self.loads + reading * addresses.size, self.stores + (not reading) * addresses.size
        outside = np.logical_and.reduce([~span.holds(addresses, width) for span in self.spans] or [addresses != 0])
        if outside.any():
            self._outside(addresses[outside], reading)
        for span in self.named:
            span.mark(span.read if reading else span.written, addresses, width)
        for span in self.spans:
            if span.holds(addresses, width).any():
                place = home(span.tensor)
                self.used |= self.copies.get(place, set()) if reading else set()
                self.made |= set() if reading else {place}

    def _outside(self, addresses, reading):
        far = [(min(abs(a - s.start), abs(a - s.start - s.bytes)), s) for a in addresses[[0, -1]] for s in self.spans]
        did = "read" if reading else "written"
        if not far:
            raise WrongAnswer(f"Memory was {did} in a launch that was given no tensor{own_line()}.")
        span = min(far, key=lambda entry: entry[0])[1]
        index = (addresses - span.start) // span.size
        past = addresses.max() >= span.start + span.bytes
        side, at = ("past its end", index.max()) if past else ("before its beginning", index.min())
        from triton.runtime.interpreter import interpreter_builder

        place = zip(interpreter_builder.grid_idx, interpreter_builder.grid_dim, strict=True)
        program = ", ".join(str(i) for i, programs in place if programs > 1)
        raise WrongAnswer(
            f"{span.name} was {did} {side}: element {int(at)} of {span.bytes // span.size}, by program "
            f"{program or 0}{own_line()}. What hangs over is masked in "
            f"{'loads' if reading else 'stores'} too: mask=…"
        )


@contextlib.contextmanager
def watching(watch: Watch, torch_may=(), torch_moves=True):
    """Note in `watch` what kernels do inside."""
    if not INTERPRETED:
        from triton import JITFunction

        with untuned(), patched(JITFunction, "run", _counting(watch)), OnlyMemory(watch, torch_may, torch_moves):
            yield watch
        return
    import triton
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, _get_np_dtype

    def launch(real):
        def __call__(self, *args, **constants):
            if not callable(self.grid) and not isinstance(self.grid, tuple):
                raise WrongAnswer(f"The grid is a tuple, {self.fn.__name__}[(programs,)](…), got {self.grid!r}.")
            named = dict(zip(self.arg_names, args, strict=False)) | constants
            tensors = {name: getattr(value, "base", value) for name, value in named.items()}
            tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
            watch.begin(self.fn.__name__, tensors)
            try:
                return real(self, *args, **constants)
            finally:
                watch.end()

        return __call__

    def without_grid(real):
        def __call__(self, *args, **constants):
            if not watch.inside:
                name = self.fn.__name__
                raise WrongAnswer(f"{name} was called without a grid: a launch is {name}[(programs,)](…){own_line()}.")
            try:
                return real(self, *args, **constants)
            except InterpreterError as wrapped:  # by a function that the kernel calls
                raise wrapped.__cause__ from None

        return __call__

    def width(ptrs):
        return _get_np_dtype(ptrs.get_element_ty()).itemsize

    def load(real):
        def create_masked_load(self, ptrs, mask, *rest, **named):
            watch.access(ptrs.data, mask.data, width(ptrs), True)
            return real(self, ptrs, mask, *rest, **named)

        return create_masked_load

    def store(real):
        def create_masked_store(self, ptrs, value, mask, *rest, **named):
            watch.access(ptrs.data, mask.data, width(ptrs), False)
            return real(self, ptrs, value, mask, *rest, **named)

        return create_masked_store

    def atomic(real):
        def create_atomic_rmw(self, op, ptr, val, mask, *rest):
            for reading in (True, False):
                watch.access(ptr.data, mask.data, width(ptr), reading)
            return real(self, op, ptr, val, mask, *rest)

        return create_atomic_rmw

    def compare(real):
        def create_atomic_cas(self, ptr, *rest):
            for reading in (True, False):
                watch.access(ptr.data, np.ones_like(ptr.data, bool), width(ptr), reading)
            return real(self, ptr, *rest)

        return create_atomic_cas

    def dot(real):
        def create_dot(self, *operands):
            watch.dots += 1
            return real(self, *operands)

        return create_dot

    with contextlib.ExitStack() as stack:
        stack.enter_context(triton.knobs.compilation.scope())
        triton.knobs.compilation.front_end_debugging = True  # errors come as they are, not wrapped
        stack.enter_context(patched(GridExecutor, "__call__", launch))
        stack.enter_context(patched(InterpretedFunction, "__call__", without_grid))
        for name, wrap in (("load", load), ("store", store)):
            stack.enter_context(patched(InterpreterBuilder, f"create_masked_{name}", wrap))
        stack.enter_context(patched(InterpreterBuilder, "create_atomic_rmw", atomic))
        stack.enter_context(patched(InterpreterBuilder, "create_atomic_cas", compare))
        stack.enter_context(patched(InterpreterBuilder, "create_dot", dot))
        stack.enter_context(untuned())
        stack.enter_context(OnlyMemory(watch, torch_may, torch_moves))
        yield watch


def _counting(watch):
    def wrap(real):
        def run(self, *args, **settings):
            watch.launches.append(self.__name__)
            watch.inside = True
            try:
                return real(self, *args, **settings)
            finally:
                watch.inside = False

        return run

    return wrap


def launched(
    candidate, *args, inputs=None, outputs=None, changed=None, what="", hint="", torch_may=(), torch_moves=True
) -> Watch:
    """Call `candidate(*args)`, an answer to a kernel exercise, and make sure that kernels did the work.

    Args:
        inputs: name → tensor that a kernel must read and nobody may change.
        outputs: name → tensor of which kernels must write every element; floats must not be NaN afterwards.
        changed: name → tensor that kernels read and write in place, in part or in whole.
        what: the case that is tried, for messages.
        hint: what is said after them.
        torch_may: names of torch's operations that are allowed beside those that only move memory: "sum".
        torch_moves: whether torch may copy inputs and what kernels made.

    Raises:
        WrongAnswer: with the reason; where it can be told, with the kernel's own line.
    """
    need_interpreter()
    inputs, outputs, changed = inputs or {}, outputs or {}, changed or {}
    watch = Watch(inputs | outputs | changed, {*inputs, *changed})
    case = f" ({what})" if what else ""
    try:
        with watching(watch, torch_may, torch_moves):
            candidate(*args)
        if not watch.launches:
            raise WrongAnswer(
                "No kernel was launched: the answer is a @triton.jit kernel and a function that launches it."
            )
        for span in watch.named:
            check_canaries(f"{span.name}{case}", span.tensor)
            if INTERPRETED:
                unused = span.name in inputs and span.bytes and span.name not in watch.used
                expect(not unused, f"No kernel read {span.name}{case}: how can the result depend on it?")
                _by_kernels_alone(watch, span, inputs, outputs, case)
        for name, tensor in outputs.items():
            if tensor.dtype.is_floating_point:
                no_holes(f"{name}{case}", tensor)
    except WrongAnswer as wrong:
        raise WrongAnswer(f"{wrong} {hint}" if hint else str(wrong)) from None
    return watch


def _by_kernels_alone(watch, span, inputs, outputs, case):
    if span.name in inputs and span.written.any():
        raise WrongAnswer(f"{span.name}{case} was written to, but it is an input.")
    if span.now() != span.left:
        raise WrongAnswer(f"{span.name}{case} was changed after the last launch, and not by a kernel.")
    unwritten = ~span.elements(span.written)
    if span.name not in outputs or not unwritten.any():
        return
    if unwritten.all() and watch.stores:
        told = f"Give the kernel {span.name} itself; a tensor of its own, or another name for it, stays here unseen."
    elif watch.stores >= sum(tensor.numel() for tensor in outputs.values()):
        told = (
            "Other places were written more than once instead: has each program its own block, and each row its own "
            "place? Look at the offsets of the store."
        )
    else:
        told = "Does the grid have enough programs, and each its own block? Look at the grid, and at the store's mask."
    raise WrongAnswer(
        f"{span.name}{case}: no program wrote element {np.argwhere(unwritten)[0].tolist()} ({int(unwritten.sum())} "
        f"of {unwritten.size} elements were not written by a kernel). {told}"
    )


def watched(call, where: str, *names, torch_may=()):
    """`call()`, a pass of an autograd Function: kernels compute, torch allocates, views and copies.

    Args:
        where: "forward" or "backward".
        names: of the tensors that it returns and kernels must have made.
        torch_may: as in `launched`.

    Raises:
        WrongAnswer: torch computed, no kernel was launched, or another number of tensors was returned.
    """
    need_interpreter()
    with watching(Watch({}, ()), torch_may) as watch:
        made = call()
    if not watch.launches:
        raise WrongAnswer(f"The {where} pass launched no kernel.")
    several = made if isinstance(made, (tuple, list)) else (made,)
    told = ", ".join("None" if t is None else type(t).__name__ for t in several)
    wanted = f"The {where} pass should return {', '.join(names)}, got {told}."
    expect(len(several) == len(names) and all(isinstance(t, torch.Tensor) for t in several), wanted)
    for name, tensor in zip(names, several, strict=True):
        by_kernels(watch, name, tensor)
    return made


def by_kernels(watch: Watch, name: str, tensor: torch.Tensor) -> None:
    """Make sure that a returned tensor lies in memory that kernels wrote; a flag may stay as it was.

    Raises:
        WrongAnswer: it does not.
    """
    written = not INTERPRETED or tensor.numel() == 1 or home(tensor) in watch.made
    expect(written, f"No kernel wrote {name}: its values were made in another way.")


def need_interpreter() -> None:
    """Refuse to check a kernel where none can run.

    Raises:
        WrongAnswer: no GPU, and `TRITON_INTERPRET` was not set before the imports.
    """
    if not HAS_TRITON:
        raise WrongAnswer("Triton is not installed on this machine, so no kernel can run.")
    if not INTERPRETED and not torch.cuda.is_available():
        raise WrongAnswer('There is no GPU: set os.environ["TRITON_INTERPRET"] = "1" in the first cell and restart.')
