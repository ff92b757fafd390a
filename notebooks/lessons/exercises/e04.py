"""Lesson 04: counting bytes."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ...nn.live_memory import LiveMemory
from ..exercise import Exercise, WrongAnswer, number, unchanged


def _states(total, trained, itemsize, masters):
    moment = 4 if masters else itemsize
    return itemsize * total + (itemsize + 4 * masters + 2 * moment) * trained


def _check_states(candidate):
    cases = [
        (7, 7, 4, False, "everything is trained in FP32"),
        (7, 7, 2, True, "everything is trained in 16 bits with masters"),
        (7, 7, 2, False, "everything is trained in 16 bits without masters"),
        (1000, 13, 2, True, "13 of 1000 parameters are trained, the others are frozen"),
        (1000, 0, 4, False, "nothing is trained"),
    ]
    for total, trained, itemsize, masters, what in cases:
        expected = _states(total, trained, itemsize, masters)
        got = number(candidate(total, trained, itemsize, masters), f"{what}: the answer", "number of bytes")
        if got != expected:
            why = (
                f"{itemsize} for each of {total} weights; for each of {trained} trained ones {itemsize} of gradient, "
                f"two moments of {4 if masters else itemsize}{', 4 of master weight' if masters else ''}"
            )
            raise WrongAnswer(
                f"{what}: states({total}, {trained}, {itemsize}, {masters}) must be {expected} bytes, got {got}: {why}"
            )
    return f"tried {len(cases)} runs: FP32, 16 bits with and without masters, an adapter, and no training"


def _kept_bytes(function, *inputs):
    storages = {}

    def note(tensor):
        if not (tensor.is_leaf and tensor.requires_grad):
            base = tensor if tensor._base is None else tensor._base
            if not (base.is_leaf and base.requires_grad):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        out = function(*inputs)
    del out
    return sum(storages.values())


def _counting(count):
    """A candidate that adds `count(tensor)` for every saved tensor."""

    def kept_bytes(function, *inputs):
        total = 0

        def note(tensor):
            nonlocal total
            total += count(tensor)
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            out = function(*inputs)
        del out
        return total

    return kept_bytes


def _is_parameter(tensor):
    base = tensor if tensor._base is None else tensor._base
    return base.is_leaf and base.requires_grad


def _check_kept_bytes(candidate):
    def kept(function, *inputs):
        return number(candidate(function, *inputs), "What kept_bytes returns", "number of bytes")

    torch.manual_seed(0)
    x = torch.randn(3, 5, requires_grad=True)
    single = kept(lambda x: (x + 1).exp(), x)
    if single != 60:
        raise WrongAnswer(f"exp keeps its result, 3 × 5 floats of 4 bytes = 60 bytes, got {single}")
    wide = kept(lambda x: (x + 1).exp(), x.detach().double().requires_grad_())
    if wide != 120:
        raise WrongAnswer(f"a float64 value has 8 bytes: exp of 3 × 5 of them keeps 120 bytes, got {wide}")
    linear = nn.Linear(5, 7)
    parameters = kept(lambda x: linear(x + 1).relu(), x)
    if parameters != 60 + 84:
        view = " Linear saves a transposed view of its weight, which is not a leaf itself; its ._base is the parameter."
        raise WrongAnswer(
            "linear keeps its input (60 bytes) and its weight, relu its result (84 bytes); the weight is a parameter "
            f"that was there before, so 144 bytes are kept, got {parameters}.{view if parameters == 284 else ''}"
        )
    views = kept(lambda x: (y := (x + 1).exp())[1:] * y[:-1], x)
    if views != 60:
        raise WrongAnswer(
            "the result of exp is saved three times here, twice through views; it is one storage of 60 bytes, "
            f"got {views}"
        )
    leaf = kept(lambda x: x.square(), x)
    if leaf != 0:
        raise WrongAnswer(f"square keeps its input, a leaf that was there before: nothing is to be counted, got {leaf}")
    return "tried floats and doubles, a parameter saved as a view, an input, and one storage saved three times"


def _chunked_loss(hidden, weight, target, chunk):
    total = count = 0
    for start in range(0, len(target), chunk):
        labels = target[start : start + chunk]
        total += F.cross_entropy(hidden[start : start + chunk] @ weight.T, labels, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count


def _all_at_once(hidden, weight, target, chunk):
    return F.cross_entropy(hidden @ weight.T, target)


def _mean_of_means(hidden, weight, target, chunk):
    means = []
    for start in range(0, len(target), chunk):
        labels = target[start : start + chunk]
        if (labels != -100).any():
            means.append(F.cross_entropy(hidden[start : start + chunk] @ weight.T, labels))
    return sum(means) / len(means)


def _all_counted(hidden, weight, target, chunk):
    total = 0
    for start in range(0, len(target), chunk):
        rows = slice(start, start + chunk)
        total += F.cross_entropy(hidden[rows] @ weight.T, target[rows], reduction="sum")
    return total / len(target)


def _check_chunked_loss(candidate):
    generator = torch.Generator().manual_seed(1)
    rows, width, words, chunk = 67, 9, 501, 10
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(words, width, generator=generator)
    target = torch.randint(0, words, (rows,), generator=generator)
    with torch.no_grad():
        _compare_loss(candidate, hidden, weight, target, chunk, "67 rows in chunks of 10 (the last has 7)")
        target[: chunk + 3] = -100
        target[40:44] = -100
        _compare_loss(candidate, hidden, weight, target, chunk, "some labels are −100, a whole chunk among them")
        with LiveMemory("cpu", scan=False) as live:
            candidate(hidden, weight, target, chunk)
    one = chunk * words * 4
    if live.peak_added > 6 * one:  # logits and their logarithms, even in float64; all at once would be 13
        raise WrongAnswer(
            f"the loss is right, but {live.peak_added:,} bytes were alive at once; one chunk of logits has {one:,}, "
            f"all logits {rows * words * 4:,}"
        )
    return f"tried a tail, labels of −100, a whole chunk of them; {live.peak_added:,} bytes alive at once"


def _compare_loss(candidate, hidden, weight, target, chunk, what):
    with unchanged(hidden=hidden, weight=weight, target=target):
        got = candidate(hidden, weight, target, chunk)
    expected = F.cross_entropy(hidden.double() @ weight.double().T, target).item()
    got = number(got, f"{what}: the mean loss")
    if not abs(got - expected) <= 1e-4 * expected:
        told = "Sum over all chunks, and divide once by the number of labels that are not −100."
        raise WrongAnswer(f"{what}: the mean over labels other than −100 is {expected:.4f}, got {got:.4f}. {told}")


EXERCISES = {
    "04.1": Exercise(
        title="The states of a training run",
        specification="states(total, trained, itemsize, masters) → bytes of all model states",
        checker=_check_states,
        solution=_states,
        wrong={
            "one moment": (lambda t, n, c, m: c * t + (c + 4 * m + (4 if m else c)) * n, "trained in FP32"),
            "no masters": (lambda t, n, c, m: c * t + (c + 2 * (4 if m else c)) * n, "with masters"),
            "frozen gradients": (lambda t, n, c, m: 2 * c * t + (4 * m + 2 * (4 if m else c)) * n, "frozen"),
        },
        hints=(
            "Weights: every parameter. Everything else: only those that are trained.",
            "Adam has two moments. With masters they are FP32, whatever the weights are.",
        ),
    ),
    "04.2": Exercise(
        title="What autograd keeps",
        specification="kept_bytes(function, *inputs) → bytes saved for backward; a storage counts once",
        checker=_check_kept_bytes,
        solution=_kept_bytes,
        wrong={
            "elements for bytes": (_counting(lambda t: 0 if _is_parameter(t) else 4 * t.numel()), "float64"),
            "parameters too": (_counting(lambda t: t.nbytes), "parameter"),
            "views counted again": (_counting(lambda t: 0 if _is_parameter(t) else t.nbytes), "one storage"),
        },
        hints=(
            "saved_tensors_hooks(pack, unpack): pack sees every tensor that is saved; let it return it as it is.",
            "tensor.untyped_storage() has .data_ptr() and .nbytes(); keep a dict from one to the other.",
            "A transposed weight is a view: its ._base is the parameter.",
        ),
    ),
    "04.3": Exercise(
        title="A loss without all logits",
        specification="chunked_loss(hidden, weight, target, chunk) → mean cross-entropy over labels other than −100",
        checker=_check_chunked_loss,
        solution=_chunked_loss,
        wrong={
            "all logits": (_all_at_once, "alive at once"),
            "mean of chunk means": (_mean_of_means, "chunks of 10"),
            "ignored labels counted": (_all_counted, "−100"),
        },
        hints=(
            "Sum the losses of a chunk (reduction='sum'), and divide once, at the end.",
            "Divide by the number of labels that are not −100.",
        ),
    ),
}
