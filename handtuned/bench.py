"""`handtuned bench`: run the benchmarks of a checkout, `tests/bench_<name>.py`, against the rivals that are installed.

A benchmark offers `cases(device, quick)`, which yields `contest.Case`s, or, where one process cannot hold all
contestants, `measure(device, quick, rounds, against)`, which returns finished records. All run here, so
that there is one way to check, to time and to tell: see `contest.py` for how times are taken and `roofline.py`
for the ceilings that they are compared with.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

from . import records
from .contest import OURS, RIVALS, compare, contest, libraries, table
from .kernels import backend
from .models import choose_device, choose_dtype
from .nn.files import write_json
from .roofline import Ceilings, draw

__all__ = ["SHORT", "add_arguments", "compare", "libraries", "low_precision", "run", "script", "table"]

SCRIPTS = Path(__file__).resolve().parents[1] / "tests"
FIRST = ("nf4", "qlora", "lora", "finetune", "matmul", "adamw", "unscale")  # what a time limit may not cut off
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MINUTES = {"full": 8.0, "quick": 2.0}
ROUNDS = {"full": 25, "quick": 5}
CASE_SECONDS = {"full": 12.0, "quick": 2.0}


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


def _nvidia_smi() -> dict[str, str]:
    fields = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split(", ")
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def describe(device: torch.device) -> dict:
    """The device in words and numbers."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        about = {"kind": "cuda", "name": gpu.name, "arch": f"sm_{gpu.major}{gpu.minor}",
                 "multiprocessors": gpu.multi_processor_count, "memory": gpu.total_memory}  # fmt: skip
        return about | {"before": _nvidia_smi(), "after": {}}  # after: each benchmark, while clocks are still up
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {"kind": "cpu", "name": name, "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of everything that a time may depend on, the rivals that are installed included."""
    found = records.versions()
    for package in ("peft", "bitsandbytes", "liger_kernel", "unsloth"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _unit(seconds: float) -> tuple[float, str]:
    return (1e6, "µs") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1, "s")


def text(record: dict) -> str:
    """One record as a small table."""
    times = record["contestants"]
    head = record["name"]
    if "floor" in record:
        factor, unit = _unit(record["floor"])
        head += f"   floor {record['floor'] * factor:.3g} {unit} ({record['bound']})"
    lines = [head if record.get("cold", True) else head + "   [inputs fit in the cache]"]
    if times:
        factor, unit = _unit(times[OURS]["median"])
        width = max(map(len, times))
        lines.append(f"  {'':{width}} {'median ' + unit:>10} {'p20 – p80':>17} {'speed':>15} {'of ceiling':>11}"
                     f" {'host ' + unit:>9} {'ratio':>7}")  # fmt: skip
    for name, taken in times.items():
        spread = f"{taken['p20'] * factor:.4g} – {taken['p80'] * factor:.4g}"
        if "tokens_per_second" in taken:
            speed = f"{taken['tokens_per_second']:.0f} tokens/s"
        elif record.get("bound") == "arithmetic":
            speed = f"{taken['flops_per_second'] / 1e12:.3g} TFLOP/s"
        else:
            speed = f"{taken['bytes_per_second'] / 1e9:.4g} GB/s" if "bytes_per_second" in taken else ""
        share = f"{taken['of_ceiling']:.0%}" if "of_ceiling" in taken else ""
        lines.append(f"  {name:{width}} {taken['median'] * factor:10.4g} {spread:>17} {speed:>15} {share:>11}"
                     f" {taken['host'] * factor:9.3g} {taken['ratio']:6.2f}x"
                     + (f"  peak {taken['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in taken else ""))  # fmt: skip
    lines += [f"  {name}: skipped, {why}" for name, why in record["skipped"].items()]
    lines += [f"  {name}: NOT TIMED, {why}" for name, why in record["failed"].items()]
    return "\n".join(lines)


def _lost(device: torch.device) -> bool:
    """Whether an error has made the GPU unusable for the rest of this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def run_benchmark(name, device, mode, against, rounds, ceilings, deadline):
    """Yield the records of one benchmark until the time is up; what stops it becomes a record too."""
    try:
        yield from _records(load(found_benchmarks()[name]), device, mode, against, rounds, ceilings, deadline)
    except Exception as error:
        failed = {OURS: f"{type(error).__name__}: {error}"}
        yield {"name": name, "bytes": 0, "flops": 0, "contestants": {}, "skipped": {}, "failed": failed}


def _records(module, device, mode, against, rounds, ceilings, deadline):
    quick = mode == "quick"
    if hasattr(module, "measure"):
        yield from module.measure(device, quick, rounds, against)
        return
    for case in module.cases(device, quick):
        if time.monotonic() > deadline:
            skipped = {"all": "the time was up"}
            yield {"name": case.name, "bytes": 0, "flops": 0, "contestants": {}, "skipped": skipped, "failed": {}}
            continue
        record = contest(case, device, against, rounds, CASE_SECONDS[mode])
        if _lost(device):
            yield record
            return
        yield ceilings.rate_records(record)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add bench's flags to a parser."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--against", default=",".join(RIVALS), help="rivals, of " + ",".join(RIVALS))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases: two minutes")
    parser.add_argument("--rounds", type=int, help="timed turns of each contestant")
    parser.add_argument("--minutes", type=float, help="begin no case after this time (default: 8 on a GPU, 2 if quick)")
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
    return args.names or list(found), against


def run(args: argparse.Namespace) -> int:
    """Run benchmarks; 1 if a result of ours was wrong or could not be had, else 0."""
    names, against = _check(args)
    device = choose_device(args.device)
    if backend(torch.empty(0, device=device)) == "interpreter":
        raise ValueError("TRITON_INTERPRET is set: this would time the interpreter; run it with TRITON_INTERPRET=0")
    mode = "quick" if args.quick else "full"
    minutes = args.minutes or (MINUTES[mode] if device.type == "cuda" or args.quick else float("inf"))
    begun = time.monotonic()
    torch.manual_seed(args.seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ceilings = Ceilings(device, args.quick)
    report = {
        "command": records.command_line(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "seed": args.seed,
        "device": describe(device),
        "versions": versions(),
        "ceilings": ceilings.found,
        "results": {},
    }
    known = {key: value for key, value in report["versions"].items() if value != "not installed"}
    print(f"{report['device']['name']}; " + ", ".join(f"{key} {value}" for key, value in known.items()), flush=True)
    for at, name in enumerate(names):
        print(f"\n== {name}", flush=True)
        results = report["results"].setdefault(name, [])
        rounds = args.rounds or ROUNDS[mode]
        for record in run_benchmark(name, device, mode, against, rounds, ceilings, begun + 60 * minutes):
            results.append(record)
            print(text(record), flush=True)
            _save(report, args, begun)
        if _lost(device):
            print("the GPU refuses work after an error; going on in a new process", flush=True)
            _go_on(names[at + 1 :], args, report, minutes - (time.monotonic() - begun) / 60)
            break
        if device.type == "cuda":
            report["device"]["after"][name] = _nvidia_smi()
    found = ", ".join(f"{key} {value / 1e9:,.0f} G{'B' if key == 'copy' else 'FLOP'}/s"
                      for key, value in ceilings.found.items())  # fmt: skip
    print(f"\nceilings measured: {found or 'none needed'}; {time.monotonic() - begun:.0f} s in all")
    _save(report, args, begun)
    if args.plot and report["ceilings"].get("copy"):
        everything = [record for each in report["results"].values() for record in each]
        draw(report["ceilings"], everything, report["device"]["name"], args.plot)
    every = [record for each in report["results"].values() for record in each]
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
        command += ["--minutes", str(max(minutes, 0.01))]
        command += ["--quick"] if args.quick else []
        command += ["--rounds", str(args.rounds)] if args.rounds else []
        subprocess.run(command, env={**os.environ})
        if file.exists():
            rest = json.loads(file.read_text(encoding="utf-8"))
            report["results"] |= rest["results"]
            report["ceilings"].update(rest["ceilings"])


def script(path: str) -> int:
    """What `python tests/bench_<name>.py` does: the same as `handtuned bench <name>`, with the same flags."""
    name = Path(path).stem.removeprefix("bench_")
    parser = argparse.ArgumentParser(description=f"The same as `handtuned bench {name}`.")
    add_arguments(parser)
    args = parser.parse_args([name, *sys.argv[1:]])
    return run(args)
