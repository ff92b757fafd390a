"""The documents' checkpoint Function: exact where it is exact, and where it is not."""

import pytest
import torch
import torch.nn.functional as F
from checkpoint_pair import assert_bit_equal, mlp
from handtuned.nn.checkpoint import manual_checkpoint_forward


def test_exact_for_an_mlp():
    net, x = mlp(), torch.randn(4, 8, requires_grad=True)
    expected = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    out = manual_checkpoint_forward(net, x)
    assert torch.equal(out, net(x))
    out.square().sum().backward()
    assert_bit_equal([x.grad, *(p.grad for p in net.parameters())], expected)


def test_exact_for_several_inputs_and_outputs():
    x, y = (torch.randn(3, 5, requires_grad=True) for _ in range(2))

    def func(a, b):
        return a * b.exp(), (a - b).sin()

    expected = torch.autograd.grad(sum(t.sum() for t in func(x, y)), [x, y])
    first, second = manual_checkpoint_forward(func, x, y)
    (first.sum() + second.sum()).backward()
    assert_bit_equal([x.grad, y.grad], expected)


def test_saves_its_inputs_only():
    x = torch.randn(64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        manual_checkpoint_forward(lambda t: t.sin().exp().sin(), x)
    assert len(kept) == 1 and kept[0].data_ptr() == x.data_ptr()


def test_limit_dropout_draws_another_mask():
    x = torch.randn(10_000, requires_grad=True)
    wrong = manual_checkpoint_forward(lambda t: F.dropout(t, 0.5), x)
    wrong.sum().backward()
    exact = (wrong != 0).float() * 2
    error = ((x.grad - exact).norm() / exact.norm()).item()
    assert error == pytest.approx(1.0, abs=0.05), "two independent masks: |a - b|² / |b|² is 1 at p = 0.5"


def test_limit_arguments_must_be_tensors():
    with pytest.raises(TypeError, match="can only save variables"):
        manual_checkpoint_forward(torch.pow, torch.randn(3, requires_grad=True), 2)


def test_limit_arguments_must_be_floating_point():
    x = torch.randn(3, requires_grad=True)
    out = manual_checkpoint_forward(lambda t, i: t[i], x, torch.tensor([0, 2]))
    with pytest.raises(RuntimeError, match="floating point"):
        out.sum().backward()


def test_limit_no_input_with_gradient_no_gradient_at_all():
    assert not manual_checkpoint_forward(mlp(), torch.randn(4, 8)).requires_grad


def test_limit_autograd_grad_does_not_see_parameters():
    net, x = mlp(), torch.randn(4, 8, requires_grad=True)
    out = manual_checkpoint_forward(net, x).sum()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(out, list(net.parameters()))


def test_limit_no_double_backward():
    x = torch.randn(4, requires_grad=True)
    (slope,) = torch.autograd.grad(manual_checkpoint_forward(torch.exp, x).sum(), x, create_graph=True)
    assert not slope.requires_grad
    (slope,) = torch.autograd.grad((manual_checkpoint_forward(torch.exp, x) + x**3).sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(curve, 6 * x.detach())  # and not 6x + exp(x)


def test_limit_every_result_must_have_a_gradient():
    x = torch.randn(4, requires_grad=True)
    values, _ = manual_checkpoint_forward(lambda t: t.topk(2), x)
    with pytest.raises(RuntimeError, match="does not require grad"):
        values.sum().backward()


def test_limit_autocast_is_off_in_backward():
    seen = []

    def func(t):
        seen.append(torch.is_autocast_enabled("cpu"))
        return t.exp()

    x = torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = manual_checkpoint_forward(func, x)
    out.sum().backward()
    assert seen == [True, False]
