"""The two codebooks: the 16 levels of NF4 and the 256 values of the dynamic 8-bit map."""

from functools import lru_cache

import torch


@lru_cache
def dynamic_map() -> torch.Tensor:
    """(256,) fp32, sorted: the signed dynamic 8-bit map that codes the scales.

    For each decade 10^(i-6), i = 0 … 6, [0.1, 1] is divided into 2^i equal cells whose
    midpoints, of either sign, are values; 0 and 1 complete the 256.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)
