"""AdamW with 8-bit moments: the levels, the bytes, and convergence beside FP32."""

import copy

import pytest
import torch
import torch.nn.functional as F
from handtuned.nn.live_memory import LiveMemory
from handtuned.optim import AdamW, AdamW8bit, adamw8bit
from handtuned.optim.adamw8bit import dequantize_blocks, quantize_blocks, quantize_blocks_reference
from handtuned.quant import dynamic_map

SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@SIGNED
def test_levels_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(dynamic_map(signed), functional.create_dynamic_map(signed), rtol=1e-6, atol=0)


@SIGNED
def test_levels(signed):
    code = dynamic_map(signed)
    assert code.numel() == 256 and code.unique().numel() == 256
    assert code.max() == 1 and (code == 0).sum() == 1
    assert code[code > 0].min() < 1e-6


@SIGNED
@pytest.mark.parametrize("size", [1, 63, 256, 257, 1000])
def test_nearest_level_in_every_block(signed, size):
    """No further off than the nearest level is, but for the FP16 rounding that the choice begins with."""
    x = torch.randn(size) * 10 ** torch.linspace(-6, 3, size)
    if not signed:
        x = x.abs()
    code = dynamic_map(signed)
    levels, scale = quantize_blocks(x, signed)
    assert levels.dtype == torch.uint8 and levels.shape == (size,) and scale.shape == (-(-size // 256),)
    back = dequantize_blocks(levels, scale, signed)
    nearest = dequantize_blocks(*quantize_blocks_reference(x, signed), signed)
    for start in range(0, size, 256):
        part = x[start : start + 256]
        largest = part.abs().max()
        distance = (nearest[start : start + 256] - part).abs()
        error = (back[start : start + 256] - part).abs()
        raised = (part > 0) & (part / largest < code[code > 0].min())  # to the smallest level instead of zero
        budget = distance + 2**-10 * part.abs() + 1e-11 * largest
        assert (error <= budget)[~raised].all()


def test_the_levels_are_kept_on_the_host_whatever_the_default_device():
    """They are made once a process, which may be while a model is built on the meta device."""
    with torch.device("meta"):
        assert dynamic_map(True).device.type == "cpu"


def test_no_positive_value_becomes_zero():
    x = torch.tensor([1.0, 1e-12, 0.0])
    back = dequantize_blocks(*quantize_blocks(x, signed=False), signed=False)
    assert back[0] == 1 and back[1] > 0 and back[2] == 0


@SIGNED
def test_zeros_and_empty(signed):
    for x in (torch.zeros(300), torch.zeros(0)):
        assert torch.equal(dequantize_blocks(*quantize_blocks(x, signed), signed), x)


def train(optimizer_class, seed, steps=150, **kwargs):
    """Losses of a two-layer network that learns a random teacher of 64 inputs."""
    torch.manual_seed(seed)
    teacher = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 10))
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 10))
    optimizer = optimizer_class(model.parameters(), lr=3e-3, **kwargs)
    losses = []
    for _ in range(steps):
        x = torch.randn(128, 64)
        with torch.no_grad():
            y = (teacher(x) * 8).argmax(dim=1)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


def test_converges_beside_fp32():
    """The mean of the last 20 losses: 8 bits differ from FP32 by less than two FP32 runs with other seeds differ."""
    fp32 = [sum(train(AdamW, seed)[0][-20:]) / 20 for seed in range(3)]
    low = [sum(train(AdamW8bit, seed, min_elements=0)[0][-20:]) / 20 for seed in range(3)]
    start = train(AdamW, 0, steps=1)[0][0]
    assert max(fp32) < 0.5 * start
    spread = max(fp32) - min(fp32)
    for a, b in zip(low, fp32, strict=True):
        assert abs(a - b) < spread, (low, fp32)


def test_bytes_of_state():
    """2 · (1 + 4/256) bytes per parameter in large tensors, 8 in small ones."""
    model = torch.nn.Linear(256, 512)
    optimizer = AdamW8bit(model.parameters())
    model(torch.randn(2, 256)).sum().backward()
    optimizer.step()
    used = {p: sum(t.nbytes for k, t in optimizer.state[p].items() if k != "step") for p in model.parameters()}
    assert used[model.weight] == 2 * model.weight.numel() * (1 + 4 / 256)
    assert used[model.bias] == 8 * 512


def test_small_tensors_are_exactly_adamw():
    p, q = (torch.ones(10, requires_grad=True) for _ in range(2))
    ours, plain = AdamW8bit([p]), AdamW([q])
    for _ in range(3):
        p.grad = q.grad = torch.randn(10)
        ours.step(), plain.step()
    assert torch.equal(p, q)


def test_first_step_follows_adamw():
    """From zero moments the first step is computed before anything is rounded."""
    p, q = (torch.ones(5000, requires_grad=True) for _ in range(2))
    p.grad = q.grad = torch.randn(5000)
    AdamW8bit([p]).step(), AdamW([q]).step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resuming_is_exact(dtype):
    """The levels come back as the bytes that were saved; torch alone would cast them to the dtype of the parameter."""

    def run(optimizer, param, seeds):
        for seed in seeds:
            param.grad = torch.randn(5000, generator=torch.Generator().manual_seed(seed)).to(dtype)
            optimizer.step()

    param = torch.ones(5000, dtype=dtype, requires_grad=True)
    optimizer = AdamW8bit([param])
    run(optimizer, param, range(3))
    twin = param.detach().clone().requires_grad_()
    other = AdamW8bit([twin])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[twin]["exp_avg_levels"].dtype == torch.uint8
    assert other.state[twin]["exp_avg_scale"].dtype == torch.float32
    run(optimizer, param, range(3, 6))
    run(other, twin, range(3, 6))
    assert torch.equal(param, twin)


def test_the_kernel_steps_it_too(kernel_backend, device):
    p = torch.ones(5000, device=device, requires_grad=True)
    q = torch.ones(5000, requires_grad=True)
    p.grad, q.grad = torch.full((5000,), 0.5, device=device), torch.full((5000,), 0.5)
    AdamW8bit([p]).step()
    torch.optim.AdamW([q]).step()
    torch.testing.assert_close(p.cpu(), q, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_closure_and_errors():
    p = torch.ones(2, requires_grad=True)
    assert AdamW8bit([p]).step(lambda: torch.tensor(3.0)).item() == 3.0
    with pytest.raises(ValueError, match="lr"):
        AdamW8bit([p], lr=-1.0)
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        AdamW8bit(embedding.parameters()).step()


def test_a_large_tensor_is_stepped_in_pieces_and_to_the_same_bits(monkeypatch):
    """Its FP32 moments are never there at once; a tensor that is not contiguous is stepped as one that is."""
    made = []
    for piece, turned in ((2**20, False), (512, False), (512, True)):
        monkeypatch.setattr(adamw8bit, "PIECE", piece)
        torch.manual_seed(0)
        param, grads = torch.randn(90, 70), torch.randn(3, 90, 70)
        param = torch.nn.Parameter(param.t().contiguous().t() if turned else param)
        optimizer = adamw8bit.AdamW8bit([param], lr=0.1)
        for grad in grads:
            param.grad = grad
            optimizer.step()
        assert optimizer.state[param]["step"] == 3
        state = optimizer.state[param].values()
        made.append(torch.cat([param.detach().flatten(), *(value.flatten().float() for value in state)]))
    assert torch.equal(made[0], made[1]) and torch.equal(made[1], made[2])


def test_what_a_step_takes_is_bounded(monkeypatch):
    monkeypatch.setattr(adamw8bit, "PIECE", 2**15)
    param = torch.nn.Parameter(torch.zeros(2**17))
    optimizer = adamw8bit.AdamW8bit([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    with LiveMemory("cpu") as memory:
        optimizer.step()
    assert memory.peak_added < 1.2 * adamw8bit.BYTES_WHILE_STEPPING * 2**15, "of one piece in four"


@pytest.mark.parametrize(("before", "after"), [(0, 10**9), (10**9, 0)])
def test_another_min_elements_takes_the_moments_over(before, after):
    param = torch.nn.Parameter(torch.randn(40, 30))
    param.grad = torch.randn(40, 30)
    optimizer = AdamW8bit([param], min_elements=before)
    optimizer.step()
    optimizer.param_groups[0]["min_elements"] = after
    optimizer.step()
    state, g = optimizer.state[param], param.grad
    assert state.keys() == ({"step", "exp_avg", "exp_avg_sq"} if after else {"step", *adamw8bit.ENCODED})
    moments = (state["exp_avg"], state["exp_avg_sq"]) if after else adamw8bit._decoded(*list(state.values())[1:])
    for moment, beta, each in zip(moments, (0.9, 0.999), (g, g * g), strict=True):
        assert (moment.view(g.shape) - (1 - beta**2) * each).norm() < 0.02 * ((1 - beta**2) * each).norm()
