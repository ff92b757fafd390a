"""One LoRA layer under what torch wraps around modules: compile, checkpoint, DistributedDataParallel."""

import copy

import forked
import pytest
import torch
from handtuned.amp import autocast
from handtuned.nn import add_adapter, apply_lora_to_model, checkpoint, set_adapter
from handtuned.nn.checkpoint import CheckpointError
from handtuned.nn.multi import adapters_by_row
from handtuned.quant import NF4Linear, quantize_model
from helpers import assert_same_function
from lora_layers import adapted, run
from torch import nn


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
        assert_same_function(results[1][name], results[0][name], name, terms=2 * 64 + 4)


def test_compiles_with_the_kernels_as_operations(kernel_backend, device):
    """The launchers appear as custom operations, in one graph; a row of NF4 goes to the streaming kernel."""
    for base, rows in ((nn.Linear(64, 48), 3), (NF4Linear.from_linear(nn.Linear(64, 48)), 1)):
        layer = adapted(base).to(device)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x, dy = torch.randn(rows, 64, device=device), torch.randn(rows, 48, device=device)
        want, got = (run(f, layer.lora_A, layer.lora_B, x, dy) for f in (layer, compiled))
        for name in want:
            assert_same_function(got[name], want[name], name, terms=2 * 64 + 4)


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
    del model  # before the group: were its reducer the last to hold gloo, it could wait for Python's lock for ever
    torch.distributed.destroy_process_group()


def test_two_processes_under_ddp_average_their_gradients(tmp_path):
    results = forked.CONTEXT.SimpleQueue()
    workers = [forked.CONTEXT.Process(target=_ddp_worker, args=(rank, tmp_path, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    assert results.get() and results.get()


@pytest.mark.parametrize("quantize", [False, True], ids=["linear", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_the_autocast_by_hand_is_torchs(dtype, quantize):
    base = nn.Linear(64, 48)
    layer = adapted(NF4Linear.from_linear(base, compute_dtype=dtype) if quantize else base)
    x, dy = torch.randn(3, 64), torch.randn(3, 48, dtype=dtype)
    results = []
    for context in (autocast(dtype), torch.autocast("cpu", dtype)):
        with context:
            y = layer(x)
        results.append((y.to(dtype), *torch.autograd.grad(y, (layer.lora_A, layer.lora_B), dy.to(y.dtype))))
        assert quantize or y.dtype == dtype
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "nf4", "nf4 without an adapter"])
def test_what_follows_may_change_the_output_in_place(kind, shape):
    """As `nn.ReLU(inplace=True)` and residual sums written with += do."""
    layer = nn.Linear(64, 48) if kind == "linear" else NF4Linear.from_linear(nn.Linear(64, 48))
    layer = layer if "without" in kind else adapted(layer)
    x, grads = torch.randn(shape, requires_grad=True), []
    for follow in (lambda y: torch.relu_(y.add_(1)), lambda y: torch.relu(y + 1)):
        grads += torch.autograd.grad(follow(layer(x)).square().sum(), x)
    assert torch.equal(*grads)


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
def test_falcon_whose_linear_layer_is_a_class_of_its_own(quantize):
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, bos_token_id=0, eos_token_id=0
    )
    model = transformers.FalconForCausalLM(config).eval()
    ids = torch.randint(50, (2, 7))
    before = (quantize_model(model) if quantize else model)(ids).logits
    apply_lora_to_model(model, target_modules=["query_key_value"])
    assert_same_function(model(ids).logits, before, terms=4 * 64 + 256)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def two_adapters():
    """Both of the same layers and ranks, so that shapes tell nothing; "b" is active."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    for name in ("a", "b"):
        add_adapter(model, name, rank=2, target_modules="all-linear")
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.lora_B)
    return model.requires_grad_(True)


@pytest.mark.parametrize("names", [["a", "b"], ["b", None], [None, None]], ids=str)
def test_rows_through_checkpoints(names):
    x, gradients = torch.randn(2, 6), []
    for function in (nn.Module.__call__, checkpoint):
        model = two_adapters()
        with adapters_by_row(model, names):
            loss = function(model, x).square().sum()
            gradients.append(torch.autograd.grad(loss, [*model.parameters()], retain_graph=True, allow_unused=True))
    assert all((p is None and q is None) or torch.equal(p, q) for p, q in zip(*gradients, strict=True))
    with pytest.raises(CheckpointError):  # outside of the context
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_adapter_before_a_checkpoint_s_backward(dtype):
    model, x = two_adapters(), torch.randn(2, 6, dtype=dtype)
    loss = checkpoint(model, x).sum()
    set_adapter(model, "a")
    with pytest.raises(CheckpointError, match="another parameter"):
        loss.backward(retain_graph=True)
    set_adapter(model, "b")
    loss.backward()
    assert model[0].lora_A.grad.any() and model[0].resting["a"].lora_A.grad is None
