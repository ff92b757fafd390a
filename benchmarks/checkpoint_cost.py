"""What checkpointing costs and saves: FLOPs and peak activation bytes of forward + backward, by choice of segments.

    python benchmarks/checkpoint_cost.py                     SmolLM2's sizes at 8 × 512 tokens, and a smaller model
    python benchmarks/checkpoint_cost.py --batch 1 --seq 128 --real

Bytes are those that forward and backward add to weights and gradients; FLOPs are those of matrix products.
The blocks are run, without the last norm, with `x.sum()` for a loss: the output head is never recomputed, so with it
the share of added FLOPs would only be smaller. By default the program runs on tensors without values
(`FakeTensorMode`), where every operation allocates and frees as ever and nothing is computed; `--real` computes.
"""

import argparse
import contextlib

import torch
from handtuned.nn.checkpoint_plan import checkpoint_sequential, plan_checkpoints
from handtuned.nn.live_memory import LiveMemory
from handtuned.nn.transformer import TransformerBlock
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from handtuned.memory.dry_run import FLOPS
from handtuned.memory.model_shapes import PRESETS, Shape

SMALL = Shape("4 layers of 256", 4, 256, 4, 2, 64, 688, 1000)
aten = torch.ops.aten
ATTENTION = {op: FLOPS[op].__wrapped__  # from the shapes alone, as FlopCounterMode wants it
             for op in (aten._scaled_dot_product_flash_attention_for_cpu,
                        aten._scaled_dot_product_flash_attention_for_cpu_backward)}  # fmt: skip


def cost(layers, x, segments) -> tuple[int, int]:
    """(peak bytes, FLOPs) of forward and backward."""

    def step():
        y = x
        if segments is None:
            for layer in layers:
                y = layer(y)
        else:
            y = checkpoint_sequential(layers, x, segments)
        y.sum().backward()

    with LiveMemory(scan=False) as memory:
        step()
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops:  # keeps tensors alive: not with the other
        step()
    return memory.peak_added, flops.get_total_flops()


def compare(shape: Shape, batch: int, seq: int, real: bool = False) -> dict[str, tuple[int, int]]:
    """Choice of segments → (peak bytes, FLOPs)."""
    with contextlib.nullcontext() if real else FakeTensorMode():
        sizes = (shape.hidden, shape.heads, shape.intermediate, shape.kv_heads, shape.head_dim)
        layers = [TransformerBlock(*sizes) for _ in range(shape.layers)]
        x = torch.randn(batch, seq, shape.hidden, requires_grad=True)
        for layer in layers:
            for parameter in layer.parameters():
                parameter.grad = torch.zeros_like(parameter)  # has its place before anything is counted
        least = plan_checkpoints(layers, x)
        choices = {
            "none": None,
            "√n groups": "sqrt",
            "every layer": shape.layers,
            "auto": least,
            "auto, within twice that": plan_checkpoints(layers, x, budget=2 * least.peak),
        }
        return {name: cost(layers, x, segments) for name, segments in choices.items()}


def table(shape: Shape, batch: int, seq: int, costs: dict[str, tuple[int, int]]) -> str:
    none_bytes, none_flops = costs["none"]
    lines = [
        f"{shape.name}, {batch} × {seq} tokens, fp32",
        "",
        "| checkpoints | peak of activations | times less | FLOPs | FLOPs over none |",
        "|---|---|---|---|---|",
    ]
    for name, (count, flops) in costs.items():
        saved, added = none_bytes / count, flops / none_flops
        lines.append(f"| {name} | {count / 1e6:,.1f} MB | {saved:.2f} | {flops / 1e9:,.1f} G | {added:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--real", action="store_true", help="compute, instead of only allocating")
    args = parser.parse_args()
    for shape in (PRESETS["smollm2"], SMALL):
        print(table(shape, args.batch, args.seq, compare(shape, args.batch, args.seq, args.real)), end="\n\n")


if __name__ == "__main__":
    main()
