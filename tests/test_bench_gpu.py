"""What the benchmarks do on a GPU only, run on a CPU: tensors asked of "cuda" are made here, and events stamp a time
of their own. It shows wrong names and orders, not what a GPU would answer."""

import io
import json
import sys
import types

import pytest
import torch
from bench_command import BENCHMARKS, run_bench, script, stay_in_this_process
from torch.overrides import TorchFunctionMode

from handtuned.harness import ceilings, runner, timing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
UUID = "12345678-0000-0000-0000-000000000000"


class OnCpu(TorchFunctionMode):
    """Takes "cuda" for "cpu" wherever torch is called."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        here = lambda value: CPU if isinstance(value, torch.device) and value.type == "cuda" else value  # noqa: E731
        return function(*map(here, args), **{key: here(value) for key, value in (kwargs or {}).items()})


class FakeGpu:
    """Calls take 2 ms of the device's time, whatever the host does."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        self.properties = types.SimpleNamespace(
            name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=140 * 2**30, uuid=UUID,
            L2_cache_size=1)  # fmt: skip
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.log.append("event")
                self.at = gpu.now

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3 or 1.0  # what calls nothing of ours takes 1 ms

        stands_in = {
            "Event": Event,
            "synchronize": lambda device=None: self.log.append("wait"),
            "_sleep": lambda cycles: self.log.append(("sleep", cycles)),
            "set_device": lambda device: self.log.append("set_device"),
            "empty_cache": lambda: self.log.append("empty_cache"),
            "get_device_properties": lambda device: self.properties,
            "get_device_capability": lambda device=None: (9, 0),
            "max_memory_allocated": lambda device=None: 123_000_000,
            "reset_peak_memory_stats": lambda device=None: self.log.append("reset"),
        }
        for name, stand_in in stands_in.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)  # raises where torch has no such name

    def call(self):
        self.log.append("call")
        self.now += 2e-3


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch)


def kinds(log):
    return [entry[0] if isinstance(entry, tuple) else entry for entry in log]


def test_a_gpu_is_timed_by_events_behind_a_sleep(gpu):
    seconds, host = timing.turn(CUDA, [gpu.call] * 3, lead=1e-3)
    assert kinds(gpu.log) == ["wait", "sleep", "event", "call", "call", "call", "event", "wait"]
    assert seconds == pytest.approx(2e-3) and host is None
    timing.turn(CUDA, [gpu.call], lead=100.0)
    longest = max(entry[1] for entry in gpu.log if isinstance(entry, tuple))
    assert longest <= 0.1 * timing.SLEEP_CYCLES, "the device never sleeps longer than a tenth of a second"


def test_the_time_of_the_host_is_taken_while_the_device_is_awake(gpu):
    """A call that waits for the device would wait for its sleep too."""
    host = timing.turn(CUDA, [gpu.call])[1]
    assert kinds(gpu.log) == ["wait", "event", "call", "event", "wait"] and 0 < host < 2e-3
    waited = []

    def waits():
        asleep = [entry for entry in gpu.log if entry[0] == "sleep"]
        waited.append(len(asleep))
        if asleep:
            timing.time.sleep(0.03)
        gpu.call()

    taken = timing.take_turns({"a": [waits]}, 3, CUDA, least=0.0)["a"]
    assert max(waited) > 0 and taken["host"] < 0.02 and taken["rounds"] == 3


def test_take_turns_on_a_gpu_repeats_short_calls(gpu):
    times = timing.take_turns({"a": [gpu.call]}, 4, CUDA, least=9e-3)
    assert times["a"]["calls"] == 5 and times["a"]["median"] == pytest.approx(2e-3)


# the command

DOUBLE = """
import torch
from handtuned.harness import Case

def same(x):
    return lambda name, result: torch.testing.assert_close(result, 2 * x)

def cases(device, quick):
    assert device.type == "cuda"
    ways = {"handtuned": lambda x: lambda: 2 * x, "torch": lambda x: lambda: x + x}
    for name, flops in (("double", 0), ("again", 1000)):
        yield Case(name, lambda: torch.randn(1000, device=device), ways, same, bytes=8000, flops=flops)
"""


@pytest.fixture
def command(gpu, tmp_path, monkeypatch):
    """Run `bench --device cuda` over scripts; gives its exit code and report."""
    stay_in_this_process(monkeypatch)
    monkeypatch.setattr(runner, "choose_device", lambda device: CUDA)
    rate = ceilings.Ceilings.rate
    monkeypatch.setattr(ceilings.Ceilings, "rate", lambda self, dtype: rate(ceilings.Ceilings(CPU, True), dtype))

    def asked(words, **options):
        assert words[0] == "nvidia-smi" and f"--id=GPU-{UUID}" in words
        return types.SimpleNamespace(stdout="570.1, 1980 MHz, 1980 MHz, 3201 MHz, 40, 90.00 W\n", returncode=0)

    monkeypatch.setattr(runner.subprocess, "run", asked)

    def run(scripts, *words):
        for name, text in scripts.items():
            (tmp_path / f"bench_{name}.py").write_text(text)
        file = tmp_path / "gpu.json"
        with OnCpu():
            code = run_bench(*scripts, "--benchmarks", tmp_path, "--quick", "--json", file,
                             "--plot", tmp_path / "gpu.png", *words)  # fmt: skip
        return code, json.loads(file.read_text(encoding="utf-8"))

    return run


def test_the_command_on_a_gpu(command, gpu, tmp_path, capsys):
    code, report = command({"double": DOUBLE})
    assert code == 0 and report["device"]["kind"] == "cuda" and report["device"]["arch"] == "sm_90"
    assert report["device"]["before"]["driver_version"] == "570.1"
    assert report["device"]["after"] == {"double": report["device"]["before"]}
    assert [sorted(record["contestants"]) for record in report["results"]["double"]] == [["handtuned", "torch"]] * 2
    assert "copy" in report["ceilings"] and (tmp_path / "gpu.png").stat().st_size > 1000
    assert gpu.log.count("set_device") == 1 and gpu.log.count("empty_cache") == 2
    page = runner.load(BENCHMARKS / "tables.py").render(report)
    assert "NVIDIA H200 (sm_90), driver 570.1, clocks seen 1980 MHz" in page


def test_a_gpu_of_which_nvidia_smi_knows_nothing_is_described_all_the_same(gpu, monkeypatch):
    missing = lambda *_, **__: (_ for _ in ()).throw(OSError())  # noqa: E731
    monkeypatch.setattr(runner.subprocess, "run", missing)
    about = runner.describe(CUDA)
    assert about["name"] == "NVIDIA H200" and about["before"] == {}


def lost_after(monkeypatch, times):
    """The GPU answers that often and then refuses."""
    left = [times]

    def synchronize(device=None):
        left[0] -= 1
        if left[0] < 0:
            raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


def test_a_lost_gpu_goes_on_in_a_new_process(command, monkeypatch):
    """It is lost in the first case: that is reported, the second is named, the other benchmark runs elsewhere."""
    asked = []

    def processes(args, names, stop):
        asked.append((args, names))
        if len(asked) == 1:
            yield from runner.run_benchmarks(args, names)
        else:
            yield "records", ("later", [runner.untimed("from the new process")], {"copy": 7.0})

    monkeypatch.setattr(runner, "in_a_process", processes)
    lost_after(monkeypatch, 0)
    code, report = command({"double": DOUBLE, "later": DOUBLE}, "--rounds", "4")
    first, second = report["results"]["double"]
    assert code == 1 and "AcceleratorError" in first["failed"]["handtuned"]
    assert second["name"] == "again" and second["skipped"] == {"all": "an earlier error lost the GPU"}
    assert report["results"]["later"][0]["name"] == "from the new process" and report["ceilings"] == {"copy": 7.0}
    assert [names for _, names in asked] == [["double", "later"], ["later"]]
    assert asked[1][0].deadline == asked[0][0].deadline and asked[1][0].rounds == 4, "what is left of the time, no more"


def test_a_new_process_that_fails_too_is_named(command, monkeypatch):
    processes = iter([runner.run_benchmarks, lambda args, names: [("died", -6)]])
    monkeypatch.setattr(runner, "in_a_process", lambda args, names, stop: next(processes)(args, names))
    lost_after(monkeypatch, 0)
    code, report = command({"double": DOUBLE, "later": DOUBLE})
    assert code == 1
    assert report["results"]["later"][0]["failed"] == {"handtuned": "its process ended with exit code -6"}


# the scripts: what their cases do on a GPU, in small


def small_cases():
    lora, qlora, nf4 = map(script, ("lora", "qlora", "nf4"))
    yield lora.case(16, 64, 64, 16, torch.bfloat16, CUDA)
    yield qlora.case(16, 64, 64, 16, torch.bfloat16, CUDA, training=True)
    yield qlora.case(4, 64, 64, 16, torch.bfloat16, CUDA, training=False)
    yield nf4.case(64, 64, torch.bfloat16, CUDA, True)
    yield script("nf4_quantize").case(64, 64, torch.bfloat16, CUDA, False)
    yield script("nf4_matmul").case(4, 64, 64, torch.bfloat16, CUDA)
    yield script("lora_gemms").case(16, 64, 64, 16, torch.bfloat16, CUDA)
    yield script("dropout").case(16, 64, CUDA)
    yield script("matmul").case(32, CUDA)
    yield script("nf4_experts").case(8, 2, 4, 64, 64, torch.bfloat16, CUDA)
    yield script("adamw").case("adapter", [(8, 64), (64, 8)], CUDA, False)
    yield script("adamw").case("adapter", [(8, 64), (64, 8)], CUDA, True)
    yield script("unscale").case("eight weights", [(64, 64)] * 2, torch.float16, CUDA)
    yield script("loss").case(16, 64, 300, torch.bfloat16, CUDA)


def test_the_cases_of_a_gpu_are_checked_and_timed(gpu):
    with OnCpu():
        for case in small_cases():
            record = timing.run_case(case, CUDA, ("torch", "peft", "bitsandbytes"), rounds=1)
            assert set(record["failed"]) <= {"bitsandbytes 8-bit"}, case.name  # its 8-bit optimizer needs a GPU
            assert "handtuned" in record["contestants"] and record["contestants"]["handtuned"]["rounds"] == 1


def test_every_gpu_case_can_be_made_and_names_its_rivals(gpu):
    for name, rivals in {"lora": {"peft", "peft autocast", "unsloth"}, "loss": {"torch", "liger"},
                         "qlora": {"peft + bitsandbytes", "unsloth + bitsandbytes"}, "nf4": {"bitsandbytes"},
                         "nf4_quantize": {"bitsandbytes"}, "nf4_matmul": {"bitsandbytes"}, "lora_gemms": {"torch"},
                         "nf4_stream": {"bitsandbytes"}, "nf4_experts": {"dense weights"}, "dropout": {"torch"},
                         "adamw": {"torch fused", "torch foreach"}, "unscale": {"torch"}}.items():  # fmt: skip
        full, quick = (list(script(name).cases(CUDA, quick)) for quick in (False, True))
        assert len(full) >= len(quick) >= 1 and rivals <= set(full[0].providers)
        assert {case.name for case in quick} & {case.name for case in full} or name == "loss"


@pytest.mark.parametrize("name", ["handtuned", "peft"])
def test_a_training_process_reports_the_gpus_peak(gpu, name, tmp_path, monkeypatch, capsys):
    finetune = script("finetune")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=1100, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    ids = torch.randint(0, 1000, (2, 2, 16))
    torch.save((ids, ids.clone()), tmp_path / "batches.pt")
    job = {"model": str(tmp_path), "random": True, "device": "cuda", "batches": str(tmp_path / "batches.pt")}
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\ngo\n"))
    with OnCpu():
        finetune.serve(name, job)
    ready, *steps = capsys.readouterr().out.strip().splitlines()
    assert ready == "ready" and [json.loads(step)["peak"] for step in steps] == [123_000_000] * 2
    assert "reset" in gpu.log and "wait" in gpu.log


def test_a_gpu_that_is_too_small_for_three_gets_smaller_batches(gpu):
    finetune = script("finetune")
    assert finetune.shape(CUDA) == (16, 512)
    gpu.properties.total_memory = 15 * 2**30
    assert finetune.shape(CUDA) == (4, 512) and finetune.shape(CPU) == (4, 128)
