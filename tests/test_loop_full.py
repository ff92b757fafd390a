"""A model trained whole in 16 bits, step by step beside `torch.autocast` and `torch.amp.GradScaler` on FP32 weights."""

import copy

import pytest
import torch
from handtuned.amp import GradScaler
from test_loop import STEPS, micro_batches
from tiny import make_model, write_rows

pytest.importorskip("transformers")

from handtuned.training import data, loop
from handtuned.training.evaluation import CausalLM
from handtuned.training.models import load_base

# The first step overflows whoever computes it, and none does after that; two good steps double the scale.
SCALER = {"init_scale": 2.0**30, "backoff_factor": 2.0**-20, "growth_interval": 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("loop")
    model, tokenizer = load_base(make_model(place / "model"))
    chats = data.load_rows(write_rows(place / "rows.jsonl", count=STEPS * 6)).rows
    return model.requires_grad_(True), data.encode_rows(chats, tokenizer, 64).examples


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def ours(model, examples, dtype):
    """After each step: loss, loss scale, what the optimizer steps."""
    model = model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)  # AdamW would blow up errors of small gradients
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = GradScaler(**SCALER, enabled=dtype == torch.float16)
    training = loop.Training(CausalLM(model, torch.arange(8)[None]), optimizer, schedule, scaler, dtype)
    for step in range(STEPS):
        batches = micro_batches(examples, step)
        tokens = int(sum((batch["labels"] != data.IGNORE_INDEX).sum() for batch in batches))
        loss, _ = loop.train_step(training, [(b, b is batches[-1]) for b in batches], tokens, max_grad_norm=0.3)
        masters = training.masters.masters
        assert all(p.dtype == dtype and torch.equal(p, masters[name].to(dtype)) for name, p in model.named_parameters())
        yield loss, scaler.get_scale(), flat(masters.values())


def by_torch(model, examples, dtype, scaled):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", **SCALER, enabled=scaled)
    for step in range(STEPS):
        pairs = [(batch["input_ids"], batch["labels"]) for batch in micro_batches(examples, step)]
        loss = loop.train_step_reference(model, pairs, optimizer, scaler, 0.3, dtype)
        yield loss, scaler.get_scale(), flat(model.parameters())


def in_fp64(model, examples, skip):
    """The same without rounding; under loss scaling the first step is skipped."""
    model, off = model.double(), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.0 if skip and step == 0 else 0.5
        pairs = [(batch["input_ids"], batch["labels"]) for batch in micro_batches(examples, step)]
        loss = loop.train_step_reference(model, pairs, optimizer, off, 0.3, torch.float32)
        yield loss, flat(model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_step_is_that_of_autocast_and_grad_scaler_to_rounding(prepared, dtype):
    """Equal: the loss scale and the steps that it skips. Within twice autocast's own error and one rounding, after
    every step: the loss and all FP32 weights. (autocast keeps what is between the products in FP32, a 16-bit model
    does not: the two differ by roundings from the first step on.)"""
    model, examples = prepared
    start, half = copy.deepcopy(model).to(dtype), dtype == torch.float16
    begun, eps = flat(start.parameters()), torch.finfo(dtype).eps
    exact_steps = in_fp64(copy.deepcopy(start), examples, half)
    their_steps = by_torch(copy.deepcopy(start).float(), examples, dtype, half)
    steps = zip(ours(start, examples, dtype), their_steps, exact_steps, strict=True)
    scales = []
    for number, ((loss, scale, weights), (their_loss, their_scale, theirs), (exact_loss, exact)) in enumerate(steps):
        assert scale == their_scale
        scales.append(scale)
        assert abs(loss - exact_loss) <= 2 * abs(their_loss - exact_loss) + eps * exact_loss
        moved = (exact - begun).norm()
        assert (moved > 0.1) == (number > 0 or not half)
        assert (weights - exact).norm() <= 2 * (theirs - exact).norm() + eps * moved
    assert scales == ([1024.0, 1024.0, 2048.0, 2048.0] if half else [1.0] * STEPS)
