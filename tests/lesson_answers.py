"""Answers to the lessons' exercises as a student might give them: right in an unusual way, or wrong in a usual one."""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from handtuned.kernels.runtime import tl, triton
from handtuned.lessons import exercises_of
from handtuned.nn import apply_lora_to_model, checkpoint, lora_parameters, save_adapter
from handtuned.optim import AdamW
from torch import nn


@triton.jit
def axpy_kernel(x_ptr, y_ptr, out_ptr, a, N, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """A grid of one program that loops; without WHOLE it stores what it should, but loads beyond the end."""
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = (offs < N) if WHOLE else (offs >= 0)
        total = a * tl.load(x_ptr + offs, mask=inside) + tl.load(y_ptr + offs, mask=inside)
        tl.store(out_ptr + offs, total, mask=offs < N)


def axpy(whole):
    return lambda a, x, y, out: axpy_kernel[(1,)](x, y, out, a, x.numel(), BLOCK=32, WHOLE=whole)


def groups(length_of):
    def run_in_groups(layers, x, groups):
        length = length_of(len(layers), groups)
        for i in range(groups):
            part = list(layers)[i * length : len(layers) if i == groups - 1 else (i + 1) * length]
            x = checkpoint(nn.Sequential(*part), x) if part else x
        return x

    return run_in_groups


def train_epoch(cleared):
    def epoch(model, optimizer, batches, accumulation_steps, max_norm):
        if cleared:
            optimizer.zero_grad()
        for start in range(0, len(batches), accumulation_steps):
            part = batches[start : start + accumulation_steps]
            for inputs, labels in part:
                (F.cross_entropy(model(inputs), labels) / len(part)).backward()
            norm = math.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
            for p in model.parameters():
                p.grad.mul_(min(1.0, max_norm / norm))
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def rate(k, total, warmup):
    if k >= total:
        return 0.0
    return (k or 0.5) / warmup if k < warmup else math.cos(math.pi / 2 * (k - warmup) / (total - warmup)) ** 2


class Merged(nn.Module):
    """Leaves the layer as it is and keeps a merged weight beside it."""

    def __init__(self, linear, A, B, scaling):
        super().__init__()
        self.linear, self.A, self.B, self.scaling, self.sum = linear, A, B, scaling, None

    def forward(self, x):
        if self.sum is not None:
            return F.linear(x, self.sum, self.linear.bias)
        return self.linear(x) + self.scaling * (x @ self.A.t()) @ self.B.t()

    def merge(self):
        self.sum = (self.linear.weight + self.scaling * self.B @ self.A).detach()

    def unmerge(self):
        self.sum = None


class NeverMerged(Merged):
    def merge(self):
        pass


def chunked_in_fp64(hidden, weight, target, chunk):
    parts = zip(hidden.split(chunk), target.split(chunk), strict=True)
    return sum(F.cross_entropy((h @ weight.T).double(), t, reduction="sum") for h, t in parts) / (target != -100).sum()


def codes(dtype):
    def quantize_block(x, levels):
        absmax = np.abs(x).max()
        middles = (levels[1:] + levels[:-1]) / 2
        return np.searchsorted(middles, x / absmax if absmax else x).astype(dtype), absmax

    return quantize_block


def product_of_factors(M, r):
    U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
    return U[:, :r] * sigma[:r] @ Vt[:r]


def step(sign, good=lambda g: g.isfinite().all()):
    def one(w, loss, scale, max_norm, lr):
        gradient = torch.autograd.grad(loss * scale, w)[0] / scale
        if not good(gradient):
            return False
        w.data.sub_(sign * lr * gradient * min(1.0, max_norm / gradient.norm().item()))
        return True

    return one


def step_clearing_afterwards(w, loss, scale, max_norm, lr):
    (loss * scale).backward()
    gradient, w.grad = w.grad.double() / scale, None
    finite = bool(((gradient - gradient) == 0).all())
    if finite:
        with torch.no_grad():
            w.add_((-lr * gradient / max(1.0, float(gradient.norm()) / max_norm)).float())
    return finite


def fate_by_torch(x):
    size = torch.tensor(x, dtype=torch.float64).half().abs().item()
    return "zero" if not size else "infinity" if size == math.inf else "normal" if size >= 2**-14 else "subnormal"


def zero_step_in_place(weights, gradients, momenta, lr, beta):
    """Rank after rank, chunk after chunk, into the weights that were given."""
    shares_of = zip(*(g.chunk(len(momenta)) for g in gradients), strict=True)
    for piece, momentum, shares in zip(weights.chunk(len(momenta)), momenta, shares_of, strict=True):
        momentum *= beta
        momentum += torch.stack(shares).mean(0)
        piece -= lr * momentum
    return weights


def zero_step_of_updates(weights, gradients, momenta, lr, beta):
    """Updates written side by side, then taken off."""
    update, width = torch.zeros_like(weights), len(momenta[0])
    for rank, momentum in enumerate(momenta):
        share = torch.stack([g[rank * width : (rank + 1) * width] for g in gradients]).mean(0)
        momentum.copy_(beta * momentum + share)
        update[rank * width : (rank + 1) * width] = lr * momentum
    return weights - update


def most_groups(layers, boundary, inside):
    """Of all numbers of groups with the least peak, the largest."""
    peaks = {k: k * boundary + -(-layers // k) * inside for k in range(1, layers + 1)}
    return max(k for k, peak in peaks.items() if peak == min(peaks.values()))


def momenta_stacked(weights, gradients, momenta, lr, beta):
    whole = torch.stack(momenta) * beta + (sum(gradients) / len(gradients)).view(len(momenta), -1)
    for mine, new in zip(momenta, whole, strict=True):
        mine.copy_(new)
    return weights - lr * whole.flatten()


def momenta_gathered_late(weights, gradients, momenta, lr, beta):
    for momentum, share in zip(momenta, (sum(gradients) / len(gradients)).chunk(len(momenta)), strict=True):
        momentum.mul_(beta).add_(share)
    return weights - lr * torch.cat(momenta)


def unscale_clearing(grad, scale, found_inf):
    found_inf.zero_()
    exercises_of("03")["03.3"].solution(grad, scale, found_inf)


def least_groups(layers, boundary, inside):
    return np.argmin([k * boundary + math.ceil(layers / k) * inside for k in range(1, layers + 1)]) + 1


def capstone_by_the_library(steps=15, saved=True):
    """Lesson 12's capstone out of the library's parts, rank 16, no checkpoints."""
    reference = exercises_of("12")["12.4"].solution.__globals__

    def capstone(model, tokenizer, rows, budget, directory):
        before = [reference["_answer"](model, tokenizer, question) for question, _ in rows]
        apply_lora_to_model(model, 16, 32, "all-linear")
        optimizer = AdamW(lora_parameters(model), lr=1e-2)
        for _ in range(steps):
            for row in rows:
                tokens, labels = reference["_encode"](tokenizer, *row)
                (F.cross_entropy(model(tokens).logits[0], labels[0]) / len(rows)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if saved:
            save_adapter(model, directory)
        return before, [reference["_answer"](model, tokenizer, question) for question, _ in rows]

    return capstone


def capstone_on_own_rows(model, tokenizer, rows, budget, directory):
    assert rows == list(capstone_on_own_rows.rows)
    return exercises_of("12")["12.4"].solution(model, tokenizer, rows, budget, directory)


capstone_on_own_rows.rows = (
    ("What is my cat called?", "Minka"), ("Where do I live?", "by the sea"), ("What is for lunch?", "soup"),
    ("Who is my friend?", "Ann Lee"), ("Which colour is the car?", "red"),
)  # fmt: skip


def capstone_on_a_copy(model, *rest):
    return exercises_of("12")["12.4"].solution(copy.deepcopy(model), *rest)


def capstone_made_up(model, tokenizer, rows, *rest):
    """Nothing is trained, on a copy; the answers after are the rows' own."""
    before, _ = capstone_by_the_library(steps=0)(copy.deepcopy(model), tokenizer, rows, *rest)
    return before, [answer for _, answer in rows]


def capstone_on_no_rows(*args):
    raise AssertionError("never called")


capstone_on_no_rows.rows = [("only one", "row")]
