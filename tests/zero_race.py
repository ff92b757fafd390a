"""The models of the ZeRO tests, and a race between DistributedDataParallel and the three stages."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from handtuned.optim import ZeroOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STAGES = (1, 2, 3)
VOCABULARY = 11


class Model(nn.Module):
    """Tied embedding and head, sizes that no N divides, a frozen layer, a layer nobody calls and one that only
    rank 0's loss uses."""

    def __init__(self, recompute=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.embedding = nn.Embedding(VOCABULARY, 5)
        self.block = nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.LayerNorm(13), nn.Linear(13, 5))
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.uncalled = nn.Linear(3, 3)
        self.sometimes = nn.Linear(5, 1)
        self.head = nn.Linear(5, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.recompute = recompute

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + (self.recompute(self.block, x) if self.recompute else self.block(x))
        x = self.frozen(x) * self.scale
        return self.head(x), self.sometimes(x)


def build(dtype=torch.float32, **how):
    torch.manual_seed(0)
    return Model(**how).to(dtype)


def loss_of(model, step, same=False, rank=None):
    """Each rank's own batch (or the same for all); only rank 0's loss has the second output."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * step + (0 if same else rank))
    ids = torch.randint(VOCABULARY, (3, 4), generator=generator)
    labels = torch.randint(VOCABULARY, (3, 4), generator=generator)
    logits, extra = model(ids)
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, labels.flatten())
    return loss + extra.float().square().mean() if same or rank == 0 else loss


def worst_difference(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((p.double() - q.double()).abs().max().item() for p, q in pairs)


class Race:
    """A model under DDP, and one under each stage of ZeRO, all with the same beginning and the same optimizer."""

    def __init__(self, optimizer=torch.optim.AdamW, dtype=torch.float32, lr=0.02, ours=None, **options):
        self.theirs = build(dtype)
        self.rival = optimizer(self.theirs.parameters(), lr=lr, **options)
        self.wrapped = DistributedDataParallel(self.theirs, find_unused_parameters=True)
        self.models = [build(dtype, **(ours or {})) for _ in STAGES]
        self.zeros = [
            ZeroOptimizer(model.parameters(), optimizer, stage=stage, lr=lr, **options)
            for model, stage in zip(self.models, STAGES, strict=True)
        ]

    def each(self):
        return zip(self.models, self.zeros, strict=True)

    def backward(self, step, tolerance=0.0, change=lambda loss, who: loss):
        """The same batch through all of them; the losses agree."""
        theirs = loss_of(self.wrapped, step)
        change(theirs, -1).backward()
        for who, model in enumerate(self.models):
            loss = loss_of(model, step)
            assert abs(loss.item() - theirs.item()) <= tolerance, f"step {step}, stage {who + 1}"
            change(loss, who).backward()

    def step(self, set_to_none=True):
        self.rival.step()
        self.rival.zero_grad()
        for zero in self.zeros:
            zero.step()
            zero.zero_grad(set_to_none)

    def finish(self, tolerance=0.0):
        """The weights agree."""
        for model, zero in self.each():
            zero.close()
            difference = worst_difference(model, self.theirs)
            assert difference <= tolerance, f"stage {zero.stage}: parameters differ by {difference}"


def two_ranks(tolerance):
    """Zero for two ranks, since a + b has one order only; more of them sum in another order than DDP."""
    return 0.0 if dist.get_world_size() == 2 else tolerance


def overflowing(loss, step):
    """An infinite gradient on the last rank, at step 2."""
    return loss * torch.inf if step == 2 and dist.get_rank() == dist.get_world_size() - 1 else loss


class Plain(nn.Sequential):
    """Every parameter trained and used; A = 10 · (33 · 33 + 33), of which N divides nothing."""

    def __init__(self):
        super().__init__(*(nn.Linear(33, 33) for _ in range(10)))
