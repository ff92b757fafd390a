"""checkpoint_sequential: exact gradients, and the fewest bytes where it says so (bytes are counted, not predicted)."""

import importlib.util
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from handtuned.nn import checkpoint_plan
from handtuned.nn.checkpoint_plan import (
    LayerCost,
    Plan,
    Segment,
    checkpoint_sequential,
    choose_segments,
    plan_checkpoints,
    split_evenly,
)
from handtuned.nn.live_memory import LiveMemory
from torch import nn


class Wide(nn.Module):
    """A residual layer whose inside can be many times its boundary."""

    def __init__(self, width, hidden, depth, dropout=0.0):
        super().__init__()
        self.up, self.down, self.depth = nn.Linear(width, hidden), nn.Linear(hidden, width), depth
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        h = self.up(x)
        for _ in range(self.depth):
            h = self.dropout(h.sin())
        return x + self.down(h)


def uneven_stack(seed):
    chance = random.Random(seed)
    width = chance.choice([4, 16])

    def layer():
        kind = chance.random()
        if kind < 0.7:
            return Wide(width, chance.choice([4, 16, 64, 256]), chance.choice([0, 1, 3, 8]), chance.choice([0, 0.1]))
        if kind < 0.85:
            return nn.Linear(width, width)
        return chance.choice([nn.GELU(), nn.LayerNorm(width), nn.ReLU(), nn.Identity()])

    layers = [nn.Linear(width, width), *(layer() for _ in range(chance.randint(1, 7)))]
    return layers, torch.randn(chance.choice([8, 64]), width)


def counted_peak(layers, x, **how):
    """Bytes that a forward and a backward pass add at their worst moment, without the result itself."""
    nn.Sequential(*layers).zero_grad()
    with LiveMemory(scan=False) as memory:
        y = checkpoint_sequential(layers, x, **how)
        y.backward(torch.ones_like(y))
    return memory.peak_added


@pytest.mark.parametrize("seed", range(10))
def test_auto_is_never_worse_than_any_even_choice(seed):
    layers, x = uneven_stack(seed)
    even = {k: counted_peak(layers, x, segments=k) for k in range(1, len(layers) + 1)}
    auto = counted_peak(layers, x, segments="auto")
    assert auto <= min(even.values()), even
    assert auto <= counted_peak(layers, x, segments="sqrt")


@pytest.mark.parametrize("seed", range(5))
def test_the_predicted_peak_is_the_counted_one(seed):
    layers, x = uneven_stack(seed)
    plan = plan_checkpoints(layers, x)
    counted = counted_peak(layers, x, segments=plan)
    result = nn.Sequential(*layers)(x).nbytes
    assert counted - result <= plan.peak <= counted


def test_auto_wins_where_even_segments_lose():
    """Two fat layers among thin ones: the fat ones want to be alone, the thin ones together."""
    layers = [nn.Linear(64, 64), *(nn.GELU() for _ in range(15))]
    layers[2], layers[3] = Wide(64, 64, 6), Wide(64, 64, 6)
    x = torch.randn(256, 64)
    auto = counted_peak(layers, x, segments="auto")
    assert auto < 0.8 * counted_peak(layers, x, segments="sqrt")
    assert auto < 0.8 * counted_peak(layers, x, segments=16) < counted_peak(layers, x, segments=1)


def test_no_recomputation_starts_with_a_layer_that_overwrites_its_input():
    layers = [Wide(8, 32, 4), nn.ReLU(inplace=True), Wide(8, 32, 4), nn.ReLU(inplace=True), Wide(8, 32, 4)]
    x = torch.randn(64, 8, requires_grad=True)
    plan = plan_checkpoints(layers, x)
    assert any(s.recompute for s in plan.segments)
    assert not any(s.recompute and s.start in (1, 3) for s in plan.segments)
    plain = torch.autograd.grad(nn.Sequential(*layers)(x).square().sum(), x)[0]
    assert torch.equal(torch.autograd.grad(checkpoint_sequential(layers, x, plan).square().sum(), x)[0], plain)


def brute_force(costs):
    """Peak of every way to cut and keep, by the definition: what is there at each moment."""
    n = len(costs)
    best = {}
    for cuts in range(2 ** (n - 1)):
        edges = [0, *(i + 1 for i in range(n - 1) if cuts >> i & 1), n]
        parts = list(pairwise(edges))
        for flags in range(2 ** len(parts)):
            alive = peak = work = 0
            for index, (start, stop) in enumerate(parts):
                recompute = flags >> index & 1
                after = [sum(c.new_gradients for c in costs[i + 1 :]) for i in range(n)]
                inside = 0
                for i in range(start, stop):
                    waiting = costs[stop - 1].output + after[stop - 1] if recompute else 0
                    peak = max(peak, alive + inside + costs[i].forward_peak + waiting)
                    inside += costs[i].kept
                    own = costs[i].recomputed_backward_peak if recompute else costs[i].backward_peak
                    peak = max(peak, alive + inside + costs[i].output + own + after[i])
                    work += (costs[i].stopped_work if i == stop - 1 else costs[i].work) * recompute
                alive += costs[stop - 1].output if recompute else inside
            best[peak] = min(best.get(peak, work), work)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_search_finds_what_trying_everything_finds(seed):
    chance = random.Random(seed)
    costs = []
    for _ in range(chance.randint(1, 6)):
        output, inside = chance.randint(1, 9), chance.randint(0, 60)
        backward = chance.randint(0, 20)
        grads = chance.choice([0, chance.randint(0, 30)])
        work = chance.randint(1, 50)
        costs.append(
            LayerCost(output + inside, output + inside + chance.randint(0, 9), backward + 2, backward, output, grads,
                      work, chance.randint(0, work))
        )  # fmt: skip
    everything = brute_force(costs)
    total = sum(c.work for c in costs)
    least = min(everything)
    plan = choose_segments(costs)
    assert plan.peak == least
    assert plan.recomputed * total == pytest.approx(everything[least])
    for budget in sorted(everything)[:: max(1, len(everything) // 6)]:
        plan = choose_segments(costs, budget)
        assert plan.peak <= budget
        assert plan.recomputed * total == pytest.approx(min(w for peak, w in everything.items() if peak <= budget))
    with pytest.raises(ValueError, match=f"no choice of segments needs fewer than {least:,}"):
        choose_segments(costs, least - 1)


def test_the_documents_arithmetic():
    """32 layers, inside 57 boundaries: 3648 without, 178 with every layer, 696 with six segments."""
    boundary, inside, n = 2, 114, 32
    layer = LayerCost(inside, inside, 0, 0, boundary, 0, 1, 1)

    def peak(parts):
        alive = worst = 0
        for part in parts:
            here = inside * (part.stop - part.start)
            worst = max(worst, alive + boundary + here)
            alive += boundary if part.recompute else here
        return worst

    def checkpointed(k):
        return [Segment(s.start, s.stop, recompute=True) for s in split_evenly(n, k)]

    assert peak([Segment(0, n, recompute=False)]) - boundary == 3648
    assert peak(checkpointed(32)) == 178
    assert peak(checkpointed(6)) == 696
    plan = choose_segments([layer] * n)
    assert plan.peak <= peak(checkpointed(32))


def test_a_budget_buys_back_time():
    layers = [Wide(16, 64, 2) for _ in range(8)]
    x = torch.randn(128, 16)
    least, most = plan_checkpoints(layers, x), plan_checkpoints(layers, x, budget=10**9)
    assert most.recomputed == 0 and [s.recompute for s in most.segments] == [False]
    budget = (least.peak + most.peak) // 2
    some = plan_checkpoints(layers, x, budget)
    assert 0 < some.recomputed < least.recomputed
    assert counted_peak(layers, x, segments="auto", budget=budget) <= budget
    with pytest.raises(ValueError, match=r"budget is 100 bytes, but no choice of segments needs fewer than"):
        checkpoint_sequential(layers, x, segments="auto", budget=100)


@pytest.mark.parametrize("segments", ["sqrt", "auto", 1, 2, 3, 7])
def test_gradients_are_bit_equal_to_a_plain_run(segments):
    net = nn.Sequential(*(Wide(8, 32, 2, dropout=0.3) for _ in range(7)))
    x = torch.randn(16, 8, requires_grad=True)
    if segments == "auto":
        plan_checkpoints(net, x)  # must not move the random generator
    torch.manual_seed(3)
    plain = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    torch.manual_seed(3)
    ours = torch.autograd.grad(checkpoint_sequential(net, x, segments).square().sum(), [x, *net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("segments", [1, 2, 3, 4])
def test_same_as_torchs_sequential(segments):
    net, x = nn.Sequential(*(Wide(8, 32, 1) for _ in range(8))), torch.randn(4, 8, requires_grad=True)
    theirs = torch.utils.checkpoint.checkpoint_sequential(net, segments, x, use_reentrant=False)
    ours = checkpoint_sequential(net, x, segments)
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(theirs.sum(), x)[0])


def test_measuring_leaves_no_trace_and_happens_once(monkeypatch):
    layers = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    net, x = nn.Sequential(*layers), torch.randn(16, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    plan_checkpoints(net, x)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())

    measured = []
    monkeypatch.setattr(checkpoint_plan, "plan_checkpoints", lambda *a: measured.append(a) or plan_checkpoints(*a))
    for rows in (16, 16, 32, 16):
        checkpoint_sequential(net, torch.randn(rows, 8), "auto")
    assert len(measured) == 2, "once for each shape"


def test_layers_may_pass_tuples_along_and_need_not_be_modules():
    layers = [lambda p: (p[0].sin(), p[1]), lambda p: (p[0] * p[1].exp(), p[1].cos()), lambda p: (p[0] + p[1]).exp()]
    x, y = (torch.randn(6, requires_grad=True) for _ in range(2))
    plain = torch.autograd.grad(layers[2](layers[1](layers[0]((x, y)))).sum(), [x, y])
    for segments in ("sqrt", "auto", 3):
        ours = torch.autograd.grad(checkpoint_sequential(layers, (x, y), segments).sum(), [x, y])
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_without_gradients_it_only_runs():
    calls = []
    layers = [lambda x: (calls.append(1), x + 1)[1]] * 4
    with torch.no_grad():
        assert torch.equal(checkpoint_sequential(layers, torch.zeros(2), "auto"), torch.full((2,), 4.0))
    assert len(calls) == 4


@pytest.mark.parametrize("layers,k", [(32, 6), (7, 7), (10, 3), (1, 1)])
def test_even_segments_cover_all_and_differ_by_at_most_one(layers, k):
    parts = split_evenly(layers, k)
    sizes = [p.stop - p.start for p in parts]
    assert len(parts) == k and sum(sizes) == layers and max(sizes) - min(sizes) <= 1
    assert [p.recompute for p in parts] == [True] * (k - 1) + [False]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"segments": 0}, ValueError, "segments must be from 1 to 3"),
        ({"segments": 4}, ValueError, "segments must be from 1 to 3"),
        ({"segments": "best"}, ValueError, "'best'"),
        ({"segments": 1.5}, TypeError, "float"),
        ({"segments": True}, TypeError, "bool"),
        ({"segments": 2, "budget": 100}, ValueError, 'budget needs segments="auto"'),
        ({"segments": Plan((Segment(0, 2, False),), 1, 0.0)}, ValueError, "a plan for 2 functions, got 3"),
    ],
    ids=lambda v: str(v)[:30],
)
@pytest.mark.parametrize("learning", [True, False])
def test_bad_arguments_are_named(how, error, message, learning):
    with pytest.raises(error, match=message), torch.set_grad_enabled(learning):
        checkpoint_sequential([torch.sin] * 3, torch.randn(2, requires_grad=True), **how)


def test_no_functions():
    with pytest.raises(ValueError, match="at least one function"):
        checkpoint_sequential([], torch.randn(2))


def cost_benchmark():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "checkpoint_cost.py"
    spec = importlib.util.spec_from_file_location("checkpoint_cost", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


def test_the_cost_table_needs_no_values():
    benchmark = cost_benchmark()
    small = replace(benchmark.SMALL, layers=3)
    costs = benchmark.compare(small, 2, 64)
    assert costs == benchmark.compare(small, 2, 64, real=True)
    assert costs["auto"][0] == min(count for count, _ in costs.values())
    assert costs["auto, within twice that"][1] <= costs["auto"][1]
    assert "| every layer |" in benchmark.table(small, 2, 64, costs)


@pytest.mark.slow
def test_smollm2_needs_4_times_fewer_bytes_for_4_thirds_of_the_flops():
    benchmark = cost_benchmark()
    costs = benchmark.compare(benchmark.PRESETS["smollm2"], 8, 512)
    (none_bytes, none_flops), (every_bytes, every_flops) = costs["none"], costs["every layer"]
    assert none_bytes >= 4 * every_bytes and every_flops <= none_flops * 4 / 3
    assert costs["auto"][0] == min(count for count, _ in costs.values())
    assert costs["auto, within twice that"][1] <= costs["auto"][1]
