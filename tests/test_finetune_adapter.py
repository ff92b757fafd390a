"""What `handtuned finetune` has written, in the hands of `generate`, `merge` and peft."""

import json
import os
import shutil
import subprocess
import sys

import finetuned
import pytest
import torch
from finetuned import finetune
from helpers import assert_same_function
from safetensors.torch import load_file
from tiny import WORDS, make_model

from handtuned import cli

pytest.importorskip("transformers")

model_dir, rows, finished = finetuned.model_dir, finetuned.rows, finetuned.finished
LONGEST = 2 * 7 * 128  # terms of the longest chain of sums: 2 layers with 7 products each


def test_peft_loads_the_adapter_with_equal_logits(model_dir, finished):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from handtuned.training.models import load_with_adapter

    class Args:
        adapter, model, method, dtype, device = str(finished), None, "lora", "float32", "cpu"

    ours, _, _ = load_with_adapter(Args)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), str(finished)).eval()
    ids = torch.randint(5, 40, (2, 9))
    with torch.no_grad():
        found, expected = (model(input_ids=ids).logits for model in (ours, theirs))
        before = AutoModelForCausalLM.from_pretrained(model_dir)(ids).logits
    assert_same_function(found, expected, terms=LONGEST)
    assert (found - before).abs().max() > 1e-2


def test_peft_s_patterns_as_flags(model_dir, rows, tmp_path):
    """Adapted as PEFT reads them, written into the config, and kept by --resume."""
    flags = ["--rank-pattern", "q_proj=3", r"layers\.0\..*k_proj=5", "--alpha-pattern", "k_proj=2.5",
             "--exclude-modules", "down_proj", "o_proj", "--layers-to-transform", "0"]  # fmt: skip
    out = tmp_path / "out"
    assert finetune(model_dir, rows, out, "--max-steps", "2", "--save-steps", "1", "--lora-r", "2", *flags) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["rank_pattern"] == {"q_proj": 3, "k_proj": 5}
    assert config["alpha_pattern"] == {"k_proj": 2.5}
    tensors = load_file(out / "adapter_model.safetensors")
    layers = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in tensors}
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    assert layers == {f"model.layers.0.{name}" for name in names}
    assert cli.main(["finetune", "--resume", str(out / "checkpoint-1"), *flags]) == 0
    assert json.loads((out / "adapter_config.json").read_text()) == config


def test_generate_answers(finished, capsys):
    assert cli.main(["generate", "--adapter", str(finished), "--device", "cpu", "--max-new-tokens", "5", "w1 w2"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert set(printed.split()) <= set(WORDS)


def test_pain_1_merge_keeps_the_adapter(model_dir, rows, finished, tmp_path, capsys):
    """The merged model is a plain directory whose logits are those of base + adapter, in 16 bits to rounding."""
    from transformers import AutoModelForCausalLM

    from handtuned.training.models import load_with_adapter

    out = tmp_path / "merged"
    flags = ["--device", "cpu", "--data", rows, "--save-dtype", "float32", "--errors"]
    assert finetuned.merge(finished, out, *flags) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("loss on", "bfloat16", "nf4, requantize", "nf4, refit"))

    class Args:
        adapter, model, method, dtype, device = str(finished), None, None, "float32", "cpu"

    adapted, _, _ = load_with_adapter(Args)
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(5, 40, (2, 9))
    with torch.no_grad():
        assert_same_function(merged(ids).logits, adapted(input_ids=ids).logits, terms=LONGEST)
    assert finetuned.merge(finished, out, *flags) == 2, "an output directory that is not empty is refused"


def test_pain_19_a_merged_model_stops_where_training_taught_it_to(tmp_path, rows):
    """Programs that load it know of no chat template's end but by generation_config.json."""
    base = make_model(tmp_path / "base", eos_token_id=9)
    assert finetune(base, rows, tmp_path / "run", "--max-steps", "1") == 0
    assert finetuned.merge(tmp_path / "run", tmp_path / "merged") == 0
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [0, 9]


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
        assert_same_function(merged(ids).logits, want, terms=LONGEST)
    assert merged.config.tie_word_embeddings is False


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


def test_a_checkpoint_knows_its_base_as_the_whole_run_does(finished, capsys):
    """Taken from a run in 4 bits, it must not be put on the base in 32."""
    from handtuned.quant import NF4Linear

    from handtuned.training.models import load_with_adapter

    class Args:
        adapter, model, method, dtype, device = str(finished / "checkpoint-8"), None, None, "float32", "cpu"

    model, _, record = load_with_adapter(Args)
    assert any(isinstance(module, NF4Linear) for module in model.modules()) and record["method"] == "qlora"
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("listed", [False, True], ids=["one-end", "two-ends"])
def test_pain_19_generation_stops_where_training_taught_it_to(model_dir, listed):
    """The template ends a turn with <|end|>; the base model's own end of text is another token."""
    from handtuned.training import evaluation
    from handtuned.training.models import load_base

    model, tokenizer = load_base(model_dir)
    model.generation_config.eos_token_id = [9, 10] if listed else 9
    seen = {}
    generate = model.generate
    model.generate = lambda **options: seen.update(options) or generate(**options)
    evaluation.generate(model, tokenizer, [[{"role": "user", "content": "w1"}]], max_new_tokens=2)
    assert seen["eos_token_id"] == ([0, 9, 10] if listed else [0, 9])


def test_prompts_beyond_the_context(tmp_path, rows, capsys):
    """GPT-2's position table ends where its context does: no held-out sample and no answer may reach past it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    place = make_model(tmp_path / "model")
    config = GPT2Config(vocab_size=45, n_embd=32, n_layer=1, n_head=2, n_positions=64, eos_token_id=0, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(place)
    held_out = tmp_path / "held-out.jsonl"
    prompts = ["w1 " * 80, "w1 " * 30]
    held_out.write_text("\n".join(json.dumps({"prompt": prompt, "completion": "w2"}) for prompt in prompts))
    out = tmp_path / "out"
    assert finetune(place, rows, out, "--eval-data", str(held_out), "--max-steps", "1") == 0
    (shown,) = json.loads((out / "results.json").read_text())["answers"]
    assert shown["prompt"].split() == ["w1"] * 30
    capsys.readouterr()
    assert cli.main(["generate", "--adapter", str(out), "--device", "cpu", "--max-new-tokens", "100", "w1"]) == 0
    assert cli.main(["generate", "--adapter", str(out), "--device", "cpu", prompts[0]]) == 2
    assert "no room for an answer in the model's context of 64" in capsys.readouterr().err


@pytest.mark.parametrize("flag, value, message", [
    ("--seed", "-1", "--seed must be in [0, 2^63), got -1"),
    ("--seed", str(2**63), "--seed must be in [0, 2^63), got 9223372036854775808"),
    ("--temperature", "nan", "--temperature must be 0, or finite and at least 1e-30, got nan"),
    ("--temperature", "1e-40", "--temperature must be 0, or finite and at least 1e-30, got 1e-40"),
])  # fmt: skip
def test_generate_refuses_what_it_cannot_sample_by(finished, capsys, flag, value, message):
    assert cli.main(["generate", "--adapter", str(finished), flag, value, "w1"]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["generate", "--adapter", str(finished), "--temperature", "1e-30", "w1"]) == 0


def test_a_damaged_record_is_named(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    for text in ("[]", '{"paths": 3}'):
        (tmp_path / "out" / "handtuned.json").write_text(text)
        assert cli.main(["generate", "--adapter", str(tmp_path / "out"), "w1"]) == 2
        assert "handtuned.json is damaged: " in capsys.readouterr().err


def test_generate_in_a_pipe(finished):
    """Answers on stdout and nothing else; a reader that goes away, or an alphabet without é, is not an error."""
    words = [sys.executable, "-m", "handtuned", "generate", "--adapter", str(finished), "--device", "cpu",
             "--max-new-tokens", "2"]  # fmt: skip
    done = subprocess.run(words, input="w1\nw2\n\nw3\n", capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3, done.stderr
    deaf = subprocess.Popen([*words, "w1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deaf.stdout.close()
    assert "error" not in deaf.stderr.read().lower() and deaf.wait() == 141
    deaf.stderr.close()


def test_what_a_terminal_cannot_show_stops_nothing():
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code = "from handtuned import cli; cli.main([]); print('→')"
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\\u2192\n"), done.stderr
