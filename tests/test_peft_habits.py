"""What people who come from PEFT do with models: classifiers, wrappers, transformers' own ways of saving."""

import copy
import gc
import warnings

import pytest
import torch
import transformers
from adapted_models import model_of, shake, trained_names
from handtuned.nn import (
    LoRALinear,
    apply_lora_to_model,
    disable_lora,
    load_adapter,
    save_adapter,
)  # fmt: skip
from handtuned.nn.lora import lora_layers
from handtuned.nn.merge import merge_and_unload
from handtuned.nn.multi import ModuleToSave, delete_adapter, save_modules
from handtuned.quant import NF4Linear, quantize_model
from safetensors.torch import load_file
from torch import nn

TOKENS = torch.tensor([[5, 6, 7, 8]])


# Classification heads

HEADS = {"llama": ["score"], "bert": ["classifier"], "roberta": ["classifier"], "gpt2": ["score"],
         "distilbert": ["classifier", "pre_classifier"], "electra": ["classifier"]}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_all_linear_trains_a_classifier_s_head_whole(kind, tmp_path):
    auto = transformers.AutoModelForSequenceClassification
    model = apply_lora_to_model(model_of(kind, auto, num_labels=3), 2, target_modules="all-linear")
    whole = sorted(path for path, m in model.named_modules() if isinstance(m, ModuleToSave))
    assert whole == HEADS[kind] and not any(path.startswith(tuple(whole)) for path, _ in lora_layers(model))
    assert {name.split(".")[0] for name in trained_names(model) if "lora_" not in name} == set(whole)
    shake(model)
    want = model(input_ids=TOKENS).logits
    save_adapter(model, tmp_path)
    again = model_of(kind, auto, num_labels=3)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(input_ids=TOKENS).logits, want)


@pytest.mark.parametrize("kind", ["llama", "bert", "distilbert"])
def test_a_classifier_s_head_stays_dense_in_4_bits_and_is_trained_whole(kind):
    auto = transformers.AutoModelForSequenceClassification
    model = quantize_model(model_of(kind, auto, num_labels=3))
    assert not any(isinstance(m, NF4Linear) for path, m in model.named_modules() if path.startswith(tuple(HEADS[kind])))
    apply_lora_to_model(model, 2, target_modules="all-linear")
    assert {name.split(".")[0] for name in trained_names(model) if "lora_" not in name} == set(HEADS[kind])
    model(input_ids=TOKENS).logits.sum().backward()
    whole = quantize_model(model_of("llama"), skip=())
    path = next(path for path, m in whole.named_modules() if isinstance(m, NF4Linear))
    apply_lora_to_model(whole, 2, target_modules=[path.rpartition(".")[2]], layers_to_transform=[1])
    with pytest.raises(ValueError, match=f"'{path}' is in 4 bits and cannot be trained whole"):
        save_modules(whole, [path])


@pytest.mark.parametrize("auto", ["AutoModelForTokenClassification", "AutoModelForQuestionAnswering"])
def test_other_heads(auto):
    model = apply_lora_to_model(model_of("bert", getattr(transformers, auto)), 2, target_modules="all-linear")
    assert any(isinstance(m, ModuleToSave) for m in model.modules())
    assert not any(isinstance(m, LoRALinear) and "bert" not in path for path, m in model.named_modules())


def test_a_language_model_s_head_is_not_one():
    model = apply_lora_to_model(model_of("llama"), 2, target_modules="all-linear")
    assert not any(isinstance(m, ModuleToSave) for m in model.modules())


def test_all_linear_says_what_it_leaves_out():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(nn.Linear(4, 4), Scaled(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"leaves out 2 modules with 71\.4% .* 1 \(Scaled\), 2 \(MultiheadAttention\)"):
        apply_lora_to_model(model, 2, target_modules="all-linear")
    assert [path for path, _ in lora_layers(model)] == ["0", "3"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora_to_model(nn.Sequential(nn.Linear(4, 4)), 2, target_modules="all-linear")


# Wrappers in paths


def compiled(model):
    model.body = torch.compile(model.body, backend="eager")
    return model


def compiled_layer(model):
    model.mid = torch.compile(model.mid, backend="eager")
    return model


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.body = checkpoint_wrapper(model.body)
    return model


def parallel_block(model):
    model.body = nn.DataParallel(model.body)
    return model


WRAPS = {"DataParallel block": parallel_block, "none": lambda m: m,
         "compiled block": compiled, "compiled layer": compiled_layer, "checkpoint": checkpointed,
         "compiled model": lambda m: torch.compile(m, backend="eager"), "DataParallel": nn.DataParallel,
         "both": lambda m: torch.compile(checkpointed(m), backend="eager")}  # fmt: skip


def bare():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model.mid, model.out = nn.Linear(8, 8), nn.Linear(8, 4)
    return model.double()  # so that merging loses nothing that shows


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("first", [True, False], ids=["adapter first", "wrapper first"])
def test_files_name_the_bare_model_s_layers(wrap, first, tmp_path):
    model, targets = bare(), ["body.0", "body.2", "mid"]
    if first:
        apply_lora_to_model(model, 2, target_modules=targets)
    model = WRAPS[wrap](model)
    if not first:
        apply_lora_to_model(model, 2, target_modules=targets)
    assert [path for path, _ in lora_layers(model)] == targets
    save_modules(model, ["out"])
    shake(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    want = model(x)
    with disable_lora(model):
        assert not torch.allclose(model(x), want)
    save_adapter(model, tmp_path / "a")
    keys = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "a" / "adapter_model.safetensors")}
    assert keys == {f"{path}.lora_{part}.weight" for path in targets for part in "AB"} | {"out.weight", "out.bias"}
    for other in (bare(), WRAPS[wrap](bare())):
        report = load_adapter(other, tmp_path / "a")
        assert report.layers == targets and report.modules == ["out"]
        torch.testing.assert_close(other(x), want)
        load_adapter(other, tmp_path / "a", "second")
        delete_adapter(other, "default")
        torch.testing.assert_close(merge_and_unload(other)(x), want)
        assert not any(isinstance(m, (LoRALinear, ModuleToSave)) for m in other.modules())


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()  # reducers before the group
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["fsdp", "fully_shard", "ddp"])
def test_sharded_models(kind, one_rank, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = apply_lora_to_model(bare(), 2, target_modules=["body.0", "mid"])
    shake(model)
    want = {name: layer.lora_A.detach().clone() for name, layer in lora_layers(model)}
    if kind == "fsdp":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model)
    save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, A in want.items():
        assert torch.equal(saved[f"base_model.model.{name}.lora_A.weight"], A)
    load_adapter(bare(), tmp_path)
    if kind == "fully_shard":
        with pytest.raises(ValueError, match="is sharded; load the adapter before fully_shard"):
            load_adapter(model, tmp_path)


def test_a_shard_is_not_taken_for_the_whole(tmp_path):
    model = apply_lora_to_model(bare(), 2, target_modules=["mid"])
    model.mid.lora_A = nn.Parameter(torch.ones(5))  # what FullyShardedDataParallel leaves on a rank
    with pytest.raises(ValueError, match=r"mid holds a shard .*summon_full_params"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


# transformers' own ways of saving


def adapt(model, way, tmp_path):
    if way == "applied":
        return apply_lora_to_model(model, 2)
    if way == "merged":
        from handtuned.nn import merge_lora

        return merge_lora(apply_lora_to_model(model, 2))
    save_adapter(apply_lora_to_model(copy.deepcopy(model), 2), tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    return model


@pytest.mark.parametrize("way", ["applied", "merged", "loaded"])
def test_save_pretrained_of_an_adapted_model_is_refused(way, tmp_path):
    model = adapt(model_of("llama"), way, tmp_path)
    outer = nn.ModuleDict({"model": model})
    for saved in (model, model.model, outer["model"], copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"save_adapter.*merge_and_unload"):
            saved.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    with torch.no_grad():
        want = model(TOKENS).logits
    plain = merge_and_unload(model)
    plain.save_pretrained(tmp_path / "whole")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(again(TOKENS).logits, want)


def test_removing_the_last_adapter_allows_it_again(tmp_path):
    model = apply_lora_to_model(model_of("llama"), 2)
    delete_adapter(model, "default")
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) <= set(model_of("llama").state_dict())


def test_a_trainer_s_checkpoint_is_refused(tmp_path):
    model = apply_lora_to_model(model_of("llama"), 2)
    data = [{"input_ids": torch.arange(5, 13), "labels": torch.arange(5, 13)} for _ in range(4)]

    def train(**options):
        settings = {"per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        arguments = transformers.TrainingArguments(str(tmp_path), max_steps=2, **settings, **options)
        transformers.Trainer(model, arguments, train_dataset=data).train()

    with pytest.raises(ValueError, match="save_strategy='no'"):
        train(save_steps=1)
    before = copy.deepcopy(model.state_dict())
    train(save_strategy="no")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
