"""Relative paths hold from any directory: for generate, merge, --resume, tune and peft."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import finetuned
import pytest
from finetuned import COMMON
from safetensors.torch import load_file

from handtuned import cli
from handtuned.training.sources import located

pytest.importorskip("transformers")

model_dir, rows = finetuned.model_dir, finetuned.rows


@pytest.fixture
def home(model_dir, rows, tmp_path, monkeypatch):
    """A directory with a model and rows in it, in which a run begins."""
    place = tmp_path / "home"
    shutil.copytree(model_dir, place / "model")
    for name in ("rows.jsonl", "held.jsonl"):
        shutil.copy(rows, place / name)
    monkeypatch.chdir(place)
    return place


def begin(out, *flags):
    return cli.main(["finetune", "--model", "./model", "--data", "rows.jsonl:2", "rows.jsonl", "--eval-data",
                     "held.jsonl", "--output-dir", out, *COMMON, *flags])  # fmt: skip


def test_a_run_is_used_from_another_directory(home, tmp_path, monkeypatch, capsys):
    assert begin("whole", "--max-steps", "4") == 0 and begin("run", "--max-steps", "4", "--save-steps", "2") == 0
    record = json.loads((home / "run" / "handtuned.json").read_text())
    assert record["model"] == "./model" and record["eval_data"] == "held.jsonl"
    assert record["paths"] == {"model": str(home / "model"), "eval_data": str(home / "held.jsonl")}
    run = json.loads((home / "run" / "run.json").read_text())
    assert run["settings"]["model"] == "./model" and run["settings"]["data"] == ["rows.jsonl:2", "rows.jsonl"]
    assert run["paths"]["data"] == [f"{home}/rows.jsonl:2", f"{home}/rows.jsonl"]
    base = json.loads((home / "run" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(home / "model")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "model").mkdir(parents=True)  # another thing of the same name
    monkeypatch.chdir(elsewhere)
    adapter = ["--adapter", "../home/run", "--device", "cpu"]
    assert cli.main(["generate", *adapter, "--max-new-tokens", "2", "w1"]) == 0
    capsys.readouterr()
    assert cli.main(["merge", *adapter, "--out", "merged"]) == 0
    said = capsys.readouterr()
    assert "held-out rows: " in said.out and "not measured" not in said.err
    shutil.rmtree(home / "run" / "checkpoint-4")
    assert cli.main(["finetune", "--resume", "../home/run", "--model", "../home/model"]) == 0
    whole, resumed = (load_file(home / name / "adapter_model.safetensors") for name in ("whole", "run"))
    assert all((whole[name] == resumed[name]).all() for name in whole)
    assert cli.main(["finetune", "--resume", "../home/run", "--model", "model"]) == 2
    assert "--model was" in capsys.readouterr().err


def test_peft_finds_the_base(home, tmp_path):
    pytest.importorskip("peft")
    assert begin("run", "--max-steps", "1") == 0
    code = "from peft import AutoPeftModelForCausalLM as M; import sys; M.from_pretrained(sys.argv[1])"
    words = [sys.executable, "-c", code, str(home / "run")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr


def test_a_study_goes_on_from_another_directory(home, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    words = ["tune", "--model", "model", "--data", "rows.jsonl", "--eval-data", "held.jsonl", "--max-steps", "2",
             "--search", "lora-r", *COMMON]  # fmt: skip
    assert cli.main([*words, "--output-dir", "study", "--trials", "1"]) == 0
    assert json.loads((home / "study" / "tune.json").read_text())["paths"]["model"] == str(home / "model")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", "--output-dir", "home/study", "--trials", "2", "--resume"]) == 0
    assert len(json.loads((home / "study" / "trials.json").read_text())["trials"]) == 2


def test_a_moved_home_is_found_by_what_was_typed(home, tmp_path, monkeypatch):
    assert begin("run", "--max-steps", "1") == 0
    shutil.move(home, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert cli.main(["generate", "--adapter", "run", "--device", "cpu", "--max-new-tokens", "2", "w1"]) == 0


def test_what_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("")
    Path("smollm2").mkdir()
    full = str(tmp_path / "rows.jsonl")
    assert located("rows.jsonl") == located("./rows.jsonl") == located(full) == full
    assert located("rows.jsonl:0.5") == f"{full}:0.5" and located(["rows.jsonl", "org/rows"]) == [full, "org/rows"]
    assert [located(name) for name in ("smollm2", "org/model", "-", None)] == [None] * 4
    monkeypatch.setenv("HOME", str(tmp_path))
    assert located("~/rows.jsonl") == full
