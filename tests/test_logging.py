"""`--report-to`: what reaches TensorBoard and Weights & Biases."""

import sys
import types

import pytest
import torch
from handtuned.nn import apply_lora_to_model, variants

from handtuned.training.logging import Reporter, check_reporter, command_line, plan
from handtuned.training.settings import FinetuneSettings

ROWS = [{"step": 1, "loss": 2.0, "learning_rate": 1e-3}, {"step": 2, "loss": 1.5, "learning_rate": 5e-4}]


def report(kind, directory):
    reporter = Reporter(kind, directory, {"lora_r": 8})
    for row in ROWS:
        reporter.log(row)
    reporter.close()


def test_tensorboard_files_hold_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = Reporter("tensorboard", tmp_path, {})
    for row in ROWS:
        reporter.log(row)  # and never closed, as where a run is stopped
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/learning_rate"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.5)]


def test_wandb_gets_settings_rows_and_an_end(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append("finished")
    )
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    report("wandb", tmp_path)
    assert calls[0] == {"project": "handtuned", "dir": str(tmp_path), "config": {"lora_r": 8}}
    assert calls[1] == (1, {"train/loss": 2.0, "train/learning_rate": 1e-3})
    assert calls[-1] == "finished" and len(calls) == 4


def test_wandb_without_a_key_is_one_line(tmp_path, monkeypatch):
    class UsageError(Exception):
        pass

    def init(**options):
        raise UsageError("api_key not configured (no-tty). Run wandb login.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(ValueError, match="--report-to wandb: UsageError: api_key not configured"):
        report("wandb", tmp_path)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_library_is_named(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ValueError, match=f"--report-to {kind} needs its library: pip install {kind}"):
        check_reporter(kind)


def test_none_writes_nothing(tmp_path):
    report("none", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start, trainable", [(lambda model: None, 20), (variants.dora_init, 26),
                                              (variants.pissa_init, 20)], ids=["LoRA", "DoRA", "PiSSA"])  # fmt: skip
def test_the_plan_counts_the_model_without_its_adapters(start, trainable):
    model = apply_lora_to_model(torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False)), 2, 4.0, ["0"])
    start(model)
    base = types.SimpleNamespace(model=model, examples=[], held_out=types.SimpleNamespace(examples=[]),
                                 device=torch.device("cpu"), dtype=torch.float32)  # fmt: skip
    told = plan(FinetuneSettings(method="lora", learning_rate=1e-3), base, 1)
    assert "smollm2: 24 parameters" in told and f"{trainable} parameters ({trainable / 0.24:.2f} %)" in told


def test_the_command_under_torchrun(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/handtuned/__main__.py", "finetune", "--data", "my rows.jsonl"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert command_line() == "handtuned finetune --data 'my rows.jsonl'"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command_line() == "torchrun --nproc-per-node 2 -m handtuned finetune --data 'my rows.jsonl'"
