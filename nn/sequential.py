"""A stack of layers with checkpoints between them, where `checkpoint_plan` or the caller puts them."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .checkpoint import checkpoint
from .checkpoint_plan import Plan, Segment, plan_checkpoints, split_evenly

_plans: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # first layer → circumstances → Plan


def _remembered_plan(functions: Sequence[Callable], x, budget: int | None) -> Plan:
    """The plan for these layers in these circumstances, measured once."""
    described = [
        (tuple(t.shape), t.dtype, t.device, t.requires_grad) if isinstance(t, torch.Tensor) else t
        for t in tree_leaves(x)
    ]
    modules = [f for f in functions if isinstance(f, nn.Module)]
    learning = [(p.requires_grad, p.grad is None) for m in modules for p in m.parameters()]
    circumstances = repr((list(map(id, functions)), described, learning, [m.training for m in modules], budget))
    try:
        plans = _plans.setdefault(getattr(functions[0], "__self__", functions[0]), {})
    except TypeError:  # a callable that cannot be referred to weakly
        plans = {}
    if circumstances not in plans:
        plans[circumstances] = plan_checkpoints(functions, x, budget)
    return plans[circumstances]


def checkpoint_sequential(functions, x, segments: str | int | Plan = "sqrt", budget: int | None = None):
    """Run layers one after the other, with checkpoints between them.

    Args:
        functions: an `nn.Sequential` or a sequence of callables of one argument.
        x: the first one's argument.
        segments: "sqrt" (about √n equal segments), a number of equal segments, "auto" (boundaries
            from measured bytes, so that the peak is least), or a `Plan` from `plan_checkpoints`. With
            equal segments the last one is kept, not recomputed, as backward starts there. "auto"
            measures when it first meets these layers with inputs of this shape, and remembers.
        budget: with "auto": recompute as little as possible within this many bytes, counted above
            what is there before the layers run.

    Returns:
        What the last function returns. Gradients are bit-equal to those of a plain run.

    Raises:
        ValueError: no functions, more segments than functions, a budget below the least possible.
        TypeError: `segments` is of another type.
    """
    functions = list(functions)
    if not functions:
        raise ValueError("functions must hold at least one function, got none")
    if budget is not None and segments != "auto":
        raise ValueError(f'budget needs segments="auto", got segments={segments!r}')
    if not torch.is_grad_enabled():
        parts = (Segment(0, len(functions), recompute=False),)
    elif isinstance(segments, Plan):
        parts = segments.segments
        if parts[-1].stop != len(functions):
            raise ValueError(f"segments is a plan for {parts[-1].stop} functions, got {len(functions)} functions")
    elif segments == "auto":
        parts = _remembered_plan(functions, x, budget).segments
    elif segments == "sqrt":
        parts = split_evenly(len(functions), round(len(functions) ** 0.5))
    elif isinstance(segments, str):
        raise ValueError(f'segments must be "sqrt", "auto", a number or a Plan, got {segments!r}')
    elif not isinstance(segments, int) or isinstance(segments, bool):
        raise TypeError(f'segments must be "sqrt", "auto", a number or a Plan, got {type(segments).__name__}')
    elif not 1 <= segments <= len(functions):
        raise ValueError(f"segments must be from 1 to {len(functions)}, the number of functions, got {segments}")
    else:
        parts = split_evenly(len(functions), segments)
    for part in parts:
        run = partial(_chain, functions[part.start : part.stop])
        x = checkpoint(run, x) if part.recompute else run(x)
    return x


def _chain(functions: Sequence[Callable], x):
    for function in functions:
        x = function(x)
    return x
