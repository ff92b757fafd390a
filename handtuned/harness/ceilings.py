"""The roofline of the machine at hand: what it reaches today, and every time of a benchmark beside that.

    floor = max(bytes / bandwidth, FLOPs / rate)        of ceiling = floor / time

`Ceilings` measures both rates in the run that uses them, by the library's own copy and product on random data, the
fastest of several turns: what the machine gives today, and not what its datasheet promises.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import torch

from .timing import cache_bytes, take_turns


class Ceilings:
    """Copy bandwidth and product rates of one device, each measured when first asked for and kept in `found`.

    Args:
        device: where to measure.
        quick: smaller and fewer.
    """

    def __init__(self, device: torch.device, quick: bool = False):
        self.device, self.quick = device, quick
        self.found: dict[str, float] = {}

    def _shortest(self, call) -> float:
        call()
        rounds = 5 if self.quick else 11
        return take_turns({"": [call]}, rounds, self.device, share=time.monotonic() + 5.0)[""]["min"]

    def bandwidth(self) -> float:
        """Bytes per second of a copy far larger than the cache; bytes read and written both count."""
        if "copy" not in self.found:
            most = 2**30 if self.device.type == "cuda" else 2**28
            size = min(most, max(4 * cache_bytes(self.device), 2**26)) // (2 if self.quick else 1)
            source = torch.randn(size // 4, device=self.device)
            target = torch.empty_like(source)
            self.found["copy"] = 2 * source.nbytes / self._shortest(lambda: target.copy_(source))
        return self.found["copy"]

    def rate(self, dtype: torch.dtype) -> float:
        """FLOPs per second of a large square product; a CPU's ceiling is that of float32, whatever the dtype."""
        on_gpu = self.device.type == "cuda"
        dtype = dtype if on_gpu else torch.float32
        name = str(dtype).removeprefix("torch.")
        if name not in self.found:
            n = 8192 if on_gpu else 1024
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            self.found[name] = 2 * n**3 / self._shortest(lambda: torch.mm(a, b, out=out))
        return self.found[name]

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

    Work without FLOPs (dequantizing, copying) has no place on that axis, so it stands in a second panel as bytes per
    second. The file's suffix chooses the format.
    """
    from matplotlib.figure import Figure

    records = [record for record in records if record["contestants"] and record["bytes"] and "floor" in record]
    counted = [(record["flops"] / record["bytes"], record) for record in records if record["flops"]]
    moved = [record for record in reversed(records) if not record["flops"]]
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = list(dict.fromkeys(name for record in records for name in record["contestants"]))
    style = {name: {"marker": "o", "linestyle": "", "color": f"C{at % 10}", "markersize": 5}
             for at, name in enumerate(names)}  # fmt: skip
    first, last = min([1.0, *(at for at, _ in counted)]) / 2, max([100.0, *(at for at, _ in counted)]) * 2
    for name, rate in ceilings.items():
        if name != "copy":
            xs = [first, max(first, min(rate / ceilings["copy"], last)), last]
            left.plot(xs, [min(rate, x * ceilings["copy"]) / 1e12 for x in xs], color="black", linewidth=1)
            text = f"{name} product, {rate / 1e12:.3g} TFLOP/s"
            left.annotate(text, (last, rate / 1e12), ha="right", va="bottom", fontsize=8)
    for intensity, record in counted:
        for name, taken in record["contestants"].items():
            left.plot(intensity, taken["flops_per_second"] / 1e12, **style[name])
    left.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s", title=title)
    left.grid(alpha=0.3, which="both")
    for at, record in enumerate(moved):
        for name, taken in record["contestants"].items():
            right.plot(taken["bytes_per_second"] / 1e9, at, **style[name])
    right.set_yticks(range(len(moved)), [record["name"] for record in moved], fontsize=7)
    right.axvline(ceilings["copy"] / 1e9, color="black", linewidth=1)
    right.set(xlabel="GB/s (line: a copy)", title="work without products", xlim=(0, None))
    right.grid(alpha=0.3, axis="x")
    for name in names:
        left.plot([], [], label=name, **style[name])
    if names:
        figure.legend(fontsize=8, loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=110)
