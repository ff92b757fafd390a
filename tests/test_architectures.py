"""Architectures unlike Llama through the commands: trained, resumed, merged, in PEFT. `make check-models` takes all."""

import json
import warnings
from types import SimpleNamespace

import check_models
import finetuned
import pytest
import tiny_architectures
import torch
from handtuned.nn import apply_lora_to_model, load_adapter, lora_parameters, save_adapter
from handtuned.nn.inject import lora_layers
from handtuned.quant import NF4Linear, load_quantized, quantize_model

from handtuned.cli import main
from handtuned.training.data import context_length
from handtuned.training.models import load_base

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")


@pytest.mark.parametrize("name, said", [
    ("gemma3", "which text does not train"), ("llama4_text", "Llama4Router"), ("mamba", "left dense: 6 layers"),
    ("gemma3n_text", "altup"), ("gpt_neo", "–"), ("rwkv", "left dense: 4 layers"), ("glm_moe_dsa", "indexer"),
    ("qwen3_next", "PEFT takes 6 layers"),
])  # fmt: skip
def test_every_step_of_the_way(name, said, tmp_path):
    row = check_models.check(name, tmp_path)
    in_peft = "with `--save-for peft`" if "PEFT takes" in row["what is said"] else "yes"
    assert [row[column] for column in ("trains", "resume", "merge", "PEFT")] == ["yes", "yes", "yes", in_peft]
    assert said in row["what is said"]
    if name not in ("llama4_text", "qwen3_next", "glm_moe_dsa"):  # most of whose parameters are experts'
        assert float(row["adapted"].rstrip("%")) > 40


@pytest.fixture
def tiny(tmp_path):
    """finetune on an architecture: its name and flags → exit code."""
    rows = tiny_architectures.write_rows(tmp_path / "rows.jsonl")

    def finetune(name, *flags):
        if not (tmp_path / name).exists():
            tiny_architectures.make(name, tmp_path / name)
        words = ["finetune", "--model", tmp_path / name, "--data", rows, "--output-dir", tmp_path / f"{name}-run",
                 "--max-steps", 1, "--batch-size", 2, "--max-seq-length", 48, "--eval-fraction", 0.125]  # fmt: skip
        return main([str(word) for word in (*words, *flags)])

    finetune.path = tmp_path
    return finetune


def test_warnings_of_a_command_are_one_line():
    main(["--version"])
    assert warnings.formatwarning("left dense", UserWarning, "file.py", 1) == "note: left dense\n"


def test_names_leave_the_vision_tower_alone_too(tiny):
    with pytest.warns(UserWarning, match=r"left without adapters: 4 layers \(model\.vision_tower\..*text does not"):
        assert tiny("gemma3", "--target-modules", "q_proj", "v_proj") == 0
    config = json.loads((tiny.path / "gemma3-run" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 4 and all("language_model" in path for path in config["target_modules"])


def test_names_of_idle_layers_alone_are_refused(tiny, capsys):
    assert tiny("gemma3", "--target-modules", r".*vision_tower.*q_proj") == 2
    assert "error: target_modules: text trains none of the selected layers, 2 layers" in capsys.readouterr().err


def test_skip_modules_stay_dense_and_are_recorded(tiny):
    assert tiny("llama", "--skip-modules", "down_proj,layers.0") == 0
    record = json.loads((tiny.path / "llama-run" / "handtuned.json").read_text())
    assert record["skip_modules"] == ["down_proj", "layers.0"]
    model, _ = load_base(str(tiny.path / "llama"), "qlora", skip=record["skip_modules"])
    dense = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert dense == {path for path in dense if ".0." in path or path.endswith("down_proj")} and len(dense) == 8
    assert finetuned.merge(tiny.path / "llama-run", tiny.path / "merged") == 0


@pytest.mark.parametrize("flags, said", [
    (["--skip-modules", "nothing_like_it"], "skip names 'nothing_like_it', which is not part of any module's path"),
    (["--skip-modules", "q_proj", "--method", "lora"], "--skip-modules leaves layers dense under --method qlora"),
    (["--skip-modules", ","], "--skip-modules must be at least one name"),
    (["--save-for", "vllm"], "argument --save-for: invalid choice: 'vllm'"),
])  # fmt: skip
def test_refusals(tiny, capsys, flags, said):
    assert tiny("llama", *flags) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name, context", [("llama", 256), ("qwen3_vl", 256), ("xlnet", None), ("mamba", None)])
def test_the_context_is_that_of_the_text(name, context):
    assert context_length(SimpleNamespace(config=tiny_architectures.config_of(name))) == context


def test_what_peft_cannot_load_is_refused_before_training(tiny, capsys):
    flags = ["--target-modules", "in_proj", "out_proj", "--save-for", "peft"]
    assert tiny("mamba2", *flags) == 2
    assert ("--save-for peft: PEFT refuses an adapter on 2 layers (backbone.layers.*.mixer.out_proj) of mamba2; leave "
            "these layers out by --exclude-modules") in capsys.readouterr().err  # fmt: skip
    assert tiny("mamba2", *flags, "--exclude-modules", "out_proj") == 0


def test_names_as_peft_finds_them_are_resumed_from(tiny):
    """Laguna's shared experts; A, which is not trained, is read from the file."""
    run = tiny.path / "laguna-run"
    assert tiny("laguna", "--save-for", "peft", "--lora-fa", "--max-steps", "2", "--save-steps", "1") == 0
    before = (run / "adapter_model.safetensors").read_bytes()
    assert b"mlp.shared_expert.gate_proj.lora_A" in before and b"shared_experts" not in before
    assert main(["finetune", "--resume", str(run / "checkpoint-1")]) == 0
    assert (run / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_residuals_in_fp32_meet_a_head_in_16_bits(tiny, method):
    assert tiny("mamba2", "--dtype", "bfloat16", "--method", method) == 0


def test_names_of_experts_parameters_lead_to_their_flag(tiny, capsys):
    assert tiny("qwen3_moe", "--target-modules", "gate_up_proj") == 2
    said = capsys.readouterr().err
    assert "names no linear layer but parameters" in said and "put it in target_parameters" in said


def adapted(name, targets="all-linear", kind=transformers.AutoModelForCausalLM):
    torch.manual_seed(0)
    model = kind.from_config(tiny_architectures.config_of(name)).eval()
    apply_lora_to_model(model, 2, target_modules=targets)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.1)
    return model


IDS = torch.arange(4, 36)[None]


@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe", "qwen2_moe", "glm4_moe"])
def test_dense_layers_beside_fused_experts_in_peft(name, tmp_path, recwarn):
    """What PEFT would take for experts is applied by it, and by us, when written as parameters."""
    torch.manual_seed(0)
    bases = [transformers.AutoModelForCausalLM.from_config(tiny_architectures.config_of(name)).eval()]
    bases += [transformers.AutoModelForCausalLM.from_config(bases[0].config).eval() for _ in range(2)]
    for base in bases[1:]:
        base.load_state_dict(bases[0].state_dict())
    apply_lora_to_model(bases[0], 2, target_modules="all-linear")
    with torch.no_grad():
        for parameter in lora_parameters(bases[0]):
            parameter.normal_(std=0.1)
        want = bases[0](IDS).logits
    redirected = name != "qwen2_moe"  # which PEFT leaves out of its own table
    recwarn.clear()
    save_adapter(bases[0], tmp_path / "any")
    told = [str(w.message) for w in recwarn if "for the fused experts" in str(w.message)]
    assert bool(told) == redirected
    save_adapter(bases[0], tmp_path / "peft", save_for="peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert bool(config["target_parameters"]) == redirected and config["lora_dropout"] == 0
    with torch.no_grad():
        there = peft.PeftModel.from_pretrained(bases[1], str(tmp_path / "peft"))(IDS).logits
        load_adapter(bases[2], tmp_path / "peft")
        torch.testing.assert_close(bases[2](IDS).logits, want)
    torch.testing.assert_close(there, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("name, targets, said", [
    ("mamba2", ["out_proj"], r"PEFT refuses an adapter on 2 layers \(.*mixer\.out_proj\) of mamba2"),
    ("zamba2", ["out_proj"], r"PEFT's adapter on .*out_proj\) does not act where the model's code reads the weight"),
    ("laguna", ["gate_proj"], r"PEFT looks for 1 layers \(.*shared_experts\.gate_proj\) under names that no layer has"),
    ("jamba", ["dt_proj"], r"PEFT's adapter on 1 layers \(model\.layers\.\*\.mamba\.dt_proj\) does not act"),
])  # fmt: skip
def test_saving_says_where_peft_differs(name, targets, said, tmp_path):
    with pytest.warns(UserWarning, match=said):
        save_adapter(adapted(name, targets), tmp_path)


@pytest.mark.parametrize("name, causal", [
    ("qwen3_5", "Qwen3_5ForCausalLM"), ("llama4", "Llama4ForCausalLM"), ("mllama", "MllamaForCausalLM"),
    ("gemma3", None), ("qwen3_vl", None),
])  # fmt: skip
def test_another_class_of_the_same_base_is_said(name, causal, tmp_path, recwarn):
    model = adapted(name, kind=transformers.AutoModelForImageTextToText)
    recwarn.clear()
    save_adapter(model, tmp_path)
    told = [str(w.message) for w in recwarn if "have other names" in str(w.message)]
    mapping = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
    if causal is None:
        assert not told and mapping is None
    else:
        assert f"in {causal}, which AutoModelForCausalLM makes of this base" in told[0]
        assert mapping == {"base_model_class": type(model).__name__, "parent_library": "transformers"}


@pytest.mark.parametrize("name", ["gpt_neo", "gpt_bigcode", "gemma3n_text", "falcon_mamba", "gemma3", "qwen3_vl"])
def test_buffers_of_any_kind_are_recomputed(name, tmp_path):
    """Loaded shard by shard from the meta device, the model is the one that was quantized whole."""
    kind = getattr(transformers, tiny_architectures.make(name, tmp_path))
    whole = quantize_model(kind.from_pretrained(tmp_path, dtype=torch.float32)).eval()
    with torch.device("meta"):
        model = kind(whole.config)
    load_quantized(model, tmp_path)
    now, want = model.state_dict(), whole.state_dict()
    assert now.keys() == want.keys() and all(torch.equal(now[key], want[key]) for key in want)
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS, use_cache=False).logits, whole(IDS, use_cache=False).logits)
    assert any(isinstance(module, NF4Linear) for module in model.modules())


def test_a_step_whose_rows_miss_a_layer_goes_on(tiny):
    """DeepSeek V4 compresses 128 tokens at a time; shorter rows leave that part alone."""
    with pytest.warns(UserWarning, match=r"trainable parameters met no row of a step, the first is .*compressor"):
        assert tiny("deepseek_v4") == 0
    model, _ = load_base(str(tiny.path / "deepseek_v4"))
    load_adapter(model, tiny.path / "deepseek_v4-run")
    moved = {path: bool(layer.lora_B.any()) for path, layer in lora_layers(model)}
    assert {path for path, changed in moved.items() if not changed} == {p for p in moved if "compressor" in p}
