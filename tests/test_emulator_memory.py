"""Loads, stores, atomics and moves in the emulator, and what it counts of them."""

import gc

import numpy as np
import pytest
import torch
from ptx import element_address, run
from torch._subclasses import FakeTensorMode

from handtuned.gpu import KernelFault, emulate
from handtuned.gpu.emulator.memory import Unwritten

X = torch.randint(-(2**31), 2**31 - 1, (256,), generator=torch.Generator().manual_seed(0)).to(torch.int32)


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("vector", [1, 2, 4])
def test_copy(bits, vector):
    size = bits // 8 * vector
    if size > 16:
        pytest.skip("16 bytes at most")
    names = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}[bits]
    registers = "{" + ", ".join(f"{names}{10 + j}" for j in range(vector)) + "}" if vector > 1 else f"{names}10"
    many = f".v{vector}" if vector > 1 else ""
    out = torch.zeros_like(X)
    body = f"""{element_address(0, "%d1", size)}
    ld.global{many}.b{bits} {registers}, [%d1];
    {element_address(1, "%d2", size)}
    st.global{many}.b{bits} [%d2], {registers};"""
    counters = run(body, [X, out])
    assert torch.equal(out.view(torch.int8)[: 32 * size], X.view(torch.int8)[: 32 * size])
    assert not out.view(torch.int8)[32 * size :].any()
    for traffic in (counters.global_loads, counters.global_stores):
        assert (traffic.requests, traffic.sectors, traffic.least) == (1, size, size)
    assert counters.dram_read_bytes == counters.dram_written_bytes == 32 * size


@pytest.mark.parametrize("kind,want", [("s8", torch.int8), ("u8", torch.uint8), ("s16", torch.int16)])
def test_loads_that_fill_a_wider_register(kind, want):
    size = int(kind[1:]) // 8
    out = torch.zeros(32, dtype=torch.int32)
    body = f"""{element_address(0, "%d1", size)}
    ld.global.{kind} %r10, [%d1];
    {element_address(1, "%d2", 4)}
    st.global.b32 [%d2], %r10;"""
    run(body, [X, out])
    assert out.tolist() == X.view(want)[:32].tolist()


def strided(stride):
    return f"""mov.u32 %r1, %tid.x;
    ld.param.b64 %d1, [kernel_param_0];
    mul.wide.u32 %d2, %r1, {stride};
    add.s64 %d1, %d1, %d2;
    ld.global.b32 %r2, [%d1];"""


@pytest.mark.parametrize("stride,sectors,least", [(4, 4, 4), (8, 8, 4), (32, 32, 4), (128, 32, 4), (0, 1, 1)])
def test_sectors(stride, sectors, least):
    x = torch.zeros(4096, dtype=torch.int32)
    x = x[-x.data_ptr() % 32 // 4 :]
    counters = run(strided(stride), [x], threads=64 if stride == 0 else 32)
    times = 2 if stride == 0 else 1
    loads = counters.global_loads
    assert (loads.requests, loads.sectors, loads.least) == (times, times * sectors, times * least)
    assert counters.dram_read_bytes == 32 * sectors
    assert counters.lines["kernel.py", 5].global_loads.sectors == times * sectors


@pytest.mark.parametrize("stride,width,waves,least", [
    (4, 1, 1, 1), (8, 1, 2, 1), (128, 1, 32, 1), (0, 1, 1, 1), (132, 1, 1, 1), (16, 4, 4, 4), (32, 4, 8, 4),
    (8, 2, 2, 2),
])  # fmt: skip
def test_wavefronts(stride, width, waves, least):
    """32 banks of 4 bytes; 8 bytes per thread go in two halves of the warp, 16 in four quarters."""
    registers = "%r2" if width == 1 else "{" + ", ".join(f"%r{2 + j}" for j in range(width)) + "}"
    many = "" if width == 1 else f".v{width}"
    body = f"""mov.u32 %r1, %tid.x;
    mov.u32 %r9, global_smem;
    mul.lo.s32 %r8, %r1, {stride};
    add.s32 %r8, %r8, %r9;
    mov.b32 %r2, 0;
    mov.b32 %r3, 0;
    mov.b32 %r4, 0;
    mov.b32 %r5, 0;
    st.shared{many}.b32 [%r8], {registers};
    ld.shared{many}.b32 {registers}, [%r8];"""
    counters = run(body, [], shared_bytes=8192)
    assert (counters.shared.requests, counters.shared.wavefronts, counters.shared.least) == (2, 2 * waves, 2 * least)


ATOMICS = {
    "add.s32": np.add, "add.u32": np.add, "min.s32": np.minimum, "max.s32": np.maximum, "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor, "exch.b32": lambda old, new: new,
}  # fmt: skip


@pytest.mark.parametrize("op", ATOMICS)
@pytest.mark.parametrize("shared", [False, True])
def test_integer_atomics(op, shared):
    """64 threads meet at 4 words, one after another."""
    values, words, old = X[:64].contiguous(), X[64:68].clone(), torch.zeros(64, dtype=torch.int32)
    where = "[%r9]" if shared else "[%d5]"
    body = f"""{element_address(0, "%d1", 4)}
    ld.global.b32 %r10, [%d1];
    and.b32 %r2, %r255, 3;
    mul.wide.u32 %d4, %r2, 4;
    ld.param.b64 %d3, [kernel_param_1];
    add.s64 %d5, %d3, %d4;
    mov.u32 %r8, global_smem;
    shl.b32 %r9, %r2, 2;
    add.s32 %r9, %r9, %r8;
    setp.lt.u32 %p1, %r255, 4;
    @%p1 ld.global.b32 %r11, [%d5];
    @%p1 st.shared.b32 [%r9], %r11;
    bar.sync 0;
    atom.{"shared" if shared else "global.gpu.relaxed"}.{op} %r12, {where}, %r10;
    bar.sync 0;
    @%p1 ld.shared.b32 %r13, [%r9];
    {"@%p1 st.global.b32 [%d5], %r13;" if shared else ""}
    {element_address(2, "%d6", 4)}
    st.global.b32 [%d6], %r12;"""
    dtype, want, before = np.uint32 if "u32" in op else np.int32, words.numpy().copy(), []
    for i, v in enumerate(values.numpy()):
        before.append(want[i % 4])
        with np.errstate(over="ignore"):
            want[i % 4] = ATOMICS[op](want[i % 4].view(dtype), v.view(dtype)).view(np.int32)
    run(body, [values, words, old], threads=64, shared_bytes=64)
    assert words.tolist() == want.tolist() and old.tolist() == [int(b) for b in before]


@pytest.mark.parametrize("kind", ["f32", "f64", "f16x2", "bf16x2", "f16", "bf16"])
def test_float_atomics(kind):
    """Small integers add up exactly in any order."""
    dtype = {"f32": torch.float32, "f64": torch.float64}.get(kind, torch.bfloat16 if kind[0] == "b" else torch.float16)
    each = 2 if kind.endswith("x2") else 1
    values = torch.randint(-3, 4, (64 * each,)).to(dtype)
    total, size = torch.zeros(each, dtype=dtype), dtype.itemsize * each
    register = {2: "%h", 4: "%r", 8: "%d"}[size]
    noftz = ".noftz" if "16" in kind else ""
    body = f"""{element_address(0, "%d1", size)}
    ld.global.b{8 * size} {register}10, [%d1];
    ld.param.b64 %d2, [kernel_param_1];
    red.global.gpu.relaxed.add{noftz}.{kind} [%d2], {register}10;"""
    run(body, [values, total], threads=64)
    assert torch.equal(total, values.reshape(-1, each).sum(0))


def test_compare_and_swap_counts_in_order():
    word, out = torch.tensor([5], dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    body = f"""{element_address(1, "%d1", 4)}
    add.s32 %r1, %r255, 5;
    add.s32 %r2, %r255, 6;
    ld.param.b64 %d2, [kernel_param_0];
    atom.global.gpu.acq_rel.cas.b32 %r3, [%d2], %r1, %r2;
    st.global.b32 [%d1], %r3;"""
    run(body, [word, out])
    assert word.item() == 37 and out.tolist() == list(range(5, 37))


def test_what_a_program_released_another_may_read():
    """The last program adds up what all wrote: how sums are split between programs."""
    parts, counter, total = torch.zeros(300, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    total = torch.zeros(1, dtype=torch.int32)
    body = """mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra $OUT;
    ld.param.b64 %d1, [kernel_param_0];
    mul.wide.u32 %d2, %r2, 4;
    add.s64 %d2, %d1, %d2;
    st.global.b32 [%d2], %r2;
    ld.param.b64 %d3, [kernel_param_1];
    atom.global.gpu.acq_rel.add.u32 %r3, [%d3], 1;
    setp.ne.u32 %p2, %r3, 299;
    @%p2 bra $OUT;
    mov.b32 %r4, 0;
    mov.b32 %r5, 0;
    $SUM: ld.global.b32 %r6, [%d1];
    add.s32 %r4, %r4, %r6;
    add.s64 %d1, %d1, 4;
    add.s32 %r5, %r5, 1;
    setp.lt.u32 %p3, %r5, 300;
    @%p3 bra $SUM;
    ld.param.b64 %d4, [kernel_param_2];
    st.global.b32 [%d4], %r4;
    $OUT: bar.warp.sync -1;"""
    run(body, [parts, counter, total], programs=300)
    assert total.item() == sum(range(300)) and counter.item() == 300


def test_pack_and_unpack():
    out = torch.zeros(32, 4, dtype=torch.int32)
    body = f"""{element_address(0, "%d1", 4)}
    ld.global.b32 %r1, [%d1];
    mov.b32 {{%h1, %h2}}, %r1;
    mov.b32 %r2, {{%h2, %h1}};
    mov.b64 %d2, {{%r1, %r2}};
    mov.b64 {{%r3, %r4}}, %d2;
    mov.u32 %r5, %laneid;
    {element_address(1, "%d3", 16)}
    st.global.v4.b32 [%d3], {{%r2, %r3, %r4, %r5}};"""
    run(body, [X, out])
    words = X[:32].numpy().view(np.uint32)
    turned = (words >> 16 | words << 16).view(np.int32)
    assert out.t().tolist() == [turned.tolist(), X[:32].tolist(), turned.tolist(), list(range(32))]


def test_a_partial_copy_is_filled_with_zeros():
    out = torch.zeros(32, 4, dtype=torch.int32)
    body = f"""{element_address(0, "%d1", 16)}
    mov.u32 %r9, global_smem;
    shl.b32 %r3, %r255, 4;
    add.s32 %r4, %r9, %r3;
    and.b32 %r5, %r255, 1;
    shl.b32 %r5, %r5, 4;
    cp.async.cg.shared.global [%r4], [%d1], 16, %r5;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r4];
    {element_address(1, "%d3", 16)}
    st.global.v4.b32 [%d3], {{%r20, %r21, %r22, %r23}};"""
    run(body, [X, out], shared_bytes=512)
    want = X[:128].reshape(32, 4).clone()
    want[::2] = 0
    assert torch.equal(out, want)


def test_loops_and_divergence_are_counted():
    """Thread t goes round t % 3 + 1 times: a branch that parts the threads of the warp, twice."""
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""mov.u32 %r1, %tid.x;
    rem.u32 %r2, %r1, 3;
    mov.b32 %r3, 0;
    $LOOP: add.s32 %r3, %r3, 10;
    sub.s32 %r2, %r2, 1;
    setp.ge.s32 %p1, %r2, 0;
    @%p1 bra $LOOP;
    bar.sync 0;
    {element_address(0, "%d1", 4)}
    st.global.b32 [%d1], %r3;"""
    counters = run(body, [out], threads=64, programs=1)
    assert out.tolist() == [10 * (t % 3 + 1) for t in range(64)]
    assert counters.divergent_branches == 4 and counters.barriers == 1
    assert counters.lines["kernel.py", 4].instructions["int"] == 2 * 3


def test_local_memory_and_tables():
    """Each thread has an array of its own, indexed as it likes; constants of the kernel stand in global memory."""
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""
    .local .align 8 .b8 mine[16];
    .global .align 4 .b8 table[16] = {{1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 255, 255, 255, 255}};
    mov.u32 %r1, %tid.x;
    mov.b64 %d1, mine;
    and.b32 %r2, %r1, 3;
    mul.wide.u32 %d2, %r2, 4;
    mov.b64 %d3, table;
    add.s64 %d3, %d3, %d2;
    ld.global.b32 %r3, [%d3];
    st.local.v4.b32 [%d1], {{%r1, %r1, %r1, %r1}};
    add.s64 %d4, %d1, %d2;
    st.local.b32 [%d4], %r3;
    ld.local.v2.b32 {{%r4, %r5}}, [%d1+8];
    {element_address(0, "%d5", 8)}
    st.global.v2.b32 [%d5], {{%r4, %r5}};"""
    run(body, [out])
    table = [1, 256, 65536, -1]
    for thread, (third, fourth) in enumerate(out.reshape(32, 2).tolist()):
        assert third == (table[2] if thread % 4 == 2 else thread) and fourth == (-1 if thread % 4 == 3 else thread)
    with pytest.raises(KernelFault, match="out of bounds"):
        run(body.replace("[%d3];", "[%d3+16];"), [out])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_tensor_whose_address_stands_in_a_table(frozen):
    x = torch.arange(3, dtype=torch.int32)
    table, out = torch.tensor([x.data_ptr()]), torch.zeros(32, dtype=torch.int32)
    body = f"""ld.param.b64 %d1, [kernel_param_0];
    ld.global.b64 %d2, [%d1];
    ld.global.b32 %r3, [%d2+8];
    {element_address(1, "%d3", 4)}
    st.global.b32 [%d3], %r3;"""
    if frozen:
        gc.freeze()
    try:
        run(body, [table, out])
    finally:
        gc.unfreeze()
    assert out.tolist() == [2] * 32


def test_fake_tensors_have_no_memory_to_fill(monkeypatch):
    filled = []
    monkeypatch.setattr(Unwritten, "add", lambda self, tensor: filled.append(tensor))
    with emulate("sm_90"):
        with FakeTensorMode():
            torch.nn.Linear(4, 4)
        real = torch.empty_like(torch.nn.Parameter(torch.zeros(4)))
    assert [tensor.data_ptr() for tensor in filled] == [real.data_ptr()]
