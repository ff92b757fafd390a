"""Gradient accumulation equals the big batch: variable lengths, any tail, clipping, scaler, processes."""

import copy

import forked
import pytest
import torch
import torch.nn.functional as F
from handtuned.amp import GradScaler, MixedPrecisionTrainer
from handtuned.optim import AdamW, GradientAccumulationTrainer, cosine_with_warmup
from handtuned.optim.accumulate import accumulated_step_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

VOCABULARY = 7


class TinyLanguageModel(torch.nn.Module):
    """Logits (B, T, vocabulary) from token ids (B, T)."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 5, dtype=dtype)
        self.head = torch.nn.Linear(5, VOCABULARY, dtype=dtype)

    def forward(self, ids):
        return self.head(torch.tanh(self.embedding(ids)))


def tokens(lengths, seed=0):
    """A micro-batch of one padded row for each length; padding has the label -100."""
    generator = torch.Generator().manual_seed(seed)
    width = max(*lengths, 1)
    ids = torch.randint(VOCABULARY, (len(lengths), width), generator=generator)
    labels = torch.randint(VOCABULARY, (len(lengths), width), generator=generator)
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    return ids, labels


def big_batch_step(model, optimizer, batches, max_norm):
    """The truth: one mean over all answer tokens of all micro-batches, one step."""
    optimizer.zero_grad()
    logits = torch.cat([model(ids).flatten(0, 1) for ids, _ in batches])
    labels = torch.cat([labels.flatten() for _, labels in batches])
    F.cross_entropy(logits, labels).backward()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()


def assert_equal_models(a, b, dtype=torch.float64, roundings=64):
    """Equal to a few roundings of the largest parameter (sums in another order)."""
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        bound = roundings * torch.finfo(dtype).eps * q.abs().max().item()
        assert (p - q).abs().max().item() <= bound


MICRO_BATCHES = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=MICRO_BATCHES.filter(lambda micro: any(map(any, micro))),
    accumulation_steps=st.integers(1, 5),
    max_norm=st.sampled_from([None, 0.05, 100.0]),
)
def test_an_epoch_equals_big_batches(lengths, accumulation_steps, max_norm):
    """Rows of any length, micro-batches of any size, a tail of any length; parameters after every step agree."""
    batches = [tokens(micro, seed) for seed, micro in enumerate(lengths)]
    ours, theirs = TinyLanguageModel(), TinyLanguageModel()
    trainer = GradientAccumulationTrainer(
        ours, torch.optim.SGD(ours.parameters(), lr=0.5), accumulation_steps, max_norm=max_norm
    )
    reference = torch.optim.SGD(theirs.parameters(), lr=0.5)
    loss = trainer.train_epoch(batches)
    total = sum((labels != -100).sum().item() for _, labels in batches)
    summed = 0.0
    for start in range(0, len(batches), accumulation_steps):
        together = batches[start : start + accumulation_steps]
        with torch.no_grad():
            for ids, labels in together:
                summed += F.cross_entropy(theirs(ids).flatten(0, 1), labels.flatten(), reduction="sum")
        if any((labels != -100).any() for _, labels in together):
            big_batch_step(theirs, reference, together, max_norm)
    assert_equal_models(ours, theirs)
    assert loss == pytest.approx(float(summed) / total, rel=1e-12)


def test_1_times_8_equals_8_times_1_in_float32():
    """The bug of transformers#34191: the mean of means weighs the tokens of short sequences more."""
    rows = [tokens([length], seed) for seed, length in enumerate([1, 2, 5, 9, 3, 8, 4, 7])]
    width = 9
    one = [
        torch.cat([F.pad(row[part], (0, width - row[part].shape[1]), value=fill) for row in rows])
        for part, fill in ((0, 0), (1, -100))
    ]
    models = []
    for batches, steps in (([one], 1), (rows, 8)):
        model = TinyLanguageModel(torch.float32)
        trainer = GradientAccumulationTrainer(model, torch.optim.SGD(model.parameters(), lr=0.5), steps)
        assert [trainer.train_step(*batch) for batch in batches] == [False] * (steps - 1) + [True]
        models.append(model)
    assert_equal_models(*models, dtype=torch.float32)

    naive = TinyLanguageModel(torch.float32)
    for ids, labels in rows:
        (F.cross_entropy(naive(ids).flatten(0, 1), labels.flatten()) / 8).backward()
    torch.nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
    torch.optim.SGD(naive.parameters(), lr=0.5).step()
    with pytest.raises(AssertionError):
        assert_equal_models(naive, models[0], dtype=torch.float32)


def test_the_reference_equals_the_big_batch():
    batches = [tokens(micro, seed) for seed, micro in enumerate([[1, 2], [6], [0, 3]])]
    reference, big = TinyLanguageModel(), TinyLanguageModel()
    for p in reference.parameters():
        p.grad = torch.full_like(p, 100.0)
    accumulated_step_reference(reference, torch.optim.SGD(reference.parameters(), lr=0.5), batches, max_norm=0.05)
    big_batch_step(big, torch.optim.SGD(big.parameters(), lr=0.5), batches, max_norm=0.05)
    assert_equal_models(reference, big)


def classifier():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 3)


def pairs(count, size=2):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def test_the_documents_usage():
    """Document 001: train_step tells whether it updated; here its tail is right, and clipped."""
    model = classifier()
    trainer = GradientAccumulationTrainer(model, AdamW(model.parameters()), accumulation_steps=4)
    assert [trainer.train_step(x, y) for x, y in pairs(9)] == [False, False, False, True] * 2 + [False]
    assert trainer.finish() is True and trainer.finish() is False


def test_the_tail_is_not_divided_by_the_accumulation_steps():
    """Document 001 divides a tail of one by four: its gradient is 4× too small."""
    (x, y), model = pairs(1)[0], classifier()
    before = model.weight.detach().clone()
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), model.weight)[0]
    trainer = GradientAccumulationTrainer(model, torch.optim.SGD(model.parameters(), lr=1.0), 4, max_norm=None)
    trainer.train_epoch([(x, y)])
    torch.testing.assert_close(before - model.weight, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["train_step", "train_epoch", "tail"])
def test_clipping_on_every_path(path):
    model = classifier()
    before = copy.deepcopy(model)
    trainer = GradientAccumulationTrainer(model, torch.optim.SGD(model.parameters(), lr=1.0), 2, max_norm=1e-3)
    batches = [(x * 100, y) for x, y in pairs(1 if path == "tail" else 2)]
    if path == "train_step":
        for batch in batches:
            trainer.train_step(*batch)
    else:
        trainer.train_epoch(batches)
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_gradients_from_before_do_not_leak_in():
    model = classifier()
    fresh = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    for m in (model, fresh):
        GradientAccumulationTrainer(m, torch.optim.SGD(m.parameters(), lr=0.1), 2).train_epoch(pairs(2))
    assert_equal_models(model, fresh, torch.float32, roundings=0)


@pytest.mark.parametrize(
    "scaler",
    [GradScaler(init_scale=1024.0), torch.amp.GradScaler("cpu", init_scale=1024.0)],
    ids=["ours", "torch"],
)
def test_with_a_scaler(scaler):
    """The same result as without, whatever the scale; and an overflow skips the step and the schedule."""
    plain, scaled = classifier(), classifier()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, scaled)]
    schedule = cosine_with_warmup(optimizers[1], 10, warmup_ratio=0.0)
    batches = pairs(5)
    GradientAccumulationTrainer(plain, optimizers[0], 3).train_step(*batches[0])
    trainer = GradientAccumulationTrainer(scaled, optimizers[1], 5, scheduler=schedule, scaler=scaler)
    reference = GradientAccumulationTrainer(plain, optimizers[0], 5)
    for batch in batches:
        trainer.train_step(*batch), reference.train_step(*batch)
    assert_equal_models(scaled, plain, torch.float32)
    assert schedule.last_epoch == 1

    before = copy.deepcopy(scaled)
    for x, y in batches:
        trainer.train_step(x * float("inf"), y)
    assert_equal_models(scaled, before, torch.float32, roundings=0)
    assert (schedule.last_epoch, scaler.get_scale()) == (1, 512.0)


def test_the_schedule_moves_once_an_update():
    model = classifier()
    optimizer = AdamW(model.parameters())
    schedule = cosine_with_warmup(optimizer, 100)
    trainer = GradientAccumulationTrainer(model, optimizer, 4, scheduler=schedule)
    trainer.train_epoch(pairs(10))
    assert schedule.last_epoch == 3


def test_a_batch_without_answers_makes_no_step():
    model = TinyLanguageModel()
    before = copy.deepcopy(model)
    trainer = GradientAccumulationTrainer(model, AdamW(model.parameters()), 2)
    nothing = tokens([0, 0])
    assert not trainer.train_step(*nothing) and not trainer.train_step(*nothing)
    assert trainer.last_loss.isnan()
    with pytest.raises(ValueError, match="labels other than -100"):
        trainer.train_epoch([nothing, nothing, nothing])
    assert_equal_models(model, before, roundings=0)


def test_outputs_with_logits_and_inputs_by_keyword():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Model(TinyLanguageModel):
        def forward(self, input_ids):
            return Output(super().forward(input_ids))

    model, plain = Model(), TinyLanguageModel()
    batch = tokens([3, 5])
    GradientAccumulationTrainer(model, AdamW(model.parameters()), 1).train_step({"input_ids": batch[0]}, batch[1])
    GradientAccumulationTrainer(plain, AdamW(plain.parameters()), 1).train_step(*batch)
    assert_equal_models(model, plain, roundings=0)


def test_last_loss_is_the_mean_over_the_micro_batch():
    model, (ids, labels) = TinyLanguageModel(), tokens([2, 6])
    trainer = GradientAccumulationTrainer(model, AdamW(model.parameters()), 3)
    exact = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
    trainer.train_step(ids, labels)
    assert trainer.last_loss.item() == pytest.approx(exact.item(), rel=1e-12)


def test_errors_name_the_argument():
    model = classifier()
    optimizer = AdamW(model.parameters())
    for steps in (0, 1.5, "2"):  # 1.5 micro-batches would never be complete, and nothing would be trained
        with pytest.raises(ValueError, match="accumulation_steps"):
            GradientAccumulationTrainer(model, optimizer, steps)
    with pytest.raises(ValueError, match="max_norm"):
        GradientAccumulationTrainer(model, optimizer, max_norm=0.0)
    with pytest.raises(ValueError, match="labels"):
        GradientAccumulationTrainer(model, optimizer).train_step(torch.ones(2, 6), torch.zeros(3, dtype=torch.int64))


def _rank(rank, world, path, lengths, results):
    """One process of the DDP test: its own micro-batches, and a count of all gradient communications."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    model = torch.nn.parallel.DistributedDataParallel(TinyLanguageModel())
    syncs = 0

    def hook(state, bucket):
        nonlocal syncs
        syncs += 1
        return default_hooks.allreduce_hook(state, bucket)

    with pytest.raises(ValueError, match="FP32 to be wrapped in DistributedDataParallel"):
        half = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2).bfloat16())
        MixedPrecisionTrainer(half, torch.optim.SGD(half.parameters(), lr=0.1))
    model.register_comm_hook(None, hook)
    trainer = GradientAccumulationTrainer(model, torch.optim.SGD(model.parameters(), lr=0.5), 3, max_norm=0.05)
    trainer.train_epoch([tokens(lengths[i], i) for i in range(rank, len(lengths), world)])
    results[rank] = (syncs, {name: p.detach().numpy() for name, p in model.module.named_parameters()})
    del model, trainer, half  # before the group, as in `handtuned.training.distributed.start`
    dist.destroy_process_group()


def test_two_processes_equal_one_big_batch(tmp_path):
    """Five micro-batches each, three to a step: one communication for the full batch, and the tail is right too."""
    lengths = [[3], [1, 2], [6], [1], [2, 2, 2], [4], [1], [5], [2], [6, 6]]
    with forked.CONTEXT.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.start_processes(
            _rank, (2, tmp_path / "rendezvous", lengths, results), nprocs=2, start_method=forked.METHOD
        )
        results = dict(results)
    model = TinyLanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = [tokens(micro, i) for i, micro in enumerate(lengths)]
    big_batch_step(model, optimizer, batches[:6], 0.05)
    big_batch_step(model, optimizer, batches[6:], 0.05)
    for syncs, parameters in results.values():
        assert syncs == 1
        other = TinyLanguageModel()
        other.load_state_dict({name: torch.from_numpy(value) for name, value in parameters.items()})
        assert_equal_models(other, model)


@pytest.mark.parametrize("trainer", [GradientAccumulationTrainer, MixedPrecisionTrainer])
def test_an_optimizer_cut_among_ranks_is_refused(trainer):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.across_ranks = True
    with pytest.raises(ValueError, match="optimizer must not be cut among ranks"):
        trainer(model, optimizer)
