"""What a profiler would count.

- **Pipes.** A warp instruction is one instruction for 32 threads. Each goes to a pipe (fp32, int, tensor, …), and a
  pipe takes only so many per clock.
- **Sectors.** A warp's access of global memory is one request; the cache serves it in sectors of 32 bytes. 32 threads
  that read 4 bytes side by side need 4 sectors; 32 threads that read a column of a matrix need 32.
- **Wavefronts.** Shared memory has 32 banks, each 4 bytes wide, side by side. In one pass (wavefront) a bank gives
  one word; threads that want different words of one bank have to wait for another pass: a bank conflict. Accesses of
  8 or 16 bytes per thread are served for 16 or 8 threads at a time.
- **least** is the fewest that the same bytes could have cost: sectors, if the different addresses of the request lay
  side by side; wavefronts, without a conflict.

All are counted by instruction, and so by source line. Instructions are those of PTX: `ptxas` turns one into none (a
move) up to a few (a division), so the sums by pipe are estimates, while sectors, wavefronts and bytes are exact.
"""

import functools
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

_IDLE = -1  # the address of a thread that does not take part


@dataclass
class Traffic:
    """Requests of warps, what they cost (sectors or wavefronts), and the least that they could have cost."""

    requests: int = 0
    cost: int = 0
    least: int = 0
    unit: str = "sectors"

    def __getattr__(self, name):
        if name in ("sectors", "wavefronts") and name == self.unit:
            return self.cost
        raise AttributeError(name)

    def add(self, other):
        self.requests += other.requests
        self.cost += other.cost
        self.least += other.least

    @property
    def per_request(self) -> float:
        return self.cost / self.requests if self.requests else 0.0


@dataclass
class Counters:
    """Sums over all programs of a launch, or over one source line of it.

    Attributes:
        instructions: pipe → warp instructions.
        tensor_flops: 2 · M · N · K of every tensor-core instruction.
        global_loads, global_stores: requests, sectors, least. Atomics count as stores.
        shared: requests, wavefronts, least; loads and stores, ldmatrix and the shared side of cp.async.
        dram_read_bytes, dram_written_bytes: from a cold L2, every sector once.
        barriers: of a program, by all its warps.
        divergent_branches: warps whose threads went different ways.
        lines: (file, line) → Counters of it; empty in those.
    """

    instructions: dict = field(default_factory=lambda: defaultdict(int))
    tensor_flops: int = 0
    global_loads: Traffic = field(default_factory=Traffic)
    global_stores: Traffic = field(default_factory=Traffic)
    shared: Traffic = field(default_factory=lambda: Traffic(unit="wavefronts"))
    dram_read_bytes: int = 0
    dram_written_bytes: int = 0
    barriers: int = 0
    divergent_branches: int = 0
    lines: dict = field(default_factory=dict)

    @property
    def warp_instructions(self) -> int:
        return sum(self.instructions.values())

    def add(self, other):
        for pipe, n in other.instructions.items():
            self.instructions[pipe] += n
        for name in ("global_loads", "global_stores", "shared"):
            getattr(self, name).add(getattr(other, name))
        for name in ("tensor_flops", "dram_read_bytes", "dram_written_bytes", "barriers", "divergent_branches"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


_PIPES = {
    "bar": "barrier", "barrier": "barrier", "wgmma": "tensor", "mma": "tensor", "shfl": "shuffle", "redux": "shuffle",
    "vote": "shuffle", "elect": "shuffle", "match": "shuffle", "activemask": "shuffle", "mov": "move", "cvta": "move",
    "bra": "control", "ret": "control", "exit": "control", "fence": "barrier", "membar": "barrier", "atom": "atomic",
    "red": "atomic", "ldmatrix": "load shared", "stmatrix": "store shared", "mbarrier": "barrier", "tensormap": "copy",
    "cp": "copy", "tcgen05": "tensor", "call": "control", "sin": "special", "cos": "special",
}  # fmt: skip
_SPECIAL = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "div"}


@functools.cache
def pipe_of(op: str) -> str:
    """The pipe that an opcode goes to."""
    parts = op.split(".")
    base, kind = parts[0], parts[-1]
    if base == "wgmma" and "mma_async" not in parts:
        return "barrier"
    if base in ("ld", "st"):
        spaces = ("shared", "global", "param", "local")
        space = next((s for s in spaces if any(p.startswith(s) for p in parts)), "global")
        return "constant" if space == "param" else f"{'load' if base == 'ld' else 'store'} {space}"
    if base == "cp" and ("wait" in op or "commit" in op):
        return "barrier"
    if base in _PIPES:
        return _PIPES[base]
    if base == "cvt":
        return "convert" if any("f" in p for p in parts[-2:]) else "int"
    if kind in ("f32", "f64"):
        return "fp64" if kind == "f64" else "special" if base in _SPECIAL else "fp32"
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return "special" if base in _SPECIAL else "fp16"
    return "int"


class Tally:
    """Counts by instruction while a launch runs."""

    def __init__(self, kernel):
        n = len(kernel.code)
        self.kernel = kernel
        self.issued, self.flops, self.barriers, self.divergent = (np.zeros(n, np.int64) for _ in range(4))
        self.traffic = {name: np.zeros((n, 3), np.int64) for name in ("global_loads", "global_stores", "shared")}

    def counters(self, dram) -> Counters:
        """dram: sectors (read, written) by instruction."""
        places = {}
        line = np.array([places.setdefault((i.file, i.line), len(places)) for i in self.kernel.code])
        columns = [self.flops, self.barriers, self.divergent, dram[0] * 32, dram[1] * 32]
        table = np.column_stack([*columns, *self.traffic.values()])
        sums = np.zeros((len(places), table.shape[1]), np.int64)
        np.add.at(sums, line, table)
        lines = [self._line(row) for row in sums.tolist()]
        for k, i, issued in zip(line.tolist(), self.kernel.code, self.issued.tolist(), strict=True):
            if issued:
                lines[k].instructions[pipe_of(i.op)] += issued
        total = Counters(lines={place: lines[k] for place, k in places.items() if lines[k].instructions})
        for each in total.lines.values():
            total.add(each)
        return total

    @staticmethod
    def _line(row):
        flops, barriers, divergent, read, written, *traffic = row
        loads, stores, shared = (traffic[k : k + 3] for k in (0, 3, 6))
        return Counters(
            tensor_flops=flops, global_loads=Traffic(*loads), global_stores=Traffic(*stores),
            shared=Traffic(*shared, unit="wavefronts"), dram_read_bytes=read, dram_written_bytes=written,
            barriers=barriers, divergent_branches=divergent,
        )  # fmt: skip


def _distinct(rows):
    """Rows sorted, and where in each a value other than _IDLE comes first."""
    rows = np.sort(rows, axis=-1)
    first = np.empty(rows.shape, bool)
    first[..., 0] = rows[..., 0] != _IDLE
    np.not_equal(rows[..., 1:], rows[..., :-1], out=first[..., 1:])
    return rows, first


def _warps(address, mask):
    """[programs, threads] addresses → [warps, 32], _IDLE where masked; one column if all threads share an address."""
    if mask is not None:
        address = np.where(mask, address, _IDLE)
    return address.reshape(-1, 1) if address.shape[1] == 1 else address.reshape(-1, 32)


def sectors(address, mask, nbytes):
    """(requests, sectors, least) of warps' accesses of global memory; address [programs, threads] int64.

    An access of one thread is aligned to its size, so it lies within one sector.
    """
    rows = _warps(address, mask)
    if rows.shape[1] == 1:
        n = int((rows != _IDLE).sum())
        return np.array((n, n, n))
    rows, first = _distinct(rows)
    least = -(-first.sum(-1) * nbytes // 32)
    sector = rows >> 5
    first[..., 1:] &= sector[..., 1:] != sector[..., :-1]
    per = first.sum(-1)
    return np.array(((per > 0).sum(), per.sum(), least.sum()))


def wavefronts(address, mask, nbytes):
    """(requests, wavefronts, least) of warps' accesses of shared memory."""
    rows = _warps(address, mask)
    if rows.shape[1] == 1:
        n = int((rows != _IDLE).sum())
        return np.array((n, n, n))
    active = (rows != _IDLE).any(-1)
    phases = max(1, nbytes // 4)
    words = np.where(rows == _IDLE, _IDLE, rows >> 2).reshape(-1, rows.shape[1] // phases)
    if phases > 1:
        each = np.where(words[..., None] == _IDLE, _IDLE, words[..., None] + np.arange(phases))
        words = each.reshape(len(words), -1)
    words, first = _distinct(words)
    slot = (np.arange(len(words))[:, None] * 32 + (words & 31))[first]
    waves = np.bincount(slot, minlength=len(words) * 32).reshape(-1, 32).max(-1)
    return np.array((active.sum(), waves.sum(), (waves > 0).sum()))
