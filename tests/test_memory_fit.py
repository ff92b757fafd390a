"""`--memory-budget`: what was promised is kept, no more is given up than needed, and a resumed run goes on alike."""

import json
from pathlib import Path

import finetuned
import pytest
import torch
from finetuned import finetune, losses
from handtuned.nn.live_memory import LiveMemory
from tiny import make_model

from handtuned.memory.breakdown import Breakdown, Component
from handtuned.memory.fit import choose, fit
from handtuned.training import loop
from handtuned.training.models import add_adapters, load_base_and_rows
from handtuned.training.settings import FinetuneSettings, parse_size
from handtuned.training.sources import cache_directory

pytest.importorskip("transformers")
model_dir, rows = finetuned.model_dir, finetuned.rows


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model whose activations are most of what it takes, and rows of one length."""
    place = tmp_path_factory.mktemp("deep")
    data = place / "rows.jsonl"
    chat = [{"role": "user", "content": " ".join(["w1"] * 40)}, {"role": "assistant", "content": "w2 w3"}]
    data.write_text(f"{json.dumps({'messages': chat})}\n" * 16)
    return make_model(place / "model", num_hidden_layers=6, intermediate_size=192), str(data)


def run(model, data, budget, steps=2, **settings):
    """(peak in bytes of a run's steps, as counted; its `MemoryPlan`)."""
    settings = {"max_seq_length": 64, "per_device_train_batch_size": 4, "method": "lora"} | settings
    settings = FinetuneSettings(model=model, data=data, device="cpu", max_steps=steps, learning_rate=1e-3,
                                eval_fraction=0.0, memory_budget=budget, **settings)  # fmt: skip
    base = load_base_and_rows(settings, torch.device("cpu"), "cpu")
    add_adapters(base.model, settings)
    training = loop.prepare(base, settings, steps)
    training.settings, plan = fit(settings, base, training, steps, Path("nowhere"))
    tensors = [*base.model.parameters(), *base.model.buffers()]
    there = sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())
    with LiveMemory(scan=False) as memory:
        list(loop.train(training))
    return there + memory.peak_added, plan


@pytest.mark.parametrize(("method", "dtype"), [("lora", "float32"), ("qlora", "float32"), ("lora", "bfloat16")])
def test_three_budgets_are_kept(deep, method, dtype):
    """The peak is within 5 % of what was promised, and never above the budget; less memory costs more FLOPs."""
    whole, _ = run(*deep, None, method=method, dtype=dtype)
    costs = []
    for part in (0.9, 0.7, 0.5):
        peak, plan = run(*deep, f"{int(part * whole)}B", method=method, dtype=dtype)
        assert peak <= part * whole and peak == pytest.approx(plan.peak, rel=0.05)
        costs.append((-plan.rows, plan.extra_flops))
    assert costs == sorted(set(costs)) and costs[0][1] > 0


def price(rows, recomputed):
    """Ten layers of 100 bytes per row, 10 once recomputed, beside 50 that stay."""
    peak = 50 + rows * (100 * (10 - len(recomputed)) + 10 * len(recomputed))
    layers = {f"layers.{i}": 1.0 for i in range(10)}
    flops = 300 + 10 * len(recomputed)
    return Breakdown("", {"all": Component(peak, peak)}, {"loss": peak}, 1, 1, flops=flops, layers=layers)


@pytest.mark.parametrize(
    ("budget", "rows", "recomputed"),
    [(4050, 4, 0), (4049, 4, 1), (4050 - 9 * 360, 4, 9), (450, 4, 10), (449, 2, 9), (150, 1, 10)],
)
def test_no_more_is_given_up_than_needed(budget, rows, recomputed):
    plan = choose(budget, 4, price)
    assert (plan.rows, len(plan.recomputed)) == (rows, recomputed)
    assert plan.recomputed == tuple(f"layers.{i}" for i in range(recomputed)), "the first: those behind have gone"
    assert plan.extra_flops == pytest.approx(recomputed / 30) and plan.peak <= budget


def test_what_cannot_fit_is_refused_with_what_would_do(deep):
    with pytest.raises(ValueError, match=r"--memory-budget must be at least 0.00 MB = .* got 0.00 MB"):
        choose(149, 4, price)
    with pytest.raises(ValueError, match="--memory-budget must be at least") as refused:
        run(*deep, "1KB")
    least = float(str(refused.value).split("at least ")[1].split(" MB")[0])
    _, plan = run(*deep, f"{least * 1.03:.2f}MB")
    assert plan.rows == 1 and len(plan.recomputed) >= 5


def test_a_budget_changes_no_loss_and_a_resumed_run_keeps_the_plan(deep, tmp_path, capsys):
    whole, _ = run(*deep, None, method="qlora")
    budget = ["--memory-budget", f"{int(0.6 * whole)}B"]
    curves = {}
    for name, flags in (("plain", []), ("tight", budget)):
        assert finetune(*deep, tmp_path / name, "--max-steps", "4", "--eval-fraction", "0", *flags) == 0
        curves[name] = losses(tmp_path / name)
    assert "layers recomputed" in capsys.readouterr().out
    torch.testing.assert_close(torch.tensor(curves["tight"]), torch.tensor(curves["plain"]), rtol=1e-5, atol=1e-5)
    flags = ["--max-steps", "4", "--eval-fraction", "0", "--save-steps", "2"]
    assert finetune(*deep, tmp_path / "half", *flags, *budget) == 0
    (tmp_path / "half" / "checkpoint-4").rename(tmp_path / "gone")
    plan = json.loads((tmp_path / "half" / "results.json").read_text())["memory"]
    assert finetune(*deep, tmp_path / "half", "--resume") == 0
    assert json.loads((tmp_path / "half" / "results.json").read_text())["memory"] == plan
    assert losses(tmp_path / "half") == curves["tight"]


def test_sizes():
    assert parse_size("memory_budget", "8GB") == 8 * 10**9 and parse_size("memory_budget", "8GiB") == 8 * 2**30
    assert parse_size("memory_budget", "512KB") == 512_000 and parse_size("memory_budget", "123B") == 123
    with pytest.raises(ValueError, match=r"--memory-budget must be a size such as 24GB, .* got 'much'"):
        FinetuneSettings(memory_budget="much")


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("budget", ["1.1GB", "0.9GB", "0.7GB"])
def test_three_budgets_on_smollm2(budget):
    directory = cache_directory() / "SmolLM2-135M-Instruct"
    if not directory.is_dir():
        pytest.skip("SmolLM2 is not in the cache")
    peak, plan = run(str(directory), None, budget, max_seq_length=512, per_device_train_batch_size=8)
    print(f"{plan}; counted {peak:,} bytes")
    assert peak <= plan.budget and peak == pytest.approx(plan.peak, rel=0.05)
