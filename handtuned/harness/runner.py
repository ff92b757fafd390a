"""Running the benchmarks of a folder, `bench_<name>.py`, within a time limit.

A script offers `cases(device, quick)`, which yields `Case`s, or, where one process cannot hold all providers,
`measure(device, quick, rounds, against, share, deadline)`, which returns finished records.

How a time limit is kept: each case has its share of what is left, and what it does not need goes to the others. Within
its share it may have all its rounds, beyond it the first three, beyond the deadline none. Preparing and compiling count
like everything else. The benchmarks run in a process of their own (`in_a_process`), which is ended when it is still at
one of them and the minutes are nearly over, and replaced by another one when an error has lost the GPU or ended it.
"""

import importlib.util
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels import backend
from ..training.models import choose_device
from .ceilings import Ceilings
from .report import describe, nvidia_smi, versions
from .timing import OURS, TIME_UP, Case, run_case

# What a time limit may not cut off.
FIRST = ("nf4", "nf4_quantize", "qlora", "nf4_matmul", "lora", "lora_gemms", "finetune", "matmul", "adamw", "unscale")
MEASURE_WEIGHT = 8  # a `measure`'s share of the time, in cases

Event = tuple[str, object]


@dataclass(frozen=True)
class Settings:
    """What the process that runs benchmarks has to know: `names` in order, the `folder` of their scripts, what
    `handtuned bench` was told, and the moment of time.monotonic() (all processes share it) to begin nothing after.
    """

    names: list[str]
    folder: Path
    device: str
    against: list[str]
    quick: bool
    rounds: int
    seed: int
    deadline: float


def found_benchmarks(folder: Path) -> dict[str, Path]:
    """name → script, the most informative first.

    Raises:
        ValueError: there is none.
    """
    found = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if not found:
        raise ValueError(f"{folder} holds no bench_*.py: run this from a checkout, whose benchmarks/ folder has them, "
                         "or say where they are with --benchmarks DIR")  # fmt: skip
    return {name: found[name] for name in sorted(found, key=lambda name: (*FIRST, name).index(name))}


def load(path: Path):
    """A benchmark script as a module; scripts may import one another."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def untimed(name: str, skipped: str = "", failed: str = "") -> dict:
    """The record of something that has no times."""
    return {"name": name, "bytes": 0, "flops": 0, "contestants": {}, "skipped": {"all": skipped} if skipped else {},
            "failed": {OURS: failed} if failed else {}}  # fmt: skip


def run_benchmarks(settings: Settings) -> Iterator[Event]:
    """Run them one after another, in this process.

    Yields:
        ("machine", {"device", "versions"}), ("plan", (benchmark, case) pairs) and then for each of these
        ("records", (benchmark, records, ceilings measured so far)); on a GPU also ("clocks", (benchmark, nvidia-smi's
        answer)) at the end of a benchmark, and last ("lost", benchmark) if an error has made the GPU unusable.

    Raises:
        ValueError: an unknown device, or kernels are interpreted.
    """
    device = choose_device(settings.device)
    if backend(torch.empty(0, device=device)) == "interpreter":
        raise ValueError("TRITON_INTERPRET is set: this would time the interpreter; run it with TRITON_INTERPRET=0")
    torch.manual_seed(settings.seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ceilings = Ceilings(device, settings.quick)
    yield "machine", {"device": describe(device), "versions": versions()}
    jobs = _jobs(settings, device)
    yield "plan", [(name, _title(name, job)) for name, job in jobs]
    for at, (name, job) in enumerate(jobs):
        now = time.monotonic()
        weights = [MEASURE_WEIGHT if hasattr(later, "measure") else 1 for _, later in jobs[at:]]
        share = now + (settings.deadline - now) * weights[0] / sum(weights)
        yield "records", (name, _run_job(name, job, device, settings, ceilings, share), dict(ceilings.found))
        if device.type == "cuda":
            if _lost(device):
                yield "lost", name
                return
            torch.cuda.empty_cache()  # the next may be a process of its own
            if at + 1 == len(jobs) or jobs[at + 1][0] != name:
                yield "clocks", (name, nvidia_smi(device))


def _jobs(settings: Settings, device: torch.device) -> list[tuple[str, object]]:
    """(benchmark, what to run) in order: a `Case`, a module with `measure`, or the error that a script ended in."""
    jobs = []
    for name in settings.names:
        try:
            module = load(found_benchmarks(settings.folder)[name])
            found = [module] if hasattr(module, "measure") else module.cases(device, settings.quick)
            jobs += ((name, job) for job in found)
        except Exception as error:
            jobs.append((name, error))
    return jobs


def _title(name: str, job) -> str:
    return job.name if isinstance(job, Case) else name


def _run_job(name: str, job, device: torch.device, settings: Settings, ceilings: Ceilings, share: float) -> list[dict]:
    """The records of one job; what stops it becomes a record too."""
    if time.monotonic() >= settings.deadline:
        return [untimed(_title(name, job), skipped=TIME_UP)]
    try:
        if isinstance(job, Exception):
            raise job
        if not isinstance(job, Case):
            return job.measure(device, settings.quick, settings.rounds, settings.against, share, settings.deadline)
        record = run_case(job, device, settings.against, settings.rounds, share, settings.deadline)
        return [record if _lost(device) else ceilings.rate_records(record)]
    except Exception as error:
        return [untimed(_title(name, job), failed=f"{type(error).__name__}: {error}")]


def _lost(device: torch.device) -> bool:
    """Whether an error has made the GPU unusable for the rest of this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def in_a_process(settings: Settings, stop: float) -> Iterator[Event]:
    """The events of `run_benchmarks` in a process of its own, which can be ended whatever it is at.

    Yields:
        besides ("time up", None) if it was still at work at the moment `stop`, ("died", exit code) if it ended early.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA, or torch's threads
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_events, args=(settings, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(None if stop == math.inf else max(0.0, stop - time.monotonic())):
            kind, found = receiver.recv()
            if kind == "refused":
                raise ValueError(found)
            yield kind, found
        yield "time up", None
    except EOFError:
        process.join()
        if process.exitcode:
            yield "died", process.exitcode
    finally:
        process.kill()


def _send_events(settings: Settings, sender) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the other one ends this one
    try:
        for event in run_benchmarks(settings):
            sender.send(event)
    except ValueError as error:
        sender.send(("refused", str(error)))
