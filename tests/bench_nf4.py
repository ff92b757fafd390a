"""NF4 quantize and dequantize beside bitsandbytes.

    python tests/bench_nf4.py            the same as `handtuned bench nf4`

bitsandbytes can only write its dense result to fresh memory. Ours can reuse a buffer, as NF4Linear does; on a CPU
fresh memory costs a page fault for every 4 KiB, so both are shown.
"""

import torch
from handtuned.kernels.nf4 import nf4_dequantize_reference
from handtuned.kernels.nf4_quantize import nf4_quantize_reference
from handtuned.quant import dequantize_nf4, quantize_nf4

from handtuned import bench
from handtuned.contest import Case

WRONG_CODES = 1e-4  # share of a rival's codes that may differ from ours, where a value lies on a threshold


def stored(elements, nested):
    """Bytes of codes and scales."""
    return round(elements * (0.5 + (1 / 64 + 4 / 16384 if nested else 4 / 64)))


def quantize_case(N, K, dtype, device, nested):
    def bitsandbytes(x):
        from bitsandbytes import functional as bnb

        return lambda: bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)

    def check(x):
        expected = nf4_quantize_reference(x, 64)[0].view(-1)

        def same(name, result):
            packed = (result[0] if isinstance(result, tuple) else result.packed).view(-1)
            wrong = (packed != expected).float().mean().item()
            allowed = 0 if name == "handtuned" else WRONG_CODES
            assert wrong <= allowed, f"{wrong:.1e} of the packed bytes are wrong"

        return same

    return Case(
        name=f"NF4 quantize {N} × {K} {str(dtype)[6:]}{', double quantization' if nested else ''}",
        inputs=lambda: torch.randn(N, K, device=device).to(dtype),
        contestants={
            "handtuned": lambda x: lambda: quantize_nf4(x, double_quant=nested),
            "bitsandbytes": bitsandbytes,
        },
        check=check,
        bytes=N * K * dtype.itemsize + stored(N * K, nested),
        dtype=dtype,
        size={"N": N, "K": K},
        kernel="" if nested else f"nf4_quantize[{bench.SHORT[dtype]}]",
    )


def dequantize_case(N, K, dtype, device, nested):
    def ours(reuse):
        def make(q):
            out = torch.randn(N, K, device=device).to(dtype) if reuse else None
            return lambda: dequantize_nf4(q, dtype, out=out)

        return make

    def bitsandbytes(q):
        """Its own function on our bytes."""
        from bitsandbytes import functional as bnb

        saved = q.state_dict("weight")
        packed = saved.pop("weight")
        state = bnb.QuantState.from_dict(saved, device=device)
        return lambda: bnb.dequantize_4bit(packed, state)

    def check(q):
        expected = nf4_dequantize_reference(q, dtype)

        def same(name, result):
            result = result.view(expected.shape)
            if name.startswith("handtuned"):
                assert torch.equal(result, expected), "not the reference's bits"
            apart = (result.double() - expected.double()).abs()
            assert (apart <= 2 * torch.finfo(dtype).eps * expected.abs()).all(), "off by more than a rounding"

        return same

    return Case(
        name=f"NF4 dequantize {N} × {K} {str(dtype)[6:]}{', double quantization' if nested else ''}",
        inputs=lambda: quantize_nf4(torch.randn(N, K, device=device).to(dtype), double_quant=nested),
        contestants={
            "handtuned": ours(reuse=True),
            "handtuned, fresh memory": ours(reuse=False),
            "bitsandbytes": bitsandbytes,
        },
        check=check,
        bytes=N * K * dtype.itemsize + stored(N * K, nested),
        dtype=dtype,
        size={"N": N, "K": K},
        kernel=f"nf4_dequantize[{bench.SHORT[dtype]}{', nested' if nested else ''}]",
    )


def cases(device, quick):
    """Double quantization first: it is the default."""
    if device.type == "cuda":
        dtype, shapes = bench.low_precision(device), [(4096, 4096), (4096, 14336)]
    else:
        dtype, shapes = torch.float32, [(1024, 1024) if quick else (4096, 4096)]
    for N, K in shapes[:1] if quick else shapes:
        for nested in (True,) if quick else (True, False):
            yield dequantize_case(N, K, dtype, device, nested)
            yield quantize_case(N, K, dtype, device, nested)


if __name__ == "__main__":
    raise SystemExit(bench.script(__file__))
