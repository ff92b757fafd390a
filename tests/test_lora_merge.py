"""Merging one LoRA layer and taking it out again, to the bit; copies and state dicts, merged or not."""

import copy
import math

import pytest
import torch
from handtuned.quant import NF4Linear
from helpers import assert_computes, assert_same_function
from lora_layers import FLOATS, adapted, short
from torch import nn
from torch.nn.utils import prune


def assert_computes_the_layer(layer, x, W):
    """The output of a layer of rank 4 whose weight was W before a merge."""
    inputs = x, W, layer.bias, layer.lora_A, layer.lora_B
    formula = lambda x, W, b, A, B: nn.functional.linear(x, W, b) + 2.0 * (x @ A.T) @ B.T  # noqa: E731
    assert_computes(layer(x).detach(), formula, inputs, 2 * 64 + 4 + 1)


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_a_hundred_merges_leave_every_bit(dtype):
    layer = adapted(nn.Linear(64, 48).to(dtype))
    nn.init.normal_(layer.lora_B, std=100)  # a difference as large as this drifts when it is subtracted
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    trainable = {name: p.requires_grad for name, p in layer.named_parameters()}
    parameter = layer.weight
    for _ in range(100):
        layer.merge_weights()
        layer.unmerge_weights()
    after = layer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert {name: p.requires_grad for name, p in layer.named_parameters()} == trainable
    assert layer.weight is parameter


def test_merging_twice_is_merging_once():
    layer = adapted().double()
    x = torch.randn(5, 64).double()
    want = layer(x)
    layer.merge_weights()
    merged = layer.weight.clone()
    layer.merge_weights()
    assert layer.merged and torch.equal(layer.weight, merged)
    assert_same_function(layer(x), want)
    assert_same_function(layer.base_layer(x), want)
    layer.unmerge_weights()
    layer.unmerge_weights()
    assert not layer.merged
    assert torch.equal(layer(x), want)


def test_a_merge_under_autocast_rounds_nothing():
    layer = adapted()
    other = copy.deepcopy(layer)
    other.merge_weights()
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge_weights()
    assert torch.equal(layer.weight, other.weight)


def test_a_merge_into_bf16_rounds_once():
    layer = adapted(nn.Linear(64, 48).bfloat16())
    exact = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge_weights()
    assert torch.equal(layer.weight, exact.float().bfloat16())


def test_a_merged_layer_refuses_to_train_with_dropout():
    layer = adapted(dropout=0.1)
    layer.merge_weights()
    with pytest.raises(RuntimeError, match="merged"):
        layer(torch.randn(2, 64))
    layer.eval()
    layer(torch.randn(2, 64))


def test_a_merge_into_4_bits_is_refused_with_the_reason():
    layer = adapted(NF4Linear.from_linear(nn.Linear(64, 48)))
    with pytest.raises(ValueError, match=r"4-bit.*dequantize=True"):
        layer.merge_weights()
    assert not layer.merged
    x, W = torch.randn(5, 64), layer.base_layer.dequantize().weight
    want = layer(x)
    packed = layer.base_layer
    layer.merge_weights(dequantize=True)
    assert isinstance(layer.base_layer, nn.Linear)
    assert_computes_the_layer(layer, x, W)
    layer.unmerge_weights()
    assert layer.base_layer is packed
    assert torch.equal(layer(x), want)


def test_an_adapter_with_nan_is_not_merged():
    layer = adapted()
    layer.lora_B.data[0, 0] = math.nan
    weight = layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge_weights()
    assert torch.equal(layer.weight, weight) and not layer.merged


def test_a_sum_beyond_the_range_of_the_weight_is_not_merged():
    """ΔW is finite in fp32, but W + ΔW would be inf in fp16."""
    layer = adapted(nn.Linear(8, 8).half())
    layer.lora_A.data.fill_(1.0)
    layer.lora_B.data[3] = 1e5
    weight = layer.weight.clone()
    with pytest.raises(ValueError, match=r"range of torch\.float16"):
        layer.merge_weights()
    assert torch.equal(layer.weight, weight) and not layer.merged


def test_a_base_whose_weight_a_hook_makes_can_be_merged():
    base = prune.l1_unstructured(nn.Linear(64, 48).double(), "weight", 0.5)
    layer = adapted(base)
    x = torch.randn(3, 64).double()
    want = layer(x)
    layer.merge_weights()
    assert_same_function(layer(x), want)
    layer.unmerge_weights()
    assert torch.equal(layer(x), want)


def test_disabling_gives_the_base_merged_or_not():
    layer = adapted()
    x = torch.randn(3, 64)
    base = layer.base_layer(x)
    layer.enabled = False
    assert torch.equal(layer(x), base)
    layer.merge_weights()
    assert torch.equal(layer(x), base)
    layer.enabled = True
    assert not torch.equal(layer(x), base)


def test_casting_a_merged_layer_casts_the_kept_weight_too():
    layer = adapted()
    original = layer.weight.detach().clone()
    layer.merge_weights()
    layer.double()
    layer.unmerge_weights()
    assert layer.weight.dtype == torch.float64 and torch.equal(layer.weight, original.double())


def test_copies_are_independent():
    layer = adapted()
    layer.merge_weights()
    twin = copy.deepcopy(layer)
    twin.unmerge_weights()
    assert layer.merged and not twin.merged


def test_state_dict_round_trip():
    layer, other = adapted(), adapted()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), other(x))
    assert {"lora_A", "lora_B"} <= set(layer.state_dict())


@pytest.mark.parametrize("quantize", [False, True], ids=["linear", "nf4"])
def test_the_state_dict_of_a_merged_layer_is_that_of_the_unmerged_one(quantize):
    """With W + ΔW beside A and B, whoever loads it would have ΔW twice."""

    def new():
        base = nn.Linear(64, 48)
        return adapted(NF4Linear.from_linear(base) if quantize else base)

    layer = new()
    x, W = torch.randn(2, 64), layer.base_layer.dequantize().weight if quantize else layer.weight.clone()
    want, before = layer(x), {key: value.clone() for key, value in layer.state_dict().items()}
    model = nn.Sequential(layer)
    layer.merge_weights(dequantize=True)
    after = model.state_dict()
    assert list(after) == [f"0.{key}" for key in before]
    assert all(torch.equal(after[f"0.{key}"], value) for key, value in before.items())
    assert layer.merged
    assert_computes_the_layer(layer, x, W)
    other = nn.Sequential(new())
    other.load_state_dict(after)
    assert torch.equal(other(x), want)


def test_loading_into_a_merged_layer_is_refused():
    model = nn.Sequential(adapted(), adapted(nn.Linear(48, 4)))
    state = copy.deepcopy(model.state_dict())
    model[1].merge_weights()
    with pytest.raises(RuntimeError, match=r"1 is merged; call unmerge_weights\(\)"):
        model.load_state_dict(state)
    model[1].unmerge_weights()
    model.load_state_dict(state)
