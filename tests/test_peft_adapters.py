"""What people who come from PEFT do with adapters: modules saved whole, a second one, patterns, what is trained."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from adapted_models import model_of, shake, trained_names
from handtuned.nn import (
    apply_lora_to_model,
    disable_lora,
    load_adapter,
    lora_parameters,
    save_adapter,
    set_adapter,
)  # fmt: skip
from handtuned.nn.inject import add_adapter
from handtuned.nn.lora import lora_layers
from handtuned.nn.merge import unload
from handtuned.nn.multi import (
    ModuleToSave,
    active_adapter,
    adapter_names,
    adapters_by_row,
    delete_adapter,
    save_modules,
)  # fmt: skip
from handtuned.nn.variants import freeze_A
from torch import nn

TOKENS = torch.tensor([[5, 6, 7, 8]])


# Modules saved whole


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin = nn.Embedding(10, 4, padding_idx=0), nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, x):
        h = self.lin(self.emb(x)) * (x != self.emb.padding_idx)[..., None]
        assert len(self.head) == 3 and self.emb.num_embeddings == 10
        for layer in self.head[:2]:
            h = layer(h)
        return nn.functional.linear(h, self.head[-1].weight, self.head[2].bias)


def test_a_module_saved_whole_acts_as_itself():
    model = Head()
    x = torch.tensor([[1, 2, 0]])
    want = model(x)
    apply_lora_to_model(model, 2, target_modules=["lin"])
    save_modules(model, ["emb", "head"])
    torch.testing.assert_close(model(x), want)
    assert next(iter(model.head)) is model.head.copies["default"][0] and model.head[1] in list(model.head)
    assert model.emb.weight is model.emb.copies["default"].weight and bool(model.emb)
    with disable_lora(model):
        assert model.emb.weight is model.emb.base_layer.weight
    assert not hasattr(model.head, "no_such_thing")
    with pytest.raises(AttributeError):
        model.head.padding_idx  # noqa: B018
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in lora_parameters(model))
    again = copy.deepcopy(model)
    torch.testing.assert_close(again(x), model(x))
    assert torch.equal(unload(copy.deepcopy(again)).emb.weight, model.emb.weight)
    again.emb.weight, again.emb.note = nn.Parameter(torch.zeros(10, 4)), "of the copy"
    assert not again.emb.copies["default"].weight.any() and again.emb.base_layer.weight.any()
    assert again.emb.copies["default"].note == "of the copy" and "emb.weight" not in again.state_dict()
    del again.emb.note, again.head[1]
    assert not hasattr(again.emb, "note") and len(again.head) == 2
    again.head[0] = nn.Identity()
    assert isinstance(again.head.copies["default"][0], nn.Identity) and len(again.head.base_layer) == 3
    assert again.head[0] in again.head and list(again.head) == [again.head[0], again.head[1]]


@pytest.mark.parametrize("container", [nn.ModuleDict({"a": nn.Linear(4, 4)}), nn.ModuleList([nn.Linear(4, 4)])])
def test_a_mere_container_is_refused(container):
    model = nn.Sequential()
    model.lin, model.module = nn.Linear(4, 4), container
    apply_lora_to_model(model, 2, target_modules=["lin"])
    with pytest.raises(TypeError, match="'module' is a mere container"):
        save_modules(model, ["module"])


def nested():
    model = nn.Sequential()
    model.lin, model.head = nn.Linear(4, 4), nn.Sequential()
    model.head.head, model.head.out = nn.Linear(4, 4), nn.Linear(4, 2)
    return model


def test_of_nested_modules_the_outer_is_saved(tmp_path):
    torch.manual_seed(0)
    model = nested()
    base = copy.deepcopy(model)
    apply_lora_to_model(model, 2, target_modules=["lin"])
    save_modules(model, ["head", "out"])
    assert [path for path, m in model.named_modules() if isinstance(m, ModuleToSave)] == ["head"]
    shake(model)
    x = torch.randn(2, 4)
    want = model(x)
    want.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head"]
    load_adapter(base, tmp_path)
    torch.testing.assert_close(base(x), want)


def test_a_layer_inside_a_module_saved_whole_is_not_adapted():
    model = apply_lora_to_model(nested(), 2, target_modules=["lin"])
    save_modules(model, ["head"])
    with pytest.raises(ValueError, match="'out' names layers inside a module that is trained whole"):
        apply_lora_to_model(model, 2, target_modules=["out"])
    other = apply_lora_to_model(nested(), 2, target_modules=["out"])
    with pytest.raises(ValueError, match="'head' holds a LoRA adapter"):
        save_modules(other, ["head"])


def test_rows_of_other_adapters_go_through_the_original_module():
    model, x = apply_lora_to_model(nested(), 2, target_modules=["lin"]), torch.randn(2, 4)
    add_adapter(model, "whole", 2, target_modules=["lin"])
    save_modules(model, ["head"])
    shake(model)
    with disable_lora(model):
        base = model(x)
    with adapters_by_row(model, [None, "default"]):
        torch.testing.assert_close(model(x), base)  # B of the one named is still zero
    assert not torch.allclose(model(x), base)


# What is trainable


def test_a_second_call_leaves_what_is_trained_as_it_was(tmp_path):
    model = apply_lora_to_model(nested(), 2, target_modules=["lin"])
    freeze_A(model)
    save_modules(model, ["out"])
    before = trained_names(model)
    apply_lora_to_model(model, 2, target_modules=["head.head"])
    assert trained_names(model) == before | {"head.head.lora_A", "head.head.lora_B"}
    save_adapter(model, tmp_path)
    load = nested()
    load_adapter(load, tmp_path, trainable=True)
    loaded = {name for name, _ in load.named_parameters() if "lora_" in name or "copies" in name}
    assert trained_names(load) == loaded
    add_adapter(load, "next", 2, target_modules=["lin"])
    assert trained_names(load) == {"lin.lora_A", "lin.lora_B"}
    load_adapter(load, tmp_path, "third", trainable=True)
    assert {"lin.resting.next.lora_A", "lin.lora_A", "head.head.lora_B"} <= trained_names(load)
    load(torch.randn(2, 4)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for name, p in load.named_parameters() if "resting" not in name)


# Fresh adapters beside others


def test_a_second_fresh_adapter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    base, x = copy.deepcopy(model), torch.randn(3, 4)
    add_adapter(model, "first", 2, target_modules=["0"])
    shake(model)
    one = model(x)
    add_adapter(model, "été 2", np.int64(3), np.float32(6), ["0", "2"], lora_dropout=np.float64(0.0))
    assert active_adapter(model) == "été 2" and adapter_names(model) == ["first", "été 2"]
    assert (model[0].rank, model[0].lora_alpha, type(model[0].rank)) == (3, 6.0, int)
    torch.testing.assert_close(model(x), base(x))
    assert trained_names(model) == {f"{i}.lora_{part}" for i in (0, 2) for part in "AB"}
    shake(model)
    two = model(x)
    set_adapter(model, "first")
    torch.testing.assert_close(model(x), one)
    with pytest.raises(ValueError, match="active; activate another"):
        delete_adapter(model, "first")
    delete_adapter(model, "été 2")
    torch.testing.assert_close(model(x), one)
    delete_adapter(model, "first")
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear] and not torch.allclose(one, two)
    assert torch.equal(model(x), base(x))
    with pytest.raises(ValueError, match="no adapter"):
        delete_adapter(model, "first")


def test_the_last_adapter_s_removal_gives_modules_back():
    model = nested()
    want = copy.deepcopy(model.state_dict())
    apply_lora_to_model(model, 2, target_modules=["lin"])
    save_modules(model, ["out"])
    shake(model)
    delete_adapter(model, "default")
    got = model.state_dict()
    assert got.keys() == want.keys() and all(map(torch.equal, got.values(), want.values()))


@pytest.mark.parametrize("name", ["a.b", "", "forward", "type", 3])
def test_names_that_torch_does_not_take(name):
    with pytest.raises(ValueError, match="adapter"):
        add_adapter(nested(), name, 2, target_modules=["lin"])


def test_a_name_in_use_or_a_merged_adapter_is_refused():
    from handtuned.nn import merge_lora

    model = add_adapter(nested(), "a", 2, target_modules=["lin"])
    with pytest.raises(ValueError, match="'a' already"):
        add_adapter(model, "a", 2, target_modules=["out"])
    merge_lora(model)
    with pytest.raises(ValueError, match="merged"):
        add_adapter(model, "b", 2, target_modules=["out"])


# PEFT's choices

CHOICES = [
    {"rank_pattern": {"q_proj": 4}},
    {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 4, "q_proj": 3}, "alpha_pattern": {"layers.0.*k_proj": 9}},
    {"alpha_pattern": {"^model.layers.0.mlp.up_proj": 1.5}},
    {"layers_to_transform": [1]}, {"layers_to_transform": 0}, {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"exclude_modules": ["up_proj", "o_proj"]}, {"exclude_modules": r".*\.0\..*"},
]  # fmt: skip


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_choices_are_peft_s(choices, tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "o_proj", "up_proj"]
    model = apply_lora_to_model(model_of("llama"), 2, 8, targets, **choices)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, **choices)
    theirs = peft.get_peft_model(model_of("llama"), config)
    want = {path.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
            for path, m in theirs.named_modules() if hasattr(m, "lora_A") and m.r}  # fmt: skip
    assert {path: (layer.rank, layer.scaling) for path, layer in lora_layers(model)} == want
    shake(model)
    save_adapter(model, tmp_path)
    again = model_of("llama")
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("choices, message", [
    ({"rank_pattern": {"v_proj": 4}}, "rank_pattern or alpha_pattern: 'v_proj' fits none"),
    ({"alpha_pattern": {"w1": 4}}, "'w1' fits none"),
    ({"layers_to_transform": [7]}, r"layers_to_transform: \[7\] fits none"),
    ({"layers_to_transform": [0, 7]}, r"layers_to_transform: \[0, 7\]: 7 fits none"),
    ({"exclude_modules": ["lm_head"]}, "fits none"),
    ({"exclude_modules": ["0.self_attn.q_proj", "upproj"]}, "'upproj' fits none"),
    ({"exclude_modules": ["q_proj", "k_proj"]}, "leaves none"), ({"exclude_modules": ["q_proj"]}, "leaves none"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must be an object of integers"),
    ({"rank_pattern": 4}, "rank_pattern must be"), ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern must be"),
    ({"layers_to_transform": "1"}, "layers_to_transform must be"),
])  # fmt: skip
def test_choices_that_fit_nothing(choices, message):
    model = model_of("llama")
    with pytest.raises(ValueError, match=message):
        apply_lora_to_model(model, 2, 8, ["q_proj"], **choices)
    assert not list(lora_layers(model)) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="'rank_patern' is not a setting"):
        apply_lora_to_model(model, 2, 8, ["q_proj"], rank_patern={})


USUAL = {"llama": {"q_proj", "v_proj"}, "bert": {"query", "value"}, "distilbert": {"q_lin", "v_lin"},
         "gpt_neox": {"query_key_value"}, "bloom": {"query_key_value"}, "mpt": {"Wqkv"}, "phi3": {"qkv_proj"},
         "gpt2": {"c_attn"},
         "deberta-v2": {"query_proj", "value_proj"}, "t5": {"q", "v"}, "mamba": {"in_proj", "out_proj"}}  # fmt: skip


@pytest.mark.parametrize("kind", USUAL)
def test_the_usual_layers(kind):
    model = model_of(kind, transformers.AutoModel)
    apply_lora_to_model(model, 2, target_modules=None)
    assert {path.rpartition(".")[2] for path, _ in lora_layers(model)} == USUAL[kind]


def test_nothing_is_usual_for_an_unknown_architecture():
    with pytest.raises(ValueError, match="target_modules=None: nothing is usual for Sequential"):
        apply_lora_to_model(nn.Sequential(nn.Linear(4, 4)), 2, target_modules=None)
