"""The memory breakdown of a training step: what takes how many bytes, and when they are there."""

from dataclasses import dataclass, field
from typing import NamedTuple

GB, GIB = 10**9, 2**30
BAR = 48


class Component(NamedTuple):
    """Bytes of one component: in full, and at the moment of the peak."""

    full: int
    at_peak: int


@dataclass(frozen=True)
class Breakdown:
    """Where the memory of a training step goes, on one device."""

    title: str
    lines: dict[str, Component]  # components do not all reach their full size at the same time
    moments: dict[str, int]  # moment of the step → bytes alive then; the largest is the peak
    parameters: int
    trainable: int  # how many of them are trained
    host: int = 0  # bytes in the host's memory
    flops: int = 0  # of a step, on one device
    layers: dict[str, float] = field(default_factory=dict)  # that can be recomputed: path → bytes freed per FLOP
    notes: tuple[str, ...] = ()  # what is worth knowing

    STATES = ("weights", "quantization constants", "adapters", "gradients", "optimizer state", "master weights")

    def __getitem__(self, component: str) -> int:
        """Bytes of a component in full; 0 if there is none of that name."""
        return self.lines.get(component, Component(0, 0)).full

    @property
    def moment(self) -> str:
        """When the peak is reached."""
        return max(self.moments, key=self.moments.get)

    @property
    def peak(self) -> int:
        """Most bytes alive at any moment."""
        return self.moments[self.moment]

    @property
    def states(self) -> int:
        """Bytes of the model's states: weights, gradients, optimizer state, master weights, all in full."""
        return sum(self[name] for name in self.STATES)

    @property
    def activations(self) -> int:
        """Bytes kept for backward at the end of forward, logits not included."""
        return sum(line.full for name, line in self.lines.items() if name.startswith("activations"))

    def __str__(self) -> str:
        width = max(map(len, self.lines), default=0) + 2
        rows = [self.title, "", f"{'':{width}}{'in full':>12}  {'at the peak':>12}"]
        for name, line in self.lines.items():
            bar = "█" * round(BAR * line.at_peak / self.peak) if self.peak else ""
            rows.append(f"{name:{width}}{size(line.full):>12}  {size(line.at_peak):>12}  {bar}")
        rows += [
            f"{'peak':{width}}{'':>12}  {size(self.peak):>12}  {'▔' * BAR}\n",
            f"peak of {both(self.peak)}, reached at: {self.moment}",
            f"model states {both(self.states)} ({self.states / self.parameters:.3g} bytes per parameter), "
            f"{self.trainable:,} of {self.parameters:,} parameters are trained",
        ]
        rows += [f"in the host's memory: {both(self.host)}"] if self.host else []
        return "\n".join([*rows, *self.notes])


def size(count: float) -> str:
    """Bytes for people: "1.23 GB" from a hundredth of a GB on, else MB."""
    if not count:
        return "–"
    return f"{count / GB:,.2f} GB" if count >= GB / 100 else f"{count / 1e6:,.2f} MB"


def both(count: float) -> str:
    """In GB (10⁹) and GiB (2³⁰), named as such; in MB and MiB below a hundredth of a GB."""
    if count < GB / 100:
        return f"{count / 1e6:,.2f} MB = {count / 2**20:,.2f} MiB"
    return f"{count / GB:,.2f} GB = {count / GIB:,.2f} GiB"
