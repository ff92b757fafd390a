"""One LoRA layer on an NF4 weight beside peft on bitsandbytes': training batches, and a few rows forward.

    python benchmarks/bench_qlora.py           the same as `handtuned bench qlora`
"""

import torch
from bench_lora import NAMES, Layer, exact, step, under_autocast, with_ours, with_peft, with_unsloth
from bench_nf4_matmul import bitsandbytes_linear
from handtuned.quant import NF4Linear
from handtuned.quant.nf4 import nf4_bytes
from shared import close, computed_in, lora_bytes, low_precision

from handtuned.bench import script
from handtuned.harness import Case


def random_layer(*sizes):
    """A layer whose base is in NF4; all providers work on the same bytes."""
    layer = Layer.random(*sizes)
    layer.linear = NF4Linear.from_linear(layer.linear)
    return layer


def theirs(layer):
    return with_peft(bitsandbytes_linear(layer.linear, layer.x.dtype), layer)


def unsloth(layer):
    packed = bitsandbytes_linear(layer.linear, layer.x.dtype)
    return with_unsloth(packed.weight, packed.weight.quant_state, layer)


def unsloth_decoding(layer):
    """unsloth's own way to generate: M sequences of one token, through peft's layer."""
    from unsloth.kernels.utils import fast_linear_forward

    projection, A, B = theirs(layer)
    return lambda x: fast_linear_forward(projection, x[:, None])[:, 0], A, B


def check(layer):
    """fp64 from the weight as NF4 holds it."""
    weight = layer.linear.dequantize().weight
    _, adapted = exact(layer, weight)
    return lambda name, result: close(result, adapted, computed_in(name, layer.x), NAMES)


def forward(wrapped, layer):
    module, x = wrapped[0], layer.x.detach()
    if isinstance(module, torch.nn.Module):
        module.eval()  # in this mode alone, and for such an x, bitsandbytes packs its codes anew for AVX512-BF16

    def run():
        with torch.no_grad():
            return (module(x),)

    return run


def case(M, N, K, rank, dtype, device, training):
    low, run = dtype.itemsize, step if training else forward
    passes = 2 if training else 1
    saved = (low * N * K - sum(nf4_bytes(N * K))) * passes  # W is read as codes
    providers = {
        "handtuned": lambda layer: run(with_ours(layer.linear, layer), layer),
        "peft + bitsandbytes": lambda layer: run(theirs(layer), layer),
    }
    if training and low == 2:
        providers["peft + bitsandbytes autocast"] = lambda layer: run(under_autocast(theirs(layer)), layer)
    if device.type == "cuda":
        theirs_too = unsloth if training else unsloth_decoding
        providers["unsloth + bitsandbytes"] = lambda layer: run(theirs_too(layer), layer)
    what = "forward and backward" if training else "forward"
    return Case(
        name=f"LoRA on NF4, {what}, M {M}, {N} × {K}, r {rank}, {str(dtype)[6:]}",
        inputs=lambda: random_layer(M, N, K, rank, dtype, device),
        providers=providers,
        check=check,
        bytes=sum(lora_bytes(M, N, K, rank, low)[:passes]) - saved,
        flops=2 * passes * M * N * K + (6 if training else 2) * M * rank * (N + K),
        footprint=low * passes * (M * K + M * N) + N * K // 2,
        dtype=dtype,
        size={"M": M, "N": N, "K": K, "rank": rank},
    )


def cases(device, quick):
    if device.type == "cuda":
        dtype = low_precision(device)
        shapes = [(4096, 4096)] if quick else [(4096, 4096), (4096, 14336)]
        for M in (4096,) if quick else (4096, 512):
            yield case(M, 4096, 4096, 16, dtype, device, training=True)
        for N, K in shapes:
            for M in (1, 16) if quick else (1, 4, 16):
                yield case(M, N, K, 16, dtype, device, training=False)
    else:
        yield case(128 if quick else 512, 1024, 1024, 8, torch.float32, device, training=True)
        if not quick:
            yield case(512, 1536, 576, 8, torch.float32, device, training=True)
            yield case(512, 1024, 1024, 8, torch.bfloat16, device, training=True)
            for dtype in (torch.float32, torch.bfloat16):
                yield case(1, 4096, 4096, 8, dtype, device, training=False)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
