"""LoRA over a whole model: which layers are adapted, what trains, merging, tied weights, leaving adapters out."""

import copy

import pytest
import torch
from handtuned.nn import (
    LoRALinear,
    apply_lora_to_model,
    disable_lora,
    lora_parameters,
    mark_only_lora_as_trainable,
    merge_lora,
    unmerge_lora,
)
from handtuned.quant import NF4Linear, quantize_model
from helpers import assert_same_function
from torch import nn


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d) for _ in range(3))
        self.vq_proj = nn.Linear(d, d)  # ends in "q_proj" as a string, not as a component

    def forward(self, x):
        return self.q_proj(x) + self.k_proj(x) * self.v_proj(x) + self.vq_proj(x)


class Model(nn.Module):
    def __init__(self, d=64, vocabulary=20, tie=False):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": Attention(d), "norm": nn.LayerNorm(d)}) for _ in range(2)])
        self.lm_head = nn.Linear(d, vocabulary, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer["norm"](layer["attn"](x))
        return self.lm_head(x)


def adapted_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def disturb(model):
    """Give every adapter an effect."""
    for _, module in model.named_modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B, std=0.3)
    return model


IDS = torch.arange(12).view(2, 6)


def test_query_and_value_projections_by_default():
    model = Model().double()
    want = model(IDS)
    assert apply_lora_to_model(model, rank=2) is model
    assert adapted_names(model) == [f"layers.{i}.attn.{n}" for i in range(2) for n in ("q_proj", "v_proj")]
    assert_same_function(model(IDS), want)


def test_everything_else_is_frozen():
    model = apply_lora_to_model(Model(), rank=2)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_{part}" for name in adapted_names(model) for part in "AB"}
    assert [id(p) for p in lora_parameters(model)] == [id(p) for p in model.parameters() if p.requires_grad]
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    disturb(model)(IDS).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        (["q_proj"], ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]),
        (("attn.k_proj",), ["layers.0.attn.k_proj", "layers.1.attn.k_proj"]),
        (["layers.1.attn.q_proj"], ["layers.1.attn.q_proj"]),
        ({"lm_head"}, ["lm_head"]),
        (r"layers\.0\..*\.(k|v)_proj", ["layers.0.attn.k_proj", "layers.0.attn.v_proj"]),
        (r".*lm_head", ["lm_head"]),
        ("all-linear", [f"layers.{i}.attn.{n}_proj" for i in range(2) for n in ("q", "k", "v", "vq")]),
    ],
    ids=["name", "two-components", "path", "set", "regex", "regex-head", "all-linear"],
)
def test_targets_are_whole_components_or_a_regex_of_the_whole_path(targets, want):
    assert adapted_names(apply_lora_to_model(Model(), 2, 4.0, targets)) == want


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_prj"], "'v_prj'.*did you mean 'v_proj'"),
        (["proj"], "'proj'"),
        (["attn"], "'attn' names no linear layer but Attention"),
        ("q_proj", r"\['q_proj'\]"),
        (r".*\.w_proj", "matches the whole path of no"),
        ([], "at least one"),
        ([3], "strings"),
        ("(q_proj", "target_modules is not a regular expression"),
    ],
    ids=["near-miss", "substring", "not-linear", "name-as-regex", "regex", "empty", "not-a-string", "broken-regex"],
)
def test_a_target_that_selects_nothing_changes_nothing(targets, message):
    model = Model()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=message) as error:
        apply_lora_to_model(model, 2, 4.0, targets)
    assert adapted_names(model) == [] and before == [(name, p.requires_grad) for name, p in model.named_parameters()]
    if targets and targets not in ([3], "(q_proj"):
        assert "k_proj, lm_head, q_proj, v_proj, vq_proj" in str(error.value)


def test_targets_of_no_use():
    with pytest.raises(TypeError, match=r"target_modules.*got 5"):
        apply_lora_to_model(Model(), 2, 4.0, 5)


def test_the_same_selection_as_peft():
    peft = pytest.importorskip("peft")
    for targets in (["q_proj", "v_proj"], ["attn.k_proj"], r".*\.0\..*_proj", ["vq_proj", "lm_head"]):
        config = peft.LoraConfig(r=2, target_modules=targets)
        theirs = peft.get_peft_model(Model(), config).base_model.model
        chosen = [name for name, module in theirs.named_modules() if hasattr(module, "lora_A")]
        assert adapted_names(apply_lora_to_model(Model(), 2, 4.0, targets)) == chosen


def test_applying_twice_does_not_nest():
    model = apply_lora_to_model(Model(), 2)
    parameters = [id(p) for p in lora_parameters(model)]
    for targets in (["q_proj"], "all-linear", ["k_proj", "v_proj"]):
        with pytest.raises(ValueError, match=r"layers\.0\.attn\.[qv]_proj.*already"):
            apply_lora_to_model(model, 2, 4.0, targets)
    assert [id(p) for p in lora_parameters(model)] == parameters
    apply_lora_to_model(model, 3, 4.0, ["k_proj"])
    assert len(adapted_names(model)) == 6 and len(list(lora_parameters(model))) == 12
    assert all(p.requires_grad for p in lora_parameters(model))


def test_settings_are_checked_before_anything_changes():
    model = Model()
    for bad in ({"rank": 0}, {"lora_alpha": float("nan")}, {"lora_dropout": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            apply_lora_to_model(model, **bad)
    assert adapted_names(model) == []


def test_attention_that_reads_its_weight_itself_is_refused():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="MultiheadAttention"):
        apply_lora_to_model(model, 2, 4.0, [r"attn.out_proj"])


def test_a_layer_used_twice_gets_one_adapter():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.ModuleDict({"q_proj": shared}), "b": nn.ModuleDict({"q_proj": shared})})
    apply_lora_to_model(model, 2, 4.0, ["q_proj"])
    assert model["a"]["q_proj"] is model["b"]["q_proj"]
    assert len(list(lora_parameters(model))) == 2
    with pytest.raises(ValueError, match="names no linear layer"):  # the inside of an adapter, under either name
        apply_lora_to_model(model, 2, 4.0, ["base_layer"])
    merge_lora(model)
    assert model["a"]["q_proj"].merged


def test_inside_a_sequential():
    model = apply_lora_to_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), 2, 4.0, ["0", "2"])
    assert adapted_names(model) == ["0", "2"]
    assert model(torch.randn(3, 4)).shape == (3, 2)


def test_training_mode_is_kept():
    model = apply_lora_to_model(Model().eval(), 2)
    assert not any(module.training for module in model.modules())


def test_models_without_adapters_are_named_as_such():
    for function in (mark_only_lora_as_trainable, merge_lora, unmerge_lora):
        with pytest.raises(ValueError, match="no LoRA layers"):
            function(Model())
    with pytest.raises(ValueError, match="no LoRA layers"), disable_lora(Model()):
        pass


def test_marking_again_after_unfreezing():
    model = apply_lora_to_model(Model(), 2)
    model.requires_grad_(True)
    mark_only_lora_as_trainable(model)
    assert sum(p.requires_grad for p in model.parameters()) == 8


def test_merging_and_unmerging_a_model():
    model = disturb(apply_lora_to_model(Model().double(), 2))
    want = model(IDS)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for _ in range(3):
        assert merge_lora(model) is model
        assert_same_function(model(IDS), want)
        merge_lora(model)
        unmerge_lora(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(IDS), want)


def test_a_merge_that_fails_in_one_layer_changes_none():
    model = disturb(apply_lora_to_model(Model(tie=True).double(), 2, 4.0, ["q_proj", "lm_head"]))
    model.config = type("Config", (), {"tie_word_embeddings": True})()
    model.lm_head.lora_A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'lm_head'.*not finite"):
        merge_lora(model, untie=True)
    assert not any(module.merged for module in model.modules() if isinstance(module, LoRALinear))
    assert model.lm_head.weight is model.embed.weight and model.config.tie_word_embeddings


def test_disabling_a_model():
    model = Model().double()
    base = model(IDS)
    disturb(apply_lora_to_model(model, 2))
    active = model(IDS)
    trainable = [p.requires_grad for p in model.parameters()]
    with disable_lora(model) as same:
        assert same is model and torch.equal(model(IDS), base)
        with disable_lora(model):
            pass
        assert torch.equal(model(IDS), base)
        assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(model(IDS), active)
    merge_lora(model)
    with disable_lora(model):
        assert torch.equal(model(IDS), base)
    with pytest.raises(ZeroDivisionError), disable_lora(model):
        1 / 0  # noqa: B018
    assert_same_function(model(IDS), active)


def test_a_tied_head_is_not_merged_unasked():
    model = disturb(apply_lora_to_model(Model(tie=True).double(), 2, 4.0, ["lm_head", "q_proj"]))
    want = model(IDS)
    embedding = model.embed.weight.clone()
    with pytest.raises(ValueError, match=r"lm_head.*embed\.weight.*untie=True"):
        merge_lora(model)
    assert not any(module.merged for module in model.modules() if isinstance(module, LoRALinear))
    model.config = type("Config", (), {"tie_word_embeddings": True})()
    merge_lora(model, untie=True)
    assert_same_function(model(IDS), want)
    assert torch.equal(model.embed.weight, embedding) and model.config.tie_word_embeddings is False
    unmerge_lora(model)
    assert torch.equal(model(IDS), want)


def test_a_tied_head_without_an_adapter_does_not_matter():
    merge_lora(disturb(apply_lora_to_model(Model(tie=True), 2)))


def test_quantized_models():
    model = quantize_model(Model())
    disturb(apply_lora_to_model(model, 2, 4.0, "all-linear"))
    assert all(isinstance(m.base_layer, NF4Linear) for m in model.modules() if isinstance(m, LoRALinear))
    assert isinstance(model.lm_head, nn.Linear)
    want = model(IDS)
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.q_proj.*dequantize=True"):
        merge_lora(model)
    assert not any(m.merged for m in model.modules() if isinstance(m, LoRALinear))
    merge_lora(model, dequantize=True)
    assert_same_function(model(IDS), want, terms=2 * 4 * 64)
    unmerge_lora(model)
    assert torch.equal(model(IDS), want)


def test_a_merged_model_and_a_trained_one_agree_through_a_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    plain = copy.deepcopy(model)
    apply_lora_to_model(model, 2, 4.0, "all-linear")
    assert len(adapted_names(model)) == 14 and not isinstance(model.lm_head, LoRALinear)
    disturb(model)
    ids = torch.randint(32, (2, 9))
    want = model(ids).logits
    merge_lora(model)
    assert_same_function(model(ids).logits, want)
    with disable_lora(model):
        assert_same_function(model(ids).logits, plain(ids).logits)
