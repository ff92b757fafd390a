"""What `handtuned finetune` cannot do is told in one line, before the work where that can be known."""

import json

import finetuned
import pytest
import torch
from finetuned import finetune
from tiny import make_model

from handtuned.training.logging import Metrics, draw_loss
from handtuned.training.settings import FinetuneSettings

pytest.importorskip("transformers")

model_dir, rows, finished = finetuned.model_dir, finetuned.rows, finetuned.finished


def test_pain_11_a_typo_in_targets_adapts_nothing(model_dir, rows, tmp_path, capsys):
    out = tmp_path / "out"
    assert finetune(model_dir, rows, out, "--target-modules", "q_proj", "v_prj") == 2
    message = capsys.readouterr().err
    assert "v_prj" in message and "v_proj" in message
    assert not out.exists()


@pytest.mark.parametrize("flags, message", [
    (["--lora-r", "0"], "--lora-r must be at least 1"),
    (["--lora-r", "-3"], "--lora-r must be at least 1"),
    (["--lora-r", "x"], "--lora-r"),
    (["--learning-rate", "nan"], "--learning-rate must be"),
    (["--learning-rate", "0"], "--learning-rate must be"),
    (["--lernin-rate", "1"], "did you mean --learning-rate?"),
    (["--data", "/nowhere.jsonl"], "/nowhere.jsonl"),
    (["--model", "/nowhere"], "no such model directory"),
    (["--max-seq-length", "4096"], "within the model's context"),
    (["--max-seq-length", "1"], "--max-seq-length must be at least 2, got 1"),
    (["--eval-fraction", "1"], "--eval-fraction must be in [0, 1), got 1.0"),
    (["--target-modules", "nothing"], "matches no linear layer"),
    (["--method", "fully"], "invalid choice"),
    (["--method", "full", "--lora-r", "4"], "--lora-r is of adapters, and --method full has none"),
    (["--method", "full", "--target-modules", "q_proj"], "--target-modules is of adapters"),
    (["--optim", "sgd"], "invalid choice"),
    (["--lr-scheduler", "polynomial"], "invalid choice"),
    (["--device", "cuda:77"], "cuda"),
    (["--device", "meta"], "--device must be auto, cpu, cuda or cuda:N"),
    (["--learning-rate", "-1e-3"], "--learning-rate must be a finite number above 0, got -0.001"),
    (["--max-steps", "0"], "--max-steps must be at least 1"),
    (["--rank-pattern", "q_proj"], "--rank-pattern must be of the form NAME=NUMBER, got q_proj"),
    (["--rank-pattern", "q_proj=1.5"], "--rank-pattern must be of the form NAME=NUMBER, got q_proj=1.5"),
    (["--rank-pattern", "q_porj=4"], "rank_pattern or alpha_pattern: 'q_porj' fits none"),
    (["--alpha-pattern", "q_proj=x"], "--alpha-pattern must be of the form"),
    (["--alpha-pattern", "q_proj=0"], "--alpha-pattern must give finite numbers above 0, got q_proj=0"),
    (["--requantize"], "--requantize is for experts in MXFP4, and the files hold none"),
    (["--requantize", "--method", "lora"], "--requantize makes NF4 under --method qlora, got --method lora"),
    (["--exclude-modules", "w1"], "exclude_modules: ['w1'] fits none"),
    (["--layers-to-transform", "9"], "layers_to_transform: [9] fits none"),
    (["--layers-to-transform", "x"], "--layers-to-transform"),
])  # fmt: skip
def test_bad_input_is_one_clear_line_and_exit_code_2(model_dir, rows, tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert finetune(model_dir, rows, out, *flags) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0]
    assert not out.exists(), "nothing half-written"


def test_directory_of_another_run_is_refused(model_dir, rows, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert finetune(model_dir, rows, finished) == 2
    assert "holds another run" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert finetune(model_dir, rows, rows) == 2
    assert f"--output-dir {rows} is a file" in capsys.readouterr().err


def test_no_disk_space_is_told_before_the_work(model_dir, rows, tmp_path, capsys, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    assert finetune(model_dir, rows, tmp_path / "out") == 2
    assert "no disk space" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_name_the_flag():
    with pytest.raises(ValueError, match="--lora-dropout must be in"):
        FinetuneSettings(lora_dropout=1.0)
    for more in ({"method": "full"}, {"optim": "adamw8bit"}):
        with pytest.raises(ValueError, match="not --method full or --optim adamw8bit"):
            FinetuneSettings(parallel="fsdp", **more)


def test_what_only_the_end_of_the_work_needs_is_asked_for_before(model_dir, rows, tmp_path, capsys, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    assert finetune(model_dir, rows, tmp_path / "out", "--report-to", "wandb") == 2
    assert "--report-to wandb needs its library: pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_are_lost(model_dir, rows, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--learning-rate", "1e30", "--max-grad-norm", "0", "--max-steps", "6", "--save-steps", "1"]
    assert finetune(model_dir, rows, out, *flags) == 2
    assert "step 2: the loss is nan" in capsys.readouterr().err
    (line,) = (out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["step"] == 1


def test_a_model_that_the_last_step_broke_is_no_success(model_dir, rows, tmp_path, capsys):
    out = tmp_path / "out"
    assert finetune(model_dir, rows, out, "--max-steps", "1", "--learning-rate", "1e30") == 2
    assert "not finite after the last step; a lower --learning-rate than 1e+30" in capsys.readouterr().err


def test_metrics_are_json_when_loss_scaling_skips_a_step(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for loss in (float("nan"), 1.0, 0.5):
        metrics.append({"step": 1, "loss": loss, "learning_rate": 0.1, "grad_norm": float("inf")})
    assert [row["loss"] for row in metrics.rows()] == [None, 1.0, 0.5]
    assert "NaN" not in metrics.path.read_text() and "Infinity" not in metrics.path.read_text()
    draw_loss(metrics.rows(), tmp_path / "loss.png", "")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503 bytes."),
], ids=["gpu", "cpu"])  # fmt: skip
def test_too_little_memory_is_told_with_what_would_help(model_dir, rows, tmp_path, capsys, monkeypatch, error):
    from handtuned.training.evaluation import CausalLM

    def fail(self, batch):
        raise error

    monkeypatch.setattr(CausalLM, "loss", fail)
    assert finetune(model_dir, rows, tmp_path / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "out of memory" in line and "--gradient-checkpointing" in line and "handtuned memory" in line


def test_other_runtime_errors_keep_their_traceback(model_dir, rows, tmp_path, monkeypatch):
    from handtuned.training.evaluation import CausalLM

    def fail(self, batch):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(CausalLM, "loss", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        finetune(model_dir, rows, tmp_path / "out")


CHAT = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
REFUSED = {"messages": [{"role": "system", "content": "w3"}, *CHAT["messages"]]}
PICKY = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


def test_a_row_that_the_template_refuses_is_named_by_file_and_line(tmp_path, capsys):
    place = make_model(tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(PICKY + template.read_text())
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in [CHAT] * 6 + [REFUSED] + [CHAT] * 3))
    assert finetune(place, str(data), tmp_path / "out", "--eval-fraction", "0") == 2
    assert f"{data}:7: the chat template refuses this chat: no system role" in capsys.readouterr().err
    out = tmp_path / "out"
    assert finetune(place, str(data), out, "--eval-fraction", "0", "--max-steps", "1", "--skip-bad-rows") == 0
    assert f"bad rows skipped: 1, the first: {data}:7" in capsys.readouterr().out


def test_held_out_rows_that_are_too_long_are_called_so(model_dir, rows, tmp_path, capsys):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "w1 " * 80, "completion": "w2"}))
    assert finetune(model_dir, rows, tmp_path / "out", "--eval-data", str(long)) == 2
    assert "held-out rows: nothing to learn: each of the 1 rows is too long" in capsys.readouterr().err


def test_one_row_can_be_learnt(model_dir, tmp_path, capsys):
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(CHAT))
    assert finetune(model_dir, str(one), tmp_path / "out") == 2
    assert "--eval-fraction 0" in capsys.readouterr().err
    assert finetune(model_dir, str(one), tmp_path / "out", "--eval-fraction", "0", "--max-steps", "1") == 0
