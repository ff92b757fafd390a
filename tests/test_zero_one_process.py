"""What one process can tell of ZeRO: it equals the optimizer alone."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from handtuned.nn import apply_lora_to_model, mark_only_lora_as_trainable
from handtuned.optim import AdamW, ZeroOptimizer, cosine_with_warmup
from torch import nn


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4)).to(dtype)


def loss_of(model, step=0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 6, generator=generator)
    return F.cross_entropy(model(x), torch.randint(4, (5,), generator=generator))


def train(model, optimizer, steps, scheduler=None):
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()


def assert_equal(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(6, 6) for name in ("q_proj", "v_proj")}) for _ in range(2)
        )
        for layer in self.layers:
            layer.forward = lambda x, layer=layer: x + torch.tanh(layer["q_proj"](x)) * layer["v_proj"](x)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("stage", [1, 2, 3])
class TestOneProcess:
    """Without a process group: a world of one, by the same code."""

    def test_equals_the_optimizer_alone_with_groups_and_a_schedule(self, stage):
        models = network(), network()
        optimizers = [
            make([
                {"params": models[i][0].parameters(), "lr": 0.05},
                {"params": [*models[i][2].parameters(), *models[i][3].parameters()], "weight_decay": 0.3},
            ])
            for i, make in enumerate((
                lambda groups: ZeroOptimizer(groups, torch.optim.AdamW, stage=stage, lr=0.01),
                lambda groups: torch.optim.AdamW(groups, lr=0.01),
            ))
        ]  # fmt: skip
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, range(6), cosine_with_warmup(optimizer, 6, 0.3))
        zero, alone = optimizers
        assert zero.state_dict()["param_groups"] == alone.state_dict()["param_groups"]
        with zero.gathered():
            assert_equal(*models)

    def test_the_state_dict_is_a_copy_that_the_optimizer_alone_can_load(self, stage):
        model = network()
        zero = ZeroOptimizer(model.parameters(), torch.optim.AdamW, stage=stage)
        train(model, zero, range(2))
        saved = zero.state_dict()
        train(model, zero, range(2, 4))
        assert saved["state"][0]["step"] == 2
        alone = torch.optim.AdamW(network().parameters())
        alone.load_state_dict(saved)
        assert torch.equal(alone.state_dict()["state"][1]["exp_avg"], saved["state"][1]["exp_avg"])

    def test_named_parameters_and_a_module_are_taken(self, stage):
        for make in (lambda model: model, lambda model: model.named_parameters()):
            model = network()
            zero = ZeroOptimizer(make(model), torch.optim.SGD, stage=stage, lr=0.1)
            train(model, zero, range(2))
            zero.load_state_dict(zero.state_dict())
            train(model, zero, range(2))

    def test_a_closure(self, stage):
        model, other = network(), network()
        zero = ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=stage, lr=0.1)

        def closure():
            loss = loss_of(model)
            loss.backward()
            return loss

        assert zero.step(closure).item() == loss_of(other).item()
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), range(1))
        zero.close()
        assert_equal(model, other)

    def test_new_weights_are_taken_over_and_masters_that_round_to_them_stay(self, stage):
        model = network(torch.bfloat16)
        zero = ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=stage, lr=0.0)
        masters = [shard.master for shard in zero.shards]
        with torch.no_grad():
            masters[0] += 2.0**-14 * masters[0]  # bits that BF16 does not have
        kept = masters[0].clone()
        with zero.gathered(), torch.no_grad():
            model[0].weight.copy_(model[0].weight.clone())
            model[3].weight.fill_(0.5)
        model(torch.zeros(1, 6, dtype=torch.bfloat16)).sum().backward()
        zero.step()
        assert torch.equal(masters[0], kept) and (masters[4] == 0.5).all()
        zero.close()
        assert (model[3].weight == 0.5).all()

    def test_a_float64_gradient_beyond_float32_is_no_overflow(self, stage):
        weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        zero = ZeroOptimizer([weight], torch.optim.SGD, stage=stage, lr=2.0**-1000)
        with zero.gathered():
            (2.0**1000 * weight).sum().backward()
        zero.step()
        zero.close()
        assert weight.item() == 0.0

    def test_a_backward_pass_that_failed_is_forgotten(self, stage):
        model, other = network(), network()
        zero = ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=stage, lr=0.1)
        loss = loss_of(model)
        handle = model[0].weight.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        handle.remove()
        del loss
        zero.zero_grad()
        train(model, zero, range(2))
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), range(2))
        zero.close()
        assert_equal(model, other)

    def test_two_backward_passes_through_one_graph(self, stage):
        model, other = network(), network()
        zero = ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=stage, lr=0.1)
        for each in (model, other):
            loss = loss_of(each)
            loss.backward(retain_graph=True)
            loss.backward()
        zero.step()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        zero.close()
        assert_equal(model, other)

    def test_the_optimizer_can_go_and_another_take_its_place(self, stage):
        model, other = network(), network()
        first = ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=stage, lr=0.1)
        train(model, first, range(1))
        first.close()
        gone = weakref.ref(first)
        del first
        gc.collect()
        assert gone() is None
        train(model, ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=stage, lr=0.1), range(1, 3))
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), range(3))

    def test_attention_and_an_encoder_layer(self, stage):
        """They read their submodules' parameters without calling them."""

        class Encoder(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x):
                x = self.layer(x)
                return self.attention(x, x, x, need_weights=False)[0]

        model, other = Encoder(), Encoder()
        zero = ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=stage, lr=0.1)
        alone = torch.optim.SGD(other.parameters(), lr=0.1)
        x = torch.randn(2, 5, 8)
        for each, optimizer in ((model, zero), (other, alone)):
            for _ in range(2):
                each(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            assert torch.equal(model.eval()(x), other.eval()(x))
        zero.close()
        assert_equal(model, other)

    def test_lora_on_frozen_weights(self, stage):
        """LoRA layers read their base layer's weight, and those that share an input each other's."""
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            model = TwoLayers()
            apply_lora_to_model(model, rank=2)
            mark_only_lora_as_trainable(model)
            models.append(model)
        zero = ZeroOptimizer(models[0], AdamW, stage=stage, lr=0.1)
        alone = AdamW(models[1].parameters(), lr=0.1)
        x = torch.randn(3, 6)
        for _ in range(3):
            for model, optimizer in zip(models, (zero, alone), strict=True):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        trained = [p.numel() for p in models[1].parameters() if p.requires_grad]
        assert zero.bytes_held()["optimizer state"] == 8 * sum(trained) + 4 * len(trained)
        zero.close()
        assert_equal(*models)

    def test_state_that_is_not_element_wise_is_refused(self, stage):
        model = nn.Linear(6, 5)
        zero = ZeroOptimizer(model.parameters(), torch.optim.AdamW, stage=stage)
        model(torch.randn(2, 6)).sum().backward()
        zero.step()
        zero.state[zero.shards[0].master]["rows"] = torch.ones(5)  # as Adafactor's
        with pytest.raises(ValueError, match="element-wise"):
            zero.state_dict()

    def test_state_dicts_of_other_shapes_are_refused(self, stage):
        zero = ZeroOptimizer(network().parameters(), torch.optim.AdamW, stage=stage)
        other = nn.Linear(3, 4)
        alone = torch.optim.AdamW(other.parameters())
        other(torch.ones(3)).sum().backward()
        alone.step()
        saved = alone.state_dict()
        with pytest.raises(ValueError, match=r"as many parameters as the optimizer's, \[6\], got \[2\]"):
            zero.load_state_dict(saved)
        zero = ZeroOptimizer(nn.Linear(3, 5).parameters(), torch.optim.AdamW, stage=stage)
        with pytest.raises(ValueError, match="element-wise"):
            zero.load_state_dict(saved)


def test_stage_3_parameters_are_whole_only_while_used():
    model = network()
    sizes = [p.numel() for p in model.parameters()]
    zero = ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=3, lr=0.1)
    assert [p.numel() for p in model.parameters()] == [0] * 6
    with zero.gathered():
        assert [p.numel() for p in model.parameters()] == sizes
        loss_of(model).backward()  # and after it they still are
        assert [p.numel() for p in model.parameters()] == sizes
    assert [p.numel() for p in model.parameters()] == [0] * 6
    zero.close()
    assert [p.numel() for p in model.parameters()] == sizes
    loss_of(model).backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("whole_model", [False, True], ids=["parameters", "model"])
@pytest.mark.filterwarnings("ignore")
def test_stage_3_trains_a_checkpointed_llama_of_transformers(whole_model, reentrant):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2, vocab_size=60, hidden_size=16, intermediate_size=20, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train().enable_input_require_grads()
        models.append(model)
    zero = ZeroOptimizer(models[0] if whole_model else models[0].parameters(), torch.optim.AdamW, stage=3, lr=0.01)
    alone = torch.optim.AdamW(models[1].parameters(), lr=0.01)
    for step in range(3):
        ids = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, (zero, alone), strict=True):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        assert torch.equal(*(model.eval()(input_ids=ids).logits for model in models))
    assert not zero.reduction.gathering.whole
    zero.close()
    assert_equal(*models)


def test_frozen_layers_are_released_as_backward_passes_them():
    model = nn.Sequential(nn.Linear(6, 6), *(nn.Linear(6, 6).requires_grad_(False) for _ in range(6)))
    zero = ZeroOptimizer(model, torch.optim.SGD, stage=3, lr=0.1)
    counts = []
    for layer in model:
        layer.register_full_backward_hook(lambda *_: counts.append(len(zero.reduction.gathering.whole)))
    model(torch.randn(2, 6, requires_grad=True)).sum().backward()
    assert counts and max(counts) <= 4


def test_the_models_own_zero_grad_clears_stage_1():
    model, other = network(), network()
    zero = ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=1, lr=0.1)
    for step in range(3):
        loss_of(model, step).backward()
        zero.step()
        model.zero_grad()
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), range(3))
    assert_equal(model, other)


def test_dropping_the_optimizer_takes_its_hooks_away():
    model = network()
    zero = ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=2, lr=0.1)
    loss_of(model).backward()
    assert all(p.grad is None for p in model.parameters())
    del zero
    gc.collect()
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())


LEAVING = """
import os, sys
import torch, torch.distributed as dist
from handtuned.optim import AdamW, ZeroOptimizer

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
dist.all_reduce(torch.ones(3))
weight = torch.nn.Parameter(torch.ones(3))
optimizer = ZeroOptimizer([weight], AdamW, stage=2)
weight.sum().backward()
optimizer.step()
dist.destroy_process_group()
print(*(open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")), sep="\\n")
"""


def test_gloo_leaves_no_threads_behind(tmp_path):
    """They might want Python's lock while the interpreter ends, which aborts the process."""
    threads = subprocess.run(
        [sys.executable, "-c", LEAVING, tmp_path / "meeting"], capture_output=True, text=True, check=True
    ).stdout
    assert threads.split() and "gloo" not in threads
