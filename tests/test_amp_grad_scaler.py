"""GradScaler: the same traces, errors and state as torch.amp.GradScaler."""

import copy
import math
import pickle

import pytest
import torch
from handtuned.amp import GradScaler
from handtuned.amp.grad_scaler import GradScalerReference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INF, NAN = float("inf"), float("nan")


def pair(**kwargs):
    return GradScaler(**kwargs), torch.amp.GradScaler("cpu", **kwargs)


def iteration(scaler, optimizers, gradients, unscale):
    """One training step; `gradients` has a value (or None) for each optimizer's only parameter."""
    scaler.scale(torch.tensor(1.0))
    for optimizer, gradient, first in zip(optimizers, gradients, unscale, strict=True):
        param = optimizer.param_groups[0]["params"][0]
        param.grad = None if gradient is None else torch.full_like(param, gradient)
        if first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
    scaler.update()


def outcome(call, *args):
    """The class of the error that a call raises, None if it passes."""
    try:
        call(*args)
    except Exception as error:
        return type(error)
    return None


GRADIENT = st.sampled_from([1.0, -3.5, 1e30, INF, -INF, NAN, None])
STEPS = st.lists(
    st.tuples(st.lists(GRADIENT, min_size=2, max_size=2), st.lists(st.booleans(), min_size=2, max_size=2)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=STEPS,
    init_scale=st.sampled_from([1.0, 65536.0, 3.0, 1e-30, 2.0**127, 1e38]),
    growth_factor=st.sampled_from([2.0, 1.1, 1e10]),
    backoff_factor=st.sampled_from([0.5, 0.3, 1e-6]),
    growth_interval=st.integers(1, 4),
)
def test_1000_random_runs_equal_torchs(steps, init_scale, growth_factor, backoff_factor, growth_interval):
    """Two optimizers; gradients finite, infinite, NaN or missing; unscaled by hand or not. Bit for bit, errors too."""
    scalers = pair(
        init_scale=init_scale,
        growth_factor=growth_factor,
        backoff_factor=backoff_factor,
        growth_interval=growth_interval,
    )
    optimizers = [[torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0) for _ in range(2)] for _ in scalers]
    for gradients, unscale in steps:
        errors = [
            outcome(iteration, scaler, own, gradients, unscale)
            for scaler, own in zip(scalers, optimizers, strict=True)
        ]
        assert errors[0] is errors[1]
        assert scalers[0].state_dict() == scalers[1].state_dict()
        for a, b in zip(*optimizers, strict=True):
            torch.testing.assert_close(
                a.param_groups[0]["params"][0], b.param_groups[0]["params"][0], rtol=0, atol=0, equal_nan=True
            )
        if errors[0]:
            break


CALLS = ["scale", "unscale", "step", "update"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 1)), max_size=10), enabled=st.booleans())
def test_calls_in_any_order_raise_what_torch_raises(calls, enabled):
    scalers = pair(enabled=enabled)
    optimizers = [[torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1) for _ in range(2)] for _ in scalers]
    for own in optimizers:
        for optimizer in own:
            optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    for name, which in calls:
        errors = []
        for scaler, own in zip(scalers, optimizers, strict=True):
            call = {
                "scale": lambda s=scaler: s.scale(torch.ones(1)),
                "unscale": lambda s=scaler, o=own[which]: s.unscale_(o),
                "step": lambda s=scaler, o=own[which]: s.step(o),
                "update": lambda s=scaler: s.update(),
            }[name]
            errors.append(outcome(call))
        assert errors[0] is errors[1], name


def test_growth_counts_steps_in_a_row():
    """Three good steps and an overflow, again and again, never grow a scale with interval 4.

    The study documents' scaler (001) counts all good steps and never starts over: it grows to 0.031,
    where the rule for steps in a row ends at 9.5e-7.
    """
    scaler = GradScaler(init_scale=1.0, growth_interval=4)
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.0)
    theirs, good = 1.0, 0
    for value in [1.0, 1.0, 1.0, INF] * 20:
        iteration(scaler, [optimizer], [value], [False])
        if math.isinf(value):
            theirs *= 0.5
        else:
            good += 1
            theirs *= 2.0 if good % 4 == 0 else 1.0
    assert scaler.get_scale() == 2.0**-20
    assert theirs == 2.0**-5


@given(values=st.lists(st.sampled_from([1.0, -3.5, INF, NAN]), max_size=20), interval=st.integers(1, 4))
def test_equals_the_reference(values, interval):
    kwargs = {"init_scale": 1024.0, "growth_interval": interval}
    ours, reference = GradScaler(**kwargs), GradScalerReference(**kwargs)
    for value in values:
        a, b = optimizer_with(None), optimizer_with(value)
        iteration(ours, [a], [value], [False])
        assert reference.step(b) == math.isfinite(value)
        assert torch.equal(a.param_groups[0]["params"][0], b.param_groups[0]["params"][0])
        assert (reference.scale, reference.good_steps) == (ours.get_scale(), ours.state_dict()["_growth_tracker"])


def test_scale_of_tensors_lists_and_tuples():
    scaler = GradScaler(init_scale=4.0)
    assert scaler.scale(torch.tensor(2.0)).item() == 8.0
    one, (two, three) = scaler.scale([torch.tensor(1.0), (torch.tensor(2.0), torch.tensor(3.0))])
    assert (one.item(), two.item(), three.item()) == (4.0, 8.0, 12.0)
    assert [t.item() for t in scaler.scale(iter([torch.tensor(1.0)]))] == [4.0]
    assert type(scaler.scale([torch.ones(1)])) is list
    assert scaler.scale(torch.ones(1, dtype=torch.float16)).dtype == torch.float16
    with pytest.raises(ValueError, match="Tensor or an iterable"):
        scaler.scale(3)


def test_a_loss_in_half_precision_is_scaled_as_torch_does():
    for ours, theirs in zip(*(s.scale([torch.tensor(1.0, dtype=torch.float16)]) for s in pair()), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def optimizer_with(gradient, dtype=torch.float32):
    param = torch.ones(2, dtype=dtype, requires_grad=True)
    if gradient is not None:
        param.grad = torch.full_like(param, gradient)
    return torch.optim.SGD([param], lr=0.1)


@pytest.mark.parametrize("scaler", pair(), ids=["ours", "torch"])
def test_errors_say_what_went_wrong(scaler):
    """The same messages from both, so that a search for them finds the right threads."""
    optimizer, idle, half = optimizer_with(1.0), optimizer_with(None), optimizer_with(1.0, torch.float16)
    for call in (lambda: scaler.unscale_(optimizer), lambda: scaler.step(optimizer), lambda: scaler.update()):
        with pytest.raises(AssertionError, match=r"_scale is None.*scaler\.scale\(loss or outputs\)"):
            call()
    scaler.scale(torch.ones(1))
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scaler.update()
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        scaler.step(idle)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(half)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_\\(\\) has already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="being called after step"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(optimizer)


def test_a_new_optimizer_is_not_taken_for_one_that_is_gone():
    """torch's scaler goes by id(optimizer), which Python gives again as soon as the old one is collected."""
    scaler = GradScaler()
    scaler.scale(torch.ones(1))
    for _ in range(20):
        scaler.unscale_(optimizer_with(1.0))


@pytest.mark.parametrize("make", [GradScaler, lambda **k: torch.amp.GradScaler("cpu", **k)], ids=["ours", "torch"])
def test_impossible_factors_are_refused(make):
    with pytest.raises(AssertionError, match="growth"):
        make(growth_factor=1.0)
    with pytest.raises(AssertionError, match="backoff"):
        make(backoff_factor=1.0)
    make(growth_factor=0.5, backoff_factor=2.0, enabled=False)


def test_bf16_gradients_need_no_scale_but_may_have_one():
    scaler, optimizer = GradScaler(init_scale=4.0), optimizer_with(8.0, torch.bfloat16)
    scaler.scale(torch.ones(1))
    scaler.unscale_(optimizer)
    assert optimizer.param_groups[0]["params"][0].grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("value", [3.0, INF], ids=["finite", "inf"])
def test_sparse_gradients(value):
    results = []
    for scaler in pair(init_scale=2.0):
        table = torch.nn.Embedding(5, 2, sparse=True)
        torch.nn.init.ones_(table.weight)
        optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
        scaler.scale((table(torch.tensor([1, 1, 3])) * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append((table.weight.detach(), scaler.get_scale()))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_step_passes_arguments_and_result_on():
    class Recorder(torch.optim.SGD):
        def step(self, *args, **kwargs):
            return args, kwargs

    for scaler in (GradScaler(), GradScaler(enabled=False)):
        param = torch.ones(1, requires_grad=True)
        param.grad = torch.ones(1)
        scaler.scale(torch.ones(1))
        assert scaler.step(Recorder([param], lr=0.1), 1, key=2) == ((1,), {"key": 2})


def test_state_dict_goes_both_ways():
    ours, theirs = pair(init_scale=8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=5)
    for scaler in (ours, theirs):
        for value in (1.0, INF, 1.0, 1.0):
            iteration(scaler, [optimizer_with(None)], [value], [False])
    state = ours.state_dict()
    assert state == theirs.state_dict()
    assert state == {
        "scale": 2.0,
        "growth_factor": 3.0,
        "backoff_factor": 0.25,
        "growth_interval": 5,
        "_growth_tracker": 2,
    }
    for fresh in pair():
        fresh.load_state_dict(state)
        for _ in range(3):
            iteration(fresh, [optimizer_with(None)], [1.0], [False])
        assert fresh.get_scale() == 6.0
    ours.load_state_dict(theirs.state_dict() | {"scale": 16.0, "_growth_tracker": 4})
    iteration(ours, [optimizer_with(None)], [1.0], [False])
    assert ours.get_scale() == 48.0


def test_an_empty_state_dict_is_refused():
    with pytest.raises(RuntimeError, match="empty"):
        GradScaler().load_state_dict({})


def test_disabled_scaler_does_nothing():
    scaler, optimizer = GradScaler(enabled=False), optimizer_with(INF)
    loss = torch.tensor(2.0)
    assert scaler.scale(loss) is loss
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert optimizer.param_groups[0]["params"][0].isinf().all()
    scaler.update()
    scaler.load_state_dict({"scale": 3.0})
    assert scaler.state_dict() == {} and scaler.get_scale() == 1.0 and not scaler.is_enabled()


def test_new_scale():
    scaler = GradScaler()
    scaler.scale(torch.ones(1))
    scaler.update(new_scale=128.0)
    assert scaler.get_scale() == 128.0
    new = torch.tensor([4.0])
    scaler.update(new_scale=new)
    new.fill_(1.0)
    assert scaler.get_scale() == 4.0
    for bad in (torch.ones(2), torch.ones(1, requires_grad=True)):
        with pytest.raises(AssertionError, match="new_scale"):
            scaler.update(new_scale=bad)


def test_setters_take_effect():
    scaler = GradScaler(init_scale=1.0)
    scaler.set_growth_factor(8.0)
    scaler.set_backoff_factor(0.125)
    scaler.set_growth_interval(1)
    iteration(scaler, [optimizer_with(None)], [1.0], [False])
    assert scaler.get_scale() == 8.0
    iteration(scaler, [optimizer_with(None)], [INF], [False])
    assert scaler.get_scale() == 1.0
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()) == (8.0, 0.125, 1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
def test_copies_between_iterations_only(duplicate):
    scaler = GradScaler(init_scale=8.0, growth_interval=2)
    optimizer = optimizer_with(1.0)
    iteration(scaler, [optimizer], [1.0], [False])
    twin = duplicate(scaler)
    iteration(twin, [optimizer], [1.0], [False])
    assert (twin.get_scale(), scaler.get_scale()) == (16.0, 8.0)
    scaler.unscale_(optimizer)
    with pytest.raises(AssertionError, match="only be pickled"):
        duplicate(scaler)


def test_one_launch_for_all_gradients(monkeypatch):
    """Unscaling costs one call of the multi-tensor kernel for each dtype, not one for each gradient."""
    from handtuned.amp import grad_scaler

    launches = []
    monkeypatch.setattr(grad_scaler, "unscale_", lambda grads, *_: launches.append(len(grads)))
    params = [torch.ones(3, requires_grad=True) for _ in range(30)]
    for p in params:
        p.grad = torch.ones(3)
    scaler = GradScaler()
    scaler.scale(torch.ones(1))
    scaler.unscale_(torch.optim.SGD([{"params": params[:10]}, {"params": params[10:]}], lr=0.1))
    assert launches == [30]


def test_nothing_reads_the_device_until_asked(monkeypatch):
    """scale, unscale_, update and a step that skips by itself must not call .item() (a wait for the GPU)."""
    from handtuned.amp import grad_scaler
    from handtuned.optim import AdamW

    monkeypatch.setattr(grad_scaler, "unscale_", lambda *_: None)  # on a CPU its reference may look
    param = torch.ones(3, requires_grad=True)
    optimizer = AdamW([param], fused=True)
    monkeypatch.setattr(AdamW, "step", lambda self: self.found_inf)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a sync"))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("a sync"))
    scaler = GradScaler()
    scaler.scale(param.sum()).backward()
    flag = scaler.step(optimizer)
    scaler.update()
    monkeypatch.undo()
    assert flag.item() == 0
