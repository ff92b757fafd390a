"""What the host does for a LoRA layer and an AdamW step, with every launch replaced by nothing, beside plain torch.

    TRITON_INTERPRET=0 python benchmarks/host.py

Tensors are so small that plain torch's own arithmetic on a CPU hardly counts. Microseconds, the least of many turns.
"""

import time

import torch
import torch.nn.functional as F
from handtuned.kernels.lora import lora_linear
from handtuned.optim import AdamW
from torch import nn

from handtuned.gpu import driver, emulate

M, N, K, RANK = 4, 16, 16, 4


class Nothing(driver._Launcher):
    """In place of the launcher of a compiled kernel."""

    def __call__(self, *arguments):
        pass


def least(call, turns=200, calls=5):
    """Microseconds of one call."""
    call()
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return 1e6 * min(times)


def layers(dropout=0.0):
    """(ours, plain torch): functions that run one layer forward, or forward and backward."""

    def timed(dtype, layer, *adapter):
        x, W = torch.randn(M, K).to(dtype).requires_grad_(), torch.randn(N, K).to(dtype)
        A, B = (t.requires_grad_() for t in adapter)
        dy = torch.randn(M, N).to(dtype)
        forward = lambda: layer(x, W, A, B)  # noqa: E731
        return forward, lambda: torch.autograd.grad(forward(), (x, A, B), dy)

    adapter = torch.randn(RANK, K), torch.randn(N, RANK)
    ours = timed(torch.float16, lambda x, W, A, B: lora_linear(x, W, None, A, B, 0.5, dropout), *adapter)
    plain = timed(
        torch.float32, lambda x, W, A, B: F.linear(x, W) + 0.5 * F.linear(F.linear(F.dropout(x, dropout), A), B),
        *(t.clone() for t in adapter),
    )  # fmt: skip
    return ours, plain


def optimizer(count=448):
    """A step over so many tensors of a LoRA adapter."""
    params = [nn.Parameter(torch.randn(8, 64)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return AdamW(params).step


def measured():
    """What is timed → microseconds of ours, and of plain torch where it has a part."""
    found = {}
    with emulate("sm_90", programs=0):
        driver.triton.runtime.driver.active.launcher_cls = Nothing
        for dropout in (0.0, 0.05):
            name = "LoRA layer" + (", dropout" if dropout else "")
            for what, ours, plain in zip(("forward", "forward and backward"), *layers(dropout), strict=True):
                found[f"{name}, {what}"] = least(ours), least(plain)
        found["AdamW, 448 tensors"] = least(optimizer(), 50, 1), None
    return found


if __name__ == "__main__":
    for name, (ours, plain) in measured().items():
        print(f"{name}: {ours:.0f} µs" + (f", plain torch {plain:.0f} µs" if plain else ""))
