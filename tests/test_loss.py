"""The chunked cross-entropy against torch's: loss, every gradient, memory."""

import pytest
import torch
import torch.nn.functional as F
from handtuned.nn.loss import IGNORE_INDEX, linear_cross_entropy
from helpers import assert_within_budget


def problem(n=13, d=24, v=57, dtype=torch.float32, bias=True):
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, dtype=dtype, requires_grad=True)
    b = torch.randn(v, dtype=dtype, requires_grad=True) if bias else None
    target = torch.randint(v, (n,))
    target[::3] = IGNORE_INDEX
    return hidden, weight, b, target


def torch_loss(hidden, weight, bias, target):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, reduction="sum")


ROUNDINGS = 24 + 2 * 57 + 13 + 8  # logits, softmax, dh; rows; exp, log and divisions of a few


@torch.no_grad()
def magnitudes(hidden, weight, bias, target):
    """Of the loss and its gradients, for `order_cost`: an error e of the logits is one of 2e of log p, and of 2e p."""
    kept = target != IGNORE_INDEX
    sizes = F.linear(hidden.abs(), weight.abs(), None if bias is None else bias.abs())[kept]
    logits = F.linear(hidden, weight, bias)[kept]
    worst = 2 * sizes.amax(1, keepdim=True) + 1
    dlogits = torch.zeros(len(target), len(weight), dtype=hidden.dtype)
    dlogits[kept] = worst * logits.softmax(1) + F.one_hot(target[kept], len(weight))
    loss = (worst.squeeze(1) + F.cross_entropy(logits, target[kept], reduction="none")).sum()
    return loss, dlogits @ weight.abs(), dlogits.t() @ hidden.abs(), dlogits.sum(0)


@pytest.mark.parametrize("chunk", [1, 4, None], ids=lambda c: f"chunk-{c}")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_and_every_gradient_are_within_twice_torch_error(dtype, bias, chunk):
    inputs = problem(dtype=dtype, bias=bias)
    tensors = [t for t in inputs[:3] if t is not None]
    exact_inputs = [None if t is None else t.detach().double().requires_grad_() for t in inputs[:3]]
    exact = torch_loss(*exact_inputs, inputs[3])
    exact_grads = torch.autograd.grad(exact * 0.5, [t for t in exact_inputs if t is not None])
    low = torch_loss(*inputs)
    low_grads = torch.autograd.grad(low * 0.5, tensors)
    hidden, weight, b, target = inputs
    ours = linear_cross_entropy(hidden, weight, target, b, chunk=chunk)
    grads = torch.autograd.grad(ours * 0.5, tensors)
    sizes = magnitudes(*exact_inputs, target)
    assert_within_budget(ours, exact, low, ROUNDINGS, sizes[0], "loss")
    for name, got, want, rival, size in zip(("dh", "dW", "db"), grads, exact_grads, low_grads, sizes[1:], strict=False):
        assert_within_budget(got, want, rival, ROUNDINGS, 0.5 * size, name)


def test_frozen_head_gets_no_gradient_and_batched_shapes_work():
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(11, 8)
    target = torch.randint(11, (2, 5))
    linear_cross_entropy(hidden, weight, target).backward()
    rows, wide = hidden.detach().view(10, 8), hidden.detach().view(10, 8).double().requires_grad_()
    want = torch.autograd.grad(torch_loss(wide, weight.double(), None, target.flatten()), wide)[0]
    size = magnitudes(wide, weight.double(), None, target.flatten())[1]
    low = torch.autograd.grad(torch_loss(rows.requires_grad_(), weight, None, target.flatten()), rows)[0]
    assert_within_budget(hidden.grad.view(10, 8), want, low, 8 + 2 * 11 + 8, size)
    assert weight.grad is None


def test_nothing_to_learn_gives_zero_and_zero_gradients():
    hidden = torch.randn(3, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(11, 8), torch.full((3,), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().sum() == 0


def test_runs_in_autocast_dtype():
    hidden, weight, b, target = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target, b)
        rival = F.cross_entropy(F.linear(hidden, weight, b).float(), target, reduction="sum")
    wide = hidden.double(), weight.double(), b.double(), target
    assert_within_budget(loss, torch_loss(*wide), rival, ROUNDINGS, magnitudes(*wide)[0])


def learnt_well(v=4096, d=24, n=13):
    """hidden, weight, target in fp16, whose logits fp16 holds exactly; a wrong class has a probability of about 2e-8.

    The true class, 0, has no weight but the one that decides, so that dh is else made of the wrong classes alone.
    """
    target = torch.zeros(n, dtype=torch.long)
    weight = torch.randint(-4, 5, (v, d)) / 8.0
    weight[0], weight[:, 0] = 0.0, -8.0
    weight[0, 0] = 8.0
    hidden = torch.randint(-1, 2, (n, d)).float()
    hidden[:, 0] = 1.125
    return (hidden * 1024).half().requires_grad_(), (weight / 1024).half().requires_grad_(), target


def test_gradients_that_scaling_after_rounding_loses_are_kept(each_backend):
    """Most of dh lies below 2⁻²⁵, and of dz, of which dW is made, too."""
    hidden, weight, target = learnt_well()
    h, w, eps, scale = hidden.detach().double(), weight.detach().double(), torch.finfo(torch.float16).eps, 1024.0
    p = (h @ w.t()).softmax(1)
    dz = p - F.one_hot(target, len(w))
    exact = {"dh": dz @ w, "dW": dz.t() @ h}
    assert (exact["dh"][:, 1:].abs() < 2**-25).double().mean() > 0.9 and (p < 2**-25).double().mean() > 0.6

    found_inf = torch.zeros(())
    scaled = linear_cross_entropy(hidden, weight, target, loss_scale=torch.tensor(scale), found_inf=found_inf)
    kept = dict(zip(exact, torch.autograd.grad(scaled * scale, (hidden, weight)), strict=True))
    late = dict(zip(exact, torch.autograd.grad(linear_cross_entropy(hidden, weight, target) * scale, (hidden, weight)),
                    strict=True))  # fmt: skip
    assert found_inf == 0
    lost = (late["dh"][:, 1:] == 0).double().mean()
    assert lost > 0.9 and (kept["dh"][:, 1:] == 0).double().mean() < 0.05
    # 2¹⁵ dz in fp16; p in fp32, whose sum of exponentials any order may have made: each wrong class is below half an
    # ulp of the true one, so an order that begins with the true one loses them
    order = len(w) * 2**-24
    off = dz.abs() * (eps / 2 + order) + 2**-40 + (32 * torch.finfo(torch.float32).eps + order) * p
    for name, budget in (("dh", off @ w.abs()), ("dW", off.t() @ h.abs())):
        budget = budget + exact[name].abs() * eps / 2 + 2**-25 / scale
        assert ((kept[name].double() / scale - exact[name]).abs() <= budget).all(), name


def test_an_overflow_of_a_gradient_is_noted_where_it_arises(each_backend):
    hidden, weight, target = (t.requires_grad_(t.is_floating_point()) for t in (
        torch.randn(5, 8).half(), torch.randn(11, 8).half(), torch.randint(11, (5,))))  # fmt: skip
    for scale, overflow in ((1.0, 0.0), (2.0**20, 1.0)):
        found_inf = torch.zeros(())
        linear_cross_entropy(hidden, weight, target, loss_scale=torch.tensor(scale), found_inf=found_inf)
        assert found_inf == overflow
    with torch.no_grad():
        weight[3] = torch.inf
    assert linear_cross_entropy(hidden, weight, target, found_inf=found_inf.zero_()).isnan() and found_inf == 1


@pytest.mark.parametrize("change, message", [
    (dict(target=torch.zeros(4, dtype=torch.long)), "target must have shape"),
    (dict(weight=torch.zeros(5, 9)), "weight must have shape"),
    (dict(bias=torch.zeros(1)), r"bias must have shape \(5,\), got \(1,\)"),
    (dict(target=torch.full((3,), 5)), "target must lie in"),
    (dict(chunk=0), "chunk must be at least 1"),
])  # fmt: skip
def test_bad_input_is_named(change, message):
    good = dict(hidden=torch.zeros(3, 8), weight=torch.zeros(5, 8), target=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(good | change))


def test_pain_15_logits_never_exist_all_at_once():
    n, v, seen = 64, 10_000, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.data_ptr() != weight.data_ptr():  # not a view of the head
                seen.append(out.numel())
            return out

    hidden = torch.randn(n, 8, requires_grad=True)
    target = torch.full((n,), IGNORE_INDEX)
    target[:10] = 3
    weight = torch.randn(v, 8)
    with Watch():
        linear_cross_entropy(hidden, weight, target, chunk=1).backward()
    assert max(seen) == v
