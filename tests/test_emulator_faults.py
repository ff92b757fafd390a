"""Each kind of fault, planted in machine code, is found: with line, program, thread, address. Mended, it passes."""

import pytest
import torch
from ptx import element_address, run
from test_emulator_wgmma import multiply

from handtuned.gpu.emulator import KernelFault
from handtuned.gpu.emulator.fault import Unsupported
from handtuned.gpu.emulator.memory import Unwritten

TID = """mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;"""
SHARED = """mov.u32 %r1, %tid.x;
mov.u32 %r9, global_smem;
shl.b32 %r3, %r1, 2;
add.s32 %r4, %r9, %r3;
st.shared.b32 [%r4], %r1;
{barrier}
xor.b32 %r5, %r4, {distance};
ld.shared.b32 %r6, [%r5];"""


def fault(body, tensors=(), **launch):
    with pytest.raises(KernelFault) as caught:
        run(body, list(tensors), **launch)
    return caught.value


def check(found, kind, line=None, program=0, thread=None, address=None):
    assert found.kind == kind, found
    assert found.kernel == "kernel" and found.program == program
    assert line is None or found.line == line
    assert thread is None or found.thread == thread
    assert address is None or found.address == address
    assert kind in str(found) and f"program {program}" in str(found)


def load_at(offset):
    return f"{element_address(0, '%d1', 4)}\nld.global.b32 %r6, [%d1+{offset}];"


def test_out_of_bounds_in_global_memory():
    x = torch.arange(64, dtype=torch.int32)
    found = fault(load_at(200), [x], threads=32)
    check(found, "out of bounds", line=5, thread=14, address=x.data_ptr() + 256)
    assert "past the end" in str(found)
    run(load_at(128), [x], threads=32)
    check(fault(load_at(-4), [x]), "out of bounds", thread=0, address=x.data_ptr() - 4)


def test_a_guard_keeps_threads_out():
    x = torch.arange(20, dtype=torch.int32)
    guarded = f"{element_address(0, '%d1', 4)}\nsetp.lt.u32 %p1, %r255, 20;\n@%p1 ld.global.b32 %r6, [%d1];"
    run(guarded, [x])
    check(fault(guarded.replace("@%p1 ", ""), [x]), "out of bounds", line=6, thread=20)


def test_out_of_bounds_of_a_view():
    """A view of a larger tensor is bounded by its own elements."""
    x = torch.arange(64, dtype=torch.int32)
    check(fault(load_at(0), [x[:16]]), "out of bounds", thread=16)


def test_out_of_bounds_in_shared_memory():
    body = SHARED.format(barrier="bar.sync 0;", distance=128)
    run(body, [], threads=64, shared_bytes=256)
    check(fault(body, threads=64, shared_bytes=192), "out of bounds", line=5, thread=48, address=192)


def test_misaligned():
    x = torch.arange(64, dtype=torch.int32)
    check(fault(load_at(2), [x]), "misaligned", line=5, thread=0, address=x.data_ptr() + 2)
    body = f"{TID}\nmov.u32 %r9, global_smem;\nst.shared.b32 [%r9+{{}}], %r1;"
    one = f"{TID}\nmov.u32 %r9, global_smem;\nst.shared.v2.b32 [%r9+4], {{%r2, %r2}};"
    run(body.format(0).replace("%r1;", "%r2;"), [], shared_bytes=64)
    check(fault(one, shared_bytes=64), "misaligned", line=4, address=4)


def test_never_written_shared_memory():
    body = f"{TID}\nmov.u32 %r9, global_smem;\nld.shared.b32 %r3, [%r9+16];"
    check(fault(body, shared_bytes=64, programs=2), "never written", line=4, address=16)


def test_never_written_global_memory():
    unwritten, x = Unwritten(), torch.empty(32, dtype=torch.int32)
    unwritten.add(x)
    check(fault(load_at(0), [x], unwritten=unwritten), "never written", line=5, thread=0, address=x.data_ptr())
    x[:7] = 1
    check(fault(load_at(0), [x], unwritten=unwritten), "never written", thread=7)
    x[:] = 1
    run(load_at(0), [x], unwritten=unwritten)


@pytest.mark.parametrize("barrier,races", [("", True), ("bar.sync 0;", False), ("bar.warp.sync -1;", True)])
def test_race_between_warps(barrier, races):
    body = SHARED.format(barrier=barrier, distance=128)  # 32 words further: another warp's
    if races:
        check(fault(body, threads=64, shared_bytes=256), "race", line=8)
    else:
        run(body, [], threads=64, shared_bytes=256)
    run(SHARED.format(barrier="", distance=4), [], threads=64, shared_bytes=256)  # a neighbour of the same warp


@pytest.mark.parametrize("barrier,races", [("", True), ("bar.sync 0;", False)])
def test_race_of_a_write_with_an_earlier_read(barrier, races):
    body = SHARED.format(barrier="bar.sync 0;", distance=128) + f"\n{barrier}\nst.shared.b32 [%r4], %r6;"
    if races:
        check(fault(body, threads=64, shared_bytes=256), "race", line=10)
    else:
        run(body, [], threads=64, shared_bytes=256)


def named(first, second):
    """Warps 0 and 1 meet at `first`, warps 2 and 3 at `second`; then each reads a word of the warp 32 further."""
    return f"""mov.u32 %r1, %tid.x;
    mov.u32 %r9, global_smem;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r9, %r3;
    st.shared.b32 [%r4], %r1;
    setp.lt.u32 %p1, %r1, 64;
    @%p1 bra $FIRST;
    {second}
    bra.uni $MEET;
    $FIRST: {first}
    $MEET: xor.b32 %r5, %r4, 128;
    ld.shared.b32 %r6, [%r5];"""


def test_barriers_of_some_warps():
    run(named("bar.sync 1, 64;", "bar.sync 2, 64;"), [], threads=128, shared_bytes=512)
    found = fault(named("bar.sync 1, 64;", "bar.warp.sync -1;"), threads=128, shared_bytes=512)
    check(found, "race", line=12, thread=64)


def test_deadlock_at_a_barrier():
    check(fault(named("bar.sync 0;", "bar.warp.sync -1;"), threads=128, shared_bytes=512), "race")  # before it locks
    body = f"{TID}\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 bra $OUT;\nbar.sync 0;\n$OUT: bar.warp.sync -1;"
    check(fault(body, threads=64), "deadlock", line=5, thread=32)


def test_deadlock_of_an_mbarrier():
    body = """mov.u32 %r9, global_smem;
    mov.u32 %r1, %tid.x;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r9], {count};
    bar.sync 0;
    @%p1 mbarrier.arrive.shared::cta.b64 _, [%r9];
    $WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r9], 0;
    @!%p2 bra $WAIT;"""
    run(body.format(count=1), [], threads=64, shared_bytes=64)
    check(fault(body.format(count=2), threads=64, shared_bytes=64), "deadlock", line=7)


LOCK = f"""{TID}
ld.param.b64 %d1, [kernel_param_0];
setp.eq.u32 %p1, %r1, 0;
@!%p1 bra $OUT;
$TRY: atom.global.gpu.acquire.cas.b32 %r3, [%d1], 0, 1;
setp.ne.s32 %p2, %r3, 0;
@%p2 bra $TRY;
ld.global.b32 %r4, [%d1+4];
add.s32 %r4, %r4, 1;
st.global.b32 [%d1+4], %r4;
{{unlock}}
$OUT: bar.warp.sync -1;"""


def test_a_lock_and_a_lock_that_is_never_given_back():
    x = torch.zeros(2, dtype=torch.int32)
    run(LOCK.format(unlock="atom.global.gpu.release.exch.b32 %r5, [%d1], 0;"), [x], programs=300)
    assert x.tolist() == [0, 300]
    x.zero_()
    assert fault(LOCK.format(unlock=""), [x], programs=300).kind == "deadlock"


ASYNC = """mov.u32 %r1, %tid.x;
ld.param.b64 %d1, [kernel_param_0];
mul.wide.u32 %d2, %r1, 16;
add.s64 %d1, %d1, %d2;
mov.u32 %r9, global_smem;
shl.b32 %r3, %r1, 4;
add.s32 %r4, %r9, %r3;
cp.async.cg.shared.global [%r4], [%d1], 16;
cp.async.commit_group;
cp.async.cg.shared.global [%r4+1024], [%d1], 16;
cp.async.commit_group;
cp.async.wait_group {most};
ld.shared.b32 %r6, [%r4+{offset}];"""


def test_a_copy_that_was_not_waited_for():
    x = torch.arange(128, dtype=torch.int32)
    for most, offset in ((1, 0), (0, 0), (0, 1024)):
        run(ASYNC.format(most=most, offset=offset), [x], shared_bytes=2048)
    for most, offset in ((2, 0), (1, 1024)):
        found = fault(ASYNC.format(most=most, offset=offset), [x], shared_bytes=2048)
        check(found, "not arrived", line=13, thread=0, address=offset)


def test_wait_all_waits_for_copies_without_a_commit():
    x = torch.arange(128, dtype=torch.int32)
    body = ASYNC.replace("cp.async.commit_group;", "bar.warp.sync -1;").format(most=0, offset=1024)
    check(fault(body, [x], shared_bytes=2048), "not arrived", line=13)
    run(body.replace("cp.async.wait_group 0;", "cp.async.wait_all;"), [x], shared_bytes=2048)


def test_a_commit_closes_no_copies_of_other_threads():
    """The second warp commits while the first one has a copy that it commits later."""
    body = ASYNC.format(most=0, offset=0).splitlines()
    body[7:11] = """setp.ge.u32 %p1, %r1, 32;
    @%p1 bra $SECOND;
    cp.async.cg.shared.global [%r4], [%d1], 16;
    bra.uni $MEET;
    $SECOND: cp.async.cg.shared.global [%r4], [%d1], 16;
    cp.async.commit_group;
    $MEET: cp.async.commit_group;""".splitlines()
    run("\n".join(body), [torch.arange(256, dtype=torch.int32)], threads=64, shared_bytes=1024)


@pytest.mark.parametrize("unknown", ["barrier.cluster.arrive.aligned;", "bar.red.popc.u32 %r3, 0, %p1;"])
def test_an_unknown_barrier_stops_only_who_reaches_it(unknown):
    body = f"{TID}\nsetp.ge.u32 %p1, %r1, {{}};\n@%p1 bra $OUT;\n{unknown}\n$OUT: bar.warp.sync -1;"
    run(body.format(0), [])
    with pytest.raises(Unsupported, match=unknown.split()[0].rstrip(";")):
        run(body.format(1), [])


GLOBAL = f"""{TID}
ld.param.b64 %d1, [kernel_param_0];
mul.wide.u32 %d2, %r1, 4;
add.s64 %d3, %d1, %d2;
xor.b64 %d4, %d2, {{distance}};
add.s64 %d4, %d1, %d4;
st.global.b32 [%d3], %r1;
{{barrier}}
{{then}}"""


@pytest.mark.parametrize("then", ["ld.global.b32 %r6, [%d4];", "st.global.b32 [%d4], %r1;"])
def test_race_between_warps_in_global_memory(then):
    def run_with(barrier, distance, check=run):
        return check(GLOBAL.format(barrier=barrier, distance=distance, then=then), [x], threads=64)

    x = torch.zeros(64, dtype=torch.int32)
    run_with("bar.sync 0;", 128)
    run_with("bar.warp.sync -1;", 4)  # a neighbour of the same warp
    check(run_with("bar.warp.sync -1;", 128, fault), "race", line=10, thread=0, address=x.data_ptr() + 128)


def handing_over(barrier="bar.sync 0;", late="", order="acq_rel"):
    """Every program writes 64 words and counts; the last one reads what the first ones wrote."""
    return f"""{TID}
    ld.param.b64 %d1, [kernel_param_0];
    ld.param.b64 %d2, [kernel_param_1];
    mul.wide.u32 %d3, %r1, 4;
    mul.wide.u32 %d4, %r2, 256;
    add.s64 %d3, %d1, %d3;
    add.s64 %d4, %d3, %d4;
    st.global.b32 [%d4], %r1;
    {barrier}
    setp.eq.u32 %p1, %r1, 0;
    @%p1 atom.global.gpu.{order}.add.u32 %r3, [%d2], 1;
    {late}
    mov.u32 %r9, global_smem;
    @%p1 st.shared.b32 [%r9], %r3;
    bar.sync 0;
    ld.shared.b32 %r3, [%r9];
    setp.ne.u32 %p2, %r3, 199;
    @%p2 bra $OUT;
    ld.global.b32 %r4, [%d3+256];
    $OUT: bar.warp.sync -1;"""


def test_only_what_was_released_may_be_read():
    def data():
        return [torch.zeros(200 * 64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)]

    launch = {"threads": 64, "programs": 200, "shared_bytes": 64}
    run(handing_over(), data(), **launch)
    check(fault(handing_over(order="relaxed"), data(), **launch), "race", line=20, program=199, thread=0)
    # without the barrier the second warp's words were not written when the first one counted
    check(fault(handing_over(barrier="bar.warp.sync -1;"), data(), **launch), "race", program=199, thread=32)
    late = "xor.b32 %r1, %r1, 1;\nst.global.b32 [%d4], %r1;"  # after the release
    check(fault(handing_over(late=late), data(), **launch), "race", line=21, program=199, thread=0)


def test_a_lock_that_does_not_acquire():
    x = torch.zeros(2, dtype=torch.int32)
    lock = LOCK.format(unlock="atom.global.gpu.release.exch.b32 %r5, [%d1], 0;")
    assert fault(lock.replace("acquire", "relaxed"), [x], programs=300).kind == "race"


def test_conflicting_writes_of_programs():
    x = torch.zeros(4, dtype=torch.int32)
    body = f"{TID}\nld.param.b64 %d1, [kernel_param_0];\nst.global.b32 [%d1], {{}};"
    run(body.format("%r9").replace("ld.param", "mov.u32 %r9, 5;\nld.param"), [x], programs=3)
    assert x[0] == 5
    check(fault(body.format("%r2"), [x], programs=3), "conflicting writes", line=4, program=0, address=x.data_ptr())
    check(fault(body.format("%r2"), [x], programs=300), "conflicting writes")


def test_conflicting_writes_of_threads():
    x = torch.zeros(4, dtype=torch.int32)
    body = f"{TID}\nld.param.b64 %d1, [kernel_param_0];\nst.global.b32 [%d1], %r1;"
    check(fault(body, [x]), "conflicting writes", line=4, address=x.data_ptr())
    body = f"{TID}\nmov.u32 %r9, global_smem;\nst.shared.b32 [%r9], %r1;"
    check(fault(body, shared_bytes=64), "conflicting writes", line=4, address=0)


def test_a_program_reads_what_another_wrote():
    x = torch.zeros(300, dtype=torch.int32)
    body = f"""{TID}
    ld.param.b64 %d1, [kernel_param_0];
    mul.wide.u32 %d2, %r2, 4;
    add.s64 %d2, %d1, %d2;
    st.global.b32 [%d2], %r2;
    ld.global.b32 %r3, [%d1+4];"""
    check(fault(body, [x], programs=300), "race", line=7)


def without(**left_out):
    body, tensors, launch, *_ = multiply(**left_out)
    return fault(body, tensors, **launch)


def test_wgmma_needs_fences_and_a_wait():
    check(without(fence=False), "not arrived")
    check(without(order=""), "not arrived")
    touched = "wgmma.fence.sync.aligned;\nadd.f32 %r100, %r10, %r10;"
    check(without(order=touched), "not arrived")
    touched = "wgmma.fence.sync.aligned;\nadd.s32 %r10, %r91, %r91;"
    check(without(order=touched, registers=True), "not arrived")
    found = without(wait="wgmma.wait_group.sync.aligned 1;")
    check(found, "not arrived")
    assert "wgmma" in str(found)
