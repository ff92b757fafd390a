"""The roofline of the machine at hand: what it reaches today, and every time of a benchmark beside that.

    floor = max(bytes / bandwidth, FLOPs / rate)        of ceiling = floor / time

Both rates are measured in the run that uses them, by torch's copy and product on random data, the fastest of several
turns: what the machine gives today, and not what its datasheet promises.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import torch

from .timing import cache_bytes, take_turns


class Ceilings:
    """Copy bandwidth and product rates of one device, each measured (if `quick`, on less) when first asked for."""

    def __init__(self, device: torch.device, quick: bool = False):
        self.device, self.quick, self.on_gpu = device, quick, device.type == "cuda"
        self.found: dict[str, float] = {}

    def _rate(self, name: str, work: float, call) -> float:
        """`work` divided by the seconds of the shortest of several turns."""
        call()
        taken = take_turns({"": [call]}, 5 if self.quick else 11, self.device, share=time.monotonic() + 5.0)[""]
        self.found[name] = work / taken["min"]
        return self.found[name]

    def bandwidth(self) -> float:
        """Bytes per second of a copy far larger than the cache; bytes read and written both count."""
        if "copy" in self.found:
            return self.found["copy"]
        size = min(2**30 if self.on_gpu else 2**28, max(4 * cache_bytes(self.device), 2**26))
        source = torch.randn(size // (8 if self.quick else 4), device=self.device)
        target = torch.empty_like(source)
        return self._rate("copy", 2 * source.nbytes, lambda: target.copy_(source))

    def rate(self, dtype: torch.dtype) -> float:
        """FLOPs per second of a large square product; a CPU's ceiling is that of float32, whatever the dtype."""
        dtype = dtype if self.on_gpu else torch.float32
        name = str(dtype).removeprefix("torch.")
        if name in self.found:
            return self.found[name]
        n = 8192 if self.on_gpu else 1024
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return self._rate(name, 2 * n**3, lambda: torch.mm(a, b, out=out))

    def rate_records(self, record: dict) -> dict:
        """Add to a benchmark's record its floor and what bounds it, and to each provider its speed and share."""
        work = {"memory": record["bytes"] / self.bandwidth()} if record["bytes"] else {}
        if record["flops"]:
            work["arithmetic"] = record["flops"] / self.rate(getattr(torch, record["dtype"]))
        if work:
            record["bound"] = max(work, key=work.get)
            record["floor"] = work[record["bound"]]
        for taken in record["contestants"].values():
            if work:
                taken["of_ceiling"] = record["floor"] / taken["median"]
            for unit in ("bytes", "flops"):
                if record[unit]:
                    taken[f"{unit}_per_second"] = record[unit] / taken["median"]
        return record


def draw(ceilings: dict[str, float], records: Iterable[dict], title: str, path: str | Path) -> None:
    """Draw a roofline: FLOPs per second over FLOPs per byte, a mark for each provider, under the measured ceilings.

    Work without FLOPs (dequantizing, copying) stands in a second panel, as bytes per second. The file's suffix chooses
    the format.
    """
    from matplotlib.figure import Figure

    records = [record for record in records if record["contestants"] and record["bytes"] and "floor" in record]
    counted = [(record["flops"] / record["bytes"], record) for record in records if record["flops"]]
    moved = [record for record in reversed(records) if not record["flops"]]
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = dict.fromkeys(name for record in records for name in record["contestants"])
    style = {name: {"marker": "o", "linestyle": "", "color": f"C{at % 10}", "markersize": 5}
             for at, name in enumerate(names)}  # fmt: skip
    copy, ends = ceilings["copy"], [1.0, 100.0, *(intensity for intensity, _ in counted)]
    first, last = min(ends) / 2, max(ends) * 2
    for name, rate in ceilings.items():
        if name != "copy":
            xs = [first, max(first, min(rate / copy, last)), last]
            left.plot(xs, [min(rate, x * copy) / 1e12 for x in xs], color="black", linewidth=1)
            text = f"{name} product, {rate / 1e12:.3g} TFLOP/s"
            left.annotate(text, (last, rate / 1e12), ha="right", va="bottom", fontsize=8)
    for intensity, record in counted:
        for name, taken in record["contestants"].items():
            left.plot(intensity, taken["flops_per_second"] / 1e12, **style[name])
    for at, record in enumerate(moved):
        for name, taken in record["contestants"].items():
            right.plot(taken["bytes_per_second"] / 1e9, at, **style[name])
    left.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s", title=title)
    left.grid(alpha=0.3, which="both")
    right.set_yticks(range(len(moved)), [record["name"] for record in moved], fontsize=7)
    right.axvline(copy / 1e9, color="black", linewidth=1)
    right.set(xlabel="GB/s (line: a copy)", title="work without products", xlim=(0, None))
    right.grid(alpha=0.3, axis="x")
    if names:
        marks = [left.plot([], [], label=name, **style[name])[0] for name in names]
        figure.legend(handles=marks, fontsize=8, loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=110)
