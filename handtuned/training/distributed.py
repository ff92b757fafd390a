"""Several processes train one adapter: all that the training loop knows of the others.

    torchrun --nproc-per-node N -m handtuned finetune --parallel ddp|fsdp …

Each process (rank) takes every Nth forward pass of a step, and gradients are summed before the step.

    ddp    every rank holds the whole model; one all-reduce per step, over the adapter's gradients.
           Bytes that a rank sends: about 2 A, A the bytes of the adapter. Memory: as one process.
    fsdp   every rank holds 1/N of each block's weights, 4-bit codes included, and of the adapter, its
           gradients and moments. A block's weights are gathered before it runs, forward and backward, and
           dropped behind it. Bytes received: 2 W per forward and backward pass, W the bytes of the weights.

The engine is torch's: `DistributedDataParallel`, `fully_shard` (FSDP2), gloo on a CPU and NCCL on GPUs. Both average
gradients over ranks; a rank's loss is multiplied by N, so that the average is the sum. FSDP2 makes every parameter a
`DTensor`: the whole shape, one rank's piece, the codes of an NF4 weight (uint8) included; scales (3 % of the bytes)
stay whole. The optimizer is given the shards as plain tensors, since AdamW looks at one element at a time; clipping
and files see whole ones, by the functions at the end.
"""

import contextlib
import gc
import os
import signal
import socket
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..nn.inject import lora_layers, lora_parameters
from .models import choose_device
from .rank_failure import FailureDetector, is_lost_connection


class _Wrapped(nn.Module):
    """A model whose forward pass is any work on it: DDP and FSDP act around a forward pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work):
        return work()


class World:
    """The ranks that train together, seen from one of them. A process alone (mode "none") exchanges nothing.

    Every method but `note_signal` is called by all ranks in the same order.

    Attributes:
        mode: "none", "ddp" or "fsdp".
        rank, size: this process, and how many there are; local_rank: this process on its machine.
        main: whether this rank prints and writes files.
        stopping: this process has been asked to stop (SIGTERM).
    """

    def __init__(self, mode: str = "none", rank: int = 0, size: int = 1, local_rank: int = 0, store=None):
        self.mode, self.rank, self.size, self.local_rank = mode, rank, size, local_rank
        self.main, self.stopping, self.wrapped = rank == 0, False, None
        self.failures = FailureDetector(store, rank, self.gather((socket.gethostname(), os.getpid())))

    def gather(self, value) -> list:
        """`value` of every rank, by rank."""
        if self.mode == "none":
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """The main rank's `value`."""
        if self.mode == "none":
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        return holder[0]

    def sum(self, value: float) -> float:
        """The sum over ranks of a number."""
        if self.mode == "none":
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    @contextlib.contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Bad input found within, on any rank, ends all ranks and is printed once. No exchange may happen within.

        Raises:
            ValueError and the like: on one rank.
            SystemExit: with code 2 on the others.
        """
        if self.mode == "none":
            yield
            return
        error = None
        try:
            yield
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as caught:
            error = caught
        messages = self.gather(error and str(error))
        failed = [rank for rank, text in enumerate(messages) if text is not None]
        if failed and self.rank != failed[0]:
            raise SystemExit(2)
        if failed:
            raise error if len(set(messages)) == 1 else ValueError(f"rank {self.rank}: {error}") from error

    def check_equal(self, values: dict[str, object]) -> None:
        """Refuse to go on unless every rank has the same values: ValueError on the main rank, SystemExit on others."""
        everyone = self.gather(values)
        for name, ours in everyone[0].items():
            for rank, theirs in enumerate(everyone):
                if theirs[name] == ours:
                    continue
                if not self.main:
                    raise SystemExit(2)
                raise ValueError(
                    f"ranks must have the same {name}: rank 0 has {ours!r}, rank {rank} has {theirs[name]!r}"
                )

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Only the main rank prints and draws progress bars; errors that leave the block are seen by all."""
        if self.main:
            yield
            return
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield

    def command(self) -> str:
        """What starts `finetune` on as many ranks."""
        if self.mode == "none":
            return "handtuned finetune"
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        machines = f"--nnodes {self.size // here} " if here < self.size else ""
        return f"torchrun {machines}--nproc-per-node {here} -m handtuned finetune --parallel {self.mode}"

    def device(self, device: str) -> torch.device:
        """Where this rank computes: `auto` and `cuda` mean the GPU of its own number."""
        chosen, gpus = choose_device(device), torch.cuda.device_count()
        if self.mode == "none" or chosen.type != "cuda":
            return chosen
        if chosen.index is not None and self.size > 1:
            raise ValueError(f"--device {device} names one GPU for {self.size} ranks; leave it at auto")
        if self.local_rank >= gpus:
            raise ValueError(f"local rank {self.local_rank} has no GPU, there are {gpus}; give torchrun a lower "
                             "--nproc-per-node")  # fmt: skip
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def wrap(self, model: nn.Module, device: torch.device) -> list[torch.Tensor]:
        """Make ready for training on `device`; returns the tensors to optimize: parameters, or this rank's shards."""
        if self.mode == "ddp":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for this, 2.11 not yet
                self.wrapped = DistributedDataParallel(_Wrapped(model), broadcast_buffers=False)
        if self.mode != "fsdp":
            return list(lora_parameters(model))
        mesh = init_device_mesh(device.type, (self.size,))
        try:
            for block in blocks(model):
                fully_shard(block.to(device), mesh=mesh)
            self.wrapped = fully_shard(_Wrapped(model), mesh=mesh)
        except RuntimeError as error:
            if "floating point dtype" not in str(error):
                raise
            raise ValueError(
                f"torch {torch.__version__} shards floating-point weights only: --parallel fsdp over a base in NF4 "
                "needs torch 2.13; here use --parallel ddp, or --method lora"
            ) from None
        self.parameters = list(lora_parameters(model))
        self.shards = [local(p).detach().requires_grad_() for p in self.parameters]
        return self.shards

    def run(self, work, sync: bool = True):
        """Do `work`, which calls the model; with `sync`, its backward pass exchanges gradients."""
        if self.mode == "none":
            return work()
        if self.mode == "ddp":
            if not torch.is_grad_enabled():
                return work()
            with contextlib.nullcontext() if sync else self.wrapped.no_sync():
                return self.wrapped(work)
        self.wrapped.set_requires_gradient_sync(sync)
        result = self.wrapped(work)
        if not torch.is_grad_enabled():
            self.wrapped.reshard()  # else the backward pass does it
        return result

    @torch.no_grad()
    def evaluate(self, work):
        """Do `work` without gradients."""
        return self.run(work)

    def collect_gradients(self, scaler) -> None:
        """After the last backward pass of a step: hand the optimizer's tensors their gradients.

        An overflow may lie in the shard of one rank only; all must skip the step.
        """
        if self.mode != "fsdp":
            return
        for shard, parameter in zip(self.shards, self.parameters, strict=True):
            shard.grad, parameter.grad = local(parameter.grad), None
        if scaler.is_enabled() and self.sum(any(not shard.grad.isfinite().all() for shard in self.shards)):
            for shard in self.shards:
                shard.grad.fill_(torch.inf)

    def clip_gradients(self, parameters: list[torch.Tensor], max_norm: float) -> torch.Tensor:
        """Scale the gradients so that their joint L2 norm is at most `max_norm`; returns the norm before."""
        if self.mode != "fsdp":
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        norm = torch.nn.utils.get_total_norm([shard.grad for shard in parameters])
        norm = torch.tensor(self.sum(norm.item() ** 2) ** 0.5, dtype=norm.dtype, device=norm.device)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def seed(self, *numbers: int) -> None:
        """Make dropout a function of these numbers, whichever rank draws it. A process alone keeps its own stream."""
        if self.mode != "none":
            torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

    def note_signal(self, number, frame) -> None:
        """torchrun sends SIGTERM to the others when one rank has died; so does a scheduler that wants the machine."""
        self.stopping = True
        self.failures.report("")


@contextlib.contextmanager
def start(mode: str, device: str) -> Iterator[World]:
    """Join the ranks that torchrun has started, for the length of the block.

    Args:
        mode: `--parallel`.
        device: `--device`, which decides between gloo and NCCL.

    Raises:
        ValueError: `mode` does not fit the way this process was started.
        RankFailure: within the block, the connection to another rank was lost.
    """
    if mode == "none":
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and os.environ.get("RANK", "0") != "0":
            raise SystemExit(2)
        if size > 1:
            raise ValueError(f"torchrun has started {size} processes: say --parallel ddp or --parallel fsdp")
        yield World()
        return
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(f"--parallel {mode} needs several processes: torchrun --nproc-per-node 2 -m handtuned "
                         f"finetune --parallel {mode} …")  # fmt: skip
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart (--max-restarts), and with it the addresses of dead processes.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    gpus = torch.cuda.is_available() and device != "cpu"
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=size)
    world = World(mode, rank, size, int(os.environ["LOCAL_RANK"]), dist.PrefixStore("handtuned", store))
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


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the elements of every list of layers that hold adapters."""
    with_adapter = {id(layer) for _, layer in lora_layers(model)}
    found = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    inside = {id(part) for block in found for part in list(block.modules())[1:]}
    outer = [block for block in found if id(block) not in inside]
    return [block for block in outer if any(id(part) in with_adapter for part in block.modules())]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, over the same memory; a tensor that is not sharded is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(shard: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole tensor of which every rank gives its shard, cut as `like` is. All ranks call it."""
    if not isinstance(like, DTensor) or shard.shape != local(like).shape:
        return shard
    where = like.device_mesh, like.placements
    return DTensor.from_local(shard, *where, shape=like.shape, stride=like.stride()).full_tensor()


@torch.no_grad()
def part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a whole tensor, cut as `like` is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    tensor = tensor.to(local(like).device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


@contextlib.contextmanager
def whole_adapter(model: nn.Module) -> Iterator[None]:
    """Within, every adapter parameter of the model is whole on every rank. All ranks call it."""
    every = ((layer, name, getattr(layer, name)) for _, layer in lora_layers(model) for name in ("lora_A", "lora_B"))
    kept = [entry for entry in every if isinstance(entry[2], DTensor)]
    for layer, name, parameter in kept:
        setattr(layer, name, nn.Parameter(whole(local(parameter), parameter), requires_grad=False))
    try:
        yield
    finally:
        for layer, name, parameter in kept:
            setattr(layer, name, parameter)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers that this rank holds."""
    tensors = {id(t): local(t) for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
