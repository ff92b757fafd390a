"""A stack of layers with checkpoints between them, and where to put those.

Cut n layers into segments; a checkpointed segment keeps its input (the boundary) and recomputes its inside when
backward comes to it. With equal layers and k segments

    peak = k·boundary + (n/k)·inside        FLOPs: forward once more

The famous √n is the best k only where inside = boundary. In a transformer the inside of a layer is tens of times its
boundary, and one segment per layer wins: with 32 layers and inside/boundary = 57, no checkpoint costs 3648, six
segments 696, a checkpoint in every layer 178 (in bytes per token and hidden unit at 16 bits).

Real stacks are uneven, so `segments="auto"` measures each layer (bytes kept, bytes at the worst moment of forward and
of backward, FLOPs) and searches. Bytes kept before a segment add to its own worst moment, so for a given limit it is
best to arrive at a layer with as few bytes kept as possible; a table over layers finds that in n² steps, and bisection
finds the least limit. Among the plans that keep it, the one that recomputes least is taken.

Source: Chen et al. (2016), section 4.1, for the segments; the search is ours.
"""

import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .checkpoint import checkpoint
from .live_memory import LayerCost, measure_layers

STATES_KEPT = 64  # bounds the search under a budget; the least-memory plan is always among them


@dataclass(frozen=True)
class Segment:
    """Layers `start` up to, not including, `stop`; recomputed in backward or kept."""

    start: int
    stop: int
    recompute: bool


@dataclass(frozen=True)
class Plan:
    """Segments in order, the predicted peak in bytes above what was there before, the fraction of forward repeated."""

    segments: tuple[Segment, ...]
    peak: int
    recomputed: float

    def __str__(self):
        parts = [f"{s.start}–{s.stop - 1}" if s.recompute else f"[{s.start}–{s.stop - 1} kept]" for s in self.segments]
        return f"{' '.join(parts)}: peak {self.peak:,} bytes, {self.recomputed:.0%} of forward repeated"


def split_evenly(layers: int, segments: int) -> tuple[Segment, ...]:
    """`segments` parts whose lengths differ by at most one. The last is kept: backward starts with it anyway."""
    edges = [layers * i // segments for i in range(segments + 1)]
    return tuple(Segment(a, b, recompute=b < layers) for a, b in pairwise(edges))


def checkpoint_sequential(functions, x, segments: str | int | Plan = "sqrt", budget: int | None = None, **keywords):
    """Run layers one after the other, with checkpoints between them.

    Args:
        functions: an `nn.Sequential` or a sequence of callables of one argument.
        x: the first one's argument.
        segments: "sqrt" (about √n equal segments), a number of equal segments, "auto" (boundaries from measured bytes,
            so that the peak is least), or a `Plan` from `plan_checkpoints`. Of equal segments the last is kept, as
            backward starts there. "auto" measures when it first meets these layers and shapes, and remembers.
        budget: with "auto": recompute as little as possible within this many bytes above what is there before.
        keywords: of `checkpoint`. torch's order of arguments, (functions, 2, x), is understood too.

    Returns what the last function returns. Gradients are bit-equal to those of a plain run.
    ValueError: no functions, more segments than functions, a budget below the least possible.
    TypeError: `segments` is of another type.
    """
    functions = list(functions)
    if type(x) is int and isinstance(segments, torch.Tensor):
        x, segments = segments, x
    if not functions:
        raise ValueError("functions must hold at least one function, got none")
    if budget is not None and segments != "auto":
        raise ValueError(f'budget needs segments="auto", got segments={segments!r}')
    if isinstance(segments, Plan):
        parts = segments.segments
        if parts[-1].stop != len(functions):
            raise ValueError(f"segments is a plan for {parts[-1].stop} functions, got {len(functions)} functions")
    elif segments == "auto":
        measured = torch.is_grad_enabled()
        parts = _remembered_plan(functions, x, budget).segments if measured else split_evenly(len(functions), 1)
    elif segments == "sqrt":
        parts = split_evenly(len(functions), round(len(functions) ** 0.5))
    elif type(segments) is not int:
        kind, got = (ValueError, repr(segments)) if isinstance(segments, str) else (TypeError, type(segments).__name__)
        raise kind(f'segments must be "sqrt", "auto", a number or a Plan, got {got}')
    elif not 1 <= segments <= len(functions):
        raise ValueError(f"segments must be from 1 to {len(functions)}, the number of functions, got {segments}")
    else:
        parts = split_evenly(len(functions), segments)
    for part in parts:
        run = partial(reduce, lambda y, function: function(y), functions[part.start : part.stop])
        x = checkpoint(run, x, **keywords) if part.recompute else run(x)
    return x


def choose_segments(costs: Sequence[LayerCost], budget: int | None = None) -> Plan:
    """The plan with the least peak or, given a budget in bytes, the one within it that recomputes least. ValueError: no
    plan stays within the budget; names the least possible."""
    worst = _worst_moments(costs)
    everything = sum(c.kept for c in costs) + max(worst.values())
    limit = bisect_left(range(everything), True, key=lambda limit: bool(_arrivals(costs, worst, limit, states=1)))
    if budget is not None:
        if budget < limit:
            raise ValueError(f"budget is {budget:,} bytes, but no choice of segments needs fewer than {limit:,}")
        limit = budget
    _, repeated, peak, segments = min(_arrivals(costs, worst, limit, STATES_KEPT), key=lambda a: (a[1], a[2]))
    return Plan(_joined(segments), peak, repeated / max(1, sum(c.work for c in costs)))


def _worst_moments(costs: Sequence[LayerCost]) -> dict[Segment, int]:
    """Segment → most bytes that it adds to those kept before it. Kept segments are of one layer here."""
    n = len(costs)
    gradients_after = [sum(c.new_gradients for c in costs[i + 1 :]) for i in range(n)]
    worst = {}
    for start in range(n):
        cost = costs[start]
        backward = cost.kept + cost.output + cost.backward_peak + gradients_after[start]
        worst[Segment(start, start + 1, recompute=False)] = max(backward, cost.forward_peak)
        inside = forward = backward = 0
        for i in range(start, n):
            cost = costs[i]
            forward = max(forward, inside + cost.forward_peak)
            inside += cost.kept
            backward = max(backward, inside + cost.output + cost.recomputed_backward_peak + gradients_after[i])
            # While the segment is recomputed, the gradient of its output waits.
            worst[Segment(start, i + 1, recompute=True)] = max(backward, forward + cost.output + gradients_after[i])
    return worst


def _steps(costs: Sequence[LayerCost], stop: int):
    """The segments that can end before layer `stop`: (segment, bytes it leaves, work it repeats)."""
    last = costs[stop - 1]
    yield Segment(stop - 1, stop, recompute=False), last.kept, 0
    work = last.stopped_work - last.work
    for start in range(stop - 1, -1, -1):
        work += costs[start].work
        if not costs[start].in_place:
            yield Segment(start, stop, recompute=True), last.output, work


def _arrivals(costs: Sequence[LayerCost], worst: dict, limit: int, states: int) -> list[tuple]:
    """(bytes kept, work repeated, peak so far, segments) of the ways through all layers that stay within `limit`. At
    each layer those that no other beats in both count, of which `states` are followed, that of fewest bytes too."""
    arrivals = [[(0, 0, 0, ())]]
    for stop in range(1, len(costs) + 1):
        found = [(kept + left, repeated + work, max(peak, kept + worst[segment]), (*segments, segment))
                 for segment, left, work in _steps(costs, stop)
                 for kept, repeated, peak, segments in arrivals[segment.start] if kept + worst[segment] <= limit]
        best, least = [], float("inf")
        for arrival in sorted(found, key=lambda a: a[:3]):
            if arrival[1] < least:
                least = arrival[1]
                best.append(arrival)
        arrivals.append(best[:: max(1, -(-len(best) // states))])
    return arrivals[-1]


def _joined(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbouring kept layers as one segment."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and not segment.recompute and not joined[-1].recompute:
            segment = Segment(joined.pop().start, segment.stop, recompute=False)
        joined.append(segment)
    return tuple(joined)


def plan_checkpoints(functions: Sequence[Callable], x, budget: int | None = None) -> Plan:
    """Measure the layers on `x` and choose; costs about one forward and backward pass, one layer at a time."""
    return choose_segments(measure_layers(functions, x), budget)


_plans: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # first layer → circumstances → Plan


def _remembered_plan(functions: Sequence[Callable], x, budget: int | None) -> Plan:
    """The plan for these layers in these circumstances, measured once."""
    described = [(t.shape, t.dtype, t.device, t.requires_grad) if isinstance(t, torch.Tensor) else t
                 for t in tree_leaves(x)]  # fmt: skip
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
