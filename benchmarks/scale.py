"""What ZeRO costs on many devices: a model of step time, from link bandwidths and counted communication.

    python benchmarks/scale.py docs/scale.md            # writes the tables between its markers

Nothing here is measured on a GPU. A step of one micro-batch takes

    compute         8 · A · tokens / (efficiency · peak)        2A forward, 4A backward, 2A forward again (checkpoints)
    communication   Σ over collectives of a ring of N:
                    bytes · (N − 1)/N / link                    within a node, or if this takes longer
                    bytes · (N − n)/N / network                 into a node of n devices, all its adapters together
                    + (N − 1) · latency for each call
    offloading      4A/N bytes over the host link, 28A/N bytes through the host's memory (Adam)

and between max(compute, communication), if all of it were hidden behind computation, and their sum if
none is. `ZeroOptimizer` hides nothing: its collectives are called one after the other, so as to be readable.

How many elements go through the collectives is not written down here: `counted` runs `ZeroOptimizer`
on a small model and looks (tests find the same with 2 and 4 processes). Bytes per device come from `estimate`.
"""

import re
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from handtuned.nn.files import whole_file
from handtuned.optim import ZeroOptimizer
from torch import nn

from handtuned.memory import estimate
from handtuned.memory.model_shapes import PRESETS

STAGES = (0, 1, 2, 3)
BYTES = 2  # of a 16-bit element
TOKENS = 4096
DEVICES = (8, 64, 1024)
MODELS = ("7b", "70b")


@dataclass(frozen=True)
class Cluster:
    """Nodes of 8 devices; bandwidths in bytes/s and one direction.

    Attributes:
        memory: bytes of a device. peak: its dense BF16 FLOP/s. efficiency: the part of it that training reaches.
        link: between devices of a node, each. network: into a node, all adapters together.
        host_link: device to host. host_memory: of the host, for each device.
        latency: seconds of one hop of a ring.
    """

    name: str
    network: float
    memory: float = 80e9
    peak: float = 989e12
    efficiency: float = 0.4
    link: float = 450e9
    host_link: float = 64e9
    host_memory: float = 76.8e9
    latency: float = 2e-6
    node: int = 8


FAST = Cluster("8 × 400 Gb/s a node", network=8 * 50e9)
SLOW = Cluster("100 Gb/s a node", network=12.5e9)


@dataclass(frozen=True)
class Step:
    """Seconds of a step's parts, and bytes.

    Attributes:
        states, peak: bytes of model states on a device, and of all at the fullest moment.
        sent: bytes that a device sends in collectives.
        compute, communication, offloading: seconds.
    """

    states: int
    peak: int
    sent: float
    compute: float
    communication: float
    offloading: float

    @property
    def hidden(self) -> float:
        """Seconds if communication is hidden behind computation."""
        return max(self.compute, self.communication) + self.offloading

    @property
    def exposed(self) -> float:
        """Seconds if it is not."""
        return self.compute + self.communication + self.offloading


class _Layers(nn.Module):
    """Layers of two linears each."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        linears = (nn.Linear(width, width, bias=False) for _ in range(2 * layers))
        self.layers = nn.ModuleList(nn.Sequential(*pair) for pair in zip(linears, linears, strict=True))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@lru_cache
def counted(stage: int, micro_batches: int = 1, layers: int = 6, width: int = 8) -> tuple[Counter, Counter]:
    """Run one step of `ZeroOptimizer` and count: collective → elements in units of A, and calls per layer.

    Stage 0, DistributedDataParallel, all-reduces A elements: a reduce-scatter and an all-gather of stage 1's size.
    Gradients of several micro-batches are accumulated as memory allows: stages 0 and 1 have room for full ones and
    reduce their sum; 2 and 3 reduce every time.
    """
    model = _Layers(layers, width)
    zero = ZeroOptimizer(model, torch.optim.SGD, stage=max(1, stage), lr=0.1)
    zero.group.traffic.clear()
    zero.group.calls.clear()
    for left in reversed(range(micro_batches)):
        with zero.no_sync() if stage < 2 and left else nullcontext():
            model(torch.ones(1, width)).sum().backward()
    zero.step()
    names = ("reduce-scatter", "all-gather")
    elements = Counter({name: zero.group.traffic[name] / (2 * layers * width**2) for name in names})
    calls = Counter({name: zero.group.calls[name] / layers for name in names})
    return elements, calls


def simulate(
    model: str, stage: int, devices: int, cluster: Cluster, tokens: int = TOKENS, offload: bool = False
) -> Step:
    """One optimizer step of one micro-batch of `tokens` tokens (one row) per device.

    Args:
        model: a preset, see `memory.model_shapes`.
        stage: 0 (DistributedDataParallel) to 3.
        devices: N.
        offload: optimizer state and gradients on the host.
    """
    shape = PRESETS[model]
    size = shape.parameters
    memory = estimate(shape, dtype="bfloat16", batch=1, seq=tokens, checkpoint=True, zero=stage, world_size=devices,
                      offload=offload)  # fmt: skip
    elements, calls_per_layer = counted(stage)
    sent = seconds = 0.0
    for name, factor in elements.items():
        volume = factor * size * BYTES
        calls = calls_per_layer[name] * shape.layers if stage == 3 else -(-size // ZeroOptimizer.bucket_elements)
        sent += volume * (devices - 1) / devices
        seconds += ring(volume, devices, cluster) + calls * (devices - 1) * cluster.latency
    mine = size / devices
    moving = 2 * BYTES * mine / cluster.host_link + 28 * mine / cluster.host_memory if offload else 0.0
    compute = 8 * size * tokens / (cluster.efficiency * cluster.peak)
    return Step(memory.states, memory.peak, sent, compute, seconds, moving)


def ring(volume: float, devices: int, cluster: Cluster) -> float:
    """Seconds of a reduce-scatter or all-gather of `volume` bytes, without latency."""
    within = volume * (devices - 1) / devices / cluster.link
    between = volume * max(0, devices - cluster.node) / devices / cluster.network
    return max(within, between)


def break_even(stage: int, devices: int, cluster: Cluster) -> float:
    """Tokens per device at which computation takes as long as communication; the size of the model cancels out.

    8 · A · tokens / speed = Σ factor · 2A / bandwidth. Latency is left out.
    """
    seconds = sum(ring(factor * BYTES, devices, cluster) for factor in counted(stage)[0].values())
    return seconds * cluster.efficiency * cluster.peak / 8


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label(stage: int, offload: bool = False) -> str:
    return ("DDP" if stage == 0 else str(stage)) + " + offload" * offload


def volume_table() -> str:
    rows = []
    for stage in STAGES[1:]:
        elements, _ = counted(stage)
        parts = [elements["reduce-scatter"], elements["all-gather"]]
        of_eight = sum(counted(stage, micro_batches=8)[0].values())
        rows.append([label(stage), *(f"{part:g} A" for part in (*parts, sum(parts), of_eight))])
    return table(["stage", "reduce-scatter", "all-gather", "a step", "a step of 8 micro-batches"], rows)


def step_table(model: str) -> str:
    header = ["GPUs", "stage", "states, GB", "peak, GB", "fits 80 GB", "sent, GB", "compute, s"]
    rows = []
    for devices in DEVICES:
        for stage, offload in ((0, False), (1, False), (2, False), (2, True), (3, False)):
            fast, slow = (simulate(model, stage, devices, cluster, offload=offload) for cluster in (FAST, SLOW))
            times = [f"{step.hidden:.2f} … {step.exposed:.2f}" for step in (fast, slow)]
            fits = "yes" if fast.peak <= FAST.memory else "–"
            rows.append([f"{devices:,}", label(stage, offload), f"{fast.states / 1e9:,.2f}", f"{fast.peak / 1e9:,.1f}",
                         fits, f"{fast.sent / 1e9:,.1f}", f"{fast.compute:.2f}", *times])  # fmt: skip
    return table([*header, *(f"step, s, {cluster.name}" for cluster in (FAST, SLOW))], rows)


def break_even_table() -> str:
    rows = []
    for devices in DEVICES:
        for cluster in (FAST, SLOW):
            tokens = [f"{break_even(stage, devices, cluster):,.0f}" for stage in STAGES[1:]]
            rows.append([f"{devices:,}", cluster.name, *tokens])
    return table(["GPUs", "network", *(f"stage {stage}" for stage in STAGES[1:])], rows)


def saving_table() -> str:
    rows = []
    for model in MODELS:
        for devices in DEVICES:
            held = [simulate(model, stage, devices, FAST).states / 1e9 for stage in STAGES]
            saved = [f"{before - after:,.2f}" for before, after in pairwise(held)]
            rows.append([model.upper(), f"{devices:,}", *saved])
    return table(["model", "GPUs", "stage 1 saves, GB", "stage 2 more", "stage 3 more"], rows)


def tables() -> dict[str, str]:
    """Name of a marker in docs/scale.md → its table."""
    return {
        "volume": volume_table(),
        "7b": step_table("7b"),
        "70b": step_table("70b"),
        "savings": saving_table(),
        "break-even": break_even_table(),
    }


def fill(text: str) -> str:
    """Put each table between `<!-- name -->` and `<!-- end -->`.

    Raises:
        ValueError: a marker is missing.
    """
    for name, lines in tables().items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        if not marked.search(text):
            raise ValueError(f"text must have <!-- {name} --> … <!-- end -->, got none")
        text = marked.sub(lambda found, lines=lines: f"{found[1]}{lines}\n{found[2]}", text)
    return text


def main(words: list[str]) -> None:
    if not words:
        print("\n\n".join(tables().values()))
        return
    page = Path(words[0])
    with whole_file(page) as temporary:
        temporary.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
