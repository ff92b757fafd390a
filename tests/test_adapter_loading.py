"""Loading and saving adapters: into models that have some already, shared and wrapped layers, refusals, failures."""

import copy

import pytest
import torch
from adapted_models import adapted, llama, logits, shake
from handtuned.nn import apply_lora_to_model, lora_parameters
from handtuned.nn.adapters import load_adapter, read_adapter_config, save_adapter
from handtuned.nn.multi import save_modules
from safetensors.torch import load_file
from torch import nn


def test_loading_into_the_same_adapter_keeps_the_parameters(tmp_path):
    """A resumed run: the optimizer's parameters stay the same objects, trainable as before."""
    save_adapter(adapted(llama()), tmp_path)
    model = apply_lora_to_model(llama(), rank=4, lora_alpha=2, target_modules=["q_proj", "down_proj"])
    before = list(lora_parameters(model))
    load_adapter(model, tmp_path)
    assert all(a is b for a, b in zip(before, lora_parameters(model), strict=True))
    assert all(parameter.requires_grad for parameter in before)
    assert torch.equal(logits(model), logits(adapted(llama())))


def test_loading_into_the_same_adapter_needs_the_same_layers_and_ranks(tmp_path):
    save_adapter(adapted(llama()), tmp_path)
    more = adapted(llama(), target_modules=["q_proj", "v_proj"])
    before = copy.deepcopy(more.state_dict())
    with pytest.raises(ValueError, match=r"missing in the file: .*v_proj.*unexpected in the file: .*down_proj"):
        load_adapter(more, tmp_path)
    other_rank = adapted(llama(), rank=6)
    with pytest.raises(ValueError, match=r"rank 4.*has rank 6"):
        load_adapter(other_rank, tmp_path)
    assert before.keys() == more.state_dict().keys()
    load_adapter(more, tmp_path, name="second")
    assert torch.equal(logits(more), logits(adapted(llama())))


def test_loaded_adapters_are_frozen_unless_asked_for(tmp_path):
    save_adapter(adapted(llama()), tmp_path)
    model = llama()
    load_adapter(model, tmp_path)
    assert not any(parameter.requires_grad for parameter in lora_parameters(model))
    assert model.lm_head.weight.requires_grad  # nothing else changed
    model = llama()
    load_adapter(model, tmp_path, trainable=True)
    assert all(parameter.requires_grad for parameter in lora_parameters(model))


def test_a_layer_used_twice_has_one_adapter(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Sequential(nn.Linear(6, 6))
            self.second = nn.Sequential(self.first[0])

        def forward(self, x):
            return self.second(self.first(x).tanh())

    model = shake(apply_lora_to_model(Twice(), rank=2, target_modules=["0"]))
    save_adapter(model, tmp_path)
    again = Twice()
    load_adapter(again, tmp_path)
    assert again.first[0] is again.second[0]
    x = torch.randn(3, 6)
    assert torch.equal(again(x), model(x))


def test_layers_that_would_be_bypassed_are_refused(tmp_path):
    """nn.MultiheadAttention reads out_proj's weight and never calls it."""
    save_adapter(shake(apply_lora_to_model(nn.ModuleDict({"a": nn.ModuleDict({"out_proj": nn.Linear(8, 8)})}), rank=2,
                                           target_modules=["out_proj"])), tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match=r"unexpected in the file: 'a\.out_proj'"):
        load_adapter(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        load_adapter(nn.ModuleDict({"a": nn.ModuleDict({"out_proj": nn.Linear(8, 8, device="meta")})}), tmp_path)


def test_loading_leaves_the_random_state_alone(tmp_path):
    save_adapter(adapted(llama()), tmp_path)
    model = llama()
    state = torch.get_rng_state()
    load_adapter(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_compiled_and_wrapped_models_write_plain_paths(tmp_path):
    model = adapted(llama())
    save_adapter(torch.compile(model), tmp_path)
    assert all("_orig_mod" not in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_saving_is_refused_without_an_adapter_or_with_nan(tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(llama(), tmp_path / "none")
    model = adapted(llama())
    with pytest.raises(ValueError, match="no adapter 'other', only: default"):
        save_adapter(model, tmp_path / "none", name="other")
    model.model.layers[1].mlp.down_proj.lora_B.data[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.lora_B.*NaN"):
        save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    save_adapter(adapted(llama()), tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        save_adapter(adapted(llama(), rank=8), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    load_adapter(llama(), tmp_path)


def test_the_base_model_may_be_given_as_a_path(tmp_path):
    save_adapter(adapted(llama()), tmp_path, base_model=tmp_path / "base")
    assert read_adapter_config(tmp_path)["base_model_name_or_path"] == str(tmp_path / "base")


def test_files_are_as_readable_as_any_other(tmp_path):
    """Weights that only their writer can read would be of no use to a server that runs as somebody else."""
    save_adapter(adapted(llama()), tmp_path)
    (tmp_path / "other").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_whole_modules_that_peft_would_confuse_are_not_saved(tmp_path):
    """PEFT takes `modules_to_save` for endings of paths, so that "head" is "lm_head" as well."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "head", "lm_head")})
    save_modules(apply_lora_to_model(model, 2, target_modules=["q_proj"]), ["head"])
    with pytest.raises(ValueError, match="head would select 'lm_head' too"):
        save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    save_modules(model, ["lm_head"])
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)


def test_what_a_whole_module_counts_is_loaded(tmp_path):
    base = nn.Sequential()
    base.lin, base.head = nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    model = apply_lora_to_model(copy.deepcopy(base), 2, target_modules=["lin"])
    save_modules(model, ["head"])
    model.train()(torch.randn(5, 4))
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    assert base.head[0].num_batches_tracked == 1 and base.head[0].running_mean.equal(model.head[0].running_mean)
    base.head.base_layer[0].num_batches_tracked = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"is .* of torch\.int64 in the file and .* of torch\.float32 in the model"):
        load_adapter(base, tmp_path, "again")
