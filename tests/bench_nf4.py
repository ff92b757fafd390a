"""NF4 on a CPU against bitsandbytes' own, 4096 × 4096 fp32; every result is checked before it is timed.

    python tests/bench_nf4.py

bitsandbytes can only write its dense result to fresh memory. Ours can reuse a buffer, as NF4Linear does; on
a CPU fresh memory of this size costs a page fault for every 4 KiB, so both are shown.
"""

import argparse

import bitsandbytes
import torch
from bitsandbytes import functional as bnb
from handtuned.quant import NF4Tensor, dequantize_nf4, quantize_nf4

from handtuned.bench import compare, table


def _check_equal(expected):
    def check(name, result):
        result = getattr(result, "packed", result)
        result = result[0] if isinstance(result, tuple) else result
        if not torch.equal(result.view(-1), expected.view(-1)):
            raise AssertionError(f"{name}: differs from bitsandbytes")

    return check


def main():
    """Print four tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(args.size, args.size)
    print(f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads), "
          f"bitsandbytes {bitsandbytes.__version__}, {args.size} × {args.size} fp32")  # fmt: skip
    out = torch.zeros_like(x)
    for double_quant in (False, True):
        how = "with" if double_quant else "without"
        packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=double_quant)
        contestants = {
            "ours": lambda nested=double_quant: quantize_nf4(x, double_quant=nested),
            "bitsandbytes": lambda nested=double_quant: bnb.quantize_4bit(
                x, quant_type="nf4", compress_statistics=nested
            ),
        }
        print(f"\nquantize, {how} double quantization")
        print(table(compare(contestants, _check_equal(packed), args.rounds), "ours"))

        saved = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        q = NF4Tensor.from_state_dict(saved)
        contestants = {
            "ours, buffer reused": lambda q=q: dequantize_nf4(q, out=out),
            "ours, fresh memory": lambda q=q: dequantize_nf4(q),
            "bitsandbytes": lambda packed=packed, state=state: bnb.dequantize_4bit(packed, state),
        }
        print(f"\ndequantize, {how} double quantization")
        expected = bnb.dequantize_4bit(packed, state)
        print(table(compare(contestants, _check_equal(expected), args.rounds), "ours, buffer reused"))


if __name__ == "__main__":
    main()
