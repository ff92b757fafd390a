"""Several processes train one model: all that the training loop knows of the others.

    torchrun --nproc-per-node N -m handtuned finetune --parallel ddp|zero1|zero2|zero3|fsdp …

Each process (rank) takes every Nth forward pass of a step, and gradients are summed before the step.

    ddp      every rank holds the whole model; one all-reduce per step, over the trained parameters' gradients.
             Bytes that a rank sends: about 2 A, A the bytes of what is trained. Memory: as one process.
    zero1-3  `optim/zero.py`: optimizer state is cut among the ranks, from stage 2 on gradients too, under stage 3
             weights as well, 4-bit codes included. With --offload what only the optimizer needs is in host memory.
             A process that torchrun has not started is a world of one rank.
    fsdp     torch's stage 3: every rank holds 1/N of each block's weights, 4-bit codes included, and of what is
             trained, its gradients and moments. A block's weights are gathered before it runs, forward and backward,
             and dropped behind it. Bytes received: 2 W per forward and backward pass, W the bytes of the weights.

DDP and FSDP are torch's `DistributedDataParallel` and `fully_shard` (FSDP2); gloo on a CPU and NCCL on GPUs. They
average gradients over ranks, so a rank's loss is multiplied by N there; ours sums them. FSDP2 makes every parameter a
`DTensor`: the whole shape, one rank's piece, the codes of an NF4 weight (uint8) included; scales (3 % of the bytes)
stay whole, under ZeRO too. FSDP's optimizer is given the shards as plain tensors, since AdamW looks at one element at a
time; clipping and files see whole ones.
"""

import contextlib
import gc
import os
import signal
import sys
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..nn.checkpoint_layers import repeated_layers
from ..nn.inject import lora_layers, lora_parameters
from ..optim import ZeroOptimizer
from ..optim.zero_state import cut_entry, gather_entry
from .rank_failure import is_lost_connection
from .world import World, local


class _Wrapped(nn.Module):
    """A model whose forward pass is any work on it: DDP and FSDP act around a forward pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work):
        return work()


class DDPWorld(World):
    """torch's DistributedDataParallel."""

    averages, syncs_each_pass = True, False

    def make_optimizer(self, model, device, groups, kind, offload):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for this, 2.11 not yet
            # Gradients are views of the buckets, or they would be there twice. Rows may be too short for a layer.
            self.wrapped = DistributedDataParallel(_Wrapped(model), broadcast_buffers=False,
                                                   gradient_as_bucket_view=True, find_unused_parameters=True)
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")  # where all are used
        return kind(groups)

    def run(self, work, sync=True):
        if not torch.is_grad_enabled():
            return work()
        with contextlib.nullcontext() if sync else self.wrapped.no_sync():
            return self.wrapped(work)


class ZeroWorld(World):
    """Our ZeroOptimizer. The loop steps its inner optimizer, of this rank's shards."""

    def __init__(self, mode: str, *place):
        super().__init__(mode, *place)
        self.stage = int(mode.removeprefix("zero"))
        # From stage 2 on there is no room for full gradients.
        self.cuts_weights, self.syncs_each_pass = self.stage == 3, self.stage > 1

    def make_optimizer(self, model, device, groups, kind, offload):
        if offload and device.type == "cpu":
            print("note: --offload saves nothing on a CPU: the device's memory is the host's", file=sys.stderr)
        self.wrapped = ZeroOptimizer(groups, kind, self.stage, offload, model=model, device=device, summing=True)
        model.to(device)  # the buffers
        self.shards = {shard.param: shard for shard in self.wrapped.shards}
        self.counting = self.wrapped.inner.register_step_post_hook(lambda *_: self._count(last=True))
        return self.wrapped.inner

    def masters(self, model, optimizer):
        return self.wrapped

    def run(self, work, sync=True):
        self.wrapped.reduction.syncing = sync
        return work()

    def collect_gradients(self, masters, scaler):
        if self.counting:
            self._count()
        masters.collect_gradients()

    def _count(self, last: bool = False) -> None:
        """In the first step: after backward passes, and at the end, when optimizer state is there."""
        now = self.wrapped.bytes_held()
        self.held = {kind: max(count, self.held.get(kind, 0)) for kind, count in now.items()}
        if last:
            self.counting = self.counting.remove()

    def clip_gradients(self, parameters, max_norm):
        return self.wrapped.clip_grad_norm_(max_norm)

    def whole(self, key, value, parameter):
        return gather_entry(self.wrapped, self.shards[parameter], key, value)

    def part(self, key, value, parameter):
        return cut_entry(self.wrapped, self.shards[parameter], key, value)

    def load(self, parameter, tensor):
        if self.cuts_weights and (shard := self.shards.get(parameter)):
            parameter, tensor = shard.owned, tensor.flatten()[shard.start : shard.stop]
        parameter.copy_(tensor)

    @contextlib.contextmanager
    def gathered(self, model):
        empty, own = {}, {*lora_parameters(model)}
        shards = [shard for shard in self.wrapped.shards if shard.param.requires_grad or shard.param in own]
        for shard in shards if self.cuts_weights else ():
            flat = next(self.wrapped.group.gather_whole([shard.owned], [shard.numel]))
            empty[shard] = shard.param.data
            if self.main:  # in host memory: a device may not have room for all of them
                shard.param.data = flat.view(shard.shape).cpu()
        yield
        for shard, data in empty.items():
            shard.param.data = data

    def weight_bytes(self, model):
        return self.wrapped.bytes_held()["parameters"]


class FSDPWorld(World):
    """torch's fully_shard."""

    averages, cuts_weights, syncs_each_pass = True, True, False

    def make_optimizer(self, model, device, groups, kind, offload):
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = [group | {"params": [names[parameter] for parameter in group["params"]]} for group in groups]
        mesh = init_device_mesh(device.type, (self.size,))
        try:
            adapted = {layer for _, layer in lora_layers(model)}
            for block in repeated_layers(model).values():
                if not adapted.isdisjoint(block.modules()):
                    fully_shard(block.to(device), mesh=mesh)
            self.wrapped = fully_shard(_Wrapped(model), mesh=mesh)
        except RuntimeError as error:
            if "floating point dtype" not in str(error):
                raise
            raise ValueError(f"torch {torch.__version__} shards floating-point weights only: --parallel fsdp over a "
                             "base in NF4 needs torch 2.13; here use --parallel ddp, or --method lora") from None
        parameters = dict(model.named_parameters())
        self.shards = {}
        for group in groups:
            owners = [parameters[name] for name in group["params"]]
            group["params"] = [local(parameter).detach().requires_grad_() for parameter in owners]
            self.shards |= dict(zip(owners, group["params"], strict=True))
        return kind(groups)

    def run(self, work, sync=True):
        self.wrapped.set_requires_gradient_sync(sync)
        result = self.wrapped(work)
        if not torch.is_grad_enabled():
            self.wrapped.reshard()  # else the backward pass does it
        return result

    def collect_gradients(self, masters, scaler):
        for parameter, shard in self.shards.items():
            shard.grad, parameter.grad = local(parameter.grad), None
        gradients = [shard.grad for shard in self.shards.values() if shard.grad is not None]
        if scaler.is_enabled() and self.sum(any(not gradient.isfinite().all() for gradient in gradients)):
            for device in {gradient.device for gradient in gradients}:
                scaler.overflow_flag(device).fill_(1)  # a rank's gradients may all be empty

    def clip_gradients(self, parameters, max_norm):
        norm = torch.nn.utils.get_total_norm([shard.grad for shard in parameters])
        norm = torch.tensor(self.sum(norm.item() ** 2) ** 0.5, dtype=norm.dtype, device=norm.device)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    @torch.no_grad()
    def whole(self, key, value, parameter):
        if not isinstance(parameter, DTensor) or value.shape != local(parameter).shape:
            return value
        where = parameter.device_mesh, parameter.placements
        return DTensor.from_local(value, *where, shape=parameter.shape, stride=parameter.stride()).full_tensor()

    @torch.no_grad()
    def part(self, key, value, parameter):
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        value = value.to(local(parameter).device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()

    def load(self, parameter, tensor):
        local(parameter).copy_(self.part("", tensor, parameter))

    @contextlib.contextmanager
    def gathered(self, model):
        own = {*lora_parameters(model)}
        every = ((module, name, p) for module in model.modules() for name, p in module.named_parameters(recurse=False))
        kept = [entry for entry in every if entry[2] in own and isinstance(entry[2], DTensor)]
        for module, name, parameter in kept:
            setattr(module, name, nn.Parameter(self.whole(name, local(parameter), parameter), requires_grad=False))
        yield
        for module, name, parameter in kept:
            setattr(module, name, parameter)


@contextlib.contextmanager
def start(mode: str, device: str) -> Iterator[World]:
    """Join the ranks that torchrun has started, for the length of the block. `mode` is `--parallel`; `device`,
    `--device`, decides between gloo and NCCL.

    ValueError: `mode` does not fit the way this process was started.
    RankFailure: within the block, the connection to another rank was lost.
    """
    kind = {"none": World, "ddp": DDPWorld, "fsdp": FSDPWorld}.get(mode, ZeroWorld)
    started = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if mode == "none" or (kind is ZeroWorld and not started):
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and os.environ.get("RANK", "0") != "0":
            raise SystemExit(2)
        if size > 1:
            raise ValueError(f"torchrun has started {size} processes: say --parallel ddp or --parallel fsdp, or "
                             "zero1, zero2, zero3")  # fmt: skip
        yield kind(mode)
        return
    if not started:
        raise ValueError(f"--parallel {mode} needs several processes: torchrun --nproc-per-node 2 -m handtuned "
                         f"finetune --parallel {mode} …")  # fmt: skip
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart (--max-restarts), and with it the addresses of dead processes.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    gpus = torch.cuda.is_available() and device != "cpu"
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=size)
    world = kind(mode, rank, size, int(os.environ["LOCAL_RANK"]), dist.PrefixStore("handtuned", store))
    before = signal.signal(signal.SIGTERM, world.note_signal)
    try:
        yield world
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a moment to say what happened
        if not is_lost_connection(error):
            world.failures.report(f"{type(error).__name__}: {error}")
            raise
        raise world.failures.diagnose() from error
    finally:
        signal.signal(signal.SIGTERM, before)
        # Were DDP's reducer the last to let go of gloo, it would wait for gloo's threads while it holds Python's
        # lock, and they may wait for that lock to free a tensor: for ever.
        world.wrapped = None
        gc.collect()
        dist.destroy_process_group()
