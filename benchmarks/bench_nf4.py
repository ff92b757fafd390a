"""NF4 dequantize beside bitsandbytes.

    python benchmarks/bench_nf4.py            the same as `handtuned bench nf4`

bitsandbytes can only write its dense result to fresh memory. Ours can reuse a buffer, as NF4Linear does; on a CPU
fresh memory costs a page fault for every 4 KiB, so both are shown.
"""

import torch
from handtuned.kernels.nf4 import nf4_dequantize_reference
from handtuned.quant import dequantize_nf4, quantize_nf4
from handtuned.quant.nf4 import nf4_bytes
from shared import low_precision, short

from handtuned.bench import script
from handtuned.harness import Case


def ours(reuse, dtype):
    def make(q):
        out = torch.randn(q.shape, device=q.device).to(dtype) if reuse else None
        return lambda: dequantize_nf4(q, dtype, out=out)

    return make


def bitsandbytes(q):
    """Its own function on our bytes."""
    from bitsandbytes import functional as bnb

    saved = q.state_dict("weight")
    packed = saved.pop("weight")
    state = bnb.QuantState.from_dict(saved, device=q.device)
    return lambda: bnb.dequantize_4bit(packed, state)


def check(q):
    expected = nf4_dequantize_reference(q, q.dtype)

    def same(name, result):
        result = result.view(expected.shape)
        if name.startswith("handtuned"):
            assert torch.equal(result, expected), "not the reference's bits"
        apart = (result.double() - expected.double()).abs()
        assert (apart <= 2 * torch.finfo(q.dtype).eps * expected.abs()).all(), "off by more than a rounding"

    return same


def case(N, K, dtype, device, nested):
    return Case(
        name=f"NF4 dequantize {N} × {K} {str(dtype)[6:]}{', double quantization' if nested else ''}",
        inputs=lambda: quantize_nf4(torch.randn(N, K, device=device).to(dtype), double_quant=nested),
        providers={
            "handtuned": ours(True, dtype),
            "handtuned, fresh memory": ours(False, dtype),
            "bitsandbytes": bitsandbytes,
        },
        check=check,
        bytes=N * K * dtype.itemsize + sum(nf4_bytes(N * K, double_quant=nested)),
        dtype=dtype,
        size={"N": N, "K": K},
        kernel=f"nf4_dequantize[{short(dtype)}{', nested' if nested else ''}]",
    )


def shapes(device, quick):
    """(N, K) and whether scales are quantized too: with that first, as it is the default."""
    if device.type == "cuda":
        sizes = [(4096, 4096)] if quick else [(4096, 4096), (4096, 14336)]
    else:
        sizes = [(1024, 1024)] if quick else [(4096, 4096)]
    return [(*size, nested) for size in sizes for nested in ((True,) if quick else (True, False))]


def cases(device, quick):
    for N, K, nested in shapes(device, quick):
        yield case(N, K, low_precision(device), device, nested)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
