"""wgmma against torch, operands in shared memory and in registers, every swizzle, both majors."""

import pytest
import torch
from ptx import run

from handtuned.gpu import KernelFault

KINDS = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "e4m3": torch.float8_e4m3fn,
         "e5m2": torch.float8_e5m2, "s8": torch.int8}  # fmt: skip
SWIZZLES = {128: 1, 64: 2, 32: 3}


def _swizzled(matrix, span):
    """(rows, columns) with rows of `span` bytes → its bytes in shared memory; chunks of 16 bytes XORed by the row."""
    raw = matrix.contiguous().view(torch.uint8).reshape(matrix.shape[0], span // 16, 16)
    out = torch.empty_like(raw)
    for row in range(raw.shape[0]):
        key = row * span // 128 % 8 & span // 16 - 1
        for chunk in range(span // 16):
            out[row, chunk ^ key] = raw[row, chunk]
    return out.reshape(-1)


def _blocks(matrix, span):
    """Columns cut into panels of `span` bytes, one after the other."""
    per = span // matrix.element_size()
    return torch.cat([_swizzled(panel, span) for panel in matrix.split(per, dim=1)])


def _descriptor(at, leading, stride, span):
    return (1024 + at) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[span] << 62


def multiply(kind="f16", n=16, span=128, transposed=(False, False), registers=False, fence=True,
             order="wgmma.fence.sync.aligned;", wait="wgmma.wait_group.sync.aligned 0;", seed=0):  # fmt: skip
    """(body, tensors, launch, A, B) of one wgmma of a warpgroup: D (64, n) = A (64, K) · B (K, n)."""
    torch.manual_seed(seed)
    dtype = KINDS[kind]
    size = dtype.itemsize
    k = 32 // size
    A, B = ((torch.randn(rows, k) * (30 if kind == "s8" else 1)).to(dtype) for rows in (64, n))
    to = "s32" if kind == "s8" else "f32"
    if kind == "tf32":
        A, B = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (A, B))
    images, bits = [], []
    for matrix, turned in ((A, transposed[0]), (B, transposed[1])):
        stored = matrix.t() if turned else matrix  # K-major: rows of K; else rows along M or N
        width = span // size
        if not turned:  # K fills a part of the row only
            padded = torch.zeros(stored.shape[0], width, dtype=dtype)
            padded[:, : stored.shape[1]] = stored
            stored, leading, stride = padded, 16, 8 * span
        else:
            padded = torch.zeros(k, -(-stored.shape[1] // width) * width, dtype=dtype)
            padded[:, : stored.shape[1]] = stored
            stored, leading, stride = padded, k * span, 8 * span
        at = sum(len(image) for image in images)
        images.append(torch.nn.functional.pad(_blocks(stored, span), (0, -len(_blocks(stored, span)) % 1024)))
        bits.append(_descriptor(at, leading, stride, span))
    image = torch.cat(images)
    out = torch.zeros(128, n // 2, dtype=torch.int32 if kind == "s8" else torch.float32)  # what each thread holds
    results = ", ".join(f"%r{100 + j}" for j in range(n // 2))
    flags = "" if size != 2 else ", 0, 0" if not any(transposed) else f", {int(transposed[0])}, {int(transposed[1])}"
    fragments = torch.zeros(128, 4, dtype=torch.int32)
    if registers:
        flags = flags[3:] and f", {int(transposed[1])}"
        lanes = A.contiguous().view(torch.int32).reshape(4, 2, 8, 2, 4)
        fragments = lanes.permute(0, 2, 4, 3, 1).reshape(128, 4).contiguous()  # warp, g, t, half of K, half of rows
    signs = "" if kind == "s8" else ", 1, 1"
    a = "{%r90, %r91, %r92, %r93}" if registers else "%d40"
    steps = range(0, len(image), 512)
    loop = "\n".join(f"ld.global.b32 %r10, [%d5+{at}];\nst.shared.b32 [%r11+{at}], %r10;" for at in steps)
    stores = "\n".join(f"st.global.b32 [%d7+{4 * j}], %r{100 + j};" for j in range(n // 2))
    body = f"""mov.u32 %r1, %tid.x;
    ld.param.b64 %d1, [kernel_param_0];
    ld.param.b64 %d2, [kernel_param_1];
    ld.param.b64 %d3, [kernel_param_2];
    mul.wide.u32 %d4, %r1, 4;
    add.s64 %d5, %d1, %d4;
    mul.wide.u32 %d6, %r1, {2 * n};
    add.s64 %d7, %d2, %d6;
    mul.wide.u32 %d8, %r1, 16;
    add.s64 %d9, %d3, %d8;
    ld.global.v4.b32 {{%r90, %r91, %r92, %r93}}, [%d9];
    mov.u32 %r9, global_smem;
    shl.b32 %r3, %r1, 2;
    add.s32 %r11, %r9, %r3;
    {loop}
    {"fence.proxy.async.shared::cta;" if fence else "bar.warp.sync -1;"}
    bar.sync 0;
    mov.b64 %d40, {bits[0]};
    mov.b64 %d41, {bits[1]};
    setp.ne.s32 %p1, 0, 0;
    {order}
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{to}.{kind}.{kind} {{{results}}}, {a}, %d41, %p1{signs}{flags};
    wgmma.commit_group.sync.aligned;
    {wait}
    {stores}"""
    return body, [image.view(torch.int32), out, fragments], {"threads": 128, "shared_bytes": len(image)}, A, B


def result(out, n):
    """Registers of the threads → D (64, n): warp w, lane 4g + t hold rows 16w + g and + 8, columns 8b + 2t and + 1."""
    return out.reshape(4, 8, 4, n // 8, 2, 2).permute(0, 4, 1, 3, 2, 5).reshape(64, n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("span", [128, 64, 32])
@pytest.mark.parametrize("registers", [False, True])
def test_k_major(kind, span, registers):
    for n in (8, 16, 64):
        body, tensors, launch, A, B = multiply(kind, n, span, registers=registers)
        counters = run(body, tensors, **launch)
        want = (A.float() @ B.float().t()).to(tensors[1].dtype)
        torch.testing.assert_close(result(tensors[1], n), want, rtol=1e-6, atol=1e-5)
        assert counters.tensor_flops == 2 * 64 * n * A.shape[1]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("span", [128, 64, 32])
@pytest.mark.parametrize("transposed", [(True, False), (False, True), (True, True)])
def test_m_and_n_major(kind, span, transposed):
    body, tensors, launch, A, B = multiply(kind, 128, span, transposed)
    run(body, tensors, **launch)
    torch.testing.assert_close(result(tensors[1], 128), A.float() @ B.float().t(), rtol=1e-6, atol=1e-5)


def test_each_warpgroup_waits_for_its_own():
    """The second one waits while the first one has an earlier product under way, which it waits for later, or never."""
    body, tensors, launch, A, B = multiply(n=16)
    first = "wgmma.commit_group.sync.aligned;\n    wgmma.wait_group.sync.aligned 0;"
    ahead, rest = body.replace("mov.u32 %r1, %tid.x;", "mov.u32 %r99, %tid.x;\nand.b32 %r1, %r99, 127;").split(
        "setp.ne.s32 %p1, 0, 0;")  # fmt: skip
    multiplied, stored = rest.split(first)
    second = (multiplied + first + stored).replace("%r10", "%r11")  # registers of its own
    both = f"""{ahead}
    setp.ne.s32 %p1, 0, 0;
    setp.ge.u32 %p2, %r99, 128;
    @%p2 bra $SECOND;
    {multiplied}
    wgmma.commit_group.sync.aligned;
    bra.uni $FIRST;
    $SECOND: {second.strip()}
    bra.uni $OUT;
    $FIRST: {{wait}}
    {stored}
    $OUT: bar.warp.sync -1;"""
    run(both.replace("{wait}", "wgmma.wait_group.sync.aligned 0;"), tensors, **launch | {"threads": 256})
    torch.testing.assert_close(result(tensors[1], 16), A.float() @ B.float().t(), rtol=1e-6, atol=1e-5)
    with pytest.raises(KernelFault, match="not arrived"):
        run(both.replace("{wait}", "bar.warp.sync -1;"), tensors, **launch | {"threads": 256})
