"""Timing contestants side by side: check every result first, then take turns (A B A B).

`handtuned bench NAME …` runs `tests/bench_<name>.py` of a checkout, each of which builds
on `compare` and `table`.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compare(
    contestants: dict[str, Callable[[], object]],
    check: Callable[[str, object], None] | None = None,
    rounds: int = 9,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Time callables in turn and return their seconds.

    Each is run once to warm up and its result handed to `check(name, result)`, which
    raises when it is wrong: nothing wrong is ever timed. Turns are interleaved, so
    that a slow spell of the machine falls on all alike.

    Args:
        contestants: name → function of no arguments.
        check: called with each name and its first result.
        rounds: timed turns for each.
        device: "cpu" or "cuda"; on a GPU the clock waits for the work to finish.

    Returns:
        name → {"median": s, "min": s, "max": s}.
    """
    where = torch.device(device)
    for name, run in contestants.items():
        result = run()
        if check is not None:
            check(name, result)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = _now(where)
            run()
            seconds[name].append(_now(where) - start)
    return {
        name: {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}
        for name, taken in seconds.items()
    }


def table(times: dict[str, dict[str, float]], ours: str) -> str:
    """The times as text, with each rival's median as a multiple of `ours` (above 1 means that ours is faster)."""
    width = max(map(len, times))
    lines = [f"{'':{width}}  median ms    min ms    max ms  ratio"]
    for name, t in times.items():
        ratio = t["median"] / times[ours]["median"]
        cells = "".join(f"{t[key] * 1e3:10.2f}" for key in ("median", "min", "max"))
        lines.append(f"{name:{width}} {cells} {ratio:6.2f}x")
    return "\n".join(lines)


def add_arguments(parser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: list them)")


def run(args) -> int:
    scripts = Path(__file__).resolve().parents[1] / "tests"
    found = {path.stem.removeprefix("bench_"): path for path in sorted(scripts.glob("bench_*.py"))}
    if not found:
        raise ValueError("the benchmarks are in the repository's tests/ folder; run this from a checkout")
    unknown = [name for name in args.names if name not in found]
    if unknown:
        raise ValueError(f"no benchmark {unknown[0]!r}; there are: {', '.join(found)}")
    if not args.names:
        print("benchmarks:", ", ".join(found))
    return max((subprocess.run([sys.executable, str(found[name])]).returncode for name in args.names), default=0)
