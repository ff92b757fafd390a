"""`lessons.step` and `lessons.profile`: what they show of a launch, and that they leave Triton as it was."""

import os
import re
import sys
import types

import lesson_kernels
import pytest
import torch
import triton
from handtuned.kernels import runtime
from handtuned.kernels.runtime import tl

from handtuned import lessons
from handtuned.gpu import KernelFault

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs Triton's interpreter")


@triton.jit
def twice(x):
    return x * 2


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    total = twice(x) + tl.load(y_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, total, mask=mask)


@triton.jit
def through_a_module_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, lesson_kernels.add_up(x, 2 * x))


@triton.jit
def careless_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x / tl.sum(x, axis=0) + x.max(axis=0))


@triton.jit
def tile_kernel(a_ptr, c_ptr, SIDE: tl.constexpr):
    m, n = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    a = tl.load(a_ptr + m * SIDE + n)
    tl.store(c_ptr + m * SIDE + n, tl.dot(a, a))


@triton.jit
def column_kernel(x_ptr, out_ptr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) + tl.arange(0, BLOCK) * STRIDE
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def counter_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)


def five():
    return torch.arange(5.0), 10 * torch.arange(5.0), torch.zeros(5)


def test_step_follows_every_program_and_line():
    x, y, out = five()
    taken = lessons.step(add_kernel, (2,), x, y, out, 5, BLOCK=4)
    assert torch.equal(out, 2 * x + y), "the launch happens"
    assert taken.grid == (2, 1, 1) and taken.kernel == "add_kernel" and not taken.error
    second = taken.of(1)
    assert [step.source.split(" ")[0] for step in second] == ["offs", "mask", "x", "total", "tl.store(out_ptr"]
    offs, mask, load, total, store = second
    assert offs.changed["offs"].tolist() == [4, 5, 6, 7] and mask.changed["mask"].tolist() == [True] + [False] * 3
    assert load.changed["x"].tolist() == [4, 0, 0, 0] and total.changed["total"].tolist() == [48, 0, 0, 0]
    (access,) = load.accesses
    assert (access.kind, access.tensor, access.outside) == ("load", "x_ptr", 0)
    assert access.index.tolist() == [4, 5, 6, 7] and access.mask.tolist() == [True, False, False, False]
    assert store.accesses[0].kind == "store" and store.accesses[0].tensor == "out_ptr" and not store.changed
    lines = [step.line for step in second]
    assert lines == list(range(lines[0], lines[0] + 5)), "the kernel's own lines"


def test_step_shows_as_text_and_as_a_table():
    taken = lessons.step(add_kernel, (2,), *five(), 5, BLOCK=4)
    text = str(taken)
    assert "program (1, 0, 0)" in text and "offs = int32[4]  4 … 7" in text.replace("4 5 6 7", "4 … 7")
    assert re.search(r"load x_ptr\[4 5 6 7\], mask 1 0 0 0 \(1 of 4 elements\)", text)
    table = taken.html()
    assert table.count("<tr") == 1 + len(taken.steps) and "mask 1 0 0 0" in table


def test_step_keeps_the_first_programs_unless_asked_for_all():
    x = torch.zeros(64)
    assert {s.program[0] for s in lessons.step(add_kernel, (16,), x, x, x, 64, BLOCK=4).steps} == {0, 1, 2, 3}
    assert len({s.program for s in lessons.step(add_kernel, (16,), x, x, x, 64, programs=None, BLOCK=4).steps}) == 16


def test_step_names_what_lies_outside():
    x = torch.ones(16)
    taken = lessons.step(careless_kernel, (1,), x[:5], torch.zeros(16)[:5], BLOCK=8)
    accesses = [access for step in taken.steps for access in step.accesses]
    assert [access.outside for access in accesses] == [3, 3] and "3 OUTSIDE of it" in str(taken)


def test_step_stops_at_the_error_and_names_the_line():
    taken = lessons.step(add_kernel, (1,), torch.zeros(4), torch.zeros(4), torch.zeros(4), 4, BLOCK=3)
    assert "arange" in taken.error and re.search(r"line \d+: `offs = tl\.program_id", taken.error)
    assert taken.steps and "stopped: " in str(taken)


def test_step_of_what_is_no_interpreted_kernel():
    with pytest.raises(ValueError, match=r"kernel must be a @triton.jit function .* got function"):
        lessons.step(lambda: None, (1,))


def test_step_leaves_the_trace_function_and_the_interpreter_alone():
    from triton.runtime.interpreter import InterpreterBuilder

    before = sys.gettrace(), InterpreterBuilder.create_masked_load
    lessons.step(add_kernel, (1,), *five(), 5, BLOCK=8)
    assert (sys.gettrace(), InterpreterBuilder.create_masked_load) == before


def test_a_slider_moves_through_the_steps_where_ipywidgets_is_installed(monkeypatch):
    class Widget:
        def __init__(self, children=(), **settings):
            self.children, self.value, self.watchers = children, settings.get("min"), []
            self.__dict__.update(settings)

        def observe(self, function, name):
            self.watchers.append(function)

    widgets = types.ModuleType("ipywidgets")
    widgets.HTML = widgets.IntSlider = widgets.VBox = Widget
    widgets.jslink = None
    shown = []
    display = types.ModuleType("IPython.display")
    display.display = shown.append
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    taken = lessons.step(add_kernel, (2,), *five(), 5, BLOCK=4)
    taken._ipython_display_()
    slider, table = shown[0].children
    assert (slider.min, slider.max) == (1, len(taken.steps)) and "tl.store" not in table.value
    slider.value = len(taken.steps)
    slider.watchers[0](None)
    assert "tl.store(out_ptr" in table.value


def test_profile_counts_sectors_on_the_card_of_choice():
    x, out = torch.randn(32 * 64), torch.empty(32 * 64)
    column = lessons.profile(column_kernel, (4,), x, out, STRIDE=64, BLOCK=32, card="T4")
    assert column.launch.arch == "sm_75" and column.sectors_per_load == column.sectors_per_store == 32
    row = lessons.profile(column_kernel, (1,), x, out, STRIDE=1, BLOCK=1024, card="H100")
    assert row.launch.arch == "sm_90" and row.sectors_per_load == 4 and row.wavefronts == 0
    assert "sectors per load         4.0" in str(row) and "def column_kernel" in row.by_line()


def test_profile_counts_the_tensor_cores_share():
    a, c = torch.randn(32, 32).half(), torch.empty(32, 32)
    product = lessons.profile(tile_kernel, (1,), a, c, SIDE=32, card="A100")
    assert product.launch.counters.tensor_flops == 2 * 32**3 and product.tensor_share > 0.9
    plain = lessons.profile(add_kernel, (1,), *five(), 5, BLOCK=128)
    assert plain.tensor_share == 0
    assert torch.allclose(c, a.float() @ a.float(), atol=1e-3)


def test_profile_compiles_what_a_kernel_calls():
    """A function of the reader's, tl.sum, and a method of a block; after and before the interpreter runs them."""
    x, out, again = torch.rand(64), torch.empty(64), torch.empty(64)
    for _ in range(2):
        careless_kernel[(1,)](x, out, BLOCK=64)
        lessons.profile(careless_kernel, (1,), x, again, BLOCK=64)
        assert torch.allclose(out, again, rtol=1e-5)
    x, y, out = five()
    lessons.profile(add_kernel, (1,), x, y, out, 5, BLOCK=8)
    assert torch.equal(out, 2 * x + y)


def test_functions_of_another_module_are_compiled():
    x, out = torch.ones(32), torch.empty(32)
    lessons.profile(through_a_module_kernel, (1,), x, out, BLOCK=32)
    assert (out == 3).all()
    through_a_module_kernel[(1,)](x, out, BLOCK=32)  # and interpreted again
    assert (out == 3).all()


def test_a_kernel_within_a_function_is_compiled_too():
    @triton.jit
    def thrice(x):
        return 3 * x

    @triton.jit
    def inner(x_ptr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(x_ptr + offs, thrice(tl.load(x_ptr + offs)))

    x = torch.ones(32)
    lessons.profile(inner, (1,), x, BLOCK=32)
    assert (x == 3).all()


def test_profile_tells_what_a_gpu_would_hide():
    with pytest.raises(KernelFault) as caught:
        lessons.profile(careless_kernel, (1,), torch.ones(16)[:5], torch.zeros(16)[:5], BLOCK=8)
    assert caught.value.kind == "out of bounds"
    with pytest.raises(KernelFault) as caught:
        lessons.profile(counter_kernel, (4,), torch.zeros(1))
    assert caught.value.kind == "race" and caught.value.file == __file__


@pytest.mark.parametrize("launch", [lessons.step, lessons.profile])
def test_what_cannot_be_launched_is_said_in_one_line(launch):
    x, y, out = five()
    for kernel, grid, args, constants, told in (
        (add_kernel, 2, (x, y, out, 5), {"BLOCK": 4}, "grid must be a tuple .*, got 2"),
        (add_kernel, (), (x, y, out, 5), {"BLOCK": 4}, r"grid must be a tuple .*, got \(\)"),
        (add_kernel, (0,), (x, y, out, 5), {"BLOCK": 4}, r"grid must be a tuple .*, got \(0,\)"),
        (add_kernel, (5 / 4,), (x, y, out, 5), {"BLOCK": 4}, r"grid must be a tuple .*, got \(1.25,\)"),
        (add_kernel, x, (y, out, 5), {"BLOCK": 4}, "grid must be a tuple .*, got Tensor"),
        (add_kernel, (2,), (x, y, out), {"BLOCK": 4}, "add_kernel.*: missing a required argument: 'N'"),
        (add_kernel, (2,), (x, y, out, 5, 4, 3), {}, "add_kernel.*: too many positional arguments"),
        (add_kernel, (2,), (x, y, out, 5), {"BLOCK": 4, "C": 1}, "unexpected keyword argument 'C'"),
        (add_kernel, (2,), (x.numpy(), y, out, 5), {"BLOCK": 4}, "x_ptr must be a tensor, got an array of numpy"),
        (add_kernel[(2,)], (2,), (x, y, out, 5), {"BLOCK": 4}, "kernel must be a @triton.jit function"),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            launch(kernel, grid, *args, **constants)
        assert "\n" not in str(caught.value)
    launch(add_kernel, [2], x, y, out, 5, BLOCK=4, num_warps=1)
    assert torch.equal(out, 2 * x + y)


@pytest.mark.parametrize("programs", [0, -1, "all"])
def test_step_wants_a_number_of_programs(programs):
    with pytest.raises(ValueError, match="programs must be a whole number of 1 or more"):
        lessons.step(add_kernel, (2,), *five(), 5, BLOCK=4, programs=programs)


def test_an_autotuned_kernel_is_stepped_and_profiled_in_its_first_configuration():
    tuned = triton.autotune([triton.Config({"BLOCK": 4}), triton.Config({"BLOCK": 8})], key=["N"])(add_kernel)
    x, y, out = five()
    assert len(lessons.step(tuned, lambda meta: (triton.cdiv(5, meta["BLOCK"]),), x, y, out, 5).of(1)) == 5
    assert lessons.profile(tuned, (2,), x, y, out, 5).launch.programs == 2 and torch.equal(out, 2 * x + y)


def test_an_unknown_card():
    with pytest.raises(ValueError, match=r"card must be one of T4, A100, .*sm_90.*, got 'GTX 970'"):
        lessons.profile(add_kernel, (1,), *five(), 5, BLOCK=8, card="GTX 970")


def test_afterwards_kernels_are_interpreted_again():
    from triton.runtime.interpreter import InterpretedFunction

    run, total = InterpretedFunction.run, tl.sum
    os.environ["HANDTUNED_BACKEND"] = "torch"
    with pytest.raises(KernelFault), lessons.emulated("A100") as gpu:
        assert "HANDTUNED_BACKEND" not in os.environ
        counter_kernel[(4,)](torch.zeros(1))
    assert InterpretedFunction.run is run and tl.sum is total and os.environ["HANDTUNED_BACKEND"] == "torch"
    x = torch.zeros(1)
    counter_kernel[(4,)](x)
    assert x.item() == 4 and not gpu.launches


def test_kernels_of_the_library_are_emulated_in_a_lesson():
    from handtuned.kernels.matmul import scaled_matmul

    a, b = torch.randn(64, 64).half(), torch.randn(64, 64).half()
    with lessons.emulated("A100") as gpu:
        c, flag = scaled_matmul(a, b)
    assert [launch.name for launch in gpu.launches] == ["_matmul_kernel"] and flag == 0
    assert torch.allclose(c.float(), a.float() @ b.float(), atol=0.05)
