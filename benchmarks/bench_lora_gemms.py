"""The skinny products of a LoRA layer, S = x Aᵀ, dS = s dy B, dB = s dyᵀ S and dA = dSᵀ x, beside torch's.

    python benchmarks/bench_lora_gemms.py     the same as `handtuned bench lora_gemms`
"""

import torch
from handtuned.kernels.lora_gemms import lora_down, lora_down_grad, lora_up_grads
from shared import close, low_precision

from handtuned.bench import script
from handtuned.harness import Case

SCALING = 2.0


def ours(x, dy, A, B):
    S = lora_down(x, A)
    dS, dB = lora_up_grads(dy, S, B, SCALING)
    return S, dS, dB, lora_down_grad(dS, x, A.dtype)


def by_torch(x, dy, A, B):
    """In x's dtype, as autograd would call them."""
    A, B = A.to(x.dtype), B.to(x.dtype)
    S = x @ A.t()
    dS = SCALING * (dy @ B)
    return S, dS, SCALING * (dy.t() @ S), dS.t() @ x


def check(inputs):
    expected = by_torch(*(t.double() for t in inputs))
    return lambda name, result: close(result, expected, inputs[0].dtype, ("S", "dS", "dB", "dA"))


def case(M, N, K, rank, dtype, device):
    def inputs():
        x, dy = (torch.randn(M, size, device=device, dtype=dtype) for size in (K, N))
        return x, dy, torch.randn(rank, K, device=device) / K**0.5, torch.randn(N, rank, device=device) * 0.02

    low = dtype.itemsize
    return Case(
        name=f"skinny products of LoRA, M {M}, {N} × {K}, r {rank}, {str(dtype)[6:]}",
        inputs=inputs,
        providers={
            "handtuned": lambda inputs: lambda: ours(*inputs),
            "torch": lambda inputs: lambda: by_torch(*inputs),
        },
        check=check,
        # x twice, dy once; S and dS written and read; A, B and their gradients
        bytes=low * M * (2 * K + N + 4 * rank) + 8 * rank * (N + K),
        flops=4 * M * rank * (N + K),
        dtype=dtype,
        size={"M": M, "N": N, "K": K, "rank": rank},
    )


def cases(device, quick):
    if device.type == "cuda":
        for M in (4096,) if quick else (4096, 512):
            yield case(M, 4096, 4096, 16, low_precision(device), device)
    else:
        yield case(128 if quick else 512, 1024, 1024, 8, torch.float32, device)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
