"""Merging for good: into dense weights, and the three ways into NF4 with what each loses."""

import copy

import pytest
import torch
from adapted_models import SIZES, adapted, close, gpt2, llama, logits, shake
from handtuned.nn import LoRALinear, apply_lora_to_model, merge_lora
from handtuned.nn.adapters import load_adapter, save_adapter
from handtuned.nn.lora import lora_layers
from handtuned.nn.merge import merge_and_unload, merge_errors, merge_into_nf4
from handtuned.nn.multi import ModuleToSave, save_modules
from handtuned.nn.variants import dora_init, pissa_init
from handtuned.quant import NF4Linear, quantize_model
from transformers import LlamaConfig, LlamaForCausalLM


def plain(model):
    return not any(isinstance(module, (LoRALinear, ModuleToSave)) for module in model.modules())


def adapted_nf4(scale=1.0):
    model = adapted(quantize_model(llama()))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_B.data.mul_(scale)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("base", "targets"), [(llama, ["q_proj", "down_proj"]), (gpt2, ["c_attn", "c_proj"])])
def test_merge_and_unload_rounds_once(base, targets, dtype, tmp_path):
    """Each merged weight is W + ΔW formed in fp32 and rounded to the dtype of W, nothing else has changed."""
    model = adapted(base().to(dtype), target_modules=targets)
    expected = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            delta = module.lora_B @ module.lora_A * module.scaling
            delta = delta.t() if base is gpt2 else delta
            expected[f"{path}.weight"] = (module.base_layer.weight.float() + delta).to(dtype)
    merged = merge_and_unload(model)
    assert merged is model and plain(model)
    weights = dict(base().to(dtype).state_dict())
    assert model.state_dict().keys() == weights.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected.get(key, weights[key])), key
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def test_merge_and_unload_dequantizes_when_told():
    model = adapted_nf4()
    expected = logits(model)
    with pytest.raises(ValueError, match="4-bit weight"):
        merge_and_unload(model)
    assert torch.equal(logits(model), expected)
    merge_and_unload(model, dequantize=True)
    assert plain(model)
    close(logits(model), expected, rounded=True)


def test_pain_09_whole_modules_of_tied_models_are_untied_or_refused(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    save_modules(adapted(model), ["lm_head"])
    model.lm_head.current.weight.data.mul_(2)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"'lm_head', whose weight is shared .*untie=True"):
        merge_and_unload(model)
    merge_and_unload(model, untie=True)
    close(logits(model), expected, rounded=True)
    model.save_pretrained(tmp_path)
    close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected, rounded=True)


def test_weights_too_large_for_the_dtype_are_told():
    from handtuned.merge import to_plain_model

    model = adapted(llama())
    model.model.norm.weight.data[3] = 1e5
    with pytest.raises(ValueError, match=r"model\.norm\.weight leaves the range of torch\.float16"):
        to_plain_model(model, torch.float16)


def test_a_refused_merge_leaves_the_config_as_it_is():
    torch.manual_seed(0)
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    model = adapted(quantize_model(tied))
    save_modules(model, ["lm_head"])
    with pytest.raises(ValueError, match="4-bit"):
        merge_and_unload(model, untie=True)
    assert model.config.tie_word_embeddings


def test_whole_modules_are_merged_too(tmp_path):
    model = adapted(llama())
    save_modules(model, ["lm_head"])
    model.lm_head.current.weight.data.mul_(2)
    expected = logits(model)
    save_adapter(model, tmp_path)
    other = llama()
    load_adapter(other, tmp_path)
    for one in (model, other):
        merge_and_unload(one)
        assert plain(one)
        close(logits(one), expected, rounded=True)


# NF4


def exact_errors(layer, result):
    """What merge_errors claims, computed apart: ‖result − (W + ΔW)‖ / ‖ΔW‖ in fp64."""
    W = layer.base_layer.dequantize().weight.double()
    delta = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    return ((result.double() - W - delta).norm() / delta.norm()).item()


def test_merge_errors_change_nothing_and_are_what_they_say():
    model = adapted_nf4(0.05)
    before = copy.deepcopy(model.state_dict())
    errors = merge_errors(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for path, found in errors.layers.items():
        layer = model.get_submodule(path)
        target = layer.base_layer.dequantize().weight + layer.delta_weight()
        for dtype in (torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            assert found[name] == pytest.approx(exact_errors(layer, target.to(dtype)), rel=1e-3)
        assert found["float32"] < 1e-5
    merged = copy.deepcopy(model)
    assert merge_into_nf4(merged, "requantize").layers == errors.layers
    for path, found in errors.layers.items():
        assert isinstance(merged.get_submodule(path), NF4Linear)
        weight = merged.get_submodule(path).dequantize().weight
        assert found["nf4, requantize"] == pytest.approx(exact_errors(model.get_submodule(path), weight), rel=1e-3)
    refitted = copy.deepcopy(model)
    merge_into_nf4(refitted, "refit")
    for path, found in errors.layers.items():
        layer = refitted.get_submodule(path)
        weight = layer.base_layer.dequantize().weight + layer.delta_weight()
        assert found["nf4, refit"] == pytest.approx(exact_errors(model.get_submodule(path), weight), rel=1e-3)


def test_pain_01_small_updates_drown_in_four_bits():
    """ΔW of 2 % of W: a 4-bit merge is worse than leaving the adapter out; 16 bits keep it."""
    model = adapted_nf4(0.005)
    errors = merge_errors(model)
    assert errors.median("nf4, requantize") > 1
    assert errors.median("nf4, refit") < 0.1
    assert errors.median("bfloat16") < 0.15
    assert errors.median("float16") < 0.02
    with pytest.raises(ValueError, match="4-bit weight"):
        merge_lora(model)
    text = str(errors)
    assert "nf4, requantize" in text and "bfloat16" in text and len(text.splitlines()) == 6


def test_refit_keeps_what_low_rank_can_hold():
    """Where ΔW is large, both ways keep it, and refitting is nearer."""
    errors = merge_errors(adapted_nf4())
    assert errors.median("nf4, refit") < errors.median("nf4, requantize") < 0.5


def test_an_adapter_that_adds_nothing_has_errors_too():
    """ΔW = 0: what is exact has no error, and what rounds W errs without bound."""
    for alpha in (8, 0):
        model = apply_lora_to_model(quantize_model(llama()), lora_alpha=alpha, target_modules=["q_proj"])
        errors = merge_errors(model)
        assert errors.worst("float32") == 0
        assert errors.median("nf4, requantize") == float("inf")
        assert "nan" not in str(errors)


def test_dense_layers_have_no_nf4_ways():
    errors = merge_errors(adapted(llama()))
    assert len(errors.layers) == 6
    assert all(found.keys() == {"float32", "float16", "bfloat16"} for found in errors.layers.values())


def test_nf4_merge_errors():
    with pytest.raises(ValueError, match="'requantize' or 'refit'"):
        merge_into_nf4(adapted_nf4(), "subtract")
    with pytest.raises(ValueError, match="no NF4 layer"):
        merge_into_nf4(adapted(llama()), "requantize")
    with pytest.raises(ValueError, match="no active adapter"):
        merge_errors(llama())
    for change in (lambda model: vars(list(lora_layers(model))[-1][1]).update(scaling=0.0), dora_init):
        model = adapted_nf4()
        change(model)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="only plain LoRA"):
            merge_into_nf4(model, "refit")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    merged = merge_into_nf4(model, "requantize")
    assert "nf4, refit" not in next(iter(merged.layers.values()))


def test_pissa_merges_into_the_base_it_came_from():
    model = apply_lora_to_model(llama(), rank=4)
    pissa_init(model)
    shake(model, seed=3)
    expected = logits(model)
    merge_and_unload(model)
    close(logits(model), expected, rounded=True)
