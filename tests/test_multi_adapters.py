"""Several adapters in one model: load, switch, mix in one batch, combine, disable, delete."""

import copy

import peft
import pytest
import torch
from adapted_models import TOKENS, adapted, close, doubled, llama, logits, peft_adapted
from handtuned.nn import (
    LoRALinear,
    apply_lora_to_model,
    disable_lora,
    lora_parameters,
    merge_lora,
    unmerge_lora,
)
from handtuned.nn.adapters import load_adapter, save_adapter, set_adapter
from handtuned.nn.combine import add_weighted_adapter, best_of_rank
from handtuned.nn.multi import (
    active_adapter,
    adapter_names,
    adapters_by_row,
    delete_adapter,
    save_modules,
)
from handtuned.quant import quantize_model
from helpers import assert_same_function
from torch import nn

SETTINGS = {
    "a": {"rank": 4, "target_modules": ["q_proj", "down_proj"]},
    "b": {"rank": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 3},
    "c": {"rank": 7, "target_modules": ["o_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of three adapters for different layers."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        model = apply_lora_to_model(llama(), **settings)
        torch.manual_seed(seed)
        for parameter in lora_parameters(model):
            nn.init.normal_(parameter, std=0.1)
        save_adapter(model, root / name)
    return root


def alone(saved, name, base=llama):
    model = base()
    if name is not None:
        load_adapter(model, saved / name)
    return model


def together(saved, base=llama):
    model = base()
    for name in SETTINGS:
        load_adapter(model, saved / name, name)
    return model


def test_each_adapter_is_as_if_it_were_alone(saved):
    model = together(saved)
    assert adapter_names(model) == ["a", "b", "c"]
    assert active_adapter(model) == "c"
    for name in SETTINGS:
        set_adapter(model, name)
        assert active_adapter(model) == name
        assert torch.equal(logits(model), logits(alone(saved, name)))
    with disable_lora(model):
        assert torch.equal(logits(model), logits(llama()))


def test_switching_a_hundred_times_leaves_every_bit(saved):
    model = together(saved)
    before = {}
    for name in SETTINGS:
        set_adapter(model, name)
        before[name] = logits(model)
    for turn in range(100):
        set_adapter(model, "abc"[turn % 3])
    for name in SETTINGS:
        set_adapter(model, name)
        assert torch.equal(logits(model), before[name])


def test_pain_10_switching_changes_neither_requires_grad_nor_parameters(saved):
    """Active and trained are two things; an optimizer's parameters stay the same objects."""
    model = llama()
    load_adapter(model, saved / "a", "a", trainable=True)
    trained = list(lora_parameters(model))
    load_adapter(model, saved / "b", "b")
    frozen = list(lora_parameters(model))
    for name in "abbaab":
        set_adapter(model, name)
        assert all(parameter.requires_grad for parameter in trained)
        assert not any(parameter.requires_grad for parameter in frozen)
    set_adapter(model, "a")
    assert {id(p) for p in lora_parameters(model)} == {id(p) for p in trained}
    model(TOKENS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    set_adapter(model, "b")
    assert all(parameter.grad is not None for parameter in trained)


def test_to_reaches_the_adapters_that_rest(saved):
    model = together(saved).to(torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    set_adapter(model, "a")
    assert torch.allclose(logits(model), logits(alone(saved, "a").to(torch.float64)), atol=1e-12)


def test_state_dict_holds_all_adapters(saved):
    model, other = together(saved), together(saved)
    set_adapter(model, "a")
    set_adapter(other, "a")
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    for name in "bca":
        set_adapter(model, name)
        set_adapter(other, name)
        assert torch.equal(logits(model), logits(other))
    twin = copy.deepcopy(model)
    set_adapter(twin, "c")
    assert active_adapter(model) == "a"


def test_each_adapter_is_saved_under_its_name(saved, tmp_path):
    model = together(saved)
    for name in SETTINGS:
        save_adapter(model, tmp_path / name, name=name)
        assert (tmp_path / name / "adapter_model.safetensors").read_bytes() == (
            saved / name / "adapter_model.safetensors"
        ).read_bytes()


def test_delete(saved):
    model = together(saved)
    with pytest.raises(ValueError, match="'c' is active"):
        delete_adapter(model, "c")
    delete_adapter(model, "a")
    assert adapter_names(model) == ["b", "c"]
    with pytest.raises(ValueError, match="no adapter 'a', only: b, c"):
        set_adapter(model, "a")
    assert torch.equal(logits(model), logits(alone(saved, "c")))


@pytest.mark.parametrize("name", ["", "a.b", "../x", "keys", "pop", "training", None])
def test_names_that_cannot_be(saved, name):
    with pytest.raises(ValueError, match="adapter"):
        load_adapter(llama(), saved / "a", name)


def test_merge_acts_on_the_active_adapter_and_forbids_switching(saved):
    model = together(saved)
    set_adapter(model, "b")
    merge_lora(model)
    close(logits(model), logits(alone(saved, "b")), rounded=True)
    for forbidden in (lambda: set_adapter(model, "a"), lambda: load_adapter(model, saved / "a", "x")):
        with pytest.raises(ValueError, match="merged"):
            forbidden()
    unmerge_lora(model)
    set_adapter(model, "a")
    assert torch.equal(logits(model), logits(alone(saved, "a")))


def test_new_layers_join_the_active_adapter(saved):
    model = alone(saved, "a")
    save = active_adapter(model)
    apply_lora_to_model(model, rank=2, target_modules=["up_proj"])
    assert adapter_names(model) == [save]
    assert all(layer.adapter == save for layer in model.modules() if isinstance(layer, LoRALinear))


# A batch with another adapter in each row


@pytest.mark.parametrize("base", [llama, lambda: quantize_model(llama())], ids=["fp32", "nf4"])
def test_mixed_batch_equals_row_by_row(saved, base):
    model = doubled(together(saved, base))
    names = ["b", None, "a", "c", "a", None]
    tokens = torch.randint(0, 40, (6, 10))
    with adapters_by_row(model, names), torch.no_grad():
        mixed = model(tokens).logits
    for row, name in enumerate(names):
        with torch.no_grad():
            close(mixed[row : row + 1], doubled(alone(saved, name, base))(tokens[row : row + 1]).logits)
    assert torch.equal(logits(model), logits(alone(saved, "c", base)))  # and nothing is left over


def test_mixed_batch_is_peft_s(saved):
    names = ["b", "__base__", "a"]
    tokens = torch.randint(0, 40, (3, 10))
    theirs = peft.PeftModel.from_pretrained(llama(), saved / "a", adapter_name="a")
    theirs.load_adapter(saved / "b", "b")
    doubled(theirs.eval())
    with torch.no_grad():
        expected = theirs(tokens, adapter_names=names).logits
    model = doubled(together(saved))
    with adapters_by_row(model, [None if name == "__base__" else name for name in names]), torch.no_grad():
        close(model(tokens).logits, expected)


def test_mixed_batches_nest_and_do_not_mind_a_merge(saved):
    model = together(saved)
    with adapters_by_row(model, ["a", "b"]):
        mixed = logits(model)
        with adapters_by_row(model, [None, None]):
            close(logits(model), logits(llama()))
        assert torch.equal(logits(model), mixed)
        merge_lora(model)
        assert torch.equal(logits(model), mixed)


def test_mixed_batch_has_gradients(saved):
    """Each adapter gets the gradient of its own rows."""
    model = doubled(together(saved))
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.requires_grad_(True)
    tokens = torch.randint(0, 40, (3, 10))
    with adapters_by_row(model, ["a", "b", "a"]):
        model(tokens).logits.square().sum().backward()
    for name, rows in (("a", [0, 2]), ("b", [1])):
        one = doubled(alone(saved, name))
        for layer in one.modules():
            if isinstance(layer, LoRALinear):
                layer.requires_grad_(True)
        one(tokens[rows]).logits.square().sum().backward()
        set_adapter(model, name)
        for ours, expected in zip(lora_parameters(model), lora_parameters(one), strict=True):
            assert_same_function(ours.grad, expected.grad)


def test_mixed_batch_errors(saved):
    model = together(saved)
    with pytest.raises(ValueError, match="no adapter 'x'"), adapters_by_row(model, ["x"]):
        pass
    with adapters_by_row(model, ["a", "b"]), pytest.raises(ValueError, match="2 rows, but the batch"):
        model(torch.zeros(3, 4, dtype=torch.long))
    logits(model)
    save_modules(model, ["lm_head"])
    with pytest.raises(ValueError, match="'lm_head' is replaced whole"), adapters_by_row(model, ["c", "b"]):
        pass


# Weighted combinations


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "svd", "cat"])
def test_combinations_are_peft_s(saved, kind, weights):
    theirs = peft.PeftModel.from_pretrained(llama(), saved / "a", adapter_name="a")
    theirs.load_adapter(saved / "b", "b")
    theirs.add_weighted_adapter(["a", "b"], list(weights), "mix", combination_type=kind)
    theirs.set_adapter("mix")
    model = together(saved)
    before = logits(model)
    add_weighted_adapter(model, ["a", "b"], weights, "mix", kind)
    assert torch.equal(logits(model), before)
    set_adapter(model, "mix")
    close(logits(model), logits(theirs.eval()), rounded=True)
    assert not any(parameter.requires_grad for parameter in lora_parameters(model))


def test_combinations_survive_the_disk(saved, tmp_path):
    model = together(saved)
    add_weighted_adapter(model, ["a", "c"], [1, 1], "mix", "cat")
    set_adapter(model, "mix")
    save_adapter(model, tmp_path)
    close(logits(alone(tmp_path.parent, tmp_path.name)), logits(model))
    close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_best_of_rank_is_the_cut_svd():
    A, B = torch.randn(9, 30).double(), torch.randn(20, 9).double()
    for rank in (1, 4, 9, 12):
        U, S, Vh = torch.linalg.svd(B @ A)
        cut = min(rank, 9)
        best = (U[:, :cut] * S[:cut]) @ Vh[:cut]
        ours_A, ours_B = best_of_rank(A, B, rank)
        assert ours_A.shape == (cut, 30)
        assert_same_function(ours_B @ ours_A, best)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "x"], [1, 1], "mix"), "must name some of a, b, c"),
        (([], [], "mix"), "must name some of"),
        ((["a", "b"], [1], "mix"), "2 finite numbers"),
        ((["a", "b"], [1, float("nan")], "mix"), "2 finite numbers"),
        ((["a", "b"], [1, "1"], "mix"), "2 finite numbers"),
        ((["a", "b"], [1, 1], "c"), "already"),
        ((["a", "b"], [1, 1], "mix", "ties"), "one of svd, cat, linear"),
        ((["a", "c"], [1, 1], "mix", "linear"), "equal ranks"),
        ((["a", "c"], [1, 1], "mix", "svd", 0), "svd_rank"),
        ((["a", "c"], [1, 1], "mix", "svd", 1.5), "svd_rank must be an integer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_combination_errors(saved, arguments, message):
    model = together(saved)
    with pytest.raises(ValueError, match=message):
        add_weighted_adapter(model, *arguments)
    assert adapter_names(model) == ["a", "b", "c"]


def test_peft_loads_two_of_ours(saved):
    theirs = peft.PeftModel.from_pretrained(llama(), saved / "a", adapter_name="a")
    theirs.load_adapter(saved / "c", "c")
    model = together(saved)
    for name in "ac":
        theirs.set_adapter(name)
        set_adapter(model, name)
        close(logits(model), logits(theirs.eval()))


def test_disable_covers_whole_modules():
    model = adapted(llama())
    save_modules(model, ["lm_head"])
    model.lm_head.current.weight.data.mul_(3)
    with disable_lora(model):
        assert torch.equal(logits(model), logits(llama()))
    assert not torch.allclose(logits(model), logits(llama()))
    assert any(parameter is model.lm_head.current.weight for parameter in lora_parameters(model))


def test_peft_adapters_load_beside_each_other(tmp_path):
    for seed in (3, 4):
        peft_adapted(llama(), seed=seed).save_pretrained(tmp_path / str(seed))
    model = llama()
    for seed in (3, 4):
        load_adapter(model, tmp_path / str(seed), f"seed{seed}")
    for seed in (4, 3):
        set_adapter(model, f"seed{seed}")
        close(logits(model), logits(peft_adapted(llama(), seed=seed)))
