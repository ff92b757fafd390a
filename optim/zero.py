"""ZeRO: data-parallel training in which no two ranks store the same thing.

Under data parallelism each of N ranks computes gradients of its own part of the batch, and all of them store
everything: A parameters and gradients in 16 bits, FP32 masters and Adam's two moments, 2A + 2A + 12A = 16A bytes. The
optimizer is element-wise, so a rank needs optimizer state only for the elements that it updates. Rajbhandari et al.
2020, "ZeRO: Memory optimizations toward training trillion parameter models", sections 3 and 5, cut in three stages:

    stage   cut among the ranks          bytes per rank   A = 7·10⁹, N = 8   elements that a rank sends
    DDP     –                            16A              112    GB          2A   (all-reduce of gradients)
    1       optimizer state, masters     4A + 12A/N        38.5  GB          2A
    2       and gradients                2A + 14A/N        26.25 GB          2A
    3       and parameters               16A/N             14    GB          3A

(FP32 parameters need no masters: 8A + 8A/N, 4A + 12A/N, 16A/N.)

Communication (section 7): all-reduce is a reduce-scatter, A, and an all-gather, A. Stages 1 and 2 put the optimizer's
step between the two: still 2A. Stage 3 all-gathers parameters for forward, A, and again for backward, A, and
reduce-scatters gradients, A: 3A.

Offloading (ZeRO-Offload, Ren et al. 2021, section 4) moves what only the optimizer needs to the host. A step of a
rank that owns M = A / N parameters sends 4M bytes over the bus: reduced gradients (2M) to the host while backward
goes on, the rounded weights (2M) back while the CPU rounds the next. The device holds 2A instead of 2A + 14M.
"""

import contextlib
import weakref
from functools import partial

import torch

from .zero_collectives import Collectives, Host, Shard
from .zero_gradients import Reduction
from .zero_parameters import Gathering
from .zero_state import hyperparameters, load_cut_state, whole_state


def zero_reference(weights, losses, make_optimizer, stage, steps):
    """Document 002's three stages: what rank r holds is item r of a list.

    `weights` is (n,), n divisible by the number of ranks; `losses` are functions of all weights, one for each rank;
    `make_optimizer` makes a rank's optimizer from the list of what it updates.
    """
    shards = [shard.clone() for shard in weights.chunk(len(losses))]
    optimizers = [make_optimizer([shard]) for shard in shards]  # stage 1: each has the state of its shard only

    def all_gather():
        return [torch.cat(shards) for _ in losses]

    whole = all_gather()
    for _ in range(steps):
        gradients = [torch.func.grad(loss)(w) for loss, w in zip(losses, whole, strict=True)]
        for rank, shard in enumerate(shards):  # reduce-scatter: rank r receives the mean of all ranks' r-th pieces
            shard.grad = sum(gradient.chunk(len(losses))[rank] for gradient in gradients) / len(losses)
        if stage >= 2:
            gradients = None
        if stage == 3:
            whole = None
        for optimizer in optimizers:
            optimizer.step()
        whole = all_gather()  # stages 1 and 2 now; stage 3 layer by layer, when forward and backward reach them
    return torch.cat(shards)


class ZeroOptimizer(torch.optim.Optimizer):
    """An element-wise optimizer (SGD, AdamW, …) whose state, gradients and parameters are cut among the ranks.

        dist.init_process_group("nccl")                  # without: a world of one process, by the same code
        optimizer = ZeroOptimizer(model.parameters(), AdamW, stage=2, lr=1e-4)
        for inputs, labels in loader_of_this_rank:
            loss(model(inputs), labels).backward()       # leaves the mean gradient over all ranks
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()

    It takes the place of DistributedDataParallel and computes the same: parameters begin as rank 0's (what else a
    model holds must be equal on all ranks), gradients are averaged, a parameter that no rank used keeps its value.
    `param_groups` hold this rank's shards as flat tensors with their `.grad`, so schedulers and GradScaler (torch's
    and ours) work as ever, and an overflow on one rank shows on all. Norms and clearing need all ranks:
    `clip_grad_norm_` and `zero_grad` of this class. Under stage 3, where all must run the same modules, a parameter is
    empty outside of the forward and backward of those that hold it; read or load weights under
    `with optimizer.gathered():`.

    Args:
        params: the model's parameters, or groups of them as for any optimizer, or the model. FP16 and BF16 parameters
            get FP32 masters.
        optimizer_class: called with this rank's shards and `kwargs`. Its state is element-wise, or kept in blocks of
            elements that it tells (`AdamW8bit`).
        offload: keep gradient shards, masters and optimizer state in the host's memory, and step there.
        model: needed under stage 3, unless it is `params`, if modules read each other's parameters within the layers
            of a ModuleList (LoRA layers do), which are gathered as a whole then; what it has frozen beside `params` is
            cut as well.
        device: where stage 3 puts what it cuts, one parameter after the other (default: where they are).
        summing: gradients are summed over the ranks, in FP32, so that N ranks are one process that accumulates N
            times; `collect_gradients()`, `inner.step()` and `write_back()` take the place of `step()` then.
        **kwargs: for `optimizer_class`: lr, betas, …

    `inner` is the optimizer of the shards; `group.traffic` and `group.calls` count what was communicated.

    Raises:
        ValueError: another stage, no parameters or one given twice.
        TypeError: `optimizer_class` cannot be called, or a parameter is complex.
        RuntimeError: from backward, a gradient is sparse, or a parameter was frozen before.
    """

    # Elements of one reduction under stages 1 and 2: fewer leave fewer full gradients in stage 2 and are slower.
    bucket_elements = 2**26

    def __init__(
        self, params, optimizer_class, stage: int = 1, offload: bool = False, *, model: torch.nn.Module | None = None,
        device: torch.device | None = None, summing: bool = False, **kwargs,
    ):  # fmt: skip
        if stage not in (1, 2, 3):
            raise ValueError(f"stage must be 1, 2 or 3, got {stage!r}")
        if not callable(optimizer_class):
            raise TypeError(f"optimizer_class must be a class of optimizers, got {optimizer_class!r}")
        if isinstance(params, torch.nn.Module):
            params, model = params.parameters(), params
        super().__init__(params, {})
        whole = [param for group in self.param_groups for param in group["params"]]
        if not whole:
            raise ValueError("params must hold a parameter, got none")
        if len(set(whole)) < len(whole):
            raise ValueError("params must hold each parameter once, got one of them twice")
        if model is not None and stage == 3:
            given = set(whole)
            whole += [param for param in model.parameters() if not param.requires_grad and param not in given]
        self.stage, self.model, self.device = stage, model, device if stage == 3 else None
        block_of = getattr(optimizer_class, "block_of", None)
        self.group = Collectives(block_of and partial(block_of, **kwargs))
        self.host = Host(device or whole[0].device) if offload else None
        self.shards = [self._cut(param, index) for index, param in enumerate(whole)]
        self.reduction = Reduction(self.shards, stage, self.group, self.host, self.bucket_elements, summing)
        self.trained = self.reduction.trained
        of = {shard.param: shard for shard in self.shards}
        self.inner = optimizer_class(
            [hyperparameters(g) | {"params": [of[p].master for p in g["params"]]} for g in self.param_groups], **kwargs
        )
        self.defaults, self.state = self.inner.defaults, self.inner.state
        for group, ours in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update(hyperparameters(ours), params=[of[p].value for p in group["params"]])

        hooks = self.reduction.hooks()
        if stage == 3:
            self.reduction.gathering = Gathering(self.shards, self.group, self.reduction, model)
            hooks += self.reduction.gathering.hooks()
        self._remove_hooks = weakref.finalize(self, lambda: [hook.remove() for hook in hooks])

    def add_param_group(self, param_group: dict) -> None:
        if hasattr(self, "inner"):
            raise ValueError("parameters cannot be added: the cut is made once; build a new ZeroOptimizer")
        super().add_param_group(param_group)

    @torch.no_grad()
    def _cut(self, param: torch.nn.Parameter, index: int) -> Shard:
        if param.is_complex():
            raise TypeError(f"params must be real, got {param.dtype}")
        shape, (start, stop) = param.shape, self.group.bounds(param.numel())
        param.data = param.data.to(device=self.device).contiguous()
        self.group.broadcast(param.data)
        owned = param.detach().view(-1)[start:stop]
        if self.stage == 3:
            owned = owned.clone()
            param.data = owned.new_empty(0)
        value = self.host.fetch(owned) if self.host and param.requires_grad else owned
        if self.host:
            self.host.wait()
        master = value.float() if param.requires_grad and value.itemsize == 2 else value
        master.whole_elements = shape.numel()
        return Shard(param, index, shape, start, stop, owned, value, master, param._version)

    @property
    def across_ranks(self) -> bool:
        """Several ranks share the work; trainers that count tokens and norms on one rank refuse then."""
        return self.group.size > 1

    @contextlib.contextmanager
    def no_sync(self):
        """Within, backward only accumulates, in each rank's own `.grad`, whatever the stage, and the next one outside
        reduces the sum."""
        before, self.reduction.syncing = self.reduction.syncing, False
        try:
            yield
        finally:
            self.reduction.syncing = before

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """As `torch.nn.utils.clip_grad_norm_` on whole gradients; all ranks must call it, and get the norm (0-dim)."""
        grads = [s.master.grad if s.value.grad is None else s.value.grad for s in self.trained]
        return self._clip([grad for grad in grads if grad is not None], max_norm, norm_type)

    def _clip(self, grads: list[torch.Tensor], max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        device = self.shards[0].param.device
        # One dtype for all ranks, whatever their own shards have.
        wide = any(shard.param.dtype == torch.float64 for shard in self.trained)
        dtype = torch.float64 if wide else torch.float32
        norms = [torch.linalg.vector_norm(g, norm_type, dtype=dtype) for g in grads if g.numel()]
        local = torch.linalg.vector_norm(torch.stack(norms or [torch.zeros((), dtype=dtype)]), norm_type).to(device)
        norm = torch.linalg.vector_norm(self.group.all_gather(local[None]), norm_type)
        if grads:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(grads[0].device))
        return norm

    @torch.no_grad()
    def step(self, closure=None, *, max_norm: float | None = None, **kwargs):
        """Update this rank's shards, and under stages 1 and 2 gather the new parameters; all ranks must call it.

        Returns `closure`'s value. The global norm is clipped to `max_norm`, after unscaling if that is left to it.
        Further keywords are the inner optimizer's.
        """
        loss = torch.enable_grad()(closure)() if closure else None
        self._end_backward()
        scale = getattr(self, "grad_scale", None)
        if getattr(self, "found_inf", None):
            return loss
        for shard in self.trained:
            if shard.value.grad is not None and not shard.value.numel():  # it may hold the flag of an overflow
                shard.value.grad = torch.zeros_like(shard.value)
        for group, ours in zip(self.param_groups, self.inner.param_groups, strict=True):
            ours.update(hyperparameters(group))
        moved = [shard for shard in self.trained if shard.value.grad is not None]
        for shard in moved:
            if shard.param._version != shard.version:
                self._adopt(shard)
            if shard.master is not shard.value:
                shard.master.grad = shard.value.grad.float()
        grads = [shard.master.grad for shard in moved]
        if scale is not None and grads:
            torch._foreach_div_(grads, scale.to(grads[0].device))
        if max_norm is not None:
            self._clip(grads, max_norm)
        del grads  # FP32 ones are not to outlive the update
        self.inner.step(**kwargs)
        for group, ours in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update(hyperparameters(ours))  # an optimizer may count there
        self.write_back()
        return loss

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """End the backward pass: the tensors of `inner` have their gradients, masters in FP32, and full ones are freed.

        With `write_back` this is what `amp.MasterWeights` does for an optimizer that is not cut.
        """
        self._end_backward()
        for shard in self.trained:
            if shard.master.grad is not None and shard.param._version != shard.version:
                self._adopt(shard)
        self.reduction.release_full_gradients()

    def _end_backward(self) -> None:
        if not self.reduction.settled:  # no gradient came on this rank, or all of them under no_sync
            self.reduction.end_backward()
        self.reduction.settled = False

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the shards, and under stages 1 and 2 gather the parameters; all ranks must call it."""
        for shard in self.trained:
            if shard.master.grad is None:  # it has not moved
                continue
            if shard.master is not shard.value:
                shard.value.copy_(shard.master)
                shard.master.grad = None
            if self.host:
                self.host.send(shard.value, shard.owned)
        if self.host:
            self.host.wait()
        for bucket in self.reduction.buckets if self.stage < 3 else ():
            flats = self.group.gather_whole([shard.owned for shard in bucket], [shard.numel for shard in bucket])
            for shard, flat in zip(bucket, flats, strict=True):
                shard.param.view(-1).copy_(flat)
                shard.version = shard.param._version

    def _adopt(self, shard: Shard) -> None:
        """Take over what somebody has written into the parameter; masters that round to it stay."""
        shard.version = shard.param._version
        if self.host:
            shard.value.copy_(shard.owned)
        if shard.master is not shard.value:
            same = shard.master.to(shard.value.dtype) == shard.value
            shard.master.copy_(torch.where(same, shard.master, shard.value.float()))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the parameters and of the shards."""
        self.reduction.clear(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler: FP16 gradients cannot be unscaled in place, `step` does it in FP32."""
        return any(shard.value.dtype == torch.float16 for shard in self.trained)

    @contextlib.contextmanager
    def gathered(self):
        """Within, stage 3's parameters are whole on all ranks, to be read or written; all must write the same."""
        if not self.reduction.gathering:
            yield
            return
        with self.reduction.gathering.all_whole():
            yield
            for shard in self.shards:
                part = shard.param.detach().view(-1)[shard.start : shard.stop]
                if not torch.equal(part, shard.owned):
                    shard.owned.copy_(part)
                    self._adopt(shard)

    def close(self) -> None:
        """Leave a plain model: whole parameters, and no hooks. All ranks must call it."""
        self._remove_hooks()
        if self.reduction.gathering:
            self.reduction.gathering.gather(self.shards)

    def bytes_held(self) -> dict[str, int]:
        """Bytes of "parameters" (with all that the `model` has), "gradients" and "optimizer state" on the device, and
        of all in "host" memory, as they are now on this rank; storages are counted once, and whole."""
        tensors: dict[str, list] = {"parameters": [], "gradients": [], "optimizer state": [], "host": []}
        gradients, states = ("host", "host") if self.host else ("gradients", "optimizer state")
        tensors["parameters"] += [*self.model.parameters(), *self.model.buffers()] if self.model else []
        for shard in self.shards:
            tensors["parameters"] += shard.param, shard.owned
            tensors["gradients"].append(shard.param.grad)
            tensors[gradients] += shard.value.grad, shard.master.grad
            tensors[states] += shard.value, shard.master, *self.inner.state.get(shard.master, {}).values()
        held, seen = {}, set()
        for role, members in tensors.items():
            storages = (t.untyped_storage() for t in members if isinstance(t, torch.Tensor))
            new = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in seen}
            seen |= new.keys()
            held[role] = sum(new.values())
        return held

    def state_dict(self) -> dict:
        """That of the inner optimizer on whole parameters, on the host, the same on every rank; all must call it.

        `optimizer_class` can load it without ZeRO, and a ZeroOptimizer in another world size or stage. FP32 masters of
        16-bit parameters are there as "master". ValueError: a state tensor that is not element-wise.
        """
        return whole_state(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` or the inner optimizer's own returned, which has no masters; each rank takes its part.
        ValueError: other groups, or as `state_dict`."""
        load_cut_state(self, state_dict)
