"""What Triton's language offers and few kernels use, on all architectures: it runs and equals torch."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from compiled import ALL, compiled, fault_of, run_again
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

from handtuned.gpu import emulate

each_arch = pytest.mark.parametrize("arch", ALL)


def test_this_file_without_the_interpreter(pytestconfig):
    run_again(__file__, pytestconfig)


@triton.jit
def waves(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.sin(x))
    tl.store(y_ptr + N + offs, tl.cos(x))
    tl.store(y_ptr + 2 * N + offs, libdevice.pow(tl.abs(x), tl.abs(x) * 0 + 0.375))


@compiled
@each_arch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_angles(arch, dtype):
    """Beyond some size they are reduced by many words of 2/π: tables, local memory, carries, in fp64 calls."""
    x = torch.cat([torch.randn(64) * 10.0**power for power in range(8)]).to(dtype)
    y = torch.empty(3, 512, dtype=dtype)
    with emulate(arch):
        waves[(1,)](x, y, 512)
    exact = x.double()
    want = torch.stack([exact.sin(), exact.cos(), exact.abs().pow(0.375)])
    torch.testing.assert_close(y.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@triton.jit(noinline=True)
def collatz(n):
    steps = 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps


@triton.jit(noinline=True)
def twice(n):
    return collatz(n) + collatz(n + 1)


@triton.jit
def count_steps(x_ptr, y_ptr):
    i = tl.program_id(0)
    tl.store(y_ptr + i, twice(tl.load(x_ptr + i)))


@compiled
@each_arch
def test_functions_that_are_called(arch):
    x, y = torch.arange(1, 40, dtype=torch.int32), torch.empty(39, dtype=torch.int32)
    with emulate(arch):
        count_steps[(39,)](x, y)

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert y.tolist() == [steps(n) + steps(n + 1) for n in range(1, 40)]


@triton.jit
def add_tiles(x_ptr, sums_ptr, most_ptr, M, TILE: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [M, TILE], [TILE, 1], [TILE, TILE])
    sums = tl.make_tensor_descriptor(sums_ptr, [TILE, TILE], [TILE, 1], [TILE, TILE])
    most = tl.make_tensor_descriptor(most_ptr, [TILE, TILE], [TILE, 1], [TILE, TILE])
    tile = x.load([tl.program_id(0) * TILE, 0])
    sums.atomic_add([0, 0], tile)
    most.atomic_max([0, 0], tile)


@compiled
@each_arch
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint32], ids=str)
def test_reductions_by_descriptor(arch, dtype):
    x = torch.randint(0, 1000, (4 * 32, 32), dtype=torch.int32)
    sums, most = torch.zeros(32, 32, dtype=torch.int32), torch.zeros(32, 32, dtype=torch.int32)
    with emulate(arch):
        add_tiles[(4,)](*(t.view(dtype) for t in (x, sums, most)), 128, 32)
    assert torch.equal(sums, x.view(4, 32, 32).sum(0).int()) and torch.equal(most, x.view(4, 32, 32).amax(0))


@triton.jit
def multiply(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    acc = tl.zeros([M, N], tl.float32)
    i, j = tl.program_id(0) * M, tl.program_id(1) * N
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([i, k]), b.load([j, k]).T, acc)
    c.store([i, j], acc.to(tl.float16))


@compiled
@pytest.mark.parametrize("arch", ALL[1:])
def test_descriptors_of_the_host(arch):
    """Tiles reach over the edges of M and N."""
    a, b, c = torch.randn(100, 96).half(), torch.randn(72, 96).half(), torch.empty(100, 72).half()
    maps = [TensorDescriptor.from_tensor(t, box) for t, box in ((a, [64, 32]), (b, [64, 32]), (c, [64, 64]))]
    with emulate(arch):
        multiply[(2, 2)](*maps, 96, 64, 64, 32)
    torch.testing.assert_close(c.double(), a.double() @ b.double().t(), rtol=2**-10, atol=1e-3)


@triton.jit
def pad(x_ptr, y_ptr, M, N, TILE: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [TILE, TILE], padding_option="nan")
    offs = tl.arange(0, TILE)
    tl.store(y_ptr + offs[:, None] * TILE + offs[None, :], x.load([0, 0]))


@compiled
@each_arch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_padding_with_nan(arch, dtype):
    x, y = torch.randn(10, 16).to(dtype), torch.empty(32, 32, dtype=dtype)
    with emulate(arch):
        pad[(1,)](x, y, 10, 16, 32)
    assert torch.equal(y[:10, :16], x) and y.isnan().sum() == 32 * 32 - 10 * 16


@triton.jit
def gather_rows(x_ptr, rows_ptr, y_ptr, M, N: tl.constexpr, ROWS: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [1, N])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [1, N])
    rows = tl.load(rows_ptr + tl.arange(0, ROWS))
    y.scatter(x.gather(rows, 0), M - 1 - rows, 0)


@compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
def test_rows_by_descriptor(arch):
    x, y = torch.randn(40, 64).half(), torch.zeros(40, 64).half()
    rows = torch.randperm(40)[:16].int()
    with emulate(arch):
        gather_rows[(1,)](x, rows, y, 40, 64, 16)
    want = torch.zeros(40, 64).half()
    want[39 - rows.long()] = x[rows.long()]
    assert torch.equal(y, want)


@triton.jit
def cast(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@compiled
@each_arch
@pytest.mark.parametrize("wide", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_8_bit_floats(arch, wide):
    """Before sm_89 Triton knows only e5m2. It rounds twice before sm_90, and makes no bf16 of infinity and NaN."""
    for narrow in (torch.float8_e5m2, *((torch.float8_e4m3fn,) if int(arch[3:]) >= 89 else ())):
        codes = torch.arange(256, dtype=torch.uint8)
        y, back = torch.empty(256, dtype=wide), torch.empty(256, dtype=torch.uint8)
        x = torch.randn(256).to(wide)
        with emulate(arch):
            cast[(1,)](codes.view(narrow), y, 256)
            cast[(1,)](x, back.view(narrow), 256)
        want = codes.view(narrow).to(wide)
        kept = want.isfinite() if wide == torch.bfloat16 else torch.ones(256, dtype=torch.bool)
        torch.testing.assert_close(y[kept], want[kept], rtol=0, atol=0, equal_nan=True)
        away = (back.int() - x.to(narrow).view(torch.uint8).int()).abs().max()
        assert away <= (0 if int(arch[3:]) >= 90 else 1)


@triton.jit
def dot(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j)
    tl.store(c_ptr + i * N + j, tl.dot(a, b, out_dtype=c_ptr.dtype.element_ty))


@compiled
@pytest.mark.parametrize("arch", ALL[1:])
@pytest.mark.parametrize("kind", ["int8", "float8_e5m2", "float64"])
def test_products(arch, kind):
    dtype, to = getattr(torch, kind), {"int8": torch.int32, "float64": torch.float64}.get(kind, torch.float32)
    a, b = ((torch.randn(64, 64) * (40 if kind == "int8" else 1)).to(dtype) for _ in "ab")
    c = torch.empty(64, 64, dtype=to)
    with emulate(arch):
        dot[(1,)](a, b, c, 64)
    want = (a.double() @ b.double()).to(to)
    torch.testing.assert_close(c, want, rtol=1e-5, atol=0 if kind == "int8" else 1e-4)


@triton.jit
def hints(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs, eviction_policy="evict_last") + tl.load(x_ptr + offs, cache_modifier=".cg")
    x += tl.load(x_ptr + offs, eviction_policy="evict_first", volatile=True)
    tl.store(y_ptr + offs, x, cache_modifier=".wt")


@compiled
@each_arch
def test_hints_to_caches(arch):
    x, y = torch.randn(256), torch.empty(256)
    with emulate(arch):
        hints[(1,)](x, y, 256)
    assert torch.equal(y, x + x + x)


@triton.jit
def by_assembly(x_ptr, y_ptr, N: tl.constexpr):
    """Four bytes in a register; what a thread has too few of is undefined."""
    offs = tl.arange(0, N)
    y = tl.inline_asm_elementwise("{ .reg .b32 t; and.b32 t, $1, 0x01010101; xor.b32 $0, t, 0x80808080; }", "=r,r",
                                  [tl.load(x_ptr + offs)], dtype=tl.int8, is_pure=True, pack=4)  # fmt: skip
    tl.store(y_ptr + offs, y)


@compiled
@each_arch
@pytest.mark.parametrize("n", [32, 128, 256, 1024])
def test_inline_assembly(arch, n):
    x, y = torch.randint(-128, 128, (n,), dtype=torch.int8), torch.empty(n, dtype=torch.int8)
    with emulate(arch):
        by_assembly[(1,)](x, y, n)
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8) & 1 ^ 0x80)


@triton.jit
def in_order(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.sort(tl.load(x_ptr + offs)))


@compiled
@each_arch
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_sorting(arch, dtype):
    x = (torch.randn(256) * 50).to(dtype)
    y = torch.empty_like(x)
    with emulate(arch):
        in_order[(1,)](x, y, 256)
    assert torch.equal(y, x.sort().values)


@compiled
def test_a_fault_in_a_function_that_is_called():
    x = torch.tensor([27], dtype=torch.int32)
    fault = fault_of("sm_90", lambda: count_steps[(2,)](x, torch.empty(2, dtype=torch.int32)))
    assert (fault.kind, fault.program) == ("out of bounds", 1) and np.isscalar(fault.line)


@triton.jit
def double(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, N), 2 * tl.load(x_ptr + tl.arange(0, N)))


@compiled
def test_clusters_are_refused():
    x = torch.randn(256)
    with emulate("sm_90"), pytest.raises(NotImplementedError, match="no clusters; double has num_ctas = 2"):
        double[(1,)](x, torch.empty_like(x), 256, num_ctas=2)
