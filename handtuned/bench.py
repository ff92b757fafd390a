"""`handtuned bench`: run the benchmarks of a checkout, `tests/bench_<name>.py`, against the rivals that are installed.

A benchmark offers `cases(device, quick)`, which yields `contest.Case`s, or, where one process cannot hold all
contestants, `measure(device, quick, rounds, against, share, deadline)`, which returns finished records. All run here,
so that there is one way to check, to time and to tell: see `contest.py` for how times are taken and `roofline.py` for
the ceilings that they are compared with.

How a time limit is kept: each case has its share of what is left, and what it does not need goes to the others. Within
its share it may have all its rounds, beyond it the first three, beyond the deadline none. Preparing and compiling count
like everything else; one that is still at it when the minutes are nearly over is left, by ending the process. What was
cut short or left out says so.
"""

import argparse
import datetime
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from .bench_report import describe, nvidia_smi, text, versions
from .contest import OURS, RIVALS, TIME_UP, Case, compare, contest, cut_short, libraries, table
from .kernels import backend
from .nn.files import write_json
from .roofline import Ceilings, draw
from .training import logging
from .training.models import choose_device, choose_dtype

__all__ = ["SHORT", "add_arguments", "compare", "libraries", "low_precision", "run", "script", "table"]

SCRIPTS = Path(__file__).resolve().parents[1] / "tests"
FIRST = ("nf4", "qlora", "lora", "finetune", "matmul", "adamw", "unscale")  # what a time limit may not cut off
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MINUTES = {"full": 8.0, "quick": 2.0}
ROUNDS = {"full": 25, "quick": 5}
BEGIN_UNTIL, STOP_AT = 0.95, 0.975  # of the minutes: begin nothing after the first, leave off at the second
MEASURE_WEIGHT = 8  # a `measure`'s share of the time, in cases


def low_precision(device: torch.device) -> torch.dtype:
    """What a model computes in there: bfloat16, or float16 where that is only emulated."""
    return choose_dtype("auto", device)


def found_benchmarks() -> dict[str, Path]:
    """name → script, the most telling first."""
    found = {path.stem.removeprefix("bench_"): path for path in sorted(SCRIPTS.glob("bench_*.py"))}
    if not found:
        raise ValueError("the benchmarks are in the repository's tests/ folder; run this from a checkout")
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


def _lost(device: torch.device) -> bool:
    """Whether an error has made the GPU unusable for the rest of this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _plan(names: list[str], device: torch.device, quick: bool) -> list[tuple[str, object]]:
    """(benchmark, what to run) in order: a `Case`, a module with `measure`, or the error that a script ended in."""
    plan = []
    for name in names:
        try:
            module = load(found_benchmarks()[name])
            jobs = [module] if hasattr(module, "measure") else module.cases(device, quick)
            plan += ((name, job) for job in jobs)
        except Exception as error:
            plan.append((name, error))
    return plan


def _weight(job) -> int:
    return MEASURE_WEIGHT if hasattr(job, "measure") else 1


def _untimed(name: str, job, skipped: str = "", failed: str = "") -> dict:
    return {"name": job.name if isinstance(job, Case) else name, "bytes": 0, "flops": 0, "contestants": {},
            "skipped": {"all": skipped} if skipped else {}, "failed": {OURS: failed} if failed else {}}  # fmt: skip


def _run_job(name, job, device, mode, against, rounds, ceilings, share, deadline) -> list[dict]:
    """The records of one job; what stops it becomes a record too."""
    if time.monotonic() >= deadline:
        return [_untimed(name, job, skipped=TIME_UP)]
    try:
        if isinstance(job, Exception):
            raise job
        if not isinstance(job, Case):
            return job.measure(device, mode == "quick", rounds, against, share, deadline)
        record = contest(job, device, against, rounds, share, deadline)
        return [record if _lost(device) else ceilings.rate_records(record)]
    except Exception as error:
        return [_untimed(name, job, failed=f"{type(error).__name__}: {error}")]


def _minutes(word: str) -> float:
    try:
        minutes = math.inf if word == "none" else float(word)
    except ValueError:
        minutes = 0.0
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"expected minutes above 0, or none, got {word!r}")
    return minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add bench's flags to a parser."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--against", default=",".join(RIVALS), help="rivals, of " + ",".join(RIVALS))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases: two minutes")
    parser.add_argument("--rounds", type=int, help="timed turns of each contestant")
    parser.add_argument("--minutes", type=_minutes, help="be done in this time, or none (default: 8, with --quick 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write all results, after every case")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them under the measured ceilings")


def _check(args) -> tuple[list[str], list[str]]:
    found = found_benchmarks()
    for name in args.names:
        if name not in found:
            raise ValueError(f"no benchmark {name!r}; there are: {', '.join(found)}")
    against = [word for word in args.against.split(",") if word]
    for word in against:
        if word not in RIVALS:
            raise ValueError(f"--against {word}: not one of {', '.join(RIVALS)}")
    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    return list(dict.fromkeys(args.names)) or list(found), against


def run(args: argparse.Namespace) -> int:
    """Run benchmarks; 1 if a result of ours was wrong or could not be had, else 0."""
    names, against = _check(args)
    device = choose_device(args.device)
    if backend(torch.empty(0, device=device)) == "interpreter":
        raise ValueError("TRITON_INTERPRET is set: this would time the interpreter; run it with TRITON_INTERPRET=0")
    mode = "quick" if args.quick else "full"
    minutes = args.minutes or MINUTES[mode]
    begun = time.monotonic()
    deadline = begun + 60 * minutes * BEGIN_UNTIL
    torch.manual_seed(args.seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ceilings = Ceilings(device, args.quick)
    report = {
        "command": logging.command_line(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "seed": args.seed,
        "minutes": minutes if minutes < math.inf else None,
        "device": describe(device),
        "versions": versions(),
        "ceilings": ceilings.found,
        "results": {name: [] for name in names},
    }
    known = {key: value for key, value in report["versions"].items() if value != "not installed"}
    print(f"{report['device']['name']}; " + ", ".join(f"{key} {value}" for key, value in known.items()), flush=True)
    plan = _plan(names, device, args.quick)
    pending, lock = list(plan), threading.Lock()

    def leave_off():
        """At the end of the minutes, in a thread of its own: what is under way cannot be interrupted in any other way.
        """
        with lock:
            if pending:
                for name, job in pending:
                    report["results"][name].append(_untimed(name, job, skipped=TIME_UP))
                print("the time is up; ending", flush=True)
                code = _finish(report, args, begun)
                sys.stdout.flush()
                os._exit(code)

    seconds = max(begun + 60 * minutes * STOP_AT - time.monotonic(), 0.0)
    alarm = threading.Timer(min(seconds, threading.TIMEOUT_MAX), leave_off)
    alarm.daemon = True
    alarm.start()
    try:
        _work_off(plan, pending, lock, report, args, device, mode, against, ceilings, begun, deadline)
    finally:
        with lock:
            pending.clear()
            alarm.cancel()
    return _finish(report, args, begun)


def _work_off(plan, pending, lock, report, args, device, mode, against, ceilings, begun, deadline) -> None:
    """Run the jobs of a plan one after another, each within its share of the time, and take them off `pending`."""
    rounds = args.rounds or ROUNDS[mode]
    names = list(report["results"])
    told = lost = ""
    for at, (name, job) in enumerate(plan):
        if name != told:
            print(f"\n== {name}", flush=True)
            told = name
        left = sum(_weight(later) for _, later in plan[at:])
        now = time.monotonic()
        share = now + (deadline - now) * _weight(job) / left
        if lost:
            made = [_untimed(name, job, skipped="an earlier error lost the GPU")]
        else:
            made = _run_job(name, job, device, mode, against, rounds, ceilings, share, deadline)
        with lock:
            report["results"][name] += made
            pending.pop(0)
            print("\n".join(map(text, made)), flush=True)
            _save(report, args, begun)
        if not lost and _lost(device):
            lost = name
        elif not lost and device.type == "cuda":
            torch.cuda.empty_cache()  # the next may be a process of its own
        if [later for later, _ in plan[at + 1 : at + 2]] == [name]:
            continue
        if lost:
            print("the GPU refuses work after an error; going on in a new process", flush=True)
            _go_on(names[names.index(name) + 1 :], args, report, (deadline - time.monotonic()) / 60)
            break
        if device.type == "cuda":
            report["device"]["after"][name] = nvidia_smi(device)


def _finish(report: dict, args, begun: float) -> int:
    """Tell the ceilings and what had too little time, save, draw; gives the exit code."""
    found = ", ".join(f"{key} {value / 1e9:,.0f} G{'B' if key == 'copy' else 'FLOP'}/s"
                      for key, value in report["ceilings"].items())  # fmt: skip
    print(f"\nceilings measured: {found or 'none needed'}; {time.monotonic() - begun:.0f} s in all")
    every = [record for each in report["results"].values() for record in each]
    short = sum(bool(cut_short(record)) or TIME_UP in record["skipped"].values() for record in every)
    if short:
        print(f"{short} of {len(every)} cases were cut short or left out, as {TIME_UP}; --minutes none lifts the limit")
    _save(report, args, begun)
    if args.plot and report["ceilings"].get("copy"):
        draw(report["ceilings"], every, report["device"]["name"], args.plot)
    return int(any(name.startswith(OURS) for record in every for name in record["failed"]))


def _save(report: dict, args, begun: float) -> None:
    report["seconds"] = round(time.monotonic() - begun, 1)
    if args.json:
        write_json(Path(args.json), report)


def _go_on(names: list[str], args, report: dict, minutes: float) -> None:
    """Run what is left in a fresh process and take over its results."""
    if not names:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rest.json")
        command = [sys.executable, "-m", "handtuned", "bench", *names, "--json", str(file)]
        command += ["--device", args.device, "--against", args.against, "--seed", str(args.seed)]
        command += ["--minutes", str(max(minutes, 0.01)) if minutes < math.inf else "none"]
        command += ["--quick"] if args.quick else []
        command += ["--rounds", str(args.rounds)] if args.rounds else []
        done = subprocess.run(command, env={**os.environ})
        if file.exists():
            rest = json.loads(file.read_text(encoding="utf-8"))
            report["results"] |= rest["results"]
            report["ceilings"].update(rest["ceilings"])
    for name in names:
        if not report["results"][name]:
            failed = f"the new process ended with exit code {done.returncode} before it"
            report["results"][name] = [_untimed(name, None, failed=failed)]


def script(path: str) -> int:
    """What `python tests/bench_<name>.py` does: the same as `handtuned bench <name>`, with the same flags."""
    name = Path(path).stem.removeprefix("bench_")
    parser = argparse.ArgumentParser(description=f"The same as `handtuned bench {name}`.")
    add_arguments(parser)
    args = parser.parse_args([name, *sys.argv[1:]])
    return run(args)
