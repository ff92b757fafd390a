"""When tensors die: checkpoint keeps nothing from inside, and backward lets go of what it has used."""

import gc
import weakref

import pytest
import torch
from checkpoint_pair import torchs
from handtuned.nn.checkpoint import checkpoint


@pytest.fixture(params=[torchs, checkpoint], ids=["torch", "ours"])
def ckpt(request):
    return request.param


def test_forward_keeps_nothing_from_inside(ckpt):
    x = torch.randn(1237, requires_grad=True)
    inside = []

    def func(t):
        for _ in range(5):
            t = t.sin()
            inside.append(weakref.ref(t))
        return t

    out = ckpt(func, x)
    gc.collect()
    assert [ref() is None for ref in inside] == [True] * 4 + [False]
    del out


def test_backward_releases_what_it_has_used(ckpt):
    """Each sine's input is freed once its gradient is done: two live tensors fewer at every step back."""
    alive = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.append(sum(ref() is not None for ref in kept))
            return grad

    kept = []

    def func(t):
        kept.clear()
        for _ in range(5):
            t = Watch.apply(t)
            kept.append(weakref.ref(t.untyped_storage()))
            t = t.sin()
        return t

    ckpt(func, torch.randn(1237, requires_grad=True)).sum().backward()
    assert alive == [4, 3, 2, 1, 0]
    assert not any(ref() is not None for ref in kept)


def test_a_region_and_its_input_go_as_soon_as_backward_is_through_with_it(ckpt):
    boundaries, alive = [], []

    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.extend(ref() is not None for ref in boundaries)
            return grad

    x = First.apply(torch.randn(16, requires_grad=True))
    for _ in range(4):
        x = ckpt(lambda t: t.sin().exp(), x)
        boundaries.append(weakref.ref(x.untyped_storage()))
    loss = x.sum()
    del x
    loss.backward()
    assert alive == [False] * 4


def test_a_partial_backward_leaves_nothing_behind():
    refs = []

    def func(t):
        refs.clear()
        first = t.sin()
        second = first.exp()
        refs.extend(weakref.ref(s.untyped_storage()) for s in (first, second))
        return first.cos(), second.cos()

    x = torch.randn(16, requires_grad=True)
    a, b = checkpoint(func, x)
    torch.autograd.grad(a.sum(), x, retain_graph=True)
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert torch.equal(torch.autograd.grad(b.sum(), x)[0], torch.autograd.grad(x.sin().exp().cos().sum(), x)[0])


def test_inner_inputs_are_forgotten_by_the_outer_checkpoint(ckpt):
    storages = []

    def outer(t):
        hidden = t.sin()
        storages.append(weakref.ref(hidden.untyped_storage()))
        return ckpt(lambda pair: pair[0].exp().sin(), (hidden,) if ckpt is checkpoint else [hidden])

    out = ckpt(outer, torch.randn(16, requires_grad=True))
    gc.collect()
    if ckpt is checkpoint:
        assert storages[0]() is None, "a tensor inside a tuple argument is kept alive"
    out.sum().backward()
