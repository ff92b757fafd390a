"""Where the two codebooks come from: the 16 levels of NF4, and the 256 values that code its scales."""

from statistics import NormalDist

import numpy as np
import torch


def normal_quantile_levels() -> torch.Tensor:
    """Derive the 16 levels of NF4 (NormalFloat, Dettmers et al. 2023, "QLoRA", section 3); (16,) fp32.

    Weights of a trained layer are close to normal. A code wastes nothing if every level is used equally often, so the
    levels belong at quantiles of the normal distribution, Φ⁻¹(p) at equally spaced p. Two things bend this plan.

    - Zero must be a level: padding and pruned weights must stay zero. Sixteen is even, so one side gets eight levels
      and the other seven, each from its own even spacing between Φ⁻¹(½) = 0 and the outermost p.
    - Φ⁻¹(1) is infinite. The outermost p is the mean of what 2·16 and 2·15 half-steps would leave:
      1 - ½ (1/32 + 1/30) = 0.9677083.

    Dividing by the outermost level brings them into [-1, 1], to meet weights divided by the largest
    magnitude of their block. The probabilities are spaced in fp32, each half stepped from its own end, so
    the result is NF4_CODE to the last bit. (Equation 4 of the paper describes another spacing, whose
    outermost gaps are narrower; these are the levels that every checkpoint uses.)
    """
    outermost, half = np.float32(0.9677083), np.float32(0.5)

    def side(levels: int) -> list[float]:
        step = (half - outermost) / np.float32(levels)
        from_outside = [outermost + np.float32(i) * step for i in range((levels + 1) // 2)]
        from_inside = [half - np.float32(levels - i) * step for i in range((levels + 1) // 2, levels)]
        return [NormalDist().inv_cdf(float(p)) for p in from_outside + from_inside]

    positive, negative = side(8), side(7)
    values = np.array(sorted([*positive, 0.0, *(-v for v in negative)]), dtype=np.float32)
    return torch.from_numpy(values / values.max())


def _edges(cells: int) -> np.ndarray:
    """cells + 1 numbers from 0.1 to 1 in fp32, each rounded once: what torch.linspace gives on a CPU that fuses
    multiplication and addition, and so what bitsandbytes writes. Without AVX2 torch's own differ in the last bit."""
    low, high = np.float32(0.1), np.float32(1)
    step, index = np.float64((high - low) / np.float32(cells)), np.arange(cells + 1)
    from_below = index < (cells + 1) // 2
    return np.where(from_below, low + step * index, high - step * (cells - index)).astype(np.float32)


def dynamic_map(signed: bool = True) -> torch.Tensor:
    """The dynamic 8-bit map (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"); (256,) fp32.

    A float of 8 bits whose exponent and fraction share their bits: the sign, then a run of zeros that
    counts decades down from 1, then a one, then whatever bits are left as a linear fraction. Large
    magnitudes get many fraction bits, small ones get range: 10^(i-6), i = 0 … 6, has 2^i values of each
    sign, at the middles of 2^i equal cells of [0.1, 1]. Those are 254; 0 and 1 complete the map.

    Returns:
        Sorted: 127 negative values, 0, 128 positive ones; without a sign 2^(i+1) in each decade, 0 and 255 positive.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = _edges(2 ** (i if signed else i + 1))
        middles = np.float32(10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


DYNAMIC_MAP = dynamic_map()
