"""MixedPrecisionTrainer: equal to torch's own recipe, clipping unscaled gradients, skipping what overflowed."""

import copy
import math
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from handtuned.amp import MixedPrecisionTrainer
from handtuned.amp.trainer import mixed_precision_step_reference
from handtuned.optim import AdamW, cosine_with_warmup

LOW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def classifier(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(dtype)


def batches(count=6, size=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator).to(dtype), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def assert_close(a, b, dtype, roundings=8):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert (p - q).abs().max().item() <= roundings * torch.finfo(dtype).eps * q.abs().max().item()


@LOW
def test_follows_torchs_recipe(dtype):
    """Document 001's loop with torch.autocast and torch's GradScaler; ours differs in the order of a division."""
    ours, theirs = classifier(), classifier()
    trainer = MixedPrecisionTrainer(ours, sgd(ours), dtype=dtype, init_scale=1024.0)
    optimizer, scaler = sgd(theirs), torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
    for x, y in batches():
        loss = trainer.train_step(x, y)
        expected = mixed_precision_step_reference(theirs, optimizer, scaler, x, y, dtype)
        assert isinstance(loss, float)
        assert loss == pytest.approx(expected, rel=4 * torch.finfo(dtype).eps)
    assert_close(ours, theirs, dtype)
    assert trainer.scaler.is_enabled() == (dtype == torch.float16)


@LOW
@pytest.mark.parametrize("low_parameters", [False, True], ids=["fp32-model", "16-bit-model"])
def test_learns_as_fp32_does(dtype, low_parameters):
    """One batch, learnt by heart in 60 steps."""
    model = classifier(dtype if low_parameters else torch.float32)
    trainer = MixedPrecisionTrainer(model, AdamW(model.parameters(), lr=0.03), dtype=dtype)
    x, y = batches(1, 16, dtype if low_parameters else torch.float32)[0]
    losses = [trainer.train_step(x, y) for _ in range(60)]
    assert losses[0] > 0.8 and losses[-1] < 0.2
    assert (trainer.masters is not None) == low_parameters
    assert all(p.dtype == (dtype if low_parameters else torch.float32) for p in model.parameters())


def test_clips_the_unscaled_gradient():
    """Clipping the scaled one would leave a norm of 1 / 65536 = 1.5e-5."""
    model = classifier()
    before = copy.deepcopy(model)
    trainer = MixedPrecisionTrainer(model, sgd(model, lr=1.0), init_scale=65536.0, max_norm=0.01)
    trainer.train_step(*batches(1)[0])
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


@LOW
@pytest.mark.parametrize("low_parameters", [False, True], ids=["fp32-model", "16-bit-model"])
def test_accumulation_equals_the_big_batch(dtype, low_parameters):
    """Micro-batches with different numbers of labels."""
    start = dtype if low_parameters else torch.float32
    small, big = classifier(start), classifier(start)
    data = batches(3, 4, start)
    for row, (_, y) in enumerate(data):
        y[: row + 1] = -100
    for model, steps in ((small, 3), (big, 1)):
        trainer = MixedPrecisionTrainer(model, sgd(model), dtype, init_scale=256.0, accumulation_steps=steps)
        parts = data if steps == 3 else [tuple(torch.cat(part) for part in zip(*data, strict=True))]
        for i, (x, y) in enumerate(parts):
            unchanged = copy.deepcopy(model)
            trainer.train_step(x, y)
            if i + 1 < steps:
                assert_close(model, unchanged, dtype, roundings=0)
    assert_close(small, big, dtype)


def test_finish_updates_from_a_tail():
    model = classifier()
    alone = copy.deepcopy(model)
    x, y = batches(1)[0]
    trainer = MixedPrecisionTrainer(model, sgd(model), accumulation_steps=4, init_scale=256.0)
    assert trainer.finish() is False
    trainer.train_step(x, y)
    assert trainer.finish() is True and trainer.finish() is False
    MixedPrecisionTrainer(alone, sgd(alone), init_scale=256.0).train_step(x, y)
    assert_close(model, alone, torch.float32)


@pytest.mark.parametrize("low_parameters", [False, True], ids=["fp32-model", "fp16-model"])
def test_an_overflow_skips_step_and_schedule(low_parameters):
    dtype = torch.float16 if low_parameters else torch.float32
    model = classifier(dtype)
    optimizer = AdamW(model.parameters(), lr=0.1)
    schedule = cosine_with_warmup(optimizer, 10, warmup_ratio=0.0)
    trainer = MixedPrecisionTrainer(model, optimizer, init_scale=2.0**40, scheduler=schedule)
    before, (x, y) = copy.deepcopy(model), batches(1, 4, dtype)[0]
    trainer.train_step(x, y)
    assert_close(model, before, torch.float32, roundings=0)
    assert (schedule.last_epoch, trainer.scaler.get_scale(), len(optimizer.state)) == (0, 2.0**39, 0)
    for _ in range(40):
        trainer.train_step(x, y)
    assert schedule.last_epoch >= 1
    assert trainer.scaler.get_scale() < 2.0**39
    assert all(p.isfinite().all() for p in model.parameters())


def test_logits_in_three_dimensions_and_ignored_labels():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = torch.nn.Embedding(5, 8)
            self.head = torch.nn.Linear(8, 5)

        def forward(self, input_ids):
            return type("Output", (), {"logits": self.head(self.embedding(input_ids))})()

    model = Model()
    ids = torch.randint(5, (2, 7))
    labels = torch.randint(5, (2, 7))
    labels[1, 3:] = -100
    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
    for inputs in ({"input_ids": ids}, UserDict(input_ids=ids)):  # a tokenizer's BatchEncoding is a UserDict
        trainer = MixedPrecisionTrainer(model, sgd(model, lr=0.0), torch.bfloat16)
        assert trainer.train_step(inputs, labels) == pytest.approx(expected.item(), rel=0.02)
    assert math.isnan(trainer.train_step(ids, torch.full_like(labels, -100)))


def test_errors_name_the_argument():
    model = classifier()
    for kwargs in (
        {"dtype": torch.float32}, {"accumulation_steps": 0}, {"accumulation_steps": 1.5}, {"max_norm": -1.0}
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            MixedPrecisionTrainer(model, sgd(model), **kwargs)
    with pytest.raises(ValueError, match="labels"):
        MixedPrecisionTrainer(model, sgd(model)).train_step(torch.ones(2, 6), torch.zeros(3, dtype=torch.int64))
