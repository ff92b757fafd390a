"""Where to put the checkpoints in a stack of layers.

Cut n layers into segments; a checkpointed segment keeps its input (the boundary) and
recomputes its inside when backward comes to it. With equal layers and k segments

    peak = k·boundary + (n/k)·inside        FLOPs: forward once more

The famous √n is the best k only where inside = boundary. In a transformer the inside
of a layer is tens of times its boundary, and one segment a layer wins: with 32 layers
and inside/boundary = 57, no checkpoint costs 3648, six segments 696, a checkpoint in
every layer 178 (in bytes per token and hidden unit at 16 bits).

Real stacks are uneven, so `segments="auto"` measures each layer (bytes kept, bytes at
the worst moment of forward and of backward, FLOPs) and searches. Bytes kept before a
segment add to its own worst moment, so for a given limit it is always best to arrive
at a layer with as few bytes kept as possible; a table over layers finds that in n²
steps, and bisection finds the least limit. Among the plans that keep the limit, the
one that recomputes least is taken.

Source: Chen et al. (2016), section 4.1, for the segments; the search is ours.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from .live_memory import LiveMemory

STATES_KEPT = 64  # bounds the search under a budget; the least-memory plan is always among them


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs, measured.

    Attributes:
        kept: bytes alive after its forward pass: saved tensors and output.
        forward_peak: most bytes alive during its forward pass, saved tensors included.
        backward_peak: most bytes that its backward pass adds to `kept` and the gradient of the output.
        recomputed_backward_peak: the same where a checkpoint hands out the saved tensors: it lets go of
            each while the operation that asked for it still runs, autograd only afterwards.
        output: bytes of its output.
        new_gradients: bytes of parameter gradients that its backward pass leaves behind.
        work: FLOPs of its forward pass, plus one for each number that an operation writes.
        stopped_work: the same up to the last tensor that it saves: a recomputation that ends with it stops there.
        in_place: it overwrites its input, so no recomputation can start with it.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    recomputed_backward_peak: int
    output: int
    new_gradients: int
    work: int
    stopped_work: int
    in_place: bool = False


@dataclass(frozen=True)
class Segment:
    """Layers `start` up to, not including, `stop`; recomputed in backward or kept."""

    start: int
    stop: int
    recompute: bool


@dataclass(frozen=True)
class Plan:
    """Segments in order, the predicted peak in bytes above what was there before, and the share of forward repeated."""

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


def measure_layers(functions: Sequence[Callable], x) -> list[LayerCost]:
    """Run every layer once, forward and backward, alone, and count its bytes and FLOPs.

    Leaves no trace: gradients, buffers and random generators are as before.
    """
    device = next((t.device for t in tree_leaves(x) if isinstance(t, torch.Tensor)), torch.device("cpu"))
    costs = []
    with (
        LiveMemory(device.type, scan=False) as memory,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.enable_grad(),
    ):
        for function in functions:
            with _buffers_restored(function):
                cost, x = _measure_layer(function, x, memory)
            costs.append(cost)
    return costs


def _measure_layer(function: Callable, x, memory: LiveMemory):
    handed_out: dict[int, torch.Tensor] = {}

    def hand_in(tensor):
        handed_out[len(handed_out)] = tensor.detach()
        return len(handed_out) - 1

    with saved_tensors_hooks(hand_in, handed_out.pop):
        recomputed = _measure_pass(function, x, memory)[1]  # and its output is let go
    # FlopCounterMode holds on to tensors that have a gradient, so work is counted in a pass of its own.
    stopped_work = 0

    def note_work(tensor):
        nonlocal stopped_work
        stopped_work = flops.get_total_flops() + memory.elements - elements
        return tensor.detach()

    argument = tree_map(_cut_loose_copy if recomputed["in_place"] else _cut_loose, x)
    elements = memory.elements
    with saved_tensors_hooks(note_work, lambda tensor: tensor), FlopCounterMode(display=False) as flops:
        function(argument)
    work = flops.get_total_flops() + memory.elements - elements
    del argument
    y, kept = _measure_pass(function, x, memory)
    peak = recomputed["backward_peak"]
    return LayerCost(recomputed_backward_peak=peak, work=work, stopped_work=stopped_work, **kept), y


def _measure_pass(function: Callable, x, memory: LiveMemory):
    parameters = [p for p in function.parameters() if p.requires_grad] if isinstance(function, nn.Module) else []
    try:
        x = tree_map(_cut_loose, x)
        versions = _versions(x)
        start = memory.added
        memory.reset_peak()
        y = function(x)
        in_place = _versions(x) != versions
    except RuntimeError:  # a layer may not work in place on a leaf
        in_place = True
        x = tree_map(_cut_loose_copy, x)
        start = memory.added
        memory.reset_peak()
        y = function(x)
    kept, forward_peak = memory.added - start, memory.peak_added - start
    outputs = [t for t in tree_leaves(y) if isinstance(t, torch.Tensor) and t.requires_grad]
    gradients = [torch.ones_like(t) for t in outputs]
    begin = memory.added
    memory.reset_peak()
    wanted = [t for t in (*tree_leaves(x), *parameters) if isinstance(t, torch.Tensor) and t.requires_grad]
    if outputs and wanted:
        torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
    backward_peak = memory.peak_added - begin
    output = sum(t.nbytes for t in tree_leaves(y) if isinstance(t, torch.Tensor))
    new_gradients = sum(p.nbytes for p in parameters if p.grad is None)
    return y, {
        "kept": kept,
        "forward_peak": forward_peak,
        "backward_peak": backward_peak,
        "output": output,
        "new_gradients": new_gradients,
        "in_place": in_place,
    }


def _cut_loose(value):
    """Cut from the layers before, so that they can be freed. Where no gradient forbids changes in place, a copy."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_() if value.requires_grad else value.clone()


def _versions(value) -> list[int]:
    return [leaf._version for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _cut_loose_copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def _buffers_restored(function: Callable):
    buffers = list(function.buffers()) if isinstance(function, nn.Module) else []
    before = [b.clone() for b in buffers]
    yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def choose_segments(costs: Sequence[LayerCost], budget: int | None = None) -> Plan:
    """The plan with the least peak or, given a budget in bytes, the one within it that recomputes least.

    Args:
        costs: one entry a layer, from `measure_layers`.
        budget: bytes that the stack may add to what is there before it runs, in forward and backward.

    Raises:
        ValueError: no plan stays within the budget; names the least possible.
    """
    worst = _worst_moments(costs)
    limit = _least_limit(costs, worst)
    if budget is not None:
        if budget < limit:
            raise ValueError(f"budget is {budget:,} bytes, but no choice of segments needs fewer than {limit:,}")
        limit = budget
    return _least_work(costs, worst, limit)


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
    """Ways to end a segment before layer `stop`: (segment, bytes it leaves, work it repeats)."""
    last = costs[stop - 1]
    yield Segment(stop - 1, stop, recompute=False), last.kept, 0
    work = last.stopped_work - last.work
    for start in range(stop - 1, -1, -1):
        work += costs[start].work
        if costs[start].in_place:
            continue
        yield Segment(start, stop, recompute=True), last.output, work


def _least_limit(costs: Sequence[LayerCost], worst: dict) -> int:
    def fits(limit):
        fewest = [0]  # bytes kept on arrival at each layer
        for stop in range(1, len(costs) + 1):
            ways = (fewest[s.start] + left for s, left, _ in _steps(costs, stop) if fewest[s.start] + worst[s] <= limit)
            fewest.append(min(ways, default=float("inf")))
        return fewest[-1] < float("inf")

    low, high = 0, sum(c.kept for c in costs) + max(worst.values())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def _least_work(costs: Sequence[LayerCost], worst: dict, limit: int) -> Plan:
    """Within `limit`: for each layer the arrivals that no other beats in bytes kept, work and peak."""
    arrivals = [[(0, 0, 0, ())]]  # bytes kept, work repeated, peak so far, segments
    for stop in range(1, len(costs) + 1):
        found = [
            (kept + left, repeated + work, max(peak, kept + worst[segment]), (*segments, segment))
            for segment, left, work in _steps(costs, stop)
            for kept, repeated, peak, segments in arrivals[segment.start]
            if kept + worst[segment] <= limit
        ]
        best, least = [], float("inf")
        for arrival in sorted(found, key=lambda a: a[:3]):
            if arrival[1] < least:
                least = arrival[1]
                best.append(arrival)
        step = max(1, -(-len(best) // STATES_KEPT))
        arrivals.append(best[::step])
    _, repeated, peak, segments = min(arrivals[-1], key=lambda a: (a[1], a[2]))
    return Plan(_joined(segments), peak, repeated / max(1, sum(c.work for c in costs)))


def _joined(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbouring kept layers as one segment."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and not segment.recompute and not joined[-1].recompute:
            joined[-1] = Segment(joined[-1].start, segment.stop, recompute=False)
        else:
            joined.append(segment)
    return tuple(joined)


def plan_checkpoints(functions: Sequence[Callable], x, budget: int | None = None) -> Plan:
    """Measure the layers on `x` and choose: `choose_segments(measure_layers(functions, x), budget)`.

    Costs about one forward and backward pass, one layer at a time, and the memory of the largest layer.
    """
    return choose_segments(measure_layers(functions, x), budget)
