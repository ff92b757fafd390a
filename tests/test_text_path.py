"""Which layers "all-linear" means: those that text trains and that the model calls; and what stays dense in 4 bits."""

import warnings

import pytest
import tiny_architectures
import torch
import torch.nn.functional as F
from handtuned.nn import LoRALinear, apply_lora_to_model
from handtuned.nn.inject import leave_out_idle, lora_layers
from handtuned.nn.text_path import idle_layers
from handtuned.quant import NF4Linear, quantize_model, readers
from handtuned.quant.readers import weights_read
from torch import nn

transformers = pytest.importorskip("transformers")


class Config:
    """What `idle_layers` asks of a transformers config."""

    vocab_size, image_token_id, is_encoder_decoder, max_position_embeddings = 64, 5, False, 128

    def get_text_config(self):
        return self

    def to_dict(self):
        return {"image_token_id": self.image_token_id}


class TextModel(nn.Module):
    """A language model with one layer of each kind that text may or may not train."""

    def __init__(self):
        super().__init__()
        self.config, self.lengths = Config(), []
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
        self.used, self.picture, self.chooses, self.long = (nn.Linear(8, 8) for _ in range(4))
        self.experts = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(3)) for _ in range(2))

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=True):
        assert not self.training and not (input_ids == self.config.image_token_id).any()
        self.lengths.append(input_ids.shape[1])
        x = self.used(self.embed(input_ids))
        x = x * (self.chooses(x).argmax(-1, keepdim=True) >= 0)
        x = x + self.experts[0][1](x)
        if input_ids.shape[1] > 32:
            x = x + self.long(x)
        return type("Output", (), {"logits": self.head(x)})


def linear(model):
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {path: module for path, module in layers.items() if path not in ("head", "lm_head")}


def test_idle_is_what_gets_no_gradient_from_text():
    model = TextModel().requires_grad_(False).train()
    idle = idle_layers(model, linear(model))
    # one expert of a list stands for all of it; a list without any is idle
    assert idle == {"picture", "chooses", "experts.1.0", "experts.1.1", "experts.1.2"}
    assert model.lengths == [16, 64]  # the longer try found `long`, and ended at half the context
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_nothing_is_idle_where_no_text_goes_in():
    plain = nn.Sequential(nn.Linear(4, 4))
    assert idle_layers(plain, linear(plain)) == set()
    with torch.device("meta"):
        model = TextModel()
    assert idle_layers(model, linear(model)) == set() and model.lengths == []


def test_all_linear_leaves_idle_layers_out_and_says_so():
    model = TextModel()
    with pytest.warns(UserWarning) as said:
        apply_lora_to_model(model, target_modules="all-linear")
    assert {path for path, _ in lora_layers(model)} == {"used", "long", "experts.0.0", "experts.0.1", "experts.0.2"}
    share = 5 * 72 / sum(p.numel() for p in TextModel().parameters())
    (text,) = [str(w.message) for w in said]
    assert text == (f"all-linear leaves out 5 layers (chooses, experts.*.*, picture) with {share:.1%} of the "
                    "parameters, which text does not train")  # fmt: skip


def test_adapters_by_name_are_taken_out_of_idle_layers():
    model = apply_lora_to_model(TextModel(), target_modules=["used", "picture"])
    before = model.picture.base_layer
    with pytest.warns(UserWarning, match=r"left without adapters: 1 layers \(picture\) with .*, which text does not"):
        leave_out_idle(model)
    assert isinstance(model.used, LoRALinear) and model.picture is before
    model = apply_lora_to_model(TextModel(), target_modules=["picture"])
    with pytest.raises(ValueError, match="text trains none of the selected layers"):
        leave_out_idle(model)


class Block(nn.Module):
    """Reads the weights of its layers in all ways but those of `quiet`."""

    def __init__(self):
        super().__init__()
        self.read, self.looped, self.called, self.other, self.quiet = (nn.Linear(64, 64) for _ in range(5))
        self.inner = nn.ModuleDict({"deep": nn.Linear(64, 64)})
        self.quiet.weight.data.zero_()

    def _init_weights(self, module):
        self.quiet.weight.data.zero_()

    def forward(self, x):
        x = F.linear(x, self.read.weight)
        if self.training:
            x = x + self.other.weight.sum()
        return self.called(x).to(self.quiet.weight.device)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def rescale(self):
        for block in self.blocks:
            block.looped.weight.div_(2)

    def forward(self, x):
        for block in self.blocks:
            x = F.linear(block(x), block.inner.deep.weight)
        return x


def test_weights_that_code_reads_are_found_in_its_source():
    model, names = Blocks(), {"read", "looped", "inner.deep", "other"}
    assert weights_read(model, linear(model)) == {f"blocks.{i}.{name}" for i in (0, 1) for name in names}


def test_source_is_parsed_once_per_class(monkeypatch):
    found = weights_read(Blocks(), linear(Blocks()))
    monkeypatch.setattr(readers, "_reads", None)
    assert weights_read(Blocks(), linear(Blocks())) == found


def test_they_stay_dense_and_that_is_said():
    model, x = Blocks(), torch.randn(3, 64)
    with pytest.warns(UserWarning, match=r"left dense: 8 layers \(blocks\.\*\.inner\.deep, .*\) with 66\.7% of the"):
        quantize_model(model)
    with torch.no_grad():
        model(x)
        model.rescale()
    assert {p for p, m in model.named_modules() if isinstance(m, NF4Linear)} == {
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("called", "quiet")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(model)  # changes nothing, and says nothing


@pytest.mark.parametrize("name, read", [
    ("mamba", {"dt_proj", "out_proj", "x_proj"}), ("mamba2", {"out_proj"}), ("jamba", {"dt_proj"}),
    ("rwkv", {"output", "value"}), ("gemma3n_text", {"correction_coefs", "prediction_coefs"}), ("bloom", set()),
    ("gpt_neo", set()), ("llama", set()),
])  # fmt: skip
def test_which_models_read(name, read):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_architectures.config_of(name))
    found = weights_read(model, linear(model))
    assert {path.rpartition(".")[2] for path in found} == read


@pytest.mark.parametrize("name, tower", [("gemma3", "vision_tower"), ("qwen3_vl", "visual"), ("llama4", "vision_model"),
                                         ("mllama", "vision_model"), ("mistral3", "vision_tower")])  # fmt: skip
def test_nothing_is_adapted_in_a_vision_tower_unasked(name, tower):
    model = transformers.AutoModelForImageTextToText.from_config(tiny_architectures.config_of(name))
    with pytest.warns(UserWarning, match=f"all-linear leaves out .*{tower}.* which text does not train"):
        apply_lora_to_model(model, 2, target_modules="all-linear")
    paths = [path for path, _ in lora_layers(model)]
    assert len(paths) >= 7 and all("language_model" in path and "cross_attn" not in path for path in paths)
    model(input_ids=torch.arange(4, 20)[None], use_cache=False).logits.sum().backward()
    assert all(layer.lora_B.grad is not None for _, layer in lora_layers(model))
