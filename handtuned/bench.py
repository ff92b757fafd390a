"""`handtuned bench`: time the kernels against the other providers that are installed.

The benchmarks are scripts of a folder (`harness/runner.py`); how times are taken says `harness/timing.py`, and the
ceilings that they are compared with `harness/ceilings.py`. What the time limit cut short or left out says so.
"""

import argparse
import contextlib
import datetime
import math
import sys
import time
from pathlib import Path

from .harness import runner
from .harness.ceilings import draw
from .harness.timing import OURS, RIVALS, TIME_UP, cut_short
from .nn.files import write_json
from .training import logging

FOLDER = Path("benchmarks")
MINUTES = {"full": 8.0, "quick": 2.0}
ROUNDS = {"full": 25, "quick": 5}
BEGIN_UNTIL, STOP_AT = 0.95, 0.975  # of the minutes: begin nothing after the first, leave off at the second


def _minutes(word: str) -> float:
    with contextlib.suppress(ValueError):
        if (minutes := float("inf" if word == "none" else word)) > 0:
            return minutes
    raise argparse.ArgumentTypeError(f"expected minutes above 0, or none, got {word!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add bench's flags to a parser."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--against", default=",".join(RIVALS), help="other providers, of " + ",".join(RIVALS))
    parser.add_argument("--benchmarks", default=FOLDER, type=Path, metavar="DIR",
                        help="where bench_NAME.py lie (default: ./benchmarks)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases: two minutes")
    parser.add_argument("--rounds", type=int, help="timed turns of each provider")
    parser.add_argument("--minutes", type=_minutes, help="be done in this time, or none (default: 8, with --quick 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write all results, after every case")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them under the measured ceilings")


def run(args: argparse.Namespace) -> int:
    """Run benchmarks; 1 if a result of ours was wrong or could not be had, else 0."""
    found = runner.found_benchmarks(args.benchmarks)
    args.against = [word for word in args.against.split(",") if word]
    for name in args.names:
        if name not in found:
            raise ValueError(f"no benchmark {name!r}; there are: {', '.join(found)}")
    for word in args.against:
        if word not in RIVALS:
            raise ValueError(f"--against {word}: not one of {', '.join(RIVALS)}")
    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    names, mode = list(dict.fromkeys(args.names)) or list(found), "quick" if args.quick else "full"
    minutes, begun = args.minutes or MINUTES[mode], time.monotonic()
    args.rounds = args.rounds or ROUNDS[mode]
    args.deadline = begun + 60 * minutes * BEGIN_UNTIL
    report = {"command": logging.command_line(), "seed": args.seed,
              "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
              "minutes": minutes if minutes < math.inf else None, "device": {}, "versions": {}, "ceilings": {},
              "results": {name: [] for name in names}}  # fmt: skip

    def write() -> None:
        report["seconds"] = round(time.monotonic() - begun, 1)
        if args.json:
            write_json(Path(args.json), report)

    def keep(name: str, made: list[dict]) -> None:
        """Print the records of a benchmark, and write all that there are."""
        if not report["results"][name]:
            print(f"\n== {name}", flush=True)
        report["results"][name] += made
        print("\n".join(map(text, made)), flush=True)
        write()

    while names:
        names = _take_over(runner.in_a_process(args, names, begun + 60 * minutes * STOP_AT), names, report, keep)

    ceilings = ", ".join(f"{key} {value / 1e9:,.0f} G{'B' if key == 'copy' else 'FLOP'}/s"
                         for key, value in report["ceilings"].items())  # fmt: skip
    print(f"\nceilings measured: {ceilings or 'none needed'}; {time.monotonic() - begun:.0f} s in all")
    every = [record for each in report["results"].values() for record in each]
    short = sum(bool(cut_short(record)) or TIME_UP in record["skipped"].values() for record in every)
    if short:
        print(f"{short} of {len(every)} cases were cut short or left out, as {TIME_UP}; --minutes none lifts the limit")
    write()
    if args.plot and report["ceilings"].get("copy"):
        draw(report["ceilings"], every, report["device"]["name"], args.plot)
    elif args.plot:
        print(f"--plot: {args.plot} was not written, as this run measured no bandwidth")
    return int(any(name.startswith(OURS) for record in every for name in record["failed"]))


def _take_over(events, names: list[str], report: dict, keep) -> list[str]:
    """Print and keep what one process finds; gives the benchmarks that are left for the next one."""
    pending = [(name, name) for name in names]
    ended, why = set(), {}  # benchmarks that this process does not finish, and what becomes of their cases
    for kind, found in events:
        if kind == "machine" and not report["device"]:
            report.update(found)
            known = ", ".join(f"{key} {value}" for key, value in found["versions"].items() if value != "not installed")
            print(f"{found['device']['name']}; {known}", flush=True)
        elif kind == "plan":
            pending = found
        elif kind == "records":
            name, made, ceilings = found
            pending.pop(0)
            report["ceilings"].update(ceilings)
            keep(name, made)
        elif kind == "clocks":
            report["device"]["after"][found[0]] = found[1]
        elif kind == "lost":
            print("the GPU refuses work after an error; going on in a new process", flush=True)
            ended, why = {found}, {"skipped": "an earlier error lost the GPU"}
        elif kind == "died":
            ended, why = {name for name, _ in pending[:1]}, {"failed": f"its process ended with exit code {found}"}
        elif kind == "time up":
            print("the time is up; ending", flush=True)
            ended, why = {name for name, _ in pending}, {"skipped": TIME_UP}
    for name, title in pending:
        if name in ended:
            keep(name, [runner.untimed(title, **why)])
    return list(dict.fromkeys(name for name, _ in pending if name not in ended))


def text(record: dict) -> str:
    """One record as a small table."""
    times, head = record["contestants"], record["name"]
    if "floor" in record:
        factor, unit = unit_of(record["floor"])
        head += f"   floor {record['floor'] * factor:.3g} {unit} ({record['bound']})"
    notes = cut_short(record) + ([] if record.get("cold", True) else ["inputs fit in the cache"])
    lines = [head + "".join(f"   [{note}]" for note in notes)]
    if times:
        factor, unit = unit_of(times[OURS]["median"])
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
        peak = f"  peak {taken['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in taken else ""
        lines.append(f"  {name:{width}} {taken['median'] * factor:10.4g} {spread:>17} {speed:>15} {share:>11}"
                     f" {taken['host'] * factor:9.3g} {taken['ratio']:6.2f}x{peak}")  # fmt: skip
    lines += [f"  {name}: skipped, {why}" for name, why in record["skipped"].items()]
    lines += [f"  {name}: NOT TIMED, {why}" for name, why in record["failed"].items()]
    return "\n".join(lines)


def unit_of(seconds: float) -> tuple[float, str]:
    return (1e6, "µs") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1, "s")


def script(path: str) -> int:
    """What `python benchmarks/bench_<name>.py` does: the same as `handtuned bench <name>`, with the same flags."""
    folder, name = Path(path).parent, Path(path).stem.removeprefix("bench_")
    parser = argparse.ArgumentParser(description=f"The same as `handtuned bench {name}`.")
    add_arguments(parser)
    return run(parser.parse_args([name, "--benchmarks", str(folder), *sys.argv[1:]]))
