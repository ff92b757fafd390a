"""The roofline: what bounds a kernel on a machine, measured where it runs, or expected of a GPU that is not there.

Whatever a kernel does, it moves at least its bytes and computes at least its FLOPs:

    floor = max(bytes / bandwidth, FLOPs / rate)        of ceiling = floor / time

`Ceilings` measures both rates in the run that uses them, by the library's own copy and product on random data, the
fastest of several turns: what the machine gives today, and not what its datasheet promises.

`predictions` models a card of `cards.py` from a kernel's machine code; the largest of three times is the bound:

    memory   bytes that must move          / published bandwidth
    tensor   FLOPs of the tiles, padded    / published dense rate (× MMA_SHARE where the code has no wgmma or tcgen05)
    issue    warp instructions             / (4 per clock and multiprocessor)

That is a model, not a measurement; ASSUMES says what it leaves out.
"""

import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..harness.timing import OURS, cache_bytes, take_turns
from ..kernels.lora_gemms import down_blocks, down_grad_blocks, up_grads_blocks
from ..kernels.runtime import KernelSpec, cdiv
from ..quant.nf4 import nf4_bytes
from .cards import GPUS, Gpu


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


MMA_SHARE = {"sm_90": 0.63, "sm_100": 0.63}
ASSUMES = """\
Predictions are a model, not measurements. It takes published peak bandwidth, tensor-core rate and boost clock as if
they were reached; counts every instruction up to the last EXIT once (both sides of a branch too) and the largest
loop once for each step through its tile; lets memory, tensor cores and instruction issue overlap perfectly; and
gives the busiest multiprocessor its whole number of programs. It leaves out latency that too few resident warps do
not hide, bank conflicts, cache misses beyond the least bytes, instructions of less than full rate, and launches.
Without wgmma or tcgen05 a Hopper GPU is taken to reach 63 % of its tensor rate (after Luo et al. 2024,
arXiv:2402.13499, for mma.sync); the same share is assumed for sm_100, where no figure was found."""


@dataclass(frozen=True)
class Size:
    """A problem: rows of x, output and input features, rank; parameters for what works on all tensors of a model."""

    M: int = 4096
    N: int = 4096
    K: int = 4096
    rank: int = 16
    parameters: int = 40_000_000

    def __str__(self) -> str:
        return f"M {self.M}, N {self.N}, K {self.K}, r {self.rank}, {self.parameters / 1e6:g} M parameters"


@dataclass(frozen=True)
class Work:
    """What one launch does: programs, steps of each through its loop, least bytes and FLOPs, FLOPs with padding."""

    programs: int
    steps: int
    bytes: int
    flops: int = 0
    padded: int = 0


def work_of(spec: KernelSpec, size: Size) -> Work | None:
    """The work of a kernel on a problem; None for a kernel that this table does not know."""
    family, _, rest = spec.name.partition("[")
    c = spec.constexprs
    M, N, K, r, n = size.M, size.N, size.K, size.rank, size.N * size.K
    low = 4 if rest.startswith("fp32") else 2
    codes = sum(nf4_bytes(n))
    padded_r = max(16, 1 << (r - 1).bit_length())
    if family == "nf4_dequantize":
        return Work(cdiv(n, spec.elements), 1, sum(nf4_bytes(n, double_quant="nested" in rest)) + low * n)
    if family == "nf4_quantize":
        return Work(cdiv(n, spec.elements), 1, low * n + sum(nf4_bytes(n, double_quant=False)))
    if family in ("nf4_one_row", "nf4_few_rows"):
        rows = 1 if family == "nf4_one_row" else min(M, 16)
        flops = 2 * rows * n + 2 * rows * N * r
        moved = codes + low * rows * (N + K) + 4 * N * r
        return Work(cdiv(N, c["BLOCK_N"]), cdiv(K, c["BLOCK_K"]), moved, flops, 2 * 16 * (n + N * padded_r))
    if family == "nf4_merge":
        flops = 2 * n * r
        return Work(cdiv(n, spec.elements), 1, codes + low * n + 4 * r * (N + K), flops, 2 * n * padded_r)
    if family == "lora_down":
        splits = down_blocks(M, K, r)["splits"]
        steps = cdiv(cdiv(K, c["BLOCK_K"]), splits)
        moved = low * M * K + 4 * r * K + low * M * r
        return Work(cdiv(M, c["BLOCK_M"]) * splits, steps, moved, 2 * M * K * r, 2 * M * K * padded_r)
    if family == "lora_up_grads":
        splits = up_grads_blocks(M, N, r)["splits"]
        steps = cdiv(cdiv(N, c["BLOCK_N"]), splits)
        moved = low * (M * N + 2 * M * r) + 8 * N * r
        return Work(cdiv(M, c["BLOCK_M"]) * splits, steps, moved, 4 * M * N * r, 4 * M * N * padded_r)
    if family == "lora_down_grad":
        splits = down_grad_blocks(M, K, r)["splits"]
        steps = cdiv(cdiv(M, c["BLOCK_M"]), splits)
        moved = low * (M * K + M * r) + 4 * r * K
        return Work(cdiv(K, c["BLOCK_K"]) * splits, steps, moved, 2 * M * K * r, 2 * M * K * padded_r)
    if family in ("lora_product", "scaled_matmul"):
        rank, wide = (r, padded_r) if family == "lora_product" else (0, 0)
        rows, columns = cdiv(M, c["BLOCK_M"]), cdiv(N, c["BLOCK_N"])
        moved = low * (M * K + n + M * N + M * rank) + 4 * N * rank
        padded = 2 * rows * c["BLOCK_M"] * columns * c["BLOCK_N"] * (K + wide)
        return Work(rows * columns, cdiv(K, c["BLOCK_K"]), moved, 2 * M * N * (K + rank), padded)
    if family == "adamw":
        return Work(cdiv(size.parameters, spec.elements), 1, 28 * size.parameters)
    if family == "unscale":
        kinds = [4 if kind == "fp32" else 2 for kind in rest.rstrip("]").split(", ")]
        return Work(cdiv(size.parameters, spec.elements), 1, round(2 * size.parameters * sum(kinds) / len(kinds)))
    return None


@dataclass(frozen=True)
class Prediction:
    """Seconds. `measured` is None where no result for the same kernel, GPU and size is at hand."""

    gpu: Gpu
    size: Size
    floor: float
    memory: float
    tensor: float
    issue: float
    measured: float | None = None

    @property
    def bound(self) -> str:
        return max(("memory", "tensor", "issue"), key=lambda kind: getattr(self, kind))

    @property
    def seconds(self) -> float:
        return getattr(self, self.bound)


def instructions_per_warp(code, steps: int) -> int:
    """Static count, with the largest outermost loop taken `steps` times."""
    largest = max((loop.instructions for loop in code.loops if loop.depth == 0), default=0)
    return code.instructions + largest * (steps - 1)


def predict(spec: KernelSpec, ray, gpu: Gpu, size: Size, measured: float | None = None) -> Prediction | None:
    """The model's times for one kernel on one GPU; None where the kernel is unknown or did not compile.

    Args:
        spec, ray: the kernel and its X-ray for `gpu.arch`.
        measured: seconds, to be carried along.
    """
    work = work_of(spec, size)
    if work is None or ray.error:
        return None
    rate = gpu.tensor * (0.5 if spec.constexprs.get("PRECISION") == "tf32" else 1.0)
    families = ray.code.tensor_core
    reached = rate * (MMA_SHARE.get(gpu.arch, 1.0) if set(families) <= {"mma.sync"} else 1.0)
    uneven = math.ceil(work.programs / gpu.multiprocessors) * gpu.multiprocessors / work.programs
    warps = work.programs * ray.threads // 32
    memory = work.bytes / gpu.bandwidth
    floor = max(memory, work.flops / rate if families else 0.0)
    tensor = work.padded / reached * uneven if families else 0.0
    issue = warps * instructions_per_warp(ray.code, work.steps) / gpu.issue * uneven
    return Prediction(gpu, size, floor, memory, tensor, issue, measured)


@dataclass(frozen=True)
class Measured:
    """One time of ours from a file of `handtuned bench --json`."""

    device: dict
    kernel: str
    size: dict
    seconds: float

    def fits(self, spec: KernelSpec, gpu: Gpu) -> bool:
        """Whether it is of this kernel on this card: an H100 PCIe or a slice of an H200 has fewer multiprocessors."""
        same = self.device.get("multiprocessors") in (None, gpu.multiprocessors)
        named = re.search(rf"\b{gpu.name}\b", self.device["name"]) is not None
        return same and named and spec.name.startswith(self.kernel)


def measurements(folder: str | Path) -> list[Measured]:
    """All GPU times of single kernels in the JSON files of a folder; other files are passed over."""
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        device = content.get("device", {}) if isinstance(content, dict) else {}
        if device.get("kind") == "cuda":
            for record in (record for results in content["results"].values() for record in results):
                if record.get("kernel") and OURS in record["contestants"]:
                    seconds = record["contestants"][OURS]["median"]
                    found.append(Measured(device, record["kernel"], record["size"], seconds))
    return found


def predictions(spec: KernelSpec, ray, size: Size, known: Iterable[Measured]) -> Iterator[Prediction]:
    """One for each GPU of the X-ray's architecture at `size`, and one for each measured size of the kernel on it."""
    for gpu in (gpu for gpu in GPUS if gpu.arch == ray.arch):
        sizes = {Size(**{**vars(size), **m.size}): m.seconds for m in known if m.fits(spec, gpu)}
        for each in dict.fromkeys([size, *sizes]):
            made = predict(spec, ray, gpu, each, sizes.get(each))
            if made is not None:
                yield made
