"""The two analyses of the study documents, put right, and their rule of thumb for activations."""

import math

from .breakdown import both


def korthikanti(batch: int, seq: int, hidden: int, heads: int, layers: int, flash: bool = False) -> int:
    """Bytes of activations of a GPT in 16 bits with dropout: s·b·h·(34 + 5·a·s/h) per layer, without the logits.

    With `flash` attention, which keeps no scores, s·b·h·34. For batch 1, sequence 2048 and the sizes of a
    7B model (4096, 32 heads, 32 layers) 28.5 GiB: the study documents' "28.5 G"; 8.5 GiB with flash.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", equation 2.
    """
    return layers * (34 * seq * batch * hidden + (0 if flash else 5 * heads * seq * seq * batch))


def analyze_lora_params(d: int, k: int, rank: int) -> dict[str, float]:
    """Print and return how many parameters LoRA trains for a d × k weight: (d + k)·rank against d·k.

    Returns {"original": d·k, "lora": (d + k)·rank, "ratio": per cent of the original, "reduction": 100 − ratio}.
    ValueError: a size below 1.
    """
    _at_least_one(d=d, k=k, rank=rank)
    original, lora = d * k, (d + k) * rank
    ratio = 100 * lora / original
    print(f"original parameters: {d} × {k} = {original:,}\n"
          f"LoRA parameters (rank {rank}): ({d} + {k}) × {rank} = {lora:,}\n"
          f"ratio: {ratio:.2f} %, a reduction of {100 - ratio:.2f} %")  # fmt: skip
    return {"original": original, "lora": lora, "ratio": ratio, "reduction": 100 - ratio}


def analyze_memory_savings(num_layers: int, hidden_size: int, seq_len: int, batch_size: int,
                           num_heads: int | None = None) -> dict[str, int]:  # fmt: skip
    """Print and return the activation bytes of a 16-bit GPT: all kept, a checkpoint in every layer, √n groups.

    Counted as `korthikanti` does. A checkpoint is 2·s·b·h bytes, and the inside of one group is there while it is
    recomputed. (The documents' version leaves out the heads, takes elements for bytes, and multiplies a layer by √n.)
    Attention heads are of width 128 by default.

    Returns {"standard": bytes, "every layer": bytes, "sqrt": bytes}. ValueError: a size below 1.
    """
    heads = max(1, hidden_size // 128) if num_heads is None else num_heads
    _at_least_one(num_layers=num_layers, hidden_size=hidden_size, seq_len=seq_len, batch_size=batch_size,
                  num_heads=heads)  # fmt: skip
    inside = korthikanti(batch_size, seq_len, hidden_size, heads, 1)
    boundary = 2 * batch_size * seq_len * hidden_size
    groups = round(math.sqrt(num_layers))
    savings = {"standard": num_layers * inside, "every layer": num_layers * boundary + inside,
               "sqrt": groups * boundary + math.ceil(num_layers / groups) * inside}  # fmt: skip
    print(f"{num_layers} layers, hidden {hidden_size}, {heads} heads, {batch_size} × {seq_len} tokens, 16 bits")
    for name, count in savings.items():
        print(f"{name:12} {both(count):>26}  {100 * (1 - count / savings['standard']):5.1f} % saved")
    return savings


def _at_least_one(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
