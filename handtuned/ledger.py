"""The ledger of a training step: what takes how many bytes, and when they are there."""

from dataclasses import dataclass

GB, GIB = 10**9, 2**30
BAR = 48


@dataclass(frozen=True)
class Line:
    """Bytes of one component: in full, and at the moment of the peak."""

    full: int
    at_peak: int


@dataclass(frozen=True)
class Ledger:
    """Where the memory of a training step goes, on one device.

    Attributes:
        title: what was estimated.
        lines: component → Line. Components do not all reach their full size at the same time.
        moments: moment of the step → bytes alive then; the largest is the peak.
        notes: what is worth knowing.
    """

    title: str
    lines: dict[str, Line]
    moments: dict[str, int]
    parameters: int
    trainable: int
    host: int = 0
    notes: tuple[str, ...] = ()

    STATES = ("weights", "quantization constants", "adapters", "gradients", "optimizer state", "master weights")

    def __getitem__(self, component: str) -> int:
        """Bytes of a component in full; 0 if it has none."""
        return self.lines[component].full if component in self.lines else 0

    @property
    def peak(self) -> int:
        """Most bytes alive at any moment."""
        return max(self.moments.values())

    @property
    def moment(self) -> str:
        """When the peak is reached."""
        return max(self.moments, key=self.moments.get)

    @property
    def states(self) -> int:
        """Bytes of the model's states: weights, gradients, optimizer state, master weights, all in full."""
        return sum(self[name] for name in self.STATES)

    @property
    def activations(self) -> int:
        """Bytes kept for backward at the end of forward, logits not included."""
        return sum(line.full for name, line in self.lines.items() if name.startswith("activations"))

    def __str__(self) -> str:
        return "\n".join(_table(self))


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


def _table(ledger: Ledger) -> list[str]:
    lines = [ledger.title, ""]
    width = max(map(len, ledger.lines), default=0) + 2
    lines.append(f"{'':{width}}{'in full':>12}  {'at the peak':>12}")
    peak = ledger.peak
    for name, line in ledger.lines.items():
        if not line.full:
            continue
        bar = "█" * round(BAR * line.at_peak / peak) if peak else ""
        lines.append(f"{name:{width}}{size(line.full):>12}  {size(line.at_peak):>12}  {bar}")
    lines += [
        f"{'peak':{width}}{'':>12}  {size(peak):>12}  {'▔' * BAR}",
        "",
        f"peak of {both(peak)}, reached at: {ledger.moment}",
        f"model states {both(ledger.states)} ({ledger.states / ledger.parameters:.3g} bytes a parameter), "
        f"{ledger.trainable:,} of {ledger.parameters:,} parameters are trained",
    ]
    if ledger.host:
        lines.append(f"in the host's memory: {both(ledger.host)}")
    return lines + list(ledger.notes)
