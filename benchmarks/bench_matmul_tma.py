"""The product by descriptors beside the one by pointers and the vendor's, each tile by itself.

    python benchmarks/bench_matmul_tma.py     the same as `handtuned bench matmul_tma`

Needs a GPU from sm_90 on. On any other, and on a CPU, it times what `scaled_matmul` takes there.
"""

from dataclasses import replace

import bench_matmul
import torch
from handtuned.kernels import runtime
from handtuned.kernels.matmul import SCALED_WAYS, SCALED_WAYS_TMA

from handtuned.bench import script


def case(n, device):
    """Every way of `scaled_matmul` on n × n × n, one that does not fit the card left out by the harness."""
    plain = bench_matmul.case(n, device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return plain
    scale = torch.tensor(bench_matmul.SCALE, device=device)
    ways = SCALED_WAYS_TMA if runtime.capability(device) >= 90 else SCALED_WAYS
    providers = {name: lambda ab, way=way: lambda: way(*ab, scale, True) for name, way in ways.items()}
    return replace(plain, providers={"handtuned": plain.providers["handtuned"]} | providers)


def cases(device, quick):
    sizes = (256,) if device.type != "cuda" else (4096,) if quick else (4096, 8192, 2048)
    for n in sizes:
        yield case(n, device)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
