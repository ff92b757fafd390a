"""ZeRO's backward pass: from each rank's own gradients to the shards of their mean.

Hooks note every gradient as it is accumulated, and reductions are called

    stage 1     bucket by bucket when backward has ended; the full gradients stay
    stage 2     a bucket when its parameters have their gradients; the full ones are freed
    stage 3     a module's when backward goes on to the next module (`zero_parameters.py`)

All ranks must call them in the same order, though on one of them a parameter may have no gradient at all. So buckets
go in a fixed order, one that lacks a gradient waits (and all behind it) until backward has ended, and what is missing
then counts as zero. At last the ranks tell each other which parameters any of them has used (weight decay must not
touch the others), and whether any gradient overflowed.
"""

import weakref

import torch

from .zero_collectives import Shard, alike, buckets


class Reduction:
    """Puts the shards of the mean gradient into `shard.value.grad` when backward has ended; `summing`, those of the
    FP32 sum into `shard.master.grad`."""

    def __init__(self, shards, stage, group, host, bucket_elements, summing):
        self.shards, self.stage, self.group, self.host = shards, stage, group, host
        self.trained = [shard for shard in shards if shard.param.requires_grad]
        self.frozen = [shard for shard in shards if not shard.param.requires_grad]
        self.buckets = buckets(self.trained, bucket_elements)
        self.summing = summing
        self.gathering = None  # stage 3's
        self.syncing = True  # False: gradients are only accumulated
        self.settled = False  # what backward left has been reduced
        self._averaged: set[Shard] = set()  # stage 1: parameters whose .grad has been reduced
        self._begin()

    def _begin(self) -> None:
        """Be ready for a backward pass."""
        self.in_backward = False
        self._waiting = list(self.buckets) if self.stage < 3 else []
        self._ready: set[Shard] = set()
        self._arrived: dict[Shard, torch.Tensor] = {}  # reduced, not yet in .grad
        self._used: set[int] = set()

    def hooks(self) -> list:
        me = weakref.ref(self)  # the parameters must not keep this alive
        handles = []
        for shard in self.trained:
            param = shard.param
            handles.append(param.register_post_accumulate_grad_hook(lambda _, shard=shard: me()._accumulated(shard)))
            if self.stage == 1:
                handles.append(param.register_hook(lambda _, shard=shard: me()._set_aside(shard)))
        return handles

    def enter_backward(self) -> None:
        if not self.in_backward:
            self.in_backward, self.settled = True, False
            torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)

    def _accumulated(self, shard: Shard) -> None:
        """A parameter's gradient is complete."""
        self.enter_backward()
        if self.stage == 2 and shard in self._ready and not any(shard in bucket for bucket in self._waiting):
            raise RuntimeError("a gradient came in two parts, the second after its sum: of a weight in two reentrant "
                               "checkpoints; take use_reentrant=False, or stage 1 or 3")  # fmt: skip
        self._ready.add(shard)
        if self.stage == 3:
            self.gathering.release([shard])
        if self.stage == 2 and self.syncing:
            while self._waiting and self._ready.issuperset(self._waiting[0]):
                self.reduce(self._waiting.pop(0))

    def _set_aside(self, shard: Shard) -> None:
        """Before stage 1 accumulates again: what has been averaged must not be averaged twice."""
        if shard not in self._averaged:
            return
        self._averaged.remove(shard)
        holder = self._holder(shard)
        if shard.param.grad is None:  # cleared by the model's zero_grad
            holder.grad = None
        elif self.host is None:
            holder.grad = holder.grad.clone()  # it may be a view of the full gradient
        shard.param.grad = None

    @torch.no_grad()
    def reduce(self, shards: list[Shard], early: bool = False) -> None:
        """Average these parameters' gradients over the ranks; `early` takes only those that this backward pass has
        completed, as others may hold a part from before it."""
        if not self.syncing:
            return
        for group in alike(shards):
            rows = self.group.pack([self._take(shard, early) for shard in group])
            if self.summing:
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            else:  # divided before they are summed, as DDP does: an FP16 sum could overflow where the mean does not
                rows.mul_(1 / self.group.size)
            mine = self.group.reduce_scatter(rows).split([self.group.width(shard.numel) for shard in group])
            for shard, padded in zip(group, mine, strict=True):
                mean = padded[: shard.stop - shard.start]
                mean = self.host.fetch(mean) if self.host else mean
                if shard in self._arrived:
                    if self.host:
                        self.host.wait()
                    mean += self._arrived[shard]
                self._arrived[shard] = mean

    def _take(self, shard: Shard, early: bool) -> torch.Tensor:
        """This rank's own gradient, which stages 2 and 3 do not keep; zeros if there is nothing new."""
        grad = shard.param.grad
        if grad is None or shard in self._averaged or (early and shard not in self._ready):
            return shard.owned.new_zeros(shard.numel)
        if grad.is_sparse:
            raise RuntimeError("ZeroOptimizer does not support sparse gradients")
        self._used.add(shard.index)
        if self.stage > 1:
            shard.param.grad = None
        return grad

    def end_backward(self) -> None:
        """Reduce what has not been reduced, and let it appear."""
        if any(shard.param.requires_grad for shard in self.frozen):
            raise RuntimeError("a parameter that was frozen when the ZeroOptimizer was made is to be trained now: what "
                               "is cut is decided once; make a new ZeroOptimizer")  # fmt: skip
        if self.gathering:
            self.gathering.finish_backward()
        if self.syncing:
            for bucket in self._waiting:
                self.reduce(bucket)
            if self.stage == 3:  # gradients that came after their module's turn: of tied weights, or no module's
                late = self._on_any_rank(shard.index for shard in self.trained if shard.param.grad is not None)
                self.reduce([shard for shard in self.trained if late[shard.index]])
            self._settle()
        self._begin()

    @torch.no_grad()
    def _settle(self) -> None:
        """Hand the optimizer the means of this backward pass."""
        if self.host:
            self.host.wait()
        for shard, mean in self._arrived.items():
            if (before := self._holder(shard).grad) is not None:
                mean += before
        sums = [total for total in self._arrived.values() if total.numel()]
        overflow = ~torch.stack(torch._foreach_norm(sums, torch.inf)).isfinite().all() if sums else False
        *used, overflow = self._on_any_rank(self._used, overflow)
        for shard, total in self._arrived.items():
            if not used[shard.index]:
                continue
            if self.stage == 1:
                self._averaged.add(shard)
                if self.host is None and total.dtype == shard.owned.dtype:  # its place is in the full one
                    param = shard.param
                    param.grad = torch.zeros_like(param) if param.grad is None else param.grad.contiguous()
                    total = param.grad.view(-1)[shard.start : shard.stop].copy_(total)
            self._holder(shard).grad = total
        if overflow:  # in one rank's shard, and a GradScaler looks at its own rank's only, which may all be empty
            grad = max((g for s in self.trained if (g := self._holder(s).grad) is not None), key=torch.numel)
            if not grad.numel():
                grad.data = grad.new_empty(1)
            grad[0] = torch.inf
        self.settled = True

    def _holder(self, shard: Shard) -> torch.Tensor:
        return shard.master if self.summing else shard.value

    def _on_any_rank(self, indices, overflow: torch.Tensor | bool = False) -> list[int]:
        """A flag for each parameter, and one for the overflow: set if it is on any rank."""
        flags = torch.zeros(len(self.shards) + 1, dtype=torch.int32)
        flags[list(indices)] = 1
        flags = flags.to(self.shards[0].param.device)
        flags[-1] = overflow
        return self.group.all_reduce(flags).tolist()

    def release_full_gradients(self) -> None:
        """Of those that have been reduced keep this rank's part only."""
        for shard in self._averaged:
            shard.param.grad = None
        self._averaged.clear()

    def clear(self, set_to_none: bool) -> None:
        """Clear the gradients of parameters and shards, and forget a backward pass that did not end."""
        for tensor in (tensor for shard in self.shards for tensor in (shard.param, shard.value, shard.master)):
            if set_to_none:
                tensor.grad = None
            elif tensor.grad is not None:
                tensor.grad.zero_()
        if set_to_none:
            self._averaged.clear()
        self.settled = False
        self._begin()
