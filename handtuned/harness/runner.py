"""Running the benchmarks of a folder, `bench_<name>.py`, within a time limit.

A script offers `cases(device, quick)`, which yields `Case`s, or, where one process cannot hold all providers,
`measure(device, quick, rounds, against, share, deadline)`, which returns finished records.

Each case has its share of the time that is left, and what it does not need goes to the others. Within its share it may
have all its rounds, beyond it the first three, beyond the deadline none; preparing and compiling count. The benchmarks
run in a process of their own (`in_a_process`), which is ended when the minutes are nearly over, and replaced by another
one when an error has lost the GPU or ended it.

`args` is what `handtuned bench` was told, and `deadline`, the moment of time.monotonic() (all processes share it) to
begin nothing after.
"""

import argparse
import gc
import importlib.util
import math
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ..kernels import backend
from ..training import logging
from ..training.models import choose_device
from .ceilings import Ceilings
from .timing import OURS, TIME_UP, Case, in_words, run_case

# What a time limit may not cut off.
FIRST = ("nf4", "nf4_quantize", "qlora", "nf4_stream", "nf4_matmul", "lora", "lora_gemms", "finetune", "matmul",
         "adamw", "unscale")  # fmt: skip
MEASURE_WEIGHT = 8  # a `measure`'s share of the time, in cases


def found_benchmarks(folder: Path) -> dict[str, Path]:
    """name → script, the most informative first."""
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
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvidia_smi(device: torch.device) -> dict[str, str]:
    """Driver, clocks, temperature and power of a GPU; {} where nvidia-smi does not answer."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # CUDA_VISIBLE_DEVICES renumbers GPUs
    fields = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader",
               f"--id={f'GPU-{uuid}' if uuid else device.index or 0}"]  # fmt: skip
    try:
        values = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().split(", ")
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def describe(device: torch.device) -> dict:
    """The device in words and numbers."""
    if device.type != "cuda":
        return {"kind": "cpu", "name": logging.processor("model name")[0], "threads": torch.get_num_threads(),
                "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
    gpu = torch.cuda.get_device_properties(device)  # below, "after": each benchmark, while clocks are still up
    return {"kind": "cuda", "name": gpu.name, "arch": f"sm_{gpu.major}{gpu.minor}", "memory": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count, "before": nvidia_smi(device), "after": {}}  # fmt: skip


def untimed(name: str, skipped: str = "", failed: str = "") -> dict:
    """The record of something that has no times."""
    return {"name": name, "bytes": 0, "flops": 0, "contestants": {}, "skipped": {"all": skipped} if skipped else {},
            "failed": {OURS: failed} if failed else {}}  # fmt: skip


def run_benchmarks(args: argparse.Namespace, names: list[str]) -> Iterator[tuple[str, object]]:
    """Run them one after another, in this process.

    Yields:
        ("machine", {"device", "versions"}), ("plan", (benchmark, case) pairs) and then for each of these
        ("records", (benchmark, records, ceilings measured so far)); on a GPU also ("clocks", (benchmark, nvidia-smi's
        answer)) at the end of a benchmark, and last ("lost", benchmark) if an error has made the GPU unusable.

    ValueError: an unknown device, or kernels are interpreted.
    """
    device = choose_device(args.device)
    if backend(torch.empty(0, device=device)) == "interpreter":
        raise ValueError("TRITON_INTERPRET is set: this would time the interpreter; run it with TRITON_INTERPRET=0")
    torch.manual_seed(args.seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ceilings = Ceilings(device, args.quick)
    versions = logging.versions("peft", "bitsandbytes", "liger_kernel", "unsloth")
    versions |= {"cuda": torch.version.cuda} if torch.version.cuda else {}
    yield "machine", {"device": describe(device), "versions": versions}
    jobs = []  # (benchmark, title, what to run): a `Case`, a module with `measure`, or the error of a script
    for name in names:
        try:
            module = load(found_benchmarks(args.benchmarks)[name])
            whole = hasattr(module, "measure")
            jobs += [(name, name, module)] if whole else ((name, c.name, c) for c in module.cases(device, args.quick))
        except Exception as error:
            jobs.append((name, name, error))
    yield "plan", [(name, title) for name, title, _ in jobs]
    for at, (name, title, job) in enumerate(jobs):
        now = time.monotonic()
        weights = [MEASURE_WEIGHT if hasattr(later, "measure") else 1 for _, _, later in jobs[at:]]
        share = now + (args.deadline - now) * weights[0] / sum(weights)
        yield "records", (name, _run_job(title, job, device, args, ceilings, share), dict(ceilings.found))
        gc.collect()
        if device.type == "cuda":
            if _lost(device):
                yield "lost", name
                return
            torch.cuda.empty_cache()  # the next may be a process of its own
            if at + 1 == len(jobs) or jobs[at + 1][0] != name:
                yield "clocks", (name, nvidia_smi(device))


def _run_job(title: str, job, device: torch.device, args: argparse.Namespace, ceilings: Ceilings, share: float) -> list:
    """The records of one job; what stops it becomes a record too."""
    if time.monotonic() >= args.deadline:
        return [untimed(title, skipped=TIME_UP)]
    try:
        if isinstance(job, Exception):
            raise job
        if not isinstance(job, Case):
            return job.measure(device, args.quick, args.rounds, args.against, share, args.deadline)
        record = run_case(job, device, args.against, args.rounds, share, args.deadline)
        return [record if _lost(device) else ceilings.rate_records(record)]
    except Exception as error:
        return [untimed(title, failed=in_words(error))]


def _lost(device: torch.device) -> bool:
    """Whether an error has made the GPU unusable for the rest of this process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


def in_a_process(args: argparse.Namespace, names: list[str], stop: float) -> Iterator[tuple[str, object]]:
    """The events of `run_benchmarks` in a process of its own, which can be ended whatever it is at.

    Yields:
        besides ("time up", None) if it was still at work at the moment `stop`, ("died", exit code) if it ended early.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA, or torch's threads
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_events, args=(args, names, sender))
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


def _send_events(args: argparse.Namespace, names: list[str], sender) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the other one ends this one
    try:
        for event in run_benchmarks(args, names):
            sender.send(event)
    except ValueError as error:
        sender.send(("refused", str(error)))
