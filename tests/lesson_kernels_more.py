"""More answers to the lessons' kernel exercises: right by other means of Triton, or right for the shown cases alone."""

import torch
from handtuned.kernels.runtime import tl, triton
from handtuned.lessons import exercises_of
from handtuned.lessons.exercises.e07_layer import LoRA

# 02.1


@triton.jit
def axpy_kernel(a, x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr, FORM: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x, y = tl.load(x_ptr + offs, mask), tl.load(y_ptr + offs, mask)
    if FORM == 1:
        x, y = x.to(tl.float16), y.to(tl.float16)
    tl.store(out_ptr + offs, a * x + y, mask)


def axpy(form=0, programs=None, block=64, factor=None):
    def launch(a, x, y, out):
        grid = (programs or triton.cdiv(out.numel(), block),)
        axpy_kernel[grid](factor or a, x, y, out, out.numel(), BLOCK=block, FORM=form)

    return launch


@triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["N"])
@triton.jit
def tuned_kernel(a, x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.device_assert(N > 0)
    x, y = tl.load(x_ptr + offs, offs < N), tl.load(y_ptr + offs, offs < N)
    tl.store(out_ptr + offs, a * x + y, offs < N)


def tuned(a, x, y, out):
    assert x.shape == y.shape == out.shape
    n = out.numel()
    tuned_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](a=a, x_ptr=x, y_ptr=y, out_ptr=out, N=n)


@triton.jit
def descriptor_kernel(a, x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    x = tl.make_tensor_descriptor(x_ptr, [N], [1], [BLOCK])
    y = tl.make_tensor_descriptor(y_ptr, [N], [1], [BLOCK])
    out = tl.make_tensor_descriptor(out_ptr, [N], [1], [BLOCK])
    out.store([start], a * x.load([start]) + y.load([start]))


def by_descriptors(a, x, y, out):
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=x.device))
    descriptor_kernel[(triton.cdiv(out.numel(), 64),)](a, x, y, out, out.numel(), BLOCK=64)


@triton.jit
def endless_kernel(a, x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    start = 0
    while start < N:
        offs = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + offs, a * tl.load(x_ptr + offs, offs < N) + tl.load(y_ptr + offs, offs < N), offs < N)


def endless(a, x, y, out):
    endless_kernel[(1,)](a, x, y, out, out.numel(), BLOCK=64)


# 02.3


@triton.jit
def online_kernel(x_ptr, out_ptr, N, stride, BLOCK: tl.constexpr):
    """Softmax in two passes over blocks that are shorter than a row."""
    row, peak, total = tl.program_id(0), -float("inf"), 0.0
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + offs, offs < N, -float("inf"))
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), 0)
        peak = higher
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + offs, offs < N, -float("inf"))
        tl.store(out_ptr + row * N + offs, tl.exp(x - peak) / total, offs < N)


def online(x, out):
    online_kernel[(len(x),)](x, out, x.shape[1], x.stride(0), BLOCK=4)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, N, stride, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + offs, offs < N, -float("inf"))
    tl.store(out_ptr + row * N + offs, tl.softmax(x), offs < N)


def softmax_of_eight(x, out):
    softmax_kernel[(len(x),)](x, out, x.shape[1], x.stride(0), BLOCK=8)


# 02.6


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, M, N, K, B: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr):
    """FORM 0: each tile of K is a program's; 1: so, and unordered; 2: the first tile of K alone."""
    m = (tl.program_id(0) * B + tl.arange(0, B))[:, None]
    n = (tl.program_id(1) * B + tl.arange(0, B))[None, :]
    k = tl.program_id(2) * BK + tl.arange(0, BK)
    a = tl.load(a_ptr + m * K + k[None, :], (m < M) & (k[None, :] < K), 0.0)
    b = tl.load(b_ptr + k[:, None] * N + n, (k[:, None] < K) & (n < N), 0.0)
    place, inside = c_ptr + m * N + n, (m < M) & (n < N)
    if FORM == 0:
        tl.atomic_add(place, tl.dot(a, b), inside)
    elif FORM == 1:
        tl.store(place, tl.load(place, inside) + tl.dot(a, b), inside)
    else:
        tl.store(place, tl.trans(tl.dot(tl.trans(b), tl.trans(a))), inside)


def product(form, long=16):
    def matmul(a, b, c):
        (M, K), N = a.shape, b.shape[1]
        grid = (triton.cdiv(M, 16), triton.cdiv(N, 16), 1 if form == 2 else triton.cdiv(K, long))
        product_kernel[grid](a, b, c.zero_(), M, N, K, B=16, BK=long, FORM=form)

    return matmul


def one_short(a, b, c):
    """Ends at K - 1: wrong where a single element is left for the last tile."""
    (M, K), N = a.shape, b.shape[1]
    grid = (triton.cdiv(M, 16), triton.cdiv(N, 16), max(1, triton.cdiv(K - 1, 16)))
    product_kernel[grid](a, b, c.zero_(), M, N, K, B=16, BK=16, FORM=0)


def in_one_tile(a, b, c):
    product(2, max(16, triton.next_power_of_2(a.shape[1])))(a, b, c)


# 02.5, 02.7


@triton.jit
def columns_kernel(x_ptr, w_ptr, out_ptr, M, N, stride, BM: tl.constexpr, BN: tl.constexpr):
    m, n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    inside = (m < M) & (n < N)
    x = tl.load(x_ptr + m * stride + n, inside)
    tl.store(out_ptr + m * N + n, x * tl.load(w_ptr + n, n < N), inside)


def one_program(x, w, out):
    columns_kernel[(1,)](x, w, out, *x.shape, x.stride(0), BM=64, BN=128)


def turned_by_torch(x, out):
    turned = x.t().contiguous()
    axpy()(1.0, turned, torch.zeros_like(turned), out)


# 03.3


@triton.jit
def unscale_kernel(grad_ptr, inverse, flag_ptr, N, BLOCK: tl.constexpr, FORM: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad_ptr + offs, offs < N, 0.0)
    tl.store(grad_ptr + offs, g * inverse, offs < N)
    if FORM == 0:
        if tl.max((~(tl.abs(g) < float("inf"))).to(tl.int32), 0) > 0:
            tl.store(flag_ptr, 1.0)
    elif FORM == 1:
        count = tl.sum(tl.where(tl.abs(g) < float("inf"), 0.0, 1.0), 0)
        tl.store(flag_ptr, count, count > 0)
    else:
        total = tl.sum(g, 0)
        tl.store(flag_ptr, 1.0, (tl.abs(total) < float("inf")) == 0)


def unscale(form, programs=None, block=64, warps=4):
    def launch(grad, scale, found_inf):
        grid = (programs or triton.cdiv(grad.numel(), block),)
        unscale_kernel[grid](grad, 1 / scale, found_inf, grad.numel(), BLOCK=block, FORM=form, num_warps=warps)

    return launch


# 03.4, 03.5


@triton.jit
def scaled_kernel(a_ptr, b_ptr, c_ptr, flag_ptr, scale, M, N, K, am, ak, bk, bn, B: tl.constexpr, FORM: tl.constexpr):
    m = (tl.program_id(0) * B + tl.arange(0, B))[:, None]
    n = (tl.program_id(1) * B + tl.arange(0, B))[None, :]
    acc = tl.zeros([B, B], tl.float32)
    for start in range(0, K, B):
        k = start + tl.arange(0, B)
        a = tl.load(a_ptr + m * am + k[None, :] * ak, (m < M) & (k < K)[None, :], 0.0)
        b = tl.load(b_ptr + k[:, None] * bk + n * bn, (k < K)[:, None] & (n < N), 0.0)
        if FORM == 2:
            a = (a * scale).to(tl.float16)
        acc = tl.dot(a, b, acc)
        if FORM == 1:
            acc = acc.to(tl.float16).to(tl.float32)
    c = (acc if FORM == 2 else acc * scale).to(tl.float16)
    tl.store(c_ptr + m * N + n, c, (m < M) & (n < N))
    wide = c.to(tl.float32)
    tl.atomic_max(flag_ptr, tl.max(tl.where((wide != wide) | (tl.abs(wide) == float("inf")), 1.0, 0.0)))


def scaled(form):
    def launch(a, b, scale, c, found_inf):
        (M, K), N = a.shape, b.shape[1]
        grid = (triton.cdiv(M, 16), triton.cdiv(N, 16))
        scaled_kernel[grid](a, b, c, found_inf, scale, M, N, K, *a.stride(), *b.stride(), B=16, FORM=form)

    return launch


def made(a, b, scale):
    c, flag = a.new_empty(a.shape[0], b.shape[1]), torch.zeros(1, device=a.device)
    scaled(0)(a, b, scale, c, flag)
    return c, flag


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, scale):
        ctx.given = a, b, scale
        return made(a, b, scale)

    @staticmethod
    def backward(ctx, dc, _):
        a, b, scale = ctx.given
        return made(dc.contiguous(), b.t().contiguous(), scale)[0], made(a.t(), dc, scale)[0], None


class OneGradient(Scaled):
    @staticmethod
    def backward(ctx, dc, _):
        return *Scaled.backward(ctx, dc, _)[:1], None, None


class FlagForgotten(Scaled):
    @staticmethod
    def forward(ctx, a, b, scale):
        return Scaled.forward(ctx, a, b, scale)[0]

    @staticmethod
    def backward(ctx, dc):
        return Scaled.backward(ctx, dc, None)


class InNumpy(Scaled):
    @staticmethod
    def forward(ctx, a, b, scale):
        c = scale * (a.detach().numpy().astype("float32") @ b.detach().numpy().astype("float32"))
        return torch.from_numpy(c.astype("float16")), Scaled.forward(ctx, a, b, scale)[1]


# 07


def sixteen_of_r(x, W, S, B, scale, y):
    exercises_of("07")["07.5"].solution(x, W, S[:, :16], B[:, :16], scale, y)


@triton.jit
def down_kernel(x_ptr, a_ptr, s_ptr, M, K, R, BR: tl.constexpr, FORM: tl.constexpr):
    m, r = (tl.program_id(0) * 16 + tl.arange(0, 16))[:, None], tl.arange(0, BR)[None, :]
    acc = tl.zeros([16, BR], tl.float32)
    for start in range(0, K, 32):
        k = start + tl.arange(0, 32)
        x = tl.load(x_ptr + m * K + k[None, :], (m < M) & (k < K)[None, :], 0.0)
        a = tl.load(a_ptr + r * K + k[:, None], (r < R) & (k < K)[:, None], 0.0)
        acc += tl.dot(x.to(tl.float16), a.to(tl.float16)) if FORM == 1 else tl.dot(x, a)
    tl.store(s_ptr + m * R + r, acc, (m < M) & (r < R))


def down(form, widest=None):
    def launch(x, A, S):
        block_r = widest or max(16, triton.next_power_of_2(len(A)))
        down_kernel[(triton.cdiv(len(x), 16),)](x, A, S, *x.shape, len(A), BR=block_r, FORM=form)

    return launch


class Contiguous(LoRA):
    """Takes the rows of dy to lie one after the other."""

    @staticmethod
    def backward(ctx, dy):
        return LoRA.backward(ctx, dy.as_strided(dy.shape, (dy.shape[1], 1)))


class OneMissing(LoRA):
    @staticmethod
    def backward(ctx, dy):
        dx, _, _, dB, _ = LoRA.backward(ctx, dy)
        return dx, None, None, dB, None


# 09


@triton.jit
def nearest_kernel(x_ptr, levels_ptr, packed_ptr, absmax_ptr, N, SIZE: tl.constexpr):
    block = tl.program_id(0)
    offs, pair = block * SIZE + tl.arange(0, SIZE), block * (SIZE // 2) + tl.arange(0, SIZE // 2)
    x = tl.load(x_ptr + offs, offs < N, 0.0)
    absmax = tl.max(tl.abs(x), 0)
    scaled, levels = x / tl.where(absmax == 0, 1.0, absmax), tl.load(levels_ptr + tl.arange(0, 16))
    codes = tl.argmin(tl.abs(scaled[:, None] - levels[None, :]), axis=1)
    high, low = tl.split(tl.reshape(codes, (SIZE // 2, 2)))
    tl.store(packed_ptr + pair, (high * 16 + low).to(tl.uint8), 2 * pair < N)
    tl.store(absmax_ptr + block, absmax)


def nearest(x, levels, packed, absmax, block_size):
    nearest_kernel[(absmax.numel(),)](x, levels, packed, absmax, x.numel(), SIZE=block_size)


@triton.jit
def levels_kernel(packed_ptr, absmax_ptr, levels_ptr, out_ptr, N, size, BLOCK: tl.constexpr, FORM: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(packed_ptr + offs // 2, offs < N, 0).to(tl.int32)
    scale = tl.load(absmax_ptr + offs // size, offs < N, 0.0)
    if FORM == 1:
        scale = scale.to(tl.float16).to(tl.float32)
    code = (byte >> (4 - 4 * (offs % 2))) & 15
    tl.store(out_ptr + offs, tl.load(levels_ptr + code) * scale, offs < N)


def shifted(form=0, programs=None):
    def launch(packed, absmax, levels, out, size):
        grid = (programs or triton.cdiv(out.numel(), 64),)
        levels_kernel[grid](packed, absmax, levels, out, out.numel(), size, BLOCK=64, FORM=form)

    return launch
