"""Calls of the library at the settings that people use, compiled for a card: does everything fit?

`python tests/card_sweep.py sm_89 600 2` sweeps for so many seconds in two processes and prints a row for
benchmarks/cards.md. Triton's cache keeps what was compiled, so the next sweep goes on from there.
"""

import multiprocessing
import random
import sys
import time
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch
from handtuned.kernels import runtime
from handtuned.kernels.adamw import ParamGroup, adamw_step_
from handtuned.kernels.lora import lora_linear
from handtuned.kernels.matmul import scaled_matmul
from handtuned.kernels.unscale import squared_norm, unscale_
from handtuned.quant import quantize_nf4
from triton.runtime.jit import JITFunction

from handtuned.gpu import emulate
from handtuned.gpu.cards import shared_per_program
from handtuned.gpu.driver import EmulatedDriver

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Layer(NamedTuple):
    """Forward and backward of a LoRA layer, or (r 0) of `scaled_matmul`, and an optimizer's step on its weights."""

    M: int = 300
    r: int = 16
    dtype: str = "fp16"
    weight: str = "dense"
    dropout: float = 0.0
    N: int = 192
    K: int = 320
    strided: bool = False

    def quantized(self):
        """The weight in NF4, made before the emulator begins, which leaves holes in results; None for a dense one."""
        return quantize_nf4(torch.randn(self.N, self.K), 64, True) if self.weight == "nf4" else None

    def run(self, quantized=None):
        dtype = DTYPES[self.dtype]
        x = torch.randn(self.M, self.K + 1 if self.strided else self.K).to(dtype)[:, : self.K]
        W = torch.randn(self.N, self.K).to(dtype)
        x.requires_grad_()
        if quantized is not None:
            W = quantized
        if not self.r:
            y, _ = scaled_matmul(x, W.t().requires_grad_(), 0.5)
            y.backward(torch.ones_like(y))
            return step([x.grad])
        A, B = (torch.randn(size).requires_grad_() for size in ((self.r, self.K), (self.N, self.r)))
        y = lora_linear(x, W, None, A, B, 0.5, self.dropout)
        y.backward(torch.ones_like(y))
        return step([A.grad, B.grad])


def step(grads):
    """Unscale, norm and AdamW over tensors of which one is not aligned."""
    narrow = torch.ones(70, dtype=torch.float16)[1:]
    unscale_([*grads, narrow], torch.tensor(0.5), torch.zeros(()))
    squared_norm(grads)
    params, exp_avgs, exp_avg_sqs = ([torch.ones_like(g) for g in grads] for _ in range(3))
    steps = [torch.zeros(()) for _ in grads]
    params[-1] = torch.ones(grads[-1].numel() + 1, dtype=grads[-1].dtype)[1:].view(grads[-1].shape)
    rates = 1e-3, (0.9, 0.999), 1e-8, 0.01
    adamw_step_([ParamGroup(params, grads, exp_avgs, exp_avg_sqs, steps, [None] * len(grads), *rates)])


def every_layer():
    """All of the settings, in an order that changes rank, M and dtype from one to the next."""
    found = [
        Layer(M, r, dtype, weight, dropout, N, K, strided)
        for M, r, dtype, weight, dropout, (N, K), strided in product(
            (1, 4, 16, 17, 300, 640, 4096), (0, 1, 8, 16, 33, 64, 128, 256), DTYPES, ("dense", "nf4"), (0.0, 0.05),
            ((192, 320), (131, 257), (256, 512)), (False, True),
        )
        if r or (weight == "dense" and not dropout)
    ]  # fmt: skip
    random.Random(0).shuffle(found)
    return found


# The fifty nearest to the limits: long ranks, dropout, ragged sizes on 99 KB; what a T4 and fp32 meet first.
NEAREST = [
    *(("sm_89", Layer(r=r, dropout=p, dtype=t)) for r in (33, 64, 128, 256) for p in (0.0, 0.05)
      for t in ("fp16", "bf16")),
    *(("sm_89", Layer(r=r, dtype="fp32", dropout=p)) for r in (8, 64) for p in (0.0, 0.05)),
    *(("sm_89", Layer(r=r, weight="nf4", dropout=p, M=640)) for r in (8, 256) for p in (0.0, 0.05)),
    *(("sm_89", Layer(M, r, N=131, K=257, strided=True)) for M in (17, 4096) for r in (16, 128)),
    *(("sm_89", Layer(M, 8, weight="nf4")) for M in (1, 4, 16, 17)),
    ("sm_89", Layer(r=0)), ("sm_89", Layer(4096, 0, N=131, K=257, strided=True)),
    *(("sm_120", Layer(r=r, dropout=0.05, M=M)) for r in (8, 64, 256) for M in (16, 640)),
    *(("sm_75", Layer(M, r, t, w)) for M, r, t, w in
      ((300, 8, "fp16", "dense"), (4, 8, "fp16", "nf4"), (640, 64, "fp32", "nf4"), (1, 16, "fp16", "nf4"))),
    ("sm_75", Layer(dropout=0.05)), ("sm_86", Layer(r=128, dropout=0.05)),
    ("sm_80", Layer(r=256, dropout=0.05)), ("sm_90", Layer(r=8, dtype="fp32")), ("sm_90", Layer(r=256, dropout=0.05)),
    ("sm_100", Layer(r=64, dropout=0.05)),
]  # fmt: skip


def compiled(arch, layer):
    """The launches of a layer, each of which has been compiled and fits the card."""
    quantized = layer.quantized()
    with emulate(arch, programs=0) as gpu:
        layer.run(quantized)
    for launch in gpu.launches:
        assert launch.shared_bytes <= shared_per_program(arch), (arch, layer, launch)
    return gpu.launches


class Later:
    """In place of a compiled kernel: its launches are noted, by its number."""

    function = packed_metadata = None

    def __init__(self, number, launched):
        self.number, self.launched = number, launched

    def launch_metadata(self, *arguments):
        pass

    def run(self, *arguments):
        self.launched.append(self.number)

    def __getitem__(self, grid):
        return self.run


def collect(arch, layers):
    """(kernels, uses): what all layers need, and setting → number of the kernel of each launch; nothing is compiled."""
    kernels, uses, launched, nowhere = [], {}, [], object()  # a device where Triton has no kernel yet

    def later(kernel, key, signature, device, *rest):
        kernels.append((kernel, (key, signature, device, *rest)))
        made = kernel.device_caches[device][0][key] = Later(len(kernels) - 1, launched)
        return made

    runtime._compiled.clear()
    with (
        mock.patch.object(JITFunction, "_do_compile", later),
        mock.patch.object(EmulatedDriver, "get_current_device", lambda self: nowhere),
    ):
        for layer in layers:
            quantized = layer.quantized()
            with emulate(arch, programs=0):
                layer.run(quantized)
            uses[layer] = launched.copy()
            launched.clear()
    runtime._compiled.clear()
    return kernels, uses


def compile_job(number):
    """(shared memory of a program or None, failure or None) of one of the `jobs`; (None, None) if time is up."""
    arch, end, (kernel, arguments) = jobs[number]
    if time.monotonic() > end:
        return None, None
    try:
        with emulate(arch, programs=0):
            made = kernel._do_compile(*arguments)
            made._init_handles()  # refuses what does not fit
        assert made.metadata.shared <= shared_per_program(arch), "more shared memory than the card has"
    except Exception as error:
        return None, f"{kernel.__name__}, {arguments[0]}: {type(error).__name__} {str(error)[:200]}"
    return made.metadata.shared, None


def sweep(arch, seconds, processes=1, layers=None):
    """(row of benchmarks/cards.md, failures): every different kernel once, those of the longest ranks first."""
    global jobs  # reached by fork: kernels cannot be pickled
    end, layers = time.monotonic() + seconds, layers or every_layer()
    kernels, uses = collect(arch, layers)
    nearest = sorted(uses, key=lambda layer: (layer.r, layer.dropout, layer.M), reverse=True)
    order = list(dict.fromkeys(number for layer in nearest for number in uses[layer]))
    jobs = [(arch, end, kernel) for kernel in kernels]
    made, failures = {}, []
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for number, (shared, failure) in zip(order, pool.imap(compile_job, order), strict=True):
            made |= {} if shared is None else {number: shared}
            failures += [failure] if failure else []
            if len(made) % 100 == 1:
                print(f"{arch}: {len(made)} of {len(kernels)} kernels, {len(failures)} failures", file=sys.stderr)
    whole = [numbers for numbers in uses.values() if made.keys() >= {*numbers}]
    return (
        f"| {arch} | {len(whole)} of {len(uses)} | {sum(map(len, whole))} | {len(made)} of {len(kernels)} "
        f"| {max(made.values(), default=0):,} | {len(failures)} |"
    ), failures


if __name__ == "__main__":
    torch.manual_seed(0)
    row, failures = sweep(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:]))
    print(row)
    print(*failures, sep="\n", file=sys.stderr)
