"""checkpoint against torch's own non-reentrant checkpoint, case by case, and what it does beyond it."""

import contextlib
import copy
import gc
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from handtuned.amp.autocast import autocast
from handtuned.nn.checkpoint import CheckpointError, checkpoint, manual_checkpoint_forward, verify_recompute
from torch import nn


def torchs(func, *args, **kwargs):
    return torch.utils.checkpoint.checkpoint(func, *args, use_reentrant=False, **kwargs)


@pytest.fixture(params=[torchs, checkpoint], ids=["torch", "ours"])
def ckpt(request):
    return request.param


def plain(func, *args, preserve_rng_state=True, **kwargs):
    return func(*args, **kwargs)


def mlp(dropout=0.0):
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))


def count_calls(func):
    def counted(*args, **kwargs):
        counted.calls += 1
        return func(*args, **kwargs)

    counted.calls = 0
    return counted


def gradients(run, wrt):
    """Gradients of run() with respect to `wrt`, from a fixed seed, and the generator's state afterwards."""
    torch.manual_seed(7)
    grads = torch.autograd.grad(run(), wrt, allow_unused=True)
    return [*grads, torch.get_rng_state()]


def assert_bit_equal(ours, plain):
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


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
    x = torch.randn(4, requires_grad=True)
    a, b = ckpt(lambda t: (t.sin().exp(), t.cos().exp()), x)
    a.sum().backward()
    b.sum().backward()
    expected = torch.autograd.grad((x.sin().exp() + x.cos().exp()).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


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


def test_changed_values_are_named_on_request():
    noise = random.Random(0)

    def func(t):
        return (t.sin() * noise.random()).exp()

    x = torch.randn(4, requires_grad=True)
    checkpoint(func, x).sum().backward()
    with verify_recompute():
        out = checkpoint(func, x)
        same = checkpoint(lambda t: F.dropout(t.sin()).log().exp(), x)  # holds NaN, and 0-d tensors are fine too
        same = same.sum() + checkpoint(torch.exp, x.sum())
    with pytest.raises(CheckpointError, match=r"#1 .* recomputed with other values"):
        out.sum().backward()
    same.backward()


def test_a_parameter_stepped_before_backward_is_refused():
    net, x = mlp(), torch.randn(4, 8)
    out = checkpoint(net, x)
    with torch.no_grad():
        net[3].weight.add_(1)
    with pytest.raises(CheckpointError, match=r"shape \(8, 16\) .* modified in place"):
        out.sum().backward()


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


def test_saved_attributes_can_be_read_outside_of_backward(ckpt):
    x = torch.randn(4, requires_grad=True)
    out = ckpt(lambda t: t.sin().exp(), x)
    saved = out.grad_fn._saved_result
    torch.testing.assert_close(saved, x.sin().exp())
    out.sum().backward()
    assert x.grad is not None


def test_a_function_may_read_its_saved_tensors_twice():
    """torch's own refuses this; here the second reading recomputes."""
    x = torch.randn(4, requires_grad=True)
    checkpoint(lambda t: Exponential.apply(t.sin()).sin(), x).sum().backward()
    expected = torch.autograd.grad(x.sin().exp().sin().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


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


def test_an_argument_list_is_not_appended_to_twice():
    x, record = torch.randn(4, requires_grad=True), []
    checkpoint(lambda t, notes: (notes.append(1), t.sin().exp())[1], x, record).sum().backward()
    assert record == [1]


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


class TestManual:
    """The documents' Function: exact where it is exact, and where it is not."""

    def test_exact_for_an_mlp(self):
        net, x = mlp(), torch.randn(4, 8, requires_grad=True)
        expected = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
        out = manual_checkpoint_forward(net, x)
        assert torch.equal(out, net(x))
        out.square().sum().backward()
        assert_bit_equal([x.grad, *(p.grad for p in net.parameters())], expected)

    def test_exact_for_several_inputs_and_outputs(self):
        x, y = (torch.randn(3, 5, requires_grad=True) for _ in range(2))

        def func(a, b):
            return a * b.exp(), (a - b).sin()

        expected = torch.autograd.grad(sum(t.sum() for t in func(x, y)), [x, y])
        first, second = manual_checkpoint_forward(func, x, y)
        (first.sum() + second.sum()).backward()
        assert_bit_equal([x.grad, y.grad], expected)

    def test_saves_its_inputs_only(self):
        x = torch.randn(64, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            manual_checkpoint_forward(lambda t: t.sin().exp().sin(), x)
        assert len(kept) == 1 and kept[0].data_ptr() == x.data_ptr()

    def test_limit_dropout_draws_another_mask(self):
        x = torch.randn(10_000, requires_grad=True)
        wrong = manual_checkpoint_forward(lambda t: F.dropout(t, 0.5), x)
        wrong.sum().backward()
        exact = (wrong != 0).float() * 2
        error = ((x.grad - exact).norm() / exact.norm()).item()
        assert error == pytest.approx(1.0, abs=0.05), "two independent masks: |a - b|² / |b|² is 1 at p = 0.5"

    def test_limit_arguments_must_be_tensors(self):
        with pytest.raises(TypeError, match="can only save variables"):
            manual_checkpoint_forward(torch.pow, torch.randn(3, requires_grad=True), 2)

    def test_limit_arguments_must_be_floating_point(self):
        x = torch.randn(3, requires_grad=True)
        out = manual_checkpoint_forward(lambda t, i: t[i], x, torch.tensor([0, 2]))
        with pytest.raises(RuntimeError, match="floating point"):
            out.sum().backward()

    def test_limit_no_input_with_gradient_no_gradient_at_all(self):
        assert not manual_checkpoint_forward(mlp(), torch.randn(4, 8)).requires_grad

    def test_limit_autograd_grad_does_not_see_parameters(self):
        net, x = mlp(), torch.randn(4, 8, requires_grad=True)
        out = manual_checkpoint_forward(net, x).sum()
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(out, list(net.parameters()))

    def test_limit_no_double_backward(self):
        x = torch.randn(4, requires_grad=True)
        (slope,) = torch.autograd.grad(manual_checkpoint_forward(torch.exp, x).sum(), x, create_graph=True)
        assert not slope.requires_grad

    def test_limit_autocast_is_off_in_backward(self):
        seen = []

        def func(t):
            seen.append(torch.is_autocast_enabled("cpu"))
            return t.exp()

        x = torch.randn(4, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = manual_checkpoint_forward(func, x)
        out.sum().backward()
        assert seen == [True, False]
