"""`handtuned finetune`, `generate` and `merge`, run as a user runs them, on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import WORDS, make_model, write_rows

from handtuned import cli
from handtuned.settings import FinetuneSettings

pytest.importorskip("transformers")

COMMON = ["--per-device-train-batch-size", "4", "--learning-rate", "1e-2", "--device", "cpu", "--max-seq-length", "64"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def finetune(model_dir, rows, out, *flags):
    return cli.main(["finetune", "--model", model_dir, "--data", rows, "--output-dir", str(out), *COMMON, *flags])


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(model_dir, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert finetune(model_dir, rows, out, "--max-steps", "12", "--save-steps", "4", "--lora-dropout", "0.1") == 0
    return out


def test_run_leaves_everything_that_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "handtuned.json", "metrics.jsonl",
                     "loss.png", "run.json", "results.json", "checkpoint-8", "checkpoint-12"}  # fmt: skip
    assert not [name for name in names if name.endswith(".tmp")]
    assert "checkpoint-4" not in names, "--save-total-limit keeps 2"
    run = json.loads((finished / "run.json").read_text())
    assert run["command"] and run["versions"]["torch"] == torch.__version__
    first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(first)
    assert (finished / "loss.png").read_bytes()[:4] == b"\x89PNG"
    curve = losses(finished)
    assert len(curve) == 12 and sum(curve[-3:]) < sum(curve[:3])


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
    from handtuned import records

    class Killed(BaseException):
        pass

    append = records.Metrics.append

    def stop(self, row):
        if row["step"] > step:
            raise Killed
        append(self, row)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(records.Metrics, "append", stop)
        finetune(model_dir, rows, out, "--max-steps", "12", "--save-steps", "4", "--lora-dropout", "0.1")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # a line cut short by the kill
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert losses(out) == losses(finished)


def test_ctrl_c_saves_and_says_how_to_go_on(model_dir, rows, finished, tmp_path, capsys, monkeypatch):
    from handtuned import telling

    show = telling.progress_bar.show

    def press(self, row):
        if row["step"] == 6:
            os.kill(os.getpid(), signal.SIGINT)
        show(self, row)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(telling.progress_bar, "show", press)
        code = finetune(model_dir, rows, out, "--max-steps", "12", "--save-steps", "100", "--lora-dropout", "0.1")
    assert code == 130
    assert f"handtuned finetune --resume {out}" in capsys.readouterr().out
    assert (out / "checkpoint-6").is_dir()
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert losses(out) == losses(finished)


def test_resume_refuses_other_settings_and_other_data(model_dir, rows, finished, tmp_path, capsys):
    assert cli.main(["finetune", "--resume", str(finished), "--lora-r", "4"]) == 2
    assert "--lora-r was 8, now 4" in capsys.readouterr().err
    changed = tmp_path / "rows.jsonl"
    changed.write_text(Path(rows).read_text())
    out = tmp_path / "out"
    assert finetune(model_dir, str(changed), out, "--max-steps", "1") == 0
    write_rows(changed, seed=7)
    assert cli.main(["finetune", "--resume", str(out)]) == 2
    assert "training data is not what it was" in capsys.readouterr().err


def test_pain_7_accumulation_equals_the_big_batch(model_dir, rows, tmp_path):
    """1 × 8 rows and 8 × 1 rows, of different lengths, give the same first steps."""
    curves = []
    for micro, accumulate in (("8", "1"), ("1", "8")):
        out = tmp_path / micro
        assert finetune(model_dir, rows, out, "--per-device-train-batch-size", micro,
                        "--gradient-accumulation-steps", accumulate, "--max-steps", "4") == 0  # fmt: skip
        curves.append(losses(out))
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(model_dir, rows, tmp_path):
    curves = []
    for name, flags in (("plain", []), ("checkpointed", ["--gradient-checkpointing"])):
        assert finetune(model_dir, rows, tmp_path / name, "--max-steps", "4", *flags) == 0
        curves.append(losses(tmp_path / name))
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-6, atol=1e-6)


def test_peft_loads_the_adapter_with_equal_logits(model_dir, finished):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from handtuned.adapted import load_adapted

    class Args:
        adapter, model, method, dtype, device = str(finished), None, "lora", "float32", "cpu"

    ours, _, _ = load_adapted(Args)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), str(finished)).eval()
    ids = torch.randint(5, 40, (2, 9))
    with torch.no_grad():
        difference = (ours(input_ids=ids).logits - theirs(input_ids=ids).logits).abs().max()
        moved = (ours(input_ids=ids).logits - AutoModelForCausalLM.from_pretrained(model_dir)(ids).logits).abs().max()
    assert difference <= 1e-4 and moved > 1e-2


def test_generate_answers(finished, capsys):
    assert cli.main(["generate", "--adapter", str(finished), "--device", "cpu", "--max-new-tokens", "5", "w1 w2"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert set(printed.split()) <= set(WORDS)


def test_pain_1_merge_keeps_the_adapter(model_dir, rows, finished, tmp_path, capsys):
    """The merged model is a plain directory whose logits are those of base + adapter, in 16 bits to rounding."""
    from transformers import AutoModelForCausalLM

    from handtuned.adapted import load_adapted

    out = tmp_path / "merged"
    command = ["merge", "--adapter", str(finished), "--out", str(out), "--device", "cpu", "--data", rows]
    assert cli.main([*command, "--save-dtype", "float32", "--errors"]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("loss on", "bfloat16", "nf4, requantize", "nf4, refit"))

    class Args:
        adapter, model, method, dtype, device = str(finished), None, None, "float32", "cpu"

    adapted, _, _ = load_adapted(Args)
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(5, 40, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert cli.main(command) == 2, "an output directory that is not empty is refused"


def test_pain_2_another_base_is_noticed(finished, tmp_path, capsys):
    other = make_model(tmp_path / "other", seed=5)
    assert cli.main(["generate", "--adapter", str(finished), "--model", other, "--device", "cpu", "w1"]) == 0
    assert "not, bit for bit, the one that the adapter was trained on" in capsys.readouterr().err


def test_pain_9_tied_embeddings_keep_their_training_on_merge(tmp_path, rows):
    """An adapter on the tied output head: merging unties it, in the config too."""
    from handtuned.nn import apply_lora_to_model
    from transformers import AutoModelForCausalLM

    from handtuned.merge import to_plain_model

    place = make_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(place).eval()
    apply_lora_to_model(model, 4, 8, ["lm_head"])
    torch.nn.init.normal_(model.lm_head.lora_B)
    ids = torch.randint(5, 40, (1, 7))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        to_plain_model(model, torch.float32).save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings is False


def test_pain_11_a_typo_in_targets_adapts_nothing(model_dir, rows, tmp_path, capsys):
    out = tmp_path / "out"
    assert finetune(model_dir, rows, out, "--target-modules", "q_proj", "v_prj") == 2
    message = capsys.readouterr().err
    assert "v_prj" in message and "v_proj" in message
    assert not out.exists()


def test_pain_4_an_adapter_that_does_not_fit_is_never_silently_left_out(finished, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    for name, change in (
        ("without-prefix", lambda key: key.removeprefix("base_model.model.")),
        ("other-layer", lambda key: key.replace("layers.1", "layers.7")),
    ):
        broken = tmp_path / name
        shutil.copytree(finished, broken)
        tensors = load_file(finished / "adapter_model.safetensors")
        save_file({change(key): value for key, value in tensors.items()}, broken / "adapter_model.safetensors")
        assert cli.main(["generate", "--adapter", str(broken), "--device", "cpu", "w1"]) == 2
        assert "error:" in capsys.readouterr().err


def test_pain_19_the_end_of_turn_is_learnt_and_shown(model_dir, rows, tmp_path, capsys):
    """pad = end token here, as in SmolLM2; the shown sample marks the end token as learnt."""
    assert finetune(model_dir, rows, tmp_path / "out", "--max-steps", "1") == 0
    shown = capsys.readouterr().out
    assert "<|end|><<" in shown and ">>" in shown
    long = tmp_path / "long.jsonl"
    chat = [{"role": "user", "content": "w1 " * 80}, {"role": "assistant", "content": "w2"}]
    long.write_text(json.dumps({"messages": chat}) + "\n")
    assert finetune(model_dir, str(long), tmp_path / "nothing", "--eval-fraction", "0") == 2
    assert "nothing to learn" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pain_5_and_8_low_precision_trains_with_fp32_adapters(model_dir, rows, tmp_path, dtype):
    from safetensors.torch import load_file

    out = tmp_path / "out"
    assert finetune(model_dir, rows, out, "--dtype", dtype, "--max-steps", "8") == 0
    assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {torch.float32}
    curve = losses(out)
    assert all(value == value for value in curve) and sum(curve[-3:]) < sum(curve[:3])


def test_pain_14_quantizing_does_not_upcast(model_dir):
    from handtuned.models import load_base

    model, _ = load_base(model_dir, "qlora", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}


def test_pain_18_a_gpu_without_bfloat16_gets_float16(monkeypatch):
    from handtuned.models import choose_dtype

    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert choose_dtype("auto", torch.device("cuda")) is expected
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32


def test_pain_17_doctor_says_what_runs_where(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "a CPU tensor" in text and "finetune" in text


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
    (["--target-modules", "nothing"], "matches no linear layer"),
    (["--method", "full"], "invalid choice"),
    (["--device", "cuda:77"], "cuda"),
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


def test_no_disk_space_is_told_before_the_work(model_dir, rows, tmp_path, capsys, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    assert finetune(model_dir, rows, tmp_path / "out") == 2
    assert "no disk space" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_disk_that_fills_up_later_loses_nothing(model_dir, rows, finished, tmp_path, capsys, monkeypatch):
    from handtuned import runstate

    write = runstate.write_safetensors

    def full(path, tensors):
        if "checkpoint-8" in str(path):
            raise OSError(28, "No space left on device")
        write(path, tensors)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(runstate, "write_safetensors", full)
        code = finetune(model_dir, rows, out, "--max-steps", "12", "--save-steps", "4", "--lora-dropout", "0.1")
    assert code == 2 and "No space left on device" in capsys.readouterr().err
    assert not [path for path in out.rglob("*") if ".tmp" in path.name or "checkpoint-8" in path.name]
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert losses(out) == losses(finished)


def test_both_spellings_and_the_ecosystems_names_work(model_dir, rows, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["finetune", "--model_name_or_path", model_dir, "--dataset", rows, "--output_dir", str(out),
                     "--max_steps=1", "--lora_r", "2", "--per_device_train_batch_size", "2", "--device", "cpu",
                     "--max_seq_length", "64"]) == 0  # fmt: skip
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2


def test_settings_name_the_flag():
    with pytest.raises(ValueError, match="--lora-dropout must be in"):
        FinetuneSettings(lora_dropout=1.0)


def test_softcapped_model_gets_its_full_logits(tmp_path):
    """A head that does more than one product is noticed, and the loss is still the model's own."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from handtuned.answers import AnswerModel

    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
                          num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=2.0)  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
    ids = torch.randint(50, (2, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    answers = AnswerModel(model, ids[:1])
    assert answers.head is None
    want = model(input_ids=ids, labels=labels).loss * (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(answers.loss({"input_ids": ids, "labels": labels}), want)
