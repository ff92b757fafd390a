"""Lesson 06: gradient accumulation and the schedule."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from ..exercise import NEARER, Exercise, WrongAnswer, number, unchanged


def _accumulate(model, micro_batches):
    model.zero_grad()
    count = sum((labels != -100).sum() for _, labels in micro_batches)
    total = 0.0
    for inputs, labels in micro_batches:
        loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten(), reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total


def _mean_of_means(model, micro_batches):
    model.zero_grad()
    total = 0.0
    for inputs, labels in micro_batches:
        loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()) / len(micro_batches)
        loss.backward()
        total += loss.item()
    return total


def _padding_counted(model, micro_batches):
    model.zero_grad()
    count = sum(labels.numel() for _, labels in micro_batches)
    total = 0.0
    for inputs, labels in micro_batches:
        loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten(), reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total


def _never_cleared(model, micro_batches):
    count = sum((labels != -100).sum() for _, labels in micro_batches)
    total = 0.0
    for inputs, labels in micro_batches:
        loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten(), reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total


def _gradient(model):
    return torch.cat([p.flatten() * 0 if p.grad is None else p.grad.flatten() for p in model.parameters()]).detach()


def _share(model, part, micro_batches):
    """What a part of the micro-batches adds to the mean loss of all."""
    count = sum((labels != -100).sum() for _, labels in micro_batches)
    losses = (F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="sum") for x, y in part)
    return sum(losses) / count


def _compare(model, candidate, micro_batches, what):
    for p in model.parameters():
        p.grad = None
    inputs = [model(x).flatten(0, -2) for x, _ in micro_batches]
    expected = F.cross_entropy(torch.cat(inputs), torch.cat([y.flatten() for _, y in micro_batches]))
    expected.backward()
    wanted = _gradient(model).clone()
    if what != "a gradient was left over from before":
        model.zero_grad()
    with unchanged(micro_batches=micro_batches, **{"the model's weight": list(model.parameters())}):
        loss = candidate(model, micro_batches)
    if any(p.grad is None for p in model.parameters()):
        raise WrongAnswer(f"{what}: a parameter has no gradient afterwards")
    found = _gradient(model)
    if not torch.allclose(found, wanted, rtol=1e-6, atol=1e-9):
        ratio = (found.norm() / wanted.norm()).item()
        off = ((found - wanted).norm() / wanted.norm()).item()
        told = "Every token that is not −100 weighs the same: sum the losses, divide by the count of all micro-batches."
        last = torch.autograd.grad(_share(model, micro_batches[-1:], micro_batches), model.parameters())
        if torch.allclose(found, torch.cat([gradient.flatten() for gradient in last]), rtol=1e-6, atol=1e-9):
            told = "Only the last micro-batch is in it: clear .grad once, before the first."
        elif off < 2**-17:
            told = NEARER
        elif what == "a gradient was left over from before":
            told = "backward adds to .grad: clear it first."
        told = f"(its norm is {ratio:.2f} of the true one). {told}"
        raise WrongAnswer(f"{what}: the gradient is off by {off:.0%} {told}")
    loss = number(loss, f"{what}: the gradient is right, but the mean loss")
    if not abs(loss - expected.item()) <= 1e-6:
        raise WrongAnswer(f"{what}: the gradient is right, but the mean loss is {expected.item():.4f}, got {loss}")


def _check_accumulate(candidate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 9), nn.Tanh(), nn.Linear(9, 11)).double()

    def batch(rows, length, prompt=0):
        inputs, labels = torch.randint(0, 11, (rows, length)), torch.randint(0, 11, (rows, length))
        labels[:, :prompt] = -100
        return inputs, labels

    _compare(model, candidate, [batch(2, 5), batch(2, 5), batch(2, 5)], "three equal micro-batches")
    _compare(model, candidate, [batch(2, 5, prompt=2), batch(2, 5, prompt=2)], "labels of −100 in equal micro-batches")
    _compare(model, candidate, [batch(1, 2), batch(3, 17), batch(1, 7)], "micro-batches of different length")
    only_prompt = [batch(2, 6), batch(2, 6, prompt=6), batch(1, 3)]
    _compare(model, candidate, only_prompt, "one micro-batch has only labels of −100")
    _compare(model, candidate, [batch(2, 5), batch(2, 5)], "a gradient was left over from before")
    return "tried equal and unequal micro-batches, prompts, one that is all prompt, and an old gradient"


def _train_epoch(model, optimizer, batches, accumulation_steps, max_norm):
    for start in range(0, len(batches), accumulation_steps):
        part = batches[start : start + accumulation_steps]
        optimizer.zero_grad()
        for inputs, labels in part:
            (F.cross_entropy(model(inputs), labels) / len(part)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()


def _tail_dropped(model, optimizer, batches, accumulation_steps, max_norm):
    whole = len(batches) // accumulation_steps * accumulation_steps
    _train_epoch(model, optimizer, batches[:whole], accumulation_steps, max_norm)


def _tail_too_small(model, optimizer, batches, accumulation_steps, max_norm):
    optimizer.zero_grad()
    for i, (inputs, labels) in enumerate(batches, start=1):
        (F.cross_entropy(model(inputs), labels) / accumulation_steps).backward()
        if i % accumulation_steps == 0 or i == len(batches):
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()


def _clipped_in_parts(model, optimizer, batches, accumulation_steps, max_norm):
    for start in range(0, len(batches), accumulation_steps):
        part = batches[start : start + accumulation_steps]
        optimizer.zero_grad()
        for inputs, labels in part:
            (F.cross_entropy(model(inputs), labels) / len(part)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()


def _check_train_epoch(candidate):
    for count, steps, max_norm, what in (
        (6, 3, 1e9, "6 batches, 3 per update, no clipping"),
        (7, 3, 1e9, "7 batches, 3 per update: a tail of one, no clipping"),
        (8, 4, 0.02, "8 batches, 4 per update, clipped to 0.02"),
    ):
        torch.manual_seed(count)
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        batches = [(torch.randn(4, 5, dtype=torch.double), torch.randint(0, 3, (4,))) for _ in range(count)]
        results, updates = [], []
        for run in (_train_epoch, candidate):
            own = copy.deepcopy(model)
            optimizer = torch.optim.SGD(own.parameters(), lr=0.5)
            made = []
            optimizer.register_step_pre_hook(lambda *_, made=made, own=own: made.append(_gradient(own).norm().item()))
            for p in own.parameters():
                p.grad = torch.ones_like(p)  # left over from before
            run(own, optimizer, list(batches), steps, max_norm)
            results.append(torch.cat([p.detach().flatten() for p in own.parameters()]))
            updates.append(made)
        if len(updates[1]) != len(updates[0]):
            raise WrongAnswer(f"{what}: {len(updates[0])} updates were expected, got {len(updates[1])}")
        if not torch.allclose(*results, rtol=1e-6, atol=1e-6):  # torch divides by norm + 1e-6
            norms = ", ".join(f"{norm:.4f}" for norm in updates[1])
            wanted = ", ".join(f"{norm:.4f}" for norm in updates[0])
            late = [i for i, (mine, theirs) in enumerate(zip(*updates, strict=True)) if theirs > 1.5 * mine]
            stale = " Was .grad cleared before the first backward?" if len(late) == 1 and late[0] == 0 else ""
            told = "Divide by the batches of this update, and clip the whole sum once."
            raise WrongAnswer(f"{what}: the updates' gradient norms must be {wanted}; they are {norms}. {told}{stale}")
    return "tried whole parts, a tail of one batch, and clipping, each with an old gradient"


def _rate(k, total, warmup):
    if k < warmup:
        return max(k, 0.5) / warmup
    return 0.5 * (1 + math.cos(math.pi * (k - warmup) / (total - warmup))) if k < total else 0.0


def _check_rate(candidate):
    for total, warmup in ((45, 5), (10, 0), (7, 7), (100, 1)):
        for k in (*range(total), total, total + 3, total + 40):
            wanted, got = _rate(k, total, warmup), number(candidate(k, total, warmup), f"rate({k}, {total}, {warmup})")
            if not math.isclose(got, wanted, abs_tol=1e-9):
                where = "the very first update" if k == 0 else "during warmup" if k < warmup else "after warmup"
                where = "past the end" if k >= total else where
                told = {
                    "the very first update": "at rate 0 it would be a no-op, so it takes half a step of the warmup",
                    "during warmup": "it rises by 1 / warmup for each update",
                    "after warmup": "0.5 · (1 + cos(π · progress)), and progress begins at 0 where the warmup ends",
                    "past the end": "the rate stays 0; cos would rise again",
                }[where]
                case = f"rate({k}, total={total}, warmup={warmup})"
                raise WrongAnswer(f"{where}: {case} must be {wanted:.4f}, got {got}: {told}")
    return "tried 4 schedules at every update and past the end, one without and one with nothing but warmup"


def _from_zero(k, total, warmup):
    return k / warmup if k < warmup else _rate(k, total, warmup)


def _cosine_from_the_start(k, total, warmup):
    return _rate(k, total, warmup) if k < warmup else _rate(k, total, 0)


def _climbs_again(k, total, warmup):
    if k < warmup:
        return max(k, 0.5) / warmup
    return 0.5 * (1 + math.cos(math.pi * (k - warmup) / max(1, total - warmup)))


EXERCISES = {
    "06.1": Exercise(
        title="The gradient of all tokens",
        specification="accumulate(model, micro_batches): .grad of the mean over all labels but −100; return the mean",
        checker=_check_accumulate,
        solution=_accumulate,
        wrong={
            "mean of means": (_mean_of_means, "different length"),
            "padding counted": (_padding_counted, "labels of −100"),
            "never cleared": (_never_cleared, "left over"),
        },
        hints=(
            "reduction='sum', and one division by the count of all labels that are not −100.",
            "The count of all micro-batches is known before the first one runs: they are in a list.",
        ),
    ),
    "06.2": Exercise(
        title="An epoch with a tail",
        specification="train_epoch(model, optimizer, batches, accumulation_steps, max_norm)",
        checker=_check_train_epoch,
        solution=_train_epoch,
        wrong={
            "tail dropped": (_tail_dropped, "3 updates were expected, got 2"),
            "tail too small": (_tail_too_small, "a tail of one"),
            "clipped in parts": (_clipped_in_parts, "clipped to 0.02"),
        },
        hints=(
            "Cut the list into parts of accumulation_steps; the last may be shorter. Divide by the length of the part.",
            "Clip once, after the last backward of a part and before optimizer.step().",
        ),
    ),
    "06.3": Exercise(
        title="Warmup and cosine",
        specification="rate(k, total, warmup) → learning rate of update k as a share of the peak",
        checker=_check_rate,
        solution=_rate,
        wrong={
            "from zero": (_from_zero, "the very first update"),
            "cosine from the start": (_cosine_from_the_start, "after warmup"),
            "climbs again": (_climbs_again, "past the end"),
        },
        hints=(
            "Three cases: k < warmup, k < total, and the rest.",
            "In the cosine, progress is (k − warmup) / (total − warmup), and never more than 1.",
        ),
    ),
}
