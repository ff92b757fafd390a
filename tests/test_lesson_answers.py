"""Checkers of exercises that ask for no kernel: right answers of every shape, wrong ones with the true reason."""

import functools
import inspect
import re
import struct
import time

import lesson_answers as answers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from handtuned.lessons import exercises_of, guards
from handtuned.lessons.exercise import NEAR, NEARER, STUB, WrongAnswer, expect_close, number, unchanged, verdict
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

KEYS = [key for lesson in range(13) for key in exercises_of(f"{lesson:02d}") if key != "12.4"]  # that takes long


def judged(key, candidate):
    return verdict(exercises_of(key[:2])[key], candidate)


def solution(key):
    return exercises_of(key[:2])[key].solution


def unfilled(*args): ...


def failing(*args):
    return {}["key"]


@pytest.mark.parametrize("key", KEYS)
def test_whatever_is_returned_no_error_comes_from_the_checker(key):
    for made in (None, ..., "text", (None, None), 1.0, (), torch.zeros(3, 3, dtype=torch.complex64), float("nan")):
        right, message = judged(key, lambda *args, made=made: made)
        assert not right and not re.search("[a-z]Error|line [0-9]", message), message
    assert not judged(key, unfilled)[0]


@pytest.mark.parametrize("key", KEYS)
def test_an_error_in_the_answer_names_its_line_and_one_in_the_call_what_is_asked(key):
    line = inspect.getsourcelines(failing)[1] + 1
    assert judged(key, failing)[1] == f"not yet. KeyError: 'key', line {line}: `return {{}}[\"key\"]`"
    message = judged(key, lambda wrong, number, of, all, the, arguments, here, are, ten, of_them: None)[1]
    assert "No line of yours raises this" in message and exercises_of(key[:2])[key].specification in message


def test_what_torch_has_not_implemented_is_no_stub():
    def answer(*args):
        raise NotImplementedError("The operator 'aten::of_mine' is not implemented")

    assert STUB not in judged("07.2", answer)[1] and "aten::of_mine" in judged("07.2", answer)[1]


def endless(settings, evaluate, steps):
    while True:
        pass


def never_fewer(settings, evaluate, steps):
    alive = list(settings)
    while len(alive) > 1:
        alive = alive[: len(alive) // 2 + 1]


@pytest.mark.parametrize("candidate", [endless, never_fewer])
def test_an_endless_loop_ends(candidate, monkeypatch):
    monkeypatch.setattr(guards, "UNCOUNTED", 0.05)
    monkeypatch.setattr(guards, "MOST_STEPS", 20_000)
    right, message = judged("12.3", candidate)
    line = inspect.getsourcelines(candidate)[1]
    named = int(re.search("line ([0-9]+)", message)[1])
    assert not right and f"{candidate.__name__} does not end" in message and line < named < line + 5


def test_a_long_answer_is_no_endless_one(monkeypatch):
    monkeypatch.setattr(guards, "UNCOUNTED", 0.01)

    def gib(count):
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
        return count / 2**30

    assert judged("00.1", gib)[0]


@pytest.mark.parametrize(
    "value", [3, 3.0, np.int64(3), np.float32(3), np.array(3), torch.tensor(3), torch.tensor([3.0])]
)
def test_a_number_is_a_number(value):
    assert number(value, "x") == 3


@pytest.mark.parametrize("value", [True, "3", None, 3j, [3, 4], torch.zeros(2), torch.zeros(())[None] > 1])
def test_what_is_no_number(value):
    with pytest.raises(WrongAnswer, match="x should be one number, got"):
        number(value, "x")


def test_what_was_given_and_changed_is_named():
    x, rows = torch.tensor([1.0, float("nan")]), {"a": (np.ones(2), 3)}
    with unchanged(x=x, rows=rows, none=None):
        x.clone().add_(1)
    with pytest.raises(WrongAnswer, match="rows is not what it was"), unchanged(x=x, rows=rows):
        rows["a"][0][1] = 2


def test_nearly_right_is_said_to_be():
    want = torch.linspace(-1, 1, 9)
    for got, wide, told in (
        (want.half().float() + 1e-4, want, NEAR),
        (want.double() + 1e-8, want.double(), NEARER),
        (want + 0.1, want, "a hint"),
    ):
        with pytest.raises(WrongAnswer, match=re.escape(told)):
            expect_close(got, wide, "x", rtol=1e-9, hint="a hint")


def clipped(w, loss, scale, max_norm, lr):
    w.grad = None
    (loss * scale).backward()
    w.grad.div_(scale)
    if not torch.isfinite(w.grad).all():
        return False
    nn.utils.clip_grad_norm_([w], max_norm)
    with torch.no_grad():
        w.sub_(w.grad, alpha=lr)
    return True


def loss_in_numpy(hidden, weight, target, chunk):
    total = count = 0
    for start in range(0, len(target), chunk):
        logits = (hidden[start : start + chunk].double() @ weight.double().T).numpy()
        labels = target[start : start + chunk].numpy()
        kept = labels != -100
        total += (np.log(np.exp(logits[kept]).sum(1)) - logits[kept, labels[kept]]).sum()
        count += kept.sum()
    return total / count


def one_loss(model, micro_batches):
    model.zero_grad()
    logits = torch.cat([model(inputs).flatten(0, 1) for inputs, _ in micro_batches])
    loss = F.cross_entropy(logits, torch.cat([labels.flatten() for _, labels in micro_batches]))
    loss.backward()
    return loss


def roots_shared(M, r):
    U, sigma, Vt = torch.linalg.svd(torch.from_numpy(M), full_matrices=False)
    return [U[:, :r] * sigma[:r].sqrt(), sigma[:r, None].sqrt() * Vt[:r]]


def lora_in_numpy(x, W, bias, A, B, alpha):
    x, W, A, B = (tensor.numpy() for tensor in (x, W, A, B))
    y = torch.from_numpy(x @ W.T + alpha / len(A) * (x @ A.T) @ B.T)
    return y if bias is None else y + bias


def einsum(x, W, bias, A, B, alpha):
    low_rank = torch.einsum("...r,or->...o", torch.einsum("...i,ri->...r", x, A), B)
    y = torch.einsum("...i,oi->...o", x, W) + alpha / A.size(0) * low_rank
    assert torch.isfinite(y).all()
    return y if bias is None else y + bias


def row_by_row(x, W, adapters, names):
    y = x @ W.T
    for i, name in enumerate(names):
        if name is not None:
            A, B, scaling = adapters[name]
            y[i] = y[i] + scaling * (x[i] @ A.T) @ B.T
    return y


def by_index(weights, gradients, momenta, lr, beta):
    owner, new = torch.arange(len(weights)) // len(momenta[0]), weights.clone()
    for rank, m in enumerate(momenta):
        mine = owner == rank
        m.mul_(beta).add_(sum(g[mine] for g in gradients) / len(gradients))
        new[mine] -= lr * m
    return new


def whole_gradient_under_stage_1(parameters, ranks, stage, offload):
    if offload and stage < 2:
        return 4 * parameters
    return solution("11.1")(parameters, ranks, stage, offload)


RIGHT = {
    "00.2, numpy": lambda parameters, trained, bytes_: np.int64(bytes_ * parameters + (bytes_ + 8) * trained),
    "00.2, torch": lambda parameters, trained, bytes_: torch.tensor(bytes_ * parameters + (bytes_ + 8) * trained),
    "01.1, struct": lambda bits: struct.unpack("e", struct.pack("H", bits))[0],
    "01.1, numpy": lambda bits: np.uint16(bits).view(np.float16),
    "01.3": lambda: [0.5, 2.0**-13, 0.0, 1024.0],
    "03.1": lambda *args: list(solution("03.1")(*args)),
    "03.2": clipped,
    "04.3": loss_in_numpy,
    "05.1": lambda n, b, i: torch.tensor([k * b + -(-n // k) * i for k in range(1, n + 1)]).argmin() + 1,
    "05.2": lambda func, *args: checkpoint(func, *args, use_reentrant=False),
    "06.1": one_loss,
    "07.1": roots_shared,
    "07.2, numpy": lora_in_numpy,
    "07.2, einsum": einsum,
    "07.4": lambda *args: list(solution("07.4")(*args)),
    "08.1": lambda paths, t: tuple(p for p in paths if p.split(".")[-len(t.split(".")) :] == t.split(".")),
    "08.3": row_by_row,
    "09.1": lambda x, levels: [torch.from_numpy(solution("09.1")(x, levels)[0]), torch.tensor(np.abs(x).max())],
    "10.2": lambda *counts: np.int64(solution("10.2")(*counts)),
    "10.3": lambda q, delta: torch.tensor(solution("10.3")(q, delta)),
    "11.1": whole_gradient_under_stage_1,
    "11.3": by_index,
    "11.2": lambda n, ranks: tuple(map(list, solution("11.2")(n, ranks))),
    "12.1": lambda points: tuple(map(list, solution("12.1")(points))),
}  # fmt: skip


@pytest.mark.parametrize("key", RIGHT)
def test_a_right_answer_of_unusual_shape_passes(key):
    right, message = judged(key.split(",")[0], RIGHT[key])
    assert right, message


def after(key, change):
    """The solution, and then a change of what it was given."""

    def answer(*args):
        made = solution(key)(*args)
        with torch.no_grad():
            change(*args)
        return made

    return answer


def by_autograd(x, dy, W, A, B, s):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
    return torch.autograd.grad(leaves[0] @ W.T + s * (leaves[0] @ leaves[1].T) @ leaves[2].T, leaves, dy)


def own_constants(w, loss, scale, max_norm, lr):
    return solution("03.2")(w, loss, 1024.0, 1.0, 0.1)


def by_vjp(x, dy, W, A, B, s):
    return torch.func.vjp(lambda x, A, B: x @ W.T + s * (x @ A.T) @ B.T, x, A, B)[1](dy)


def kept_at(address, counted):
    """kept_bytes that tells storages apart by this address of a tensor, among those that count."""

    def kept_bytes(function, *inputs):
        sizes = {}

        def note(tensor):
            if counted(tensor if tensor._base is None else tensor._base):
                sizes[address(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            function(*inputs)
        return sum(sizes.values())

    return kept_bytes


by_tensor = kept_at(torch.Tensor.data_ptr, lambda base: not (base.is_leaf and base.requires_grad))
all_but_parameters = kept_at(lambda t: t.untyped_storage().data_ptr(), lambda base: not isinstance(base, nn.Parameter))


class NothingOnceMerged(answers.Merged):
    def merge(self):
        super().merge()
        self.forward = lambda x: None


class DenseOnce(torch.autograd.Function):
    dense = staticmethod(functools.cache(lambda q: q.dequantize()))

    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return x @ DenseOnce.dense(q).T

    @staticmethod
    def backward(ctx, dy):
        return dy @ DenseOnce.dense(ctx.q), None


WRONG = [
    ("00.1", lambda count: round(count / 2**30, 6), "Do not round"),
    ("01.2", lambda x: "tiny", "return one of zero, subnormal, normal, infinity"),
    ("01.3", lambda: [0.5, 2.0**-13, 0.0, 0.0], "A scale of 0"),
    ("03.2", own_constants, "are other numbers written into your function"),
    ("03.2", lambda *args: True, "w has not moved"),
    ("04.2", by_tensor, "it is one storage of 60 bytes"),
    ("04.2", all_but_parameters, "a leaf that was there before"),
    ("04.3", lambda *args: float("nan"), "got nan"),
    ("04.3", after("04.3", lambda hidden, *_: hidden.mul_(1.001)), "hidden is not what it was"),
    ("05.2", lambda func, *args: func(*args).detach(), "The result has no gradient"),
    ("06.1", after("06.1", lambda model, batches: batches[0][1].fill_(0)), "micro_batches is not what it was"),
    ("07.1", after("07.1", lambda M, r: np.copyto(M, 0)), "M is not what it was"),
    ("07.2", lambda x, W, bias, A, B, alpha: F.linear(x, W.add_(alpha / len(A) * B @ A), bias), "W is not what it was"),
    ("07.2", lambda *args: solution("07.2")(*args).double(), "has dtype torch.float64"),
    ("07.2", lambda x, W, bias, *rest: solution("07.2")(x, W, None, *rest), "The bias is missing"),
    ("07.4", lambda *args: [t.float() for t in solution("07.4")(*args)], "has dtype torch.float32"),
    ("07.4", torch.enable_grad()(by_autograd), "Without autograd"),
    ("07.4", by_vjp, "Without autograd"),
    ("07.4", after("07.4", lambda x, dy, *_: dy.mul_(2)), "dy is not what it was"),
    ("07.4", by_autograd, "Without autograd"),
    ("07.4", lambda *args: [t.double() for t in solution("07.4")(*(torch.as_tensor(a).float() for a in args))], NEARER),
    ("08.2", lambda *args: None, "makes has no __call__, merge, unmerge"),
    ("08.1", lambda paths, t: [p for p in paths if re.search(rf"(^|\.){t}$", p)], "self_attn_q_proj'"),
    ("08.2", NothingOnceMerged, "does your function return it?"),
    ("08.3", lambda *args: solution("08.3")(*args).double(), "has dtype torch.float64"),
    ("08.3", after("08.3", lambda x, W, adapters, names: adapters["b"][1].mul_(2)), "adapters is not what it was"),
    ("09.1", after("09.1", lambda x, levels: np.copyto(x, 0)), "x is not what it was"),
    ("10.1", DenseOnce.apply, "dequantize a second time"),
    ("10.3", after("10.3", lambda q, delta: delta.mul_(2)), "delta is not what it was"),
    ("11.1", lambda *args: float("nan"), "got nan"),
    ("12.1", after("12.1", lambda points: points.sort()), "points is not what it was"),
    ("12.1", lambda points: solution("12.1")(points)[:3], "a long front"),
    ("12.1", lambda points: solution("12.1")(points)[::-1], "sort them by bytes"),
    ("12.2", lambda b, runs: next((n for n in runs if max(runs[n][1].values()) <= b), None), "expected 'full'"),
    ("12.2", after("12.2", lambda budget, runs: runs.pop("LoRA")), "runs is not what it was"),
]


@pytest.mark.parametrize("key, candidate, phrase", WRONG)
def test_a_wrong_answer_is_refused_with_the_true_reason(key, candidate, phrase):
    right, message = judged(key, candidate)
    assert not right and phrase in message, message
