"""Our own kernels with one barrier, fence, commit, wait or guard taken away: never a wrong result without a fault.

`pytest --slow` takes away each, on sm_80 and sm_90; otherwise a fixed sample. docs/emulator.md has the table that

    TRITON_INTERPRET=0 pytest --slow tests/test_emulator_mutants.py -k every_mutant -rP | grep "^|"

prints.
"""

from collections import Counter
from linecache import getline

import numpy as np
import pytest
import torch
from compiled import compiled, run_again
from handtuned.kernels import lora_gemms, matmul, nf4_matmul
from handtuned.kernels.adamw import ParamGroup, adamw_step_
from handtuned.kernels.dropout import Dropout
from handtuned.kernels.nf4 import nf4_dequantize
from handtuned.kernels.nf4_quantize import nf4_quantize
from handtuned.kernels.nf4_stream import nf4_stream
from handtuned.kernels.unscale import squared_norm, unscale_
from handtuned.quant import quantize_nf4
from mutants import mutants, reader, recorded

from handtuned.gpu import KernelFault
from handtuned.gpu.emulator.registers import POISON

ARCHS = ("sm_80", "sm_90")
SAMPLE = 23  # every so many mutants of a kernel are tried without --slow


def test_this_file_without_the_interpreter(pytestconfig):
    run_again(__file__, pytestconfig)


def half(rows, columns=None):
    """Random fp16. The rows of a matrix lie apart, with memory in between that nobody wrote: none may be read."""
    if columns is None:
        return torch.randn(rows).half()
    stride = (columns // 16 + 2) * 16
    words = torch.from_numpy(np.full((rows, stride // 2), POISON, np.uint32).view(np.int32))
    return words.view(torch.float16)[:, :columns].copy_(torch.randn(rows, columns))


def quantized(N, K):
    return quantize_nf4(torch.randn(N, K), 64, True)


def nf4_rows(rows):
    q, S = quantized(72, 1088), half(rows, 16)
    x, bias, B = half(rows, 1088), half(72), torch.randn(72, 16)
    return lambda: nf4_stream(x, q, bias, S, B, 0.5)


def dequantize():
    q = quantized(5, 1705)
    return lambda: nf4_dequantize(q, torch.float16)


def quantize():
    x = half(8448)
    return lambda: nf4_quantize(x, 64)


def merge():
    q, A, B = quantized(72, 192), torch.randn(16, 192), torch.randn(72, 16)
    return lambda: nf4_matmul.nf4_merge(q, A, B, 0.5, torch.float16)


def fused(transposed):
    rows, columns = (192, 72) if transposed else (72, 192)
    q, x, S, up = quantized(72, 192), half(40, rows), half(40, 16), torch.randn(columns, 16)
    return lambda: nf4_matmul.nf4_fused(x, q, half(72) if transposed else None, S, up, 0.5, transposed)


def dropout():
    return Dropout(torch.tensor([42]), 6554)


def down():
    x, A = half(70, 130), torch.randn(16, 130)
    return lambda: lora_gemms.lora_down(x, A, dropout())


def up_grads():
    dy, S, B = half(70, 130), half(70, 16), torch.randn(130, 16)
    return lambda: lora_gemms.lora_up_grads(dy, S, B, 0.5)


def down_grad():
    dS, x = half(150, 16), half(150, 130)
    return lambda: lora_gemms.lora_down_grad(dS, x, torch.float32, dropout())


def product(M, N, K, with_dropout=False):
    x, W, bias, S, B = half(M, K), half(N, K), half(N), half(M, 16), torch.randn(N, 16)
    return lambda: matmul.lora_product(x, W, bias, S, B, 0.5, dropout() if with_dropout else None)


def scaled():
    a, b = half(70, 130), half(130, 50)
    return lambda: matmul.scaled_matmul(a, b, torch.tensor(3.0))


def adamw():
    shapes = (1500,), (7, 9)
    draw = lambda: [torch.rand(shape) + 0.1 for shape in shapes]  # noqa: E731
    steps, copies = [torch.tensor(float(n)) for n in (3, 5)], [torch.empty(s, dtype=torch.bfloat16) for s in shapes]
    group = ParamGroup(draw(), draw(), draw(), draw(), steps, copies, 1e-3, (0.9, 0.999), 1e-8, 0.01)
    norm, zero = torch.tensor(9.0), torch.tensor(0.0)

    def call():
        adamw_step_([group], torch.tensor(2.0), zero, norm, 1.0)
        return [*group.params, *group.exp_avgs, *group.exp_avg_sqs, *copies]

    return call


def unscale():
    grads = [torch.randn(1500), half(5, 7), half(9000)]

    def call():
        unscale_(grads, torch.tensor(0.5), torch.tensor(0.0))
        return [*grads, squared_norm(grads)]

    return call


CASES = {
    "nf4_dequantize": dequantize, "nf4_quantize": quantize, "nf4_stream, one row": lambda: nf4_rows(1),
    "nf4_stream, few rows": lambda: nf4_rows(5), "nf4_merge": merge,
    "nf4_fused": lambda: fused(True), "nf4_fused, dx": lambda: fused(False), "lora_down": down,
    "lora_up_grads": up_grads, "lora_down_grad": down_grad, "lora_product": lambda: product(40, 130, 100),
    "lora_product, whole tiles": lambda: product(64, 256, 256),
    "lora_product, dropout": lambda: product(40, 130, 100, True), "scaled_matmul": scaled, "adamw": adamw,
    "unscale": unscale,
}  # fmt: skip


def _decides(i):
    """Not a guard of memory but the answer to a question of the kernel's: whether there was an overflow."""
    return i.op.startswith("st.global") and "tl.store(found_inf_ptr, 1.0, mask=bad != 0)" in getline(i.file, i.line)


def outcomes(case, arch, every=1):
    """(Counter of (what was broken, what came of it), those that were wrong without a word)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        call = CASES[case]()
    with recorded(arch) as launches:
        results = call()
    results = [results] if isinstance(results, torch.Tensor) else results
    found, silent = Counter(), []
    for launch in launches:
        assert launch.run(launch.kernel), "the kernel itself gives other bits the second time"
        launch.read(results, arch)
        for n, (what, i, kernel) in enumerate(mutants(launch.kernel)):
            if n % every != every // 4 or _decides(i):
                continue
            try:
                outcome = "harmless" if launch.run(kernel) else "silent"
                if outcome == "silent":
                    launch.read(results, arch)
            except KernelFault as fault:
                assert fault.kernel in (kernel.name, reader.__name__) and fault.line > 0 and str(fault)
                outcome = fault.kind
            found[what, outcome] += 1
            if outcome == "silent":
                silent.append(f"{what}: {i.text} at line {i.line}")
    return found, silent


@compiled
@pytest.mark.parametrize(("case", "arch"), [(case, ARCHS[n % 2]) for n, case in enumerate(CASES)])
def test_a_sample_of_mutants(kernel_backend, case, arch):
    found, silent = outcomes(case, arch, SAMPLE)
    assert found and not silent, silent


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES)
def test_every_mutant(kernel_backend, case, arch):
    found, silent = outcomes(case, arch)
    print(row(case, arch, found))
    assert not silent, silent


def row(case, arch, found):
    """A row of the table: mutants, those reported, those that changed nothing, and what was reported."""
    kinds = ("out of bounds", "never written", "race", "not arrived", "conflicting writes", "deadlock", "misaligned")
    by = {kind: sum(n for (_, outcome), n in found.items() if outcome == kind) for kind in (*kinds, "harmless")}
    reported = ", ".join(f"{n} {kind}" for kind, n in by.items() if n and kind != "harmless")
    total = sum(found.values())
    return f"| {case} | {arch} | {total} | {total - by['harmless']} | {by['harmless']} | {reported} |"
