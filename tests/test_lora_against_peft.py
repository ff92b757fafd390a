"""One LoRA layer against PEFT's: output and every gradient, on dense and on 4-bit bases."""

import copy
import warnings

import pytest
import torch
from handtuned.kernels.lora import lora_linear_reference
from handtuned.quant import NF4Linear
from helpers import assert_within_budget
from lora_layers import FLOATS, adapted, run, short
from torch import nn


class OneLayer(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.q_proj = linear

    def forward(self, x):
        return self.q_proj(x)


def peft_layer(linear, ours):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=ours.rank, lora_alpha=8, target_modules=["q_proj"])
    layer = peft.get_peft_model(OneLayer(linear), config).base_model.model.q_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.data, B.data = ours.lora_A.data.clone(), ours.lora_B.data.clone()
    return layer, A, B


@pytest.mark.parametrize("dtype", FLOATS, ids=short)
def test_outputs_and_gradients_agree_with_peft(dtype):
    linear = nn.Linear(64, 48).to(dtype)
    ours = adapted(copy.deepcopy(linear))
    theirs, A, B = peft_layer(copy.deepcopy(linear), ours)
    x, dy = torch.randn(2, 9, 64).to(dtype), torch.randn(2, 9, 48).to(dtype)
    exact = adapted(copy.deepcopy(linear).double())
    exact.lora_A.data, exact.lora_B.data = ours.lora_A.data.double(), ours.lora_B.data.double()
    got = run(ours, ours.lora_A, ours.lora_B, x, dy)
    want = run(exact, exact.lora_A, exact.lora_B, x.double(), dy.double())
    rival = run(theirs, A, B, x, dy)
    for name in got:
        # Ours computes in the base's dtype, where PEFT upcasts to the adapter's: at most its error and one rounding.
        low = rival[name].to(dtype)
        if dtype != torch.float32:
            low = lora_low(name, ours, x, dy)
        assert_within_budget(got[name].to(dtype), want[name], low, name)


def lora_low(name, layer, x, dy):
    """What separate torch layers give when all of them compute in x's dtype."""
    leaves = [t.detach().to(x.dtype).requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    y = lora_linear_reference(leaves[0], layer.weight, layer.bias, *leaves[1:], layer.scaling)
    y.backward(dy)
    return {"y": y.detach(), "dx": leaves[0].grad, "dA": leaves[1].grad, "dB": leaves[2].grad}[name]


def test_outputs_and_gradients_agree_with_peft_on_bitsandbytes_nf4():
    bnb = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(128, 64)
    ours = adapted(NF4Linear.from_linear(linear, compute_dtype=torch.float32))
    packed = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32)
    packed.load_state_dict(linear.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, A, B = peft_layer(packed.to("cpu"), ours)
        x, dy = torch.randn(9, 128), torch.randn(9, 64)
        rival = run(theirs, A, B, x, dy)
    got = run(ours, ours.lora_A, ours.lora_B, x, dy)
    exact = adapted(ours.base_layer.dequantize().double())
    exact.lora_A.data, exact.lora_B.data = ours.lora_A.data.double(), ours.lora_B.data.double()
    want = run(exact, exact.lora_A, exact.lora_B, x.double(), dy.double())
    for name in got:
        assert_within_budget(got[name], want[name], rival[name], name)
