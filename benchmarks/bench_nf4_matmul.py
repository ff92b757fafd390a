"""Rows of x on an NF4 weight, forward, beside bitsandbytes on the same bytes and a dense weight.

    python benchmarks/bench_nf4_matmul.py     the same as `handtuned bench nf4_matmul`
"""

import torch
import torch.nn.functional as F
from handtuned.quant import NF4Linear
from handtuned.quant.nf4 import nf4_bytes
from shared import close, computed_in, low_precision
from torch import nn

from handtuned.bench import script
from handtuned.harness import Case


def bitsandbytes_linear(ours, dtype):
    """bitsandbytes' layer on the bytes of ours. In eval mode it packs them anew where a CPU has AVX512-BF16."""
    import bitsandbytes as bnb

    saved = ours.state_dict()
    packed = bnb.nn.Linear4bit(ours.in_features, ours.out_features, False, compute_dtype=dtype, device="meta")
    weight = saved.pop("weight")
    packed.weight = bnb.nn.Params4bit.from_prequantized(
        data=weight, quantized_stats=saved, requires_grad=False, device=weight.device
    )
    return packed


def without_grad(module, x):
    def run():
        with torch.no_grad():
            return module(x)

    return run


def dense(inputs):
    layer, x = inputs
    weight = layer.dequantize().weight
    return without_grad(lambda x: F.linear(x, weight), x)


def check(inputs):
    """fp64 from the weight as NF4 holds it."""
    layer, x = inputs
    expected = x.double() @ layer.dequantize().weight.double().t()
    return lambda name, result: close([result], [expected], computed_in(name, x), ["y"])


def case(M, N, K, dtype, device):
    def inputs():
        linear = nn.Linear(K, N, bias=False, device=device, dtype=dtype)
        return NF4Linear.from_linear(linear), torch.randn(M, K, device=device, dtype=dtype)

    return Case(
        name=f"product with an NF4 weight, forward, M {M}, {N} × {K}, {str(dtype)[6:]}",
        inputs=inputs,
        providers={
            "handtuned": lambda inputs: without_grad(*inputs),
            "bitsandbytes": lambda inputs: without_grad(bitsandbytes_linear(inputs[0], dtype).eval(), inputs[1]),
            "dense weight": dense,
        },
        check=check,
        bytes=sum(nf4_bytes(N * K)) + dtype.itemsize * M * (N + K),
        flops=2 * M * N * K,
        dtype=dtype,
        size={"M": M, "N": N, "K": K},
    )


def cases(device, quick):
    if device.type == "cuda":
        for M in (4096,) if quick else (64, 256, 512, 4096):
            yield case(M, 4096, 4096, low_precision(device), device)
    else:
        shapes = [(1024, 1024)] if quick else [(4096, 4096), (1536, 576), (11008, 4096)]
        for N, K in shapes:
            for dtype in (torch.bfloat16, torch.float32):
                for M in (1,) if quick else (1, 4, 16, 128, 512):
                    yield case(M, N, K, dtype, device)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
