"""Runs as people have them: that never train, run out of memory, go on another day, or are used by later commands."""

import datetime
import json
import os
import shutil
from pathlib import Path

import finetuned
import pytest
import torch
from finetuned import finetune
from test_tune import base, study
from tiny import make_model

from handtuned import cli
from handtuned.training import evaluation, loop

pytest.importorskip("transformers")

model_dir, rows, finished, tune_flags = finetuned.model_dir, finetuned.rows, finetuned.finished, base


def strict(path):
    """The JSON of a file, or of each line; NaN and Infinity are not JSON."""
    lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A model whose activations float32 and bfloat16 hold and float16 does not, as Gemma's and T5's."""
    from transformers import AutoModelForCausalLM

    place = make_model(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(6e5)  # 60,000 at most, which float16 holds
            layer.mlp.up_proj.weight.mul_(30)
            layer.mlp.gate_proj.weight.mul_(30)
    model.save_pretrained(place)
    return place


@pytest.mark.parametrize("steps, stopped", [(40, 20), (6, 6)], ids=["many in a row", "all there are"])
def test_a_run_that_never_trains_stops_with_one_line(overflowing, rows, tmp_path, capsys, steps, stopped):
    out = tmp_path / "out"
    flags = ["--method", "lora", "--dtype", "float16", "--max-steps", str(steps), "--save-steps", "100"]
    assert finetune(overflowing, rows, out, *flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert all(part in line for part in (f"step {stopped}:", "scale", "--dtype", "--learning-rate"))
    assert not (out / "adapter_model.safetensors").exists()
    assert all(row["loss"] is None for row in strict(out / "metrics.jsonl"))
    assert strict(out / "results.json")[0]["before"]["loss"] is None
    assert finetune(overflowing, rows, tmp_path / "fine", "--method", "lora", "--max-steps", "2") == 0


def test_a_weight_beyond_float16_is_named_before_training(overflowing, rows, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(overflowing)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(100)
    shutil.copytree(overflowing, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    flags = ["--method", "lora", "--max-steps", "2"]
    assert finetune(str(tmp_path / "model"), rows, tmp_path / "half", *flags, "--dtype", "float16") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "layers.1.mlp.down_proj.weight" in line and "--dtype" in line
    assert finetune(str(tmp_path / "model"), rows, tmp_path / "wide", *flags) == 0


def test_a_run_without_gradient_has_changed_nothing(model_dir, rows, tmp_path, capsys, monkeypatch):
    whole = evaluation.CausalLM.loss
    monkeypatch.setattr(evaluation.CausalLM, "loss", lambda self, batch: whole(self, batch) * 0)
    assert finetune(model_dir, rows, tmp_path / "out", "--max-steps", "3") == 2
    assert "step 3: no step has changed the adapters" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_held_out_scores_that_are_not_finite_are_null(model_dir, rows, tmp_path, capsys, monkeypatch):
    sums = evaluation.CausalLM.sums
    monkeypatch.setattr(evaluation.CausalLM, "sums", lambda *args: [float("nan"), *sums(*args)[1:]])
    assert finetune(model_dir, rows, tmp_path / "out", "--max-steps", "1") == 0
    scores = strict(tmp_path / "out" / "results.json")[0]
    assert scores["before"]["loss"] is None is scores["after"]["loss"] and scores["after"]["rows"] == 1
    assert "not finite" in capsys.readouterr().out


FAULTS = {
    "no memory on a GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "out of memory"),
    "no memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    "not finite": (loop.Diverged("step 2: the loss is nan"), "step 2: the loss is nan"),
}


@pytest.mark.parametrize("error, why", FAULTS.values(), ids=FAULTS)
def test_a_trial_that_fails_is_told_and_not_tried_again(tune_flags, tmp_path, capsys, monkeypatch, error, why):
    whole, tried = loop.train, []

    def train(training):
        tried.append(training.settings.lora_r)
        if training.settings.lora_r >= 16:
            raise error
        return whole(training)

    monkeypatch.setattr(loop, "train", train)
    words = ["--search", "lora-r", "--trials"]
    result = study(tune_flags, tmp_path / "a", *words, "7")
    said = capsys.readouterr().out
    failed = [row for row in result["trials"] if row["state"] == "fail"]
    assert failed and len(result["trials"]) == len(tried) == 7 and result["best"]["state"] == "complete"
    assert all(row["failed"] == why and row["settings"]["lora_r"] >= 16 for row in failed)
    assert said.count(f"failed: {why}") == len(failed) and "whole run: handtuned finetune" in said
    assert strict(tmp_path / "a" / "trials.json")[0] == result and strict(tmp_path / "a" / "study.log")
    again = study(tune_flags, tmp_path / "a", *words, "8", "--resume")
    assert len(tried) == 8 and again["trials"][:7] == result["trials"], "the one more, and none of the failed"


def test_a_study_in_which_all_trials_fail_says_why(tune_flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.CausalLM, "score", lambda self, examples: {"loss": float("nan"), "exact_match": 0.0})
    assert cli.main(["tune", *tune_flags, "--output-dir", str(tmp_path / "a"), "--trials", "2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "no trial was finished; trial 0 failed: step 1: the loss on held-out rows is nan" in line


def test_a_run_goes_on_another_day_from_a_file_that_was_touched_and_moved(tmp_path, rows, monkeypatch):
    """The template writes the date; the file has another time and is named from another directory."""
    import transformers.utils.chat_template_utils as utils

    place = make_model(tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }} " + template.read_text())
    data = tmp_path / "rows.jsonl"
    data.write_text(Path(rows).read_text())
    for name, flags in (("whole", ["--max-steps", "4"]), ("parts", ["--max-steps", "4", "--save-steps", "2"])):
        assert finetune(place, str(data), tmp_path / name, *flags) == 0

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) + datetime.timedelta(days=1)

    monkeypatch.setattr(utils, "datetime", Tomorrow)
    os.utime(data, (1, 1))
    out = tmp_path / "parts"
    monkeypatch.chdir(tmp_path)
    assert cli.main(["finetune", "--resume", str(out / "checkpoint-2")]) == 0
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()


def test_later_commands_remember_how_rows_and_model_were_read(model_dir, tmp_path, capsys):
    """Names of columns, bad rows skipped, the longest row, the dtype."""
    lines = [json.dumps({"question": f"w{n}", "answer": " ".join([f"w{n}"] * (1 + 20 * (n % 2)))}) for n in range(12)]
    data, held_out, out = tmp_path / "rows.jsonl", tmp_path / "held.jsonl", tmp_path / "out"
    data.write_text("\n".join(lines))
    held_out.write_text("\n".join(["{", *lines]))
    flags = ["--columns", "prompt=question,completion=answer", "--skip-bad-rows", "--dtype", "bfloat16",
             "--max-seq-length", "12", "--eval-data", str(held_out), "--max-steps", "1"]  # fmt: skip
    assert finetune(model_dir, str(data), out, *flags) == 0
    assert "rows truncated to max_seq_length 12 tokens: 6" in capsys.readouterr().out
    assert cli.main(["merge", "--adapter", str(out), "--out", str(tmp_path / "merged"), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "loss on 12 held-out rows" in said.out and "not, bit for bit" not in said.err
    assert cli.main(["generate", "--adapter", str(out), "--device", "cpu", "w1"]) == 0
    assert "not, bit for bit" not in capsys.readouterr().err


def test_what_is_learnt_is_a_setting(model_dir, rows, tmp_path, capsys):
    learnt = {}
    for train_on in ("all", "answers", "last"):
        assert finetune(model_dir, rows, tmp_path / train_on, "--max-steps", "1", "--train-on", train_on) == 0
        learnt[train_on] = strict(tmp_path / train_on / "metrics.jsonl")[0]["answer_tokens"]
    assert learnt["all"] > learnt["answers"] == learnt["last"], "one answer per row"
    text = tmp_path / "rows.txt"
    text.write_text("w1 w2 w3\n\nw4 w5\n")
    capsys.readouterr()
    assert finetune(model_dir, str(text), tmp_path / "text", "--max-steps", "1", "--train-on", "all") == 0
    assert ">> w2 w3 <|end|><<" in capsys.readouterr().out.replace(">>w2", ">> w2")
    assert finetune(model_dir, str(text), tmp_path / "no", "--max-steps", "1") == 2
    assert f"{text}:1: a text in which no answer is marked" in capsys.readouterr().err


def test_several_files_are_remembered_by_a_run(model_dir, rows, tmp_path, capsys):
    out, both = tmp_path / "out", [rows, f"{rows}:0.5"]
    assert finetune(model_dir, rows, out, "--data", both[1], "--max-steps", "1") == 0
    assert strict(out / "run.json")[0]["settings"]["data"] == both
    assert cli.main(["finetune", "--resume", str(out), "--data", *both]) == 0
    assert cli.main(["finetune", "--resume", str(out), "--data", rows]) == 2
    assert "--data was" in capsys.readouterr().err
    assert finetune(model_dir, rows, tmp_path / "no", "--columns", "prompt") == 2
    assert "--columns must be of the form prompt=NAME,completion=NAME, got 'prompt'" in capsys.readouterr().err
