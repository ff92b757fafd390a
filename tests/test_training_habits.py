"""What people do around optimizers, scalers and losses: unfreeze, load weights, validate, accumulate and sum."""

import forked
import pytest
import torch
import torch.nn.functional as F
from handtuned.amp import GradScaler, MasterWeights
from handtuned.nn.live_memory import LiveMemory
from handtuned.nn.loss import linear_cross_entropy
from handtuned.optim import AdamW, ZeroOptimizer
from handtuned.optim.accumulate import GradientAccumulationTrainer
from torch import nn
from torch.utils.checkpoint import checkpoint


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_parameter_that_is_unfrozen_later_is_refused(stage):
    """What is cut is decided once: it would stay as it is, without a word."""
    model = two_layers()
    model[0].requires_grad_(False)
    zero = ZeroOptimizer(model, AdamW, stage=stage, lr=1e-3)
    model(torch.ones(2, 6)).sum().backward()
    zero.step()
    zero.zero_grad()
    model[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen when the ZeroOptimizer was made"):
        model(torch.ones(2, 6)).sum().backward()
        zero.step()
    zero.close()


def test_no_parameter_at_all():
    with pytest.raises(ValueError, match="params must hold a parameter"):
        ZeroOptimizer([{"params": []}], AdamW, lr=1e-3)


def test_a_weight_in_two_reentrant_checkpoints(monkeypatch):
    """Stage 2 sums a bucket when it is complete, and the second part of a gradient would come too late."""
    monkeypatch.setattr(ZeroOptimizer, "bucket_elements", 1)
    model, head = nn.Linear(6, 6), nn.Linear(6, 4)
    zero = ZeroOptimizer([*model.parameters(), *head.parameters()], AdamW, stage=2, lr=1e-3)
    x = torch.ones(2, 6, requires_grad=True)
    y = checkpoint(model, checkpoint(model, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match="in two parts"):
        head(y).sum().backward()
    zero.close()


@pytest.mark.parametrize("cleared", [False, True])
def test_sums_of_16_bit_gradients_over_two_backward_passes(cleared):
    model = two_layers().bfloat16()
    zero = ZeroOptimizer(model.parameters(), AdamW, stage=1, summing=True, lr=1e-3)
    x = torch.ones(2, 6).bfloat16()
    model(x).sum().backward()
    if cleared:
        model.zero_grad()
    model(x).sum().backward()
    zero.collect_gradients()
    found = [shard.master.grad.clone() for shard in zero.trained]
    zero.close()
    twin, passes = two_layers().bfloat16(), 1 if cleared else 2
    twin(x).sum().backward()
    assert all(torch.equal(grad, passes * p.grad.float().flatten())
               for grad, p in zip(found, twin.parameters(), strict=True))  # fmt: skip


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW], ids=["ours", "torch"])
def test_weights_that_are_loaded_under_masters_are_taken_over(kind):
    model, other = two_layers().bfloat16(), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).bfloat16()
    optimizer = kind(model.parameters(), lr=1e-4)
    masters = MasterWeights(model, optimizer)

    def step():
        model(torch.ones(2, 6).bfloat16()).sum().backward()
        masters.collect_gradients()
        optimizer.step(**masters.step_arguments())
        if not masters.step_arguments():
            masters.write_back()
        optimizer.zero_grad()

    step()
    kept = {name: master.clone() for name, master in masters.masters.items()}
    model.load_state_dict(model.state_dict())  # the same again: the bits below those of the model stay
    step()
    moved = [(masters.masters[name] - kept[name]).abs().max() for name in kept]
    assert all(0 < difference < 1e-3 for difference in moved)
    model.load_state_dict(other.state_dict())
    step()
    for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2e-3)


def test_a_loss_without_gradients_makes_none():
    hidden, weight = torch.randn(64, 32), torch.randn(5000, 32, requires_grad=True)
    target = torch.randint(5000, (64,))
    with torch.no_grad(), LiveMemory(scan=False) as memory:
        loss = linear_cross_entropy(hidden, weight, target, chunk=8)
    assert memory.peak_added < weight.nbytes
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.t(), target, reduction="sum"))


def test_gradients_of_fsdp_are_refused_by_the_scaler():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    parameter.grad.device_mesh = "a mesh"  # as a DTensor has one
    scaler, optimizer = GradScaler("cpu"), torch.optim.SGD([parameter], lr=0.1)
    scaler.scale(torch.ones(()))
    with pytest.raises(TypeError, match="DTensors; under FSDP use torch"):
        scaler.unscale_(optimizer)


def _rank(rank, path, results):
    """A tail in which each rank has used a layer of its own."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = experts

        def forward(self, x):
            return self.experts[rank](x)

    model = nn.parallel.DistributedDataParallel(Experts(), find_unused_parameters=True)
    trainer = GradientAccumulationTrainer(model, torch.optim.SGD(model.parameters(), lr=1.0), 4)
    trainer.train_step(torch.ones(2, 4), torch.tensor([0, 1]))
    trainer.finish()
    results[rank] = [p.detach().numpy() for p in experts.parameters()]
    del model, trainer
    dist.destroy_process_group()


def test_a_tail_in_which_ranks_have_used_other_layers(tmp_path):
    with forked.CONTEXT.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.start_processes(
            _rank, (tmp_path / "rendezvous", results), nprocs=2, start_method=forked.METHOD
        )
        results = dict(results)
    torch.manual_seed(0)
    begun = [p.detach() for _ in range(3) for p in nn.Linear(4, 3).parameters()]
    for at, (first, second) in enumerate(zip(*results.values(), strict=True)):
        assert (first == second).all(), "both ranks have the same model"
        assert (torch.from_numpy(first) != begun[at]).any() == (at < 4), "the third layer met no row"
