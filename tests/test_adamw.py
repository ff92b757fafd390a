"""The AdamW optimizer follows torch.optim.AdamW, in its numbers, its state dict and its refusals."""

import copy

import pytest
import torch
from handtuned.amp import GradScaler
from handtuned.kernels.adamw import BLOCK
from handtuned.optim import AdamW, AdamW8bit

SHAPES = [(1,), (63,), (8, 8), (65,), (10, 100), (), (BLOCK + 3,)]
EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture
def one_thread():
    """Threads that wait for each other thousands of times over tiny tensors are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quadratic(optimizer_class, steps=50, dtype=torch.float32, device="cpu", **kwargs):
    """Parameters after some steps on a noisy bowl; the noise is the same for everybody."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(s, generator=generator).to(dtype).to(device).requires_grad_() for s in SHAPES]
    optimizer = optimizer_class(params, **kwargs)
    for i in range(steps):
        optimizer.zero_grad()
        for j, p in enumerate(params):
            if (i + j) % 7:  # now and then a parameter gets no gradient
                p.grad = p.detach() + torch.randn(p.shape, generator=generator).to(dtype).to(device)
        optimizer.step()
    return params, optimizer


def furthest(params, others):
    return max((a - b).abs().max().item() for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("fused", [None, False, True], ids=["default", "reference", "fused"])
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
def test_follows_torch_for_1000_steps(fused, maximize, one_thread):
    """Drift against torch in fp32 stays on the scale of single roundings, as torch's own variants do among themselves.

    Measured against the same run in fp64: our distance from the truth is at most twice torch's plus one rounding.
    """
    kwargs = {"lr": 1e-2, "steps": 1000, "maximize": maximize}
    ours, _ = quadratic(AdamW, fused=fused, **kwargs)
    theirs, _ = quadratic(torch.optim.AdamW, foreach=False, **kwargs)
    exact, _ = quadratic(torch.optim.AdamW, foreach=False, dtype=torch.float64, **kwargs)
    scale = max(p.abs().max().item() for p in exact)
    assert furthest(ours, exact) <= 2 * furthest(theirs, exact) + EPS32 * scale


@pytest.mark.parametrize("fused", [None, False], ids=["default", "reference"])
def test_1000_steps_end_within_one_rounding_of_torchs(fused, one_thread):
    kwargs = {"lr": 1e-3, "steps": 1000}
    ours, _ = quadratic(AdamW, fused=fused, **kwargs)
    theirs, _ = quadratic(torch.optim.AdamW, **kwargs)
    assert furthest(ours, theirs) <= EPS32 * max(p.abs().max().item() for p in theirs)


def test_kernel_follows_torch(kernel_backend, device):
    ours, _ = quadratic(AdamW, steps=12, device=device)
    theirs, _ = quadratic(torch.optim.AdamW, steps=12, device=device)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * EPS32, atol=12 * 1e-3 * 8 * EPS32)


@pytest.mark.parametrize("source", [AdamW, torch.optim.AdamW], ids=["ours-into-torch", "torch-into-ours"])
@pytest.mark.parametrize("fused", [None, False], ids=["default", "reference"])
def test_state_dict_goes_both_ways(source, fused):
    """Stop one optimizer, go on with the other: the run ends where the uninterrupted one does."""
    target = torch.optim.AdamW if source is AdamW else AdamW
    kwargs = {AdamW: {"fused": fused}, torch.optim.AdamW: {}}
    params, first = quadratic(source, steps=5, **kwargs[source])
    second = target([p.detach().clone().requires_grad_() for p in params], **kwargs[target])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(params, second.param_groups[0]["params"], strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    first.step()
    second.step()
    assert furthest(params, second.param_groups[0]["params"]) <= 4 * EPS32 * 5


def test_state_dict_has_torchs_keys_and_types():
    _, ours = quadratic(AdamW, steps=1)
    _, theirs = quadratic(torch.optim.AdamW, steps=1)
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours["param_groups"][0] == theirs["param_groups"][0]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, entry in theirs["state"].items():
        assert ours["state"][index].keys() == entry.keys()
        for key, tensor in entry.items():
            got = ours["state"][index][key]
            assert (got.dtype, got.shape, got.device) == (tensor.dtype, tensor.shape, tensor.device), key


def test_step_number_of_an_old_state_dict():
    """Before torch 1.12 `step` was a number."""
    params, optimizer = quadratic(AdamW, steps=1)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["step"] = 7
    optimizer.load_state_dict(state)
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert optimizer.state[params[1]]["step"].item() == 8


@pytest.mark.parametrize("pickled", [False, True], ids=["state-dict", "pickle"])
def test_flags_that_an_older_torch_did_not_have(pickled):
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    ours, theirs = AdamW([p]), torch.optim.AdamW([p])
    state = copy.deepcopy(ours.__getstate__() if pickled else theirs.state_dict())
    for name in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        del state["param_groups"][0][name]
    (ours.__setstate__ if pickled else ours.load_state_dict)(state)
    ours.step()
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [None, False], ids=["default", "reference"])
def test_low_precision_parameters_stay_finite(dtype, fused):
    """A zero gradient in fp16: torch's plain AdamW computes 0 / (0 + 1e-8) in fp16, where 1e-8 is 0, and gets NaN."""
    p = torch.ones(3, dtype=dtype, requires_grad=True)
    optimizer = AdamW([p], fused=fused)
    p.grad = torch.tensor([0.0, 1.0, -1.0], dtype=dtype)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == dtype
    exact = torch.tensor([1.0, 1.0 - 1e-3, 1.0 + 1e-3]) * (1 - 1e-5)
    assert (p.detach().float() - exact).abs().max() <= torch.finfo(dtype).eps


def test_one_scaler_step_without_a_sync(each_backend, device):
    """The step reads scale and flag itself; with an inf it changes neither parameters nor counters."""
    p = torch.ones(70, device=device, requires_grad=True)
    optimizer = AdamW([p], fused=True)
    scaler = GradScaler(init_scale=1024.0)
    for factor, steps, scale in ((1.0, 1, 1024.0), (float("inf"), 1, 512.0), (1.0, 2, 512.0)):
        optimizer.zero_grad()
        scaler.scale((p * p).sum()).backward()
        p.grad.mul_(factor)
        before = p.detach().clone()
        scaler.step(optimizer, max_norm=1.0)
        scaler.update()
        assert torch.equal(before, p) == (factor != 1.0)
        assert optimizer.state[p]["step"].item() == steps
        assert scaler.get_scale() == scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_is_of_no_account(each_backend, device, dtype):
    """Models are often built under another one; flags and scalars that a kernel reads are float32 all the same."""
    p = torch.ones(70, device=device, dtype=torch.float32, requires_grad=True)
    optimizer, scaler = AdamW([p], fused=True), GradScaler(init_scale=4.0)
    torch.set_default_dtype(dtype)
    try:
        for unscale in (True, False):
            scaler.scale((p * p).sum()).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer, max_norm=1.0)
            scaler.update()
    finally:
        torch.set_default_dtype(torch.float32)
    assert scaler.get_scale() == 4.0 and optimizer.state[p]["step"].item() == 2


def test_works_in_torchs_scaler_too():
    p, q = (torch.ones(5, requires_grad=True) for _ in range(2))
    for param, optimizer in ((p, AdamW([p], fused=True)), (q, torch.optim.AdamW([q]))):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale((param**2).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(p, q, rtol=4 * EPS32, atol=0)


def test_max_norm_of_a_step():
    """Adam is blind to the scale of its gradient, so a large eps makes the clipping visible."""
    p, q = (torch.ones(100, requires_grad=True) for _ in range(2))
    ours, theirs = AdamW([p], eps=1.0), torch.optim.AdamW([q], eps=1.0)
    p.grad, q.grad = torch.full((100,), 3.0), torch.full((100,), 3.0)
    ours.step(max_norm=0.5)
    torch.nn.utils.clip_grad_norm_([q], 0.5)
    theirs.step()
    torch.testing.assert_close(p, q, rtol=4 * EPS32, atol=0)


@pytest.mark.parametrize("fused", [None, False], ids=["default", "reference"])
def test_max_norm_with_an_infinite_gradient_does_not_raise(fused):
    """Without a scaler nobody skips the step; torch's clip_grad_norm_ gives NaN too."""
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.tensor([1.0, float("inf"), 1.0])
    AdamW([p], fused=fused).step(max_norm=1.0)
    assert p[1].isnan()


def test_copies_receive_the_new_value(each_backend, device):
    p = torch.randn(70, device=device, requires_grad=True)
    low = torch.zeros(70, dtype=torch.float16, device=device)
    optimizer = AdamW([p])
    p.grad = torch.randn(70, device=device)
    optimizer.step(copies={p: low})
    assert torch.equal(low, p.detach().half())


def transposed():
    return torch.randn(5, 7).t()


@pytest.mark.parametrize(
    ("make", "gradient"),
    [
        (transposed, lambda: torch.randn(7, 5)),
        (lambda: torch.randn(6, 10)[:, ::2], lambda: torch.randn(6, 5)),
        (lambda: torch.randn(7, 5), transposed),
        (lambda: torch.randn(7, 5), lambda: torch.randn(1, 5).expand(7, 5)),
        (lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), lambda: torch.randn(2, 3, 4, 5)),
    ],
    ids=["parameter-transposed", "parameter-sliced", "gradient-transposed", "gradient-expanded", "channels-last"],
)
def test_strides_of_parameter_and_gradient(each_backend, device, make, gradient):
    """torch.optim.AdamW(fused=True) on a CPU mixes elements up where the two lie in memory differently."""
    start, grad = make().to(device), gradient().to(device)
    ours = torch.empty_strided(start.shape, start.stride(), device=device).copy_(start).requires_grad_()
    theirs = start.clone().requires_grad_()
    ours_adamw, their_adamw = AdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1, foreach=False)
    for _ in range(2):
        ours.grad, theirs.grad = grad, grad
        ours_adamw.step()
        their_adamw.step()
    torch.testing.assert_close(ours, theirs, rtol=4 * EPS32, atol=0.1 * 8 * EPS32)


def test_closure_and_empty_steps():
    p = torch.ones(2, requires_grad=True)
    optimizer = AdamW([p])
    assert optimizer.step() is None

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert optimizer.state[p]["step"].item() == 1


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": torch.ones(2)}, "lr must be a number or a tensor of 1 element"),
        ({"eps": -1e-8}, "eps"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"amsgrad": True}, "amsgrad"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=name):
        AdamW([torch.ones(1, requires_grad=True)], **kwargs)


@pytest.mark.parametrize("optimizer_class", [AdamW, AdamW8bit])
def test_a_refused_group_is_not_left_behind(optimizer_class):
    optimizer = optimizer_class([torch.ones(1, requires_grad=True)])
    for group in ({"params": [torch.ones(1, requires_grad=True)], "lr": -1.0},
                  {"params": [torch.ones(1, dtype=torch.complex64, requires_grad=True)]}):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_betas_in_a_list_are_saved_as_torch_saves_them():
    params = [torch.ones(1, requires_grad=True)]
    ours, theirs = (make(params, betas=[0.9, 0.99]) for make in (AdamW, torch.optim.AdamW))
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]


def test_an_amsgrad_state_dict_is_refused():
    p = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="amsgrad"):
        AdamW([p]).load_state_dict(torch.optim.AdamW([p], amsgrad=True).state_dict())


def test_sparse_and_complex_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        AdamW(embedding.parameters()).step()
    with pytest.raises(TypeError, match="complex"):
        AdamW([torch.ones(1, dtype=torch.complex64, requires_grad=True)])


def test_no_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])
