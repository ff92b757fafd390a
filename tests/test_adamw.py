"""AdamW: the kernel equals its reference bit by bit, and both follow torch.optim.AdamW."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from handtuned.amp import GradScaler
from handtuned.kernels import runtime
from handtuned.kernels.adamw import BLOCK, ParamGroup, adamw_step_, adamw_step_reference_
from handtuned.kernels.unscale import squared_norm
from handtuned.optim import AdamW
from handtuned.optim.adamw import adamw_step_cpu_

SHAPES = [(1,), (63,), (8, 8), (65,), (10, 100), (), (BLOCK + 3,)]
EPS32 = torch.finfo(torch.float32).eps


def make_group(device, dtype=torch.float32, grad_dtype=None, copy_dtype=None, step=0.0, seed=0, **rates):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator).to(dtype).to(device)  # noqa: E731
    params = [draw(s) for s in SHAPES]
    return ParamGroup(
        params=params,
        grads=[draw(s).to(grad_dtype or dtype) for s in SHAPES],
        exp_avgs=[draw(s) * 0.1 for s in SHAPES],
        exp_avg_sqs=[draw(s) ** 2 for s in SHAPES],
        steps=[torch.tensor(step + i, device=device) for i in range(len(SHAPES))],
        copies=[torch.empty_like(p, dtype=copy_dtype) if copy_dtype else None for p in params],
        **{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01} | rates,
    )


def assert_same_bits(ours, theirs, bf16_truncates=False):
    """Equal tensors; Triton's interpreter cuts bf16 off where it should round, so there one place apart."""
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps", "copies"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            if a is None:
                assert b is None
            elif bf16_truncates and a.dtype == torch.bfloat16:
                assert ((a.float() - b.float()).abs() <= torch.finfo(a.dtype).eps * b.float().abs()).all(), name
            else:
                assert torch.equal(a, b), name


def both(device, scalars=None, **kwargs):
    ours, theirs = make_group(device, **kwargs), make_group(device, **kwargs)
    adamw_step_([ours], **(scalars or {}))
    adamw_step_reference_([theirs], **(scalars or {}))
    return ours, theirs


@pytest.mark.parametrize("step", [0.0, 1.0, 100.0, 1e6], ids=lambda t: f"after-{t:g}")
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
def test_kernel_equals_reference_bit_by_bit(kernel_backend, device, step, maximize):
    assert_same_bits(*both(device, step=step, maximize=maximize))


@pytest.mark.parametrize(
    "rates",
    [
        {"weight_decay": 0.0},
        {"weight_decay": 0.5, "lr": 0.3},
        {"betas": (0.0, 0.0)},
        {"betas": (0.95, 0.98)},
        {"eps": 0.1},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_kernel_equals_reference_for_every_hyperparameter(kernel_backend, device, rates):
    assert_same_bits(*both(device, step=5.0, **rates))


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "copy_dtype"),
    [
        (torch.float32, torch.float32, torch.float16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, None),
        (torch.bfloat16, torch.bfloat16, None),
    ],
    ids=str,
)
def test_kernel_equals_reference_for_every_dtype(kernel_backend, device, dtype, grad_dtype, copy_dtype):
    pair = both(device, dtype=dtype, grad_dtype=grad_dtype, copy_dtype=copy_dtype)
    assert_same_bits(*pair, bf16_truncates=runtime.INTERPRETED)


def test_kernel_unscales_and_clips(kernel_backend, device):
    scalars = {
        "grad_scale": torch.tensor(1000.0, device=device),
        "sq_norm": squared_norm(make_group(device).grads),
        "max_norm": 0.003,
    }
    assert_same_bits(*both(device, scalars))


@pytest.mark.parametrize("max_norm", [0.3, 1e9], ids=["clips", "leaves"])
def test_clipping_within_the_step_is_clip_grad_norm(each_backend, device, max_norm):
    ours, theirs = make_group(device), make_group(device)
    adamw_step_([ours], sq_norm=squared_norm(ours.grads), max_norm=max_norm)
    for grad in theirs.grads:
        grad.requires_grad_().grad = grad.detach().clone()
    torch.nn.utils.clip_grad_norm_(theirs.grads, max_norm)
    theirs.grads = [grad.grad for grad in theirs.grads]
    adamw_step_reference_([theirs])
    for a, b in zip(ours.params, theirs.params, strict=True):
        # Two norms in different summation order: a few roundings, on a step of at most about lr.
        torch.testing.assert_close(a, b, rtol=2 * EPS32, atol=1e-3 * 32 * EPS32)


def test_an_overflow_changes_nothing(each_backend, device):
    group, before = make_group(device, copy_dtype=torch.float16), make_group(device, copy_dtype=torch.float16)
    for a, b in zip(group.copies, before.copies, strict=True):
        a.zero_(), b.zero_()
    group.grads[2].fill_(float("nan"))
    adamw_step_([group], found_inf=torch.tensor(1.0, device=device))
    assert_same_bits(group, before)
    group.grads[2].fill_(0.5)
    adamw_step_([group], found_inf=torch.tensor(0.0, device=device))
    assert not torch.equal(group.params[0], before.params[0])


def test_groups_keep_their_own_hyperparameters(kernel_backend, device):
    rates = [{"lr": 0.1, "weight_decay": 0.0}, {"lr": 0.01, "betas": (0.5, 0.9)}]
    ours = [make_group(device, seed=i, **r) for i, r in enumerate(rates)]
    theirs = [make_group(device, seed=i, **r) for i, r in enumerate(rates)]
    adamw_step_(ours)
    adamw_step_reference_(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


def test_strided_tensors(kernel_backend, device):
    """Parameter and gradient may lie in memory differently, and a parameter may be a slice of something."""
    base = torch.randn(6, 10, device=device)
    params = [base[:, ::2], torch.randn(5, 7, device=device).t()]
    grads = [torch.randn(6, 5, device=device), torch.randn(7, 5, device=device)]
    pair = []
    for _ in range(2):
        here = base.clone()
        own = [here[:, ::2], params[1].clone()]
        pair.append(
            ParamGroup(
                params=own,
                grads=grads,
                exp_avgs=[torch.zeros_like(p) for p in own],
                exp_avg_sqs=[torch.zeros_like(p) for p in own],
                steps=[torch.tensor(0.0, device=device) for _ in own],
                copies=[None, torch.empty(7, 5, dtype=torch.float16, device=device)],
                lr=0.1,
                betas=(0.9, 0.999),
                eps=1e-8,
                weight_decay=0.01,
            )
        )
        pair[-1].untouched = here[:, 1::2]
    adamw_step_([pair[0]])
    adamw_step_reference_([pair[1]])
    assert_same_bits(*pair)
    assert torch.equal(pair[0].untouched, base[:, 1::2])


def test_float64_takes_the_reference(kernel_backend, device):
    assert_same_bits(*both(device, dtype=torch.float64))


def test_kernel_refuses_other_dtypes(kernel_backend, device):
    group = make_group(device)
    group.grads[0] = torch.ones(1, dtype=torch.int32, device=device)
    with pytest.raises(TypeError, match="int32"):
        adamw_step_([group])


XRAY = """
import json
from handtuned.kernels import adamw, unscale
from handtuned.xray import xray
rays = [xray(spec, "sm_90") for spec in adamw.xray_specs() + unscale.xray_specs()]
print(json.dumps({r.name: [r.error, r.spill_bytes, r.widths("load global"), r.widths("store global")] for r in rays}))
"""


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="Triton is not installed")
def test_machine_code_moves_16_bytes_at_a_time():
    """Addresses come from a table, and still whole blocks are read and written 128 bits wide; nothing spills."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "HANDTUNED_BACKEND": ""}
    done = subprocess.run([sys.executable, "-c", XRAY], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) == 5
    for name, (error, spilled, loads, stores) in kernels.items():
        assert not error and spilled == 0, (name, error, spilled)
        # Without a gap: p, g, m, v in and p, m, v out (or g in and out), two instructions a tensor at least.
        reads, writes = (7, 6) if name.startswith("adamw") else (2, 2)
        assert loads["128"] >= reads and stores["128"] >= writes, (name, loads, stores)


# The optimizer


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


def test_the_cpu_loop_agrees_with_the_reference():
    ours, theirs = make_group("cpu"), make_group("cpu")
    adamw_step_cpu_([ours])
    adamw_step_reference_([theirs])
    for a, b in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * EPS32, atol=1e-3 * 8 * EPS32)


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
        ({"eps": -1e-8}, "eps"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"amsgrad": True}, "amsgrad"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=name):
        AdamW([torch.ones(1, requires_grad=True)], **kwargs)


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
