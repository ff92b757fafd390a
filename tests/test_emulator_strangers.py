"""Kernels of others on every architecture: they equal torch, and their counters are what theory says."""

import pytest
import strangers
import torch
import torch.nn.functional as F
import triton
from compiled import ALL, compiled, run_again
from helpers import assert_computes, assert_within_budget

from handtuned.gpu import emulate

each_arch = pytest.mark.parametrize("arch", ALL)


def test_this_file_without_the_interpreter(pytestconfig):
    run_again(__file__, pytestconfig)


def only(gpu):
    (launch,) = gpu.launches
    return launch.counters


@compiled
@each_arch
def test_add_uses_every_byte_of_every_sector(arch):
    for n in (5008, 4096):
        x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
        with emulate(arch) as gpu:
            strangers.add[(triton.cdiv(n, 1024),)](x, y, out, n, BLOCK=1024)
        assert torch.equal(out, x + y)
        c = only(gpu)
        assert c.global_loads.sectors == c.global_loads.least == 2 * n * 4 // 32
        assert c.global_stores.sectors == c.global_stores.least == n * 4 // 32
        assert (c.dram_read_bytes, c.dram_written_bytes) == (2 * n * 4, n * 4)
        assert c.shared.requests == c.barriers == c.tensor_flops == c.divergent_branches == 0


@compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_add_of_an_odd_length_is_four_times_as_many_sectors(arch):
    """Nothing tells Triton that the mask keeps or drops four neighbours at once: each thread loads them one by one."""
    x, out = torch.randn(4095), torch.empty(4095)
    with emulate(arch) as gpu:
        strangers.add[(4,)](x, x.clone(), out, 4095, BLOCK=1024)
    assert torch.equal(out, 2 * x)
    assert only(gpu).global_loads.sectors == 4 * 2 * 512 and only(gpu).dram_read_bytes == 2 * 4096 * 4


@compiled
@each_arch
def test_a_column_takes_a_sector_for_each_element(arch):
    x, y = torch.randn(128, 24), torch.empty(24, 128)
    with emulate(arch) as gpu:
        strangers.column_to_row[(24,)](x, y, *x.shape, BLOCK=128)
    assert torch.equal(y, x.t())
    loads, stores = only(gpu).global_loads, only(gpu).global_stores
    assert loads.requests == 24 * 128 // 32 and loads.sectors == 32 * loads.requests
    assert loads.least == stores.sectors == 4 * loads.requests
    assert only(gpu).dram_read_bytes == x.nbytes  # the other elements of a sector are wanted later, by others


@compiled
@each_arch
@pytest.mark.parametrize("columns", [256, 781])
def test_softmax_reads_each_byte_once(arch, columns):
    x, y = torch.randn(9, columns) * 3, torch.empty(9, columns)
    with emulate(arch) as gpu:
        strangers.softmax[(9,)](x, y, columns, BLOCK=1024)
    exact = x.double().softmax(1)
    assert_within_budget(y, exact, x.softmax(1), columns, exact)
    c = only(gpu)
    sectors = -(-x.nbytes // 32)
    assert (c.dram_read_bytes, c.dram_written_bytes) == (32 * sectors, 32 * sectors)
    assert c.global_loads.sectors <= c.global_loads.least + c.global_loads.requests  # rows that start within a sector
    if columns == 256:
        assert c.global_loads.sectors == c.global_loads.least == sectors
    assert c.instructions["special"] >= 9 * 1024 // 32 and c.barriers > 0  # exp; the warps' sums meet


def product(arch, M, N, K, transposed=False):
    a, b, c = torch.randn(M, K).half(), torch.randn(K, N).half(), torch.empty(M, N, dtype=torch.float16)
    if transposed:
        b = torch.randn(N, K).half().t()
    with emulate(arch) as gpu:
        strangers.matmul[lambda meta: (triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"]),)](
            a, b, c, M, N, K, *a.stride(), *b.stride(), *c.stride()
        )
    assert_computes(c, torch.matmul, (a, b), K)
    return only(gpu), a.nbytes + b.nbytes, c.nbytes


@compiled
@each_arch
def test_matmul_counts_its_flops(arch):
    M, N, K = 128, 96, 96
    counters, read, written = product(arch, M, N, K)
    assert (counters.dram_read_bytes, counters.dram_written_bytes) == (read, written)
    if arch == "sm_75":  # Triton has no tensor cores for Turing: fused multiply-adds, two FLOPs per thread
        assert counters.tensor_flops == 0 and 64 * counters.instructions["fp32"] >= 2 * M * N * K
    else:
        assert counters.tensor_flops == 2 * M * N * K
    ragged, *_ = product(arch, 70, 100, 50, transposed=True)
    assert ragged.tensor_flops == (0 if arch == "sm_75" else 2 * 128 * 128 * 64)  # whole tiles


@compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_matmul_by_descriptors(arch):
    for M, N, K in ((128, 128, 128), (72, 80, 104)):  # the second: TMA fills what lies outside with zeros
        a, b, c = torch.randn(M, K).half(), torch.randn(N, K).half(), torch.empty(M, N, dtype=torch.float16)
        with emulate(arch) as gpu:
            grid = triton.cdiv(M, 64), triton.cdiv(N, 64)
            strangers.matmul_by_descriptors[grid](a, b, c, M, N, K, 64, 64, 64)
        assert_computes(c, lambda a, b: a @ b.t(), (a, b), K)
        counters = only(gpu)
        assert counters.tensor_flops == 2 * 128 * 128 * 128
        tma = "cp.async.bulk.tensor" in gpu.launches[0].ptx
        assert tma == (arch != "sm_80")  # which has none: the same kernel becomes ordinary copies
        assert counters.dram_written_bytes >= c.nbytes


@compiled
@each_arch
def test_layer_norm_and_its_gradients(arch):
    M, N, slots = 21, 200, 4
    x, w, b, dy = torch.randn(M, N), torch.randn(N), torch.randn(N), torch.randn(M, N)
    y, dx, mean, rstd = torch.empty(M, N), torch.empty(M, N), torch.empty(M), torch.empty(M)
    dw_parts, db_parts, locks = torch.zeros(slots, N), torch.zeros(slots, N), torch.zeros(slots, dtype=torch.int32)
    dw, db = torch.empty(N), torch.empty(N)
    with emulate(arch) as gpu:
        strangers.layer_norm[(M,)](x, w, b, y, mean, rstd, N, 1e-5, BLOCK=128)
        strangers.layer_norm_grads[(M,)](
            dy, x, w, mean, rstd, dx, dw_parts, db_parts, locks, N, SLOTS=slots, BLOCK=256
        )
        for parts, sums in ((dw_parts, dw), (db_parts, db)):
            strangers.column_sums[(triton.cdiv(N, 64),)](parts, sums, slots, N, BLOCK_M=4, BLOCK_N=64)

    def run(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        out = F.layer_norm(leaves[0], (N,), *leaves[1:])
        out.backward(dy.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    exact, low = run(torch.float64), run(torch.float32)
    scale = 1 / (x.double().var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normed = ((x.double() - x.double().mean(1, keepdim=True)) * scale).abs()
    wdy, size = (w * dy).double().abs(), dy.double().abs()
    magnitudes = [
        normed * w.double().abs() + b.double().abs(),
        scale * (wdy + normed * (normed * wdy).mean(1, keepdim=True) + wdy.mean(1, keepdim=True)),
        (size * normed).sum(0), size.sum(0),
    ]  # fmt: skip
    for name, ours, *others in zip(("y", "dx", "dw", "db"), (y, dx, dw, db), exact, low, magnitudes, strict=True):
        truth, rival, magnitude = others
        assert_within_budget(ours, truth, rival, 2 * N + M, magnitude, name)
    assert not locks.any()

    forward, backward = gpu.launches[0].counters, gpu.launches[1].counters
    assert forward.dram_read_bytes == x.nbytes + w.nbytes + b.nbytes  # three times over x: from DRAM only once
    loaded = 3 * x.nbytes + M * (w.nbytes + b.nbytes)
    assert forward.global_loads.sectors == forward.global_loads.least == loaded // 32
    assert backward.instructions["atomic"] >= 2 * M  # a lock taken and given back for each row
