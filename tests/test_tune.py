"""`handtuned tune` on a tiny model: budget, seed, resuming, the front, the verdict, bad input."""

import json
import logging
from pathlib import Path

import pytest
import tiny

pytest.importorskip("optuna")
pytest.importorskip("transformers")

from handtuned import tune as tuning
from handtuned.cli import main
from handtuned.training import loop
from handtuned.training import trials as reports
from handtuned.training.settings import FinetuneSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("tune")
    model = tiny.make_model(place / "model")
    return ["--model", model, "--data", tiny.write_rows(place / "rows.jsonl"), "--eval-fraction", "0.3",
            "--max-steps", "4", "--batch-size", "4", "--learning-rate", "1e-2", "--max-seq-length", "64"]  # fmt: skip


def study(base, directory, *words):
    assert main(["tune", *base, "--output-dir", str(directory), *words]) == 0
    return json.loads((Path(directory) / "trials.json").read_text())


def test_a_study_ends_no_worse_than_it_began_and_can_be_gone_on_with(base, tmp_path, capsys):
    from safetensors import safe_open

    result = study(base, tmp_path / "a", "--trials", "4")
    said = capsys.readouterr().out
    assert result["best"]["loss"] <= result["first"]["loss"]
    first = result["first"]
    assert first["number"] == 0 and first["settings"]["lora_r"] == 8 and first["settings"]["learning_rate"] == 1e-2
    assert len(result["trials"]) == 4
    for part in ("4 held-out rows choose, 3 are kept", "whole run: handtuned", "--lora-r", "pareto.png"):
        assert part in said
    assert (tmp_path / "a" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a" / "best" / "adapter_model.safetensors").exists()
    with safe_open(tmp_path / "a" / "best" / "adapter_model.safetensors", "pt") as file:
        trained = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert result["best"]["bytes"] == 16 * trained, "themselves, gradients and AdamW's moments in FP32"
    for row in result["trials"]:
        assert row["steps"] == 4 if row["state"] == "complete" else row["steps"] < 4

    # The same seed gives the same study; one that was cut in two keeps its first part.
    same = study(base, tmp_path / "b", "--trials", "2")
    assert [row["settings"] for row in same["trials"]] == [row["settings"] for row in result["trials"][:2]]
    assert [row["loss"] for row in same["trials"]] == [row["loss"] for row in result["trials"][:2]]
    more = study(base, tmp_path / "b", "--trials", "3", "--resume")
    assert len(more["trials"]) == 3 and more["trials"][:2] == same["trials"]


@pytest.mark.parametrize("fatal", [0, 1], ids=["first", "second"])
def test_a_stopped_trial_is_tried_again(base, tmp_path, monkeypatch, capsys, fatal):
    trials, whole = [], loop.train

    def train(*args):
        trials.append(1)
        if len(trials) > fatal:
            raise KeyboardInterrupt
        return whole(*args)

    words = ["--output-dir", str(tmp_path / "a"), "--trials", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", train)
        assert main(["tune", *base, *words]) == 130
    assert f"go on with: handtuned tune {' '.join(words)} --resume" in capsys.readouterr().out
    result = study(base, tmp_path / "a", "--trials", "3", "--resume")
    assert len(result["trials"]) == 3
    assert result["first"]["first"] and result["first"]["settings"]["lora_r"] == 8


def test_a_trial_that_diverges_is_given_up_and_the_study_goes_on(base, tmp_path, monkeypatch, caplog):
    trials, whole = [], loop.train

    def train(*args):
        trials.append(1)
        if len(trials) == 2:
            raise loop.Diverged("step 1: the loss is nan")
        return whole(*args)

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(logging.getLogger("optuna"), "propagate", True)
    result = study(base, tmp_path / "a", "--trials", "3", "--search", "lora-r")
    assert len(trials) == 3 and result["best"]["state"] == "complete"
    assert json.loads((tmp_path / "a" / "best" / "handtuned.json").read_text())["method"] == "qlora"
    assert not caplog.records  # no traceback of Optuna's: it is told in a line


def test_another_data_set_of_the_same_length_is_noticed(base, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    tiny.write_rows(rows, seed=1)
    words = ["tune", *base, "--data", str(rows), "--output-dir", str(tmp_path / "a")]
    assert main([*words, "--trials", "1"]) == 0
    tiny.write_rows(rows, seed=2)
    assert main([*words, "--trials", "2", "--resume"]) == 2
    assert "data or search are not what they were" in capsys.readouterr().err


def test_only_what_is_asked_for_is_searched(base, tmp_path):
    result = study(base, tmp_path / "a", "--trials", "3", "--search", "learning_rate", "--lora-r", "3")
    settings = [row["settings"] for row in result["trials"]]
    assert len({row["learning_rate"] for row in settings}) == 3
    assert {(row["lora_r"], row["lora_alpha"], row["target_modules"]) for row in settings} == {(3, 16.0, "all-linear")}


def test_the_front():
    row = lambda number, size, loss, state="complete": {  # noqa: E731
        "number": number, "bytes": size, "loss": loss, "state": state}  # fmt: skip
    rows = [row(0, 4, 1.0), row(1, 1, 3.0), row(2, 1, 2.5), row(3, 5, 1.0), row(4, 6, 0.5), row(5, 1, 0.1, "pruned")]
    assert [found["number"] for found in reports.pareto_front(rows, "bytes")] == [2, 0, 4]


def test_the_command_for_a_whole_run_has_the_numbers_of_the_study():
    settings = FinetuneSettings(eval_fraction=0.123456, learning_rate=1.23456e-4, lora_alpha=8.0).with_defaults()
    row = {"number": 0, "state": "complete", "loss": 1.0, "exact_match": 0.0, "bytes": 1, "seconds_a_step": 1.0,
           "untouched": {"loss": None, "exact_match": 0.0},  # it was not finite
           "settings": {name: getattr(settings, name) for name in reports.SEARCHED}}  # fmt: skip
    table = reports.table({"best": row, "first": row, "trials": [row]}, settings, Path("a"))
    assert "--eval-fraction 0.123456" in table and "--learning-rate 0.000123456" in table and "nan 0.0%" in table
    assert "--lora-alpha 8 " in table and "--num-train-epochs" not in table  # 3 would be more than 80 steps


def test_targets_are_those_that_the_model_has():
    import torch

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.v_proj = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    space = tuning.Space(FinetuneSettings(learning_rate=1e-3), reports.SEARCHED, Block())
    assert space.choices["target_modules"] == ["all-linear", "q_proj,v_proj"]
    left_out = FinetuneSettings(learning_rate=1e-3, exclude_modules=("v_proj",), rank_pattern=("q_proj=4",))
    space = tuning.Space(left_out, reports.SEARCHED, Block())
    assert space.choices["target_modules"] == ["all-linear", "q_proj,v_proj"]


def test_targets_that_do_not_go_with_what_else_is_chosen_are_not_searched(base, tmp_path, capsys, monkeypatch):
    flags = ["--exclude-modules", "down_proj", "--search", "target-modules", "--max-steps", "1"]
    result = study(base, tmp_path / "a", "--trials", "4", *flags)
    searched = [row["settings"]["target_modules"] for row in result["trials"]]
    assert all(targets in ("all-linear", ["gate_proj", "up_proj", "down_proj"]) for targets in searched)
    words = ["tune", "--output-dir", str(tmp_path / "a"), "--resume"]
    assert main([*words, "--search", "lora-r"]) == 2
    assert "the study's own --search target_modules" in capsys.readouterr().err
    assert main([*words, "--trials", "2"]) == 0
    assert "0 trials of up to" in capsys.readouterr().out
    add, calls = tuning.add_adapters, []

    def refuse(*args):  # what no list of targets foresees
        calls.append(args)
        if len(calls) == 3:
            raise ValueError("DoRA is for linear layers")
        add(*args)

    monkeypatch.setattr(tuning, "add_adapters", refuse)
    result = study(base, tmp_path / "b", "--trials", "3", "--search", "lora-r", "--max-steps", "1")
    assert sorted(row["state"] for row in result["trials"]) == ["complete", "complete", "fail"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials", "0"], "--trials must be at least 1, got 0"),
        (["--minutes", "nan"], "--minutes must be a finite number above 0, got nan"),
        (["--eval-fraction", "0"], "needs at least 2 held-out rows"),
        (["--lora-r", "0"], "--lora-r must be at least 1"),
        (["--parallel", "ddp"], "--parallel must be none"),
        (["--method", "full"], "--method must be qlora or lora"),
        (["--search", "rank"], "invalid choice"),
        (["--target-modules", "q_prj"], "q_prj"),
    ],
)
def test_bad_input_is_told_in_one_line(base, tmp_path, capsys, words, message):
    assert main(["tune", *base, "--output-dir", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert not (tmp_path / "out").exists()


def test_directories(base, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["tune", *base, "--output-dir", str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["tune", *base, "--output-dir", str(tmp_path / "none"), "--resume"]) == 2
    assert "holds no study" in capsys.readouterr().err
    (tmp_path / "full" / "tune.json").write_text("{}")
    assert main(["tune", *base, "--output-dir", str(tmp_path / "full"), "--resume"]) == 2
    assert "tune.json is damaged: KeyError: 'settings'" in capsys.readouterr().err


def test_two_studies_that_begin_at_once_do_not_share_a_directory(base, tmp_path, capsys, monkeypatch):
    """The first one makes its directory while the second loads the model."""
    directory, load = tmp_path / "a", tuning.TrialRunner

    def late(settings, search):
        directory.mkdir()
        (directory / "tune.json").write_text("{}")
        return load(settings, search)

    monkeypatch.setattr(tuning, "TrialRunner", late)
    assert main(["tune", *base, "--output-dir", str(directory), "--trials", "1"]) == 2
    assert "is not empty" in capsys.readouterr().err and not (directory / "study.log").exists()
