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
    assert_agrees(ours, theirs, A, B, linear.weight, x, dy)


def assert_agrees(ours, theirs, A, B, W, x, dy):
    """Ours against PEFT's layer in fp64, which has W for a base, and beside separate torch layers in x's dtype."""
    got = run(ours, ours.lora_A, ours.lora_B, x, dy)
    want = run(theirs.double(), A, B, x.double(), dy.double())

    def separate(dtype, sign=torch.clone):
        operands = (x, ours.lora_A, ours.lora_B, W, ours.bias, dy)
        *leaves, W_, b, dy_ = (sign(t.detach().to(dtype)).requires_grad_() for t in operands)
        y = lora_linear_reference(leaves[0], W_, b, *leaves[1:], ours.scaling)
        return dict(zip(got, (y.detach(), *torch.autograd.grad(y, leaves, dy_.detach())), strict=True))

    low, magnitudes = separate(x.dtype), separate(torch.double, torch.abs)
    (N, K), M = W.shape, x.numel() // x.shape[-1]
    terms = {"y": 2 * K + ours.rank + 1, "dx": 2 * N + ours.rank, "dA": N + M, "dB": K + M}
    for name, length in terms.items():
        assert_within_budget(got[name].to(x.dtype), want[name], low[name], length, magnitudes[name], name)


def test_outputs_and_gradients_agree_with_peft_on_bitsandbytes_nf4():
    bnb = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(128, 64)
    ours = adapted(NF4Linear.from_linear(linear, compute_dtype=torch.float32))
    packed = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32)
    packed.load_state_dict(linear.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, A, B = peft_layer(packed.to("cpu"), ours)
    # On some CPUs bitsandbytes multiplies in bf16: its decoded weight is the oracle.
    dense = nn.Linear(128, 64)
    dense.weight.data = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    dense.bias.data.copy_(linear.bias.data)
    theirs.base_layer = dense
    assert_agrees(ours, theirs, A, B, dense.weight, torch.randn(9, 128), torch.randn(9, 64))
