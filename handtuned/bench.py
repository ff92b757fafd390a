"""`handtuned bench`: time the kernels against the other providers that are installed.

The benchmarks are scripts of a folder (`harness/runner.py`); how times are taken says `harness/timing.py`, and the
ceilings that they are compared with `harness/ceilings.py`. What the time limit cut short or left out says so.
"""

import argparse
import datetime
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

from .harness import runner
from .harness.ceilings import draw
from .harness.report import text
from .harness.timing import OURS, RIVALS, TIME_UP, cut_short
from .nn.files import write_json
from .training import logging

FOLDER = Path("benchmarks")
MINUTES = {"full": 8.0, "quick": 2.0}
ROUNDS = {"full": 25, "quick": 5}
BEGIN_UNTIL, STOP_AT = 0.95, 0.975  # of the minutes: begin nothing after the first, leave off at the second


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
    for name in args.names:
        if name not in found:
            raise ValueError(f"no benchmark {name!r}; there are: {', '.join(found)}")
    against = [word for word in args.against.split(",") if word]
    for word in against:
        if word not in RIVALS:
            raise ValueError(f"--against {word}: not one of {', '.join(RIVALS)}")
    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    names = list(dict.fromkeys(args.names)) or list(found)
    mode = "quick" if args.quick else "full"
    minutes, begun = args.minutes or MINUTES[mode], time.monotonic()
    report = {
        "command": logging.command_line(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "seed": args.seed,
        "minutes": minutes if minutes < math.inf else None,
        "device": {},
        "versions": {},
        "ceilings": {},
        "results": {name: [] for name in names},
    }

    def save() -> None:
        report["seconds"] = round(time.monotonic() - begun, 1)
        if args.json:
            write_json(Path(args.json), report)

    settings = runner.Settings(names, args.benchmarks, args.device, against, args.quick, args.rounds or ROUNDS[mode],
                               args.seed, begun + 60 * minutes * BEGIN_UNTIL)  # fmt: skip
    while names:
        events = runner.in_a_process(replace(settings, names=names), begun + 60 * minutes * STOP_AT)
        names = _take_over(events, names, report, save)

    ceilings = ", ".join(f"{key} {value / 1e9:,.0f} G{'B' if key == 'copy' else 'FLOP'}/s"
                         for key, value in report["ceilings"].items())  # fmt: skip
    print(f"\nceilings measured: {ceilings or 'none needed'}; {time.monotonic() - begun:.0f} s in all")
    every = [record for each in report["results"].values() for record in each]
    short = sum(bool(cut_short(record)) or TIME_UP in record["skipped"].values() for record in every)
    if short:
        print(f"{short} of {len(every)} cases were cut short or left out, as {TIME_UP}; --minutes none lifts the limit")
    save()
    if args.plot and report["ceilings"].get("copy"):
        draw(report["ceilings"], every, report["device"]["name"], args.plot)
    return int(any(name.startswith(OURS) for record in every for name in record["failed"]))


def _take_over(events, names: list[str], report: dict, save) -> list[str]:
    """Print and keep what one process finds; gives the benchmarks that are left for the next one."""
    pending, at = [(name, name) for name in names], ""
    ended, why = set(), {}  # benchmarks that this process does not finish, and what becomes of their cases

    def keep(name: str, made: list[dict]) -> None:
        nonlocal at
        if name != at:
            print(f"\n== {name}", flush=True)
            at = name
        report["results"][name] += made
        print("\n".join(map(text, made)), flush=True)
        save()

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


def script(path: str) -> int:
    """What `python benchmarks/bench_<name>.py` does: the same as `handtuned bench <name>`, with the same flags."""
    folder, name = Path(path).parent, Path(path).stem.removeprefix("bench_")
    parser = argparse.ArgumentParser(description=f"The same as `handtuned bench {name}`.")
    add_arguments(parser)
    return run(parser.parse_args([name, "--benchmarks", str(folder), *sys.argv[1:]]))
