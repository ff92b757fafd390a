"""Nothing is too large for a card that people own, and what a kernel computes does not depend on which it is.

Compiled for cards that are not here, and run in the emulator. The fifty settings nearest to the limits are compiled
always, all of `card_sweep.every_layer` with `--slow`; benchmarks/cards.md has the table of such a run.
"""

import contextlib

import pytest
import torch
from card_sweep import ARCHS, NEAREST, Layer, compiled, sweep
from compiled import compiled as uninterpreted
from compiled import run_again
from handtuned.kernels import lora_gemms, runtime
from handtuned.kernels.dropout import Dropout, dropout_mask_reference
from handtuned.kernels.lora import lora_linear
from handtuned.kernels.lora_gemms import lora_down, lora_down_grad, lora_up_grads
from handtuned.kernels.matmul import lora_product, scaled_matmul
from handtuned.quant import NF4Experts
from handtuned.quant.nf4 import nf4_bytes
from helpers import assert_computes
from lora_layers import operands

from handtuned.gpu import emulate


@pytest.mark.parametrize("half", ["limits_fit", "not limits_fit"])
def test_this_file_without_the_interpreter(pytestconfig, half):
    """In two halves, which may run side by side: they compile for minutes."""
    run_again(__file__, pytestconfig, "-k", half)


def test_there_are_fifty():
    assert len(NEAREST) == len(set(NEAREST)) == 50


@uninterpreted
@pytest.mark.parametrize("part", range(5))
def test_the_settings_nearest_to_the_limits_fit(kernel_backend, part):
    """One process, with rank, rows, dtype and card changing from call to call."""
    for arch, layer in NEAREST[part::5]:
        compiled(arch, layer)


@uninterpreted
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_setting_fits(kernel_backend, arch):
    row, failures = sweep(arch, float("inf"))
    print(row)
    assert not failures


@uninterpreted
def test_a_sweep_compiles_what_running_its_settings_compiles(kernel_backend):
    """Kernel by kernel: collected first and compiled apart, they are those of a process that launches them."""
    layers = [layer for arch, layer in NEAREST if arch == "sm_89"][::7]
    launches = [launch for layer in layers for launch in compiled("sm_89", layer)]
    row, failures = sweep("sm_89", float("inf"), 1, layers)
    hashes, most = {launch.metadata.hash for launch in launches}, max(launch.shared_bytes for launch in launches)
    n = len(layers)
    assert row == f"| sm_89 | {n} of {n} | {len(launches)} | {len(hashes)} of {len(hashes)} | {most:,} | 0 |"
    assert not failures


@uninterpreted
@pytest.mark.parametrize(
    ("arch", "dtype"), [("sm_75", "fp16"), ("sm_75", "bf16"), ("sm_89", "fp32"), ("sm_90", "fp32")], ids=str
)
def test_products_below_sm_80_and_in_fp32_are_the_vendors(kernel_backend, arch, dtype):
    """No product of a layer, nor scaled_matmul, launches a kernel; dropout's mask, AdamW and unscale do."""
    names = {launch.name for launch in compiled(arch, Layer(dtype=dtype, dropout=0.05))}
    names |= {launch.name for launch in compiled(arch, Layer(dtype=dtype, r=0))}
    assert names == {"_mask_kernel", "_unscale_kernel", "_prepare_kernel", "_adamw_kernel"}


@uninterpreted
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_the_mask_is_the_same_by_whatever_way_a_product_goes(kernel_backend, arch):
    """lora_down (fp16: on sm_90 our kernel, on sm_75 torch) with an identity A shows it."""
    seed = torch.tensor([77])
    with emulate(arch):
        S = lora_down(torch.ones(40, 64).half(), torch.eye(64), Dropout(seed, 20000))
    assert torch.equal(S.bool(), dropout_mask_reference(seed, 40, 64, 20000))


@uninterpreted
def test_a_tiles_shared_memory_does_not_depend_on_the_rank(kernel_backend):
    """Also in one process where a short rank came first: no choice is taken over that does not fit."""
    used = {}
    with emulate("sm_89", programs=0, every_tile=True) as gpu:
        for r in (8, 64, 256):
            x, W, _, _, B, _ = operands((300, 256, 512, r), torch.float16)
            lora_product(x, W, None, x[:, :r].contiguous(), B, 0.5)
    for launch in gpu.launches:
        tile = launch.constants["BLOCK_M"], launch.constants["BLOCK_N"], launch.metadata.num_stages
        used.setdefault(tile, set()).add(launch.shared_bytes)
    assert used and all(len(sizes) == 1 for sizes in used.values()), used


@uninterpreted
def test_another_number_of_rows_compiles_nothing(kernel_backend):
    """To a compiler these are alike: all are multiples of 128."""
    hashes = set()
    for M in (640, 1280, 3200):
        with emulate("sm_90", programs=0) as gpu:
            x, W, _, _, B, _ = operands((M, 256, 512, 16), torch.float16)
            lora_product(x, W, None, x[:, :16].contiguous(), B, 0.5)
            scaled_matmul(x, W.t())
        hashes |= {(launch.name, launch.metadata.hash) for launch in gpu.launches}
    assert len(hashes) == 2


@uninterpreted
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_120"])
def test_the_skinny_products_do_no_sum_twice(kernel_backend, arch):
    dy, S, B = torch.randn(256, 512).half(), torch.randn(256, 16).half(), torch.randn(512, 16)
    with emulate(arch) as gpu:
        lora_up_grads(dy, S, B, 0.5)
        lora_down(dy, B.t())
        lora_down_grad(S, dy, torch.float32)
    flops = [launch.counters.tensor_flops for launch in gpu.launches]
    assert flops == [4 * 256 * 512 * 16, *[2 * 256 * 512 * 16] * 2]


@uninterpreted
@pytest.mark.parametrize("r", [8, 33])
@pytest.mark.parametrize("rows", ["odd", "strided", "unaligned"])
def test_the_skinny_products_of_ragged_rows_spill_no_register(kernel_backend, rows, r):
    """x and dy whose elements are loaded one by one, with dropout: the most places and masks that a tile has."""
    width, gap, start = {"odd": (257, 0, 0), "strided": (256, 1, 0), "unaligned": (256, 16, 1)}[rows]
    x = torch.randn(300, width + gap).half()[:, start : start + width]
    with emulate("sm_89", programs=0) as gpu:
        lora_down(x, torch.randn(r, width), Dropout(torch.tensor([7]), 3277))
        lora_up_grads(x, torch.randn(300, r).half(), torch.randn(width, r), 0.5)
    assert [launch.spill_bytes for launch in gpu.launches] == [0] * len(gpu.launches)


@uninterpreted
@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("what", ["y", "dx"])
def test_the_low_rank_term_has_no_bank_conflicts(kernel_backend, what, r):
    x, W, S, up = (torch.randn(size).half() for size in ((128, 512), (512, 512), (128, r), (512, r)))
    W, up = (W, up.float()) if what == "y" else (W.t(), up.float().t().contiguous().t())
    with emulate("sm_90") as gpu:
        lora_product(x, W, None, S, up, 0.5)
    shared = gpu.launches[0].counters.shared
    assert shared.cost == shared.least > 0


@pytest.mark.parametrize("r", [1, 16, 17, 33, 64, 128, 256])
@pytest.mark.parametrize("M", [1, 17, 300, 640, 4096, 32768])
def test_parts_of_a_sum_are_never_larger_than_what_is_read(kernel_backend, monkeypatch, M, r):
    """Half of x or dy (M, 4096) at most, and none of dB from r = 17 on."""
    made, width = [], 4096
    monkeypatch.setattr(runtime.Launch, "__call__", lambda *tensors: None)
    parts = lora_gemms._parts
    monkeypatch.setattr(lora_gemms, "_parts", lambda x, dtype, count, *shape: made.append(
        (count, shape)) or parts(x, dtype, count, *shape))  # fmt: skip
    x = torch.empty(M, width, dtype=torch.float16, device="meta")
    S, A, B = x[:, :r], torch.empty(r, width, device="meta"), torch.empty(width, r, device="meta")
    lora_gemms._down(x, A), lora_gemms._down_grad(S, x, torch.float32), lora_gemms._up_grads(x, S, B, 0.5)
    assert len(made) == 4
    for count, shape in made:
        assert count == 1 or 4 * count * torch.Size(shape).numel() <= M * width, (count, shape)


WIDE = 2**25  # elements between two rows: 128 of them are 2³² apart


def spread(rows, columns, dtype=torch.float16):
    """(rows, columns) with rows WIDE apart, in memory that is touched at the rows alone."""
    try:
        whole = torch.empty_strided((rows, columns), (WIDE, 1), dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"a system that gives no 9 GB of addresses: {error}")
    return whole.copy_(torch.randn(rows, columns))


@pytest.fixture
def untouched_memory():
    """Memory of torch.empty is not filled here: it would be 16 GB."""
    torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.mark.parametrize("arch", ["interpreter", pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_rows_far_apart(kernel_backend, untouched_memory, arch):
    """x = hidden[:, -1] of a long batch: every product, with its strides on either side."""
    rows = 130  # some lie beyond 2³¹ elements, some beyond 2³²
    if (arch == "interpreter") != runtime.INTERPRETED or runtime.emulated_arch:
        pytest.skip("runs in another process; in one that is emulated torch.empty would write to 16 GB")
    x, dy = spread(rows, 64), spread(rows, 80)
    _, W, b, A, B, _ = operands((rows, 80, 64, 8), torch.float16)
    # programs=10**6 is all of them, without a look at what torch.empty leaves unwritten: 16 GB again
    with emulate(arch, programs=10**6) if arch != "interpreter" else contextlib.nullcontext():
        S = lora_down(x, A)
        y = lora_product(x, W, b, S, B, 0.5)
        dS, dB = lora_up_grads(dy, S, B, 0.5)
        dA = lora_down_grad(dS, x, torch.float16)
        c, _ = scaled_matmul(x, W.t())
        ct, _ = scaled_matmul(dy.t(), x)
    near = x.contiguous(), dy.contiguous()
    assert_computes(S, lambda x, A: x @ A.t(), (near[0], A), 64, "S")
    assert_computes(y, lambda x, W, b, S, B: x @ W.t() + b + 0.5 * S @ B.t(), (near[0], W, b, S, B), 64 + 9, "y")
    assert_computes(dS, lambda dy, B: 0.5 * dy @ B, (near[1], B), 80, "dS")
    assert_computes(dB.half(), lambda dy, S: 0.5 * dy.t() @ S, (near[1], S), rows, "dB")
    assert_computes(dA, lambda dS, x: dS.t() @ x, (dS, near[0]), rows, "dA")
    assert_computes(c, lambda x, W: x @ W.t(), (near[0], W), 64, "c")
    assert_computes(ct, lambda dy, x: dy.t() @ x, (near[1], near[0]), rows, "dyᵀ x")


@uninterpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_all_cards_compute_the_same_function_and_each_the_same_bits_again(kernel_backend, dtype):
    """y, dx, dA, dB and scaled_matmul on four cards, each within the budget that fp64 sets, and twice alike."""
    M, N, K, r = 70, 96, 160, 16
    x, W, b, A, B, dy = operands((M, N, K, r), dtype)
    formulas = {
        "y": (lambda x, W, b, A, B, dy: x @ W.t() + b + 0.5 * (x @ A.t()) @ B.t(), 2 * K + r + 1),
        "dx": (lambda x, W, b, A, B, dy: dy @ W + 0.5 * (dy @ B) @ A, 2 * N + r),
        "dA": (lambda x, W, b, A, B, dy: 0.5 * (dy @ B).t() @ x, N + M),
        "dB": (lambda x, W, b, A, B, dy: 0.5 * dy.t() @ (x @ A.t()), K + M),
        "c": (lambda x, W, b, A, B, dy: x @ W.t(), K),
    }
    for arch in ("sm_80", "sm_89", "sm_90", "sm_120"):
        runs = []
        for _ in range(2):
            leaves = [t.clone().requires_grad_() for t in (x, A, B)]
            with emulate(arch):
                y = lora_linear(leaves[0], W, b, *leaves[1:], 0.5)
                runs.append([y, *torch.autograd.grad(y, leaves, dy), scaled_matmul(x, W.t())[0]])
        for (name, (formula, terms)), one, two in zip(formulas.items(), *runs, strict=True):
            assert torch.equal(one, two), (arch, name)
            assert_computes(one.detach().to(dtype), formula, (x, W, b, A, B, dy), terms, f"{name} on {arch}")


@uninterpreted
@pytest.mark.parametrize("counts", [[5, 0, 40, 3], [100, 130, 64, 80], [200, 300, 0, 140]], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_experts_are_one_launch_that_moves_no_byte_twice(kernel_backend, arch, counts):
    """Forward and backward, by each tile: one launch for all experts, and from DRAM what any way must move, + 10 %."""
    q = NF4Experts.from_weight(torch.randn(4, 160, 256) * 0.05)
    W, ends, S = q.dequantize(), torch.tensor(counts).cumsum(0).int(), sum(counts)
    x, dy = torch.randn(S, 256).bfloat16().requires_grad_(), torch.randn(S, 160).bfloat16()
    with emulate(arch) as gpu:
        y = q(x, ends)
        (dx,) = torch.autograd.grad(y, x, dy)
    rows = lambda t: t.split(counts)  # noqa: E731
    assert_computes(
        y.detach(), lambda x, W: torch.cat([h @ w.t() for h, w in zip(rows(x), W, strict=True)]), (x, W), 256, "y"
    )
    assert_computes(dx, lambda dy, W: torch.cat([h @ w for h, w in zip(rows(dy), W, strict=True)]), (dy, W), 160, "dx")
    weights = sum(count > 0 for count in counts) * sum(nf4_bytes(160 * 256))
    assert len(gpu.launches) == 2
    for launch, read, written in zip(gpu.launches, (x, dy), (y, dx), strict=True):
        assert launch.counters.dram_read_bytes <= 1.1 * (weights + read.nbytes)
        assert launch.counters.dram_written_bytes <= 1.1 * written.nbytes
        assert launch.spill_bytes == 0
