"""What others have measured, and the shares of the published peaks that predictions take from it.

Nothing here was measured by this project. A share is a range: what a kernel of that kind may be expected to reach.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One measurement: `reached` of `peak`, in the same unit."""

    what: str
    gpu: str
    reached: float
    peak: float
    source: str

    @property
    def share(self) -> float:
        return self.reached / self.peak

    def __str__(self) -> str:
        return f"{self.share:.0%} of its peak, {self.gpu}: {self.what} ({self.source})"


_NOT_LINKED = "figure passed on without a link"

PUBLISHED = {
    ("sm_90", "wgmma"): (
        Published("Triton, pointers, fp16", "H100", 600e12, 989.4e12, _NOT_LINKED),
        Published("Triton, pointers, 8192² × 4096", "H100", 609e12, 989.4e12, _NOT_LINKED),
    ),
    ("sm_90", "wgmma, TMA"): (
        Published("Triton, TMA, persistent, fp16", "H100", 666e12, 989.4e12, _NOT_LINKED),
        Published("Triton, TMA, persistent, fp16", "H100", 689e12, 989.4e12, _NOT_LINKED),
        Published("the same with pointers, × 1.13 for descriptors", "H100", 678e12, 989.4e12,
                  "https://github.com/triton-lang/triton/pull/5461"),
    ),
    ("sm_90", "mma.sync"): (
        Published("instructions alone, nothing loaded: an upper bound", "H100", 0.63, 1.0, 
                  "Luo et al. 2024, arXiv:2402.13499"),
        Published("kernels", "H100", 0.4, 1.0, _NOT_LINKED),
    ),
    ("sm_100", "tcgen05"): (
        Published("hand-written, 4096³ bf16", "B200", 1194e12, 2250e12, "https://pyptx.dev/performance/"),
        Published("hand-written, 8192³ bf16", "B200", 1240e12, 2250e12, "https://pyptx.dev/performance/"),
    ),
    ("", "mma.sync"): (
        Published("Triton 3.5.1, 2432³ fp16", "A100", 168.2e12, 312e12, "https://github.com/triton-lang/triton/issues/6523"),
        Published("Triton 3.7.1, tensor pipe busy, 2048³ fp16", "RTX 4060", 0.957, 1.0,
                  "https://github.com/triton-lang/triton/issues/10851"),
    ),
    ("", "memory"): (
        Published("coalesced loads", "H100", 2.8e12, 3.352e12, "https://mikamirai.com/blog/gpu-memory-bandwidth/"),
        Published("copy", "H200", 4.3e12, 4.8e12, _NOT_LINKED),
    ),
}  # fmt: skip

# (pessimistic, optimistic): around the figures above, which are of large square products and long streams.
SHARES = {
    ("sm_90", "wgmma"): (0.56, 0.63),
    ("sm_90", "wgmma, TMA"): (0.64, 0.70),
    ("sm_90", "mma.sync"): (0.35, 0.45),
    ("sm_100", "tcgen05"): (0.50, 0.55),
    ("sm_100", "mma.sync"): (0.20, 0.45),  # no figure was found
    ("", "mma.sync"): (0.50, 0.95),
    ("", "memory"): (0.84, 0.92),
}
# Seconds that a kernel takes at least, from launch to end.
START = (3e-6, 2e-6)
# Clocks between two instructions of one warp: 4 where arithmetic waits for the one before it (Jia et al. 2018,
# arXiv:1804.06826), more behind a load, fewer where neighbours do not need one another.
CLOCKS_BETWEEN = (5, 2)


def share(arch: str, kind: str) -> tuple[float, float]:
    """The (pessimistic, optimistic) share of a peak that `kind` ("wgmma", "memory") reaches on an architecture."""
    return SHARES.get((arch, kind)) or SHARES["", kind]


def published(arch: str) -> list[str]:
    """Lines for a report: what was reached on an architecture, or on any."""
    return [f"{kind}: {one}" for (where, kind), found in PUBLISHED.items() if where in ("", arch) for one in found]
