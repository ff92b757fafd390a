"""Several providers of one computation, each checked first and then timed in turns (A B A B).

A provider whose result is wrong is not timed. A slow spell of the machine falls on all alike. Each turn goes on to the
next of several random input sets, together larger than the last cache, so that operands come from memory as they do
in training (on zeros a GPU is faster than on data). A GPU's time is its own (events): it first sleeps while the host
queues the calls of a turn, so gaps between launches do not count; what the host needs is reported beside it.
"""

import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RIVALS = ("torch", "peft", "bitsandbytes", "liger", "unsloth")
OURS = "handtuned"
MODULES = {"liger": "liger_kernel"}  # a library's import name where it differs
MOST_SETS = 32
FIRST_ROUNDS = 3  # what every case gets before any gets more
TIME_UP = "the time was up"
SLEEP_CYCLES = 2e9  # of a GPU's clock in a second, roughly: only sets how long the device waits for the host


@dataclass
class Case:
    """One thing to compute, and who computes it."""

    name: str  # for people; with its sizes
    inputs: Callable[[], Any]  # makes one set of random inputs
    # Name → function of one input set that returns the callable to time. The first is ours. Another's name is made of
    # library names ("peft + bitsandbytes"); those not asked for or not installed are left out.
    providers: dict[str, Callable[[Any], Callable[[], object]]]
    check: Callable[[Any], Callable[[str, object], None]]  # of one input set: (name, result) → raises if it is wrong
    bytes: int = 0  # the least that any implementation must move, as with FLOPs; the floor follows from them
    flops: int = 0
    footprint: int = 0  # bytes of one input set (0: `bytes`), which decides how many sets make up more than the cache
    dtype: torch.dtype = torch.float32  # of products
    size: dict[str, int] = field(default_factory=dict)  # such as {"M": 512, "N": 4096, "K": 4096, "rank": 16}
    kernel: str = ""  # beginning of the name under which `handtuned xray` knows the kernel, if it is only one


def libraries(name: str) -> set[str]:
    """The libraries that a provider's name mentions: "peft + bitsandbytes" → {"peft", "bitsandbytes"}."""
    return set(RIVALS).intersection(name.replace("+", " ").split())


def not_installed(name: str) -> str:
    """Which library of a provider is missing, in words; nothing if all are there."""
    modules = sorted(MODULES.get(library, library) for library in libraries(name))
    return next((f"{module} is not installed" for module in modules if importlib.util.find_spec(module) is None), "")


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 32 MiB where it cannot be read."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size.rstrip("KM")) * units.get(size[-1:], 1) for size in sizes), default=0) or 32 * 2**20


def turn(device: torch.device, calls: list[Callable], lead: float = 0.0) -> tuple[float, float | None]:
    """Make some calls; gives (seconds of the device per call, seconds of the host per call).

    `lead`: seconds that the host will need for all, during which a GPU sleeps; 0: it does not. Only then is the
    host's time given, as a call that waits for the device would wait for its sleep too.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for call in calls:
            call()
        seconds = (time.perf_counter() - start) / len(calls)
        return seconds, seconds
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if lead:
        torch.cuda._sleep(int(min(1.5 * lead + 1e-4, 0.1) * SLEEP_CYCLES))
    begin.record()
    start = time.perf_counter()
    for call in calls:
        call()
    host = (time.perf_counter() - start) / len(calls)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / len(calls), None if lead else host


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and spread of turns: {"median", "p20", "p80", "min", "max"} in the unit given."""
    ordered = sorted(seconds)
    p20, p80 = (ordered[round(part * (len(ordered) - 1))] for part in (0.2, 0.8))
    return {"median": statistics.median(ordered), "p20": p20, "p80": p80, "min": ordered[0], "max": ordered[-1]}


def take_turns(runs: dict[str, list[Callable]], rounds: int, device: torch.device, share: float = math.inf,
               deadline: float = math.inf, least: float = 2e-3) -> dict[str, dict[str, float]]:  # fmt: skip
    """Time providers in turn, each going round its own list of callables (one for each input set).

    Args:
        runs: name → callables that do the same work on different memory, warm already.
        rounds: turns of each.
        share: moment of `time.monotonic()` from which on only the first `FIRST_ROUNDS` rounds are begun.
        deadline: moment from which on no round is begun.
        least: seconds that a turn lasts at least; short calls are repeated (at most 50 times).

    Returns name → `summary` of the seconds per call, and "host" (median seconds of the host), "rounds", "calls" (in a
    turn). Empty if the deadline was over before a first round.
    """
    endless = {name: itertools.cycle(calls) for name, calls in runs.items()}
    counts, queued = {}, {}
    for name, calls in endless.items():
        if time.monotonic() >= deadline:
            return {}
        turn(device, [next(calls)])
        queued[name] = statistics.median(turn(device, [next(calls)])[1] for _ in range(3))
        once, _ = turn(device, [next(calls)], queued[name])
        counts[name] = min(50, max(1, math.ceil(least / max(once, 1e-9))))
    turns = {name: [] for name in runs}
    for done in range(rounds):
        if time.monotonic() >= (deadline if done < FIRST_ROUNDS else min(share, deadline)):
            break
        for name, calls in endless.items():
            several = list(itertools.islice(calls, counts[name]))
            seconds, host = turn(device, several, queued[name] * len(several))
            turns[name].append((seconds, queued[name] if host is None else host))
    return {name: summary([seconds for seconds, _ in taken])
            | {"host": statistics.median(host for _, host in taken), "rounds": len(taken), "calls": counts[name]}
            for name, taken in turns.items() if taken}  # fmt: skip


def compare(providers: dict[str, Callable[[], object]], device: str = "cpu") -> dict[str, dict[str, float]]:
    """Time functions of no arguments in nine turns each, once all have run to warm up; gives `take_turns`' times."""
    for run in providers.values():
        run()
    return take_turns({name: [run] for name, run in providers.items()}, 9, torch.device(device))


def table(times: dict[str, dict[str, float]], ours: str) -> str:
    """`compare`'s times as text, with each median as a multiple of that of `ours` (above 1: ours is faster)."""
    width = max(map(len, times))
    lines = [f"{'':{width}}  median ms    min ms    max ms  ratio"]
    for name, t in times.items():
        cells = "".join(f"{t[key] * 1e3:10.2f}" for key in ("median", "min", "max"))
        lines.append(f"{name:{width}} {cells} {t['median'] / times[ours]['median']:6.2f}x")
    return "\n".join(lines)


def cut_short(record: dict) -> list[str]:
    """How many of the rounds asked for a record's providers had, in words, where it was not all; else nothing."""
    rounds = min((taken["rounds"] for taken in record["contestants"].values()), default=0)
    return [f"{rounds} of {record['asked']} rounds: {TIME_UP}"] if 0 < rounds < record.get("asked", 0) else []


def run_case(case: Case, device: torch.device, against: Iterable[str] = RIVALS, rounds: int = 15,
             share: float = math.inf, deadline: float = math.inf) -> dict:  # fmt: skip
    """Check and time one case whose inputs lie on `device`, against those of the `RIVALS` that are wanted.

    `rounds`, `share`, `deadline`: as for `take_turns`; past the deadline no provider is prepared or checked either.

    Returns a record, ready for JSON: the case's name, sizes and work; "sets" of inputs and whether they are larger than
    the cache ("cold"); "contestants", provider → times and "ratio" (its median over ours; above 1: ours is faster);
    "skipped", name → why (not installed, no time); "failed", name → the error or what was wrong with the result;
    "asked", the rounds asked for: a provider's "rounds" are fewer where the time was up.
    """
    footprint, cache = case.footprint or case.bytes, cache_bytes(device)
    count = min(MOST_SETS, max(1, math.ceil(2 * cache / max(footprint, 1))))
    skipped, failed, runs, times = {}, {}, {}, {}
    record = {"name": case.name, "size": case.size, "dtype": str(case.dtype).removeprefix("torch."),
              "kernel": case.kernel, "bytes": case.bytes, "flops": case.flops, "sets": count,
              "cold": count * footprint > cache, "asked": rounds, "contestants": times, "skipped": skipped,
              "failed": failed}  # fmt: skip
    try:
        sets = [case.inputs() for _ in range(count)]
        check = case.check(sets[0])
    except Exception as error:  # out of memory, for one; other cases may still run
        failed[OURS] = f"no inputs: {in_words(error)}"
        return record
    for name, make in case.providers.items():
        if not libraries(name) <= set(against):
            continue
        if why := not_installed(name) or (TIME_UP if time.monotonic() >= deadline else ""):
            skipped[name] = why
            continue
        try:  # all callables run once, and the first result is checked
            calls = [make(inputs) for inputs in sets]
            check(name, calls[0]())
            for call in calls[1:]:
                call()
            runs[name] = calls
        except Exception as error:  # whatever a library raises, the others are still timed
            failed[name] = in_words(error)
    if OURS in runs:
        try:
            times |= take_turns(runs, rounds, device, share, deadline)
            skipped |= {name: TIME_UP for name in runs if name not in times}
        except Exception as error:
            failed[OURS] = f"while timing: {in_words(error)}"
        for taken in times.values():
            taken["ratio"] = taken["median"] / times[OURS]["median"]
    return record


def in_words(error: Exception) -> str:
    """An exception in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
