"""The benchmark command: the ceilings it compares with, what it writes and prints, what it refuses."""

import json

import pytest
import torch
from bench_command import run_bench, stay_in_this_process

from handtuned import bench
from handtuned.harness import ceilings as measured
from handtuned.harness import runner, timing

CPU = torch.device("cpu")


def ceilings(copy=10e9, rate=1e12):
    made = measured.Ceilings(CPU)
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
    monkeypatch.setattr(measured, "cache_bytes", lambda device: 2**20)
    made = measured.Ceilings(CPU, quick=True)
    assert made.bandwidth() == made.bandwidth() > 1e8
    assert made.rate(torch.float16) == made.rate(torch.float32) > 1e8, "a CPU has one ceiling, that of float32"
    assert set(made.found) == {"copy", "float32"}


# the command


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with two benchmarks, run in this process."""
    (tmp_path / "bench_double.py").write_text(
        "import torch\nfrom handtuned.harness import Case\n"
        "def same(x):\n    return lambda name, result: torch.testing.assert_close(result, 2 * x)\n"
        "def cases(device, quick):\n"
        "    assert quick is True and device.type == 'cpu'\n"
        "    ways = {'handtuned': lambda x: lambda: 2 * x, 'torch': lambda x: lambda: x + x}\n"
        "    yield Case('double', lambda: torch.randn(100_000), ways, same, bytes=800_000)\n"
        "    yield Case('again', lambda: torch.randn(100_000), ways, same, bytes=800_000, flops=100_000)\n"
    )
    (tmp_path / "bench_broken.py").write_text(
        "import torch\nfrom handtuned.harness import Case\n"
        "def cases(device, quick):\n"
        "    fail = lambda x: lambda name, result: 1 / 0\n"
        "    yield Case('broken', lambda: torch.randn(10), {'handtuned': lambda x: lambda: x}, fail, bytes=40)\n"
    )
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    stay_in_this_process(monkeypatch)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**20)
    monkeypatch.setattr(measured, "cache_bytes", lambda device: 2**20)
    return tmp_path


def run(*words):
    return run_bench("--device", "cpu", "--quick", *words)


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


def test_a_picture_that_is_not_drawn_is_told(small, capsys):
    (small / "bench_whole.py").write_text(
        "def measure(device, quick, rounds, against, share, deadline):\n"
        "    return [{'name': 'x', 'bytes': 0, 'flops': 0, 'contestants': {}, 'skipped': {}, 'failed': {}}]\n"
    )
    assert run("whole", "--plot", str(small / "out.png")) == 0
    assert not (small / "out.png").exists()
    assert "out.png was not written, as this run measured no bandwidth" in capsys.readouterr().out


def test_without_names_all_run_and_a_wrong_result_of_ours_is_an_error(small, capsys):
    assert run() == 1
    said = capsys.readouterr().out
    assert "== double" in said and "== broken" in said and "handtuned: NOT TIMED, ZeroDivisionError" in said


def test_results_so_far_are_on_disk_when_a_later_case_dies(small):
    dying = small / "bench_dying.py"
    stop = "    def stop():\n        raise KeyboardInterrupt\n    yield Case('stop', stop, ways, same)\n"
    dying.write_text((small / "bench_double.py").read_text() + stop)
    file = small / "out.json"
    with pytest.raises(KeyboardInterrupt):
        run("dying", "--json", str(file))
    assert len(json.loads(file.read_text())["results"]["dying"]) == 2


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
    monkeypatch.setattr(runner, "backend", lambda tensor: "interpreter")
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        run("double")


def test_a_folder_without_benchmarks_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"holds no bench_\*\.py: run this from a checkout.*--benchmarks DIR"):
        run()


# with processes


def test_a_benchmark_that_ends_its_process_does_not_stop_the_others(tmp_path):
    case = (
        "import os, torch\nfrom handtuned.harness import Case\n"
        "def cases(device, quick):\n"
        "    for name in ('first', 'second'):\n"
        "        yield Case(name, lambda: torch.zeros(1), {'handtuned': lambda x: RUN}, lambda x: lambda *_: None,\n"
        "                   footprint=10**12)\n"
    )
    (tmp_path / "bench_crashes.py").write_text(case.replace("RUN", "lambda: os._exit(7)"))
    (tmp_path / "bench_works.py").write_text(case.replace("RUN", "lambda: x"))
    file = tmp_path / "out.json"
    assert run("crashes", "works", "--benchmarks", str(tmp_path), "--json", str(file), "--minutes", "none") == 1
    results = json.loads(file.read_text())["results"]
    assert [record["name"] for record in results["crashes"]] == ["first", "second"]
    assert all(record["failed"] == {"handtuned": "its process ended with exit code 7"} for record in results["crashes"])
    assert [record["contestants"]["handtuned"]["rounds"] for record in results["works"]] == [5, 5]


def test_what_the_process_refuses_is_an_error_here(tmp_path):
    (tmp_path / "bench_any.py").write_text("def cases(device, quick):\n    return []\n")
    with pytest.raises(ValueError, match="--device must be auto, cpu, cuda or cuda:N, got 'tpu'"):
        run("--benchmarks", str(tmp_path), "--device", "tpu")
