"""What others have measured, and the shares of the published peaks that predictions take from it.

Nothing here was measured by this project. A share is a range: what a kernel of that kind may be expected to reach.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One measurement: `reached` of `peak`, in the same unit; "" for any architecture."""

    arch: str
    kind: str
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


_PULL, _ISSUE = (f"https://github.com/triton-lang/triton/{part}" for part in ("pull/5461", "issues/"))
_PYPTX, _MIKAMIRAI = "https://pyptx.dev/performance/", "https://mikamirai.com/blog/gpu-memory-bandwidth/"

# All sources were read. Triton's fp8 figures are of 8192² × 4096; in fp16, it says, descriptors gain 13 %.
PUBLISHED = (
    Published("sm_90", "wgmma", "Triton, pointers, fp8", "H100", 1208.9e12, 1979e12, _PULL),
    Published("sm_90", "wgmma", "Triton, pointers, persistent, fp8", "H100", 1285.4e12, 1979e12, _PULL),
    Published("sm_90", "wgmma, TMA", "Triton, descriptors, persistent, fp8", "H100", 1330.7e12, 1979e12, _PULL),
    Published("sm_90", "wgmma, TMA", "Triton, maps of the host, persistent, fp8", "H100", 1347.3e12, 1979e12, _PULL),
    Published("sm_100", "tcgen05", "hand-written, 4096³ bf16", "B200", 1194e12, 2250e12, _PYPTX),
    Published("sm_100", "tcgen05", "hand-written, 8192³ bf16", "B200", 1240e12, 2250e12, _PYPTX),
    Published("", "mma.sync", "Triton 3.5.1, 2432³ fp16", "A100", 168.2e12, 312e12, _ISSUE + "6523"),
    Published("", "mma.sync", "Triton 3.7.1, tensor pipe busy, 2048³ fp16", "RTX 4060", 0.957, 1.0, _ISSUE + "10851"),
    Published("", "memory", "coalesced loads", "H100", 2.8e12, 3.352e12, _MIKAMIRAI),
)  # fmt: skip

# (pessimistic, optimistic): around the figures above, which are of large square products and long streams. Where one
# end has no figure, it is a guess.
SHARES = {
    ("sm_90", "wgmma"): (0.56, 0.65),
    ("sm_90", "wgmma, TMA"): (0.64, 0.70),
    ("sm_90", "mma.sync"): (0.35, 0.45),  # no figure was found
    ("sm_100", "tcgen05"): (0.50, 0.55),
    ("sm_100", "mma.sync"): (0.20, 0.45),  # no figure was found
    ("", "mma.sync"): (0.50, 0.96),
    ("", "memory"): (0.83, 0.92),
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
    return [f"{one.kind}: {one}" for one in PUBLISHED if one.arch in ("", arch)]
