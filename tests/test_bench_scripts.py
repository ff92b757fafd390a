"""The benchmark scripts of this repository: every provider's result is right, in the cases of a CPU and of a GPU."""

import pytest
import torch
from bench_command import BENCHMARKS, script

from handtuned.harness import runner, timing

CPU = torch.device("cpu")
HERE = ("torch", "peft", "bitsandbytes")  # rivals that run on a CPU; the others: test_rivals.py
NAMES = ["nf4", "nf4_quantize", "nf4_stream", "nf4_matmul", "nf4_experts", "lora", "lora_gemms", "qlora", "matmul",
         "matmul_tma", "dropout", "adamw", "unscale", "loss"]  # fmt: skip


def test_every_script_is_found_and_offers_cases():
    found = runner.found_benchmarks(BENCHMARKS)
    assert {*NAMES, "finetune"} == set(found)
    for name, path in found.items():
        module = runner.load(path)
        assert hasattr(module, "cases") != hasattr(module, "measure"), name


@pytest.mark.parametrize("name", NAMES)
def test_all_providers_of_the_quick_cases_agree(name, monkeypatch):
    """Every rival's result is right and no case raises; times on this machine do not matter here."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    for case in script(name).cases(CPU, True):
        record = timing.run_case(case, CPU, HERE, rounds=1)
        assert record["failed"] == {}, case.name
        assert "handtuned" in record["contestants"] and case.bytes > 0


def test_the_gpu_cases_can_be_run_on_small_sizes(monkeypatch):
    """Code paths that only a GPU's cases take: low precision, dropout, a few rows, scales in fp32."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    lora, qlora, nf4, matmul = map(script, ("lora", "qlora", "nf4", "matmul"))
    cases = [
        lora.case(64, 128, 64, 16, torch.bfloat16, CPU),
        lora.case(512, 128, 64, 8, torch.float32, CPU, dropout=0.05),
        qlora.case(64, 128, 64, 16, torch.bfloat16, CPU, training=True),
        qlora.case(4, 128, 64, 16, torch.bfloat16, CPU, training=False),
        nf4.case(64, 128, torch.bfloat16, CPU, False),
        script("nf4_quantize").case(64, 128, torch.bfloat16, CPU, True),
        script("nf4_matmul").case(4, 64, 128, torch.bfloat16, CPU),
        script("lora_gemms").case(64, 128, 64, 16, torch.bfloat16, CPU),
        matmul.case(64, CPU),
        script("unscale").case("adapter", [(64, 8)] * 3, torch.float16, CPU),
        script("loss").case(32, 64, 500, torch.bfloat16, CPU),
    ]
    for case in cases:
        record = timing.run_case(case, CPU, HERE, rounds=1)
        assert record["failed"] == {}, case.name


def test_cases_name_operations_that_xray_knows(monkeypatch):
    from handtuned.gpu.operations import OPERATIONS

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for name in NAMES:
        for device in (CPU, torch.device("cuda")):
            for case in script(name).cases(device, False):
                assert not case.kernel or case.kernel in OPERATIONS, case.kernel


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


def test_finetune_records_a_provider_that_dies(monkeypatch, tmp_path):
    """Every child dies at once: the record tells why, and no time is made up."""
    finetune = script("finetune")
    monkeypatch.setattr(finetune, "smollm2", lambda: tmp_path / "nowhere")
    monkeypatch.setattr(finetune, "batches", lambda *_: (torch.zeros(2), torch.zeros(2)))
    monkeypatch.setattr(finetune, "PROVIDERS", ("handtuned",))
    [record] = finetune.measure(CPU, True, 1, timing.RIVALS)
    assert record["contestants"] == {} and "nowhere" in record["failed"]["handtuned"]


@pytest.mark.slow
def test_finetune_on_random_weights_of_the_same_shape(monkeypatch):
    """What runs on a machine that has no copy of the weights."""
    finetune = script("finetune")

    def absent():
        raise ValueError("offline")

    monkeypatch.setattr(finetune, "smollm2", absent)
    [record] = finetune.measure(CPU, True, 2, timing.RIVALS)
    assert "random weights" in record["name"] and record["failed"] == {}
    assert set(record["contestants"]) | set(record["skipped"]) == set(finetune.PROVIDERS)
    assert len(record["contestants"]["handtuned"]["losses"]) == 3


def test_generating_is_timed_beside_peft_and_dense_torch(tmp_path):
    import generate
    from tiny import make_model

    page, model = tmp_path / "generate.md", make_model(tmp_path / "model")
    generate.main(["--model", model, "--turns", "1", "--prompt", "5", "--new", "3", "--out", str(page)])
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.endswith(" × |")]
    assert len(rows) == 6 and all(float(cells[1]) > 0 for cells in rows)
    assert [cells[2] for cells in rows if "PEFT" in cells[0]] == ["1.00 × |"] * 2
