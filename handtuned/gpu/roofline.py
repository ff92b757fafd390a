"""How long an operation may take on a card that is not there, from what its X-ray counted.

Whatever a kernel does, it moves at least its bytes and computes at least its FLOPs: the floor, at published peaks.
No kernel reaches those, so a prediction takes the shares of them that others measured (`published.py`), each as a
range, and asks what binds. The largest of four times is the bound:

    memory   bytes that must move           / bandwidth × share
    tensor   FLOPs executed, padded         / dense rate × share, by the kind of tensor-core instruction
    shared   wavefronts of shared memory    / 1 per clock and multiprocessor
    issue    warp instructions              / (4 per clock and multiprocessor, or fewer where warps are few)

That is a model, not a measurement; ASSUMES says what it leaves out.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..harness.timing import OURS
from .cards import GPUS, Gpu
from .examine import Xray
from .operations import Size
from .published import CLOCKS_BETWEEN, START, share
from .session import LaunchRecord

ASSUMES = """\
Predictions are a model, not measurements. Each is a range between shares of the published peaks that others have
reached (handtuned/gpu/published.py holds them with their sources) and between 2 and 5 clocks from one instruction of a
warp to its next. Counts are those of the programs that the emulator executed, scaled to the launch; PTX
instructions become machine instructions in the proportion of their static numbers. The bytes are the least possible,
each array once. The model lets memory, tensor cores, shared memory and instruction issue overlap perfectly and gives
the busiest multiprocessor its whole number of programs. It leaves out cache misses beyond the least bytes, the traffic
between L2 and the multiprocessors, latency at the beginning and end of programs, instructions of less than full rate,
the power limit, and what torch and the host do around the kernels. Kernels with the tensor cores of sm_100 are not
executed: of these it knows the least bytes and the useful FLOPs alone."""
KINDS = ("memory", "tensor", "shared", "issue")
Range = tuple[float, float]


@dataclass(frozen=True)
class Prediction:
    """Seconds; ranges are (optimistic, pessimistic). `measured` is None where no result for the same is at hand."""

    gpu: Gpu
    size: Size
    floor: float
    memory: Range
    tensor: Range
    shared: Range
    issue: Range
    seconds: Range
    measured: float | None = None

    @property
    def bound(self) -> str:
        """What binds in the middle of the ranges."""
        largest = max(KINDS, key=lambda kind: sum(getattr(self, kind)))
        return largest if max(getattr(self, largest)) >= min(self.seconds) else "launch"


def tensor_kind(launch: LaunchRecord) -> str:
    """Of `published.SHARES`; "" where no tensor core is used."""
    families = launch.code.tensor_core
    if not families:
        return ""
    kind = next((kind for kind in ("tcgen05", "wgmma") if families[kind]), "mma.sync")
    with_tma = kind == "wgmma" and any("TMA" in what for what, _ in launch.code.memory)
    return f"{kind}, TMA" if with_tma else kind


def _launch_times(launch: LaunchRecord, gpu: Gpu, good: int, flops: int) -> dict[str, float]:
    """Seconds of one kernel; good 0: pessimistic, 1: optimistic; flops: of one that was not executed."""
    uneven = math.ceil(launch.programs / gpu.multiprocessors) * gpu.multiprocessors / launch.programs
    kind = tensor_kind(launch)
    rate = gpu.tensor * (share(gpu.arch, kind)[good] if kind else 1.0)
    if not launch.sampled:
        return {"tensor": flops / rate * uneven, "shared": 0.0, "issue": 0.0}
    waiting = -(-launch.programs // gpu.multiprocessors) * launch.threads // 32  # warps that a multiprocessor is given
    resident = min(launch.occupancy.warps, waiting)
    per_clock = min(4.0, resident / CLOCKS_BETWEEN[good])
    return {
        "tensor": launch.counters.tensor_flops * launch.scale / rate * uneven,
        "shared": launch.counters.shared.cost * launch.scale / (gpu.multiprocessors * gpu.clock) * uneven,
        "issue": launch.warp_instructions / (per_clock * gpu.multiprocessors * gpu.clock) * uneven,
    }


def predict(ray: Xray, gpu: Gpu, measured: float | None = None) -> Prediction | None:
    """The model's times for one X-ray on one card; None where it did not compile."""
    if ray.error:
        return None
    operation, size = ray.operation, ray.size
    moved, ranges = operation.bytes(size) / gpu.bandwidth, {kind: [] for kind in (*KINDS, "seconds")}
    for good in (1, 0):
        times = [_launch_times(launch, gpu, good, operation.flops(size)) for launch in ray.launches]
        total = {"memory": moved / share(gpu.arch, "memory")[good]}
        total |= {kind: sum(each[kind] for each in times) for kind in KINDS[1:]}
        for kind, seconds in total.items():
            ranges[kind].append(seconds)
        ranges["seconds"].append(max(*total.values(), START[good] * len(times)))
    floor = max(moved, operation.flops(size) / gpu.tensor if any(map(tensor_kind, ray.launches)) else 0.0)
    return Prediction(gpu, size, floor, **{kind: tuple(pair) for kind, pair in ranges.items()}, measured=measured)


@dataclass(frozen=True)
class Measured:
    """One time of ours from a file of `handtuned bench --json`; `operation` names one of `operations.py`."""

    device: dict
    operation: str
    size: dict
    seconds: float

    def fits(self, operation: str, gpu: Gpu) -> bool:
        """Whether it is of this operation and card: an H100 PCIe or a slice of an H200 has fewer multiprocessors."""
        same = self.device.get("multiprocessors") in (None, gpu.multiprocessors)
        named = re.search(rf"\b{gpu.name}\b", self.device["name"]) is not None
        return same and named and operation == self.operation


def measurements(folder: str | Path) -> list[Measured]:
    """All GPU times of single operations in the JSON files of a folder; other files are passed over."""
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # cut short, or not text
            continue
        device = content.get("device", {}) if isinstance(content, dict) else {}
        if device.get("kind") == "cuda":
            for record in (record for results in content["results"].values() for record in results):
                if record.get("kernel") and OURS in record["contestants"]:
                    seconds = record["contestants"][OURS]["median"]
                    found.append(Measured(device, record["kernel"], record["size"], seconds))
    return found


def predictions(ray: Xray, known: Iterable[Measured]) -> Iterator[Prediction]:
    """One for each card of the X-ray's architecture, with the time measured there at the X-ray's size."""
    for gpu in (gpu for gpu in GPUS if gpu.arch == ray.arch):
        there = [m.seconds for m in known if m.fits(ray.operation.name, gpu) and ray.size.but(m.size) == ray.size]
        made = predict(ray, gpu, there[0] if there else None)
        if made is not None:
            yield made
