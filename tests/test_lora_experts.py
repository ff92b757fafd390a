"""LoRA on fused experts and routers: PEFT's target_parameters, both ways, over 4-bit and dense bases."""

import copy
import json
import re

import pytest
import torch
from handtuned.nn import apply_lora_to_model, load_adapter, save_adapter
from handtuned.nn.inject import add_adapter, disable_lora, lora_layers
from handtuned.nn.merge import merge_and_unload, merge_lora, unmerge_lora
from handtuned.nn.multi import adapters_by_row, delete_adapter, lora_parameters, set_adapter
from handtuned.nn.parameters import LoRAExperts, LoRAWeight
from handtuned.nn.variants import dora_init, pissa_init
from handtuned.quant import NF4Experts, quantize_model
from handtuned.quant.experts import dequantize_experts
from helpers import assert_same_function
from test_quant_experts import IDS, KINDS, build

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore")
each_kind = pytest.mark.parametrize("kind", KINDS)
EXPERTS = {"jetmoe": ["input_linear.weight", "output_linear.weight"]}
LONGEST = 2 * 7 * 128  # terms of the longest chain of sums: 2 layers with 7 products each
FAMILY = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "qwen3_next")  # where PEFT's all-linear reaches


def names(kind):
    return EXPERTS.get(kind, ["experts.gate_up_proj", "experts.down_proj"])


def adapted(kind, quantize=False, rank=3, target_modules=(), **choices):
    """A model with experts' adapters that do something."""
    model = build(kind)
    if quantize:
        quantize_model(model)
    choices = {"target_parameters": names(kind)} | choices
    apply_lora_to_model(model, rank, 2.0 * rank, target_modules, **choices)
    return filled(model)


def filled(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(0, 0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits.double()


def assert_equal_logits(ours, theirs, base):
    """Within rounding of fp32, which is far below what the adapter does."""
    each = (ours, theirs, base)
    ours, theirs, base = (logits(one) if isinstance(one, torch.nn.Module) else one for one in each)
    assert (theirs - base).norm() > 1e-3 * base.norm()
    assert_same_function(ours, theirs, "logits", terms=LONGEST)


@each_kind
def test_peft_loads_what_is_saved(kind, tmp_path):
    model = adapted(kind)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == [] and len(config["target_parameters"]) == len(list(lora_layers(model)))
    theirs = peft.PeftModel.from_pretrained(build(kind), tmp_path).eval()
    assert_equal_logits(model, theirs, build(kind))


@each_kind
@pytest.mark.parametrize("which", [slice(2), slice(1), slice(1, 2)], ids=["both", "first", "second"])
def test_what_peft_saves_is_loaded(kind, which, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=names(kind)[which],
                             rank_pattern={names(kind)[0].replace(".", r"\."): 5}, init_lora_weights=False)  # fmt: skip
    torch.manual_seed(2)
    theirs = peft.get_peft_model(build(kind), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = build(kind)
    report = load_adapter(ours, tmp_path)
    assert {type(layer) for _, layer in lora_layers(ours)} == {LoRAExperts}
    assert len(report.layers) == len(list(lora_layers(ours)))
    assert_equal_logits(ours, theirs, build(kind))


@pytest.mark.parametrize("kind", FAMILY)
def test_all_linear_reaches_what_pefts_reaches(kind, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(2)
    theirs = peft.get_peft_model(build(kind), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = build(kind)
    load_adapter(ours, tmp_path)
    assert_equal_logits(ours, theirs, build(kind))
    chosen = apply_lora_to_model(build(kind), 2, 6.0, "all-linear")
    layers, loaded = dict(lora_layers(chosen)), dict(lora_layers(ours))
    assert {path for path, m in layers.items() if isinstance(m, LoRAWeight)} == {
        path for path, m in loaded.items() if isinstance(m, LoRAWeight)
    }
    for path in layers.keys() & loaded.keys():
        assert (layers[path].rank, layers[path].scaling) == (loaded[path].rank, loaded[path].scaling)
    # and there and back again
    save_adapter(filled(chosen), tmp_path / "ours", save_for="peft")
    assert_equal_logits(chosen, peft.PeftModel.from_pretrained(build(kind), tmp_path / "ours").eval(), build(kind))


@pytest.mark.filterwarnings("default")
def test_experts_that_all_linear_leaves_out_are_said():
    model = build("gpt_oss")
    experts = sum(p.numel() for name, p in model.named_parameters() if re.search("(gate_up|down)_proj$", name))
    share = experts / sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning, match=f"leaves out .*experts.* with {share:.1%} of the parameters.*target_param"):
        apply_lora_to_model(model, 2, 4.0, "all-linear")
    assert not any(isinstance(layer, LoRAWeight) for _, layer in lora_layers(model))


@each_kind
@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
def test_forward_gradients_merge_and_unmerge(kind, quantize):
    """Against the dense weights W + s·BA of each expert, in transformers' own forward pass, in fp64."""
    model = adapted(kind, quantize).double()
    layers = dict(lora_layers(model))
    assert all(isinstance(layer.base_layer, NF4Experts) == quantize for layer in layers.values())
    dense = build(kind)
    if quantize:
        quantize_model(dense)
        for path, module in list(dense.named_modules()):
            if hasattr(module, "dense_class"):
                dense.set_submodule(path, module.dequantize(torch.float64))
        dequantize_experts(dense, torch.float64)
    dense.double().config._experts_implementation = "eager"
    for path, layer in layers.items():
        dense.get_parameter(path).data += layer.delta_weight()
    results = []
    for one in (model, dense):
        out = one(IDS, use_cache=False).logits.double()
        weights = one.get_input_embeddings().weight.requires_grad_(True)
        (grad,) = torch.autograd.grad(one(IDS, use_cache=False).logits.double().square().mean(), weights)
        results.append((out, grad))
    for ours, theirs in zip(*results, strict=True):  # some models compute their router or mixer in fp32
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    before = logits(model)
    merge_lora(model, dequantize=True)
    assert (logits(model) - before).norm() <= 1e-5 * before.norm()
    unmerge_lora(model)
    assert torch.equal(logits(model), before)
    plain = merge_and_unload(model, dequantize=True)
    assert not list(lora_layers(plain)) and not any(isinstance(m, NF4Experts) for m in plain.modules())
    for path in layers:
        assert torch.allclose(plain.get_parameter(path).double(), dense.get_parameter(path), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text"])
def test_gradients_of_every_factor(kind, rank):
    """dA and dB of experts are those of the delta that PEFT forms; an expert without tokens gets zeros."""
    model = adapted(kind, rank=rank).double()
    model(IDS[:1, :3], use_cache=False).logits.square().mean().backward()
    layers = dict(lora_layers(model))
    got = {path: (layer.lora_A.grad, layer.lora_B.grad) for path, layer in layers.items()}
    factors = {path: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for path, layer in layers.items()}
    merge_lora(model)
    for layer in layers.values():
        layer.base_layer.weight.requires_grad_(True)
    model(IDS[:1, :3], use_cache=False).logits.square().mean().backward()
    for path, layer in layers.items():
        A, B = (factor.requires_grad_(True) for factor in factors[path])
        E, flipped = len(layer), layer.flipped
        delta = torch.einsum("ore,eri->eoi", B.view(len(B), -1, E), A.view(E, -1, A.shape[1])) * layer.scaling
        dW = layer.base_layer.weight.grad
        delta.backward(dW.mT if layer.is_transposed and not flipped else dW)
        for ours, theirs in zip(got[path], (A.grad, B.grad), strict=True):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_several_adapters_and_none():
    model = adapted("qwen3_moe", target_modules=["q_proj"], target_parameters=[*names(""), "gate.weight"])
    first, plain = logits(model), logits(build("qwen3_moe"))
    with disable_lora(model):
        assert torch.allclose(logits(model), plain, rtol=0, atol=1e-5)
    add_adapter(model, "second", 2, 4.0, ["q_proj"])
    assert torch.allclose(logits(model), plain, rtol=0, atol=1e-5)  # no experts' adapter is active, and B is zero
    set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="row by row"), adapters_by_row(model, ["default", None]):
        pass
    for start in (dora_init, pissa_init):
        with pytest.raises(ValueError, match="is for linear layers; leave out by exclude_modules: ") as refused:
            start(model)
    left = str(refused.value).split(": ")[1].split()  # what it says helps
    dora_init(apply_lora_to_model(build("qwen3_moe"), 2, 4.0, "all-linear", exclude_modules=left))
    assert torch.equal(logits(copy.deepcopy(model)), first)
    delete_adapter(model, "second")
    delete_adapter(model, "default")
    assert [*model.state_dict()] == [*build("qwen3_moe").state_dict()]
    assert torch.allclose(logits(model), plain, rtol=0, atol=1e-5)


def test_merged_model_is_saved_as_transformers_writes_it(tmp_path):
    model = adapted("qwen3_moe", quantize=True, target_parameters=["down_proj"])
    expected = logits(model)
    plain = merge_and_unload(model, dequantize=True)
    for path, module in list(plain.named_modules()):
        if hasattr(module, "dense_class"):
            plain.set_submodule(path, module.dequantize())
    dequantize_experts(plain)
    plain.save_pretrained(tmp_path)
    read, found = type(plain).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert_equal_logits(read, expected, build("qwen3_moe"))


@pytest.mark.parametrize("change, words", [
    ({"lora_dropout": 0.1}, "lora_dropout must be 0"),
    ({"target_parameters": ["experts.up_proj"]}, "'experts.up_proj' is not a param.*those are.*experts.gate_up_proj"),
    ({"target_parameters": []}, "at least one"),
])  # fmt: skip
def test_refusals(change, words):
    model = build("mixtral")
    keys = [*model.state_dict()]
    with pytest.raises(ValueError, match=words):
        apply_lora_to_model(model, 2, 4.0, [], **{"target_parameters": names("")} | change)
    assert [*model.state_dict()] == keys


def test_a_refusal_freezes_nothing():
    model = build("mixtral")
    with pytest.raises(ValueError, match="lora_dropout must be 0"):
        apply_lora_to_model(model, 2, 4.0, ["q_proj"], 0.1, target_parameters=names(""))
    assert all(p.requires_grad for p in model.parameters())


def test_a_file_whose_dropout_or_dora_peft_refuses(tmp_path):
    save_adapter(adapted("mixtral"), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change in ({"lora_dropout": 0.1}, {"use_dora": True}):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="target_parameters: neither"):
            load_adapter(build("mixtral"), tmp_path)


def losses(model, steps=8):
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in EXPERTS])
def test_training_goes_as_on_the_dense_experts(kind):
    """On experts in NF4, and on the same values dense: the same steps, but for rounding in fp32."""
    runs = []
    for dense in (False, True):
        model = build(kind)
        quantize_model(model)
        if dense:
            dequantize_experts(model)
        torch.manual_seed(3)
        apply_lora_to_model(model, 4, 8.0, [], target_parameters=names(kind))
        runs.append(losses(model.train()))
    nf4, dense = map(torch.tensor, runs)
    assert nf4[-1] < nf4[0] - 1e-3
    torch.testing.assert_close(nf4, dense, rtol=1e-4, atol=0)
