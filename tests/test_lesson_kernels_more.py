"""Kernel exercises: other means of Triton are right; what fits the shown cases alone is not, with the true reason."""

import functools
import inspect

import lesson_kernels_more as more
import pytest
import torch
from handtuned.kernels import runtime
from handtuned.lessons import exercises_of, guards
from handtuned.lessons.exercise import NEAR, verdict
from handtuned.lessons.exercises import e10_layer
from handtuned.lessons.exercises.e07_layer import LoRA

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs Triton's interpreter")


def judged(key, candidate):
    return verdict(exercises_of(key[:2])[key], candidate)


def rows_of_b(a, b, scale, c, found_inf):
    """Takes the rows of b to lie one after the other."""
    more.scaled(0)(a, b.as_strided(b.shape, (b.shape[1], 1)), scale, c, found_inf)


class Wide(more.Scaled):
    @staticmethod
    def forward(ctx, a, b, scale):
        ctx.given = a, b, scale
        c, flag = torch.empty(a.shape[0], b.shape[1]), torch.zeros(1)
        more.scaled(0)(a, b, scale, c, flag)
        return c, flag


class FlagLost(more.Scaled):
    @staticmethod
    def forward(ctx, a, b, scale):
        return more.Scaled.forward(ctx, a, b, scale)[0], torch.zeros(1)


class DenseOnce(LoRA):
    """Keeps the dense weight of each q for ever."""

    dense = staticmethod(functools.cache(e10_layer._dense))

    @staticmethod
    def forward(ctx, x, q, A, B, scale):
        return LoRA.forward(ctx, x, DenseOnce.dense(q), A, B, scale)


RIGHT = {
    "02.1, one program": lambda a, x, y, out: more.axpy(block=runtime.triton.next_power_of_2(len(x)))(a, x, y, out),
    "02.1, autotuned": more.tuned,
    "02.1, descriptors": more.by_descriptors,
    "02.3": more.online,
    "02.6, atomics along K": more.product(0),
    "02.6, all of K in one tile": more.in_one_tile,
    "03.3": more.unscale(0),
    "03.4": more.scaled(0),
    "03.5": lambda a, b, scale: list(more.Scaled.apply(a, b, scale)),
    "07.3": more.down(0),
    "09.3": more.shifted(),
    "09.5": more.nearest,
}


@pytest.mark.parametrize("key", RIGHT)
def test_a_right_answer_of_unusual_shape_passes(key):
    right, message = judged(key.split(",")[0], RIGHT[key])
    assert right, message


@pytest.mark.parametrize(
    "key, candidate, phrase",
    [
        ("02.1", more.axpy(programs=1, block=1024), "no program wrote element [1024]"),
        ("02.1", more.axpy(programs=16), "no program wrote element [1024]"),
        ("02.1", more.axpy(factor=3.0), "Here a is -0.5"),
        ("02.1", more.axpy(1), NEAR),
        ("02.1", more.axpy_kernel, "Pass the function that launches your kernel"),
        ("02.3", more.softmax_of_eight, "BLOCK is a power of two and N or more"),
        ("02.5", more.one_program, "no program wrote element"),
        ("02.6", more.one_short, "c (1 × 65 times 65 × 5)"),
        ("02.6", more.product(1), "a GPU need not. race"),
        ("02.6", more.product(2, 128), "The last tile of K is missing"),
        ("02.7", more.turned_by_torch, "torch itself moves the elements here (clone, line"),
        ("03.3", more.unscale(0, programs=3), "Does the grid have enough programs"),
        ("03.3", more.unscale(0, programs=1, block=1024), "Does the grid have enough programs"),
        ("03.3", lambda grad, scale, flag: more.unscale(0)(grad, 8.0, flag), "scale = 3"),
        ("03.3", more.unscale(0, block=32), "lies in several of them at once"),
        ("03.3", more.unscale(1), "The flag is 1, however many"),
        ("03.3", more.unscale(2), "They are finite, though their sum is not"),
        ("03.4", more.scaled(1), "The accumulator stays FP32 from tile to tile"),
        ("03.4", more.scaled(2), "only c is rounded to FP16"),
        ("03.4", rows_of_b, "Use a.stride() and b.stride()"),
        ("03.5", Wide.apply, "allocate it in FP16"),
        ("03.5", FlagLost.apply, "return the flag that the kernel was given"),
        ("03.5", more.OneGradient.apply, "should return da, db, got Tensor, None"),
        ("03.5", more.FlagForgotten.apply, "should return c, found_inf, got Tensor"),
        ("03.5", more.InNumpy.apply, "No kernel wrote c"),
        ("07.3", more.down(0, widest=16), "no program wrote element [0, 16]"),
        ("07.3", more.down(1), NEAR),
        ("07.5", more.sixteen_of_r, "Only 16 of r are in S Bᵀ"),
        ("07.7", more.Contiguous.apply, "dy is a transposed view"),
        ("07.7", more.OneMissing.apply, "should return dx, dA, dB, got Tensor, None, Tensor"),
        ("09.3", more.shifted(1), NEAR),
        ("10.4", DenseOnce.apply, "dequantize a second time"),
        ("09.3", more.shifted(programs=16), "no program wrote element [1024]"),
    ],
)
def test_a_wrong_answer_is_refused_with_the_true_reason(key, candidate, phrase):
    right, message = judged(key, candidate)
    assert not right and phrase in message, message


def test_an_endless_kernel_ends_in_its_own_loop(monkeypatch):
    monkeypatch.setattr(guards, "UNCOUNTED", 0.1)
    monkeypatch.setattr(guards, "MOST_STEPS", 20_000)
    right, message = judged("02.1", more.endless)
    loop = inspect.getsource(more).splitlines().index("    while start < N:") + 1
    assert not right and "endless_kernel does not end" in message
    assert any(f"line {line}:" in message for line in range(loop, loop + 3)), message
