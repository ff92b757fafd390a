"""Checkers of kernel exercises cannot be fooled, and refuse no right answer: torch, launches, addresses, races."""

import inspect
import re

import lesson_kernels as kernels
import pytest
import torch
from handtuned.kernels import runtime
from handtuned.lessons import exercises_of, step
from handtuned.lessons.canaries import guarded
from handtuned.lessons.exercise import WrongAnswer, verdict
from handtuned.lessons.watch import launched
from torch.utils._python_dispatch import _disable_current_modes

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs Triton's interpreter")


def judged(key, candidate):
    return verdict(exercises_of(key[:2])[key], candidate)


@pytest.mark.parametrize("key", kernels.IN_TORCH)
def test_plain_torch_is_refused(key):
    right, message = judged(key, kernels.IN_TORCH[key])
    assert not right and "torch itself computes here" in message, message


@pytest.mark.parametrize("key", kernels.IN_TORCH)
def test_numpy_is_refused(key):
    """Out of sight of what watches torch; and once more beside a kernel that does nothing."""

    def unseen(*args):
        with _disable_current_modes():
            return kernels.IN_TORCH[key](*args)

    right, message = judged(key, unseen)
    assert not right and re.search(r"[Nn]o kernel was launched|launched no kernel", message), message

    def with_a_launch(*args):
        kernels.idle_kernel[(1,)](torch.zeros(1))
        return unseen(*args)

    right, message = judged(key, with_a_launch)
    assert not right, "a launch that does nothing is no answer"
    assert re.search(r"not by a kernel|[Nn]o kernel|no program wrote|by no kernel|torch itself", message), message


def test_every_kernel_exercise_is_tried_with_torch():
    """Whatever the ladder gains must stand in the table above."""
    found = set()
    for lesson in ("02", "03", "07", "09", "10"):
        for key, exercise in exercises_of(lesson).items():
            if re.search(r"launched\(|watched\(", inspect.getsource(exercise.checker)):
                found.add(key)
    assert found <= kernels.IN_TORCH.keys() | {"03.4"}, found - kernels.IN_TORCH.keys()


@pytest.mark.parametrize("key", kernels.UNUSUAL)
def test_an_unusual_right_answer_passes(key):
    right, message = judged(key.split(",")[0], kernels.UNUSUAL[key])
    assert right, message


@pytest.mark.parametrize(
    "key, candidate, phrase",
    [
        ("02.1", kernels.axpy_of(16384), "read past its end"),
        ("02.1", kernels.axpy_of(1 << 20), "read past its end"),
        ("02.1", kernels.copied_after_numpy, "No kernel read x"),
        ("02.1", kernels.without_grid, "called without a grid"),
        ("02.1", kernels.grid_of_a_number, "The grid is a tuple"),
        ("02.1", kernels.one_element_short, "no program wrote element [63]"),
        ("02.1", kernels.into_its_input, "was written to, but it is an input"),
        ("02.1", kernels.mistyped, "line"),
        ("02.2", kernels.silu_backward(0, programs=1, block=1024), "no program wrote element [1024]"),
        ("02.2", kernels.silu_backward(1), "exp(x) is infinite from 89 on"),
        ("02.3", kernels.softmax(block=1024), "BLOCK is a power of two and N or more"),
        ("02.3", kernels.softmax(divided=False), "Divide by the sum"),
        ("02.3", kernels.before_the_beginning, "read before its beginning"),
        ("02.4", kernels.no_block, "arange"),
        ("02.6", kernels.rounded_before_the_store, "rounded to FP16 for the store"),
    ],
)
def test_a_further_wrong_answer_is_refused(key, candidate, phrase):
    right, message = judged(key, candidate)
    assert not right and phrase in message, message


def test_an_error_in_a_kernel_names_its_own_line():
    message = judged("02.1", kernels.mistyped)[1]
    line = next(n for n, text in enumerate(inspect.getsource(kernels).splitlines(), 1) if "missing_name" in text)
    assert f"NameError: name 'missing_name' is not defined, line {line}: `" in message


def test_a_launch_without_checker_ends_in_the_kernels_line():
    """What the reader's traceback ends in, when a kernel is launched in a cell of its own."""
    with pytest.raises(NameError) as caught:
        kernels.mistyped(1.0, torch.ones(4), torch.ones(4), torch.ones(4))
    own = [entry for entry in caught.traceback if str(entry.path) == kernels.__file__]
    assert "missing_name" in str(own[-1].statement)


def test_far_addresses_stop_before_memory_is_touched():
    out = guarded(10)
    with pytest.raises(WrongAnswer, match="x was read past its end: element"):
        launched(kernels.far, out, inputs={"x": out})


def test_a_checked_kernel_sees_strided_arguments():
    x, out = torch.arange(12.0).view(3, 4)[:, ::2], guarded((3, 2))
    watch = launched(kernels.copy_strided, x, out, outputs={"out": out})
    assert watch.launches == ["copy_strided_kernel"] and watch.loads == watch.stores == 6
    assert torch.equal(out, x)


LADDER = ["02.4", "02.5", "02.6", "02.7", "02.8", "03.3", "03.4", "07.3", "07.5", "07.6", "09.3", "09.4", "09.5"]


@pytest.mark.parametrize("key", LADDER)
def test_forty_lines_are_enough(key):
    """Kernel and launcher of the solution, without lines that only tell the wrong answers from it."""
    solution = exercises_of(key[:2])[key].solution
    launchers = [solution.__code__, *(c for c in solution.__code__.co_consts if inspect.iscode(c))]
    names = {name for code in launchers for name in code.co_names}
    module = inspect.getmodule(solution)
    used = [getattr(module, name) for name in names if hasattr(getattr(module, name, None), "rewrite")]
    helpers = [getattr(module, name) for name in names if inspect.isfunction(getattr(module, name, None))]
    for helper in helpers:
        used += [getattr(module, n) for n in helper.__code__.co_names if hasattr(getattr(module, n, None), "rewrite")]
    texts = [inspect.getsource(function.fn) for function in used] + [inspect.getsource(f) for f in (solution, *helpers)]
    assert used and sum(len(text.splitlines()) for text in texts) <= 40


def test_step_of_a_solution():
    """The last rung but one can be stepped through as well."""
    (M, K), N = (18, 20), 17
    x, W, y = torch.randn(M, K), torch.randn(N, K), torch.empty(M, N)
    S, B = torch.randn(M, 3), torch.randn(N, 3)
    from handtuned.lessons.exercises import e07_kernels

    strides = (*x.stride(), *W.stride(), *S.stride(), *B.stride())
    taken = step(
        e07_kernels._fused_kernel, (2, 2), x, W, S, B, y, 0.5, M, N, K, 3, *strides, BLOCK=16, BLOCK_R=16, FORM=0
    )
    assert not taken.error and len({s.program for s in taken.steps}) == 4
    assert torch.allclose(y, x @ W.t() + 0.5 * S @ B.t(), atol=1e-4)
