"""What torch's own checkpoint takes or refuses: operations that fill what they saved, changes in place, keywords."""

import pytest
import torch
import torch.nn.functional as F
from autocast_ops import OPS
from handtuned.nn import CheckpointedTransformerLayer, checkpoint, checkpoint_sequential
from handtuned.nn.checkpoint import CheckpointError
from torch import nn
from torch.utils.checkpoint import noop_context_fn


def run(function, call=lambda f, *args, **keywords: f(*args, **keywords), seed=0, **keywords):
    """Output, and gradient of x."""
    torch.manual_seed(seed)
    x = torch.randn(4, 3, 5).requires_grad_()
    y = call(function, x, **keywords)
    y.square().sum().backward()
    return y.detach(), x.grad


def in_two(x):
    return checkpoint(lambda x: F.rrelu(x, training=True), x.sin())


FILL_AFTER_SAVING = {
    "last": lambda x: F.rrelu(x, training=True),
    "then others that save nothing": lambda x: (F.rrelu(x.sin(), training=True) + 1).transpose(0, 1),
    "then others that save": lambda x: F.rrelu(x, training=True).exp() * 2,
    "twice": lambda x: F.rrelu(F.rrelu(x, training=True), training=True),
    "in place": lambda x: F.rrelu(x * 1, training=True, inplace=True),
    "module": nn.RReLU(),
    "bf16": lambda x: F.rrelu(x.bfloat16(), training=True).float(),
    "nested": in_two,
    "with dropout": lambda x: F.dropout(F.rrelu(x, training=True), 0.5),
}


@pytest.mark.parametrize("name", FILL_AFTER_SAVING)
def test_what_an_operation_fills_after_saving_it_is_filled(name):
    """The tests poison fresh memory with NaN, so what was handed out empty shows."""
    function = FILL_AFTER_SAVING[name]
    for got, want in zip(run(function, checkpoint), run(function), strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPS)
def test_every_operation(name):
    def results(call):
        torch.manual_seed(0)
        x, y = (torch.rand(4, 4).add(0.1).requires_grad_() for _ in range(2))
        try:
            result = call(OPS[name], x * 0.9, y * 0.9)
            gradients = torch.autograd.grad(result.square().sum(), (x, y), allow_unused=True)
        except RuntimeError as error:  # two of the list are not differentiable in their second argument
            return [str(error)]
        return [result.detach(), *(torch.zeros(4, 4) if g is None else g for g in gradients)]

    got, want = results(checkpoint), results(lambda f, *args: f(*args))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one == other if isinstance(other, str) else torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def test_transforms_are_refused():
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.vmap(lambda x: checkpoint(torch.sin, x))(torch.ones(2, 3, requires_grad=True)).sum().backward()


def test_the_recomputation_still_stops_before_the_last_product():
    """Only an operation that may have to fill what it has saved is waited for."""
    frozen, calls = nn.Linear(5, 5).requires_grad_(False), []

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 5, requires_grad=True)
    y = checkpoint(lambda x: frozen(frozen(x).relu()), x)
    with Counted():
        y.sum().backward()
    assert sum("mm" in name for name in calls) == 1 + 2  # one product again, two of backward


def spoiled(change):
    def function(x):
        h = x.sin()
        k = h * h
        change(h)
        return k.exp()

    return function


@pytest.mark.parametrize("change", [lambda h: h.mul_(2), lambda h: h[0].zero_(), lambda h: h.view(-1).add_(1),
                                    lambda h: F.relu_(h.detach()), lambda h: h.copy_(h.detach() + 1)])  # fmt: skip
def test_a_saved_tensor_changed_in_place_is_refused(change):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(spoiled(change))
    with pytest.raises(CheckpointError, match=r"saved tensor #\d of .*function.* modified by an inplace operation"):
        run(spoiled(change), checkpoint)


@pytest.mark.parametrize("function", [
    lambda x: (x * 1).exp_().mul(2), lambda x: torch.relu_(x * 1).sin(), lambda x: F.dropout(x * 1, 0.5, inplace=True),
    lambda x: x.sin().add_(1).tanh_(), lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), training=True),
])  # fmt: skip
def test_changes_in_place_that_autograd_allows_are_allowed(function):
    for got, want in zip(run(function, checkpoint), run(function), strict=True):
        assert torch.equal(got, want)


def counting(x, *, calls, options):
    calls.add_(1)
    options["seen"].mul_(2)
    return x.sin().exp()


@pytest.mark.parametrize("case", ["instance norm", "batch norm", "counter"])
def test_keywords_that_the_function_updates(case):
    def keywords():
        if case == "counter":
            return {"calls": torch.zeros(()), "options": {"seen": torch.ones(2)}}
        return {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}

    function = {"instance norm": F.instance_norm, "batch norm": lambda x, **k: F.batch_norm(x, training=True, **k)}
    function = function.get(case, counting)
    for got, want in zip(run(function, checkpoint, **keywords()), run(function, **keywords()), strict=True):
        assert torch.equal(got, want)


def test_a_keyword_changed_after_autograd_saved_it_is_refused():
    def function(x, scale):
        y = x * scale
        scale.mul_(2)
        return y

    for call in (lambda f, x, **k: f(x, **k), checkpoint):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(function, call, scale=torch.ones(5))
    scale = torch.ones(5)
    x = torch.ones(5, requires_grad=True)
    y = checkpoint(lambda x, scale: x * scale, x, scale=scale)
    scale.mul_(2)  # by somebody else
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def bare(x):
    try:
        return x.sin().exp().cos()
    except:  # noqa: E722
        return (x * 2).exp().sin() * x


def base(x):
    for _ in range(2):
        try:
            y = x.sin().exp()
        except BaseException:
            y = x * 3
    return y


@pytest.mark.parametrize("function", [bare, base])
def test_the_early_stop_may_be_caught(function):
    for got, want in zip(run(function, checkpoint), run(function), strict=True):
        assert torch.equal(got, want)


OFFSETS = torch.tensor([0, 5, 12])
LAYOUTS = {
    "coo": lambda x: torch.sparse.mm(torch.eye(4).to_sparse(), x[:, :, 0]).sin(),
    "csr": lambda x: (torch.eye(4).to_sparse_csr() @ x[:, :, 0]).sin(),
    "strided views": lambda x: x.transpose(0, 2).unfold(0, 2, 1).exp(),
    "jagged": lambda x: torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), OFFSETS).sin().exp().values(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("check", ["default", "none"])
def test_layouts(layout, check):
    function = LAYOUTS[layout]
    got = run(function, lambda f, x: checkpoint(f, x, determinism_check=check))
    for one, other in zip(got, run(function), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("keywords", [
    {"use_reentrant": False}, {"use_reentrant": None}, {"debug": False}, {"context_fn": noop_context_fn},
    {"determinism_check": "default"}, {"determinism_check": "none"}, {"early_stop": True}, {"early_stop": False},
    {"preserve_rng_state": True},
])  # fmt: skip
def test_torch_s_keywords_that_mean_what_is_done_here(keywords):
    function = FILL_AFTER_SAVING["with dropout"]
    got = run(function, lambda f, x: checkpoint(f, x, **keywords))
    for one, other in zip(got, run(function), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("keywords", [
    {"use_reentrant": True}, {"debug": True}, {"context_fn": lambda: (None, None)}, {"determinism_check": "values"},
])  # fmt: skip
def test_others_are_refused_by_name(keywords):
    with pytest.raises(ValueError, match=f"{next(iter(keywords))} must be"):
        checkpoint(torch.sin, torch.ones(2, requires_grad=True), **keywords)


def test_checkpoint_sequential_in_torch_s_order():
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4)))
    theirs = lambda x: torch.utils.checkpoint.checkpoint_sequential(layers, 2, x, use_reentrant=False)  # noqa: E731
    want = run(theirs)
    for call in (lambda x: checkpoint_sequential(layers, 2, x, use_reentrant=False, preserve_rng_state=False),
                 lambda x: checkpoint_sequential(layers, x, 2)):  # fmt: skip
        for one, other in zip(run(call), want, strict=True):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match="use_reentrant must be"):
        checkpoint_sequential(layers, 2, torch.ones(5, requires_grad=True), use_reentrant=True)


def test_without_a_check_another_dtype_is_taken():
    calls = []

    def function(x):
        calls.append(1)
        return (x.double() if len(calls) > 1 else x).exp().float()

    with pytest.raises(CheckpointError, match="recomputed with"):
        run(function, checkpoint)
    calls.clear()
    run(function, lambda f, x: checkpoint(f, x, determinism_check="none"))


def test_early_stop_can_be_left_out():
    ends = []

    def function(x):
        y = x.sin() + 1
        ends.append(1)
        return y

    run(function, checkpoint)
    assert len(ends) == 1
    run(function, lambda f, x: checkpoint(f, x, early_stop=False))
    assert len(ends) == 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("keywords", [{}, {"preserve_rng_state": False, "use_reentrant": False}])
def test_under_torch_compile(backend, keywords):
    layers = nn.Sequential(nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 5))
    for module in (layers, CheckpointedTransformerLayer(8, 2, 16)):
        x = torch.randn(2, 5, 5 if module is layers else 8, requires_grad=True)
        function = (lambda x: checkpoint(layers, x, **keywords) * 2) if module is layers else module
        torch._dynamo.reset()
        (got,) = torch.autograd.grad(torch.compile(function, backend=backend)(x).square().sum(), x)
        (want,) = torch.autograd.grad(function(x).square().sum(), x)
        torch.testing.assert_close(got, want)
