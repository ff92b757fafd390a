"""Triton kernels on CPU tensors as GPU code: launched, refused, counted, their faults found."""

import gc
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from compiled import ALL, INTERPRETED, compiled, run_again
from handtuned.kernels import runtime
from helpers import assert_computes

from handtuned.gpu import Emulator, KernelFault, emulate


def test_this_file_without_the_interpreter(pytestconfig):
    run_again(__file__, pytestconfig)


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n if MASKED else None
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x + y, mask=mask)


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        b = tl.load(b_ptr + k[:, None] * N + n[None, :], mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
        acc = tl.dot(a, b, acc)
    c = acc.to(c_ptr.dtype.element_ty)
    tl.store(c_ptr + m[:, None] * N + n[None, :], c, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def row_sums(x_ptr, sums_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + offs, mask=offs < columns, other=0.0)
    tl.store(sums_ptr + row, tl.sum(x, axis=0))


@triton.jit
def total(x_ptr, total_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < n, other=0.0), axis=0))


@triton.jit
def copy_tiles(x_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    y.store([m, n], x.load([m, n]) * 2)


@triton.jit
def copy_column(x_ptr, y_ptr, rows, columns, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + tl.program_id(0), mask=row < rows)
    tl.store(y_ptr + tl.program_id(0) * rows + row, x, mask=row < rows)


@triton.jit
def talk(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.device_print("program", tl.program_id(0))
    tl.device_print("x", x, tl.arange(0, BLOCK))
    tl.device_assert(x < 20, "x must be below 20")


@triton.jit
def all_to_one(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def neighbour(x_ptr):
    pid = tl.program_id(0)
    tl.store(x_ptr + pid, pid + 1)
    tl.store(x_ptr + pid + 8, tl.load(x_ptr + 1))


def run_add(n, arch="sm_90", grid=None, masked=True):
    x, y, out = torch.randn(n), torch.randn(n), torch.zeros(n)
    with emulate(arch) as gpu:
        add[grid or (triton.cdiv(n, 256),)](x, y, out, n, masked, BLOCK=256)
    return gpu, x, y, out


@compiled
@pytest.mark.parametrize("arch", ALL)
def test_vector_add_on_every_architecture(arch):
    gpu, x, y, out = run_add(1008, arch)
    assert torch.equal(out, x + y)
    (launch,) = gpu.launches
    assert (launch.name, launch.arch, launch.grid, launch.warps) == ("add", arch, (4, 1, 1), 4)
    c = launch.counters
    assert c.global_loads.sectors == c.global_loads.least == 2 * 1008 * 4 // 32
    assert c.global_stores.sectors == c.global_stores.least == 1008 * 4 // 32
    assert c.dram_read_bytes == 2 * 1008 * 4 and c.dram_written_bytes == 1008 * 4


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ALL)
def test_matmul_on_every_architecture(arch, dtype):
    if arch == "sm_75" and dtype == torch.bfloat16:
        pytest.skip("Triton has no bf16 products there")
    M, N, K = 100, 50, 70
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.empty(M, N, dtype=dtype)
    with emulate(arch) as gpu:
        matmul[(2, 2)](a, b, c, M, N, K, 64, 32, 32)
    assert_computes(c, torch.matmul, (a, b), K)
    if arch != "sm_75":  # Triton has no tensor cores for it
        assert gpu.launches[0].counters.tensor_flops == 2 * 128 * 64 * 96  # whole blocks


@compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_reductions_and_atomics(arch):
    x = torch.randint(-8, 9, (37, 500)).float()
    sums, one = torch.empty(37), torch.zeros(1)
    with emulate(arch) as gpu:
        row_sums[(37,)](x, sums, 500, BLOCK=512)
        total[(19,)](x, one, x.numel(), BLOCK=1024)
    assert torch.equal(sums, x.sum(1)) and one.item() == x.sum().item()
    assert gpu.launches[1].counters.instructions["atomic"] >= 19


@compiled
@pytest.mark.parametrize(
    "arch,dtype", [("sm_80", torch.float32), ("sm_90", torch.float32), ("sm_90", torch.float16), ("sm_120", torch.int8)]
)
def test_tensor_descriptors(arch, dtype):
    """Made on the device; TMA copies from sm_90 on. The last tiles reach over the edge."""
    x = torch.randint(-60, 60, (70, 48)).to(dtype)
    y = torch.empty_like(x)
    with emulate(arch) as gpu:
        copy_tiles[(3, 2)](x, y, 70, 48, 32, 32)
    assert torch.equal(y, x * 2)
    assert ("copy" in gpu.launches[0].counters.instructions) == (arch != "sm_80")


def found(call, arch):
    with pytest.raises(KernelFault) as caught, emulate(arch):
        call()
    return caught.value


@compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_faults_name_the_line(arch):
    with pytest.raises(KernelFault) as caught:
        run_add(1008, arch, masked=False)
    fault = caught.value
    assert (fault.kind, fault.kernel, fault.program) == ("out of bounds", "add", 3)
    assert fault.file == __file__ and 0 <= fault.thread < 128
    with open(__file__) as source:
        assert "tl.load(x_ptr + offs, mask=mask)" in source.read().splitlines()[fault.line - 1]

    def unwritten():
        add[(1,)](torch.empty(256), torch.zeros(256), torch.zeros(256), 256, True, BLOCK=256)

    assert found(unwritten, arch).kind == "never written"
    assert found(lambda: all_to_one[(4,)](torch.zeros(1, dtype=torch.int32)), arch).kind == "conflicting writes"
    assert found(lambda: neighbour[(4,)](torch.zeros(16, dtype=torch.int32)), arch).kind == "race"


@compiled
def test_triton_sees_that_a_tensor_is_not_aligned():
    """And loads 4 bytes at a time instead of 16."""
    x, out = torch.arange(257.0)[1:], torch.zeros(256)
    assert x.data_ptr() % 16 == 4
    with emulate("sm_90") as gpu:
        add[(1,)](x, x, out, 256, True, BLOCK=256)
    assert torch.equal(out, 2 * x) and gpu.launches[0].counters.global_loads.requests == 2 * 256 // 32


@compiled
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_device_print_and_device_assert(arch, capsys):
    x = torch.arange(32) / 2
    with emulate(arch):
        talk[(2,)](x, BLOCK=32, num_warps=1, debug=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "program 0, threads 0 to 31: pid (0, 0, 0) idx () program: 0" and len(lines) == 2 + 2 * 2 * 32
    assert "program 1, thread 7: pid (1, 0, 0) idx ( 7) x: (operand 0) 3.500000" in lines
    assert "program 1, thread 7: pid (1, 0, 0) idx ( 7) x: (operand 1) 7" in lines
    with pytest.raises(AssertionError, match="x must be below 20") as caught, emulate(arch):
        talk[(2,)](x * 2, BLOCK=32, num_warps=1, debug=True)
    with open(__file__) as source:
        line = 1 + next(n for n, text in enumerate(source) if "device_assert(x" in text)
    assert str(caught.value).endswith(f"in talk, {__file__}:{line}, program 0, thread 20")
    with emulate(arch):
        talk[(1,)](x * 2, BLOCK=32, num_warps=1)  # without debug=True there is no assertion, as on a card


@compiled
def test_blackwell_is_compiled_and_counted():
    a = torch.randn(256, 256).half()
    with emulate("sm_100") as gpu, pytest.warns(UserWarning, match="tcgen05"):
        matmul[(2, 2)](a, a, torch.zeros_like(a), 256, 256, 256, 128, 128, 64)
    (launch,) = gpu.launches
    assert not launch.executed and launch.counters.instructions["tensor"] > 0
    gpu, x, y, out = run_add(1008, "sm_100")  # without tensor cores it runs
    assert gpu.launches[0].executed and torch.equal(out, x + y)


@compiled
def test_what_does_not_fit_is_refused():
    a = torch.zeros(256, 256, dtype=torch.float16)
    big = (a, a, a.clone(), 256, 256, 256, 128, 256, 64)
    with emulate("sm_90"):
        matmul[(2, 1)](*big, num_stages=4, num_warps=8)
    with emulate("sm_89"), pytest.raises(triton.runtime.errors.OutOfResources):
        matmul[(2, 1)](*big, num_stages=4, num_warps=8)


@compiled
def test_an_autotuner_takes_the_first_configuration_that_fits():
    sizes = [dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64), dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
             dict(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)]  # fmt: skip
    tuned = triton.autotune([triton.Config(s, num_stages=4, num_warps=8) for s in sizes], key=["M"])(matmul)
    a = torch.randn(256, 256).half()

    def grid(meta):
        return triton.cdiv(256, meta["BLOCK_M"]), triton.cdiv(256, meta["BLOCK_N"])

    for arch, wanted in (("sm_89", 16), ("sm_90", 2), ("sm_89", 16)):
        c = torch.empty_like(a)
        with emulate(arch) as gpu:
            tuned[grid](a, a, c, 256, 256, 256)
        assert gpu.launches[0].programs == wanted and len(gpu.launches) == 1
        assert_computes(c, torch.matmul, (a, a), 256)
    assert not tuned.cache


@compiled
def test_what_a_tuner_chooses_in_the_emulator_ends_with_it(tmp_path, monkeypatch):
    """It reaches neither Triton's file of tuning results nor the tuner's memory, which gc.freeze() would hide."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    configs = [triton.Config({"BLOCK": size}) for size in (64, 128)]
    tuned = triton.autotune(configs, key=["n"], cache_results=True)(total)
    x, one = torch.ones(256), torch.zeros(1)
    tuned.cache = known = {}
    gc.freeze()
    try:
        with emulate("sm_90") as outer:
            for _ in range(2):
                with emulate("sm_80") as inner:
                    tuned[lambda meta: (256 // meta["BLOCK"],)](x, one, 256)
                tuned[lambda meta: (256 // meta["BLOCK"],)](x, one, 256)
                assert [launch.programs for launch in inner.launches] == [4]
            assert tuned.cache is not known and not tuned.cache_results
    finally:
        gc.unfreeze()
    assert [launch.programs for launch in outer.launches] == [4, 4] and one.item() == 4 * 256
    assert tuned.cache is known and not known and tuned.cache_results and "do_bench" not in tuned.__dict__
    assert not list(tmp_path.rglob("*.autotune.json"))


@compiled
def test_reports():
    gpu, *_ = run_add(1008)
    work, memory = (line.split() for line in str(gpu).splitlines() if line.startswith("add"))
    assert work[:4] == ["add", "1", "4", "4"] and memory[1:] == [*["7.9"] * 4, "–", "–", "8.1", "kB", "4.0", "kB"]
    listing = gpu.source(add)
    assert max(len(line) for line in (str(gpu) + listing).splitlines()) <= 120
    row = next(line for line in listing.splitlines() if "x = tl.load" in line)
    assert row.split()[1] == "7.9"
    with emulate("sm_90") as gpu:
        copy_column[(64,)](torch.randn(128, 64), torch.empty(64, 128), 128, 64, BLOCK=128)
    assert "32.0 (4.0)" in gpu.source(copy_column) and "32.0      4.0" in str(gpu)
    gpu, *_ = run_add(1008)
    assert gpu.source("add") == listing
    with pytest.raises(ValueError, match="launched"):
        gpu.source("nothing")
    (launch,) = gpu.launches
    assert 8 <= launch.registers <= 64 and launch.spill_bytes == 0
    assert launch.occupancy.blocks * launch.warps == launch.occupancy.warps <= 64
    assert "no kernel" in str(Emulator("sm_90"))
    total_of_lines = sum(line.warp_instructions for line in launch.counters.lines.values())
    assert total_of_lines == launch.counters.warp_instructions > 0


@compiled
def test_operations_of_the_package(kernel_backend):
    from handtuned.kernels.lora import lora_linear
    from handtuned.quant import dequantize_nf4, quantize_nf4

    x, w = torch.randn(40, 128).half(), torch.randn(64, 128).half()
    A, B = torch.randn(8, 128), torch.randn(64, 8)
    weight = torch.randn(64, 256)
    plain = dequantize_nf4(quantize_nf4(weight))
    assert runtime.backend(x) == "torch"
    with emulate("sm_80") as gpu:
        assert runtime.backend(x) == "sm_80"
        y = lora_linear(x, w, None, A, B, 0.5, 0.0)
        assert torch.equal(dequantize_nf4(quantize_nf4(weight)), plain)
    assert runtime.backend(x) == "torch"
    assert_computes(y, lambda x, w, A, B: x @ w.t() + 0.5 * (x @ A.t()) @ B.t(), (x, w, A, B), 128 + 8)
    assert len(gpu.launches) >= 4


def test_unknown_architecture():
    with pytest.raises(ValueError, match="arch must be one of"), emulate("sm_42"):
        pass


@pytest.mark.skipif(not INTERPRETED, reason="needs an interpreted kernel")
def test_an_interpreted_kernel_is_refused():
    with emulate("sm_90"), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        add[(1,)](torch.zeros(4), torch.zeros(4), torch.zeros(4), 4, True, BLOCK=256)


@compiled
def test_a_whole_process():
    code = """
import torch
from handtuned.kernels import backend
from handtuned.quant import dequantize_nf4, quantize_nf4
import handtuned.gpu
x = torch.randn(64, 64)
assert backend(x) == "sm_89"
y = dequantize_nf4(quantize_nf4(x))
print(handtuned.gpu.emulate_process())
"""
    environment = os.environ | {"HANDTUNED_BACKEND": "sm_89"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "sm_89, emulated" in done.stdout and "_nf4_dequantize" in done.stdout
