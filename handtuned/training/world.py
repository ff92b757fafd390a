"""What a training run needs to know of the processes (ranks) that share it; here there is one, and it needs nothing.

`distributed.py` has the ways to be several.
"""

import contextlib
import os
import socket
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..amp import MasterWeights
from .models import choose_device
from .rank_failure import FailureDetector


class World:
    """The ranks that train together, seen from one. Every method but `note_signal` is called by all in the same order.

    `mode` is `--parallel`; `local_rank` this process on its machine; `store` torchrun's, None for a process that it has
    not started.
    """

    averages = False  # gradients over ranks, else they are summed
    cuts_weights = False  # no rank has the whole model, so all must make the same forward passes
    syncs_each_pass = True  # gradients are collected after every backward pass, not only after the last one of a step
    wrapped = None

    def __init__(self, mode: str = "none", rank: int = 0, size: int = 1, local_rank: int = 0, store=None):
        self.mode, self.rank, self.size, self.local_rank = mode, rank, size, local_rank
        self.alone = store is None  # torchrun has not started this process
        self.main, self.stopping = rank == 0, False  # this rank prints and writes files; has been asked to stop
        self.held: dict[str, int] = {}  # bytes of each kind, at most in this rank's first step, counted under ZeRO
        self.failures = FailureDetector(store, rank, self.gather((socket.gethostname(), os.getpid())))

    def gather(self, value) -> list:
        """`value` of every rank, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """The main rank's `value`."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        return holder[0]

    def sum(self, value: float) -> float:
        """The sum over ranks of a number."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    @contextlib.contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Bad input found within, on any rank, ends all ranks and is printed once. No exchange may happen within.

        ValueError and the like: on one rank.
        SystemExit: with code 2 on the others.
        """
        if self.size == 1:
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
        with self.shared_errors():
            for name, ours in everyone[0].items():
                for rank, theirs in enumerate(everyone):
                    if theirs[name] != ours:
                        raise ValueError(f"ranks must have the same {name}: rank 0 has {ours!r}, rank {rank} has "
                                         f"{theirs[name]!r}")  # fmt: skip

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Only the main rank prints and draws progress bars; errors that leave the block are seen by all."""
        if self.main:
            yield
            return
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield

    def command(self, offload: bool = False) -> str:
        """What starts `finetune` on as many ranks."""
        ways = f" --parallel {self.mode}" * (self.mode != "none") + " --offload" * offload
        if self.alone:
            return "handtuned finetune" + ways
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        machines = f"--nnodes {self.size // here} " if here < self.size else ""
        return f"torchrun {machines}--nproc-per-node {here} -m handtuned finetune{ways}"

    def device(self, device: str) -> torch.device:
        """Where this rank computes: `auto` and `cuda` mean the GPU of its own number."""
        chosen, gpus = choose_device(device), torch.cuda.device_count()
        if self.alone or chosen.type != "cuda":
            return chosen
        if chosen.index is not None and self.size > 1:
            raise ValueError(f"--device {device} names one GPU for {self.size} ranks; leave it at auto")
        if self.local_rank >= gpus:
            raise ValueError(f"local rank {self.local_rank} has no GPU, there are {gpus}; give torchrun a lower "
                             "--nproc-per-node")  # fmt: skip
        chosen = torch.device("cuda", self.local_rank if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
        return chosen

    def seed(self, *numbers: int) -> None:
        """Make dropout a function of these numbers, whichever rank draws it. A process alone keeps its own stream."""
        if self.mode != "none":
            torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

    def note_signal(self, number, frame) -> None:
        """torchrun sends SIGTERM to the others when one rank has died; so does a scheduler that wants the machine."""
        self.stopping = True
        self.failures.report("")

    def make_optimizer(self, model: nn.Module, device: torch.device, groups: list[dict], kind, offload: bool):
        """Make `model` ready for training on `device`; returns the optimizer, a `kind`, of `groups` of parameters or of
        this rank's shards of them. `offload` (ZeRO only): what the optimizer alone needs stays in host memory."""
        return kind(groups)

    def run(self, work, sync: bool = True):
        """Do `work`, which calls the model; with `sync`, its backward pass exchanges gradients."""
        return work()

    @torch.no_grad()
    def evaluate(self, work):
        """Do `work` without gradients."""
        return self.run(work)

    def masters(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        """What puts FP32 masters in the place of 16-bit parameters, and takes gradients there and weights back."""
        return MasterWeights(model, optimizer)

    def collect_gradients(self, masters, scaler) -> None:
        """After a backward pass that exchanged gradients: hand them to the tensors that the optimizer holds. An
        overflow in one rank's shard is to be seen by all."""
        masters.collect_gradients()

    def clip_gradients(self, parameters: list[torch.Tensor], max_norm: float) -> torch.Tensor:
        """Scale the gradients so that their joint L2 norm is at most `max_norm`; returns the norm before."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def whole(self, key: str, value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """An entry of the optimizer's state for a parameter, whole, of which every rank gives its part."""
        return value

    def part(self, key: str, value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's part of a whole entry."""
        return value

    def load(self, parameter: nn.Parameter, tensor: torch.Tensor) -> None:
        """Put a whole tensor into a parameter, or this rank's part of it into its shard."""
        parameter.copy_(tensor)

    @contextlib.contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Within, every trained parameter of the model is whole on the main rank. All ranks call it."""
        yield

    def weight_bytes(self, model: nn.Module) -> int:
        """Bytes of parameters and buffers that this rank holds."""
        tensors = {id(t): local(t) for t in (*model.parameters(), *model.buffers())}
        return sum(t.numel() * t.element_size() for t in tensors.values())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, over the same memory; a tensor that FSDP has not cut is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
