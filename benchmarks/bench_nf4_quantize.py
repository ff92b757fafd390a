"""NF4 quantize beside bitsandbytes.

    python benchmarks/bench_nf4_quantize.py   the same as `handtuned bench nf4_quantize`
"""

import torch
from bench_nf4 import shapes
from handtuned.kernels.nf4_quantize import nf4_quantize_reference
from handtuned.quant import quantize_nf4
from handtuned.quant.nf4 import nf4_bytes
from shared import low_precision, short

from handtuned.bench import script
from handtuned.harness import Case

WRONG_CODES = 1e-4  # share of another library's codes that may differ from ours, where a value lies on a threshold


def check(x):
    expected = nf4_quantize_reference(x, 64)[0].view(-1)

    def same(name, result):
        packed = (result[0] if isinstance(result, tuple) else result.packed).view(-1)
        wrong = (packed != expected).float().mean().item()
        allowed = 0 if name == "handtuned" else WRONG_CODES
        assert wrong <= allowed, f"{wrong:.1e} of the packed bytes are wrong"

    return same


def case(N, K, dtype, device, nested):
    def bitsandbytes(x):
        from bitsandbytes import functional as bnb

        return lambda: bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)

    return Case(
        name=f"NF4 quantize {N} × {K} {str(dtype)[6:]}{', double quantization' if nested else ''}",
        inputs=lambda: torch.randn(N, K, device=device).to(dtype),
        providers={"handtuned": lambda x: lambda: quantize_nf4(x, double_quant=nested), "bitsandbytes": bitsandbytes},
        check=check,
        bytes=N * K * dtype.itemsize + sum(nf4_bytes(N * K, double_quant=nested)),
        dtype=dtype,
        size={"N": N, "K": K},
        kernel="" if nested else f"nf4_quantize[{short(dtype)}]",
    )


def cases(device, quick):
    for N, K, nested in shapes(device, quick):
        yield case(N, K, low_precision(device), device, nested)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
