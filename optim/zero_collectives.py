"""Cutting tensors into shards, the collectives that put them together again, and the host's memory beside them.

For N ranks a tensor of n elements, flattened and padded with zeros to N · w elements, w = ceil(n / N), is cut into N
rows; row r belongs to rank r. (Where blocks of elements share optimizer state, w is a multiple of them.) Several
tensors travel in one collective when their rows are laid side by side:

    rank 0's row   | tensor a: 0 … w_a | tensor b: 0 … w_b |
    rank 1's row   |          w_a … 2w_a |         w_b … 2w_b |

reduce-scatter sums all ranks' (N, Σw) buffers and leaves rank r with row r of the sum; all-gather takes a row from each
rank and leaves the whole buffer on all of them. A ring does either by sending (N − 1)/N of the buffer once through
every link, so each counts as A elements per rank for A elements.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F

# That module's functions have the default process group as a default argument. Imported after `init_process_group`
# (the first optimizer imports torch._dynamo, and that imports it) they would keep the group for ever, and gloo's
# threads would still run while the interpreter ends, which may abort a rank that has finished its work.

# torch 2.13 renamed them.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Collectives:
    """The calls on torch.distributed's default group: each the identity if no group was initialized, a world of one.

    `block_of` tells how many elements of a tensor of so many must stay together. `traffic`: collective → elements of
    its whole buffer, summed over this rank's calls; `calls`: how many.
    """

    def __init__(self, block_of=None):
        self.block_of = block_of or (lambda numel: 1)
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.traffic: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def width(self, numel: int) -> int:
        """w, elements of a row: whole blocks."""
        block = self.block_of(numel)
        return -(-numel // (self.size * block)) * block

    def bounds(self, numel: int) -> tuple[int, int]:
        """Range of the flattened tensor that this rank owns; empty for the last ranks of a small tensor."""
        w = self.width(numel)
        return min(self.rank * w, numel), min((self.rank + 1) * w, numel)

    def pack(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Whole tensors of one dtype → the (N, Σw) buffer, in new memory."""
        widths = [self.width(tensor.numel()) for tensor in tensors]
        rows = [_padded(t.reshape(-1), self.size * w).view(self.size, w) for t, w in zip(tensors, widths, strict=True)]
        return torch.cat(rows, dim=1)

    def _count(self, collective: str, elements: int) -> None:
        self.traffic[collective] += elements
        self.calls[collective] += 1

    def reduce_scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, w) → (w,): this rank's row of the sum over ranks."""
        self._count("reduce-scatter", rows.numel())
        mine = rows[0]
        if self.size > 1:
            mine = torch.empty_like(mine)
            _reduce_scatter(mine, rows.view(-1))
        return mine

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """(w,) → (N, w): every rank's row."""
        self._count("all-gather", self.size * mine.numel())
        rows = mine[None]
        if self.size > 1:
            rows = mine.new_empty(self.size, mine.numel())
            _all_gather(rows.view(-1), mine)
        return rows

    def gather_whole(self, pieces: list[torch.Tensor], numels: list[int], widths=None) -> Iterator[torch.Tensor]:
        """Every rank's pieces of tensors with `numels` elements → one whole flat tensor after the other."""
        widths = widths or [self.width(numel) for numel in numels]
        rows = self.all_gather(torch.cat([_padded(piece, w) for piece, w in zip(pieces, widths, strict=True)]))
        for columns, numel in zip(rows.split(widths, dim=1), numels, strict=True):
            yield columns.reshape(-1)[:numel]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' maximum, in place; used for a few flags only."""
        self._count("all-reduce", tensor.numel())
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0's values to all, in place."""
        self._count("broadcast", tensor.numel())
        if self.size > 1:
            dist.broadcast(tensor, src=0)


class Host:
    """Copies between one device and host memory. They overlap with a GPU's work only if host memory is pinned
    (page-locked) and they have a stream of their own; without a GPU they are ordinary ones."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory; on a GPU it is complete after `wait`."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self.stream is not None)
        self.send(tensor, copy)
        if self.stream is not None:
            tensor.record_stream(self.stream)  # its memory must not be handed out again before the copy has been made
        return copy

    def send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy between the memories; `source` must not change before `wait`."""
        if self.stream is None:
            target.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Until all copies have been made."""
        if self.stream is not None:
            self.stream.synchronize()


@dataclass(eq=False)
class Shard:
    """What one rank owns of one parameter."""

    param: torch.nn.Parameter
    index: int  # among all parameters of the optimizer
    shape: torch.Size  # of the whole parameter
    start: int  # of the range of the flattened parameter that is owned
    stop: int
    owned: torch.Tensor  # on the parameter's device: a view of the parameter, or under stage 3 all that is kept of it
    value: torch.Tensor  # what the optimizer's `param_groups` hold: `owned` itself, or its copy in host memory
    master: torch.Tensor  # what is updated: `value` itself, or an FP32 copy where that is a 16-bit tensor
    version: int  # of the parameter when `master` was last in step with it

    @property
    def numel(self) -> int:
        return self.shape.numel()


def _padded(flat: torch.Tensor, length: int) -> torch.Tensor:
    return F.pad(flat, (0, length - len(flat))) if len(flat) < length else flat


def alike(shards) -> list[list[Shard]]:
    """Shards grouped by dtype and device, since one buffer has one of each."""
    groups: dict[tuple, list[Shard]] = {}
    for shard in shards:
        groups.setdefault((shard.owned.dtype, shard.owned.device), []).append(shard)
    return list(groups.values())


def buckets(shards: list[Shard], elements: int) -> list[list[Shard]]:
    """Runs of alike shards, last parameter first (the order in which backward makes gradients), each of about
    `elements` elements: large enough that a collective is worth its latency, small beside the model."""
    result = []
    for group in alike(reversed(shards)):
        count = elements  # begin with a new bucket
        for shard in group:
            if count >= elements:
                result.append([])
                count = 0
            result[-1].append(shard)
            count += shard.numel
    return result
