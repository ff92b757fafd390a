"""Several processes train one adapter: everything of `finetune` that knows there are others.

    torchrun --nproc-per-node N -m handtuned finetune --parallel ddp|fsdp …

Each process (rank) takes every Nth forward pass of a step, and gradients are summed before the step.

    ddp    every rank holds the whole model; one all-reduce a step, over the adapter's gradients.
           Bytes a rank sends: about 2 A, A the bytes of the adapter. Memory: as one process.
    fsdp   every rank holds 1/N of each block's weights, 4-bit codes included, and of the adapter, its
           gradients and moments. A block's weights are gathered before it runs, forward and backward, and
           dropped behind it. Bytes received: 2 W a forward and backward pass, W the bytes of the weights.

The engine is torch's: `DistributedDataParallel`, `fully_shard` (FSDP2), gloo on a CPU and NCCL on GPUs.
Both average gradients over ranks; the loss of a rank is multiplied by N, so that the average is the sum.

FSDP2 takes integer parameters that need no gradient: the codes of an NF4 weight (uint8) are cut
into N pieces like any other, and travel packed. Scales (3 % of the bytes) stay whole on every rank.

The optimizer is given the local shards as plain tensors, since AdamW looks at one element at a time.
What must see whole tensors (clipping, files) says so here.
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
from torch.nn.parallel import DistributedDataParallel

from .faults import RollCall, is_lost_connection
from .models import choose_device
from .nn import lora_parameters
from .shards import blocks, local

BAD_INPUT = (ValueError, TypeError, OSError, ModuleNotFoundError)


class _Work(nn.Module):
    """A model whose forward pass is any work on it: DDP and FSDP act around a forward pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work):
        return work()


class Team:
    """The ranks that train together, seen from one of them. A team of one (mode "none") exchanges nothing.

    Every method but `note_signal` is called by all ranks in the same order.

    Attributes:
        mode: "none", "ddp" or "fsdp".
        rank, size: this process, and how many there are.
        local_rank: this process on its machine.
        main: whether this rank talks and writes files.
        stopping: this process has been asked to stop (SIGTERM).
    """

    def __init__(self, mode: str = "none", rank: int = 0, size: int = 1, local_rank: int = 0, store=None):
        self.mode, self.rank, self.size, self.local_rank = mode, rank, size, local_rank
        self.main = rank == 0
        self.stopping = False
        self.wrapped = None
        self.roll_call = RollCall(store, rank, self.gather((socket.gethostname(), os.getpid())))

    # What all ranks know

    def gather(self, value) -> list:
        """`value` of every rank, by rank."""
        if self.mode == "none":
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value):
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
    def together(self) -> Iterator[None]:
        """Bad input found within, on any rank, ends all ranks, and is told once. No exchange may happen within.

        Raises:
            ValueError and the like: on the rank that tells it.
            SystemExit: with code 2 on the others.
        """
        if self.mode == "none":
            yield
            return
        error = None
        try:
            yield
        except BAD_INPUT as caught:
            error = caught
        told = self.gather(None if error is None else str(error))
        failed = [rank for rank, text in enumerate(told) if text is not None]
        if not failed:
            return
        if self.rank != failed[0]:
            raise SystemExit(2)
        if len(set(told)) == 1:
            raise error
        raise ValueError(f"rank {self.rank}: {error}") from error

    def agree(self, values: dict[str, object]) -> None:
        """Refuse to go on unless every rank has the same values.

        Raises:
            ValueError: names the first value that differs, and how; SystemExit on ranks other than the main one.
        """
        everyone = self.gather(values)
        for name, value in everyone[0].items():
            for rank, theirs in enumerate(everyone):
                if theirs.get(name) != value:
                    if not self.main:
                        raise SystemExit(2)
                    raise ValueError(
                        f"ranks must have the same {name}: rank 0 has {value!r}, rank {rank} has {theirs.get(name)!r}"
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
        """Where this rank computes: `auto` and `cuda` mean the GPU of its own number.

        Raises:
            ValueError: one GPU named for all ranks, or more ranks than GPUs.
        """
        chosen = choose_device(device)
        if self.mode == "none" or chosen.type != "cuda":
            return chosen
        if chosen.index is not None and self.size > 1:
            raise ValueError(f"--device {device} names one GPU for {self.size} ranks; leave it at auto")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {self.local_rank} has no GPU, there are {torch.cuda.device_count()}; "
                "give torchrun a lower --nproc-per-node"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    # The model

    def wrap(self, model: nn.Module, device: torch.device) -> list[torch.Tensor]:
        """Make ready for training on `device`; returns the tensors to optimize: parameters, or this rank's shards."""
        if self.mode == "ddp":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for this, 2.11 not yet
                self.wrapped = DistributedDataParallel(_Work(model), broadcast_buffers=False)
        if self.mode != "fsdp":
            return list(lora_parameters(model))
        mesh = init_device_mesh(device.type, (self.size,))
        try:
            for block in blocks(model):
                fully_shard(block.to(device), mesh=mesh)
            self.wrapped = fully_shard(_Work(model), mesh=mesh)
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
            self.wrapped.reshard()  # else that is left to the backward pass
        return result

    def evaluate(self, work):
        """Do `work` without gradients."""
        with torch.no_grad():
            return self.run(work)

    def collect_gradients(self, scaler) -> None:
        """After the last backward pass of a step: hand the optimizer's tensors their gradients.

        An overflow may lie in the shard of one rank only; all must skip the step.
        """
        if self.mode != "fsdp":
            return
        for shard, parameter in zip(self.shards, self.parameters, strict=True):
            shard.grad, parameter.grad = local(parameter.grad), None
        if scaler.is_enabled():
            overflow = any(not shard.grad.isfinite().all() for shard in self.shards)
            if self.sum(overflow):
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
        """Make dropout a function of these numbers, whichever rank draws it. A team of one keeps its own stream."""
        if self.mode != "none":
            torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

    def note_signal(self, number, frame) -> None:
        """torchrun sends SIGTERM to the others when one rank has died; so does a scheduler that wants the machine."""
        self.stopping = True
        self.roll_call.answer("")


@contextlib.contextmanager
def start(mode: str, device: str) -> Iterator[Team]:
    """Join the team that torchrun has started, for the length of the block.

    Args:
        mode: `--parallel`.
        device: `--device`, which decides between gloo and NCCL.

    Raises:
        ValueError: `mode` does not fit the way this process was started.
        Fault: within the block, the connection to another rank was lost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if mode == "none":
        if size > 1 and os.environ.get("RANK", "0") != "0":
            raise SystemExit(2)
        if size > 1:
            raise ValueError(f"torchrun has started {size} processes: say --parallel ddp or --parallel fsdp")
        yield Team()
        return
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(
            f"--parallel {mode} needs several processes: torchrun --nproc-per-node 2 -m handtuned finetune "
            f"--parallel {mode} …"
        )
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart (--max-restarts), and with it the addresses of dead processes.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    gpus = torch.cuda.is_available() and device != "cpu"
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=size)
    team = Team(mode, rank, size, int(os.environ["LOCAL_RANK"]), dist.PrefixStore("handtuned", store))
    before = signal.signal(signal.SIGTERM, team.note_signal)
    try:
        yield team
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a moment to say what happened
        if not is_lost_connection(error):
            team.roll_call.answer(f"{type(error).__name__}: {error}")
            raise
        raise team.roll_call.take() from error
    finally:
        signal.signal(signal.SIGTERM, before)
        # Were DDP's reducer the last to let go of gloo, it would wait for gloo's threads while it holds Python's
        # lock, and they may wait for that lock to free a tensor: for ever.
        team.wrapped = None
        gc.collect()
        dist.destroy_process_group()
