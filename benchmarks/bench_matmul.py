"""scaled_matmul beside torch's product followed by a scale and a check for overflow.

    python benchmarks/bench_matmul.py          the same as `handtuned bench matmul`

On a CPU this times the reference.
"""

import torch
from handtuned.amp import scaled_matmul
from shared import error

from handtuned.bench import script
from handtuned.harness import Case

SCALE = 0.125


def separate(a, b):
    c = (a @ b) * SCALE
    return c, (~torch.isfinite(c)).any()


def check(inputs):
    exact = inputs[0].double() @ inputs[1].double()

    def close(name, result):
        alone = name == "torch product alone"
        c, expected = (result, exact) if alone else (result[0], exact * SCALE)
        off = error(c, expected)
        assert off < 2**-9, f"off by {off:.1e}"
        assert alone or not result[1], "an overflow was reported"

    return close


def case(n, device):
    return Case(
        name=f"product with a scale, {n} × {n} × {n} float16",
        inputs=lambda: [torch.randn(n, n, device=device).half() for _ in range(2)],
        providers={
            "handtuned": lambda ab: lambda: scaled_matmul(*ab, SCALE),
            "torch": lambda ab: lambda: separate(*ab),
            "torch product alone": lambda ab: lambda: ab[0] @ ab[1],
        },
        check=check,
        bytes=6 * n * n,
        flops=2 * n**3,
        footprint=4 * n * n,
        dtype=torch.float16,
        size={"M": n, "N": n, "K": n},
        kernel="scaled_matmul[fp16, nn]",
    )


def cases(device, quick):
    if device.type == "cuda":
        sizes = (4096,) if quick else (4096, 8192, 1024)
    else:
        sizes = (256,) if quick else (512,)
    for n in sizes:
        yield case(n, device)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
