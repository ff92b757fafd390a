"""What checkpoint runs again, with what around it, and which recomputations it refuses."""

import pytest
import torch
import torch.nn.functional as F
from checkpoint_pair import assert_bit_equal, count_calls, mlp, torchs
from handtuned.nn.checkpoint import CheckpointError, checkpoint
from helpers import assert_same_function
from torch import nn


@pytest.fixture(params=[torchs, checkpoint], ids=["torch", "ours"])
def ckpt(request):
    return request.param


def test_runs_twice_and_not_at_all_without_gradients(ckpt):
    func = count_calls(lambda t: t.sin().exp())
    x = torch.randn(4, requires_grad=True)
    ckpt(func, x).sum().backward()
    assert func.calls == 2
    with torch.no_grad():
        assert not ckpt(func, x).requires_grad
    assert func.calls == 3
    ckpt(func, x)
    assert func.calls == 4


def test_recomputation_stops_when_backward_has_all_it_needs(ckpt):
    tail = count_calls(lambda t: t + 1)
    x = torch.randn(4, requires_grad=True)
    ckpt(lambda t: tail(t.sin().exp()), x).sum().backward()
    assert tail.calls == 1


def test_recomputation_stops_at_the_last_tensor_that_is_still_needed():
    tail = count_calls(torch.sin)
    x = torch.randn(4, requires_grad=True)
    used, _ = checkpoint(lambda t: (t.exp(), tail(t)), x)
    del _
    used.sum().backward()
    assert tail.calls == 1, "the sine's own tensor died with its output"


def test_functions_that_catch_exceptions_do_not_catch_the_early_stop():
    def func(t):
        try:
            return t.sin().exp() + 1
        except Exception:
            return t.sin() * 0

    x = torch.randn(4, requires_grad=True)
    checkpoint(func, x).sum().backward()
    torch.testing.assert_close(x.grad, x.sin().exp().mul(x.cos()).detach())


def test_random_state_is_restored_in_backward_and_left_alone_by_it(ckpt):
    x = torch.randn(1000, requires_grad=True)
    out = ckpt(F.dropout, x, 0.5)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(x.grad, (out != 0).float() * 2)


def test_without_preserve_rng_state_the_masks_differ(ckpt):
    x = torch.randn(1000, requires_grad=True)
    out = ckpt(lambda t: F.dropout(t, 0.5).exp(), x, preserve_rng_state=False)
    out.sum().backward()
    assert not torch.equal(x.grad == 0, out == 1)


class Alternating:
    """Another function in the recomputation than in the forward pass."""

    def __init__(self, *funcs):
        self.funcs = list(funcs)

    def __call__(self, x):
        return (self.funcs.pop(0) if len(self.funcs) > 1 else self.funcs[0])(x)


@pytest.mark.parametrize(
    "again",
    [lambda t: t.sin(), lambda t: (t[:2].sin() * 1).exp(), lambda t: (t.double().sin() * t.double()).exp()],
    ids=["fewer", "shape", "dtype"],
)
def test_a_recomputation_that_differs_is_refused(ckpt, again):
    func = Alternating(lambda t: (t.sin() * t).exp(), again)
    x = torch.randn(4, requires_grad=True)
    out = ckpt(func, x)
    with pytest.raises(RuntimeError):
        out.sum().backward()


@pytest.mark.parametrize(
    ("again", "message"),
    [
        (lambda t: t.sin(), r"saved 4 tensors .* only 1 .* #1: shape \(4,\), torch.float32, on cpu, from an input"),
        (lambda t: t.sin() * t[:2].repeat(3)[:5].sum(0), r"#1 .*from an input.* recomputed with shape \(\)"),
        (lambda t: (t.sin() * t.half()).exp(), r"#1 .* recomputed with shape \(4,\), torch.float16"),
    ],
    ids=["fewer", "shape", "dtype"],
)
def test_the_refusal_names_the_tensor(again, message):
    func = Alternating(lambda t: (t.sin() * t).exp(), again)
    x = torch.randn(4, requires_grad=True)
    out = checkpoint(func, x)
    with pytest.raises(CheckpointError, match=message):
        out.sum().backward()


def test_a_parameter_stepped_before_backward_is_refused():
    net, x = mlp(), torch.randn(4, 8)
    out = checkpoint(net, x)
    with torch.no_grad():
        net[3].weight.add_(1)
    with pytest.raises(CheckpointError, match=r"shape \(8, 16\) .* modified in place"):
        out.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_another_parameter_in_backward_is_refused(frozen):
    """torch's gives the gradient of a function that forward did not compute; equal values are not a fault."""
    net, x = nn.Linear(8, 8).requires_grad_(not frozen), torch.randn(4, 8, requires_grad=True)
    loss = checkpoint(lambda t: net(t.exp()).sin(), x).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    net.weight = nn.Parameter(net.weight.detach().clone(), not frozen)
    assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], expected)
    net.weight = nn.Parameter(2 * net.weight.detach(), not frozen)
    with pytest.raises(CheckpointError, match="another parameter in the forward pass"):
        loss.backward()


def test_a_parameter_clipped_inside_the_function_is_not():
    weight, x = nn.Parameter(torch.randn(8, 8)), torch.randn(4, 8, requires_grad=True)

    def func(t):
        with torch.no_grad():
            weight.clamp_(-0.5, 0.5)
        return (t @ weight).exp()

    loss = checkpoint(func, x).sum()
    first = torch.autograd.grad(loss, weight, retain_graph=True)
    assert_bit_equal(torch.autograd.grad(loss, weight), first)


def test_an_input_changed_in_place_before_backward_is_refused(ckpt):
    leaf = torch.randn(4, requires_grad=True)
    x = leaf * 1
    out = ckpt(lambda t: t.sin().exp(), x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_errors_pass_through_and_leave_everything_as_it_was(ckpt):
    def fail(t):
        raise ZeroDivisionError("mine")

    x = torch.randn(4, requires_grad=True)
    with pytest.raises(ZeroDivisionError, match="mine"):
        ckpt(fail, x)
    out = ckpt(Alternating(torch.exp, fail), x)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError, match="mine"):
        out.sum().backward()
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
    assert isinstance(torch.sin(x).grad_fn._saved_self, torch.Tensor), "the hooks are gone"


class Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        (again,) = ctx.saved_tensors
        return grad * (x + again).mul(0.5).exp()


def test_a_function_may_read_its_saved_tensors_twice():
    """torch's own refuses this; here the second reading recomputes."""
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    checkpoint(lambda t: Exponential.apply(t.sin()).sin(), x).sum().backward()
    expected = torch.autograd.grad(x.sin().exp().sin().sum(), x)[0]
    assert_same_function(x.grad, expected)


def test_an_argument_list_is_not_appended_to_twice():
    x, record = torch.randn(4, requires_grad=True), []
    checkpoint(lambda t, notes: (notes.append(1), t.sin().exp())[1], x, record).sum().backward()
    assert record == [1]
