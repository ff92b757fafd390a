"""What ZeRO holds and sends, stage 3 and offloading; run in several processes by zero_worker.py."""

import copy
import time

import torch
import torch.distributed as dist
from handtuned.amp import GradScaler
from handtuned.nn import TransformerBlock, apply_lora_to_model, mark_only_lora_as_trainable
from handtuned.nn.checkpoint import checkpoint
from handtuned.optim import AdamW, ZeroOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from zero_race import STAGES, Plain, Race, build, loss_of, overflowing, two_ranks, worst_difference

from handtuned.memory import measure
from handtuned.memory.estimate import estimate


def alive() -> int:
    """Bytes that are alive once gloo's threads, which hold the last collective's tensors a moment longer, let go."""
    counted = measure(lambda: None).before
    for _ in range(50):
        time.sleep(0.1)
        earlier, counted = counted, measure(lambda: None).before
        if counted == earlier:
            break
    return counted


def check_bytes_a_rank():
    """Everything that is alive in the process after a backward pass, against the formulas and `handtuned memory`."""
    size = dist.get_world_size()
    for dtype in (torch.bfloat16, torch.float32)[: 2 if size == 2 else 1]:
        for stage in STAGES:
            x = torch.randn(4, 33, dtype=dtype)
            before = alive()
            model = Plain().to(dtype)
            count = sum(p.numel() for p in model.parameters())
            zero = ZeroOptimizer(model.parameters(), AdamW, stage=stage)
            for _ in range(2):  # the second finds optimizer state
                zero.zero_grad()
                model(x).square().mean().backward()
                zero.step()
            zero.zero_grad()
            model(x).square().mean().backward()
            A, N = count, size
            slack = 16 * 20 * (N - 1) + 20 * 8  # shards differ by less than N elements; a counter of steps each
            formulas = {1: 4 * A + 12 * A / N, 2: 2 * A + 14 * A / N, 3: 16 * A / N}
            if dtype == torch.float32:
                formulas = {1: 8 * A + 8 * A / N, 2: 4 * A + 12 * A / N, 3: 16 * A / N}
            counted, held = alive() - before, zero.bytes_held()
            assert abs(counted - formulas[stage]) <= slack, f"{dtype} stage {stage}: {counted}, {formulas[stage]}"
            assert abs(sum(held.values()) - counted) <= 20 * 8, (held, counted)
            breakdown = estimate(count, dtype=dtype, zero=stage, world_size=size)
            assert abs(breakdown.states - counted) <= slack
            states = breakdown["optimizer state"] + breakdown["master weights"]
            for name, told in (("parameters", breakdown["weights"]), ("gradients", breakdown["gradients"]),
                               ("optimizer state", states)):  # fmt: skip
                assert abs(held[name] - told) <= slack, (stage, name, held, told)
            zero.close()
            del model, zero


def check_elements_a_step():
    """2A, 2A and 3A elements, counted where the collectives are called (sizes that N divides: no padding)."""
    for stage, factor in ((1, 2), (2, 2), (3, 3)):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
        zero = ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=stage, lr=0.1)
        zero.group.traffic.clear()
        model(torch.randn(3, 8)).square().mean().backward()
        zero.step()
        count = 5 * 72
        assert zero.group.traffic["reduce-scatter"] == count
        assert zero.group.traffic["reduce-scatter"] + zero.group.traffic["all-gather"] == factor * count
        assert zero.group.traffic["all-reduce"] <= 2 * 11  # flags
        zero.close()


def watch(model, count):
    """Notes count() after every forward of a layer and every gradient."""
    noted = []
    for module in model:
        module.register_forward_hook(lambda *_: noted.append(count()))
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda _: noted.append(count()))
    return noted


def check_full_gradients_do_not_pile_up():
    """Stages 2 and 3: at no time more than a bucket's and a layer's, or two modules'."""
    for stage in (2, 3):
        model = Plain()
        zero = ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=stage, lr=0.1)
        full = watch(model, lambda model=model: sum(p.grad.numel() for p in model.parameters() if p.grad is not None))
        model(torch.randn(4, 33)).square().mean().backward()
        assert 0 < max(full) <= 2 * 33 * 34, (stage, max(full))
        assert all(p.grad is None for p in model.parameters())
        zero.close()


def check_stage_3_whole_parameters_are_few():
    """In forward, backward, and a checkpoint's second forward: what is whole at one time."""
    for recompute in (None, reentrant_free, checkpoint):
        model = Plain()
        zero = ZeroOptimizer(model, torch.optim.SGD, stage=3, lr=0.1)
        whole = zero.reduction.gathering.whole
        counts = watch(model, lambda whole=whole: len(whole))
        y = torch.randn(4, 33, requires_grad=True)
        for pair in zip(*[iter(model)] * 2, strict=True):
            y = recompute(nn.Sequential(*pair), y) if recompute else nn.Sequential(*pair)(y)
        assert not whole
        y.square().mean().backward()
        assert 0 < max(counts) <= (6 if recompute else 4) and not whole, (recompute, max(counts))
        assert all(p.numel() == 0 for p in model.parameters())
        zero.close()
        assert sum(p.numel() for p in model.parameters()) == 10 * 33 * 34


def reentrant_free(function, *args):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def check_checkpointed_models():
    for recompute in (reentrant_free, checkpoint):
        race = Race(ours={"recompute": recompute})
        for step in range(3):
            race.backward(step, two_ranks(1e-5))
            race.step()
        race.finish(two_ranks(1e-5))


class Layers(nn.Module):
    def __init__(self, recompute=None):
        super().__init__()
        self.layers = nn.ModuleList(TransformerBlock(8, 2, 12) for _ in range(3))
        self.recompute = recompute or (lambda layer, x: layer(x))

    def forward(self, x):
        for layer in self.layers:
            x = self.recompute(layer, x)
        return x


def check_stage_3_takes_layers_as_a_whole():
    """Given the model: LoRA layers read each other's weights; a layer is gathered twice and reduced once."""
    for recompute in (None, checkpoint):
        ours, theirs = Layers(recompute), Layers()
        for model in (ours, theirs):
            torch.manual_seed(0)
            for param in model.parameters():
                nn.init.normal_(param, std=0.3)
            apply_lora_to_model(model, rank=2)
            mark_only_lora_as_trainable(model)
        zero = ZeroOptimizer(ours, torch.optim.SGD, stage=3, lr=0.1)
        rival = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
        wrapped = DistributedDataParallel(theirs)
        for step in range(3):
            zero.group.calls.clear()
            x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            x.requires_grad_()
            a, b = ours(x).square().mean(), wrapped(x).square().mean()
            assert a.item() == b.item()
            a.backward(), b.backward()
            zero.step(), rival.step(), zero.zero_grad(), rival.zero_grad()
            assert zero.group.calls["all-gather"] == 6 and zero.group.calls["reduce-scatter"] == 3
        zero.close()
        assert worst_difference(ours, theirs) == 0


def check_parameters_begin_as_rank_0s():
    torch.manual_seed(0)
    expected = Plain()
    for stage in STAGES:
        torch.manual_seed(dist.get_rank())
        model = Plain()
        ZeroOptimizer(model.parameters(), torch.optim.SGD, stage=stage, lr=0.1).close()
        assert worst_difference(model, expected) == 0


def check_a_rank_without_any_gradient():
    """Its loss is a constant: the others' mean still counts it."""
    x = torch.randn(4, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for stage in STAGES:
        torch.manual_seed(0)
        ours, theirs = Plain().double(), Plain().double()
        zero = ZeroOptimizer(ours.parameters(), torch.optim.SGD, stage=stage, lr=0.1)
        theirs.load_state_dict(weights(zero, ours))
        loss = ours(x).square().mean()
        if dist.get_rank() == 0:
            loss.backward()
        elif stage == 3:
            (0 * loss).backward()  # all ranks must take part in gathering
        zero.step()
        (theirs(x).square().mean() / dist.get_world_size()).backward()
        torch.optim.SGD(theirs.parameters(), lr=0.1).step()
        zero.close()
        assert worst_difference(ours, theirs) <= 1e-15


def weights(zero, model):
    with zero.gathered():
        return copy.deepcopy(model.state_dict())


def check_offload_changes_no_number():
    for stage, dtype in ((1, torch.float32), (2, torch.bfloat16), (2, torch.float32), (3, torch.bfloat16)):
        models = build(dtype), build(dtype)
        zeros = [
            ZeroOptimizer(model.parameters(), AdamW, stage=stage, offload=offload, lr=0.02)
            for model, offload in zip(models, (False, True), strict=True)
        ]
        for step in range(4):
            for model, zero in zip(models, zeros, strict=True):
                loss_of(model, step).backward()
                if step == 1:  # accumulates on the host
                    loss_of(model, 50 + step).backward()
                zero.clip_grad_norm_(0.5)
                zero.step()
                zero.zero_grad()
        for zero in zeros:
            zero.close()
        assert worst_difference(*models) == 0


def check_offload_skips_overflows():
    model = build()
    zero = ZeroOptimizer(model.parameters(), AdamW, stage=2, offload=True, lr=0.02)
    scaler = GradScaler(init_scale=8.0)
    for step in range(4):
        before = [p.clone() for p in model.parameters()]
        scaler.scale(overflowing(loss_of(model, step), step)).backward()
        scaler.step(zero)
        scaler.update()
        zero.zero_grad()
        kept = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert kept == (step == 2)
    assert scaler.get_scale() == 4.0
    zero.close()


def check_offload_bytes():
    """2A on the device and 14A/N on the host (BF16), as `handtuned memory` says."""
    size = dist.get_world_size()
    for stage in STAGES:
        model = Plain().bfloat16()
        count = sum(p.numel() for p in model.parameters())
        zero = ZeroOptimizer(model.parameters(), AdamW, stage=stage, offload=True)
        for _ in range(2):
            zero.zero_grad()
            model(torch.randn(4, 33, dtype=torch.bfloat16)).square().mean().backward()
            zero.step()
        held = zero.bytes_held()
        slack = 16 * 20 * (size - 1) + 20 * 8
        device = {1: 4 * count, 2: 2 * count, 3: 2 * count / size}[stage]
        # The rank's weights in BF16 are on the host too, 2A/N beside gradients, masters and moments.
        assert abs(held["parameters"] + held["gradients"] - device) <= slack, held
        assert held["optimizer state"] == 0 and abs(held["host"] - 16 * count / size) <= slack, held
        breakdown = estimate(count, dtype="bfloat16", zero=stage, world_size=size, offload=True)
        assert abs(breakdown.states - device) <= slack and abs(breakdown.host - 14 * count / size) <= slack, breakdown
        zero.close()
