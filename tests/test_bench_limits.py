"""How the benchmark command keeps its time: on a made-up clock, on which only the work itself takes time."""

import json
import math
import os
import signal
import subprocess
import sys
import types

import pytest
import torch
from bench_command import BENCHMARKS, run_bench, stay_in_this_process
from bench_command import script as shipped

from handtuned import bench
from handtuned.harness import runner, timing

CASES = """
from handtuned.harness import timing

def cases(device, quick):
    for at in range({count}):
        yield timing.Case(f"case {{at}}", {inputs}, {{"handtuned": run, "torch": run}}, right,
                           footprint=10**12)  # one set of inputs

def right(x):
    return lambda name, result: None

def run(x):
    return lambda: timing.time.sleep({seconds})

def prepared(seconds):
    timing.time.sleep(seconds)
"""


class Clock(types.SimpleNamespace):
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 1000.0
        self.monotonic = self.perf_counter = lambda: self.now

    def sleep(self, seconds):
        self.now += seconds


class NoCeilings:
    def __init__(self, device, quick):
        self.found = {}

    def rate_records(self, record):
        return record


@pytest.fixture
def timed(tmp_path, monkeypatch, capsys):
    """Run the command over scripts; gives its seconds, its report and what it printed."""
    clock = Clock()
    for module in (bench, runner, timing):
        monkeypatch.setattr(module, "time", clock)
    stay_in_this_process(monkeypatch)
    monkeypatch.setattr(runner, "Ceilings", NoCeilings)
    monkeypatch.setattr(runner, "gc", types.SimpleNamespace(collect=lambda: None))  # nothing here takes memory

    def command(scripts, *words):
        for name, text in scripts.items():
            (tmp_path / f"bench_{name}.py").write_text(text)
        file, begun = tmp_path / "out.json", clock.now
        fixed = ("--benchmarks", tmp_path, "--device", "cpu", "--rounds", 20, "--json", file)
        assert run_bench(*scripts, *fixed, *words) == 0
        return clock.now - begun, json.loads(file.read_text(encoding="utf-8")), capsys.readouterr().out

    return command


def script(count, seconds, inputs="lambda: None"):
    return CASES.format(count=count, seconds=seconds, inputs=inputs)


def rounds(report):
    """(rounds of ours, why it was skipped) of every case."""
    every = [record for results in report["results"].values() for record in results]
    return [(r["contestants"].get("handtuned", {}).get("rounds", 0), r["skipped"].get("all", "")) for r in every]


def test_with_time_enough_every_case_has_all_its_rounds(timed):
    seconds, report, said = timed({"a": script(4, 0.5)})
    assert rounds(report) == [(20, "")] * 4 and seconds < 8 * 60
    assert "time was up" not in said and report["minutes"] == 8


@pytest.mark.parametrize("words,limit", [((), 480), (("--quick",), 120), (("--minutes", "3"), 180)])
def test_with_less_every_case_has_its_first_rounds_before_any_has_more(timed, words, limit):
    call = limit / 480
    seconds, report, said = timed({"a": script(6, call), "b": script(4, 2 * call)}, *words)
    found = rounds(report)
    assert seconds <= limit and len(found) == 10 and all(not why for _, why in found)
    assert min(taken for taken, _ in found) >= 3
    short = [taken for taken, _ in found if taken < 20]
    assert short, "all rounds would take 40 calls per case, 560 in all"
    assert f"   [{short[0]} of 20 rounds: the time was up]" in said
    assert f"{len(short)} of 10 cases were cut short or left out" in said


def test_preparing_counts_and_what_it_takes_is_missing_from_the_other_shares(timed):
    """As when the first case compiles for a minute."""
    slow = script(1, 0.1, inputs="lambda: prepared(60)")
    seconds, report, _ = timed({"a": slow, "b": script(8, 0.3)}, "--quick")
    found = rounds(report)
    assert seconds <= 120 and found[0] == (3, ""), "its share was over before its first round"
    assert all(3 <= taken < 20 for taken, _ in found[1:])


def test_what_cannot_be_begun_is_named(timed):
    seconds, report, said = timed({"a": script(5, 0.1, inputs="lambda: prepared(40)")}, "--quick")
    found = rounds(report)
    assert [taken for taken, _ in found[:2]] == [3, 3] and found[-1] == (0, "the time was up")
    assert seconds < 120 + 40, "only what was under way at the deadline ran on"
    assert "== a" in said and "all: skipped, the time was up" in said
    assert [record["name"] for record in report["results"]["a"]] == [f"case {at}" for at in range(5)]


def test_a_deadline_within_a_case_stops_its_next_provider_or_round(timed):
    slow = script(1, 50.0)  # a call of ours, a call of torch's: 100 s of 114; then finding the length of a turn
    _, report, said = timed({"a": slow}, "--quick")
    [record] = report["results"]["a"]
    assert record["contestants"] == {} and set(record["skipped"]) == {"handtuned", "torch"}
    assert "handtuned: skipped, the time was up" in said
    slower = script(1, 130.0)
    _, report, said = timed({"a": slower}, "--quick")
    assert "torch: skipped, the time was up" in said and "1 of 1 cases were cut short or left out" in said


def test_none_lifts_the_limit(timed):
    seconds, report, _ = timed({"a": script(6, 10.0)}, "--minutes", "none")
    assert rounds(report) == [(20, "")] * 6 and seconds > 480 and report["minutes"] is None


@pytest.mark.parametrize("word", ["0", "-1", "soon", "nan"])
def test_other_limits_are_refused(timed, word, capsys):
    with pytest.raises(SystemExit):
        timed({"a": script(1, 0.1)}, "--minutes", word)
    assert "expected minutes above 0, or none" in capsys.readouterr().err


def test_a_measure_has_the_share_of_eight_cases_and_the_deadline(timed):
    measure = (
        "from handtuned.harness import timing\n"
        "def measure(device, quick, rounds, against, share, deadline):\n"
        "    now = timing.time.monotonic()\n"
        "    return [{'name': f'{share - now:.1f} {deadline - now:.1f}', 'bytes': 0, 'flops': 0, 'contestants': {},\n"
        "             'skipped': {}, 'failed': {}}]\n"
    )
    _, report, _ = timed({"a": measure, "b": script(2, 0.1)}, "--quick")
    assert report["results"]["a"][0]["name"] == f"{114 * 8 / 10:.1f} 114.0"


def test_the_tables_tell_what_was_cut_short():
    rows = runner.load(BENCHMARKS / "tables.py")._rows
    taken = {"median": 1e-3, "p20": 1e-3, "p80": 1e-3, "ratio": 1.0, "rounds": 4}
    record = {"name": "work", "contestants": {"handtuned": taken, "torch": taken}, "skipped": {}, "failed": {}}
    assert rows(record | {"asked": 4})[0].startswith("| work |")
    assert rows(record | {"asked": 9})[0].startswith("| work – 4 of 9 rounds: the time was up |")
    left_out = record | {"contestants": {}, "skipped": {"all": "the time was up"}}
    assert rows(left_out) == ["| work | | | all | the time was up | |"]


@pytest.fixture
def finetune(monkeypatch, tmp_path):
    """bench_finetune on the made-up clock, with children that answer at once, and with `sleep` never."""
    module = shipped("finetune")
    monkeypatch.setattr(module, "smollm2", lambda: tmp_path / "nowhere")
    monkeypatch.setattr(module, "batches", lambda *_: (torch.zeros(2), torch.zeros(2)))
    monkeypatch.setattr(module, "time", Clock())
    child = tmp_path / "child.py"
    child.write_text(
        "import sys, time\n"
        "if 'sleep' in sys.argv: time.sleep(600)\n"
        "print('ready', flush=True)\n"
        "for _ in sys.stdin: print('{\"seconds\": 0.01, \"loss\": 2.0, \"peak\": 7}', flush=True)\n"
    )
    monkeypatch.setattr(module, "__file__", str(child))
    return module


def test_a_training_process_is_killed_at_the_deadline(finetune, tmp_path):
    child = finetune.Child("sleep", {}, tmp_path, finetune.time.monotonic() + 0.2)
    finetune.time.sleep(0.2)
    with pytest.raises(finetune.TimeUp):
        child.listen()
    child.close()
    assert child.process.returncode == -signal.SIGKILL


def test_a_training_that_is_cut_short_keeps_the_steps_that_it_had(finetune, monkeypatch):
    """The deadline comes in the second step of the last provider."""
    now, step, asked = finetune.time.now, finetune.Child.step, []

    def until_the_deadline(child):
        asked.append(child.errors.stem)
        if asked.count("peft + bitsandbytes") == 2:
            finetune.time.now = now + 100
            child.process.kill()
        return step(child)

    monkeypatch.setattr(finetune.Child, "step", until_the_deadline)
    [record] = finetune.measure(torch.device("cpu"), True, 3, timing.RIVALS, math.inf, now + 100)
    assert record["skipped"] == {"peft + bitsandbytes": "the time was up"} and record["failed"] == {}
    assert record["contestants"]["handtuned"]["rounds"] == 1 == record["contestants"]["peft"]["rounds"]
    assert timing.cut_short(record) == ["1 of 3 rounds: the time was up"]


def test_past_its_share_a_training_has_its_first_timed_step_and_no_more(finetune):
    [record] = finetune.measure(torch.device("cpu"), True, 3, ["peft"], finetune.time.now, math.inf)
    assert [taken["rounds"] for taken in record["contestants"].values()] == [1, 1] and record["skipped"] == {}


HANGS = """
import time
from handtuned.harness import Case

def cases(device, quick):
    for name in ("sleeps", "never begun"):
        yield Case(name, lambda: time.sleep(120), {"handtuned": lambda x: lambda: x}, lambda x: lambda *_: None)
"""


def test_a_case_that_does_not_end_is_left_at_the_end_of_the_minutes(tmp_path):
    """As a kernel that takes minutes to compile."""
    (tmp_path / "bench_hangs.py").write_text(HANGS)
    file = tmp_path / "out.json"
    words = ["--benchmarks", str(tmp_path), "--device", "cpu", "--minutes", "0.2", "--json", str(file)]
    done = subprocess.run([sys.executable, "-m", "handtuned", "bench", *words], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "0"}, timeout=100)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text(encoding="utf-8"))
    assert all(record["skipped"] == {"all": "the time was up"} for record in report["results"]["hangs"])
    assert 11.5 <= report["seconds"] < 60 and "cases were cut short or left out" in done.stdout


def test_when_the_time_is_up_every_case_that_is_left_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "bench_hangs.py").write_text(HANGS)
    plan = [("hangs", "sleeps"), ("hangs", "never begun")]
    monkeypatch.setattr(runner, "in_a_process", lambda args, names, stop: [("plan", plan), ("time up", None)])
    assert run_bench("--benchmarks", tmp_path) == 0
    said = capsys.readouterr().out
    assert "sleeps\n  all: skipped, the time was up" in said and "2 of 2 cases were cut short or left out" in said
