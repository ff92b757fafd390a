"""`torchrun … -m handtuned finetune --parallel`: two processes on a CPU beside one with twice the accumulation.

Every start of two processes takes seconds, so runs are shared: `alone`, one process; `two`, three runs of two
processes one after another; and `killed`, an FSDP run that loses rank 1 in the middle.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TORCH, assert_same_function
from ranks import finetune, kill_after, one_after_another, process_of_rank, torchrun, wait
from tiny import make_model, write_rows

from handtuned import cli

pytest.importorskip("transformers")
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")

STEPS = 24
# Losses of runs that sum in another order. fp32 rounds to 6e-8; 24 steps of AdamW at the rate here multiply that by
# some tens (one process with 2 × 2 rows and with 1 × 4 rows, whose order differs as well, are that far apart).
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
SHARDS_CODES = TORCH >= (2, 13)  # FSDP2 of torch 2.11 cuts floating-point weights only: there everything is in fp32
needs_codes_in_shards = pytest.mark.skipif(not SHARDS_CODES, reason="FSDP2 shards NF4 codes from torch 2.13 on")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    place = tmp_path_factory.mktemp("given")
    model, rows = make_model(place / "model"), write_rows(place / "rows.jsonl", count=25)
    return ["--model", model, "--data", rows, "--eval-fraction", "0.2", "--per-device-train-batch-size", "2",
            "--learning-rate", "2e-3", "--device", "cpu", "--max-seq-length", "64", "--max-steps", str(STEPS),
            "--save-steps", "4", "--method", "qlora" if SHARDS_CODES else "lora"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def results(out):
    return json.loads((Path(out) / "results.json").read_text())


def adapter(out):
    from safetensors.torch import load_file

    return load_file(Path(out) / "adapter_model.safetensors")


def assert_same_run(out, other):
    torch.testing.assert_close(torch.tensor(losses(out)), torch.tensor(losses(other)), **CLOSE)
    for name in ("loss", "token_accuracy", "exact_match"):
        assert results(out)["after"][name] == pytest.approx(results(other)["after"][name], rel=1e-4)
    ours, theirs = adapter(out), adapter(other)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert (tensor - theirs[key]).norm() <= 1e-3 * theirs[key].norm(), key


@pytest.fixture(scope="module")
def alone(flags, runs):
    out = runs / "alone"
    assert cli.main(["finetune", *flags, "--output-dir", str(out), "--gradient-accumulation-steps", "2"]) == 0
    return out


@pytest.fixture(scope="module")
def two(flags, runs):
    """What was printed by each of: a run whose ranks have different seeds, one with DDP, one with FSDP."""
    codes, printed = one_after_another(flags, runs, {
        "refused": ["--parallel", "ddp", "--seed", "RANK"], "ddp": ["--parallel", "ddp"],
        "fsdp": ["--parallel", "fsdp"]})  # fmt: skip
    assert codes == {0: ["2", "0", "0"], 1: ["2", "0", "0"]}, printed
    return printed


@pytest.fixture(scope="module")
def killed(flags, runs):
    out = runs / "killed"
    words = ["-m", "handtuned", "finetune", *flags, "--output-dir", str(out), "--parallel", "fsdp"]
    seconds, printed = kill_after(out / "checkpoint-4", torchrun(words), rank=1)
    return out, seconds, printed


def test_ddp_is_one_process_with_twice_the_accumulation(alone, two, runs):
    assert_same_run(runs / "ddp", alone)


def test_fsdp_is_too(alone, two, runs):
    assert_same_run(runs / "fsdp", alone)


@needs_codes_in_shards
def test_fsdp_shards_the_packed_weights(alone, two, runs):
    """Half of everything but the scales; under DDP each rank holds what one process holds."""
    (whole,) = results(alone)["weight_bytes_by_rank"]
    assert results(runs / "ddp")["weight_bytes_by_rank"] == [whole, whole]
    held = results(runs / "fsdp")["weight_bytes_by_rank"]
    assert all(0.5 * whole < part < 0.56 * whole for part in held)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_one_rank_talks_and_writes(two, runs, mode):
    assert two[mode].count("talk to it") == 1 and two[mode].count(f"ranks        2, {mode}") == 1
    assert json.loads((runs / mode / "run.json").read_text())["marks"]["ranks"] == 2
    rows = (runs / mode / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [*range(1, STEPS + 1)]
    assert not [path for path in (runs / mode).rglob("*") if ".tmp" in path.name]


def test_ranks_with_other_settings_are_refused(two, runs):
    lines = [line for line in two["refused"].splitlines() if "error" in line]
    assert lines == ["handtuned finetune: error: ranks must have the same --seed: rank 0 has 0, rank 1 has 1"]
    assert not (runs / "refused").exists()


def test_one_process_and_peft_load_what_fsdp_wrote(flags, two, runs, capsys):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from handtuned.training.models import load_with_adapter

    class Args:
        adapter, model, method, dtype, device = str(runs / "fsdp"), None, "lora", "float32", "cpu"

    if SHARDS_CODES:
        Args.method = "qlora"
        load_with_adapter(Args)
        assert "not, bit for bit" not in capsys.readouterr().err
        Args.method = "lora"
    ours, _, _ = load_with_adapter(Args)
    base = AutoModelForCausalLM.from_pretrained(flags[1])
    ids = torch.randint(5, 40, (2, 9))
    with torch.no_grad():
        before = base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, str(runs / "fsdp")).eval()(ids).logits
        assert_same_function(ours(input_ids=ids).logits, theirs, terms=2 * 7 * 128)  # of each product of each layer
        assert (theirs - before).abs().max() > 1e-2


@linux
def test_a_killed_rank_ends_the_others_and_is_named(killed):
    out, seconds, printed = killed
    assert seconds < 60
    assert printed.count("error: ") == 1, printed
    again = f"torchrun --nproc-per-node 2 -m handtuned finetune --parallel fsdp --resume {out}"
    assert f"handtuned finetune: error: rank 1 has died\ngo on with: {again}\n" in printed
    assert not (out / "adapter_model.safetensors").exists()
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]


@linux
def test_resume_after_a_kill_is_bit_equal(killed, two, runs):
    out = runs / "resumed"
    shutil.copytree(killed[0], out)
    (out / ".checkpoint-20.1.tmp").mkdir()  # as a main rank leaves it that is killed while it writes
    finetune("--resume", str(out), "--parallel", "fsdp")
    assert not [path for path in out.rglob("*") if ".tmp" in path.name]
    assert losses(out) == losses(runs / "fsdp")
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (runs / "fsdp" / weights).read_bytes()


@linux
def test_one_process_goes_on_with_what_two_began(killed, alone, runs):
    out = runs / "resumed-alone"
    shutil.copytree(killed[0], out)
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert_same_run(out, alone)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(flags, alone, runs, monkeypatch):
    from handtuned.training import logging

    class Killed(BaseException):
        pass

    append = logging.Metrics.append

    def stop(self, row):
        if row["step"] > 6:
            raise Killed
        append(self, row)

    out = runs / "one-then-two"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(logging.Metrics, "append", stop)
        cli.main(["finetune", *flags, "--output-dir", str(out), "--gradient-accumulation-steps", "2"])
    finetune("--resume", str(out), "--parallel", "fsdp")
    assert_same_run(out, alone)


@pytest.mark.slow
def test_shards_of_three_ranks_are_uneven_and_right(flags, runs):
    """Rank 8 over three processes: 3, 3 and 2 rows of each lora_A."""
    alone, out = runs / "alone-of-three", runs / "three"
    assert cli.main(["finetune", *flags, "--output-dir", str(alone), "--gradient-accumulation-steps", "3"]) == 0
    finetune(*flags, "--output-dir", str(out), "--parallel", "fsdp", ranks=3)
    assert_same_run(out, alone)


@pytest.mark.slow
def test_other_bases_checkpointing_and_loss_scaling(flags, runs):
    """Each under FSDP and alone. FP16 starts at a loss scale that overflows; all ranks must skip those steps."""
    variants = {
        "plain": ["--method", "lora", "--gradient-checkpointing"],
        "checkpointed": ["--gradient-checkpointing"],
        "float16": ["--dtype", "float16"],
        "accumulated": ["--gradient-accumulation-steps", "2", "--per-device-train-batch-size", "1"],
    }
    parallel = {name: ["--parallel", "fsdp", *more] for name, more in variants.items()}
    codes, printed = one_after_another(flags, runs, parallel)
    assert codes[0] == codes[1] == ["0"] * len(variants), printed
    for name, more in variants.items():
        out, double = runs / f"{name}-alone", [] if name == "accumulated" else ["--gradient-accumulation-steps", "2"]
        if name == "accumulated":
            more = ["--gradient-accumulation-steps", "4", "--per-device-train-batch-size", "1"]
        assert cli.main(["finetune", *flags, "--output-dir", str(out), *more, *double]) == 0
        if name != "float16":
            assert_same_run(runs / name, out)
            continue
        curves = torch.tensor(losses(runs / name)), torch.tensor(losses(out))
        torch.testing.assert_close(*curves, rtol=5e-3, atol=5e-3)  # a few roundings of 2^-11
        ours, theirs = ((place / f"checkpoint-{STEPS}" / "state.json").read_text() for place in (runs / name, out))
        assert json.loads(ours)["scaler"] == json.loads(theirs)["scaler"]


@linux
@pytest.mark.slow
def test_dropout_is_the_same_after_a_kill_and_on_other_ranks(flags, runs):
    flags = [*flags, "--lora-dropout", "0.2", "--parallel", "ddp"]
    finetune(*flags, "--output-dir", str(runs / "unbroken"))
    out = runs / "broken"
    launcher = torchrun(["-m", "handtuned", "finetune", *flags, "--output-dir", str(out)])
    _, printed = kill_after(out / "checkpoint-8", launcher, rank=0)
    assert "rank 0 has died" in printed
    shutil.copytree(out, runs / "on-one-rank")
    finetune("--resume", str(out), "--parallel", "ddp")
    assert losses(out) == losses(runs / "unbroken")
    finetune("--resume", str(runs / "on-one-rank"), "--parallel", "ddp", ranks=1)
    assert_same_run(runs / "on-one-rank", runs / "unbroken")


@linux
@pytest.mark.slow
def test_ctrl_c_stops_all_ranks_after_a_saved_step(flags, two, runs):
    out = runs / "stopped"
    words = ["-m", "handtuned", "finetune", *flags, "--output-dir", str(out), "--parallel", "fsdp"]
    launcher = torchrun(words)
    while not (out / "checkpoint-4").exists() and launcher.poll() is None:
        time.sleep(0.005)
    for target in (process_of_rank(launcher, 0), process_of_rank(launcher, 1), launcher.pid):  # as a terminal does
        os.kill(target, signal.SIGINT)
    printed = wait(launcher)
    assert f"go on with: torchrun --nproc-per-node 2 -m handtuned finetune --parallel fsdp --resume {out}" in printed
    finetune("--resume", str(out), "--parallel", "fsdp")
    assert losses(out) == losses(runs / "fsdp")


@linux
@pytest.mark.slow
def test_torchrun_may_start_all_ranks_again(flags, two, runs):
    """With --max-restarts, and --resume from the beginning, a killed rank costs some steps and no word."""
    out = runs / "restarted"
    words = ["-m", "handtuned", "finetune", *flags, "--parallel", "fsdp", "--output-dir", str(out), "--resume"]
    launcher = torchrun(["--max-restarts", "1", *words])
    _, printed = kill_after(out / "checkpoint-8", launcher, rank=1)
    assert launcher.returncode == 0, printed
    assert losses(out) == losses(runs / "fsdp")


@pytest.mark.slow
def test_ranks_with_other_data_are_refused(flags, runs):
    """The same command, but each rank in a directory of its own."""
    at = flags.index("--data")
    for rank in (0, 1):
        (runs / f"machine-{rank}").mkdir()
        write_rows(runs / f"machine-{rank}" / "rows.jsonl", seed=rank)
    flags = [*flags[:at], "--data", "rows.jsonl", *flags[at + 2 :]]
    move = f"os.chdir({str(runs)!r} + '/machine-' + os.environ['RANK'])"
    codes, printed = one_after_another(flags, runs, {"other-data": ["--parallel", "ddp"]}, before=move)
    assert codes == {0: ["2"], 1: ["2"]}
    assert "error: ranks must have the same training data (--data): rank 0 has" in printed["other-data"]
    assert not (runs / "other-data").exists()


@pytest.mark.slow
def test_what_fails_on_one_rank_is_told_by_the_others(flags, runs):
    full_disk = """
from handtuned.training import checkpoints
def full(path, tensors):
    raise OSError(28, "No space left on device")
checkpoints.write_safetensors = full
"""
    codes, printed = one_after_another(flags, runs, {"full": ["--parallel", "ddp"]}, before=full_disk)
    assert codes == {0: ["2"], 1: ["1"]}
    everything = "".join(printed.values())
    assert "rank 0 has failed: OSError: [Errno 28] No space left on device" in everything
    assert not [path for path in (runs / "full").iterdir() if "checkpoint" in path.name]
