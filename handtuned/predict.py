"""What a kernel's machine code lets one expect on a GPU that is not there: three times, and the largest is the bound.

    memory   bytes that must move          / published bandwidth
    tensor   FLOPs of the tiles, padded    / published dense rate (× MMA_SHARE where the code has no wgmma or tcgen05)
    issue    warp instructions             / (4 a clock and multiprocessor)

The floor is what no implementation beats: the larger of the least bytes over the bandwidth and the least FLOPs over
the rate. This is a model, not a measurement; ASSUMES says what it leaves out.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .gpus import GPUS, Gpu
from .kernels.lora_gemms import down_blocks, down_grad_blocks, up_grads_blocks
from .kernels.runtime import KernelSpec, cdiv

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
    codes = round(n * (0.5 + 1 / 64 + 4 / 16384))
    padded_r = max(16, 1 << (r - 1).bit_length())
    if family == "nf4_dequantize":
        stored = codes if "nested" in rest else round(n * (0.5 + 4 / 64))
        return Work(cdiv(n, spec.elements), 1, stored + low * n)
    if family == "nf4_quantize":
        return Work(cdiv(n, spec.elements), 1, low * n + round(n * (0.5 + 4 / 64)))
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
        times = {"memory": self.memory, "tensor": self.tensor, "issue": self.issue}
        return max(times, key=times.get)

    @property
    def seconds(self) -> float:
        return max(self.memory, self.tensor, self.issue)


def instructions_a_warp(code, steps: int) -> int:
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
    return Prediction(
        gpu=gpu,
        size=size,
        floor=max(memory, work.flops / rate if families else 0.0),
        memory=memory,
        tensor=work.padded / reached * uneven if families else 0.0,
        issue=warps * instructions_a_warp(ray.code, work.steps) / gpu.issue * uneven,
        measured=measured,
    )


@dataclass(frozen=True)
class Measured:
    """One time of ours from a file of `handtuned bench --json`."""

    device: str
    kernel: str
    size: dict
    seconds: float
    multiprocessors: int | None = None

    def fits(self, spec: KernelSpec, gpu: Gpu) -> bool:
        """Whether it is of this kernel on this card: an H100 PCIe or a slice of an H200 has fewer multiprocessors."""
        same = self.multiprocessors in (None, gpu.multiprocessors)
        named = re.search(rf"\b{gpu.name}\b", self.device) is not None
        return same and named and spec.name.startswith(self.kernel)


def measurements(folder: str | Path) -> list[Measured]:
    """All GPU times of single kernels in the JSON files of a folder; other files are passed over."""
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("device", {}).get("kind") != "cuda":
            continue
        for record in (record for results in content["results"].values() for record in results):
            ours = record["contestants"].get("handtuned")
            if record.get("kernel") and ours:
                on = content["device"]
                found.append(Measured(on["name"], record["kernel"], record["size"], ours["median"],
                                      on.get("multiprocessors")))  # fmt: skip
    return found


def predictions(
    spec: KernelSpec, ray, size: Size, known: Iterable[Measured], gpus: Iterable[Gpu] = GPUS
) -> Iterator[Prediction]:
    """One for each GPU of the X-ray's architecture at `size`, and one for each measured size of the kernel on it."""
    for gpu in gpus:
        if gpu.arch != ray.arch:
            continue
        there = [m for m in known if m.fits(spec, gpu)]
        sizes = {Size(**{**vars(size), **m.size}): m.seconds for m in there}
        for each in dict.fromkeys([size, *sizes]):
            made = predict(spec, ray, gpu, each, sizes.get(each))
            if made is not None:
                yield made
