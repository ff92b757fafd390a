"""DoRA against PEFT's, and beside everything else an adapter goes through."""

import pytest
import torch
from adapted_models import adapted, close, copy_values, gpt2, llama, logits, peft_layers
from handtuned.nn import LoRALinear, apply_lora_to_model, lora_parameters, merge_lora, unmerge_lora
from handtuned.nn.adapters import load_adapter, save_adapter, set_adapter
from handtuned.nn.multi import adapters_by_row
from handtuned.nn.variants import dora_init
from handtuned.quant import quantize_model
from helpers import assert_same_function
from torch import nn
from variant_twins import TARGETS, ours, round_trip, same_gradients, steps, theirs


@pytest.mark.parametrize("base", [llama, gpt2], ids=["linear", "conv1d"])
def test_dora_is_peft_s(base, tmp_path):
    targets = TARGETS if base is llama else ["c_attn", "c_proj"]
    model = ours(base, targets=targets)
    other = theirs(base, targets=targets, use_dora=True, init_lora_weights=False)
    dora_init(model)
    close(logits(model), logits(base()), rounded=True)  # at the start DoRA is the base
    copy_values(other, model)
    close(logits(model), logits(other), rounded=True)
    same_gradients(model, other)
    optimizers = [torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1) for one in (model, other)]
    assert_same_function(steps(model, optimizers[0]), steps(other, optimizers[1]))
    close(logits(model), logits(other), rounded=True)
    round_trip(model, tmp_path, base)


def test_a_row_of_zeros_is_refused():
    """It has no direction: its gain would be 0 / 0."""
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3] = 0
    apply_lora_to_model(model, 2, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"rows of zeros have no direction.*model\.layers\.\*\.self_attn\.q_proj"):
        dora_init(model)
    assert not any(hasattr(module, "lora_magnitude") for module in model.modules())


@pytest.mark.filterwarnings("ignore")
def test_we_load_peft_s_dora(tmp_path):
    other = theirs(use_dora=True, init_lora_weights=False)
    with torch.no_grad():
        for layer in peft_layers(other).values():
            layer.lora_magnitude_vector["default"].weight.mul_(1.3)
    other.save_pretrained(tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    close(logits(model), logits(other))


def test_dora_init_measures_the_adapter_that_is_there():
    """Turned on later, DoRA starts at the weight as trained so far."""
    model = adapted(llama())
    before = logits(model)
    dora_init(model)
    close(logits(model), before, rounded=True)


def test_dora_on_nf4_merges_switches_and_mixes(tmp_path):
    model = ours(lambda: quantize_model(llama()))
    dora_init(model)
    for parameter in lora_parameters(model):
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    trained = logits(model)
    merge_lora(model, dequantize=True)
    close(logits(model), trained, rounded=True)
    unmerge_lora(model)
    save_adapter(model, tmp_path / "dora")
    save_adapter(adapted(llama()), tmp_path / "plain")
    load_adapter(model, tmp_path / "plain", "plain")
    plain = logits(model)
    set_adapter(model, "default")
    assert torch.equal(logits(model), trained)
    with adapters_by_row(model, ["plain", "default"]):
        mixed = logits(model)
    close(mixed, torch.stack([plain[0], trained[1]]), rounded=True)
    again = quantize_model(llama())
    load_adapter(again, tmp_path / "dora")
    close(logits(again), trained, rounded=True)


def test_dora_gain_without_forming_the_sum():
    layer = LoRALinear(nn.Linear(40, 30), rank=7, lora_alpha=7)
    nn.init.normal_(layer.lora_B)
    dora_init(layer)
    layer.lora_magnitude.data = torch.rand(30)
    layer.double()
    W = layer.base_layer.weight
    expected = layer.lora_magnitude / (W + layer.lora_B @ layer.lora_A).norm(dim=1)
    assert_same_function(layer.gain(W), expected)
