"""The product by descriptors: the same results as without, where it may run, and what it costs as machine code.

The kernel itself runs in the interpreter; the counts, and its races, on sm_90 in the emulator; sm_100 is compiled.
"""

import contextlib
import re

import pytest
import torch
from compiled import INTERPRETED, compiled, run_again
from handtuned.amp import scaled_matmul
from handtuned.kernels import matmul_tma, runtime
from handtuned.kernels.matmul import SCALED_WAYS_TMA, lora_product, scaled_matmul_reference
from handtuned.kernels.matmul_tma import TMA_TILES, launch_tma, matmul_tma_reference, tma_fits
from helpers import assert_computes

from handtuned.gpu import emulate


def lying(rows, columns, transposed, dtype=torch.float16):
    x = torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)
    return x.to(dtype)


def product(tile, a, b, bias=None, S=None, up=None, scale=1.0, **rest):
    c = torch.empty(a.shape[0], b.shape[1], dtype=runtime.stored_dtype(a.dtype))
    launch_tma(tile, a, b, c, bias, S, up, scale, **rest)
    return c.to(a.dtype)


@pytest.fixture
def kernel(kernel_backend):
    """In the interpreter, or in the emulator in a process without it."""
    with contextlib.nullcontext() if INTERPRETED else emulate("sm_90"):
        yield


def test_this_file_without_the_interpreter(pytestconfig):
    run_again(__file__, pytestconfig)


LARGEST = "persistent 128 x 256, 8 warps, 3 stages"
CASES = [((1, 8, 8, 8), "nn", torch.float16), ((70, 136, 72, 16), "nt", torch.float16),
         ((70, 136, 72, 16), "tn", torch.bfloat16), ((130, 264, 200, 40), "tt", torch.float16),
         ((130, 264, 200, 40), "nt", torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize(("shape", "layout", "dtype"), CASES, ids=lambda x: str(x).replace("torch.", ""))
def test_lora_term_and_bias(kernel, monkeypatch, shape, layout, dtype):
    """Two programs walk over up to six tiles; ends of every dimension lie within one."""
    monkeypatch.setattr(matmul_tma, "_multiprocessors", lambda device: 2)
    M, N, K, r = shape
    if layout[0] == "t":
        M = 8 * (M // 8 + 1)
    a, b = lying(M, K, layout[0] == "t", dtype), lying(K, N, layout[1] == "t", dtype)
    S, up, bias = lying(M, r, False, dtype), lying(N, r, layout[1] == "n", dtype), torch.randn(N).to(dtype)
    tile = TMA_TILES[runtime.FIXED["scaled_matmul, descriptors"]]
    y = product(tile, a, b, bias, S, up, 0.5)
    assert_computes(y, lambda a, b, c, S, up: a @ b + c + 0.5 * (S @ up.t()), (a, b, bias, S, up), K + r + 1)
    loss_scale = torch.tensor(0.25)
    scaled = product(tile, a, b, bias, S, up, 0.5, loss_scale=loss_scale)
    specified = matmul_tma_reference(a, b, bias, S, up, 0.5, loss_scale)
    assert (scaled.float() - specified.float()).abs().max() <= specified.abs().max() * torch.finfo(dtype).eps


def test_loss_scale_and_flag(kernel):
    tile = TMA_TILES[runtime.FIXED["scaled_matmul, descriptors"]]
    a, b = lying(40, 64, False), lying(64, 48, True)
    for scale, overflows in ((0.5, False), (65536.0, True), (float("nan"), True)):
        loss_scale, flag = torch.tensor(scale), torch.zeros(())
        c = product(tile, a, b, loss_scale=loss_scale, flag=flag)
        expected, found = scaled_matmul_reference(a, b, loss_scale)
        assert flag.item() == found.item() == overflows
        torch.testing.assert_close(c.isfinite(), expected.isfinite())
    b[3, 47] = float("inf")
    flag = torch.zeros(())
    product(tile, a, b, loss_scale=torch.tensor(1.0), flag=flag)
    assert flag.item() == 1


def test_where_descriptors_fit(monkeypatch):
    monkeypatch.setattr(matmul_tma, "INTERPRETED", False)
    monkeypatch.setattr(matmul_tma, "capability", lambda device: 90)
    a, b, S, up = lying(64, 64, False), lying(64, 64, True), lying(64, 16, False), torch.randn(64, 16)
    up_t = up.t().contiguous().t()
    assert tma_fits(64, a, b) and tma_fits(64, a.t(), b, S, up) and tma_fits(64, a, b, S, up_t)
    assert not tma_fits(64, a.float(), b.float()) and not tma_fits(64, a, b.bfloat16())
    assert not tma_fits(64, a.flatten()[1:961].view(15, 64), b)  # starts at 2 bytes
    assert not tma_fits(64, a[:, :0], b[:0])  # nothing to describe
    assert not tma_fits(64, lying(64, 60, False), lying(60, 64, False))  # rows of 120 bytes
    assert not tma_fits(64, a[:, ::2], b[::2]) and not tma_fits(64, a[:1].expand(8, 64), b)
    assert not tma_fits(60, a, lying(64, 60, True))  # the result has rows of 120 bytes
    assert not tma_fits(64, a, b, lying(64, 12, False), torch.randn(64, 12))
    assert not tma_fits(64, a, b, S.repeat(1, 5), up)
    monkeypatch.setattr(matmul_tma, "capability", lambda device: 89)
    assert not tma_fits(64, a, b)


@compiled
@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_it_is_what_runs(kernel_backend, arch):
    """Where it fits, by the table; where it does not, the pointers' kernel gives as good a result."""
    for N, name in ((128, "_matmul_tma_kernel"), (124, "_matmul_kernel")):
        x, W, S, B = lying(40, 64, False), lying(N, 64, False), lying(40, 8, False), torch.randn(N, 8)
        with emulate(arch) as gpu:
            y = lora_product(x, W, None, S, B, 0.25)
            c, _ = scaled_matmul(x, W.t())
        assert [launch.name for launch in gpu.launches] == [name, name]
        assert_computes(y, lambda x, W, S, B: x @ W.t() + 0.25 * (S @ B.t()), (x, W, S, B.half()), 72)
        assert_computes(c, lambda x, W: x @ W.t(), (x, W), 64)


@compiled
@pytest.mark.parametrize(("name", "r"), [*((name, 16) for name in TMA_TILES), (LARGEST, 0), (LARGEST, 64)])
def test_counts_on_sm_90(kernel_backend, monkeypatch, name, r):
    """Exact FLOPs, every operand once from DRAM, no access above its fewest wavefronts, no spills; three tiles each."""
    tile = TMA_TILES[name]
    M, N, K = 4 * tile.BLOCK_M, 3 * tile.BLOCK_N, 192
    monkeypatch.setattr(matmul_tma, "_multiprocessors", lambda device: 4)
    a, b = lying(M, K, False), lying(K, N, True)
    S, up = (lying(M, r, False), torch.randn(N, r)) if r else (None, None)
    with emulate("sm_90") as gpu:
        product(tile, a, b, None, S, up, 0.5)
        (launch,) = gpu.launches
    counters = launch.counters
    assert counters.tensor_flops == 2 * M * N * (K + r)
    least = 2 * (M * K + K * N + M * N + M * r) + 4 * N * r
    assert counters.dram_read_bytes + counters.dram_written_bytes <= 1.1 * least
    assert counters.shared.cost == counters.shared.least
    assert launch.spill_bytes == 0
    products = re.findall(r"wgmma\.mma_async[^;]*;", list(runtime._compiled.values())[-1][0].asm["ptx"])
    assert products and not any(re.search(r"\}, *\{", line) for line in products)  # both operands in shared memory


@compiled
def test_sm_100_compiles_it(kernel_backend):
    """Its tensor cores are not emulated. With a low-rank term and without."""
    a, b, S, up = lying(128, 64, False), lying(64, 256, True), lying(128, 16, False), torch.randn(256, 16)
    for rest in ((), (None, S, up, 0.5)):
        with emulate("sm_100") as gpu:
            product(TMA_TILES[LARGEST], a, b, *rest)
        assert gpu.launches[0].spill_bytes == 0


def test_the_ways_of_scaled_matmul_name_it():
    assert set(TMA_TILES) < set(SCALED_WAYS_TMA)
