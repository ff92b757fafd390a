"""Rows of a mixture of experts on their NF4 weights, forward, beside dense experts by torch's grouped product.

    python benchmarks/bench_nf4_experts.py     the same as `handtuned bench nf4_experts`
"""

import torch
import torch.nn.functional as F
from bench_nf4_matmul import without_grad
from handtuned.quant import NF4Experts
from handtuned.quant.nf4 import nf4_bytes
from shared import close, computed_in, low_precision

from handtuned.bench import script
from handtuned.harness import Case


def dense(inputs):
    layer, x, ends = inputs
    W = layer.dequantize().transpose(1, 2)
    return without_grad(lambda x: F.grouped_mm(x, W, offs=ends), x)


def check(inputs):
    """fp64 from the weights as NF4 holds them."""
    layer, x, ends = inputs
    rows = x.double().split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    expected = torch.cat([h @ W.t() for h, W in zip(rows, layer.dequantize().double(), strict=True)])
    return lambda name, result: close([result], [expected], computed_in(name, x), ["y"])


def case(tokens, top_k, E, N, K, dtype, device):
    """Tokens choose their experts at random."""

    def inputs():
        layer = NF4Experts.from_weight(torch.randn(E, N, K, device=device, dtype=dtype) * 0.05)
        chosen = torch.rand(tokens, E, device=device).topk(top_k).indices.flatten().sort().values
        ends = torch.searchsorted(chosen, torch.arange(E, device=device), right=True, out_int32=True)
        return layer, torch.randn(tokens * top_k, K, device=device, dtype=dtype), ends

    reached = min(E, tokens * top_k)
    return Case(
        name=f"experts in NF4, forward, {tokens} tokens to {top_k} of {E}, {N} × {K}, {str(dtype)[6:]}",
        inputs=inputs,
        providers={
            "handtuned": lambda inputs: without_grad(lambda x: inputs[0](x, inputs[2]), inputs[1]),
            "dense weights": dense,
        },
        check=check,
        bytes=reached * sum(nf4_bytes(N * K)) + dtype.itemsize * tokens * top_k * (N + K),
        flops=2 * tokens * top_k * N * K,
        dtype=dtype,
        size={"M": tokens, "N": N, "K": K},
    )


def cases(device, quick):
    if device.type == "cuda":
        for tokens in (1024,) if quick else (1, 64, 1024, 16384):
            yield case(tokens, 8, 128, 1536, 2048, low_precision(device), device)
    else:
        for tokens in (16,) if quick else (1, 16, 256):
            yield case(tokens, 2, 8, 256 if quick else 1536, 256 if quick else 2048, torch.float32, device)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
