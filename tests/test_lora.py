"""One LoRA layer: what it starts as, what it computes, settings, dtypes, autocast, dropout."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from handtuned.kernels.lora import lora_linear_reference
from handtuned.nn import LoRALayer, LoRALinear
from handtuned.nn.lora import LoRALinearReference
from handtuned.quant import NF4Linear
from helpers import assert_computes, assert_same_function, order_cost
from lora_layers import FLOATS, adapted, run, short
from torch import nn


def test_a_new_layer_computes_what_its_base_does():
    base = nn.Linear(10, 6).double()
    x = torch.randn(2, 3, 10).double()
    want = base(x)
    layer = LoRALinear(base, rank=3, lora_alpha=6.0)
    assert_same_function(layer(x), want)
    assert layer.lora_A.shape == (3, 10) and layer.lora_B.shape == (6, 3)
    assert layer.scaling == 2.0 and layer.rank == 3 and not layer.merged
    assert not layer.lora_B.any() and layer.lora_A.any()


def test_A_starts_as_a_linear_layer_does_whatever_the_rank():
    for rank in (1, 8, 64):
        layer = LoRALinear(nn.Linear(400, 30), rank=rank)
        bound = 1 / math.sqrt(400)
        assert layer.lora_A.abs().max() <= bound
        assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_at_the_start_A_has_no_gradient_and_B_has():
    layer = LoRALinear(nn.Linear(10, 6), rank=3)
    layer(torch.randn(4, 10)).square().sum().backward()
    assert not layer.lora_A.grad.any() and layer.lora_B.grad.any()
    assert layer.base_layer.weight.grad is None and not layer.base_layer.weight.requires_grad


def test_the_formula():
    layer = adapted().double()
    x = torch.randn(5, 64).double()
    want = F.linear(x, layer.weight, layer.bias) + 2.0 * (x @ layer.lora_A.T) @ layer.lora_B.T
    assert_same_function(layer(x), want)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "NF4"])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (0, 64), (2, 0, 64)], ids=str)
def test_without_gradients_it_computes_the_same_bits(shape, quantized):
    """Then it does not pass through autograd's Function."""
    base = nn.Linear(64, 48)
    layer = LoRALinear(NF4Linear.from_linear(base) if quantized else base, rank=4, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(shape)
    torch.manual_seed(3)
    expected = layer(x)
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(3)
        with mode():
            y = layer(x)
            assert torch.equal(y, expected) and y.shape == (*shape[:-1], 48)
            y += 1  # it may be changed in place


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_reference_is_the_same_layer(dropout):
    """From the same seed both start alike; without dropout (each draws a mask of its own) they compute alike."""
    base, layers = nn.Linear(64, 48), []
    for kind in (LoRALinearReference, LoRALinear):
        torch.manual_seed(1)
        layers.append(kind(copy.deepcopy(base), rank=4, lora_alpha=8.0, lora_dropout=dropout))
    reference, layer = layers
    assert torch.equal(reference.lora_A, layer.lora_A) and torch.equal(reference.lora_B, layer.lora_B)
    layer.lora_B.data.normal_()
    reference.lora_B.data.copy_(layer.lora_B)
    x, dy = torch.randn(5, 64), torch.randn(5, 48)
    if dropout:
        reference.eval(), layer.eval()
    want, got = (run(one, one.lora_A, one.lora_B, x, dy) for one in layers)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_lora_layer_has_a_frozen_weight_of_its_own():
    layer = LoRALayer(12, 7, rank=2, lora_alpha=4.0)
    assert layer.weight.shape == (7, 12) and layer.weight.any() and not layer.weight.requires_grad
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    x = torch.randn(3, 12).double()
    assert_same_function(layer.double()(x), x @ layer.weight.T)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -1}, "rank"),
        ({"rank": 2.0}, "rank"),
        ({"rank": True}, "rank"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": math.inf}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"lora_dropout": math.nan}, "lora_dropout"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(nn.Linear(4, 4), **settings)
    with pytest.raises(ValueError, match=message):
        LoRALayer(4, 4, **settings)


@pytest.mark.parametrize("setting", ["lora_alpha", "lora_dropout"])
@pytest.mark.parametrize("value", ["8", None, True, torch.ones(())], ids=str)
def test_settings_that_are_no_numbers(setting, value):
    with pytest.raises(TypeError, match=f"{setting} must be a number"):
        LoRALinear(nn.Linear(4, 4), **{setting: value})


def test_what_cannot_be_wrapped():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for wrong in (nn.Conv1d(2, 2, 1), nn.Embedding(4, 4), Doubled(4, 4), torch.ones(4, 4)):
        with pytest.raises(TypeError, match="original_linear"):
            LoRALinear(wrong)
    with pytest.raises(TypeError, match="nest"):
        LoRALinear(LoRALinear(nn.Linear(4, 4)))


def test_the_adapter_is_created_where_the_base_is():
    layer = LoRALinear(nn.Linear(4, 4, device="meta"))
    assert layer.lora_A.is_meta and layer.lora_B.is_meta
    assert not LoRALinear(nn.Linear(4, 4).eval()).training


@pytest.mark.parametrize("quantize", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(FLOATS, repeat=3)), ids=lambda d: "-".join(short(dtype) for dtype in d)
)
def test_every_mixture_of_dtypes_runs(dtypes, quantize):
    """Base, adapter and input in any of the three: the output has the input's dtype, gradients the parameters'."""
    base_dtype, adapter_dtype, input_dtype = dtypes
    base = nn.Linear(64, 48).to(base_dtype)
    if quantize:
        base = NF4Linear.from_linear(base)
    layer = adapted(base)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    layer.lora_A.data = layer.lora_A.data.to(adapter_dtype)
    layer.lora_B.data = layer.lora_B.data.to(adapter_dtype)
    x = torch.randn(3, 64).to(input_dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == input_dtype and x.grad.dtype == input_dtype
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == adapter_dtype
    W = base.quantized.dequantize(torch.float32) if quantize else base.weight.detach()
    bias, A, B = base.bias, layer.lora_A, layer.lora_B
    assert_computes(y.detach(), lambda *inputs: lora_linear_reference(*inputs, 2.0), (x, W, bias, A, B), 2 * 64 + 4 + 1)


def test_fp64_base_gets_an_fp64_adapter():
    layer = adapted(nn.Linear(6, 5).double())
    assert layer.lora_A.dtype == torch.float64
    assert layer(torch.randn(2, 6).double()).dtype == torch.float64


@pytest.mark.parametrize("base", ["linear", "nf4", "nf4-fp32"])
@pytest.mark.parametrize("state", ["active", "merged", "disabled"])
def test_under_autocast_the_output_has_autocasts_dtype(base, state):
    linear = nn.Linear(64, 48)
    if base != "linear":
        linear = NF4Linear.from_linear(linear, compute_dtype=torch.float32 if base == "nf4-fp32" else None)
    layer = adapted(linear)
    if state == "merged":
        layer.merge_weights(dequantize=True)
    layer.enabled = state != "disabled"
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == linear(x).dtype == torch.bfloat16
        y.sum().backward()
    assert x.grad.dtype == torch.float32 and torch.isfinite(x.grad).all()
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)


def test_backward_inside_autocast_keeps_to_the_forwards_dtype():
    layer = adapted(NF4Linear.from_linear(nn.Linear(64, 48), compute_dtype=torch.float32))
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().square().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


def test_dropout_falls_on_the_adapters_input_alone():
    layer = adapted(dropout=0.5).double()
    x = torch.randn(200, 64).double()
    layer.eval()
    plain = layer(x)
    layer.train()
    assert not torch.equal(layer(x), plain)
    nn.init.zeros_(layer.lora_B)
    assert_same_function(layer(x), layer.base_layer(x))


def test_dropout_is_governed_by_torchs_random_state():
    layer = adapted(dropout=0.3)
    x = torch.randn(4, 64)
    state = torch.get_rng_state()
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.set_rng_state(state)
    assert torch.equal(layer(x), first)


def run_reference(*operands):
    x, W, b, A, B, dy = (t.detach().requires_grad_() for t in operands)
    y = lora_linear_reference(x, W, b, A, B, 2.0)
    return {"y": y.detach()} | dict(zip(("dx", "dA", "dB"), torch.autograd.grad(y, (x, A, B), dy), strict=True))


@pytest.mark.parametrize("quantize", [False, True], ids=["linear", "nf4"])
def test_hooks_on_the_base_act_as_without_an_adapter(quantize):
    """The fused operation does not call the base; with hooks on it the base is called, and nothing else changes."""
    base = nn.Linear(64, 48)
    layer = adapted(NF4Linear.from_linear(base) if quantize else base)
    x, dy = torch.randn(5, 64), torch.randn(5, 48)
    W = (layer.base_layer.dequantize() if quantize else base).weight.detach().clone()
    sizes = run_reference(x.abs(), W.abs(), base.bias.abs(), layer.lora_A.abs(), layer.lora_B.abs(), dy.abs())
    terms = {"y": 2 * 64 + 4 + 1, "dx": 2 * 48 + 4, "dA": 48 + 5, "dB": 64 + 5}
    bounds = {name: 2 * order_cost(terms[name], size) for name, size in sizes.items()}  # two sums, either may err
    want, plain = run(layer, layer.lora_A, layer.lora_B, x, dy), layer.base_layer(x)
    outputs = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    got = run(layer, layer.lora_A, layer.lora_B, x, dy)
    for name in want:
        assert ((got[name] - want[name]).abs() <= bounds[name]).all(), name
    layer.merge_weights(dequantize=True)
    assert ((layer(x) - want["y"]).abs() <= bounds["y"]).all()
    layer.unmerge_weights()
    layer.enabled = False
    layer(x)
    layer(x.double())  # cast for the call
    assert len(outputs) == 4
    for output, expected in zip(outputs, (plain, want["y"], plain, plain), strict=True):
        assert ((output - expected).abs() <= bounds["y"]).all()


def test_a_base_whose_forward_was_replaced_is_called_and_not_merged():
    """As offloading libraries do, on the instance."""
    layer = adapted(nn.Linear(6, 5).double(), dropout=0.0)
    x = torch.randn(3, 6).double()
    base, both = layer.base_layer(x), layer(x)
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: 2 * forward(x)
    assert_same_function(layer(x), both + base)
    with pytest.raises(ValueError, match="forward has been replaced"):
        layer.merge_weights()
    assert not layer.merged
