"""Lesson 05: recomputing instead of keeping."""

import math
from itertools import pairwise

import torch
from torch import nn

from ...nn.checkpoint import CheckpointError, checkpoint, manual_checkpoint_forward
from ...nn.live_memory import LiveMemory
from ..exercise import Exercise, WrongAnswer, expect, number


def _peak(layers, groups, boundary, inside):
    return groups * boundary + math.ceil(layers / groups) * inside


def _best_groups(layers, boundary, inside):
    return min(range(1, layers + 1), key=lambda k: _peak(layers, k, boundary, inside))


def _check_best_groups(candidate):
    cases = [(32, 2, 114), (16, 1, 1), (9, 1, 1), (12, 3, 1), (1, 1, 5), (20, 1, 3)]
    cases += [(layers, b, i) for layers in (7, 13, 24, 31) for b in (1, 2, 5) for i in (1, 3, 10, 60)]
    for layers, boundary, inside in cases:
        got = number(candidate(layers, boundary, inside), "best_groups", "whole number")
        if not (1 <= got <= layers and got == int(got)):
            raise WrongAnswer(f"{layers} layers can be cut into 1 to {layers} groups, got {got!r}")
        least = _peak(layers, _best_groups(layers, boundary, inside), boundary, inside)
        found = _peak(layers, got, boundary, inside)
        if found != least:
            raise WrongAnswer(
                f"{layers} layers with boundary {boundary} and inside {inside}: {got} groups peak at {found} "
                f"(the largest has {math.ceil(layers / got)} layers), but {least} is possible. No formula rounds its "
                "way to it: compare all numbers of groups"
            )
    return f"tried {len(cases)} stacks, from 1 to 32 layers; any number of groups with the least peak is right"


class _MyCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, func, *inputs):
        ctx.func = func
        ctx.state = torch.get_rng_state()
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return func(*inputs)

    @staticmethod
    def backward(ctx, *grad_outputs):
        inputs = [x.detach().requires_grad_(True) for x in ctx.saved_tensors]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.state)
            outputs = ctx.func(*inputs)
        torch.autograd.backward(outputs, grad_outputs)
        return None, *(x.grad for x in inputs)


def _my_checkpoint(func, *args):
    return _MyCheckpoint.apply(func, *args)


class _GeneratorLeftBehind(_MyCheckpoint):
    @staticmethod
    def backward(ctx, *grad_outputs):
        inputs = [x.detach().requires_grad_(True) for x in ctx.saved_tensors]
        with torch.enable_grad():
            torch.set_rng_state(ctx.state)
            outputs = ctx.func(*inputs)
        torch.autograd.backward(outputs, grad_outputs)
        return None, *(x.grad for x in inputs)


def _gradients(run, module, inputs):
    module.zero_grad(set_to_none=True)
    inputs = [x.detach().requires_grad_() for x in inputs]
    torch.manual_seed(5)
    out = run(module, *inputs)
    tensor = isinstance(out, torch.Tensor)
    expect(tensor, f"The result of func, a tensor, should be returned, got {'None' if out is None else type(out)}.")
    expect(out.requires_grad, "The result has no gradient: apply an autograd Function, .apply(func, *args).")
    torch.rand(2)  # someone draws between forward and backward
    out.square().sum().backward()
    return out.detach(), [t.grad for t in (*inputs, *module.parameters())], torch.rand(3)


class _Mixed(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.one, self.two, self.dropout = nn.Linear(7, 33), nn.Linear(33, 7), nn.Dropout(dropout)

    def forward(self, x, y):
        return self.two(self.dropout(torch.tanh(self.one(x * y)))) + y


def _check_my_checkpoint(candidate):
    torch.manual_seed(1)
    x, y = torch.randn(131, 7), torch.randn(131, 7)
    for dropout in (0.0, 0.5):
        module = _Mixed(dropout)
        what = "with dropout" if dropout else "without dropout"
        expected, expected_grads, expected_next = _gradients(lambda f, *a: f(*a), module, (x, y))
        got, grads, following = _gradients(candidate, module, (x, y))
        if not torch.equal(got, expected):
            raise WrongAnswer(f"{what} the result itself differs, by up to {(got - expected).abs().max():.2g}")
        names = "x", "y", *dict(module.named_parameters())
        for name, found, wanted in zip(names, grads, expected_grads, strict=True):
            if found is None or not torch.allclose(found, wanted, rtol=1e-5, atol=1e-6):
                off = float("nan") if found is None else (found - wanted).norm() / wanted.norm()
                error = "it is None" if found is None else f"relative error {off:.0%}"
                raise WrongAnswer(f"{what} the gradient of {name} is wrong: {error}")
        if not torch.equal(following, expected_next):
            raise WrongAnswer(
                f"{what} gradients are right, but the random numbers after backward are not those after a plain run: "
                "the recomputation must put the generator back to where it was"
            )
    leaf = x.requires_grad_()
    with LiveMemory("cpu", scan=False) as live:
        out = candidate(module, leaf, y)
    if live.added > 3 * out.nbytes + 6000:  # the generator's state has 5056 bytes
        raise WrongAnswer(
            f"{live.added:,} bytes stay after forward, the result has {out.nbytes:,}: the inside of func was kept"
        )
    return "tried a module of two inputs without and with dropout: result, gradients, random numbers, bytes kept"


def _groups(layers, groups):
    edges = [len(layers) * i // groups for i in range(groups + 1)]
    return [layers[start:stop] for start, stop in pairwise(edges)]


def _run(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def _run_in_groups(layers, x, groups):
    for group in _groups(list(layers), groups):
        x = checkpoint(_run, group, x)
    return x


def _tail_dropped(layers, x, groups):
    length = len(layers) // groups
    for i in range(groups):
        x = checkpoint(_run, list(layers)[i * length : (i + 1) * length], x)
    return x


def _one_per_layer(layers, x, groups):
    for layer in layers:
        x = checkpoint(layer, x)
    return x


def _late_binding(layers, x, groups):
    for group in _groups(list(layers), groups):
        x = checkpoint(lambda x: _run(group, x), x)  # noqa: B023 the mistake that is meant
    return x


def _check_run_in_groups(candidate):
    torch.manual_seed(2)
    for count, groups in ((6, 3), (7, 3), (8, 3), (5, 5), (4, 1)):
        blocks = (nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48), nn.GELU()) for _ in range(count))
        layers = nn.ModuleList(blocks)
        x = torch.randn(64, 48, requires_grad=True)
        what = f"{count} layers in {groups} groups"
        expected = _run(layers, x)
        wanted = torch.autograd.grad(expected.square().sum(), [x, *layers.parameters()])
        with LiveMemory("cpu", scan=False) as live:
            got = candidate(layers, x, groups)
        expect(isinstance(got, torch.Tensor), f"{what}: return the last layer's result, a tensor, got {type(got)}.")
        if got.shape != expected.shape or not torch.equal(got, expected):
            raise WrongAnswer(f"{what}: the result differs from running all {count} layers one after the other")
        small = 2**14  # generator states
        if live.added > groups * (x.nbytes + small):
            raise WrongAnswer(
                f"{what}: {live.added:,} bytes stay after forward; a boundary has {x.nbytes:,}, "
                f"so {groups} of them were expected"
            )
        again = []
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, i=i, again=again: again.append(i))
        try:
            found = torch.autograd.grad(got.square().sum(), [x, *layers.parameters()], allow_unused=True)
        except CheckpointError as error:
            raise WrongAnswer(f"{what}: the result is right, but which layers ran again? {error}") from None
        for name, f, w in zip(("x", *dict(layers.named_parameters())), found, wanted, strict=True):
            if f is None or not torch.allclose(f, w, rtol=1e-5, atol=1e-6):
                raise WrongAnswer(
                    f"{what}: the result is right, but the gradient of {name} is wrong; which layers ran again?"
                )
        starts = [n for n, i in enumerate(again) if n == 0 or i != again[n - 1] + 1]
        lengths = [stop - start for start, stop in pairwise([*starts, len(again)])][::-1]
        if len(lengths) != groups or max(lengths) - min(lengths) > 1:
            raise WrongAnswer(
                f"{what}: backward ran groups of {lengths} layers again; there must be {groups}, and their lengths may "
                "differ by at most one"
            )
    return "tried 5 stacks, tails among them: result, gradients, bytes kept, and which layers ran again"


EXERCISES = {
    "05.1": Exercise(
        title="The best number of groups",
        specification="best_groups(layers, boundary, inside) → k with the least k·boundary + ceil(layers / k)·inside",
        checker=_check_best_groups,
        solution=_best_groups,
        wrong={
            "always √n": (lambda n, b, i: round(math.sqrt(n)), "32 layers"),
            "always every layer": (lambda n, b, i: n, "16 layers"),
            "a rounded root": (lambda n, b, i: max(1, min(n, round(math.sqrt(n * i / b)))), "20 layers"),
            "rounded down": (lambda n, b, i: min(range(1, n + 1), key=lambda k: k * b + n // k * i), "the largest has"),
        },
        hints=(
            "There are at most as many groups as layers: try them all.",
            "If k does not divide the number of layers, the largest group decides: math.ceil.",
        ),
    ),
    "05.2": Exercise(
        title="A checkpoint that gets dropout right",
        specification="my_checkpoint(func, *args): keep nothing from inside func, recompute it in backward",
        checker=_check_my_checkpoint,
        solution=_my_checkpoint,
        wrong={
            "nothing recomputed": (lambda func, *args: func(*args), "was kept"),
            "another dropout mask": (manual_checkpoint_forward, "with dropout the gradient"),
            "generator not put back": (_GeneratorLeftBehind.apply, "random numbers after"),
        },
        hints=(
            "Begin with the autograd function that the lesson shows; torch.get_rng_state() belongs into its forward.",
            "In backward, torch.random.fork_rng(devices=[]) puts the generator back when its block ends.",
        ),
    ),
    "05.3": Exercise(
        title="Checkpoints around groups of layers",
        specification="run_in_groups(layers, x, groups): each group of layers one handtuned.nn.checkpoint",
        checker=_check_run_in_groups,
        solution=_run_in_groups,
        wrong={
            "last layers lost": (_tail_dropped, "7 layers in 3 groups: the result differs"),
            "one checkpoint per layer": (_one_per_layer, "groups of [1, 1, 1, 1, 1, 1] layers"),
            "late binding": (_late_binding, "which layers ran again"),
        },
        hints=(
            "len(layers) * i // groups, for i from 0 to groups, are the edges of groups that differ by at most one.",
            "A lambda in a loop sees the loop variable's last value when it runs again in backward: "
            "pass the group as an argument.",
        ),
    ),
}
