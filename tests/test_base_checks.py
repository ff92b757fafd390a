"""A base is checked as strictly as an adapter, before anything is trained: its tensors, its kind, its tokenizer."""

import json
import shutil
from pathlib import Path

import finetuned
import pytest
import torch
from finetuned import finetune
from safetensors.torch import load_file, save_file
from tiny import make_model

from handtuned import cli
from handtuned.training.loading import check_causal, load_base

transformers = pytest.importorskip("transformers")

model_dir, rows = finetuned.model_dir, finetuned.rows
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def _set(name, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


TENSORS = {  # what is done to a whole checkpoint → what the message names
    "missing": (lambda t: t.pop(UP), UP),
    "missing norm": (lambda t: t.pop(NORM), NORM),
    "unexpected": (lambda t: t.update({"score.weight": torch.ones(2, 64)}), "score.weight"),
    "a third layer": (lambda t: t.update({k.replace("s.1.", "s.2."): v.clone() for k, v in t.items() if "s.1." in k}),
                      "model.layers.2"),
    "wrong shape": (_set(UP, lambda w: w[:-1].clone()), UP),
    "wrong shape of a norm": (_set(NORM, lambda w: w[:-1].clone()), NORM),
    "NaN": (_set(UP, lambda w: w.index_fill(0, torch.tensor([3]), float("nan"))), UP),
    "infinite norm": (_set(NORM, lambda w: w * float("inf")), NORM),
    "infinite embedding": (_set("model.embed_tokens.weight", lambda w: w * float("inf")), "embed_tokens"),
    "renamed": (lambda t: t.update({"model.layers.1.mlp.up.weight": t.pop(UP)}), UP),
}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("change, named", TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_are_named(model_dir, tmp_path, method, change, named):
    place = tmp_path / "m"
    shutil.copytree(model_dir, place)
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"--model {place}: ") as caught:
        load_base(str(place), method)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_hole_stops_a_run_before_it_begins(model_dir, rows, tmp_path, capsys):
    place = tmp_path / "m"
    shutil.copytree(model_dir, place)
    tensors = load_file(place / "model.safetensors")
    del tensors[UP]
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    assert finetune(str(place), rows, tmp_path / "out") == 2
    assert f"missing: '{UP}'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_names_that_transformers_leaves_out_are_left_out(model_dir, tmp_path, monkeypatch):
    """Old Llama checkpoints hold rotary frequencies for each layer."""
    place = tmp_path / "m"
    shutil.copytree(model_dir, place)
    tensors = load_file(place / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    for method in ("lora", "qlora"):
        if method == "qlora":  # shard by shard, never whole in memory
            monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
        assert load_base(str(place), method)


def _other(model_dir, directory, model):
    shutil.copytree(model_dir, directory, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "gen*"))
    model.save_pretrained(directory)
    return str(directory)


SMALL = {"vocab_size": 45, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
         "max_position_embeddings": 128}  # fmt: skip
OTHERS = {
    "BertForMaskedLM": ("Bert", SMALL, "BertLMHeadModel is not a causal language model"),
    "RobertaForMaskedLM": ("Roberta", SMALL | {"max_position_embeddings": 130}, "is not a causal language model"),
    "LlamaForSequenceClassification": ("Llama", SMALL, "score.weight"),
    "LlamaModel": ("Llama", SMALL, "lm_head.weight"),
    "T5ForConditionalGeneration": ("T5", {"vocab_size": 45, "d_model": 64, "num_layers": 1}, "T5Config"),
    "BartForConditionalGeneration": ("Bart", {"vocab_size": 45, "d_model": 64, "encoder_layers": 1,
                                              "decoder_layers": 1}, "encoder"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_decoder_is_refused(model_dir, rows, tmp_path, capsys, name, method):
    family, sizes, message = OTHERS[name]
    torch.manual_seed(0)
    other = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes))
    place = _other(model_dir, tmp_path / "m", other)
    assert finetune(place, rows, tmp_path / "out", "--method", method, "--max-steps", "1") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"--model {place}: " in line and message in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoders_pass(model_dir, tmp_path, dtype):
    """Attention with a window, experts, a recurrence, learnt positions: nothing looks ahead."""
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    builders = {
        "MixtralForCausalLM": transformers.MixtralConfig(**SMALL, **moe),
        "MistralForCausalLM": transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4),
        "GPT2LMHeadModel": transformers.GPT2Config(vocab_size=45, n_embd=64, n_layer=2, n_head=4, n_positions=32),
        "MambaForCausalLM": transformers.MambaConfig(vocab_size=45, hidden_size=64, num_hidden_layers=2, state_size=4),
    }  # fmt: skip
    for name, config in builders.items():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).to(dtype).eval()
        check_causal(model, torch.randint(45, (16,)), name)


def test_a_forward_pass_that_fails_is_one_line(model_dir):
    model, _ = load_base(model_dir)
    model.model.layers[0].mlp.up_proj.in_features = 7
    model.model.layers[0].mlp.up_proj.weight.data = torch.ones(128, 7)
    with pytest.raises(ValueError, match=r"--model m: a forward pass fails: RuntimeError: mat1") as caught:
        check_causal(model, [5, 6, 7], "m")
    assert "\n" not in str(caught.value)


def _added(model_dir, directory, *tokens, special=False):
    shutil.copytree(model_dir, directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("special", [False, True], ids=["word", "special"])
def test_a_tokenizer_that_is_larger_than_the_embedding(model_dir, tmp_path, special):
    place = _added(model_dir, tmp_path / "m", "<|tool|>", "<|think|>", special=special)
    for method in ("lora", "qlora"):
        with pytest.raises(ValueError, match=r"beyond the 45 rows of its embedding: '<\|think\|>', '<\|tool\|>'"):
            load_base(place, method)
    place = _added(model_dir, tmp_path / "v", "<image_soft_token>", special=True)
    assert load_base(place), "Gemma 3 1B has that"


def test_padded_embeddings_are_usual(model_dir, tmp_path):
    assert load_base(make_model(tmp_path / "m", vocab_size=64))


def test_a_checkpoint_of_another_size_is_told_in_one_line(model_dir, tmp_path, capsys):
    """The config of one model beside the weights of another."""
    place = tmp_path / "m"
    shutil.copytree(model_dir, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    words = ["finetune", "--model", str(place), "--output-dir", str(tmp_path / "out")]
    assert cli.main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "mlp." in line and not Path(tmp_path / "out").exists()
