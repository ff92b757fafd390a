"""rsLoRA, LoRA+, LoRA-FA, PiSSA and LoftQ, each against peft."""

import copy
import json

import pytest
import torch
from adapted_models import adapted, close, copy_values, gpt2, llama, logits, our_layers, peft_layers
from handtuned.nn import (
    LoRALinear,
    apply_lora_to_model,
    disable_lora,
    lora_parameters,
    merge_lora,
    unmerge_lora,
)
from handtuned.nn.adapters import load_adapter, save_adapter, set_adapter
from handtuned.nn.variants import dora_init, freeze_A, loftq_init, lora_plus_groups, pissa_init, use_rslora
from handtuned.quant import NF4Linear, quantize_model
from helpers import assert_same_function
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from variant_twins import TARGETS, ours, round_trip, same_gradients, steps, theirs


def test_rslora(tmp_path):
    model, other = ours(rank=6), theirs(rank=6, use_rslora=True, init_lora_weights=False)
    use_rslora(model)
    copy_values(other, model)
    assert model.model.layers[0].self_attn.q_proj.scaling == 16 / 6**0.5
    close(logits(model), logits(other))
    same_gradients(model, other)
    round_trip(model, tmp_path)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_plus_steps_as_peft(decay):
    model, other = ours(), theirs()
    copy_values(other, model)
    optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=1e-3, ratio=8, weight_decay=decay))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 8e-3]
    peft_optimizer = create_loraplus_optimizer(
        other, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=decay
    )
    assert_same_function(steps(model, optimizer), steps(other, peft_optimizer))


def test_lora_plus_groups_hold_each_trained_parameter_once():
    model = ours()
    dora_init(model)
    groups = lora_plus_groups(model, lr=1e-3, ratio=4, weight_decay=0.1)
    parameters = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(parameters) == sorted(id(parameter) for parameter in lora_parameters(model))
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (4e-3, 0.1), (4e-3, 0.0)]
    freeze_A(model)
    assert [group["lr"] for group in lora_plus_groups(model, lr=1e-3, ratio=4)] == [4e-3, 4e-3]


def test_lora_fa_trains_b_alone():
    model, other = ours(), theirs()
    copy_values(other, model)
    freeze_A(model)
    for layer in peft_layers(other).values():
        layer.lora_A["default"].weight.requires_grad_(False)
    before = {path: layer.lora_A.detach().clone() for path, layer in our_layers(model).items()}
    optimizers = [
        torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2) for one in (model, other)
    ]
    assert len(optimizers[0].param_groups[0]["params"]) == len(before)
    assert_same_function(steps(model, optimizers[0]), steps(other, optimizers[1]))
    assert all(torch.equal(layer.lora_A, before[path]) for path, layer in our_layers(model).items())


def test_lora_fa_does_not_keep_the_input(each_backend):
    """dA is what x is kept for; with A frozen, backward holds the small S alone."""

    def kept_inputs(layer):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            x = torch.randn(16, 64, requires_grad=True)
            layer(x).sum().backward()
        assert_same_function(x.grad, (layer.weight + layer.delta_weight()).sum(0).expand(16, 64), terms=2 * 32 + 2)
        return kept.count((16, 64))

    layer = LoRALinear(nn.Linear(64, 32), rank=2)
    nn.init.normal_(layer.lora_B)
    assert kept_inputs(layer) == 1
    layer.lora_A.requires_grad_(False)
    assert kept_inputs(layer) == 0


@pytest.mark.parametrize("base", [llama, gpt2], ids=["linear", "conv1d"])
def test_pissa_is_peft_s(base, tmp_path):
    targets = TARGETS if base is llama else ["c_attn", "c_proj"]
    model, other = ours(base, targets=targets), theirs(base, targets=targets, init_lora_weights="pissa")
    pissa_init(model)
    for path, layer in peft_layers(other).items():
        mine = our_layers(model)[path]
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(mine.lora_B @ mine.lora_A, product, rtol=1e-4, atol=1e-5)
    copy_values(other, model)  # singular vectors are only determined up to their sign
    for layer in our_layers(model).values():
        layer.start_A, layer.start_B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    close(logits(model), logits(base()), rounded=True)
    close(logits(other), logits(base()), rounded=True)
    same_gradients(model, other, rounded=True)
    optimizers = [torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.05) for one in (model, other)]
    close(steps(model, optimizers[0]), steps(other, optimizers[1]), rounded=True)
    round_trip(model, tmp_path, base)


def test_pain_12_pissa_leaves_the_base_as_it_is(tmp_path):
    base = llama()
    model = apply_lora_to_model(copy.deepcopy(base), rank=4, target_modules=TARGETS)
    pissa_init(model)
    steps(model, torch.optim.SGD(lora_parameters(model), lr=0.1))
    weights = dict(base.named_parameters())
    for path, parameter in model.named_parameters():
        if "lora_" not in path:
            assert torch.equal(parameter, weights[path.replace(".base_layer", "")].double())
    with disable_lora(model):
        assert torch.equal(logits(model), logits(base))
    trained = logits(model)
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path, "plain")
    close(logits(model), trained, rounded=True)
    save_adapter(adapted(llama()), tmp_path / "other")
    load_adapter(model, tmp_path / "other", "other")
    close(logits(model), logits(adapted(llama())), rounded=True)
    set_adapter(model, "default")
    assert torch.equal(logits(model), trained)
    merge_lora(model)
    close(logits(model), trained, rounded=True)
    unmerge_lora(model)
    assert torch.equal(logits(model), trained)


def test_pissa_randomized_is_near_the_exact():
    exact, fast = ours(), ours()
    pissa_init(exact)
    pissa_init(fast, iterations=16)
    for a, b in zip(our_layers(exact).values(), our_layers(fast).values(), strict=True):
        one, other = a.lora_B @ a.lora_A, b.lora_B @ b.lora_A
        W = a.base_layer.weight
        assert (W - a.scaling * other).norm() < 1.01 * (W - a.scaling * one).norm()
    close(logits(fast), logits(llama()))


def test_pissa_and_loftq_take_account_of_the_scalings_sign():
    model = ours(alpha=-8)
    pissa_init(model)
    layer = next(iter(our_layers(model).values()))
    W = layer.base_layer.weight
    left = (W - layer.scaling * layer.lora_B @ layer.lora_A).norm()
    torch.testing.assert_close(left, torch.linalg.svdvals(W)[4:].norm(), rtol=1e-4, atol=0)
    model = ours(lambda: quantize_model(llama()), alpha=-8)
    assert all(after < before for before, after in loftq_init(model, llama().state_dict()).values())
    with pytest.raises(ValueError, match="lora_alpha is 0"):
        pissa_init(ours(alpha=0))


def test_pissa_refuses_nf4():
    model = ours(lambda: quantize_model(llama()))
    before = [parameter.detach().clone() for parameter in lora_parameters(model)]
    with pytest.raises(ValueError, match="quantized; pissa_init needs dense weights"):
        pissa_init(model)
    assert all(torch.equal(a, b) for a, b in zip(before, lora_parameters(model), strict=True))


@pytest.mark.parametrize("alpha", [4, 16])
def test_loftq_takes_away_what_it_can(alpha, tmp_path):
    """s·BA is the best approximation of rank r of W − NF4(W), so the error falls to the singular values left over."""
    base = llama()
    model = ours(lambda: quantize_model(llama()), alpha=alpha)
    errors = loftq_init(model, base.state_dict())
    for path, layer in our_layers(model).items():
        assert isinstance(layer.base_layer, NF4Linear)
        W = base.get_submodule(path).weight
        lost = W - layer.base_layer.dequantize().weight
        left = torch.linalg.svdvals(lost)[4:].norm() / W.norm()
        before, after = errors[path]
        assert after == pytest.approx(left.item(), rel=1e-4)
        assert after < before
        assert ((lost - layer.delta_weight()).norm() / W.norm()).item() == pytest.approx(after, rel=1e-5)
    fresh = quantize_model(llama())
    save_adapter(model, tmp_path)
    load_adapter(fresh, tmp_path)
    close(logits(fresh), logits(model))


def test_loftq_is_peft_s_on_bitsandbytes(tmp_path):
    """peft's own function on the same bytes; it takes no account of the scaling, so alpha = r here."""
    bnb = pytest.importorskip("bitsandbytes")
    from peft.utils.loftq_utils import _low_rank_decomposition

    base = llama()
    model = ours(lambda: quantize_model(llama(), double_quant=False), alpha=4)
    loftq_init(model, base.state_dict())
    for path, layer in our_layers(model).items():
        weight = base.get_submodule(path).weight.data
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
        found = _low_rank_decomposition(weight - bnb.functional.dequantize_4bit(packed, state), 4)
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, found["L"] @ found["R"], rtol=1e-3, atol=1e-6)


def test_loftq_reads_a_model_directory(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path)
    one, other = (ours(lambda: quantize_model(llama())) for _ in range(2))
    assert loftq_init(one, tmp_path) == loftq_init(other, base.state_dict())


def test_loftq_of_gpt2_takes_weights_as_they_lie():
    """Also where one that lies as (in, out) is square, so that its shape says nothing."""
    model = apply_lora_to_model(quantize_model(gpt2()), rank=4, target_modules=["c_attn", "attn.c_proj"])
    errors = loftq_init(model, gpt2().state_dict())
    assert len(errors) == 6 and all(after < before < 0.2 for before, after in errors.values())


def test_loftq_errors():
    with pytest.raises(ValueError, match="no NF4 layer"):
        loftq_init(ours(), llama().state_dict())
    model = ours(lambda: quantize_model(llama()))
    before = [parameter.detach().clone() for parameter in lora_parameters(model)]
    with pytest.raises(ValueError, match=r"original has no 'model\.layers\.0"):
        loftq_init(model, {})
    wrong = llama().state_dict() | {"model.layers.2.mlp.down_proj.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"must be \(64, 128\), got \(3, 3\)"):
        loftq_init(model, wrong)
    assert all(torch.equal(a, b) for a, b in zip(before, lora_parameters(model), strict=True))


@pytest.mark.parametrize("call", [use_rslora, freeze_A, pissa_init, dora_init, lambda m: lora_plus_groups(m, 1)])
def test_variants_need_an_adapter_that_is_not_merged(call):
    with pytest.raises(ValueError, match="no active adapter"):
        call(llama())
    with pytest.raises(ValueError, match="merged"):
        call(merge_lora(adapted(llama())))


def test_the_benchmark_runs_each_variant_by_its_flags_and_goes_on_where_it_stopped(tmp_path, capsys):
    import variants
    from tiny import make_model

    record = tmp_path / "variants.json"
    words = ["--model", make_model(tmp_path / "model", max_position_embeddings=512), "--record", str(record),
             "--steps", "2", "--rows", "2", "--held-out", "4"]  # fmt: skip
    variants.main([*words, "--seeds", "1", "--only", "LoRA", "LoftQ on NF4"])
    first = json.loads(record.read_text())
    variants.main([*words, "--seeds", "2"])
    (runs,) = json.loads(record.read_text()).values()
    assert set(runs) == set(variants.VARIANTS) and all(len(seeds) == 2 for seeds in runs.values())
    assert all(runs[name]["0"] == run["0"] for name, run in next(iter(first.values())).items())
    assert len({run["0"]["loss"] for run in runs.values()}) == len(runs), "no two variants are the same"
    page = (tmp_path / "variants.md").read_text()
    assert all(f"| {name} | 2 |" in page for name in variants.VARIANTS)
