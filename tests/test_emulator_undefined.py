"""Registers that no instruction wrote: LLVM makes some where the value cannot matter; needing one is an error."""

import numpy as np
import pytest
import torch
from ptx import element_address, run

from handtuned.gpu import KernelFault

JOIN = "mov.b64 %d20, {%r1, %r99};\n"  # %r99 is never written
ADDRESS = element_address(0, "%d0", 4) + "\n" + element_address(1, "%d1", 4) + "\nld.global.b32 %r1, [%d0];\n"


def result(body):
    """What a body leaves that copies 32 numbers x into y by way of %r1 and %r2."""
    x, y = torch.randn(32), torch.zeros(32)
    run(ADDRESS + body + "\nst.global.b32 [%d1], %r2;", [x, y])
    return x, y


@pytest.mark.parametrize(
    "body",
    [
        JOIN + "mov.b64 {%r2, _}, %d20;",
        JOIN + "mov.b64 {%r2, %r3}, %d20;",  # the undefined half is taken out, but not used
        "mov.b64 %d20, {%r99, %r1};\nmov.b64 {_, %r2}, %d20;",
        JOIN + "mov.b64 %d21, %d20;\nmov.b64 {%r2, _}, %d21;",
        JOIN + "mov.b64 %d21, {%r1, 0};\nsub.rn.f32x2 %d22, %d21, %d20;\nadd.rn.f32x2 %d23, %d22, %d20;\n"
        "mov.b64 {%r2, _}, %d23;",
        "mov.b32 {%h1, %h2}, %r1;\nmov.b32 %r3, {%h9, %h2};\nmov.b32 {_, %h4}, %r3;\nmov.b32 %r2, {%h1, %h4};",
        "add.s32 %r3, %r99, 1;\nsetp.ne.s32 %p1, %r3, 0;\nmov.b32 %r2, %r1;",  # computed, not used
        "and.b32 %r3, %r99, 0;\nor.b32 %r2, %r3, %r1;",
        "shl.b32 %r3, %r1, 16;\nprmt.b32 %r4, %r3, %r99, 0x7632;\nmov.b32 {%h1, _}, %r4;\n"
        "shr.u32 %r5, %r1, 16;\ncvt.u16.u32 %h2, %r5;\nmov.b32 %r2, {%h1, %h2};",
        "setp.eq.s32 %p1, %r1, %r1;\nselp.b32 %r2, %r1, %r99, %p1;",  # chosen by no thread
    ],
    ids=["low", "both", "high", "moved", "pairs", "of 16 bits", "not used", "masked", "bytes", "not chosen"],
)
def test_undefined_halves_that_do_not_matter(body):
    x, y = result(body)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    "body",
    [
        "mov.b32 %r2, %r99;",
        JOIN + "mov.b64 {_, %r2}, %d20;",
        JOIN + "add.rn.f32x2 %d21, %d20, %d20;\nmov.b64 {_, %r2}, %d21;",
        "mov.b64 %d20, {%r99, %r1};\nadd.s64 %d22, %d20, 0xF0000000;\nmov.b64 {_, %r2}, %d22;",
        "add.s32 %r2, %r99, 1;",
        "add.s32 %r3, %r1, %r99;\nxor.b32 %r2, %r3, 5;",
        "mov.b32 {%h1, %h2}, %r1;\nmov.b32 %r2, {%h1, %h9};",
        "setp.eq.s32 %p1, %r99, 7;\nselp.b32 %r2, %r1, 7, %p1;",
        "prmt.b32 %r2, %r1, %r99, 0x7210;",
    ],
    ids=["moved", "high", "pairs", "carry", "sum", "sum of a sum", "of 16 bits", "predicate", "one byte"],
)
def test_undefined_bits_that_reach_memory(body):
    with pytest.raises(KernelFault, match="a register is used that no instruction wrote") as caught:
        result(body)
    line = (ADDRESS + body).count("\n") + 2
    assert (caught.value.kind, caught.value.line, caught.value.program) == ("never written", line, 0)


@pytest.mark.parametrize(
    ("use", "thread"),
    [
        ("ld.global.b32 %r2, [%d99];", 0),
        ("st.global.b32 [%d99], %r1;", 0),
        ("st.shared.b32 [%r99], %r1;", 0),
        ("st.shared.b32 [global_smem], %r99;", 0),
        ("@%p9 mov.b32 %r2, %r1;", 0),
        ("@%p9 st.global.b32 [%d1], %r1;", 0),
        ("@!%p9 bra END;\nEND:", 0),
        ("shfl.sync.bfly.b32 %r2, %r99, 1, 31, -1;", 0),
        ("setp.ge.u32 %p1, %r255, 5;\n@!%p1 bra SKIP;\nst.global.b32 [%d99], %r1;\nSKIP:", 5),
    ],
)
def test_undefined_registers_that_are_needed(use, thread):
    with pytest.raises(KernelFault, match="a register is used that no instruction wrote") as caught:
        run(ADDRESS + use + "\nmov.b32 %r2, 0;", [torch.randn(32), torch.zeros(32)], shared_bytes=128)
    assert (caught.value.kind, caught.value.thread) == ("never written", thread)


def test_programs_that_part():
    """Each program takes its own path; what is undefined stays so in both parts."""
    body = ADDRESS + JOIN + """mov.u32 %r5, %ctaid.x;
        setp.eq.u32 %p1, %r5, 1;
        @%p1 bra ONE;
        mov.b64 {%r2, _}, %d20;
        st.global.b32 [%d1], %r2;
        bra END;
        ONE:
        mov.b64 {_, %r2}, %d20;
        st.global.b32 [%d1+128], %r2;
        END:"""
    x, y = torch.randn(32), torch.zeros(64)
    with pytest.raises(KernelFault, match="no instruction wrote") as caught:
        run(body, [x, y], programs=2)
    assert caught.value.program == 1 and np.array_equal(y[:32], x)
