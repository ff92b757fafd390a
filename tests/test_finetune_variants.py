"""The variants of LoRA by flag: trained, resumed to the bit, loaded by PEFT, merged; and adapters to start from."""

import json
import re
import shutil

import finetuned
import peft
import pytest
import ranks
import torch
from finetuned import COMMON, finetune, losses
from helpers import assert_same_function
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from handtuned import cli
from handtuned.training.models import load_with_adapter

model_dir, rows = finetuned.model_dir, finetuned.rows
LONGEST = 2 * 7 * 128  # terms of the longest chain of sums: 2 layers with 7 products each
IDS = torch.arange(5, 23).view(2, 9)
DENSE = ["--method", "lora"]
VARIANTS = {
    "dora": ["--use-dora"],
    "rslora": ["--use-rslora", "--rank-pattern", "q_proj=3"],
    "gaussian": ["--init-lora-weights", "gaussian"],
    "pissa": [*DENSE, "--init-lora-weights", "pissa"],
    "loftq": ["--init-lora-weights", "loftq"],
    "lora+": ["--loraplus-lr-ratio", "4"],
    "lora-fa": ["--lora-fa"],
    "all": [*DENSE, "--use-dora", "--use-rslora", "--init-lora-weights", "pissa", "--loraplus-lr-ratio", "4",
            "--lora-fa"],
}  # fmt: skip


def of(out, method=None):
    class Args:
        adapter, model, dtype, device = str(out), None, "float32", "cpu"

    Args.method = method
    return load_with_adapter(Args)[0]


def weights(out):
    return load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_trained_resumed_and_understood_by_all(model_dir, rows, tmp_path, capsys, variant):
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert finetune(model_dir, rows, out, "--max-steps", "4", "--save-steps", "2", *VARIANTS[variant]) == 0
    whole, began = weights(out), weights(out / "checkpoint-2")
    assert losses(out)[-1] < losses(out)[0]
    moved = {key for key in whole if not torch.equal(whole[key], began[key])}
    assert moved == {key for key in whole if "lora_A" not in key or "--lora-fa" not in VARIANTS[variant]}

    seen = losses(out)
    shutil.rmtree(out / "checkpoint-4")
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert losses(out) == seen and all(torch.equal(value, weights(out)[key]) for key, value in whole.items())

    ours = of(out, "lora")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), str(out)).eval()
    with torch.no_grad():
        assert_same_function(ours(IDS).logits, theirs(IDS).logits, terms=LONGEST)
        expected = of(out)(IDS).logits
    assert finetuned.merge(out, merged, "--save-dtype", "float32") == 0
    with torch.no_grad():
        assert_same_function(AutoModelForCausalLM.from_pretrained(merged)(IDS).logits, expected, terms=LONGEST)
    assert cli.main(["generate", "--adapter", str(out), "--max-new-tokens", "3", "w1 w2"]) == 0


def first_step(model_dir, rows, out, *flags):
    """The plan's line on what is trained, the first loss, and the adapter after a step at a rate too small to move."""
    assert finetune(model_dir, rows, out, "--max-steps", "1", "--learning-rate", "1e-30", *flags) == 0
    return losses(out)[0], weights(out)


def test_each_start_is_what_its_name_says(model_dir, rows, tmp_path, capsys):
    """Before the first step: PiSSA and DoRA compute what the base does, LoftQ is nearer to the dense weights."""
    plain, _ = first_step(model_dir, rows, tmp_path / "plain", *DENSE)
    for name in ("pissa", "dora"):
        loss, start = first_step(model_dir, rows, tmp_path / name, *VARIANTS[name][-2:], *DENSE)
        assert loss == pytest.approx(plain, rel=1e-5)
    A = next(value for key, value in weights(tmp_path / "pissa").items() if "q_proj.lora_A" in key)
    assert A.shape[0] == 16, "A and what it started as"
    _, start = first_step(model_dir, rows, tmp_path / "gaussian", "--init-lora-weights", "gaussian")
    spread = torch.cat([value.flatten() for key, value in start.items() if "lora_A" in key]).std().item()
    assert spread == pytest.approx(1 / 8, rel=0.05)
    assert all(value.abs().max() < 1e-20 for key, value in start.items() if "lora_B" in key)

    base = AutoModelForCausalLM.from_pretrained(model_dir)
    _, start = first_step(model_dir, rows, tmp_path / "nf4")
    _, start = first_step(model_dir, rows, tmp_path / "loftq", "--init-lora-weights", "loftq")
    with torch.no_grad():
        exact = base(IDS).logits
        far, near = ((of(tmp_path / name)(IDS).logits - exact).norm() for name in ("nf4", "loftq"))
    assert near < 0.8 * far


def test_loraplus_rates_and_the_plan(model_dir, rows, tmp_path, capsys):
    """AdamW's first step moves an element by its rate: B's here is 4 times A's."""
    flags = ["--warmup-ratio", "0", "--loraplus-lr-ratio", "4", "--use-rslora", "--lora-r", "4"]
    assert finetune(model_dir, rows, tmp_path / "fast", "--max-steps", "2", "--save-steps", "1", *flags) == 0
    printed = capsys.readouterr().out
    assert "LoRA r 4, alpha 16, rsLoRA, LoRA+ 4.0 on 14 layers" in printed
    config = json.loads((tmp_path / "fast" / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["lora_alpha"] == 16
    first = weights(tmp_path / "fast" / "checkpoint-1")
    step = max(value.abs().max().item() for key, value in first.items() if "lora_B" in key)
    assert step == pytest.approx(4e-2, rel=1e-3)
    groups = json.loads((tmp_path / "fast" / "checkpoint-1" / "state.json").read_text())["param_groups"]
    assert [group["initial_lr"] for group in groups] == [1e-2, 4e-2]
    assert finetune(model_dir, rows, tmp_path / "fa", "--max-steps", "1", "--lora-fa") == 0
    trained = int(re.search(r"trainable +([\d,]+)", capsys.readouterr().out)[1].replace(",", ""))
    assert trained == sum(value.numel() for key, value in weights(tmp_path / "fa").items() if "lora_B" in key)


@pytest.mark.parametrize("flags, message", [
    (["--init-lora-weights", "pissa"], "--init-lora-weights pissa needs --method lora, got qlora"),
    (["--init-lora-weights", "loftq", *DENSE], "--init-lora-weights loftq needs --method qlora, got lora"),
    (["--init-lora-weights", "zeros"], "--init-lora-weights"),
    (["--loraplus-lr-ratio", "0"], "--loraplus-lr-ratio must be a finite number above 0, got 0.0"),
    (["--init-adapter", "/nowhere"], "/nowhere/adapter_config.json: no such file"),
    (["--init-adapter", "/nowhere", "--lora-r", "8"], "--init-adapter brings its own --lora-r"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(model_dir, rows, tmp_path, capsys, flags, message):
    assert finetune(model_dir, rows, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", ["rslora", "dora", "pissa"])
def test_going_on_from_an_adapter(model_dir, rows, tmp_path, capsys, variant):
    """The first loss is the one that the adapter ends with; rank, scale and layers are the adapter's own."""
    first, second = tmp_path / "first", tmp_path / "second"
    flags = [*DENSE, "--eval-fraction", "0", "--per-device-train-batch-size", "24"]
    assert finetune(model_dir, rows, first, "--max-steps", "3", *VARIANTS[variant], *flags) == 0
    config = json.loads((first / "adapter_config.json").read_text())
    start = ["--init-adapter", str(first), "--save-steps", "1", "--max-steps", "3"]
    assert finetune(model_dir, rows, second, *start, *flags) == 0
    assert f"LoRA from {first} on 14 layers" in capsys.readouterr().out
    assert json.loads((second / "adapter_config.json").read_text()) == config
    assert finetune(model_dir, rows, tmp_path / "longer", "--max-steps", "1", *flags, *start[:2]) == 0
    assert losses(second)[0] < losses(first)[-1]
    assert losses(tmp_path / "longer")[0] == losses(second)[0]
    seen = losses(second)
    shutil.rmtree(second / "checkpoint-3")
    assert cli.main(["finetune", "--resume", str(second)]) == 0 and losses(second) == seen
    save_file({key: value + 1 for key, value in weights(first).items()}, first / "adapter_model.safetensors")
    assert cli.main(["finetune", "--resume", str(second)]) == 2
    assert "the adapter of --init-adapter is not what it was" in capsys.readouterr().err


def test_going_on_from_an_adapter_of_peft_with_a_whole_module(model_dir, rows, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    out = tmp_path / "out"
    start = ["--init-adapter", str(tmp_path / "theirs"), "--max-steps", "3", "--save-steps", "2", *DENSE]
    assert finetune(model_dir, rows, out, *start) == 0
    whole, seen = weights(out), losses(out)
    assert not torch.equal(whole["base_model.model.lm_head.weight"], base.lm_head.weight)
    shutil.rmtree(out / "checkpoint-3")
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert losses(out) == seen and all(torch.equal(value, weights(out)[key]) for key, value in whole.items())


def test_another_base_than_the_adapter_s_is_told(model_dir, rows, tmp_path, capsys):
    assert finetune(model_dir, rows, tmp_path / "first", "--max-steps", "1") == 0
    other = make_model(tmp_path / "other", seed=3)
    words = ["finetune", "--model", other, "--data", rows, *COMMON, "--max-steps", "1"]
    adapter, out = str(tmp_path / "first"), str(tmp_path / "out")
    assert cli.main([*words, "--output-dir", out, "--init-adapter", adapter]) == 0
    assert "not, bit for bit, the one that the adapter was trained on" in capsys.readouterr().err


@pytest.mark.parametrize("parallel", ["fsdp", "zero3"])
def test_shards_of_every_variant_train_as_one_process(model_dir, rows, tmp_path, parallel):
    """Magnitudes and factors are cut, LoRA+ takes them in another order, LoRA-FA leaves half of them out."""
    flags = ["--model", model_dir, "--data", rows, *COMMON, "--max-steps", "4", "--save-steps", "2",
             "--warmup-ratio", "0", *VARIANTS["all"]]  # fmt: skip
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert cli.main(["finetune", *flags, "--output-dir", str(alone), "--gradient-accumulation-steps", "2"]) == 0
    ranks.finetune(*flags, "--output-dir", str(two), "--parallel", parallel)
    assert losses(two) == pytest.approx(losses(alone), rel=2e-5)
    seen, whole = losses(two), weights(two)
    shutil.rmtree(two / "checkpoint-4")
    ranks.finetune("--resume", str(two), "--parallel", parallel)
    assert losses(two) == seen and all(torch.equal(value, weights(two)[key]) for key, value in whole.items())
    shutil.rmtree(two / "checkpoint-4")
    assert cli.main(["finetune", "--resume", str(two)]) == 0  # by one process
    assert losses(two) == pytest.approx(seen, rel=2e-5)


@pytest.mark.parametrize("variant", ["dora", "pissa", "loftq"])
def test_the_transposed_layers_of_gpt2_too(rows, tmp_path, variant):
    """Square ones would fit either way round; NF4 and the decompositions must take them as PEFT does."""
    place, out = make_model(tmp_path / "model"), tmp_path / "out"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=45, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(place)
    assert finetune(place, rows, out, "--max-steps", "2", *VARIANTS[variant]) == 0
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place), str(out)).eval()
    with torch.no_grad():
        assert_same_function(of(out, "lora")(IDS).logits, theirs(IDS).logits, terms=LONGEST)
    if variant == "loftq":
        still = ["--max-steps", "1", "--learning-rate", "1e-30", "--lora-r", "32"]
        assert finetune(place, rows, tmp_path / "nf4", *still) == 0
        assert finetune(place, rows, tmp_path / "start", *still, *VARIANTS[variant]) == 0
        with torch.no_grad():
            exact = AutoModelForCausalLM.from_pretrained(place)(IDS).logits
            far, near = ((of(tmp_path / name)(IDS).logits - exact).norm() for name in ("nf4", "start"))
        assert near < 0.6 * far
