"""Adapter files are PEFT's, both ways: what PEFT writes we read, what we write PEFT, transformers and vLLM read."""

import copy
import json

import peft
import pytest
import torch
from adapted_models import SIZES, adapted, close, gpt2, llama, logits, peft_adapted, qwen, shake
from handtuned.nn import LoRALinear, apply_lora_to_model, merge_lora
from handtuned.nn.adapters import load_adapter, read_adapter_config, save_adapter
from handtuned.nn.multi import save_modules
from handtuned.quant import NF4Linear, quantize_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

PEFT_SETTINGS = {
    "plain": (llama, {}),
    "rank 3 of 3 targets": (llama, {"r": 3, "target_modules": ["q_proj", "v_proj", "lm_head"]}),
    "regex": (llama, {"target_modules": r".*layers\.[01]\..*(q|o)_proj"}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "rsLoRA": (llama, {"use_rslora": True}),
    "rank_pattern": (llama, {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 5}}),
    "anchored rank_pattern": (llama, {"rank_pattern": {r"^model\.layers\.2\.self_attn\.q_proj": 7}}),
    "alpha_pattern": (llama, {"alpha_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 40}}),
    "rsLoRA, patterns": (llama, {"alpha_pattern": {"q_proj": 4}, "rank_pattern": {"q_proj": 9}, "use_rslora": True}),
    "layers_to_transform": (llama, {"layers_to_transform": [0, 2]}),
    "layers_pattern": (llama, {"layers_to_transform": 1, "layers_pattern": "layers"}),
    "exclude_modules": (llama, {"exclude_modules": ["layers.0.mlp.down_proj"]}),
    "exclude regex": (llama, {"exclude_modules": r".*layers\.2\..*"}),
    "modules_to_save": (llama, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "biased layers": (qwen, {"target_modules": ["q_proj", "v_proj"]}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D, all-linear": (gpt2, {"target_modules": "all-linear"}),
    "gaussian": (llama, {"lora_dropout": 0.25}),
}  # fmt: skip


@pytest.mark.parametrize(("base", "settings"), PEFT_SETTINGS.values(), ids=PEFT_SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_we_load_peft(tmp_path, base, settings):
    theirs = peft_adapted(base(), **settings)
    theirs.save_pretrained(tmp_path)
    ours = base()
    report = load_adapter(ours, tmp_path)
    assert not torch.allclose(logits(ours), logits(base()), atol=1e-3)
    close(logits(ours), logits(theirs))
    layers = {path for path, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert set(report.layers) == layers
    assert ("lm_head" in report.modules) == ("modules_to_save" in settings)

    again = tmp_path / "again"
    save_adapter(ours, again)
    close(logits(peft.PeftModel.from_pretrained(base(), again)), logits(theirs))
    twice = base()
    load_adapter(twice, again)
    assert torch.equal(logits(twice), logits(ours))


def test_peft_loads_ours(tmp_path):
    ours = adapted(llama())
    save_adapter(ours, tmp_path, base_model="some/model")
    assert not torch.allclose(logits(llama()), logits(ours), atol=1e-3)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    close(logits(theirs), logits(ours))
    config = theirs.peft_config["default"]
    assert (config.base_model_name_or_path, config.task_type) == ("some/model", "CAUSAL_LM")
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 16, {"q_proj", "down_proj"})


def test_files_are_the_bytes_that_peft_writes(tmp_path):
    """Same keys, shapes, dtypes and values, and no config field that PEFT does not know."""
    peft_adapted(llama()).save_pretrained(tmp_path / "theirs")
    ours = llama()
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor) and ours[key].dtype == tensor.dtype
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written.keys() <= peft.LoraConfig.__dataclass_fields__.keys()


def test_transformers_loads_ours(tmp_path):
    ours = adapted(llama())
    save_adapter(ours, tmp_path)
    theirs = llama()
    theirs.load_adapter(str(tmp_path))
    close(logits(theirs), logits(ours))


def test_fields_that_vllm_reads(tmp_path):
    """vLLM takes r, lora_alpha and target_modules as required, use_rslora and bias if there, and refuses these two."""
    save_adapter(adapted(llama()), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (4, 16, ["down_proj", "q_proj"])
    assert type(written["lora_alpha"]) is int
    assert (written["bias"], written["use_rslora"]) == ("none", False)
    assert not written["modules_to_save"] and not written["use_dora"]
    modules = {key.split(".")[-3] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert modules == set(written["target_modules"])


def test_mixed_ranks_and_scalings(tmp_path):
    """Layers adapted with different settings come back with exactly these."""
    ours = llama()
    apply_lora_to_model(ours, rank=4, lora_alpha=8, target_modules=["q_proj"])
    apply_lora_to_model(ours, rank=3, lora_alpha=10, target_modules=r".*\.[12]\.self_attn\.v_proj")
    apply_lora_to_model(ours, rank=5, lora_alpha=1.5, target_modules=["layers.0.self_attn.v_proj"])
    shake(ours)
    ours.model.layers[0].mlp.up_proj.scaling = 7
    ours.model.layers[1].self_attn.q_proj.scaling = 0.3
    save_adapter(ours, tmp_path)
    again = llama()
    load_adapter(again, tmp_path)
    for (path, layer), other in zip(ours.named_modules(), again.modules(), strict=True):
        if isinstance(layer, LoRALinear):
            assert (layer.rank, other.rank) == (other.rank, layer.rank), path
            assert other.scaling == pytest.approx(layer.scaling, rel=1e-15), path
    close(logits(again), logits(ours))
    close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(ours))


@pytest.mark.parametrize(("rank", "alpha"), [(3, 0.1), (7, 16), (6, 1e-3), (5, 3.3)])
def test_scalings_come_back_to_the_bit(tmp_path, rank, alpha):
    model = adapted(llama(), rank=rank, lora_alpha=alpha, target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    again = llama()
    load_adapter(again, tmp_path)
    layers = [one.model.layers[0].self_attn.q_proj for one in (model, again)]
    assert layers[0].scaling == layers[1].scaling and layers[0].lora_alpha == layers[1].lora_alpha
    assert torch.equal(logits(model), logits(again))


def test_targets_that_need_whole_paths(tmp_path):
    """A last name that other layers share too must not be written alone: PEFT would adapt those as well."""
    ours = adapted(llama(), target_modules=["layers.1.self_attn.q_proj", "down_proj"])
    save_adapter(ours, tmp_path)
    assert len(read_adapter_config(tmp_path)["target_modules"]) == 4
    close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(ours))


def test_nf4_base_with_bitsandbytes(tmp_path):
    """The same adapter on our NF4 base and on PEFT's bitsandbytes base gives the same logits, both ways."""
    bnb = pytest.importorskip("bitsandbytes")

    def bnb_base():
        model = llama()
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                size = module.in_features, module.out_features
                layer = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                layer.weight = bnb.nn.Params4bit(
                    module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
                )
                model.set_submodule(path, layer.to("cpu"))
        return model

    def decoded_logits(model):
        """With the values of bitsandbytes' codes: its product is bf16 on CPUs that have AVX512-BF16."""
        for path, layer in list(model.named_modules()):
            if isinstance(layer, bnb.nn.Linear4bit):
                dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
                dense.weight.data = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                model.set_submodule(path, dense)
        return logits(model)

    ours = adapted(quantize_model(llama(), double_quant=False))
    assert isinstance(ours.model.layers[0].self_attn.q_proj.base_layer, NF4Linear)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(bnb_base(), tmp_path / "ours")
    close(decoded_logits(theirs), logits(ours))

    theirs = peft_adapted(bnb_base(), seed=5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = quantize_model(llama(), double_quant=False)
    load_adapter(ours, tmp_path / "theirs")
    close(logits(ours), decoded_logits(theirs))


def test_modules_to_save(tmp_path):
    ours = adapted(llama())
    save_modules(ours, ["lm_head"])
    with torch.no_grad():
        ours.lm_head.current.weight.mul_(2)
    save_adapter(ours, tmp_path)
    close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(ours))
    again = llama()
    before = again.lm_head.weight.clone()
    assert load_adapter(again, tmp_path).modules == ["lm_head"]
    assert torch.equal(logits(again), logits(ours))
    assert torch.equal(again.lm_head.base_layer.weight, before)


def test_modules_to_save_of_a_tied_model_leave_the_embedding_alone(tmp_path):
    torch.manual_seed(0)
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    base = copy.deepcopy(tied)
    save_modules(adapted(tied), ["lm_head"])
    with torch.no_grad():
        tied.lm_head.current.weight.mul_(2)
    assert torch.equal(tied.model.embed_tokens.weight, base.model.embed_tokens.weight)
    save_adapter(tied, tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(logits(base), logits(tied))


def test_a_classification_adapter_of_peft(tmp_path):
    """For SEQ_CLS PEFT writes two names into modules_to_save, "classifier" and "score"; a model has one of them."""
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, pad_token_id=0)).eval()
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        theirs.base_model.model.score.modules_to_save["default"].weight.mul_(2)
    theirs.save_pretrained(tmp_path)
    assert set(read_adapter_config(tmp_path)["modules_to_save"]) == {"classifier", "score"}
    ours = copy.deepcopy(base)
    assert load_adapter(ours, tmp_path).modules == ["score"]
    close(logits(ours), logits(theirs))
    save_adapter(ours, tmp_path / "ours")
    close(logits(peft.PeftModel.from_pretrained(base, tmp_path / "ours")), logits(theirs))


def test_conv1d_merges_in_its_own_layout(tmp_path):
    """The merged model's state dict is a GPT-2 checkpoint again: weights as (in, out)."""
    ours = adapted(gpt2(), target_modules=["c_attn", "c_proj", "c_fc"])
    before = logits(ours)
    merge_lora(ours)
    close(logits(ours), before, rounded=True)
    for path, module in list(ours.named_modules()):
        if isinstance(module, LoRALinear):
            ours.set_submodule(path, module.base_layer)
    plain = gpt2()
    plain.load_state_dict(ours.state_dict())
    close(logits(plain), before, rounded=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_the_file_become_the_layers(tmp_path, dtype):
    """As PEFT does, half precision in the file becomes fp32 in the model, exactly."""
    save_adapter(adapted(llama()), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    model = llama()
    load_adapter(model, tmp_path)
    A = model.model.layers[0].self_attn.q_proj.lora_A
    assert A.dtype == torch.float32
    assert torch.equal(A, tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].float())
