"""Exercises: a specification, a stub to fill in, a checker that points at the mistake, hints.

The exercises of lesson NN live in `exercises/eNN.py` as `EXERCISES = {"NN.1": Exercise(…), …}`.
`tests/test_lessons.py` proves each: the hidden solution passes, the stub and the typical wrong
answers fail, and a wrong answer's message says what is wrong with it.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from numbers import Real

from .arguments import lesson_key
from .places import line_of

STUB = "This is still the stub: write your answer in its place."
NEAR = "Nearly: every value is right to two or three digits. Is something rounded to 16 bits on the way?"
NEARER = "Nearly: every value is right to five digits or more. Is something rounded to 32 bits on the way?"


class WrongAnswer(AssertionError):
    """Raised by a checker; its message tells the reader where to look."""


def not_written(*args):
    """What stands in a notebook before the reader has written anything."""
    raise NotImplementedError


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        title: a few words.
        specification: what to write, as the notebook tells it.
        checker: called with the reader's answer; raises `WrongAnswer`, or returns what it tried, in words.
        solution: an answer that passes.
        wrong: name → (a typical wrong answer, a phrase that its message must contain).
        hints: from gentle to nearly the solution.
        stub: what stands in the notebook.
    """

    title: str
    specification: str
    checker: Callable[[Callable], str]
    solution: Callable
    wrong: Mapping[str, tuple[Callable, str]]
    hints: tuple[str, ...]
    stub: Callable = not_written


def exercises_of(lesson: str) -> dict[str, Exercise]:
    """The exercises of a lesson, "00"…"12".

    Raises:
        ValueError: no such lesson.
    """
    try:
        module = import_module(f".exercises.e{lesson}", __package__)
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.exercises.e{lesson}":
            raise
        raise ValueError(f'lesson must be one of "00"…"12", got {lesson!r}') from None
    return module.EXERCISES


def find(key: str) -> Exercise:
    lesson_key(key, r".*\..*", 'a lesson and a number, such as "07.1"')
    exercises = exercises_of(key.partition(".")[0])
    if key not in exercises:
        raise ValueError(f"key must be one of {', '.join(exercises)}, got {key!r}")
    return exercises[key]


def check(key: str, candidate: Callable) -> bool:
    """Try the reader's answer to exercise `key` ("05.2") and say what came of it; never raises for a wrong one.

    Returns:
        whether it is right.

    Raises:
        ValueError: no such exercise.
    """
    from .reader import tried

    exercise = find(key)
    right, message = verdict(exercise, candidate)
    if STUB not in message:
        tried(key, right)
    print(f"{key} {exercise.title}: {message}")
    if not right and exercise.hints:
        more = f'  (more: lessons.hint("{key}", 2))' if len(exercise.hints) > 1 else ""
        print(f"Hint 1 of {len(exercise.hints)}: {exercise.hints[0]}{more}")
    return right


def verdict(exercise: Exercise, candidate: Callable) -> tuple[bool, str]:
    """Whether an answer is right, and the message that the reader gets."""
    from .guards import ending

    if not callable(candidate):
        return False, f"not yet. Pass the function itself, not {type(candidate).__name__}: check(key, my_function)"
    if hasattr(candidate, "arg_names"):
        return False, "not yet. Pass the function that launches your kernel, not the kernel: check(key, my_function)"
    try:
        with ending():
            tried = exercise.checker(candidate)
    except WrongAnswer as wrong:
        return False, f"not yet. {wrong}"
    except Exception as error:
        if isinstance(error, NotImplementedError) and not str(error):
            return False, f"not yet. {STUB}"
        asked = f". No line of yours raises this. Does it take and return what it should? {exercise.specification}"
        said = f": {error}" if str(error) else ""
        return False, f"not yet. {type(error).__name__}{said}{line_of(error) or asked}"
    return True, f"right. {tried}"


def hint(key: str, n: int = 1) -> None:
    """Print the n-th hint to exercise `key`, the first being the gentlest.

    Raises:
        ValueError: no such exercise or hint.
    """
    hints = find(key).hints
    if not (isinstance(n, int) and 1 <= n <= len(hints)):
        raise ValueError(f"n must be 1…{len(hints)}, got {n!r}")
    print(f"Hint {n} of {len(hints)}: {hints[n - 1]}")


def expect(condition: bool, message: str) -> None:
    """Raise `WrongAnswer(message)` unless `condition` holds."""
    if not condition:
        raise WrongAnswer(message)


def number(got, what: str, of: str = "number") -> float | int:
    """An answer that is to be one number: Python's, numpy's, or a tensor or array of a single value.

    Raises:
        WrongAnswer: it is not.
    """
    with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, Real):
        told = "None: does your function return it?" if got is None else f"{got!r}."
        raise WrongAnswer(f"{what} should be one {of}, got {told}")
    return got


@contextlib.contextmanager
def unchanged(**given):
    """Refuse an answer that changes what it was given: tensors, arrays, numbers, or lists and dicts of them.

    Raises:
        WrongAnswer: with the argument's name.
    """
    before = {name: copy.deepcopy(_leaves(value)) for name, value in given.items()}
    yield
    for name, value in given.items():
        now, old = _leaves(value), before[name]
        same = len(now) == len(old) and all(map(_same, now, old))
        expect(same, f"{name} is not what it was: your function changes what it was given. Work on a copy.")


def _leaves(value):
    from torch.utils._pytree import tree_leaves

    return [leaf.detach() if hasattr(leaf, "detach") else leaf for leaf in tree_leaves(value)]


def _same(one, other):
    import torch

    if not hasattr(one, "shape"):
        return one == other
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return one.shape == other.shape and torch.allclose(one, other, 0, 0, equal_nan=True)


def alike(got, want) -> bool:
    """Whether two tensors have one shape and dtype, so that `torch.allclose` can compare them."""
    import torch

    return torch.is_tensor(got) and (got.shape, got.dtype) == (want.shape, want.dtype)


def expect_close(got, want, what: str, rtol: float = 0.0, atol: float = 0.0, hint: str = "", near: str = NEAR) -> None:
    """Compare an answer with what it should be and print the first difference.

    Args:
        got, want: tensors, arrays, numbers or lists; shapes must be equal, dtypes too where both are tensors.
        what: what is compared, for the message: "the gradient of x".
        rtol, atol: as in `torch.allclose`; exact by default. NaN equals NaN.
        hint: added to the message.
        near: added instead where a result is right to about three digits, and should be to more.

    Raises:
        WrongAnswer: they differ.
    """
    import torch

    expect(got is not None, f"{what} is None: does your function return it?")
    try:
        mine, theirs = (torch.as_tensor(value) for value in (got, want))
    except (TypeError, ValueError, RuntimeError):
        raise WrongAnswer(f"{what} should be a number or tensor, got {type(got).__name__}.") from None
    tail = f" {hint}" if hint else ""
    expect(not mine.is_complex(), f"{what} should be real, got {mine.dtype}.")
    expect(
        mine.shape == theirs.shape,
        f"{what} has the shape {tuple(mine.shape)}, expected {tuple(theirs.shape)}.{tail}",
    )
    if isinstance(got, torch.Tensor) and isinstance(want, torch.Tensor):
        expect(mine.dtype == theirs.dtype, f"{what} has dtype {mine.dtype}, expected {theirs.dtype}.{tail}")
    wide = theirs.dtype == torch.float64 and theirs.dim() > 0
    mine, theirs = mine.detach().double().cpu(), theirs.detach().double().cpu()
    bad = ~torch.isclose(mine, theirs, rtol=rtol, atol=atol, equal_nan=True)
    if not bad.any():
        return
    off = (mine - theirs).abs().max() / theirs.abs().max()
    if mine.dim() and max(rtol, atol) < 2**-10 and 2**-17 < off <= 2**-9:
        tail = f" {near}"
    elif wide and off <= 2**-17:
        tail = f" {NEARER}"
    place = bad.nonzero()[0]
    index = tuple(place.tolist())
    where = f" at {list(index)}" if index else ""
    count = f" ({int(bad.sum())} of {bad.numel()} values differ)" if bad.numel() > 1 else ""
    raise WrongAnswer(f"{what} is {mine[index].item():.6g}{where}, expected {theirs[index].item():.6g}{count}.{tail}")
