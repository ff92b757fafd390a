"""checkpoint against torch's own non-reentrant checkpoint and a plain call, case by case."""

import contextlib
import copy

import pytest
import torch
from checkpoint_pair import assert_bit_equal, gradients, mlp, plain, torchs
from handtuned.amp.autocast import autocast
from handtuned.nn.checkpoint import checkpoint
from helpers import TORCH, assert_same_function
from torch import nn


@pytest.fixture(params=[torchs, checkpoint], ids=["torch", "ours"])
def ckpt(request):
    return request.param


def same_as_plain():
    """name → (build(checkpoint) → loss, the tensors whose gradients count); each is run plain and checkpointed."""
    torch.manual_seed(1)
    x = torch.randn(4, 8, requires_grad=True)
    y = torch.randn(4, 8, requires_grad=True)
    frozen = torch.randn(4, 8)
    index = torch.tensor([3, 1, 0])
    net, drop = mlp(), mlp(dropout=0.5)
    params = list(net.parameters())

    def branches(first, *, rest, flag):
        assert flag == "on"
        return {"sum": first + rest[0] * rest[1]["deep"], "parts": (first.sin(), [rest[0].cos()], None, 3)}

    def use_branches(c):
        out = c(branches, x, rest=(y, {"deep": frozen}), flag="on")
        assert out["parts"][2:] == (None, 3)
        return (out["sum"] * out["parts"][0]).sum() + out["parts"][1][0].sum()

    def autocast(c):
        with torch.autocast("cpu", torch.bfloat16):
            out = c(net, x)
        assert out.dtype == torch.bfloat16
        return out.float().sum()

    def autocast_off_inside(c):
        def func(t):
            with torch.autocast("cpu", enabled=False):
                return net(t).sin()

        with torch.autocast("cpu", torch.bfloat16):
            return c(func, x).sum()

    def nested(c):
        def inner(t):
            return drop(t).sin()

        def middle(t):
            return c(inner, t).exp() * c(inner, t.cos())

        return c(lambda t: c(middle, t).sigmoid() + t, x).sum()

    def backward_inside(c):
        def func(t):
            out = t.sin().exp()
            (slope,) = torch.autograd.grad(out.sum(), t, create_graph=True)
            return out + slope.square()

        return c(func, x).sum()

    def detached_inside(c):
        def func(t):
            with torch.no_grad():
                scale = t.exp()
            return t.sin() * scale + t.detach().cos() * t

        return c(func, x).sum()

    def in_place(c):
        def func(t):
            t = t * 2
            t[:, 1:].mul_(t[:, :1].clone())
            return t.add_(1).exp_()

        return c(func, x).sum()

    return {
        "mlp": (lambda c: c(net, x).square().sum(), [x, *params]),
        "dropout": (lambda c: c(drop, x).square().sum(), [x, *drop.parameters()]),
        "dropout-then-more-random": (lambda c: (c(drop, x) * torch.rand(4, 8)).sum(), [x]),
        "autocast": (autocast, [x, *params]),
        "autocast-off-inside": (autocast_off_inside, [x, *params]),
        "nested-containers-and-keywords": (use_branches, [x, y]),
        "non-tensor-arguments": (lambda c: c(torch.pow, x, 2).sum() + c(torch.cat, (x, y), 1).exp().sum(), [x, y]),
        "integer-tensor": (lambda c: c(lambda t, i: t[i].sin(), x, index).sum(), [x]),
        "input-without-gradient": (lambda c: c(net, frozen).sum(), params),
        "no-arguments": (lambda c: c(lambda: net(x).sin()).sum(), [x, *params]),
        "nothing-requires-grad": (lambda c: c(torch.sin, frozen).sum() + x.sum(), [x]),
        "some-unused": (lambda c: c(lambda a, b: a.sin(), x, y).sum(), [x, y]),
        "nested-checkpoints": (nested, [x, *drop.parameters()]),
        "same-layer-three-times": (lambda c: c(drop, c(drop, c(drop, x))).sum(), [x, *drop.parameters()]),
        "backward-inside": (backward_inside, [x]),
        "detach-and-no-grad-inside": (detached_inside, [x]),
        "in-place-inside": (in_place, [x]),
        "identity": (lambda c: c(lambda t: t, x).sin().sum(), [x]),
        "unused-branch": (lambda c: c(lambda t: (t.sin().exp(), t.cos().exp()), x)[0].sum(), [x]),
        "module-list": (lambda c: c(lambda ts: sum(net(t) for t in ts), [x, y]).sum(), [x, y, *params]),
    }


@pytest.mark.parametrize("case", list(same_as_plain()))
def test_gradients_are_bit_equal_to_a_plain_call(ckpt, case):
    run, wrt = same_as_plain()[case]
    assert_bit_equal(gradients(lambda: run(ckpt), wrt), gradients(lambda: run(plain), wrt))


def test_backward_fills_grad_of_parameters_and_adds_to_it(ckpt):
    net = mlp()
    other = copy.deepcopy(net)
    x = torch.randn(4, 8)
    for _ in range(2):
        ckpt(net, x).sum().backward()
        other(x).sum().backward()
    assert_bit_equal([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])


def test_backward_with_inputs_leaves_the_others_alone(ckpt):
    net, x = mlp(), torch.randn(4, 8, requires_grad=True)
    ckpt(net, x).sum().backward(inputs=[x])
    assert x.grad is not None and all(p.grad is None for p in net.parameters())


def test_retained_graph_gives_the_same_gradients_again(ckpt):
    net, x = mlp(dropout=0.5), torch.randn(4, 8, requires_grad=True)
    loss = ckpt(net, x).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    second = torch.autograd.grad(loss, x)
    assert_bit_equal(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


def test_two_outputs_can_be_differentiated_one_after_the_other(ckpt):
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    a, b = ckpt(lambda t: (t.sin().exp(), t.cos().exp()), x)
    a.sum().backward()
    b.sum().backward()
    expected = torch.autograd.grad((x.sin().exp() + x.cos().exp()).sum(), x)[0]
    assert_same_function(x.grad, expected)


def test_double_backward(ckpt):
    def func(t):
        return (t.sin() * t).exp()

    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: ckpt(func, t), x)
    (slope,) = torch.autograd.grad(ckpt(func, x).sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(curve.sum(), x)
    (slope,) = torch.autograd.grad(func(x).sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    assert torch.equal(third, torch.autograd.grad(curve.sum(), x)[0])


def test_saved_attributes_can_be_read_outside_of_backward(ckpt):
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    out = ckpt(lambda t: t.sin().exp(), x)
    saved = out.grad_fn._saved_result
    assert_same_function(saved, x.sin().exp())
    out.sum().backward()
    assert x.grad is not None


def test_works_with_anomaly_detection_and_tensor_hooks(ckpt):
    x = torch.randn(4, requires_grad=True)
    seen = []
    with torch.autograd.detect_anomaly(check_nan=False):
        out = ckpt(lambda t: t.sin().exp(), x)
        out.register_hook(lambda g: seen.append(g))
        out.sum().backward()
    assert len(seen) == 1 and x.grad is not None


def test_offloaded_inputs(ckpt):
    """The user's own saved-tensor hooks around a checkpoint see its inputs, and nothing else."""
    if ckpt is torchs and TORCH < (2, 13):
        pytest.skip("torch 2.11's own checkpoint shows such hooks an empty tensor too")
    packed = []
    x = torch.randn(4, requires_grad=True)
    hidden = x * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t.shape), t)[1], lambda t: t):
        out = ckpt(lambda t: t.sin().exp().sin(), hidden)
    assert packed == [(4,)]
    out.sum().backward()


def test_ddp_counts_every_parameter_once(tmp_path):
    """Reentrant checkpointing dies here with 'marked as ready twice'."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = mlp(dropout=0.5)

        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, x):
                return checkpoint(self.net, checkpoint(self.net, x))

        x = torch.randn(4, 8)
        nn.parallel.DistributedDataParallel(Twice())(x).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward-outside", "backward-inside"])
def test_our_own_autocast_is_on_again_in_backward(backward_inside):
    """A torch function mode, which backward does not see; nested, the innermost decides."""
    net, x = mlp(), torch.randn(4, 8, requires_grad=True)

    def func(t):
        with autocast(enabled=False):
            scale = t @ t.T
        return (net(t) * scale.sum()).float()

    def run(c):
        block = contextlib.ExitStack()
        with block:
            block.enter_context(autocast(torch.bfloat16))
            loss = c(func, x).sum()
            if not backward_inside:
                block.close()
            return torch.autograd.grad(loss, [x, *net.parameters()])

    assert_bit_equal(run(checkpoint), run(plain))


def test_the_default_device_is_set_again_in_backward():
    x = torch.randn(4, requires_grad=True)
    seen = []
    with torch.device("meta"):
        out = checkpoint(lambda t: (seen.append(torch.ones(1).device.type), t.sin().exp())[1], x)
    out.sum().backward()
    assert seen == ["meta", "meta"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_dropout_and_autocast(ckpt):
    net = mlp(dropout=0.5).cuda()
    x = torch.randn(4, 8, device="cuda", requires_grad=True)

    def run(c):
        with torch.autocast("cuda", torch.float16):
            return c(net, x).float().sum()

    assert_bit_equal(gradients(lambda: run(ckpt), [x]), gradients(lambda: run(plain), [x]))


@pytest.mark.parametrize("func", [None, 3, torch.randn(2)], ids=["none", "number", "tensor"])
def test_a_function_that_cannot_be_called_is_refused(func):
    with pytest.raises(TypeError, match="func must be callable"):
        checkpoint(func, torch.randn(2))
