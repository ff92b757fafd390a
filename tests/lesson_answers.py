"""Answers to the lessons' exercises as a student might give them: right in an unusual way, or wrong in a usual one."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from handtuned.kernels.runtime import tl, triton
from handtuned.lessons import exercises_of
from handtuned.nn import checkpoint
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


def step(sign):
    def one(w, loss, scale, max_norm, lr):
        gradient = torch.autograd.grad(loss * scale, w)[0] / scale
        if not gradient.isfinite().all():
            return False
        w.data.sub_(sign * lr * gradient * min(1.0, max_norm / gradient.norm().item()))
        return True

    return one


def unscale_clearing(grad, scale, found_inf):
    found_inf.zero_()
    exercises_of("03")["03.3"].solution(grad, scale, found_inf)


def least_groups(layers, boundary, inside):
    return np.argmin([k * boundary + math.ceil(layers / k) * inside for k in range(1, layers + 1)]) + 1
