"""Offloading: the same numbers, with optimizer state in the host's memory. On a CPU both memories are one, known
apart by what the optimizer keeps where; on a GPU by the tensors' devices."""

import pytest
import torch
import zero_worker
from handtuned.optim import AdamW, ZeroOptimizer
from handtuned.optim.zero_collectives import Host
from torch import nn

CHECKS = ("offload_changes_no_number", "offload_skips_overflows", "offload_bytes")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return zero_worker.run(2, tmp_path_factory.mktemp("offload") / "two", CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(two, name):
    assert name not in two, two[name]


def test_there_and_back(device):
    host = Host(device)
    there = torch.randn(1000, device=device)
    copy = host.fetch(there)
    host.wait()
    assert copy.device.type == "cpu" and copy.data_ptr() != there.data_ptr() and torch.equal(copy, there.cpu())
    assert copy.is_pinned() == (device.type == "cuda")
    back = torch.zeros_like(there)
    host.send(copy, back)
    host.wait()
    assert torch.equal(back, there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_on_the_device(device, stage, dtype):
    model = nn.Sequential(nn.Linear(33, 33), nn.Linear(33, 33)).to(device, dtype)
    zero = ZeroOptimizer(model.parameters(), AdamW, stage=stage, offload=True)
    for _ in range(2):
        zero.zero_grad()
        model(torch.randn(4, 33, device=device, dtype=dtype)).square().mean().backward()
        zero.step()
    tensors = [t for state in zero.state.values() for t in state.values()]
    tensors += [t for shard in zero.shards for t in (shard.value, shard.value.grad, shard.master)]
    assert all(t.device.type == "cpu" for t in tensors)
    count, held = 2 * 33 * 34, zero.bytes_held()
    assert held["parameters"] == count * dtype.itemsize and held["optimizer state"] == 0
    assert held["gradients"] == (count * dtype.itemsize if stage == 1 else 0)
    # Gradients and weights in `dtype`, moments in FP32, masters of 16-bit weights, a counter of steps each.
    assert held["host"] == count * (2 * dtype.itemsize + 8 + 4 * (dtype.itemsize == 2)) + 4 * 4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_dicts_pass_between_offloaded_and_not(device, stage):
    torch.manual_seed(0)
    models = [nn.Linear(5, 7).to(device, torch.bfloat16) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plain, offloaded = (
        ZeroOptimizer(model.parameters(), torch.optim.AdamW, stage=stage, offload=offload, lr=0.1)
        for model, offload in zip(models, (False, True), strict=True)
    )
    x = torch.randn(4, 5, device=device, dtype=torch.bfloat16)

    def step(model, zero):
        model(x).square().mean().backward()
        zero.step()
        zero.zero_grad()

    step(models[0], plain)
    with plain.gathered(), offloaded.gathered():
        models[1].load_state_dict(models[0].state_dict())
    offloaded.load_state_dict(plain.state_dict())
    for _ in range(3):
        step(models[0], plain)
        step(models[1], offloaded)
    plain.close()
    offloaded.close()
    assert torch.allclose(models[0].weight, models[1].weight, atol=0 if device.type == "cpu" else 1e-2)
