"""The AdamW kernel equals its reference bit by bit, and is compiled to wide loads."""

import math

import pytest
import torch
from handtuned.kernels import runtime
from handtuned.kernels.adamw import BLOCK, ParamGroup, adamw_step_, adamw_step_reference_, rounded_sqrt
from handtuned.kernels.unscale import squared_norm
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_references_root_is_rounded_correctly(dtype):
    """`math.sqrt` is the CPU's instruction; rounded to 24 bits, its 53 are the root rounded once (53 ≥ 2·24 + 2)."""
    special = [0.0, -0.0, 1e-310, 1e-42, 2.0, 3e38, math.inf, math.nan]
    for x in (torch.rand(10000, dtype=dtype)[::3], torch.tensor(special, dtype=dtype), torch.tensor(2.0).to(dtype)):
        exact = torch.tensor([math.sqrt(value) for value in x.flatten().tolist()], dtype=torch.float64).to(dtype)
        torch.testing.assert_close(rounded_sqrt(x), exact.view(x.shape), rtol=0, atol=0, equal_nan=True)


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


@pytest.mark.parametrize("grown", [("params", "grads"), ("grads",), ("exp_avgs",)], ids=str)
def test_state_of_another_size_is_refused(kernel_backend, device, grown):
    """A parameter that has grown since its moments were made: the kernel would write behind them."""
    group = make_group(device)
    adamw_step_([group])
    for name in grown:
        getattr(group, name)[2] = torch.ones(9, 8, device=device)
    with pytest.raises(ValueError, match=r"must be of one size, got \([89], 8\)"):
        adamw_step_([group])


def test_parameters_that_are_transposed_where_they_lie_are_seen(kernel_backend, device):
    ours, theirs = make_group(device), make_group(device)
    for step, group in ((adamw_step_, ours), (adamw_step_reference_, theirs)):
        step([group])
        group.params[2].data = group.params[2].data.t()
        step([group])
    assert_same_bits(ours, theirs)


def test_the_cpu_loop_agrees_with_the_reference():
    ours, theirs = make_group("cpu"), make_group("cpu")
    adamw_step_cpu_([ours])
    adamw_step_reference_([theirs])
    for a, b in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * EPS32, atol=1e-3 * 8 * EPS32)
