"""Lesson 12: choosing within a budget."""

import math

from ..exercise import Exercise, WrongAnswer, expect, unchanged
from . import e12_capstone


def _pareto(points):
    return sorted(
        p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and (q[0] < p[0] or q[1] < p[1]) for q in points)
    )


def _check_pareto(candidate):
    cases = {
        "a staircase with one point behind it": [(4, 1.0), (1, 4.0), (2, 2.0), (3, 3.0)],
        "two of equal bytes": [(1, 4.0), (2, 2.0), (2, 3.0), (5, 1.0)],
        "two of equal loss": [(1, 4.0), (2, 2.0), (3, 2.0)],
        "a long front": [(i, 50.0 - i * i + 9 * (i % 3 == 2)) for i in (3, 1, 7, 2, 9, 5, 4, 8, 6, 10, 11, 12)],
        "a single point": [(7, 7.0)],
        "none": [],
    }
    for what, points in cases.items():
        wanted = _pareto(points)
        with unchanged(points=points):
            got = candidate(points)
        pairs = isinstance(got, (list, tuple)) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in got)
        expect(pairs, f"{what}: return a list of points, (bytes, loss), got {got!r}.")
        if [tuple(p) for p in got] != wanted:
            told = "A point goes if another has no more bytes and no more loss, and less of one of them."
            if len(got) == len(wanted) and all(p in map(tuple, got) for p in wanted):
                told = "These are its points: sort them by bytes."
            raise WrongAnswer(f"{what}: of {points} the front is {wanted}, got {got}. {told}")
    return f"tried {len(cases)} sets: {', '.join(cases)}"


def _choose(budget, runs):
    fitting = {name: loss for name, (loss, moments) in runs.items() if max(moments.values()) <= budget}
    return min(fitting, key=fitting.get) if fitting else None


def _check_choose(candidate):
    runs = {
        "LoRA": (0.20, {"loss": 20, "backward": 18, "optimizer step": 15}),
        "QLoRA": (0.30, {"loss": 11, "backward": 12, "optimizer step": 5}),
        "full": (0.10, {"loss": 60, "backward": 70, "optimizer step": 112}),
    }
    for budget, why in (
        (200, "everything fits"),
        (112, "a peak equal to the budget fits"),
        (111, "full fits while the loss is taken (60), but not in its optimizer step (112)"),
        (24, "LoRA has 53 bytes over its moments, but never more than 20 at once"),
        (15, "LoRA fits in its last moment, but not in its fullest"),
        (5, "nothing fits: None"),
    ):
        try:
            with unchanged(runs=runs):
                wanted, got = _choose(budget, runs), candidate(budget, runs)
        except ValueError as error:
            raise WrongAnswer(f"budget {budget}: {why}; got ValueError: {error}") from None
        if got != wanted:
            raise WrongAnswer(f"budget {budget}: {why}; expected {wanted!r}, got {got!r}")
    return "tried 6 budgets, from more than enough to nothing fits"


def _halving(settings, evaluate, steps):
    alive = list(settings)
    while len(alive) > 1:
        losses = {s: evaluate(s, steps) for s in alive}
        alive = sorted(alive, key=losses.get)[: math.ceil(len(alive) / 2)]
        steps *= 2
    return alive[0]


def _run_to_the_end(settings, evaluate, steps):
    return min(settings, key=lambda s: evaluate(s, steps))


def _never_doubled(settings, evaluate, steps):
    alive = list(settings)
    while len(alive) > 1:
        losses = {s: evaluate(s, steps) for s in alive}
        alive = sorted(alive, key=losses.get)[: math.ceil(len(alive) / 2)]
    return alive[0]


def _worse_half(settings, evaluate, steps):
    alive = list(settings)
    while len(alive) > 1:
        losses = {s: evaluate(s, steps) for s in alive}
        alive = sorted(alive, key=losses.get, reverse=True)[: math.ceil(len(alive) / 2)]
        steps *= 2
    return alive[0]


def _check_halving(candidate):
    # Setting s reaches the loss s in the end; fast starters lead at first.
    head_start = {0.1: 3.0, 0.2: 0.4, 0.3: 0.2, 0.4: 9.0, 0.5: 0.1, 0.6: 9.0, 0.7: 9.0}
    called = []

    def evaluate(setting, steps):
        called.append((setting, steps))
        return setting + head_start[setting] / steps

    settings = (0.4, 0.7, 0.2, 0.6, 0.1, 0.3, 0.5)
    expected_calls = []

    def record(setting, steps):
        expected_calls.append((setting, steps))
        return setting + head_start[setting] / steps

    wanted = _halving(settings, record, 10)
    given = list(settings)
    with unchanged(settings=given):
        got = candidate(given, evaluate, 10)
    rounds = [sum(1 for _, steps in expected_calls if steps == s) for s in (10, 20, 40)]
    made = [sum(1 for _, steps in called if steps == s) for s in (10, 20, 40)]
    if made != rounds:
        raise WrongAnswer(
            f"7 settings: {rounds} evaluations were expected with 10, 20 and 40 steps (7, then 4, then 2), got {made}"
        )
    if got in (0.4, 0.6, 0.7):
        raise WrongAnswer(f"the setting that is left, {got}, has one of the largest losses: keep the better half")
    if got != wanted:
        raise WrongAnswer(f"the setting left must be {wanted}, which has the least loss of the last round, got {got}")
    return "tried 7 settings whose fast starters are not the best: 7, 4, then 2 evaluations, with steps doubled"


EXERCISES = {
    "12.1": Exercise(
        title="The Pareto front",
        specification="pareto(points) → the (bytes, loss) that no other point beats, sorted by bytes",
        checker=_check_pareto,
        solution=_pareto,
        wrong={
            "larger is better": (
                lambda points: sorted(
                    p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)
                ),
                "a staircase",
            ),
            "beaten in both only": (
                lambda points: sorted(p for p in points if not any(q[0] < p[0] and q[1] < p[1] for q in points)),
                "two of equal bytes",
            ),
            "the best alone": (lambda points: sorted(points, key=lambda p: p[1])[:1], "a staircase"),
        },
        hints=(
            "For each point ask: is there another with bytes ≤ and loss ≤, and < in one of them?",
            "sorted() of tuples sorts by the first entry.",
        ),
    ),
    "12.2": Exercise(
        title="The best that fits",
        specification="choose(budget, runs) → name of the run with the least loss that fits the budget, or None",
        checker=_check_choose,
        solution=_choose,
        wrong={
            "moments added up": (
                lambda budget, runs: min(
                    (n for n, (_, m) in runs.items() if sum(m.values()) <= budget),
                    key=lambda n: runs[n][0],
                    default=None,
                ),
                "expected 'full'",
            ),
            "last moment only": (
                lambda budget, runs: min(
                    (n for n, (_, m) in runs.items() if list(m.values())[-1] <= budget),
                    key=lambda n: runs[n][0],
                    default=None,
                ),
                "not in its fullest",
            ),
            "first moment only": (
                lambda budget, runs: min(
                    (n for n, (_, m) in runs.items() if next(iter(m.values())) <= budget),
                    key=lambda n: runs[n][0],
                    default=None,
                ),
                "not in its optimizer step",
            ),
        },
        hints=(
            "A run fits if its fullest moment fits.",
            "min(…, default=None), or an if, for the case that nothing fits.",
        ),
    ),
    "12.3": Exercise(
        title="Successive halving",
        specification="halving(settings, evaluate, steps): keep the better half (rounded up), double the steps, repeat",
        checker=_check_halving,
        solution=_halving,
        wrong={
            "one round": (_run_to_the_end, "7, then 4, then 2"),
            "steps never doubled": (_never_doubled, "7, then 4, then 2"),
            "the worse half": (_worse_half, "keep the better half"),
        },
        hints=(
            "while more than one is left: evaluate each once, sort by loss, cut, double.",
            "math.ceil(len(alive) / 2) are kept.",
        ),
    ),
    **e12_capstone.EXERCISES,
}
