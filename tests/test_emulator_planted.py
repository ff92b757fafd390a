"""Mistakes planted in Triton kernels, on sm_80 and sm_90: each is found and named; mended, the kernel passes."""

import importlib.util
import inspect
from types import SimpleNamespace

import emulator_kernels as planted
import pytest
import torch
from compiled import compiled, fault_of, run_again
from mutants import mutants, recorded

from handtuned.gpu import KernelFault, emulate
from handtuned.gpu.emulator.parse import Kernel

each_arch = pytest.mark.parametrize("arch", ["sm_80", "sm_90"])


def test_this_file_without_the_interpreter(pytestconfig):
    run_again(__file__, pytestconfig)


def check(fault, kind, kernel, program, thread, address, says):
    """A fault names what, where and who, and says so in words."""
    lines, first = inspect.getsourcelines(kernel.fn)
    (line,) = [n for n, text in enumerate(lines, first) if "# planted" in text]
    assert (fault.kind, fault.kernel, fault.line) == (kind, kernel.fn.__name__, line), fault
    assert fault.file == planted.__file__
    programs, threads = (where if isinstance(where, range) else (where,) for where in (program, thread))
    assert fault.program in programs and fault.thread in threads, fault
    assert address is None or fault.address == address, fault
    message = str(fault)
    assert message.startswith(kind) and says in message
    assert f"{planted.__file__}:{line}, program {fault.program}, thread {fault.thread}" in message


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


@compiled
@each_arch
@pytest.mark.parametrize("kernel", [planted.load_outside, planted.store_outside], ids=["load", "store"])
def test_outside_of_a_tensor(arch, kernel):
    x, y = ones(1000), torch.zeros(1000)  # 7 programs of 128 and 104 elements of the 8th
    fault = fault_of(arch, lambda: kernel[(8,)](x, y, 1000, True, 128))
    at = (x if kernel is planted.load_outside else y).data_ptr() + 4000
    check(fault, "out of bounds", kernel, 7, 104, at, "0 bytes past the end of one of 4000 bytes")
    with emulate(arch):
        kernel[(8,)](x, y, 1000, False, 128)
    assert (y == 2).all()


@compiled
def test_a_kernel_that_was_compiled_from_another_file(tmp_path):
    """Triton's cache gives the same machine code to a copy of a file; a fault names the copy."""
    test_outside_of_a_tensor("sm_90", planted.load_outside)
    file = tmp_path / "a_copy.py"
    file.write_text(inspect.getsource(planted), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("a_copy", file)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    fault = fault_of("sm_90", lambda: copy.load_outside[(8,)](ones(1000), torch.zeros(1000), 1000, True, 128))
    assert fault.file == str(file)


@pytest.mark.parametrize("compiled_in", ["", "/elsewhere", "/elsewhere/tests"])
def test_a_checkout_that_was_compiled_elsewhere(tmp_path, compiled_in):
    """Files of the checkout are named as they are here, others as they were, even if all of the old path is common."""
    file, library = tmp_path / "tests" / "kernels.py", "/usr/lib/triton/language/standard.py"
    file.parent.mkdir()
    file.touch()
    old = f"{compiled_in}/tests/kernels.py"
    code = [SimpleNamespace(file=old), SimpleNamespace(file=library)]
    Kernel.name_files(SimpleNamespace(file=old, code=code), str(file))
    assert [i.file for i in code] == [str(file), library]


@compiled
@each_arch
def test_outside_of_shared_memory(arch):
    codes, table, y = torch.arange(128, dtype=torch.int32), torch.arange(256.0), torch.zeros(128)
    codes[37] = 5000
    fault = fault_of(arch, lambda: planted.look_up[(1,)](codes, table, y, True, 128))
    check(fault, "out of bounds", planted.look_up, 0, 37, 20000, "of the 1024 bytes of shared memory")
    with emulate(arch):
        planted.look_up[(1,)](codes, table, y, False, 128)
    assert torch.equal(y, table[codes & 255])


@compiled
@each_arch
def test_a_sum_that_nobody_set_to_zero(arch):
    kernel, x = planted.add_to, ones(512)

    def with_sums(make):
        sums = make(512)
        sums[:300] = 0.0  # all but the end, which the third program adds to
        kernel[(4,)](x, sums, 128)
        return sums

    fault = fault_of(arch, lambda: with_sums(torch.empty))
    check(fault, "never written", kernel, 2, 300 - 256, None, "memory of torch.empty that nobody wrote")
    with emulate(arch):
        assert (with_sums(torch.zeros) == 1).all()


@compiled
@each_arch
def test_a_promise_of_alignment(arch):
    kernel, x, y, start = planted.promise_alignment, torch.randn(520), torch.zeros(512), torch.tensor([1])
    fault = fault_of(arch, lambda: kernel[(1,)](x, start, y, True, 512))
    check(fault, "misaligned", kernel, 0, 0, x.data_ptr() + 4, "a 16-byte access")
    for at, wrong in ((1, False), (4, True)):
        start[0] = at
        with emulate(arch):
            kernel[(1,)](x, start, y, wrong, 512)
        assert torch.equal(x[at : at + 512], y)


@compiled
@each_arch
@pytest.mark.parametrize(
    ("kernel", "kind", "says", "place", "written"),
    [
        (planted.everyone_to_one, "conflicting writes", "programs write different values", lambda i: 0, [0, 1, 2]),
        (planted.read_a_neighbour, "race", "another program wrote in", lambda i: (i + 1) % 3, [0, 1, 2]),
        (planted.push_along, "race", "another program reads in", lambda i: i + 1, [8, 8, 8]),
    ],
    ids=["write-write", "write-read", "read-write"],
)
def test_programs_in_each_others_way(arch, kernel, kind, says, place, written):
    x = torch.full((128,), 7, dtype=torch.int32)
    fault = fault_of(arch, lambda: kernel[(3,)](x, True))
    check(fault, kind, kernel, range(3), range(128), None, says)
    assert fault.address == x.data_ptr() + 4 * place(fault.program)
    x.fill_(7)
    with emulate(arch):
        kernel[(3,)](x, False)
    assert x[:3].tolist() == written


def rows(kernel, wrong):
    """Run a kernel over 3 rows of 128; gives x before, x and y after it."""
    x, y = torch.randint(1, 9, (3, 128), dtype=torch.int32), torch.zeros(3, 128, dtype=torch.int32)
    before = x.clone()
    kernel[(3,)](*(x, y)[: len(kernel.arg_names) - 2], wrong, 128)
    return before, x, y


@compiled
@each_arch
@pytest.mark.parametrize(
    ("kernel", "says", "x_is", "y_is"),
    [
        (planted.read_then_write, "overwritten that another warp may still read", lambda x: x.roll(-1, 1), None),
        (planted.write_then_read, "is read that another warp wrote", lambda x: 2 * x, lambda x: 2 * x.roll(-1, 1)),
        (planted.write_then_write, "is overwritten that another warp wrote", lambda x: x, lambda x: 2 * x.roll(-1, 1)),
    ],
)
def test_warps_in_each_others_way(arch, kernel, says, x_is, y_is):
    """Through global memory, within a program; each of the three orders."""
    with emulate(arch):
        before, x, y = rows(kernel, False)
    assert torch.equal(x, x_is(before)) and (y_is is None or torch.equal(y, y_is(before)))
    fault = fault_of(arch, lambda: rows(kernel, True))
    check(fault, "race", kernel, range(3), range(128), None, says)
    assert fault.thread % 32 in (0, 31) and fault.address % 4 == 0  # where two warps meet


@compiled
@each_arch
def test_copies_of_what_is_overwritten(arch):
    """Where a tile is smaller than the program every warp loads it, and one stores: a race if another used its copy."""
    kernel, count, y = planted.spread_and_count, torch.tensor([5, 7, 9]), torch.zeros(3, 128, dtype=torch.int64)
    fault = fault_of(arch, lambda: kernel[(3,)](count, y, True, 128))
    check(fault, "race", kernel, range(3), 0, None, "overwritten that another warp may still read")
    assert fault.address == count.data_ptr() + 8 * fault.program
    count = torch.tensor([5, 7, 9])
    with emulate(arch):
        kernel[(3,)](count, y, False, 128)
    assert count.tolist() == [6, 8, 10] and torch.equal(y, count[:, None] - 1 + 0 * y)
    few = torch.randint(9, (3, 16))
    expected = few + few.sum(1, keepdim=True)
    with emulate(arch):
        planted.count_in_place[(3,)](count, few)
    assert count.tolist() == [7, 9, 11] and torch.equal(few, expected)


@compiled
@each_arch
def test_a_lock_that_is_kept(arch):
    kernel, lock, count = planted.count_behind_a_lock, torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    fault = fault_of(arch, lambda: kernel[(5,)](lock, count, True))
    check(fault, "deadlock", kernel, range(5), range(128), None, "wait for a value in memory that nobody writes")
    lock.zero_(), count.zero_()
    with emulate(arch):
        kernel[(5,)](lock, count, False)
    assert (count.item(), lock.item()) == (5, 0)


@compiled
@each_arch
@pytest.mark.parametrize("kernel", [planted.wait_by_loads, planted.wait_and_count], ids=["loads", "loops"])
def test_waiting_without_atomics(arch, kernel):
    """Ordinary work may be long without a store as well; who comes round with all registers unchanged only waits."""
    y = torch.zeros(2, dtype=torch.int32)
    fault = fault_of(arch, lambda: kernel[(2,)](torch.zeros(384, dtype=torch.int32), y, True, 128))
    check(fault, "deadlock", kernel, 0, range(128), None, "wait for a value in memory that nobody writes")
    with emulate(arch):
        kernel[(2,)](torch.zeros(384, dtype=torch.int32), y, False, 128)
    assert y[0] == 1


def sums(arch):
    x = torch.arange(1024.0).view(2, 512)
    planted.row_sum[(2,)](x, torch.zeros(2), 512)


def products(arch):
    a, b = torch.randn(64, 128).half(), torch.randn(128, 64).half()
    planted.multiply[(1,)](a, b, torch.zeros(64, 64), 128, 32, 64, num_stages=3)


def tiles(arch):
    x = torch.randn(32, 128)
    planted.copy_tile[(1,)](x, torch.zeros(32, 128), 128, 32)


BOTH, HOPPER = ("sm_80", "sm_90"), ("sm_90",)
PTX = [  # what is taken away, from which instruction, by which call, on which architectures; what is found
    ("barrier removed", "bar.sync", sums, planted.row_sum, BOTH, "race", "no barrier in between"),
    ("barrier removed", "bar.sync", products, planted.multiply, BOTH, "race", "another warp"),
    ("barrier removed", "bar.sync", tiles, planted.copy_tile, HOPPER, "race", "another warp"),
    ("wait removed", "cp.async", products, planted.multiply, BOTH, "not arrived", "a copy is still"),
    ("wait weakened by one group", "cp.async", products, planted.multiply, BOTH, "not arrived", "a copy is still"),
    ("commit removed", "cp.async", products, planted.multiply, BOTH, "not arrived", "a copy is still"),
    ("wait removed", "mbarrier.try_wait", tiles, planted.copy_tile, HOPPER, "not arrived", "a copy is still"),
    ("wait removed", "wgmma", products, planted.multiply, HOPPER, "not arrived", "before it was waited for"),
    ("fence removed", "fence.proxy", products, planted.multiply, HOPPER, "not arrived", "fence.proxy.async"),
]


@compiled
@pytest.mark.parametrize(
    ("what", "instruction", "call", "kernel", "arch", "kind", "says"),
    [(*case[:4], arch, *case[5:]) for case in PTX for arch in case[4]],
)
def test_taken_out_of_the_machine_code(what, instruction, call, kernel, arch, kind, says):
    """Triton writes barriers and waits itself, so they are removed from its machine code."""
    with recorded(arch) as launches:
        call(arch)
    (launch,) = launches
    if instruction == "fence.proxy" and not launch.launch.machine.copies_need_fence:
        pytest.skip("this version of Triton writes no such fence")
    assert launch.run(launch.kernel)
    faults = []
    for removed, i, mutant in mutants(launch.kernel):
        if removed == what and i.op.startswith(instruction):
            try:
                assert launch.run(mutant), f"a wrong result and no fault: {i.text}"
            except KernelFault as fault:
                faults.append(fault)
    lines, first = inspect.getsourcelines(kernel.fn)
    assert any(kind == fault.kind and says in str(fault) for fault in faults)
    for fault in faults:
        assert (fault.kernel, fault.file) == (kernel.fn.__name__, planted.__file__)
        assert fault.line - first in range(len(lines)) and fault.thread in range(128)
