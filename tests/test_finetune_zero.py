"""`finetune --parallel zero1 | zero2 | zero3`: two and four CPU processes beside one of as much more accumulation.

Starting processes takes seconds, so runs are shared: `two` and `four`, several runs one after another; one test has a
run of its own, which loses a rank in the middle.

To the bit: on two ranks a sum has one order, and gradients are summed, not averaged; so is everything
that follows, but for the norm of the gradient, whose squares each rank adds up for its own shards. Clipping multiplies
by a number that may differ in its last bits, and more ranks sum gradients in another order: those agree to rounding.
"""

import json
import shutil
import sys

import pytest
import torch
from ranks import finetune as finetune_on
from ranks import kill_after, one_after_another, torchrun
from tiny import make_model, write_rows

from handtuned import cli
from handtuned.memory import estimate
from handtuned.training.checkpoints import checkpoints
from handtuned.training.settings import FinetuneSettings

pytest.importorskip("transformers")

STEPS = 4
UNCLIPPED = ["--max-grad-norm", "0"]
# name → the flags of a run; on two ranks each has a way to be cut, alone it accumulates twice as much.
EQUAL = {
    "zero1": ["--method", "qlora", "--lora-dropout", "0"],
    "zero2": ["--method", "full", "--optim", "adamw8bit"],
    "zero3": ["--method", "full", "--gradient-checkpointing"],
}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # as in test_distributed.py


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    place = tmp_path_factory.mktemp("given")
    model, rows = make_model(place / "model"), write_rows(place / "rows.jsonl", count=24)
    return ["--model", model, "--data", rows, "--eval-fraction", "0", "--per-device-train-batch-size", "1",
            "--learning-rate", "2e-3", "--device", "cpu", "--max-seq-length", "64", "--max-steps", str(STEPS),
            "--save-steps", "1", "--save-total-limit", "9"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(flags, runs):
    """A run in this process, made when it is first asked for."""

    def run(*words, ranks=1):
        out = runs / "-".join(["alone", *words, str(ranks)]).replace("--", "")
        if not out.exists():
            words = [*words, "--gradient-accumulation-steps", str(ranks)]
            assert cli.main(["finetune", *flags, *words, "--output-dir", str(out)]) == 0
        return out

    return run


SCORED = ["--eval-fraction", "0.2", "--eval-samples", "3"]
WILD = ["--learning-rate", "0.2", "--max-steps", "8"]  # so much that the fourth step overflows in FP16
LONG = ["--parallel", "zero3", "--method", "qlora", "--max-steps", "12"]
TWO = {
    **{f"{way}-equal": ["--parallel", way, *words, *UNCLIPPED] for way, words in EQUAL.items()},
    "offloaded": ["--parallel", "zero2", "--offload", "--method", "lora", *UNCLIPPED],
    "clipped": ["--parallel", "zero3", "--method", "qlora", *SCORED, "--gradient-accumulation-steps", "2"],
    "bfloat16": ["--parallel", "zero1", "--method", "full", "--dtype", "bfloat16", *UNCLIPPED],
    "float16": ["--parallel", "zero3", "--method", "full", "--dtype", "float16", *UNCLIPPED, *WILD],
    "unbroken": LONG,
}


@pytest.fixture(scope="module")
def two(flags, runs):
    codes, printed = one_after_another(flags, runs, TWO)
    assert codes == {rank: ["0"] * len(TWO) for rank in (0, 1)}, printed
    return printed


@pytest.fixture(scope="module")
def four(flags, runs):
    named = {f"{way}-of-4": ["--parallel", way, *words] for way, words in EQUAL.items()}
    codes, printed = one_after_another(flags, runs, named, ranks=4)
    assert codes == {rank: ["0"] * len(named) for rank in range(4)}, printed
    return printed


def losses(out):
    return torch.tensor([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])


def tensors(path):
    from safetensors.torch import load_file

    return load_file(path)


def saved(out):
    (path,) = [out / name for name in ("adapter_model.safetensors", "model.safetensors") if (out / name).exists()]
    return tensors(path)


def results(out):
    return json.loads((out / "results.json").read_text())


def assert_close(out, other):
    torch.testing.assert_close(losses(out), losses(other), **CLOSE)
    ours, theirs = saved(out), saved(other)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert (tensor - theirs[key]).norm() <= 1e-3 * theirs[key].norm(), key


def assert_same_files(out, other):
    """The same names in a run's directory, and the same bits in what was trained and in the last optimizer state."""
    names = {place: sorted(path.name for path in place.iterdir()) for place in (out, other)}
    assert names[out] == names[other]
    (trained,) = [name for name in names[out] if name.endswith("model.safetensors")]
    last = checkpoints(out)[-1].name
    for name in (trained, f"{last}/{trained}", f"{last}/optimizer.safetensors"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("way, words", [("zero1", EQUAL["zero1"]), ("zero2", [*EQUAL["zero2"], "--offload"]),
                                        ("zero3", [*EQUAL["zero3"], "--dtype", "bfloat16"]),
                                        ("zero3", ["--target-modules", "q_proj", "lm_head"])])  # fmt: skip
def test_one_process_is_a_world_of_one_rank(flags, alone, tmp_path, capfd, way, words):
    out = tmp_path / "out"
    assert cli.main(["finetune", *flags, *words, "--parallel", way, "--output-dir", str(out)]) == 0
    said = capfd.readouterr()
    assert f"ranks        1, {way}: " in said.out
    assert ("note: --offload saves nothing on a CPU" in said.err) == ("--offload" in words)
    assert_same_files(out, alone(*[word for word in words if word != "--offload"]))


@pytest.mark.parametrize("name", [name for name, words in TWO.items() if UNCLIPPED[0] in words])
def test_two_ranks_are_one_process_to_the_bit(two, alone, runs, name):
    way, *words = TWO[name][1:]
    assert_same_files(runs / name, alone(*[word for word in words if word != "--offload"], ranks=2))
    assert two[name].count(f"ranks        2, {way}: ") == 1
    assert two[name].count("note: --offload saves nothing on a CPU") == ("--offload" in words)


def test_an_overflow_is_skipped_by_all_ranks(two, alone, runs):
    places = runs / "float16", alone("--method", "full", "--dtype", "float16", *UNCLIPPED, *WILD, ranks=2)
    ours, theirs = (json.loads((place / "checkpoint-8" / "state.json").read_text()) for place in places)
    assert ours["scaler"] == theirs["scaler"] and ours["schedule"] == theirs["schedule"]
    assert ours["scaler"]["scale"] < 2**16 and ours["schedule"]["last_epoch"] < 8


def test_clipping_and_accumulation_to_rounding(two, alone, runs):
    """And the scores of held-out rows, three on two ranks, whose weights are gathered for them."""
    out, other = runs / "clipped", alone("--method", "qlora", *SCORED, ranks=4)
    assert_close(out, other)
    for name in ("loss", "token_accuracy", "exact_match", "rows"):
        assert results(out)["after"][name] == pytest.approx(results(other)["after"][name], rel=1e-4)


@pytest.mark.parametrize("way", EQUAL)
def test_four_ranks_are_one_process_to_rounding(four, alone, runs, way):
    assert_close(runs / f"{way}-of-4", alone(*EQUAL[way], ranks=4))


@pytest.mark.parametrize("name", TWO)
def test_bytes_on_each_rank_are_what_memory_says(two, flags, runs, name):
    """Counted by storages in the run, beside `handtuned memory`; one number for each tensor's steps comes on top."""
    words = dict(zip(TWO[name], [*TWO[name][1:], ""], strict=True))
    stage, method, dtype = int(words["--parallel"][-1]), words["--method"], words.get("--dtype", "float32")
    if words.get("--optim") == "adamw8bit":
        pytest.skip("`memory` does not know it yet")
    offload, wide = "--offload" in words, dtype == "float32"
    said = estimate(flags[1], method, dtype, zero=stage, world_size=2, offload=offload)
    weights = said["weights"] + said["adapters"] + said["quantization constants"]
    states = said["optimizer state"] + said["master weights"]
    gradients = said["gradients"] if wide else said["master weights"] + said["gradients"] * (stage == 1)  # as FP32
    host = said.host + offload * said["adapters"] // 2  # and what `estimate` does not count, the rank's weights
    for held in results(runs / name)["held_bytes_by_rank"]:
        told = {"parameters": weights, "gradients": gradients, "optimizer state": states, "host": host}
        assert held.keys() == told.keys()
        for kind, count in told.items():
            assert held[kind] == pytest.approx(count, rel=0.05), (kind, held, told)


def test_a_run_goes_on_with_four_two_and_one_ranks(four, alone, runs):
    """Each in another way of being cut, and the last in none."""
    out = runs / "4-2-1"
    shutil.copytree(runs / "zero2-of-4", out)
    (out / "model.safetensors").unlink()
    finetune_on("--resume", str(out / "checkpoint-1"), "--parallel", "zero3", "--offload")
    assert cli.main(["finetune", "--resume", str(out / "checkpoint-3")]) == 0
    assert_close(out, alone(*EQUAL["zero2"], ranks=4))


@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
def test_a_lost_rank_is_named_and_the_run_goes_on_bit_equal(flags, two, runs):
    out = runs / "killed"
    words = ["-m", "handtuned", "finetune", *flags, *LONG, "--output-dir", str(out)]
    seconds, printed = kill_after(out / "checkpoint-4", torchrun(words), rank=1)
    assert seconds < 60
    again = f"torchrun --nproc-per-node 2 -m handtuned finetune --parallel zero3 --resume {out}"
    assert printed.count("error: ") == 1, printed
    assert f"handtuned finetune: error: rank 1 has died\ngo on with: {again}\n" in printed
    assert not (out / "adapter_model.safetensors").exists()
    finetune_on("--resume", str(out), "--parallel", "zero3")
    assert losses(out).tolist() == losses(runs / "unbroken").tolist()
    assert_same_files(out, runs / "unbroken")


@pytest.mark.parametrize("settings, message", [
    ({"offload": True}, "--offload needs --parallel zero1, zero2 or zero3, got --parallel none"),
    ({"offload": True, "parallel": "fsdp"}, "--offload needs --parallel zero1, zero2 or zero3, got --parallel fsdp"),
    ({"data": ["a.jsonl", "-:2"], "parallel": "ddp"}, "cannot be shared by several ranks: write the rows to a file"),
    ({"eval_data": "-", "parallel": "zero1"}, "cannot be shared by several ranks: write the rows to a file"),
    ({"optim": "adamw8bit", "parallel": "fsdp"}, "--parallel ddp and zero1 to zero3 take both"),
    ({"method": "full", "parallel": "fsdp"}, "--parallel ddp and zero1 to zero3 take both"),
])  # fmt: skip
def test_what_excludes_each_other_is_one_line(settings, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}$"):
        FinetuneSettings(**settings)
