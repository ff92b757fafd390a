"""Mistakes of learners that a checker once let pass or explained by another one, and right answers that it refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from handtuned.kernels import runtime
from handtuned.kernels.runtime import tl, triton
from handtuned.lessons import exercises_of
from handtuned.lessons.exercise import NEARER, verdict
from handtuned.lessons.exercises.e07_kernels import base_and_low_rank, skinny_product
from handtuned.lessons.exercises.e07_layer import LoRA
from lesson_kernels import in_parts

interpreted = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs Triton's interpreter")


def solution(key):
    return exercises_of(key[:2])[key].solution


@triton.jit
def axpy_kernel(x_ptr, y_ptr, out_ptr, a, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, a * tl.load(x_ptr + offs, offs < N) + tl.load(y_ptr + offs, offs < N), offs < N)


def into_an_output_of_its_own(a, x, y, out):
    out = torch.empty_like(out)
    axpy_kernel[(triton.cdiv(len(x), 64),)](x, y, out, a, len(x), BLOCK=64)


@triton.jit
def silu_kernel(x_ptr, dy_ptr, dx_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, dy = tl.load(x_ptr + offs, offs < N), tl.load(dy_ptr + offs, offs < N)
    s = tl.sigmoid(x.to(tl.float32)).to(x.dtype)
    tl.store(dx_ptr + offs, dy * s * (1 + x * (1 - s)), offs < N)


def silu_in_fp16(x, dy, dx):
    silu_kernel[(triton.cdiv(len(x), 64),)](x, dy, dx, len(x), BLOCK=64)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, N, stride, BLOCK: tl.constexpr, LOG: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + offs, offs < N, -float("inf"))
    shifted = x - (tl.max(x, 0) if LOG else tl.min(tl.where(offs < N, x, float("inf")), 0))
    e = tl.exp(shifted)
    tl.store(out_ptr + row * N + offs, shifted - tl.log(tl.sum(e, 0)) if LOG else e / tl.sum(e, 0), offs < N)


def softmax(log):
    def launch(x, out):
        N = x.shape[1]
        softmax_kernel[(len(x),)](x, out, N, x.stride(0), BLOCK=triton.next_power_of_2(N), LOG=log)

    return launch


@triton.jit
def outer_kernel(x_ptr, y_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    tl.store(out_ptr + m * 4 + n, tl.load(x_ptr + m) + tl.load(y_ptr + n))


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, M, N, K, tiles, B: tl.constexpr, FORM: tl.constexpr):
    m, n = tl.program_id(0) * B + tl.arange(0, B)[:, None], tl.program_id(1) * B + tl.arange(0, B)[None, :]
    acc, other = tl.zeros([B, B], tl.float32), 1.0 if FORM == 1 else 0.0
    for tile in range(tiles):
        k = tile * B + tl.arange(0, B)
        a = tl.load(a_ptr + m * K + k[None, :], (m < M) & (k[None, :] < K), other)
        b = tl.load(b_ptr + k[:, None] * N + n, (k[:, None] < K) & (n < N), other)
        acc += tl.dot(b, a) if FORM == 2 else tl.dot(a, b)
    tl.store(c_ptr + (n * M + m if FORM == 3 else m * N + n), acc, (m < M) & (n < N))


def product(form, tiles=lambda K: triton.cdiv(K, 16)):
    def matmul(a, b, c):
        (M, K), N = a.shape, b.shape[1]
        grid = (triton.cdiv(M, 16), triton.cdiv(N, 16))
        product_kernel[grid](a, b, c, M, N, K, tiles(K), B=16, FORM=form)

    return matmul


@triton.jit
def unscale_kernel(grad_ptr, scale, flag_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad_ptr + offs, offs < N, 0.0)
    tl.store(grad_ptr + offs, g / scale, offs < N)
    tl.store(flag_ptr, 1.0, (tl.program_id(0) == 0) & (tl.max(tl.where(tl.abs(g) < float("inf"), 0, 1), 0) > 0))


def flag_of_the_first_program(grad, scale, found_inf):
    unscale_kernel[(triton.cdiv(len(grad), 64),)](grad, scale, found_inf, len(grad), BLOCK=64)


@triton.jit
def scaled_kernel(a_ptr, b_ptr, c_ptr, flag_ptr, scale, M, N, K, am, ak, bk, bn, B: tl.constexpr):
    m, n = tl.program_id(0) * B + tl.arange(0, B)[:, None], tl.program_id(1) * B + tl.arange(0, B)[None, :]
    acc = tl.zeros([B, B], tl.float32)
    for start in range(0, K, B):
        k = start + tl.arange(0, B)
        a = tl.load(a_ptr + m * am + k[None, :] * ak, (m < M) & (k[None, :] < K), 0.0)
        b = tl.load(b_ptr + k[:, None] * bk + n * bn, (k[:, None] < K) & (n < N), 0.0)
        acc = tl.dot(a, b, acc)
    acc *= scale
    tl.store(c_ptr + m * N + n, acc.to(tl.float16), (m < M) & (n < N))
    tl.store(flag_ptr, 1.0, tl.max(((acc != acc) | (tl.abs(acc) > 65504)).to(tl.int32)) > 0)


def compared_with_65504(a, b, scale, c, found_inf):
    (M, K), N = a.shape, b.shape[1]
    grid = (triton.cdiv(M, 16), triton.cdiv(N, 16))
    scaled_kernel[grid](a, b, c, found_inf, scale, M, N, K, *a.stride(), *b.stride(), B=16)


def low_rank_times(factor):
    return lambda x, W, S, B, scale, y: base_and_low_rank(x, W, S, B, factor * scale, y)


@triton.jit
def adding_kernel(dy_ptr, s_ptr, db_ptr, scale, M, N, R, B: tl.constexpr, BR: tl.constexpr):
    m, r = tl.program_id(0) * B + tl.arange(0, B)[:, None], tl.arange(0, BR)[None, :]
    s = tl.load(s_ptr + m * R + r, (m < M) & (r < R), 0.0)
    for start in range(0, N, B):
        n = start + tl.arange(0, B)
        dy = tl.load(dy_ptr + m * N + n[None, :], (m < M) & (n[None, :] < N), 0.0)
        part = scale * tl.dot(tl.trans(dy), s)
        tl.atomic_add(db_ptr + n[:, None] * R + r, part, (n[:, None] < N) & (r < R))


def atomics(cleared):
    def up_grads(dy, S, B, scale, dS, dB):
        skinny_product(dy, B, scale, dS)
        (M, N), R = dy.shape, S.shape[1]
        into, blocks = dB.zero_() if cleared else dB, {"B": 16, "BR": max(16, triton.next_power_of_2(R))}
        adding_kernel[(triton.cdiv(M, 16),)](dy, S, into, scale, M, N, R, **blocks)

    return up_grads


class InParts(LoRA):
    """With a 07.6 whose parts torch adds up, as it may there."""

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B, S = ctx.saved_tensors
        dS, dx, dB, dA_t = (torch.empty_like(t) for t in (S, x, B, A.t().contiguous()))
        in_parts(dy.contiguous(), S, B, ctx.scale, dS, dB)
        skinny_product(x.t(), dS, 1.0, dA_t)
        base_and_low_rank(dy, W.t(), dS, A.t(), 1.0, dx)
        return dx, None, dA_t.t(), dB, None


@triton.jit
def at_least_kernel(absmax_ptr):
    absmax_ptr += tl.program_id(0)
    tl.store(absmax_ptr, tl.maximum(tl.load(absmax_ptr), 1e-8))


def never_zero(x, levels, packed, absmax, block_size):
    solution("09.5")(x, levels, packed, absmax, block_size)
    at_least_kernel[(len(absmax),)](absmax)


def accumulate(clears=False, dtype=torch.float64, moves=0.0):
    def answer(model, micro_batches):
        model.zero_grad()
        count, total = sum((labels != -100).sum() for _, labels in micro_batches), 0.0
        for inputs, labels in micro_batches:
            if clears:
                model.zero_grad()
            logits = model(inputs).flatten(0, 1).to(dtype)
            loss = F.cross_entropy(logits, labels.flatten(), reduction="sum") / count
            loss.backward()
            total += loss.item()
        for p in model.parameters():
            p.data -= moves * p.grad
        return total

    return answer


def epoch_and_a_step(model, optimizer, *rest):
    solution("06.2")(model, optimizer, *rest)
    optimizer.zero_grad()
    optimizer.step()


def product_in_numpy(x, W, bias, A, B, alpha):
    delta = alpha / len(A) * x.numpy() @ (B.numpy() @ A.numpy()).T
    return F.linear(x, W, bias) + torch.from_numpy(delta)


def scaled_twice(x, dy, W, A, B, s):
    dS = s * dy @ B
    return dy @ W + s * dS @ A, dS.t() @ x, s * dy.t() @ (x @ A.t())


WRONG = {
    "02.1, an output of its own": (into_an_output_of_its_own, "Give the kernel out itself"),
    "02.2, in fp16": (silu_in_fp16, "compute in fp32"),
    "02.3, the minimum": (softmax(log=False), "subtract the maximum"),
    "02.3, the logarithm": (softmax(log=True), "Divide by the sum of the row's exponentials"),
    "02.4, rows of 4": (
        lambda x, y, out: outer_kernel[(1,)](x, y, out, M=len(x), N=len(y)), "Look at the offsets of the store"
    ),
    "02.6, no tail": (product(0, lambda K: K // 16), "The last tile of K is missing"),
    "02.6, ones beyond K": (product(1), "Every entry is off by 12: beyond K both tiles must be 0"),
    "02.6, exchanged": (product(2), "This is b · a"),
    "02.6, stored transposed": (product(3), "It lies transposed"),
    "03.3, flag of one program": (flag_of_the_first_program, "Every program looks at its block"),
    "03.4, above 65504": (compared_with_65504, "65512 rounds to 65504"),
    "07.5, twice": (low_rank_times(2), "S Bᵀ is in it 0.6 times, and scale is 0.3"),
    "07.6, never cleared": (atomics(cleared=False), "one added to what lay there before"),
    "09.5, never zero": (never_zero, "Of a block of zeros it is 0"),
    "06.1, cleared too often": (accumulate(clears=True), "Only the last micro-batch is in it"),
    "06.1, in fp32": (accumulate(dtype=torch.float32), NEARER),
    "06.1, a step": (accumulate(moves=0.1), "the model's weight is not what it was"),
    "06.2, an empty step": (epoch_and_a_step, "2 updates were expected, got 3"),
    "07.1, in fp32": (lambda M, r: [part.astype(np.float32) for part in solution("07.1")(M, r)], NEARER),
    "07.2, BA in numpy": (product_in_numpy, "never form BA"),
    "07.4, s twice": (scaled_twice, "The factor s is in it twice"),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_refused_with_its_own_reason(name):
    candidate, phrase = WRONG[name]
    right, message = verdict(exercises_of(name[:2])[name[:4]], candidate)
    assert not right and phrase in message, message


@interpreted
@pytest.mark.parametrize("key, candidate", [("07.6", atomics(cleared=True)), ("07.7", InParts.apply)])
def test_a_long_sum_may_be_split(key, candidate):
    right, message = verdict(exercises_of(key[:2])[key], candidate)
    assert right, message
