"""One LoRA layer: initialization, dtypes, dropout, merging; against PEFT; compiled, checkpointed, distributed."""

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from handtuned.kernels.lora import lora_linear_reference
from handtuned.nn import LoRALayer, LoRALinear
from handtuned.quant import NF4Linear
from helpers import assert_within_budget
from torch import nn

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def short(dtype):
    return str(dtype).removeprefix("torch.")


def adapted(base=None, rank=4, alpha=8.0, dropout=0.0):
    """A layer whose adapter does something (B is not zero)."""
    layer = LoRALinear(base or nn.Linear(64, 48), rank, alpha, dropout)
    nn.init.normal_(layer.lora_B)
    return layer


def test_a_new_layer_computes_what_its_base_does():
    base = nn.Linear(10, 6)
    x = torch.randn(2, 3, 10)
    want = base(x)
    layer = LoRALinear(base, rank=3, lora_alpha=6.0)
    torch.testing.assert_close(layer(x), want)
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
    layer = adapted()
    x = torch.randn(5, 64)
    want = F.linear(x, layer.weight, layer.bias) + 2.0 * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), want)


def test_lora_layer_has_a_frozen_weight_of_its_own():
    layer = LoRALayer(12, 7, rank=2, lora_alpha=4.0)
    assert layer.weight.shape == (7, 12) and layer.weight.any() and not layer.weight.requires_grad
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


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
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    bias = base.bias.detach()
    x = x.detach()
    exact = x.double() @ W.double().T + bias.double() + 2.0 * x.double() @ A.T @ B.T
    low = lora_linear_reference(*(t.to(input_dtype) for t in (x, W, bias, A, B)), 2.0)
    assert_within_budget(y.detach(), exact, low, "y")


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
    layer = adapted(dropout=0.5)
    x = torch.randn(200, 64)
    layer.eval()
    plain = layer(x)
    layer.train()
    assert not torch.equal(layer(x), plain)
    nn.init.zeros_(layer.lora_B)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_dropout_is_governed_by_torchs_random_state():
    layer = adapted(dropout=0.3)
    x = torch.randn(4, 64)
    state = torch.get_rng_state()
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.set_rng_state(state)
    assert torch.equal(layer(x), first)


# merging


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
    layer = adapted()
    x = torch.randn(5, 64)
    want = layer(x)
    layer.merge_weights()
    merged = layer.weight.clone()
    layer.merge_weights()
    assert layer.merged and torch.equal(layer.weight, merged)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer.base_layer(x), want)
    layer.unmerge_weights()
    layer.unmerge_weights()
    assert not layer.merged
    assert torch.equal(layer(x), want)


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
    x = torch.randn(5, 64)
    want = layer(x)
    packed = layer.base_layer
    layer.merge_weights(dequantize=True)
    assert isinstance(layer.base_layer, nn.Linear)
    torch.testing.assert_close(layer(x), want)
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


# against PEFT


class OneLayer(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.q_proj = linear

    def forward(self, x):
        return self.q_proj(x)


def run(layer, A, B, x, dy):
    x = x.detach().requires_grad_()
    for parameter in (A, B):
        parameter.grad = None
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "dA": A.grad, "dB": B.grad}


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


# compiled, checkpointed, distributed


@pytest.mark.parametrize("quantize", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no-dropout", "dropout"])
def test_compiles_without_a_graph_break(quantize, dropout):
    """aot_eager traces forward and backward as inductor does, and then runs the same operations."""
    base = nn.Linear(64, 48)
    layer = adapted(NF4Linear.from_linear(base) if quantize else base, dropout=dropout)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(3, 64), torch.randn(3, 48)
    results = []
    for function in (layer, compiled):
        torch.manual_seed(0)
        results.append(run(function, layer.lora_A, layer.lora_B, x, dy))
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name])


def test_compiles_with_the_kernels_as_operations(kernel_backend, device):
    """The launchers appear as custom operations, in one graph; a row of NF4 goes to the streaming kernel."""
    for base, rows in ((nn.Linear(64, 48), 3), (NF4Linear.from_linear(nn.Linear(64, 48)), 1)):
        layer = adapted(base).to(device)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x, dy = torch.randn(rows, 64, device=device), torch.randn(rows, 48, device=device)
        want, got = (run(f, layer.lora_A, layer.lora_B, x, dy) for f in (layer, compiled))
        for name in want:
            torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_torchs_checkpoint_even_with_dropout(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    layers = nn.Sequential(adapted(nn.Linear(64, 64), dropout=0.4), nn.Tanh(), adapted(nn.Linear(64, 8), dropout=0.4))
    x = torch.randn(4, 64, requires_grad=True)
    results = []
    for function in (layers, lambda x: checkpoint(layers, x, use_reentrant=use_reentrant)):
        torch.manual_seed(2)
        layers.zero_grad()
        x.grad = None
        y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in layers.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _ddp_worker(rank, folder, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = adapted(NF4Linear.from_linear(nn.Linear(64, 48)))
    x = torch.randn(8, 64)
    model = nn.parallel.DistributedDataParallel(layer)
    for _ in range(2):
        model.zero_grad()
        model(x[rank * 4 :][:4]).square().mean().backward()
    alone = copy.deepcopy(layer)
    alone.zero_grad()
    alone(x).square().mean().backward()
    same = all(
        torch.allclose(a.grad, b.grad, atol=1e-6)
        for a, b in ((layer.lora_A, alone.lora_A), (layer.lora_B, alone.lora_B))
    )
    results.put(same)
    torch.distributed.destroy_process_group()


def test_two_processes_under_ddp_average_their_gradients(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_ddp_worker, args=(rank, tmp_path, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert results.get() and results.get()
