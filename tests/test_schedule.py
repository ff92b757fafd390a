"""The schedule: transformers' values except for the first, and exact on resuming."""

import copy
import itertools
import math

import pytest
import torch
from handtuned.optim import AdamW, cosine_with_warmup, optimizer_steps
from handtuned.optim.schedule import schedule_with_warmup


def optimizer_with(*rates):
    return AdamW([{"params": [torch.ones(1, requires_grad=True)], "lr": lr} for lr in rates])


def run(optimizer, schedule, updates):
    """The learning rates of the first group, as each update uses them."""
    rates = []
    for _ in range(updates):
        assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def rates_of(total, updates=None, lr=0.1, **kwargs):
    optimizer = optimizer_with(lr)
    return run(optimizer, cosine_with_warmup(optimizer, total, **kwargs), updates or total)


@pytest.mark.parametrize("total", [1, 2, 10, 63, 1000])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("min_lr", [0.0, 0.02])
def test_equal_to_transformers_but_for_the_first_update(total, ratio, min_lr):
    transformers = pytest.importorskip("transformers")
    optimizer = optimizer_with(0.1)
    theirs = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, math.ceil(ratio * total), total, min_lr_rate=min_lr / 0.1
    )
    theirs = run(optimizer, theirs, total)
    ours = rates_of(total, warmup_ratio=ratio, min_lr=min_lr)
    assert ours[1:] == pytest.approx(theirs[1:], rel=1e-12, abs=1e-18)
    if ratio > 0:
        assert theirs[0] == 0 and ours[0] > 0


@pytest.mark.parametrize("total", [1, 2, 63])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("decay, theirs", [("linear", "linear"), ("constant", "constant_with_warmup")])
def test_the_other_decays_are_transformers_but_for_the_first_update(total, ratio, decay, theirs):
    transformers = pytest.importorskip("transformers")
    optimizers = optimizer_with(0.1), optimizer_with(0.1)
    theirs = transformers.get_scheduler(theirs, optimizers[1], math.ceil(ratio * total), total)
    ours = run(optimizers[0], schedule_with_warmup(optimizers[0], decay, total, ratio), total + 3)
    assert ours[1:] == pytest.approx(run(optimizers[1], theirs, total + 3)[1:], rel=1e-12, abs=1e-18)
    assert ours[0] > 0


def test_the_line_ends_at_the_floor():
    optimizer = optimizer_with(0.1)
    rates = run(optimizer, schedule_with_warmup(optimizer, "linear", 10, 0.0, min_lr=0.02), 12)
    assert rates == pytest.approx([*(0.1 - 0.008 * k for k in range(10)), 0.02, 0.02])


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.1, 1.0])
def test_the_first_update_moves_the_weights(ratio):
    optimizer = optimizer_with(0.1)
    cosine_with_warmup(optimizer, 100, ratio)
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.ones(1)
    optimizer.step()
    assert param.item() != 1.0


def test_shape():
    """Up in a straight line, down half a cosine, and then it stays."""
    rates = rates_of(100, updates=130, warmup_ratio=0.1, min_lr=0.01)
    assert rates[:11] == pytest.approx([0.005, *(0.01 * k for k in range(1, 11))])
    assert rates[55] == pytest.approx((0.1 + 0.01) / 2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[100:] == [pytest.approx(0.01)] * 30


@pytest.mark.parametrize("stop", [0, 1, 5, 37, 99])
def test_resuming_is_exact(stop):
    """State dicts of optimizer and schedule, loaded into new objects, in either order."""
    whole = rates_of(100)
    for schedule_first in (False, True):
        optimizer = optimizer_with(0.1)
        schedule = cosine_with_warmup(optimizer, 100)
        begun = run(optimizer, schedule, stop)
        saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
        optimizer = optimizer_with(0.1)
        schedule = cosine_with_warmup(optimizer, 100)
        loads = [lambda: optimizer.load_state_dict(saved[0]), lambda: schedule.load_state_dict(saved[1])]  # noqa: B023
        for load in reversed(loads) if schedule_first else loads:
            load()
        assert begun + run(optimizer, schedule, 100 - stop) == whole


def test_the_state_holds_the_schedule_itself():
    """Loaded into a schedule made with other numbers, the saved numbers win; the optimizer's state is not needed."""
    optimizer = optimizer_with(0.1)
    schedule = cosine_with_warmup(optimizer, 100)
    run(optimizer, schedule, 5)
    second = optimizer_with(0.1)
    other = cosine_with_warmup(second, 7, warmup_ratio=0.9)
    other.load_state_dict(schedule.state_dict())
    assert run(second, other, 95) == run(optimizer, schedule, 95)


def test_groups_keep_their_own_peak():
    optimizer = optimizer_with(0.1, 0.01, 0.0)
    with pytest.raises(ValueError, match="min_lr"):
        cosine_with_warmup(optimizer, 10, min_lr=0.001)
    optimizer = optimizer_with(0.1, 0.01)
    schedule = cosine_with_warmup(optimizer, 10, warmup_ratio=0.2, min_lr=0.001)
    for _ in range(2):
        optimizer.step(), schedule.step()
    assert schedule.get_last_lr() == [0.1, 0.01]
    for _ in range(8):
        optimizer.step(), schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.001, 0.001])


@pytest.mark.parametrize(
    ("arguments", "updates"),
    [
        ({"examples": 100, "batch_size": 10}, 10),
        ({"examples": 101, "batch_size": 10}, 11),
        ({"examples": 100, "batch_size": 4, "accumulation_steps": 8}, 4),
        ({"examples": 100, "batch_size": 4, "accumulation_steps": 8, "world_size": 2}, 2),
        ({"examples": 100, "batch_size": 4, "accumulation_steps": 8, "world_size": 3, "epochs": 5}, 10),
        ({"examples": 1, "batch_size": 8}, 1),
    ],
    ids=str,
)
def test_optimizer_steps_counts_accumulation_and_world_size(arguments, updates):
    assert optimizer_steps(**arguments) == updates


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"total_steps": 0}, ValueError, "total_steps"),
        ({"total_steps": 10.0}, TypeError, "total_steps"),
        ({"total_steps": 10, "warmup_ratio": 1.1}, ValueError, "warmup_ratio"),
        ({"total_steps": 10, "warmup_ratio": -0.1}, ValueError, "warmup_ratio"),
        ({"total_steps": 10, "min_lr": -1.0}, ValueError, "min_lr"),
        ({"total_steps": 10, "min_lr": 0.2}, ValueError, "min_lr"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, name):
    with pytest.raises(error, match=name):
        cosine_with_warmup(optimizer_with(0.1), **arguments)


def test_bad_counts_and_decays_are_named():
    with pytest.raises(ValueError, match="decay must be one of cosine, linear, constant, got 'polynomial'"):
        schedule_with_warmup(optimizer_with(0.1), "polynomial", 10)
    with pytest.raises(ValueError, match="batch_size"):
        optimizer_steps(10, 0)
