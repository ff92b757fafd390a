"""`handtuned merge`: every layer back in its class, a directory that transformers reads, and nothing that stops it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import finetuned
import pytest
import torch
from finetuned import finetune
from handtuned.nn import apply_lora_to_model
from handtuned.quant import quantize_model
from helpers import assert_same_function
from safetensors.torch import load_file
from tiny import make_model

from handtuned import cli, merge
from handtuned.training.models import load_with_adapter, training_record
from handtuned.training.saving import mend_generation_config

transformers = pytest.importorskip("transformers")

model_dir, rows, finished = finetuned.model_dir, finetuned.rows, finetuned.finished
IDS = torch.arange(5, 17)[None]
TERMS = 2 * 8 * 256  # the longest chain of sums in these models


def _beside(model_dir, directory, model):
    """Another model with the tokenizer of the tiny one."""
    shutil.copytree(model_dir, directory, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "gen*"))
    model.save_pretrained(directory)
    return str(directory)


def _gpt2(**sizes):
    torch.manual_seed(0)
    config = {"vocab_size": 45, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | {"bos_token_id": 0} | sizes)).eval()


def _falcon():
    torch.manual_seed(0)
    config = transformers.FalconConfig(vocab_size=45, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    return transformers.FalconForCausalLM(config).eval()


@pytest.mark.parametrize("build", [_gpt2, _falcon], ids=["Conv1D", "FalconLinear"])
@pytest.mark.parametrize("adapted", ["all-linear", ["c_attn", "query_key_value"]], ids=["all", "some"])
def test_every_layer_is_of_its_own_class_again(build, adapted):
    """Quantized, with and without an adapter, merged: the state dict is that of the model, to the 4 bits."""
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    quantize_model(model)
    targets = adapted if adapted == "all-linear" else [n for n in adapted if any(n in path for path in kinds)]
    apply_lora_to_model(model, rank=2, target_modules=targets)
    merge.to_plain_model(model, torch.float32)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert after[name].shape == weight.shape, name
        assert (after[name] - weight).norm() <= 0.15 * weight.norm(), f"{name}: more than rounding to 4 bits"


def _merged(run, out, *flags):
    assert finetuned.merge(run, out, "--device", "cpu", *flags) == 0
    return transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def _adapted(run):
    given = SimpleNamespace(adapter=str(run), model=None, method=None, dtype="float32", device="cpu")
    return load_with_adapter(given)[0]


def _same(merged, adapted):
    with torch.no_grad():
        assert_same_function(merged(input_ids=IDS).logits, adapted(input_ids=IDS).logits, terms=TERMS)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_gpt2_merges(model_dir, rows, tmp_path, method):
    place = _beside(model_dir, tmp_path / "m", _gpt2())
    assert finetune(place, rows, tmp_path / "run", "--method", method, "--max-steps", "3") == 0
    merged = _merged(tmp_path / "run", tmp_path / "out", "--save-dtype", "float32")
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    _same(merged, _adapted(tmp_path / "run"))


@pytest.mark.parametrize("onto", ["quantized", "original"])
def test_a_base_of_bitsandbytes_merges(model_dir, rows, tmp_path, onto):
    pytest.importorskip("bitsandbytes")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=how, device_map="cpu")
    place = _beside(model_dir, tmp_path / "m", base)
    assert finetune(place, rows, tmp_path / "run", "--max-steps", "3") == 0
    merged = _merged(tmp_path / "run", tmp_path / "out", "--save-dtype", "float32", "--onto", onto)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    _same(merged, _adapted(tmp_path / "run"))


def test_a_sum_is_rounded_once(rows, tmp_path):
    """The base in 16 bits, merged into 32: what 4 bits decode to is not rounded to 16 first."""
    place = make_model(tmp_path / "m")
    transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).save_pretrained(place)
    assert finetune(place, rows, tmp_path / "run", "--max-steps", "1") == 0
    _merged(tmp_path / "run", tmp_path / "out", "--save-dtype", "float32")
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    layer = _adapted(tmp_path / "run").model.layers[0].mlp.up_proj
    expected = layer.base_layer.dequantize(torch.float32).weight + layer.delta_weight()
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(weight, weight.bfloat16().float())


GENERATION = {
    "sampling": ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),
    "pad": ({"pad_token_id": -1, "max_length": 99}, {"max_length": 99}),
    "beams": ({"early_stopping": True, "length_penalty": 2.0, "top_k": 20}, {"top_k": 20, "do_sample": True}),
    "scores": ({"output_scores": True, "temperature": 0.3}, {"temperature": 0.3}),
    "cache": ({"use_cache": False, "cache_implementation": "static"}, {"cache_implementation": "static"}),
    "good": ({"temperature": 0.3, "do_sample": True, "top_k": 7}, {"temperature": 0.3, "do_sample": True, "top_k": 7}),
}  # fmt: skip


@pytest.mark.parametrize("written, kept", GENERATION.values(), ids=GENERATION)
def test_a_generation_config_is_mended_as_little_as_it_must_be(tmp_path, capsys, written, kept):
    config = transformers.GenerationConfig(**written)
    config.eos_token_id = [0, 9]
    mend_generation_config(config)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert kept.items() <= saved.items() and saved["eos_token_id"] == [0, 9]
    assert not any(name in saved and saved[name] == written[name] for name in written.keys() - kept.keys())
    assert ("would not save" in capsys.readouterr().out) == (written != kept)


def _with_generation(model_dir, directory, **settings):
    shutil.copytree(model_dir, directory)
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return str(directory)


def test_errands_that_fail_are_told_and_the_merge_goes_on(model_dir, rows, tmp_path, capsys, monkeypatch):
    place = _with_generation(model_dir, tmp_path / "m", temperature=0.6, top_p=0.9)
    data = tmp_path / "held.jsonl"
    shutil.copy(rows, data)
    assert finetune(place, rows, tmp_path / "run", "--eval-data", str(data), "--max-steps", "1") == 0
    empty = json.dumps({"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": ""}]})
    record = training_record(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    for text in ("{", empty, None):
        data.unlink() if text is None else data.write_text(text + "\n")
        assert merge._errand("it", lambda: merge._probe(None, tokenizer, record)) is None
        assert "note: it is not measured: " in capsys.readouterr().err
    shutil.copy(rows, data)
    monkeypatch.setattr(merge, "merge_errors", lambda *args, **more: 1 / 0)
    monkeypatch.setattr(merge.CausalLM, "score", lambda *args: torch.ones(2) @ torch.ones(3))
    _merged(tmp_path / "run", tmp_path / "out")
    said = capsys.readouterr()
    assert "what merging loses is not measured: ZeroDivisionError" in said.err
    assert "the loss with the adapter is not measured: RuntimeError" in said.err and "loss on" not in said.out


def _transposed(tensors):
    tensors["model.layers.1.self_attn.o_proj.weight"] = tensors["model.layers.1.self_attn.o_proj.weight"].t()


def _renamed(tensors):
    tensors["model.layers.7.self_attn.o_proj.weight"] = tensors.pop("model.layers.1.self_attn.o_proj.weight")


@pytest.mark.parametrize("fault, message", [(_transposed, "other logits"), (_renamed, "does not read the merged")])
def test_what_is_read_back_otherwise_is_no_success(finished, tmp_path, capsys, monkeypatch, fault, message):
    whole = transformers.PreTrainedModel.save_pretrained

    def spoiled(self, directory, **more):
        state = dict(self.state_dict())
        state.pop("lm_head.weight", None)
        fault(state)
        whole(self, directory, state_dict={name: t.contiguous() for name, t in state.items()}, **more)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", spoiled)
    out = tmp_path / "out"
    assert cli.main(["merge", "--adapter", str(finished), "--out", str(out), "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert message in said.err and "nothing was written" in said.err and "merged model in" not in said.out
    assert list(tmp_path.iterdir()) == []


def test_the_other_parts_of_a_multimodal_model_are_kept(model_dir, rows, tmp_path):
    text = {"vocab_size": 45, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
            "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14, "vision_use_head": False}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, eos_token_id=0,
                                       boi_token_index=42, eoi_token_index=43, image_token_index=44)  # fmt: skip
    base = transformers.Gemma3ForConditionalGeneration(config)
    place = _beside(model_dir, tmp_path / "m", base)
    (Path(place) / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    flags = ["--method", "lora", "--target-modules", r".*language_model.*_proj", "--max-steps", "2"]
    assert finetune(place, rows, tmp_path / "run", *flags) == 0
    assert finetuned.merge(tmp_path / "run", tmp_path / "out", "--save-dtype", "float32") == 0
    before, after = (load_file(where / "model.safetensors") for where in (Path(place), tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("language_model" in name for name in changed)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert type(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")) is type(base)


def test_code_of_the_base_goes_along(model_dir, rows, tmp_path, capsys):
    from test_base_sources import CODE

    place = tmp_path / "own"
    shutil.copytree(model_dir, place)
    for name, source in CODE.items():
        (place / name).write_text(source)
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"],
               "auto_map": {"AutoConfig": "configuration_own.OwnConfig",
                            "AutoModelForCausalLM": "modeling_own.OwnModel"}}  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    run, out = tmp_path / "run", tmp_path / "out"
    assert finetune(str(place), rows, run, "--max-steps", "1") == 2
    assert finetune(str(place), rows, run, "--max-steps", "1", "--trust-remote-code") == 0
    command = ["merge", "--adapter", str(run), "--out", str(out)]
    assert cli.main(command) == 2 and cli.main(["generate", "--adapter", str(run), "w1"]) == 2
    assert capsys.readouterr().err.count("then add --trust-remote-code") == 3
    assert cli.main([*command, "--trust-remote-code"]) == 0
    assert cli.main(["generate", "--adapter", str(run), "--max-new-tokens", "2", "--trust-remote-code", "w1"]) == 0
    assert (out / "modeling_own.py").is_file() and "auto_map" in json.loads((out / "config.json").read_text())
