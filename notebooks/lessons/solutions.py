"""The reference answer of an exercise, for whoever has tried it, or wants to see it all the same."""

import inspect
from types import CodeType

from .exercise import find
from .notebook import display
from .reader import recall


def solution(key: str, now: bool = False) -> None:
    """Show the reference answer to exercise `key` with the functions and kernels it uses.

    Args:
        key: "07.3".
        now: also to someone who has not tried it yet.

    Raises:
        ValueError: no such exercise.
    """
    answer = find(key).solution
    if not now and not recall()["answers"].get(key):
        print(f'{key}: try it first with lessons.check("{key}", …), or see it now: lessons.solution("{key}", now=True)')
        return
    text = "\n\n".join(_sources(answer, inspect.getmodule(_plain(answer)), []))
    settings = inspect.getclosurevars(answer).nonlocals if inspect.isfunction(answer) else {}
    if settings := {name: value for name, value in settings.items() if isinstance(value, (int, float, str))}:
        # The same text makes the typical wrong answers, and such a setting chooses among them.
        text += "\n\n# the right one: " + ", ".join(f"{name} = {value!r}" for name, value in settings.items())
    display({"text/plain": text, "text/markdown": f"```python\n{text}\n```"})


def _plain(thing):
    """The function or class behind a kernel or a bound method."""
    while hasattr(thing, "fn") and not inspect.isfunction(thing):
        thing = thing.fn
    return thing.__self__ if inspect.ismethod(thing) else thing


def _sources(thing, module, seen: list) -> list[str]:
    """Sources of what `thing` needs from its own file, those first that the others use, then its own."""
    thing = _plain(thing)
    if thing in seen:
        return []
    seen.append(thing)
    functions = [thing] if inspect.isfunction(thing) else [
        part for part in map(inspect.unwrap, (getattr(p, "__func__", p) for p in vars(thing).values()))
        if inspect.isfunction(part)]  # fmt: skip
    before = []
    for name in dict.fromkeys(name for function in functions for name in _names(function.__code__)):
        used = _plain(vars(module).get(name))
        if (inspect.isfunction(used) or inspect.isclass(used)) and used.__module__ == module.__name__:
            before += _sources(used, module, seen)
    return [*before, inspect.cleandoc("\n" + inspect.getsource(thing))]


def _names(code: CodeType) -> list[str]:
    """Global names that code uses, in functions inside it too."""
    inner = [name for part in code.co_consts if isinstance(part, CodeType) for name in _names(part)]
    return [*code.co_names, *inner]
