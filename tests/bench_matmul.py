"""scaled_matmul against torch's product followed by a scale and a check for overflow.

    python tests/bench_matmul.py [--device cpu|cuda] [--sizes 1024 4096 8192] [--rounds 9]

On a GPU the operands are rotated among several buffers, so that they come from memory and not from
the L2 cache, and TFLOP/s are printed. On a CPU this times the reference, in FP32.
"""

import argparse
import itertools

import torch
from handtuned.amp import scaled_matmul

from handtuned.bench import compare, table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    for size in args.sizes or ([1024, 4096, 8192] if args.device == "cuda" else [256, 512]):
        buffers = [
            [torch.randn(size, size, device=args.device).half() for _ in range(2)]
            for _ in range(4 if args.device == "cuda" else 1)
        ]
        exact = buffers[0][0].double() @ buffers[0][1].double() * 0.125

        def check(name, result, exact=exact):
            c = result[0] if isinstance(result, tuple) else result
            error = (c.double() - exact).abs().max() / exact.abs().max()
            assert error < 2**-9, f"{name}: relative error {error:.1e}"

        def rotate(product, buffers=buffers):
            turn = itertools.cycle(buffers)
            return lambda: product(*next(turn))

        def separate(a, b):
            c = (a @ b) * 0.125
            return c, (~torch.isfinite(c)).any()

        contestants = {
            "scaled_matmul": rotate(lambda a, b: scaled_matmul(a, b, 0.125)),
            "torch, scale, check": rotate(separate),
            "torch alone": rotate(lambda a, b: a @ b),
        }
        times = compare(contestants, lambda name, r: name == "torch alone" or check(name, r), args.rounds, args.device)
        print(f"{size} × {size} × {size} fp16, {args.device}")
        print(table(times, "scaled_matmul"))
        print(f"scaled_matmul: {2 * size**3 / times['scaled_matmul']['median'] / 1e12:.2f} TFLOP/s\n")


if __name__ == "__main__":
    main()
