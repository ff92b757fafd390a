"""What the lanes of a warp do together: shuffles, votes, reductions, mma.sync, ldmatrix and stmatrix, against torch."""

import itertools

import numpy as np
import pytest
import torch
from ptx import element_address, run

from handtuned.gpu.emulator import KernelFault


def lanes(instructions, *inputs, out=torch.int32, threads=32):
    """%r20 of every thread after `instructions`, which find the inputs in %r10, %r11, …"""
    tensors = [*inputs, torch.zeros(threads, dtype=torch.int32)]
    loads = [f"{element_address(k, f'%d{k}', 4)}\nld.global.b32 %r{10 + k}, [%d{k}];" for k in range(len(inputs))]
    end = f"{element_address(len(inputs), '%d9', 4)}\nst.global.b32 [%d9], %r20;"
    run("\n".join([*loads, instructions, end]), tensors, threads)
    return tensors[-1].view(out)


X = torch.randint(-(2**31), 2**31 - 1, (64,), generator=torch.Generator().manual_seed(0)).to(torch.int32)


@pytest.mark.parametrize("mode,source", [
    ("bfly", lambda i: i ^ 5), ("idx", lambda i: i * 0 + 5), ("down", lambda i: torch.where(i + 5 < 32, i + 5, i)),
    ("up", lambda i: torch.where(i >= 5, i - 5, i)),
])  # fmt: skip
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("given", [5, 37])
def test_shuffle(mode, source, constant, given):
    """Of the lane that is given only the lowest five bits count."""
    lane = torch.arange(32)
    want = torch.cat([X[:32][source(lane)], X[32:][source(lane)]])
    clamp = 0 if mode == "up" else 31
    by = str(given) if constant else "%r30"
    prepare = "" if constant else f"mov.u32 %r31, %tid.x;\nand.b32 %r30, %r31, 0;\nadd.s32 %r30, %r30, {given};\n"
    got = lanes(f"{prepare}shfl.sync.{mode}.b32 %r20, %r10, {by}, {clamp}, -1;", X, threads=64)
    assert got.tolist() == want.tolist()


def test_shuffle_within_segments_and_range():
    """Segments of 8 lanes: mask 0x18 in bits 8 to 12 of the clamp."""
    lane = torch.arange(32)
    inside = lane % 8 + 3 < 8
    clamp = 0x18 << 8 | 31
    got = lanes(f"shfl.sync.down.b32 %r20|%p1, %r10, 3, {clamp}, -1;", X[:32])
    assert got.tolist() == X[:32][torch.where(inside, lane + 3, lane)].tolist()
    got = lanes(f"shfl.sync.down.b32 %r21|%p1, %r10, 3, {clamp}, -1;\nselp.b32 %r20, 1, 0, %p1;", X[:32])
    assert got.tolist() == inside.int().tolist()


REDUCTIONS = {
    "add.s32": lambda x: np.add.reduce(x.numpy(), dtype=np.int32),
    "max.s32": lambda x: x.max(), "min.s32": lambda x: x.min(),
    "max.u32": lambda x: x.numpy().view("u4").max().view("i4"), "and.b32": lambda x: np.bitwise_and.reduce(x.numpy()),
    "or.b32": lambda x: np.bitwise_or.reduce(x.numpy()), "xor.b32": lambda x: np.bitwise_xor.reduce(x.numpy()),
}  # fmt: skip


@pytest.mark.parametrize("op", REDUCTIONS)
def test_redux(op):
    got = lanes(f"redux.sync.{op} %r20, %r10, -1;", X, threads=64)
    want = [int(REDUCTIONS[op](X[:32]))] * 32 + [int(REDUCTIONS[op](X[32:]))] * 32
    assert got.tolist() == want


def test_votes():
    bits = (X > 0).int()
    ask = "setp.ne.s32 %p1, %r10, 0;\n"
    ballot = sum(int(b) << i for i, b in enumerate(bits[:32]))
    got = lanes(ask + "vote.sync.ballot.b32 %r20, %p1, -1;", bits[:32].contiguous())
    assert (got.numpy().view("u4") == ballot).all()
    for mode, values in (("any", [0, 1]), ("all", [1, 1]), ("uni", [1, 0])):
        inputs = torch.tensor([0] * 31 + [1] if mode == "any" else [1] * 32, dtype=torch.int32)
        for x, want in (
            (inputs, 1),
            (torch.tensor([0] * 32 if mode == "any" else [1] * 31 + [0], dtype=torch.int32), 0),
        ):
            got = lanes(ask + f"vote.sync.{mode}.pred %p2, %p1, -1;\nselp.b32 %r20, 1, 0, %p2;", x)
            assert (got == want).all(), (mode, values)


def test_elect_activemask_match():
    got = lanes("elect.sync %r21|%p1, -1;\nselp.b32 %r20, 1, 0, %p1;", X, threads=64)
    assert got.tolist() == [1, *[0] * 31] * 2
    assert (lanes("activemask.b32 %r20;", X[:32]) == -1).all()
    x = torch.arange(32, dtype=torch.int32) % 5
    want = [sum(1 << j for j in range(32) if j % 5 == i % 5) for i in range(32)]
    assert lanes("match.any.sync.b32 %r20, %r10, -1;", x).numpy().view("u4").tolist() == want


def test_a_missing_lane_is_waited_for_in_vain():
    body = """mov.u32 %r1, %tid.x;
    setp.lt.u32 %p1, %r1, 7;
    @%p1 bra $OUT;
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    $OUT: bar.warp.sync -1;"""
    with pytest.raises(KernelFault) as caught:
        run(body, [])
    assert caught.value.kind == "deadlock" and caught.value.line == 4


KINDS = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "s8": torch.int8, "u8": torch.uint8,
         "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}  # fmt: skip


def matrices(kind, k):
    torch.manual_seed(0)
    if kind in ("s8", "u8"):
        low, high = (-128, 127) if kind == "s8" else (0, 255)
        return [torch.randint(low, high, shape).to(KINDS[kind]) for shape in ((16, k), (k, 8))]
    A, B = torch.randn(16, k).to(KINDS[kind]), torch.randn(k, 8).to(KINDS[kind])
    if kind == "tf32":
        A, B = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (A, B))
    return A, B


@pytest.mark.parametrize("kind,k,to", [("f16", 8, "f32"), ("f16", 16, "f32"), ("bf16", 8, "f32"), ("bf16", 16, "f32"),
                                       ("tf32", 4, "f32"), ("tf32", 8, "f32"), ("f16", 16, "f16"), ("f16", 8, "f16"),
                                       ("s8", 16, "s32"), ("s8", 32, "s32"), ("u8", 32, "s32"),
                                       ("e4m3", 32, "f32"), ("e5m2", 32, "f32"), ("e4m3", 16, "f32")])  # fmt: skip
def test_mma(kind, k, to):
    A, B = matrices(kind, k)
    size = A.itemsize
    per = 4 // size  # elements of a register
    # rows g and g + 8; columns: registers 4 lanes apart
    a = A.view(torch.int32).reshape(2, 8, k // per // 4, 4).permute(1, 3, 2, 0).reshape(32, -1).contiguous()
    b = B.t().contiguous().view(torch.int32).reshape(8, k // per // 4, 4).permute(0, 2, 1).reshape(32, -1).contiguous()
    C = torch.randn(16, 8).half() if to == "f16" else torch.randint(-9, 9, (16, 8)).to(
        torch.int32 if to == "s32" else torch.float32)  # fmt: skip
    c = C.reshape(2, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4).contiguous()
    c = c.view(torch.int32)
    columns = [t[:, j].contiguous() for t in (a, b, c) for j in range(t.shape[1])]
    counts = [a.shape[1], b.shape[1], c.shape[1]]
    names, at = [], 10
    for n in counts:
        names.append("{" + ", ".join(f"%r{at + j}" for j in range(n)) + "}")
        at += n
    results = []
    for j in range(counts[2]):
        d = "{" + ", ".join(f"%r{100 + i}" if i != j else "%r20" for i in range(counts[2])) + "}"
        tensors = [*columns, torch.zeros(32, dtype=torch.int32)]
        loads = [f"{element_address(i, f'%d{i}', 4)}\nld.global.b32 %r{10 + i}, [%d{i}];" for i in range(len(columns))]
        op = f"mma.sync.aligned.m16n8k{k}.row.col.{to}.{kind}.{kind}.{to} {d}, {', '.join(names)};"
        end = f"{element_address(len(columns), '%d60', 4)}\nst.global.b32 [%d60], %r20;"
        counters = run("\n".join([*loads, op.replace("%r20", "%r99"), "mov.b32 %r20, %r99;", end]), tensors)
        results.append(tensors[-1])
    d = torch.stack(results, 1).contiguous().view(C.dtype)
    D = d.reshape(8, 4, 2, 2).permute(2, 0, 1, 3).reshape(16, 8)
    want = A.double() @ B.double() + C.double()
    torch.testing.assert_close(D.double(), want, rtol=2e-3 if to == "f16" else 1e-6, atol=1e-2 if to == "f16" else 1e-5)
    assert counters.tensor_flops == 2 * 16 * 8 * k


def test_mma_of_two_types_of_8_bits():
    """One that is 2 in all of A (e4m3) and 3 in all of B (e5m2), the sign by its name in the opcode."""
    out = torch.zeros(32)
    d, a, b, c = "%r10, %r11, %r12, %r13", "%r1, %r1, %r1, %r1", "%r2, %r2", "%r3, %r3, %r3, %r3"
    body = f"""mov.b32 %r1, 0x40404040;
    mov.b32 %r2, 0x42424242;
    mov.b32 %r3, 0f3F800000;
    mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e5m2.f32 {{{d}}}, {{{a}}}, {{{b}}}, {{{c}}};
    {element_address(0, "%d1", 4)}
    st.global.b32 [%d1], %r13;"""
    run(body, [out])
    assert (out == 32 * 2 * 3 + 1).all()


def test_mma_of_integers_that_overflow():
    d, a, b, c = "%r10, %r11, %r12, %r13", "%r1, %r1, %r1, %r1", "%r1, %r1", "%r3, %r3, %r3, %r3"
    for clamp, want in ((".satfinite", 2**31 - 1), ("", 32 * 127 * 127 + 2**31 - 1 - 2**32)):
        out = torch.zeros(32, dtype=torch.int32)
        body = f"""mov.b32 %r1, 0x7F7F7F7F;
        mov.b32 %r3, 0x7FFFFFFF;
        mma.sync.aligned.m16n8k32.row.col{clamp}.s32.s8.s8.s32 {{{d}}}, {{{a}}}, {{{b}}}, {{{c}}};
        {element_address(0, "%d1", 4)}
        st.global.b32 [%d1], %r12;"""
        run(body, [out])
        assert (out == want).all()


@pytest.mark.parametrize("m,k", [(8, 4), (16, 4), (16, 8), (16, 16)])
def test_mma_of_doubles(m, k):
    torch.manual_seed(0)
    A, B, C = torch.randn(m, k).double(), torch.randn(k, 8).double(), torch.randn(m, 8).double()
    a = A.reshape(m // 8, 8, k // 4, 4).permute(1, 3, 2, 0).reshape(32, -1)  # rows g and g + 8, columns t + 4 j
    b = B.t().reshape(8, k // 4, 4).permute(0, 2, 1).reshape(32, -1)
    c = C.reshape(m // 8, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, -1)
    columns = [t[:, j].contiguous() for t in (a, b, c) for j in range(t.shape[1])]
    loads = [f"{element_address(j, f'%d{60 + j}', 8)}\nld.global.b64 %d{j}, [%d{60 + j}];" for j in range(len(columns))]
    at = [0, a.shape[1], a.shape[1] + b.shape[1], len(columns)]
    groups = ["{" + ", ".join(f"%d{j}" for j in range(*ends)) + "}" for ends in itertools.pairwise(at)]
    results = "{" + ", ".join(f"%d{40 + j}" for j in range(c.shape[1])) + "}"
    out = [torch.zeros(32).double() for _ in range(c.shape[1])]
    stores = [f"{element_address(len(columns) + j, '%d59', 8)}\nst.global.b64 [%d59], %d{40 + j};"
              for j in range(len(out))]  # fmt: skip
    op = f"mma.sync.aligned.m{m}n8k{k}.row.col.f64.f64.f64.f64 {results}, {', '.join(groups)};"
    counters = run("\n".join([*loads, op, *stores]), [*columns, *out])
    D = torch.stack(out, 1).reshape(8, 4, m // 8, 2).permute(2, 0, 1, 3).reshape(m, 8)
    torch.testing.assert_close(D, A @ B + C, rtol=1e-13, atol=1e-13)
    assert counters.tensor_flops == 2 * m * 8 * k


MATRIX = """mov.u32 %r1, %tid.x;
mov.u32 %r9, global_smem;
shl.b32 %r3, %r1, 4;
add.s32 %r4, %r9, %r3;"""


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(blocks, trans):
    """Blocks of 8 × 8 two-byte numbers, the rows one after another in shared memory."""
    x = torch.arange(blocks * 64, dtype=torch.int16)
    registers = "{" + ", ".join(f"%r{20 + j}" for j in range(blocks)) + "}"
    x32 = torch.nn.functional.pad(x, (0, 256 - len(x))).view(torch.int32)
    out = torch.zeros(32, blocks, dtype=torch.int32)
    stores = "\n".join(f"st.global.b32 [%d4+{4 * j}], %r{20 + j};" for j in range(blocks))
    body = f"""{MATRIX}
    ld.param.b64 %d1, [kernel_param_0];
    mul.wide.u32 %d2, %r1, 16;
    add.s64 %d2, %d1, %d2;
    ld.global.v4.b32 {{%r30, %r31, %r32, %r33}}, [%d2];
    st.shared.v4.b32 [%r4], {{%r30, %r31, %r32, %r33}};
    ldmatrix.sync.aligned.m8n8.x{blocks}{trans}.shared.b16 {registers}, [%r4];
    ld.param.b64 %d3, [kernel_param_1];
    mul.wide.u32 %d4, %r1, {4 * blocks};
    add.s64 %d4, %d3, %d4;
    {stores}"""
    run(body, [x32, out], shared_bytes=512)
    rows = x.reshape(blocks, 8, 8)
    want = (rows.transpose(1, 2) if trans else rows).contiguous().view(torch.int32).reshape(blocks, 32).t()
    assert torch.equal(out, want)
    back = torch.zeros(32, 4, dtype=torch.int32)
    body = f"""{MATRIX}
    ld.param.b64 %d1, [kernel_param_0];
    mul.wide.u32 %d2, %r1, {4 * blocks};
    add.s64 %d2, %d1, %d2;
    {chr(10).join(f"ld.global.b32 %r{20 + j}, [%d2+{4 * j}];" for j in range(blocks))}
    stmatrix.sync.aligned.m8n8.x{blocks}{trans}.shared.b16 [%r4], {registers};
    setp.lt.u32 %p1, %r1, {8 * blocks};
    @%p1 ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r4];
    ld.param.b64 %d3, [kernel_param_1];
    mul.wide.u32 %d4, %r1, 16;
    add.s64 %d4, %d3, %d4;
    @%p1 st.global.v4.b32 [%d4], {{%r30, %r31, %r32, %r33}};"""
    run(body, [want.contiguous(), back], shared_bytes=512)
    assert torch.equal(back.reshape(-1)[: 32 * blocks].view(torch.int16), x)
