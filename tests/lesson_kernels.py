"""Answers to the lessons' kernel exercises: plain torch instead of a kernel, right in an unusual way, or wrong."""

import torch
import torch.nn.functional as F
from handtuned.kernels.nf4 import NF4_CODE
from handtuned.kernels.runtime import tl, triton
from handtuned.lessons import exercises_of


def _unpacked(packed, count):
    return torch.stack([packed >> 4, packed & 15], 1).flatten()[:count].long()


def _dequantize(packed, absmax, levels, out, block_size):
    out.copy_(levels[_unpacked(packed, out.numel())] * absmax.repeat_interleave(block_size)[: out.numel()])


def _nested(packed, codes, constants, table, offset, levels, out, block_size, nested_block):
    scale = table[codes.long()] * constants.repeat_interleave(nested_block)[: len(codes)] + offset
    _dequantize(packed, scale, levels, out, block_size)


def _quantize(x, levels, packed, absmax, block_size):
    blocks = F.pad(x, (0, -len(x) % block_size)).view(-1, block_size)
    absmax.copy_(blocks.abs().amax(1))
    scaled = (blocks / absmax.clamp(min=1e-38)[:, None]).flatten()
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    packed.copy_((codes[0::2] * 16 + codes[1::2])[: len(packed)])


def _unscale(grad, scale, found_inf):
    found_inf.masked_fill_(~grad.isfinite().all(), 1.0)
    grad.div_(scale)


def _scaled(a, b, scale, c, found_inf):
    c.copy_((scale * (a.float() @ b.float())).half())
    found_inf.masked_fill_(~c.isfinite().all(), 1.0)


def _up_grads(dy, S, B, scale, dS, dB):
    dS.copy_(scale * dy @ B)
    dB.copy_(scale * dy.t() @ S)


def _layer(x, W, A, B, scale):
    return x @ W.t() + scale * (x @ A.t()) @ B.t()


IN_TORCH = {
    "02.1": lambda a, x, y, out: out.copy_(a * x + y),
    "02.2": lambda x, dy, dx: dx.copy_(dy * torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x)))),
    "02.3": lambda x, out: out.copy_(torch.softmax(x, 1)),
    "02.4": lambda x, y, out: out.copy_(x[:, None] + y[None, :]),
    "02.5": lambda x, w, out: out.copy_(x * w),
    "02.6": lambda a, b, c: c.copy_(a.float() @ b.float()),
    "02.7": lambda x, out: out.copy_(x.t() + 0.0),
    "02.8": lambda x, out: out.copy_(x.transpose(1, 2) + 0.0),
    "03.3": _unscale,
    "03.4": _scaled,
    "03.5": lambda a, b, scale: ((scale * (a.float() @ b.float())).half(), torch.zeros(1)),
    "07.3": lambda x, A, S: S.copy_(x @ A.t()),
    "07.5": lambda x, W, S, B, scale, y: y.copy_(x @ W.t() + scale * S @ B.t()),
    "07.6": _up_grads,
    "07.7": _layer,
    "09.3": _dequantize,
    "09.4": _nested,
    "09.5": _quantize,
    "10.4": lambda x, q, A, B, scale: _layer(x, q.dequantize(), A, B, scale),
}


@triton.jit
def idle_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr))


# Right in an unusual way.


@triton.jit
def add_up(x, y):
    return x + y


@triton.jit
def axpy_kernel(a, x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """Loops over the grid; a helper of its own; pointers that move."""
    step = tl.num_programs(0) * BLOCK
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(0, N, step):
        inside = offs < N
        x, y = tl.load(x_ptr + offs, mask=inside, other=0.0), tl.load(y_ptr + offs, inside, 0.0)
        tl.store(out_ptr + offs, add_up(a * x, y), mask=inside)
        offs += step


def axpy_in_a_loop(a, x, y, out):
    axpy_kernel[lambda meta: (3,)](a, x, y, out, out.numel(), BLOCK=16)


def axpy_of_copies(a, x, y, out):
    made = torch.empty_like(out)
    axpy_kernel[(2, 1, 1)](a, x.clone().contiguous(), y.float(), made, out.numel(), BLOCK=2048)
    axpy_kernel[(2,)](1.0, made, torch.zeros_like(out), out, out.numel(), BLOCK=64)


@triton.jit
def block_pointer_kernel(x_ptr, w_ptr, out_ptr, M, N, stride, BLOCK: tl.constexpr):
    """By block pointers; one program for each row of tiles."""
    m = tl.program_id(0) * BLOCK
    for n in range(0, N, BLOCK):
        rows = tl.make_block_ptr(x_ptr, (M, N), (stride, 1), (m, n), (BLOCK, BLOCK), (1, 0))
        out = tl.make_block_ptr(out_ptr, (M, N), (N, 1), (m, n), (BLOCK, BLOCK), (1, 0))
        offs = n + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + offs, mask=offs < N, other=0.0)
        x = tl.load(rows, boundary_check=(0, 1), padding_option="zero")
        tl.store(out, x * tl.expand_dims(w, 0), boundary_check=(0, 1))


def by_block_pointers(x, w, out):
    M, N = x.shape
    block_pointer_kernel[(triton.cdiv(M, 16),)](x, w, out, M, N, x.stride(0), BLOCK=16)


@triton.jit
def unscale_kernel(grad_ptr, inverse, flag_ptr, N, BLOCK: tl.constexpr):
    """The flag by an atomic: programs may all add to it."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad_ptr + offs, mask=offs < N, other=0.0)
    tl.store(grad_ptr + offs, g * inverse, mask=offs < N)
    bad = tl.sum((g != g).to(tl.int32) + (tl.abs(g) == float("inf")).to(tl.int32), axis=0)
    tl.atomic_max(flag_ptr, (bad > 0).to(tl.float32))


def unscale_by_atomic(grad, scale, found_inf):
    unscale_kernel[(triton.cdiv(grad.numel(), 32),)](grad, 1 / scale, found_inf, grad.numel(), BLOCK=32)


@triton.jit
def parts_kernel(
    dy_ptr, s_ptr, b_ptr, ds_ptr, part_ptr, scale, M, N, R,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dS and a part of dB from one reading of dy: a program for each BLOCK rows."""
    p = tl.program_id(0)
    m, n, r = p * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    dy = tl.load(dy_ptr + m[:, None] * N + n, mask=(m < M)[:, None] & (n < N), other=0.0) * scale
    s = tl.load(s_ptr + m[:, None] * R + r, mask=(m < M)[:, None] & (r < R), other=0.0)
    b = tl.load(b_ptr + n[:, None] * R + r, mask=(n < N)[:, None] & (r < R), other=0.0)
    tl.store(ds_ptr + m[:, None] * R + r, tl.dot(dy, b), mask=(m < M)[:, None] & (r < R))
    tl.store(part_ptr + p * N * R + n[:, None] * R + r, tl.dot(tl.trans(dy), s), mask=(n < N)[:, None] & (r < R))


def in_parts(dy, S, B, scale, dS, dB):
    """As the library does it: parts of dB, then a sum in a fixed order."""
    (M, N), R = dy.shape, S.shape[1]
    parts = dB.new_empty(triton.cdiv(M, 16), N, R)
    n, r = (max(16, triton.next_power_of_2(size)) for size in (N, R))
    parts_kernel[(len(parts),)](dy, S, B, dS, parts, scale, M, N, R, BLOCK=16, BLOCK_N=n, BLOCK_R=r)
    torch.sum(parts, 0, out=dB)


@triton.jit
def turn_kernel(x_ptr, out_ptr, SIDE: tl.constexpr):
    """A tile as it is, turned by tl.trans: the compiler finds places without conflict by itself."""
    start = tl.program_id(0) * SIDE * SIDE
    m, n = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    tl.store(out_ptr + start + m * SIDE + n, tl.trans(tl.load(x_ptr + start + m * SIDE + n)))


def turned(x, out):
    turn_kernel[(len(x),)](x, out, SIDE=32)


@triton.jit
def pairs_kernel(packed_ptr, absmax_ptr, levels_ptr, out_ptr, N, block_size, BLOCK: tl.constexpr):
    """A byte at a time: both of its values at once."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(packed_ptr + pair, mask=2 * pair < N, other=0)
    codes = tl.join(byte >> 4, byte & 15)
    offs = 2 * pair[:, None] + tl.arange(0, 2)[None, :]
    scale = tl.load(absmax_ptr + offs // block_size, mask=offs < N, other=0.0)
    tl.store(out_ptr + offs, tl.load(levels_ptr + codes.to(tl.int32)) * scale, mask=offs < N)


def by_pairs(packed, absmax, levels, out, block_size):
    pairs_kernel[(triton.cdiv(len(packed), 32),)](packed, absmax, levels, out, out.numel(), block_size, BLOCK=32)


def own_levels(packed, absmax, levels, out, block_size):
    """With a table of its own, made by torch."""
    by_pairs(packed, absmax, torch.tensor(NF4_CODE.tolist()), out, block_size)
    by_pairs(packed, absmax, levels, out, block_size)


UNUSUAL = {
    "02.1": axpy_in_a_loop,
    "02.1, copies": axpy_of_copies,
    "02.5": by_block_pointers,
    "02.8": turned,
    "03.3": unscale_by_atomic,
    "07.6": in_parts,
    "09.3": by_pairs,
    "09.3, own levels": own_levels,
}


# Wrong.


@triton.jit
def unmasked_kernel(a, x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, a * tl.load(x_ptr + offs) + tl.load(y_ptr + offs))


def axpy_of(block):
    return lambda a, x, y, out: unmasked_kernel[(1,)](a, x, y, out, BLOCK=block)


def copied_after_numpy(a, x, y, out):
    values = torch.from_numpy(a * x.numpy() + y.numpy())
    axpy_kernel[(1,)](1.0, values, torch.zeros_like(values), out, out.numel(), BLOCK=1024)


def without_grid(a, x, y, out):
    axpy_kernel(a, x, y, out, out.numel(), 64)


def grid_of_a_number(a, x, y, out):
    axpy_kernel[4](a, x, y, out, out.numel(), BLOCK=64)


def one_element_short(a, x, y, out):
    axpy_kernel[(1,)](a, x, y, out, out.numel() - 1, BLOCK=64)


def into_its_input(a, x, y, out):
    axpy_kernel[(1,)](a, x, y, y, out.numel(), BLOCK=1024)
    axpy_kernel[(1,)](0.0, x, y, out, out.numel(), BLOCK=1024)


@triton.jit
def mistyped_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + missing_name), mask=offs < N)  # noqa: F821 the mistake that is meant


def mistyped(a, x, y, out):
    mistyped_kernel[(1,)](x, out, out.numel(), BLOCK=4)


@triton.jit
def before_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK) - 1
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))


def before_the_beginning(x, out):
    before_kernel[(1,)](x, out, BLOCK=4)


@triton.jit
def odd_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) + tl.load(y_ptr + offs))


def no_block(x, y, out):
    odd_kernel[(1,)](x, y, out, BLOCK=3)


@triton.jit
def far_kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK).to(tl.int64) * (1 << 40)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs))


def far(x):
    far_kernel[(1,)](x, BLOCK=4)


@triton.jit
def copy_strided_kernel(x_ptr, out_ptr, N, stride_m, stride_n, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    m = tl.program_id(0)
    x = tl.load(x_ptr + m * stride_m + n * stride_n, mask=n < N)
    tl.store(out_ptr + m * N + n, x, mask=n < N)


def copy_strided(x, out):
    copy_strided_kernel[(len(x),)](x, out, x.shape[1], *x.stride(), BLOCK=4)


# Right for the sizes that one block holds, or nearly right.


@triton.jit
def pointwise_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr, FORM: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs, offs < N).to(tl.float32), tl.load(y_ptr + offs, offs < N).to(tl.float32)
    s = 1 / (1 + tl.exp(-x)) if FORM == 0 else tl.exp(x) / (1 + tl.exp(x))
    value = x.to(tl.float16) if FORM == 2 else y * s * (1 + x * (1 - s))
    tl.store(out_ptr + offs, value, offs < N)


def silu_backward(form, programs=None, block=64):
    def launch(x, dy, dx):
        pointwise_kernel[(programs or triton.cdiv(len(x), block),)](x, dy, dx, len(x), BLOCK=block, FORM=form)

    return launch


@triton.jit
def softmax_kernel(x_ptr, out_ptr, N, stride, BLOCK: tl.constexpr, DIVIDED: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + offs, offs < N, -float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * N + offs, e / tl.sum(e, 0) if DIVIDED else e, offs < N)


def softmax(block=None, divided=True):
    def launch(x, out):
        N = x.shape[1]
        softmax_kernel[(len(x),)](x, out, N, x.stride(0), BLOCK=block or triton.next_power_of_2(N), DIVIDED=divided)

    return launch


def rounded_before_the_store(a, b, c):
    exercises_of("02")["02.6"].solution(a, b, c)
    pointwise_kernel[(1,)](c, c, c, c.numel(), BLOCK=triton.next_power_of_2(c.numel()), FORM=2)
