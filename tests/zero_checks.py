"""ZeRO's numbers beside DistributedDataParallel's; run in several processes by zero_worker.py."""

import contextlib
import copy
import itertools
from pathlib import Path

import torch
import torch.distributed as dist
from handtuned.amp import GradScaler, MasterWeights
from handtuned.optim import AdamW, AdamW8bit, ZeroOptimizer
from handtuned.optim.zero import zero_reference
from zero_race import STAGES, Race, build, loss_of, overflowing, two_ranks, worst_difference


def check_50_steps_bit_equal():
    race = Race()
    for step in range(50):
        race.backward(step)
        race.step()
    race.finish()
    for optimizer, options in ((AdamW, {"fused": False}), (torch.optim.SGD, {"momentum": 0.9})):
        race = Race(optimizer, **options)
        for step in range(3):
            race.backward(step)
            race.step()
        race.finish()


def check_50_steps_to_rounding(steps=50):
    """In FP64: sums in another order. AdamW divides by √v + ε, so a rounding of a gradient that is zero but for
    roundings could grow to lr; with none such here, 1e-9 leaves room for a gain of 1e5 and finds any error of logic."""
    race = Race(dtype=torch.float64)
    for step in range(steps):
        race.backward(step, tolerance=1e-9)
        race.step()
    race.finish(tolerance=1e-9)


def check_5_steps_to_rounding():
    check_50_steps_to_rounding(5)


def check_equals_the_reference():
    """One weight that two ranks cut in halves, each rank with its own batch: the same bits as on plain lists."""

    def loss_on(x):
        return lambda weight: (x @ weight.view(6, 4)).square().mean()

    inputs = [torch.randn(5, 6, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    start = torch.randn(24, generator=torch.Generator().manual_seed(9))
    for stage in STAGES:
        expected = zero_reference(
            start, [loss_on(x) for x in inputs], lambda shards: torch.optim.AdamW(shards, lr=0.1), stage, steps=5
        )
        layer = torch.nn.Linear(24, 1, bias=False)
        with torch.no_grad():
            layer.weight.copy_(start)
        layer.forward = lambda x, layer=layer: loss_on(x)(layer.weight)
        zero = ZeroOptimizer(layer.parameters(), torch.optim.AdamW, stage=stage, lr=0.1)
        for _ in range(5):
            layer(inputs[dist.get_rank()]).backward()
            zero.step()
            zero.zero_grad()
        zero.close()
        assert torch.equal(layer.weight.flatten(), expected)


def check_the_same_batch_equals_one_process():
    """With equal gradients on 2ᵏ ranks every order of summation is exact."""
    alone = build()
    single = torch.optim.AdamW(alone.parameters(), lr=0.02)
    race = Race()
    for step in range(5):
        expected = loss_of(alone, step, same=True)
        expected.backward()
        for model in race.models:
            loss = loss_of(model, step, same=True)
            assert loss.item() == expected.item()
            loss.backward()
        race.step()
        single.step()
        single.zero_grad()
    race.theirs = alone
    race.finish()


def check_bf16_with_masters_bit_equal():
    race = Race(dtype=torch.bfloat16)
    masters = MasterWeights(race.theirs, race.rival)
    for step in range(5):
        race.backward(step)
        masters.collect_gradients()
        race.step()
        masters.write_back()
    expected = [master for master in masters.masters.values() if master in race.rival.state]
    for zero in race.zeros:
        kept = [entry["master"] for entry in zero.state_dict()["state"].values()]
        assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
    race.finish()


def check_accumulation():
    """Under no_sync as DDP's, bit for bit; without it the same to rounding. A tail under no_sync is not lost."""
    for quiet in (True, False):
        race = Race(torch.optim.SGD, torch.float64, lr=0.1, momentum=0.9)
        tolerance = two_ranks(1e-13) if quiet else 1e-13

        def silence(last, race=race, quiet=quiet):
            stack = contextlib.ExitStack()
            if quiet and not last:
                for each in (race.wrapped, *race.zeros):
                    stack.enter_context(each.no_sync())
            return stack

        for step in range(2):
            for micro in range(3):
                with silence(micro == 2):
                    race.backward(10 * step + micro, tolerance)
            race.step(set_to_none=step % 2 == 0)
        with contextlib.ExitStack() as stack:
            for zero in race.zeros:
                stack.enter_context(zero.no_sync())
            race.backward(99, tolerance)
        race.step()
        race.finish(tolerance)


def check_clipping():
    for norm_type in (2.0, torch.inf):
        race = Race(torch.optim.SGD, torch.float64, lr=0.5)
        for step in range(2):
            race.backward(step, 1e-13)
            limit = 0.1 if step else 100.0
            expected = torch.nn.utils.clip_grad_norm_(race.theirs.parameters(), limit, norm_type)
            for zero in race.zeros:
                assert abs(zero.clip_grad_norm_(limit, norm_type) - expected) <= 1e-13 * expected
            race.step()
        race.backward(2, 1e-13)
        torch.nn.utils.clip_grad_norm_(race.theirs.parameters(), 0.05)
        race.rival.step()
        for zero in race.zeros:
            zero.step(max_norm=0.05)
        race.finish(1e-13)


def check_clipping_where_a_rank_owns_nothing():
    """Every rank adds its part of the norm in one dtype, also the one that has no element and so no gradient."""
    for stage in STAGES:
        weights = [torch.nn.Parameter(torch.ones(1, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16)]
        zero = ZeroOptimizer(weights, torch.optim.SGD, stage=stage, lr=0.0)
        with zero.gathered():
            sum(3.0 * weight.double().sum() for weight in weights).backward()
        assert abs(zero.clip_grad_norm_(1.0) - 18**0.5) <= 1e-15 * 18
        zero.close()


def check_scalers_skip_together():
    overflow_on_one_rank([GradScaler(init_scale=1024.0, growth_interval=3) for _ in range(4)])
    overflow_on_one_rank([torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in range(4)])


def overflow_on_one_rank(scalers):
    race = Race()
    for step in range(6):
        race.backward(step, two_ranks(1e-5), lambda loss, who, step=step: scalers[who].scale(overflowing(loss, step)))
        before = [p.clone() for p in (*race.theirs.parameters(), *race.models[0].parameters())]
        for scaler, optimizer in zip(scalers, (*race.zeros, race.rival), strict=True):
            if step % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert scaler.get_scale() == (1024, 1024, 512, 512, 512, 1024)[step]
        after = (*race.theirs.parameters(), *race.models[0].parameters())
        assert all(torch.equal(p, q) for p, q in zip(after, before, strict=True)) == (step == 2)
    race.finish(two_ranks(1e-5))


def check_an_overflow_of_few_elements_is_seen_by_all():
    """A sum of two passes that overflows where each does not, and a tensor of which the last rank owns nothing."""
    for stage, gradient in itertools.product(STAGES, ([40000.0, 1.0], [40000.0])):
        weight = torch.nn.Parameter(torch.zeros(len(gradient), dtype=torch.float16))
        zero = ZeroOptimizer([weight], torch.optim.SGD, stage=stage, lr=1.0)
        scaler = GradScaler(init_scale=1.0)
        for step in range(2):
            for _ in range(1 + (step == 0)):
                with zero.gathered():
                    scaler.scale((weight * torch.tensor(gradient)).sum()).backward()
            scaler.step(zero)
            scaler.update()
            zero.zero_grad()
            assert scaler.get_scale() == 0.5
        with zero.gathered():
            assert weight.tolist() == [-value for value in gradient]
            (weight * torch.inf).sum().backward()
        zero.step()  # without a scaler all ranks do it
        zero.close()
        assert not weight.isfinite().any()


def check_fp16_parameters_with_a_scaler():
    """The step unscales in FP32 and skips; the scale is found that keeps FP16 gradients finite."""
    race = Race(dtype=torch.float16)
    masters = MasterWeights(race.theirs, race.rival)
    scalers = [GradScaler(init_scale=2.0**18, growth_interval=4) for _ in (*STAGES, "DDP")]
    for step in range(9):
        race.backward(step, two_ranks(0.1), lambda loss, who: scalers[who].scale(loss))
        masters.collect_gradients()
        for scaler, optimizer in zip(scalers, (*race.zeros, race.rival), strict=True):
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        masters.write_back()
        assert len({scaler.get_scale() for scaler in scalers}) == 1
    assert scalers[0].get_scale() < 2.0**18
    race.finish(two_ranks(0.1))


def check_state_dict_is_the_whole_optimizers():
    race = Race()
    for step in range(3):
        race.backward(step)
        race.step()
    whole = race.rival.state_dict()
    for zero in race.zeros:
        mine = zero.state_dict()
        assert mine["param_groups"] == whole["param_groups"] and mine["state"].keys() == whole["state"].keys()
        for index, entry in whole["state"].items():
            assert entry.keys() == mine["state"][index].keys()
            for key, value in entry.items():
                assert torch.equal(mine["state"][index][key], value), (index, key)
        zero.load_state_dict(whole)  # and goes on from the other's
    for step in range(3, 5):
        race.backward(step)
        race.step()
    race.finish()


def check_8_bit_blocks_are_as_alone():
    """Tensors below and at the size from which moments are encoded, the last block not whole: with equal gradients the
    bits of `AdamW8bit` alone, whose state passes both ways. (Cuts are at multiples of 16 elements: torch's fused AdamW
    rounds the last few of a tensor, which are not a whole vector, in another way.)"""
    for stage in STAGES:
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            layers = (torch.nn.Linear(*size) for size in ((64, 63), (63, 64), (64, 127), (127, 64)))
            models.append(torch.nn.Sequential(*layers))
        zero = ZeroOptimizer(models[0].parameters(), AdamW8bit, stage=stage, min_elements=127 * 64, lr=0.1)
        alone = AdamW8bit(models[1].parameters(), min_elements=127 * 64, lr=0.1)
        for _ in range(2):
            for step in range(2):
                x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
                for model, optimizer in zip(models, (zero, alone), strict=True):
                    model(x).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
            mine, whole = zero.state_dict(), alone.state_dict()
            for index, entry in whole["state"].items():
                assert entry.keys() == mine["state"][index].keys()
                assert all(torch.equal(value, mine["state"][index][key]) for key, value in entry.items()), index
            zero.load_state_dict(whole)
            alone.load_state_dict(mine)
        assert sorted(len(entry) for entry in whole["state"].values()) == [3] * 6 + [5] * 2
        zero.close()
        assert worst_difference(*models) == 0


def steps_on_the_same_batch(zero, model, steps):
    for step in steps:
        loss_of(model, step, same=True).backward()
        zero.step()
        zero.zero_grad()


def check_save_for_another_world_size():
    for stage in STAGES:
        model = build(torch.bfloat16)
        zero = ZeroOptimizer(model.parameters(), torch.optim.AdamW, stage=stage, lr=0.02)
        steps_on_the_same_batch(zero, model, range(3))
        saved = {"optimizer": zero.state_dict()}
        with zero.gathered():
            saved["model"] = copy.deepcopy(model.state_dict())
        steps_on_the_same_batch(zero, model, range(3, 6))
        with zero.gathered():
            saved["later"] = copy.deepcopy(model.state_dict())
        if dist.get_rank() == 0:
            torch.save(saved, Path.cwd() / f"stage{stage}.pt")
        zero.close()


def check_load_from_another_world_size():
    """Any stage's file by any stage, in this world size: the same weights as those who had saved it."""
    for saved_stage, stage in ((1, 3), (2, 1), (3, 2)):
        saved = torch.load(Path.cwd() / f"stage{saved_stage}.pt")
        for weights_first in (True, False):
            model = build(torch.bfloat16)
            zero = ZeroOptimizer(model.parameters(), torch.optim.AdamW, stage=stage, lr=0.5)
            if not weights_first:
                zero.load_state_dict(saved["optimizer"])
            with zero.gathered():
                model.load_state_dict(saved["model"])
            if weights_first:
                zero.load_state_dict(saved["optimizer"])
            assert zero.param_groups[0]["lr"] == 0.02
            steps_on_the_same_batch(zero, model, range(3, 6))
            with zero.gathered():
                for name, value in model.state_dict().items():
                    assert torch.equal(value, saved["later"][name]), (saved_stage, stage, weights_first, name)
            zero.close()
