"""A few rows of x on an NF4 weight, forward, beside bitsandbytes on the same bytes and a dense weight.

    python benchmarks/bench_nf4_stream.py     the same as `handtuned bench nf4_stream`
"""

import torch
from bench_nf4_matmul import case
from shared import low_precision

from handtuned.bench import script


def cases(device, quick):
    if device.type == "cuda":
        for M in (1,) if quick else (1, 4, 16):
            yield case(M, 4096, 4096, low_precision(device), device)
    else:
        yield case(1, 1024, 1024, torch.float32, device)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
