"""NF4 quantize and dequantize, ours against bitsandbytes and plain torch indexing, 4096 × 4096 fp32.

    python tests/bench_nf4.py [--size 4096] [--rounds 9]

Codes and values are compared bit for bit before anything is timed. Turns alternate. On a
CUDA GPU the tensors live there, and the buffers rotate so that they do not stay in L2.
"""

import argparse
import itertools

import torch
from handtuned.quant import NF4_CODE, dequantize_nf4, quantize_nf4

from handtuned.bench import compare, table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    import bitsandbytes.functional as F

    device = "cuda" if torch.cuda.is_available() else "cpu"
    copies = 8 if device == "cuda" else 1
    weights = [torch.randn(args.size, args.size, device=device) for _ in range(copies)]
    print(f"{args.size} × {args.size} fp32 on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    for double_quant in (False, True):
        label = "double quantization" if double_quant else "fp32 scales"
        report_quantize(weights, double_quant, label, args.rounds, device, F)
        report_dequantize(weights, double_quant, label, args.rounds, device, F)


def report_quantize(weights, double_quant, label, rounds, device, F):
    turns = itertools.cycle(weights)
    want = quantize_nf4(weights[0], 64, double_quant).packed.view(-1)
    rival, _ = F.quantize_4bit(weights[0], blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    assert torch.equal(rival.view(-1), want), "bitsandbytes gives other codes"
    contestants = {
        "handtuned": lambda: quantize_nf4(next(turns), 64, double_quant),
        "bitsandbytes": lambda: F.quantize_4bit(
            next(turns), blocksize=64, quant_type="nf4", compress_statistics=double_quant
        ),
    }
    print(f"\nquantize, {label}\n{table(compare(contestants, None, rounds, device), 'handtuned')}")


def report_dequantize(weights, double_quant, label, rounds, device, F):
    """Each contestant decodes what it packed itself; fp32 scales are the same, so the values must be too."""
    ours = [quantize_nf4(w, 64, double_quant) for w in weights]
    theirs = [F.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double_quant) for w in weights]
    out = torch.empty_like(weights[0])
    turns = itertools.cycle(range(len(weights)))
    scales = ours[0].absmax if not double_quant else None

    def plain():
        packed = ours[next(turns)].packed
        codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1).int()
        return (NF4_CODE.to(device)[codes].view(-1, 64) * scales[:, None]).view_as(out)

    contestants = {
        "handtuned": lambda: dequantize_nf4(ours[next(turns)]),
        "handtuned, out=": lambda: dequantize_nf4(ours[next(turns)], out=out),
        "bitsandbytes": lambda: F.dequantize_4bit(*theirs[next(turns)]),
    }
    if not double_quant:
        contestants["torch indexing"] = plain
    want = ours[0].dequantize()

    def check(name, result):
        if not double_quant and len(weights) == 1:
            assert torch.equal(result, want), f"{name} gives other values"

    times = compare(contestants, check, rounds, device)
    print(f"\ndequantize, {label}\n{table(times, 'handtuned')}")


if __name__ == "__main__":
    main()
