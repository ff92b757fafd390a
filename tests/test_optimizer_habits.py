"""What people do to torch's optimizers and scalers: copy and pickle them, share state dicts, write torch's keywords."""

import copy
import io
import pickle

import pytest
import torch
from handtuned.amp import GradScaler
from handtuned.optim import AdamW, AdamW8bit, ZeroOptimizer, cosine_with_warmup

SIZE = 5000
MAKERS = {
    "AdamW": lambda p: AdamW([p], lr=0.1),
    "AdamW8bit": lambda p: AdamW8bit([p], lr=0.1),
    "AdamW8bit, wide moments": lambda p: AdamW8bit([p], lr=0.1, min_elements=SIZE + 1),
    "ZeroOptimizer": lambda p: ZeroOptimizer([p], AdamW, lr=0.1),
    "ZeroOptimizer, 16 bits": lambda p: ZeroOptimizer([p], AdamW, lr=0.1),
    "ZeroOptimizer of 8 bits, small": lambda p: ZeroOptimizer([p], AdamW8bit, lr=0.1, min_elements=SIZE + 1),
}


def fresh(name, seed=0):
    torch.manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(SIZE, dtype=torch.bfloat16 if "16 bits" in name else torch.float32))
    return p, MAKERS[name](p)


def step(p, optimizer, seed=1):
    torch.manual_seed(seed)
    (p * torch.randn(SIZE).to(p.dtype)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


@pytest.mark.parametrize("name", MAKERS)
def test_loaded_state_is_shared_with_nobody(name):
    """Neither the dict, nor the optimizer that it came from, nor a second one that loads it."""
    (p, first), (q, second), (_, third) = fresh(name), fresh(name), fresh(name)
    step(p, first)
    saved = first.state_dict()
    kept = copy.deepcopy(saved)
    second.load_state_dict(saved)
    third.load_state_dict(saved)
    step(q, second, seed=2)
    mine = [t.clone() for t in tensors(dict(third.state))]
    step(q, second, seed=3)
    assert all(map(torch.equal, tensors(saved), tensors(kept)))
    assert all(map(torch.equal, tensors(dict(third.state)), mine))
    second.param_groups[0]["lr"] = 7.0
    assert saved["param_groups"][0]["lr"] == third.param_groups[0]["lr"] == 0.1


def test_loaded_schedules_share_nothing():
    def one():
        optimizer = AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        return cosine_with_warmup(optimizer, 10)

    first, second = one(), one()
    saved = first.state_dict()
    kept = copy.deepcopy(saved)
    second.load_state_dict(saved)
    second.base_lrs[0] = 7.0
    second.lr_lambdas[0].total_steps = 3
    second.optimizer.step()
    second.step()
    assert saved == kept and first.base_lrs == [0.1]


def through_file(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "AdamW8bit, wide moments"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), through_file])
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_go_on_like_the_original(name, way, steps):
    p, optimizer = fresh(name)
    for seed in range(steps):
        step(p, optimizer, seed)
    other = way(optimizer)
    q = other.param_groups[0]["params"][0]
    for pair in ((p, optimizer), (q, other)):
        step(*pair, seed=9)
    assert q is not p and torch.equal(p, q)
    assert optimizer.state[p].keys() == other.state[q].keys()


@pytest.mark.parametrize("saved, loaded", [(4096, 1), (1, 4096), (4096, 600), (601, 600)])
def test_another_min_elements(saved, loaded):
    def make(min_elements):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 600))
        return p, AdamW8bit([p], lr=0.1, min_elements=min_elements)

    (p, first), (q, second) = make(saved), make(loaded)
    for _ in range(2):
        p.grad = torch.linspace(1, 2, 600)
        first.step()
    second.load_state_dict(first.state_dict())
    q.data.copy_(p.data)
    for param, optimizer in ((p, first), (q, second)):
        param.grad = torch.ones(600)
        optimizer.step()
    assert torch.equal(p, q)  # as in torch, what was saved decides
    older = first.state_dict()
    for key in ("min_elements", "maximize"):
        del older["param_groups"][0][key]  # an earlier version did not write it
    r, third = make(loaded)
    third.load_state_dict(older)
    r.grad = torch.ones(600)
    third.step()
    assert ("exp_avg" in third.state[r]) == (loaded > 600)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adamw_s_moments_become_8_bit_ones(dtype):
    p = torch.nn.Parameter(torch.ones(SIZE, dtype=dtype))
    saved = AdamW([p])
    p.grad = torch.linspace(-1, 1, SIZE).to(dtype)
    saved.step()
    other = AdamW8bit([p])
    other.load_state_dict(saved.state_dict())
    other.step()
    state = other.state[p]
    assert state["step"] == 2 and state["exp_avg_levels"].dtype == torch.uint8 and "exp_avg" not in state


@pytest.mark.parametrize("saved, fresh_one", [
    (AdamW8bit, AdamW), (torch.optim.SGD, AdamW), (torch.optim.SGD, AdamW8bit), (torch.optim.Adagrad, AdamW8bit),
])  # fmt: skip
def test_the_state_of_another_optimizer_is_refused(saved, fresh_one):
    p = torch.nn.Parameter(torch.ones(SIZE))
    p.grad = torch.ones(SIZE)
    first = saved([p], lr=0.1, **({"momentum": 0.9} if saved is torch.optim.SGD else {}))
    first.step()
    state = first.state_dict()
    as_it_is, empty = copy.deepcopy(state), saved([p], lr=0.1).state_dict()
    state["param_groups"][0] = {**fresh_one([p]).state_dict()["param_groups"][0]}
    other = fresh_one([p])
    for foreign in (state, as_it_is, empty) if saved is not AdamW8bit else (state, as_it_is):
        with pytest.raises(ValueError, match="state_dict must"):
            other.load_state_dict(foreign)
        assert not other.state
    other.step()


class Counting(torch.optim.Optimizer):
    """p ← p − lr / (1 + k) · grad, with k and what depends on it in the group, as schedule-free optimizers have it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0, "sums": []})

    @torch.no_grad()
    def step(self, closure=None, *, boost=1.0):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-boost * group["lr"] / (1 + group["k"]))
            group["k"] += 1
            group["lr"] *= 0.9
            group["sums"] = [*group["sums"], group["lr"]]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_zero_with_an_optimizer_that_counts_in_its_groups(stage, offload):
    plain, cut = (torch.nn.Linear(3, 2) for _ in range(2))
    cut.load_state_dict(plain.state_dict())
    groups = lambda m: [{"params": [m.weight]}, {"params": [m.bias], "lr": 0.5}]  # noqa: E731
    ours = ZeroOptimizer(groups(cut), Counting, stage=stage, offload=offload)
    theirs = Counting(groups(plain))
    saved = []
    for i in range(4):
        for model, optimizer in ((plain, theirs), (cut, ours)):
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.param_groups[0]["lr"] *= 0.5  # a schedule
            optimizer.step(boost=1.0 + i)
            optimizer.zero_grad()
            saved.append(copy.deepcopy(optimizer.state_dict()))
        for group, other in zip(saved[-2]["param_groups"], saved[-1]["param_groups"], strict=True):
            assert group == other
        if i == 1:
            again = ZeroOptimizer(groups(cut), Counting) if stage < 3 else ours
            again.load_state_dict(saved[-1])
            assert [g["k"] for g in again.param_groups] == [2, 2]
    ours.close()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), cut.parameters(), strict=True))


@pytest.mark.parametrize("make", [AdamW, AdamW8bit])
def test_torch_s_keywords(make):
    p = [torch.nn.Parameter(torch.ones(2))]
    for keywords in ({"foreach": True}, {"foreach": False}, {"capturable": False}, {"differentiable": False},
                     {"amsgrad": False}, {"maximize": True}):  # fmt: skip
        make(p, fused=None)
        assert make(p, **keywords).param_groups[0][next(iter(keywords))] == next(iter(keywords.values()))
    for flag in ("amsgrad", "capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"{flag} must be False"):
            make(p, **{flag: True})
    with pytest.raises(ValueError, match="amsgrad must be False"):
        make(p, 1e-3, (0.9, 0.999), 1e-8, 1e-2, True)
    with pytest.raises(TypeError):
        make(p, 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, False)


def test_maximize_in_8_bits():
    p = torch.nn.Parameter(torch.zeros(SIZE))
    p.grad = torch.ones(SIZE)
    AdamW8bit([p], lr=0.1, maximize=True).step()
    assert (p > 0).all()


@pytest.mark.parametrize("args, keywords", [
    ((), {}), (("cuda",), {}), (("cpu", 64.0), {}), ((), {"device": "cpu"}),
    ((torch.device("cpu"),), {"init_scale": 64.0}), ((64.0,), {}), ((64.0, 3.0), {"device": "cuda"}),
    (("cuda", 64.0, 3.0, 0.25, 7, True), {}),
    ((64.0, 3.0, 0.25, 7, False), {}), ((), {"growth_interval": 7, "enabled": True}),
])  # fmt: skip
def test_grad_scaler_takes_both_orders_of_torch(args, keywords):
    ours = GradScaler(*args, **keywords)
    rest = args[1:] if args and isinstance(args[0], (str, torch.device)) else args
    theirs = torch.amp.GradScaler("cpu", *rest, **{k: v for k, v in keywords.items() if k != "device"})
    getters = ("get_scale", "get_growth_factor", "get_backoff_factor", "get_growth_interval")
    for name in ("is_enabled", *getters) if theirs.is_enabled() else ("is_enabled",):
        assert getattr(ours, name)() == getattr(theirs, name)()


@pytest.mark.parametrize("wrong", [{"init_skale": 1.0}, {"device": 7.5}, {"device": "gpu"}])
def test_grad_scaler_refuses_other_names(wrong):
    with pytest.raises((TypeError, RuntimeError)):
        GradScaler(**wrong)
    with pytest.raises(TypeError):
        GradScaler("cuda", 64.0, 3.0, 0.25, 7, True, 1)


def test_an_overflow_flag_has_any_name_of_its_device():
    p, scaler = torch.nn.Parameter(torch.ones(3)), GradScaler(init_scale=4.0)
    scaler.scale(p.sum()).backward()
    scaler.overflow_flag("cpu").fill_(1.0)
    scaler.step(torch.optim.SGD([p]))
    scaler.update()
    assert (p == 1).all() and scaler.get_scale() == 2.0


@pytest.mark.parametrize("make", [AdamW, AdamW8bit, lambda g, **k: ZeroOptimizer(g, AdamW, **k),
                                  lambda g, **k: AdamW(g, fused=True, **k)])  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_empty_groups_under_a_scaler(make, first):
    p = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": []}, {"params": [p]}]
    optimizer = make(groups if first else groups[::-1], lr=0.1)
    scaler = GradScaler(init_scale=4.0)
    for _ in range(2):
        scaler.scale(p.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert (p < 1).all()
    optimizer.load_state_dict(optimizer.state_dict())
