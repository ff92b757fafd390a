"""Modules that read an adapted layer's weight in place of calling it: the adapter acts there, or an error says why."""

import pytest
import torch
import torch.nn.functional as F
from handtuned.nn import LoRALinear, apply_lora_to_model, disable_lora, lora_parameters, merge_lora, unmerge_lora
from handtuned.nn.lora import lora_layers
from handtuned.nn.multi import adapters_by_row
from handtuned.nn.variants import dora_init, pissa_init
from handtuned.quant import NF4Linear
from helpers import assert_same_function
from torch import nn


class Reads(nn.Module):
    """Computes with its children's weights: `how` is one of the ways that models do."""

    WAYS = {  # noqa: RUF012
        "linear": lambda self, x: F.linear(x, self.proj.weight, self.proj.bias),
        "product": lambda self, x: x @ self.proj.weight.t() + self.proj.bias,
        "slices": lambda self, x: sum(F.linear(x[..., i : i + 4], self.proj.weight[:, i : i + 4]) for i in (0, 4)),
        "chunks": lambda self, x: torch.cat([F.linear(x, w) for w in self.proj.weight.chunk(2)], dim=-1),
        "einsum": lambda self, x: torch.einsum("...i,oi->...o", x, self.proj.weight),
        "in a helper": lambda self, x: self.helper(x),
        "call": lambda self, x: self.proj(x),
    }

    def __init__(self, how="call"):
        super().__init__()
        self.proj, self.how = nn.Linear(8, 8), how

    def helper(self, x):
        return F.linear(x, self.proj.weight, self.proj.bias)

    def forward(self, x):
        y = self.WAYS[self.how](self, x)
        return y if self.how in ("linear", "product", "in a helper", "call") else y + self.proj.bias


class Outer(nn.Module):
    def __init__(self, how="call"):
        super().__init__()
        self.inner = Reads(how)

    def forward(self, x):
        inner = self.inner
        return F.linear(x, inner.proj.weight, inner.proj.bias) if inner.how == "linear" else inner(x)


def trained(model, init=None, targets="all-linear", **settings):
    apply_lora_to_model(model, 2, target_modules=targets, **settings)
    if init:
        init(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_()
    return model


def twins(how, init=None, base=None, outer=False, **settings):
    """The same weights and adapter, read by one model and called by the other."""
    models = []
    for way in (how, "call"):
        torch.manual_seed(0)
        model = (Outer if outer else Reads)(way)
        models.append(trained(base(model) if base else model, init, ["proj"], **settings))
    return models


@pytest.mark.parametrize("how", Reads.WAYS)
@pytest.mark.parametrize("init", [None, dora_init, pissa_init], ids=["lora", "dora", "pissa"])
@pytest.mark.parametrize("outer", [False, True])
def test_a_weight_that_is_read_is_the_adapter_s(how, init, outer):
    reads, calls = twins(how, init, outer=outer)
    x = torch.randn(3, 8)
    results = [model(x) for model in (reads, calls)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(y.square().sum(), list(lora_parameters(m)))
                 for y, m in zip(results, (reads, calls), strict=True)]  # fmt: skip
    torch.testing.assert_close(*gradients)
    with disable_lora(reads), disable_lora(calls):
        torch.testing.assert_close(reads(x), calls(x))
    with torch.no_grad():
        merge_lora(reads)
        torch.testing.assert_close(reads(x), results[0])
        with disable_lora(reads), disable_lora(calls):
            torch.testing.assert_close(reads(x), calls(x))
        unmerge_lora(reads)
        torch.testing.assert_close(reads(x), results[0])


@pytest.mark.parametrize("init", [None, dora_init], ids=["lora", "dora"])
def test_an_nf4_base_is_read_dense(init):
    reads, calls = twins("linear", init, base=lambda m: m.set_submodule("proj", NF4Linear.from_linear(m.proj)) or m)
    x = torch.randn(3, 8)
    torch.testing.assert_close(reads(x), calls(x))
    assert reads.proj.weight.dtype == torch.uint8


def test_outside_of_a_forward_pass_the_weight_is_the_base_s():
    reads, _ = twins("linear")
    assert reads.proj.weight is reads.proj.base_layer.weight
    x = torch.randn(3, 8)
    layer = reads.proj
    by_hand = F.linear(x, layer.weight, layer.bias) + layer.scaling * F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    torch.testing.assert_close(by_hand, layer(x))


def test_what_cannot_act_is_refused():
    reads, calls = twins("linear", lora_dropout=0.5)
    x = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="dropout cannot act"):
        reads.train()(x)
    torch.testing.assert_close(reads.eval()(x), calls.eval()(x))
    with adapters_by_row(reads, ["default", None, "default"]), pytest.raises(RuntimeError, match="by row cannot act"):
        reads(x)


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}])
@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], ["linear1", "linear2"], "all-linear"])
@pytest.mark.parametrize("padded", [False, True])
def test_torch_s_encoder_in_eval_mode(options, targets, padded):
    model = trained(encoder(**options), targets=targets).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.no_grad():
        want, got = model.train()(x, src_key_padding_mask=mask), model.eval()(x, src_key_padding_mask=mask)
        with disable_lora(model):
            base = model(x, src_key_padding_mask=mask)
    kept = ~mask if padded else torch.ones(2, 5, dtype=torch.bool)
    assert_same_function(got[kept], want[kept])
    assert not torch.allclose(base[kept], want[kept], atol=1e-3)


@pytest.mark.parametrize("target", ["dt_proj", "x_proj", "in_proj", "out_proj"])
def test_mamba_reads_one_of_its_projections(target):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    config = transformers.AutoConfig.for_model("mamba", **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(50, (1, 6))
    before = model(tokens).logits
    trained(model, targets=[target])
    after = model(tokens).logits
    assert not torch.allclose(before, after, atol=1e-6)
    after.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora_parameters(model))
    want = model(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(merge_lora(model)(tokens).logits, want)


def test_a_compiled_reader():
    reads, calls = twins("linear")
    x = torch.randn(3, 8)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(reads, backend="aot_eager")(x), calls(x))
    assert isinstance(reads.proj, LoRALinear)
