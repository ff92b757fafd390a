"""The benchmark command: nothing wrong is timed, turns alternate, what is told is what was measured."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from handtuned import bench, bench_tables, contest, roofline
from handtuned.contest import Case

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def doubling(**contestants):
    """A case: twice a random vector."""

    def check(x):
        return lambda name, result: torch.testing.assert_close(result, 2 * x)

    makers = {"handtuned": lambda x: lambda: 2 * x} | contestants
    return Case("double", lambda: torch.randn(1000), makers, check, bytes=8000, flops=1000, size={"N": 1000})


# contests


def test_a_wrong_contestant_is_not_timed_and_the_others_are():
    calls = []

    def wrong(x):
        return lambda: calls.append(1) or 3 * x

    record = contest.contest(doubling(torch=wrong, right=lambda x: lambda: x + x), CPU, rounds=3)
    assert list(record["contestants"]) == ["handtuned", "right"]
    assert "not close" in record["failed"]["torch"]
    assert len(calls) == 1, "it ran for its check and never again"


def test_a_contestant_that_raises_does_not_stop_the_rest():
    def broken(x):
        raise ZeroDivisionError("no")

    record = contest.contest(doubling(torch=broken), CPU, rounds=3)
    assert record["failed"] == {"torch": "ZeroDivisionError: no"} and "handtuned" in record["contestants"]


def test_inputs_that_cannot_be_made_spoil_their_own_case_only():
    case = doubling()

    def too_large():
        raise MemoryError("no room")

    case.inputs = too_large
    record = contest.contest(case, CPU, rounds=3)
    assert record["failed"] == {"handtuned": "no inputs: MemoryError: no room"}


def test_without_a_right_result_of_ours_nothing_is_told():
    record = contest.contest(doubling(handtuned=lambda x: lambda: x, right=lambda x: lambda: 2 * x), CPU, rounds=3)
    assert record["contestants"] == {} and list(record["failed"]) == ["handtuned"]


def test_a_rival_that_is_not_installed_is_skipped_and_said_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)

    def liger(x):
        import liger_kernel  # noqa: F401

    def other(x):
        import no_such_module  # noqa: F401

    record = contest.contest(doubling(liger=liger, torch=other), CPU, rounds=3)
    assert record["skipped"] == {"liger": "liger_kernel is not installed"}
    assert "no_such_module" in record["failed"]["torch"], "a module missing inside a rival is no absent rival"


def test_rivals_not_asked_for_are_left_out():
    names = ("torch", "torch fused", "peft + bitsandbytes", "base layer alone")
    case = doubling(**{name: lambda x: lambda: 2 * x for name in names})
    record = contest.contest(case, CPU, against=["peft", "torch"], rounds=3)
    assert list(record["contestants"]) == ["handtuned", "torch", "torch fused", "base layer alone"]
    assert contest.libraries("peft + bitsandbytes") == {"peft", "bitsandbytes"}


def test_turns_alternate_and_go_round_the_input_sets():
    order = []
    runs = {name: [lambda name=name, i=i: order.append(name + i) for i in "012"] for name in "ab"}
    times = contest.take_turns(runs, rounds=3, device=CPU, least=0.0)
    turns = order[4:]  # after two calls of each to find the length of a turn
    assert turns == ["a2", "b2", "a0", "b0", "a1", "b1"]
    assert times["a"]["rounds"] == 3 and times["a"]["calls"] == 1


def test_input_sets_are_larger_than_the_cache(monkeypatch):
    monkeypatch.setattr(contest, "cache_bytes", lambda device: 20_000)
    made = []
    case = doubling()
    inputs = case.inputs
    case.inputs = lambda: made.append(1) or inputs()
    record = contest.contest(case, CPU, rounds=3)
    assert len(made) == record["sets"] == 5 and record["cold"]  # 5 × 8,000 ≥ 2 × 20,000
    monkeypatch.setattr(contest, "cache_bytes", lambda device: 10**9)
    record = contest.contest(case, CPU, rounds=3)
    assert record["sets"] == contest.MOST_SETS and not record["cold"]
    assert "[inputs fit in the cache]" in bench.text(record)


def test_medians_and_spread():
    found = contest.summary([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert found == {"median": 3.5, "p20": 2.0, "p80": 5.0, "min": 1.0, "max": 100.0}


def test_times_and_ratio_are_those_of_the_work():
    slow = lambda x: lambda: (time.sleep(0.02), 2 * x)[1]  # noqa: E731
    quick = lambda x: lambda: (time.sleep(0.005), 2 * x)[1]  # noqa: E731
    times = contest.contest(doubling(handtuned=quick, torch=slow), CPU, rounds=3)["contestants"]
    assert times["handtuned"]["median"] >= 0.005 and times["torch"]["median"] >= 0.02
    assert times["torch"]["ratio"] == times["torch"]["median"] / times["handtuned"]["median"]


def test_a_time_limit_leaves_three_rounds():
    case = doubling(handtuned=lambda x: lambda: (time.sleep(0.01), 2 * x)[1])
    assert contest.contest(case, CPU, rounds=1000, limit=0.0)["contestants"]["handtuned"]["rounds"] == 3


def test_compare_checks_before_it_times():
    calls = []

    def refuse(name, result):
        raise AssertionError(f"{name} is wrong")

    with pytest.raises(AssertionError, match="a is wrong"):
        contest.compare({"a": lambda: calls.append(1)}, refuse)
    assert len(calls) == 1
    times = contest.compare({"a": lambda: 1, "b": lambda: 2}, rounds=3)
    assert list(times) == ["a", "b"] and times["a"]["rounds"] == 3
    assert "b" in contest.table(times, ours="a")


# the GPU's clock, with stand-ins for what only a GPU has


class FakeGpu:
    """Events stamp the time that a device would show: calls take 2 ms there whatever the host does."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.log.append("event")
                self.at = gpu.now

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: gpu.log.append("wait"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.log.append(("sleep", cycles)))

    def call(self):
        self.log.append("call")
        self.now += 2e-3


def test_a_gpu_is_timed_by_events_behind_a_sleep(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    clock = contest.clock_of(torch.device("cuda"))
    seconds, host = clock.turn([gpu.call] * 3)
    kinds = [entry[0] if isinstance(entry, tuple) else entry for entry in gpu.log]
    assert kinds == ["wait", "sleep", "event", "call", "call", "call", "event", "wait"]
    assert seconds == pytest.approx(2e-3) and 0 < host < 2e-3
    clock.turn([gpu.call], lead=100.0)
    longest = max(entry[1] for entry in gpu.log if isinstance(entry, tuple))
    assert longest <= 0.1 * contest.SLEEP_CYCLES, "the device never sleeps longer than a tenth of a second"


def test_take_turns_on_a_gpu_repeats_short_calls(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    times = contest.take_turns({"a": [gpu.call]}, 4, torch.device("cuda"), least=9e-3)
    assert times["a"]["calls"] == 5 and times["a"]["median"] == pytest.approx(2e-3)


# ceilings


def ceilings(copy=10e9, rate=1e12):
    made = roofline.Ceilings(CPU)
    made.found.update({"copy": copy, "float32": rate})
    return made


def test_floor_and_share_of_the_ceiling():
    record = {"bytes": 10**9, "flops": 5 * 10**10, "dtype": "float32", "contestants": {"handtuned": {"median": 0.2}}}
    rated = ceilings().rate_records(record)
    assert rated["bound"] == "memory" and rated["floor"] == pytest.approx(0.1)
    ours = rated["contestants"]["handtuned"]
    assert ours["of_ceiling"] == pytest.approx(0.5)
    assert ours["bytes_per_second"] == pytest.approx(5e9) and ours["flops_per_second"] == pytest.approx(2.5e11)
    assert ceilings(rate=1e11).rate_records(record)["bound"] == "arithmetic"


def test_ceilings_are_measured_once(monkeypatch):
    monkeypatch.setattr(roofline, "cache_bytes", lambda device: 2**20)
    made = roofline.Ceilings(CPU, quick=True)
    assert made.bandwidth() == made.bandwidth() > 1e8
    assert made.rate(torch.float16) == made.rate(torch.float32) > 1e8, "a CPU has one ceiling, that of float32"
    assert set(made.found) == {"copy", "float32"}


# the command


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with two benchmarks in place of tests/."""
    (tmp_path / "bench_double.py").write_text(
        "import torch\nfrom handtuned.contest import Case\n"
        "def same(x):\n    return lambda name, result: torch.testing.assert_close(result, 2 * x)\n"
        "def cases(device, quick):\n"
        "    assert quick is True and device.type == 'cpu'\n"
        "    ways = {'handtuned': lambda x: lambda: 2 * x, 'torch': lambda x: lambda: x + x}\n"
        "    yield Case('double', lambda: torch.randn(100_000), ways, same, bytes=800_000)\n"
        "    yield Case('again', lambda: torch.randn(100_000), ways, same, bytes=800_000, flops=100_000)\n"
    )
    (tmp_path / "bench_broken.py").write_text(
        "import torch\nfrom handtuned.contest import Case\n"
        "def cases(device, quick):\n"
        "    fail = lambda x: lambda name, result: 1 / 0\n"
        "    yield Case('broken', lambda: torch.randn(10), {'handtuned': lambda x: lambda: x}, fail, bytes=40)\n"
    )
    monkeypatch.setattr(bench, "SCRIPTS", tmp_path)
    monkeypatch.setattr(contest, "cache_bytes", lambda device: 2**20)
    monkeypatch.setattr(roofline, "cache_bytes", lambda device: 2**20)
    return tmp_path


def run(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args([*words, "--device", "cpu", "--quick"]))


def test_the_command_writes_json_a_table_and_a_picture(small, capsys):
    file, picture = small / "out.json", small / "out.png"
    assert run("double", "--json", str(file), "--plot", str(picture), "--seed", "3") == 0
    report = json.loads(file.read_text())
    assert {"command", "date", "seed", "device", "versions", "ceilings", "results", "seconds"} <= set(report)
    assert report["seed"] == 3 and report["device"]["kind"] == "cpu" and report["device"]["threads"] > 0
    assert report["versions"]["torch"] == torch.__version__
    record = report["results"]["double"][0]
    ours, theirs = record["contestants"]["handtuned"], record["contestants"]["torch"]
    assert theirs["ratio"] == pytest.approx(theirs["median"] / ours["median"])
    assert ours["of_ceiling"] == pytest.approx(record["floor"] / ours["median"])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert "double   floor" in said and "GB/s" in said and "ceilings measured: copy" in said


def test_without_names_all_run_and_a_wrong_result_of_ours_is_an_error(small, capsys):
    assert run() == 1
    said = capsys.readouterr().out
    assert "== double" in said and "== broken" in said and "handtuned: NOT TIMED, ZeroDivisionError" in said


def test_results_so_far_are_on_disk_when_a_later_case_dies(small):
    dying = small / "bench_dying.py"
    dying.write_text((small / "bench_double.py").read_text() + "    raise KeyboardInterrupt\n")
    file = small / "out.json"
    with pytest.raises(KeyboardInterrupt):
        run("dying", "--json", str(file))
    assert len(json.loads(file.read_text())["results"]["dying"]) == 2


def test_when_the_time_is_up_what_is_left_is_named(small, capsys):
    assert run("double", "--minutes", "1e-9") == 0
    assert "all: skipped, the time was up" in capsys.readouterr().out


def test_a_script_that_cannot_be_loaded_does_not_stop_the_others(small, capsys):
    (small / "bench_absent.py").write_text("import no_such_module\n")
    assert run("absent", "double") == 1
    said = capsys.readouterr().out
    assert "handtuned: NOT TIMED, ModuleNotFoundError" in said and "double   floor" in said


def test_bad_words_are_refused(small, monkeypatch):
    with pytest.raises(ValueError, match="no benchmark 'trible'; there are: broken, double"):
        run("trible")
    with pytest.raises(ValueError, match="--against tinygrad"):
        run("double", "--against", "torch,tinygrad")
    with pytest.raises(ValueError, match="--rounds"):
        run("double", "--rounds", "0")
    monkeypatch.setattr(bench, "backend", lambda tensor: "interpreter")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        run("double")


def test_a_lost_gpu_goes_on_in_a_new_process(small, monkeypatch):
    """The GPU is lost in the first benchmark: its record is kept, the second is run by another process."""
    asked = []

    def fresh(command, env):
        asked.append(command)
        record = {"name": "from the new process", "contestants": {}, "skipped": {}, "failed": {}}
        rest = {"results": {"double": [record]}, "ceilings": {"copy": 7.0}}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(rest))

    monkeypatch.setattr(bench, "_lost", lambda device: True)
    monkeypatch.setattr(bench.subprocess, "run", fresh)
    file = small / "out.json"
    assert run("broken", "double", "--json", str(file), "--rounds", "4") == 1
    report = json.loads(file.read_text())
    assert report["results"]["broken"][0]["failed"] and report["results"]["double"][0]["name"] == "from the new process"
    assert report["ceilings"] == {"copy": 7.0}
    assert asked[0][:5] == [sys.executable, "-m", "handtuned", "bench", "double"]
    assert {"--quick", "--rounds", "4"} <= set(asked[0])


# the scripts of this repository


def script(name):
    return bench.load(ROOT / "tests" / f"bench_{name}.py")


def test_every_script_is_found_and_offers_cases():
    found = bench.found_benchmarks()
    assert {"nf4", "lora", "qlora", "matmul", "adamw", "unscale", "loss", "finetune"} <= set(found)
    for name, path in found.items():
        module = bench.load(path)
        assert hasattr(module, "cases") != hasattr(module, "measure"), name


@pytest.mark.parametrize("name", ["lora", "qlora", "matmul", "unscale", "adamw", "nf4", "loss"])
def test_all_contestants_of_the_quick_cases_agree(name, monkeypatch):
    """Every rival's result is right and no case raises; times on this machine do not matter here."""
    monkeypatch.setattr(contest, "cache_bytes", lambda device: 1)
    for case in script(name).cases(CPU, True):
        record = contest.contest(case, CPU, rounds=1, limit=0.0)
        assert record["failed"] == {}, case.name
        assert "handtuned" in record["contestants"] and case.bytes > 0


def test_the_gpu_cases_can_be_run_on_small_sizes():
    """Code paths that only a GPU's cases take: low precision, dropout, a few rows, scales in fp32."""
    lora, qlora, nf4, matmul = map(script, ("lora", "qlora", "nf4", "matmul"))
    cases = [
        lora.case(64, 128, 64, 16, torch.bfloat16, CPU),
        lora.case(512, 128, 64, 8, torch.float32, CPU, dropout=0.05),
        qlora.case(64, 128, 64, 16, torch.bfloat16, CPU, training=True),
        qlora.case(4, 128, 64, 16, torch.bfloat16, CPU, training=False),
        nf4.dequantize_case(64, 128, torch.bfloat16, CPU, False),
        nf4.quantize_case(64, 128, torch.bfloat16, CPU, True),
        matmul.case(64, CPU),
        script("unscale").case("adapter", [(64, 8)] * 3, torch.float16, CPU),
        script("loss").case(32, 64, 500, torch.bfloat16, CPU),
    ]
    for case in cases:
        record = contest.contest(case, CPU, rounds=1, limit=0.0)
        failed = {name: why for name, why in record["failed"].items() if not name.startswith(("liger", "unsloth"))}
        assert failed == {}, case.name


def test_cases_name_kernels_that_xray_knows(monkeypatch):
    from handtuned.xray import all_specs

    names = [spec.name for spec in all_specs()]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for name in ("nf4", "lora", "qlora", "matmul", "adamw", "unscale", "loss"):
        for device in (CPU, torch.device("cuda")):
            for case in script(name).cases(device, False):
                assert any(known.startswith(case.kernel) for known in names), case.kernel


def test_finetune_tells_losses_that_part(monkeypatch):
    finetune = script("finetune")
    turns = {
        "handtuned": [{"loss": 3.0}, {"loss": 2.0}],
        "peft": [{"loss": 3.3}, {"loss": 2.5}],
        "peft + bitsandbytes": [{"loss": 3.0}, {"loss": 2.5}],
    }
    assert list(finetune.apart(turns)) == ["peft + bitsandbytes"]
    turns["peft + bitsandbytes"][1]["loss"] = 2.01
    assert finetune.apart(turns) == {}
    turns["peft"][1]["loss"] = float("nan")
    assert list(finetune.apart(turns)) == ["peft"]


def test_finetune_records_a_contestant_that_dies(monkeypatch, tmp_path):
    """Every child dies at once: the record tells why, and no time is made up."""
    finetune = script("finetune")
    monkeypatch.setattr(finetune, "smollm2", lambda: tmp_path / "nowhere")
    monkeypatch.setattr(finetune, "batches", lambda *_: (torch.zeros(2), torch.zeros(2)))
    monkeypatch.setattr(finetune, "CONTESTANTS", ("handtuned",))
    [record] = finetune.measure(CPU, True, 1, contest.RIVALS)
    assert record["contestants"] == {} and "nowhere" in record["failed"]["handtuned"]


@pytest.mark.slow
def test_finetune_on_random_weights_of_the_same_shape(monkeypatch):
    """What runs on a machine without the weights, such as a lent GPU's."""
    finetune = script("finetune")

    def absent():
        raise ValueError("offline")

    monkeypatch.setattr(finetune, "smollm2", absent)
    [record] = finetune.measure(CPU, True, 2, contest.RIVALS)
    assert "random weights" in record["name"] and record["failed"] == {}
    assert set(record["contestants"]) | set(record["skipped"]) == set(finetune.CONTESTANTS)
    assert len(record["contestants"]["handtuned"]["losses"]) == 3


# the tables


def test_the_tables_are_what_the_json_files_say():
    """`python -m handtuned.bench_tables` would change nothing, and every result file has its table."""
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert bench_tables.updated(page, ROOT / "benchmarks") == page
    marked = {found["file"] for found in bench_tables.MARKED.finditer(page)}
    results = set()
    for path in (ROOT / "benchmarks").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "ceilings" in content:
            results.add(path.name)
    assert results == marked


def test_a_changed_figure_is_noticed(tmp_path, monkeypatch):
    report = json.loads((ROOT / "benchmarks" / "cpu.json").read_text(encoding="utf-8"))
    page = "# x\n<!-- cpu.json -->\n<!-- end of cpu.json -->\nbelow\n"
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    (tmp_path / "cpu.json").write_text(json.dumps(report), encoding="utf-8")

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["bench_tables", "--folder", str(tmp_path), *words])
        return bench_tables.main()

    assert command("--check") == 1 and command() == 0 and command("--check") == 0
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert written.startswith("# x\n<!-- cpu.json -->\n`") and written.endswith("<!-- end of cpu.json -->\nbelow\n")
    record = report["results"]["nf4"][0]
    assert f"{record['contestants']['bitsandbytes']['ratio']:.2f} |" in written
    record["contestants"]["handtuned"]["median"] *= 1.5
    (tmp_path / "cpu.json").write_text(json.dumps(report), encoding="utf-8")
    assert bench_tables.updated(written, tmp_path) != written


def test_the_shipped_cpu_results_compare_parts_a_to_c():
    """Quantizing, dequantizing, the LoRA layer, the NF4 layer and the whole step, each beside its rival."""
    report = json.loads((ROOT / "benchmarks" / "cpu.json").read_text(encoding="utf-8"))
    assert report["device"]["kind"] == "cpu" and "bench" in report["command"]
    rivals = {"nf4": "bitsandbytes", "lora": "peft", "qlora": "peft + bitsandbytes", "finetune": "peft + bitsandbytes"}
    for name, rival in rivals.items():
        for record in report["results"][name]:
            assert record["failed"] == {} and record["contestants"][rival]["rounds"] >= 5
