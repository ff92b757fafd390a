"""`handtuned finetune` stopped in every way and gone on with: equal, to the bit, to the run that never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import finetuned
import pytest
import torch
from finetuned import COMMON, finetune, losses
from safetensors.torch import load_file, save
from tiny import make_model, write_rows

from handtuned import cli

pytest.importorskip("transformers")

model_dir, rows, finished = finetuned.model_dir, finetuned.rows, finetuned.finished


def test_pain_20_resumed_run_is_bit_equal(model_dir, rows, finished, tmp_path):
    """Killed hard in the middle (dropout on), gone on with, equal to the run that never stopped."""
    out = tmp_path / "killed"
    flags = ["--max-steps", "12", "--save-steps", "4", "--lora-dropout", "0.1"]
    command = [sys.executable, "-m", "handtuned", "finetune", "--model", model_dir, "--data", rows,
               "--output-dir", str(out), *COMMON, *flags]  # fmt: skip
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-4").exists() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert losses(out) == losses(finished)
    for name in ("adapter_model.safetensors",):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("step", [0, 1, 5, 8], ids=lambda s: f"after-{s}")
def test_resume_from_any_step_is_bit_equal(model_dir, rows, finished, tmp_path, monkeypatch, step):
    from handtuned.training import logging

    class Killed(BaseException):
        pass

    append = logging.Metrics.append

    def stop(self, row):
        if row["step"] > step:
            raise Killed
        append(self, row)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(logging.Metrics, "append", stop)
        finetune(model_dir, rows, out, "--max-steps", "12", "--save-steps", "4", "--lora-dropout", "0.1")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # a line cut short by the kill
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert losses(out) == losses(finished)


def test_ctrl_c_saves_and_says_how_to_go_on(model_dir, rows, finished, tmp_path, capsys, monkeypatch):
    from handtuned.training import logging

    log = logging.RunLog.log

    def press(self, row):
        if row["step"] == 6:
            os.kill(os.getpid(), signal.SIGINT)
        log(self, row)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(logging.RunLog, "log", press)
        code = finetune(model_dir, rows, out, "--max-steps", "12", "--save-steps", "100", "--lora-dropout", "0.1")
    assert code == 130
    assert f"handtuned finetune --resume {out}" in capsys.readouterr().out
    assert (out / "checkpoint-6").is_dir()
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert losses(out) == losses(finished)


def test_resume_refuses_other_settings_and_other_data(model_dir, rows, finished, tmp_path, capsys):
    assert cli.main(["finetune", "--resume", str(finished), "--lora-r", "4"]) == 2
    assert "--lora-r was 8, now 4" in capsys.readouterr().err
    assert cli.main(["finetune", "--resume", str(finished), "--output-dir", str(tmp_path / "other")]) == 2
    assert f"goes on in {finished}, and --output-dir names {tmp_path / 'other'}" in capsys.readouterr().err
    changed = tmp_path / "rows.jsonl"
    changed.write_text(Path(rows).read_text())
    out = tmp_path / "out"
    assert finetune(model_dir, str(changed), out, "--max-steps", "1") == 0
    write_rows(changed, seed=7)
    assert cli.main(["finetune", "--resume", str(out)]) == 2
    assert "training data is not what it was" in capsys.readouterr().err


def test_disk_that_fills_up_later_loses_nothing(model_dir, rows, finished, tmp_path, capsys, monkeypatch):
    from handtuned.training import checkpoints

    write = checkpoints.write_safetensors

    def full(path, tensors):
        if "checkpoint-8" in str(path):
            raise OSError(28, "No space left on device")
        write(path, tensors)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_safetensors", full)
        code = finetune(model_dir, rows, out, "--max-steps", "12", "--save-steps", "4", "--lora-dropout", "0.1")
    assert code == 2 and "No space left on device" in capsys.readouterr().err
    assert not [path for path in out.rglob("*") if ".tmp" in path.name or "checkpoint-8" in path.name]
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert losses(out) == losses(finished)


def test_sigterm_is_taken_as_ctrl_c(model_dir, rows, tmp_path, capsys, monkeypatch):
    from handtuned.training import logging

    log = logging.RunLog.log

    def end(self, row):
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        log(self, row)

    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(logging.RunLog, "log", end)
        assert finetune(model_dir, rows, out, "--max-steps", "4") == 130
    assert f"handtuned finetune --resume {out}" in capsys.readouterr().out
    assert (out / "checkpoint-2").is_dir() and signal.getsignal(signal.SIGTERM) is before


def test_resume_from_a_checkpoint_by_name(finished, tmp_path, capsys):
    """The way out when the newest is damaged: what is newer is run again."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "checkpoint-12" / "optimizer.safetensors").write_bytes(b"")
    assert cli.main(["finetune", "--resume", str(out)]) == 2
    assert "checkpoint-12 is not a whole checkpoint" in capsys.readouterr().err
    assert cli.main(["finetune", "--resume", str(out / "checkpoint-8")]) == 0
    assert "going on after step 8 of 12" in capsys.readouterr().out
    assert losses(out) == losses(finished)
    for name in ("adapter_model.safetensors", "checkpoint-12/optimizer.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("place", ["nowhere", "empty", "checkpoint-3"])
def test_resume_of_no_run_starts_none(tmp_path, capsys, place):
    """Else a mistyped directory would begin the shipped task in it."""
    (tmp_path / "empty").mkdir()
    assert cli.main(["finetune", "--resume", str(tmp_path / place)]) == 2
    assert f"--resume: {tmp_path / place} holds no run" in capsys.readouterr().err


def test_a_damaged_record_is_named(finished, tmp_path, capsys):
    for text in ("{", "{}", '{"settings": 3, "marks": {}}'):
        (tmp_path / "run.json").write_text(text)
        assert cli.main(["finetune", "--resume", str(tmp_path)]) == 2
        assert f"{tmp_path / 'run.json'} is damaged" in capsys.readouterr().err


def test_a_checkpoint_that_lacks_a_part_or_does_not_fit_is_named(finished, tmp_path, capsys):
    newest = shutil.copytree(finished, tmp_path / "out") / "checkpoint-12"
    other = load_file(newest / "optimizer.safetensors")
    other["0.master"] = other["0.master"][:1].clone()  # which a copy would spread over all rows
    earlier = {name: tensor for name, tensor in other.items() if not name.endswith(".master")}  # as 0.1.0 began
    for name, content, why in (
        ("state.json", b"{}", ""), ("rng.safetensors", save({}), "it lacks 'cpu'"),
        ("optimizer.safetensors", save(other), ""),
        ("optimizer.safetensors", save(earlier), "it lacks '0.master'; is it of an earlier version?"),
    ):  # fmt: skip
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(content)
        assert cli.main(["finetune", "--resume", str(tmp_path / "out")]) == 2
        assert f"checkpoint-12 is not a whole checkpoint: {why}" in capsys.readouterr().err
        (newest / name).write_bytes(whole)
    (tmp_path / "out" / "results.json").write_text("[]")
    assert cli.main(["finetune", "--resume", str(tmp_path / "out")]) == 2
    assert "results.json is damaged: " in capsys.readouterr().err


def test_a_kill_while_a_checkpoint_is_deleted_leaves_no_part_of_it(tmp_path, monkeypatch):
    from handtuned.training import checkpoints

    def killed(path):
        raise KeyboardInterrupt

    (tmp_path / "checkpoint-4").mkdir()
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints._delete(tmp_path / "checkpoint-4")
    assert checkpoints.checkpoints(tmp_path) == []


def test_a_run_that_came_first_is_not_gone_on_with(model_dir, rows, finished, tmp_path, capsys, monkeypatch):
    """Two took the same free directory, and the other was quicker to load."""
    from handtuned import finetune as command

    add, out = command.add_adapters, tmp_path / "out"
    monkeypatch.setattr(command, "add_adapters", lambda *args: (add(*args), shutil.copytree(finished, out)))
    assert finetune(model_dir, rows, out, "--max-steps", "12", "--weight-decay", "0.5") == 2
    assert f"--output-dir {out} holds another run" in capsys.readouterr().err


def cut_after(finished, out, step):
    """A copy of a run as if it had been killed after `step`."""
    shutil.copytree(finished, out)
    for path in out.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    return out


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has but one vector width")
def test_another_kind_of_cpu_goes_on_and_says_that_bits_will_differ(finished, tmp_path):
    """Without vector instructions torch rounds sums, and the scales of the NF4 base, differently."""
    out = cut_after(finished, tmp_path / "out", 8)
    done = subprocess.run([sys.executable, "-m", "handtuned", "finetune", "--resume", str(out)], capture_output=True,
                          text=True, env={**os.environ, "ATEN_CPU_CAPABILITY": "default"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "bit-equal" in line]
    width = torch.backends.cpu.get_cpu_capability()
    assert line == f"not bit-equal from here on to a run that was never stopped: vector width was {width}, now DEFAULT"
    assert losses(out) == pytest.approx(losses(finished), rel=1e-4)


def test_every_difference_of_the_machine_is_named(finished, tmp_path, capsys):
    other = ["processor was Z80", "threads was 9", "torch was 1.0", "triton was 0.1", "MKL and oneDNN was none",
             "compiled C was maybe", "device was abacus", "kernels was by hand"]  # fmt: skip
    for name, told in (("same", []), ("other", other), ("silent", [])):
        out = cut_after(finished, tmp_path / name, 8)
        state = json.loads((out / "checkpoint-8" / "state.json").read_text())
        if name == "silent":  # as version 0.1.0 wrote it
            del state["machine"]
        state.get("machine", {}).update(words.split(" was ") for words in told)
        (out / "checkpoint-8" / "state.json").write_text(json.dumps(state))
        assert cli.main(["finetune", "--resume", str(out)]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "bit-equal" in line]
        assert len(lines) == bool(told) and all(f"{words}, now" in lines[0] for words in told)
        assert losses(out) == losses(finished)


@pytest.mark.parametrize(
    "before, changed",
    [
        ({"base": "b", "codes": "c", "data": "d"}, []),
        ({"base": "other", "codes": "c", "data": "d"}, []),
        ({"base": "other", "codes": "other", "data": "d"}, ["base"]),
        ({"base": "other", "data": "d"}, ["base"]),
        ({"base": "b", "data": "other"}, ["data"]),
    ],
    ids=["same", "scales", "codes", "version-0.1.0", "data"],
)
def test_what_marks_a_run_as_another(before, changed):
    from handtuned.training.checkpoints import changed_marks

    assert changed_marks(before, {"base": "b", "codes": "c", "data": "d"}) == changed


def test_another_base_is_refused(rows, tmp_path, capsys):
    model = make_model(tmp_path / "model")
    assert finetune(model, rows, tmp_path / "out", "--max-steps", "1") == 0
    make_model(tmp_path / "model", seed=1)
    assert cli.main(["finetune", "--resume", str(tmp_path / "out")]) == 2
    assert "is not what it was when this run began" in capsys.readouterr().err


def test_a_finished_run_is_made_longer(model_dir, rows, finished, tmp_path, capsys):
    """Step by step the learning rate of a run of that length; and to the bit the same after a kill on the way."""
    flags, out = ["--save-steps", "4", "--lora-dropout", "0.1"], tmp_path / "out"
    shutil.copytree(finished, out)
    assert cli.main(["finetune", "--resume", str(out), "--max-steps", "20"]) == 0
    assert "longer than before: from here on the learning rate" in capsys.readouterr().out
    assert finetune(model_dir, rows, tmp_path / "whole", "--max-steps", "20", *flags) == 0
    logged, asked = metrics(out), metrics(tmp_path / "whole")
    assert [row["step"] for row in logged] == list(range(1, 21)) and losses(out)[:12] == losses(finished)
    assert [row["learning_rate"] for row in logged[12:]] == [row["learning_rate"] for row in asked[12:]]
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["max_steps"] == 20 and len(run["lengthened"]) == 1
    assert run["command"] == json.loads((finished / "run.json").read_text())["command"]

    again = cut_after(out, tmp_path / "again", 16)
    capsys.readouterr()
    assert cli.main(["finetune", "--resume", str(again)]) == 0
    assert losses(again) == losses(out) and "longer" not in capsys.readouterr().out
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (out / name).read_bytes() != (finished / name).read_bytes()


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_becomes_longer_in_what_it_counts(model_dir, rows, finished, tmp_path, capsys):
    assert finetune(model_dir, rows, tmp_path / "out", "--num-train-epochs", "0.5") == 0
    steps = len(losses(tmp_path / "out"))
    assert cli.main(["finetune", "--resume", str(tmp_path / "out"), "--num-train-epochs", "1"]) == 0
    assert len(losses(tmp_path / "out")) == 2 * steps
    for place, flags, message in ((tmp_path / "out", ["--max-steps", "99"], "--max-steps was None, now 99"),
                                  (finished, ["--num-train-epochs", "9"], "--num-train-epochs was 3.0, now 9.0"),
                                  (finished, ["--max-steps", "11"], "--max-steps was 12, now 11")):  # fmt: skip
        assert cli.main(["finetune", "--resume", str(place), *flags]) == 2
        assert message in capsys.readouterr().err
