"""AdamW for all parameters of a model in one launch: unscale, clip, decay, step, low-precision copy.

For a parameter p with gradient g, step t and hyperparameters of its group
(Loshchilov & Hutter 2019, algorithm 2; the order of operations is torch's):

    g ← c · g                   c = 1/S from the loss scale, times min(1, max_norm / (‖g/S‖ + 1e-6))
    p ← p · (1 − lr·λ)          decoupled weight decay
    m ← m + (g − m)(1 − β1)
    v ← v β2 + g² (1 − β2)
    p ← p − lr/(1 − β1ᵗ) · m / (√v / √(1 − β2ᵗ) + ε)

About 15 FLOPs per element against 28 bytes (read p, g, m, v; write p, m, v), so the floor is
28 bytes per parameter, 30 with a 16-bit copy of p. Written as separate passes the same
work moves 48 bytes and more: unscaling reads and writes g, clipping does it again.

One launch covers every tensor by a table of addresses (see `unscale.py`), which an optimizer keeps while nothing
moves. Tensors that are not aligned to 16 bytes have a launch of their own, with narrow loads. Whether the step is
skipped, and by what gradients are multiplied, is read from the device, so nothing waits for the
GPU. A small launch before it, one program per tensor, advances the step counters (which the
many programs of a tensor could not do without racing) and works out the scalars in fp64.

All arithmetic is one rounding per operation: no fused multiply-add, IEEE division and square
root. The kernel is bound by memory, so that costs nothing, and its result equals the
reference's bit by bit, whose root is for that reason `rounded_sqrt`. There is no backward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import numpy as np
import torch

from .runtime import TRITON_DTYPES, backend, launch, tl, triton
from .unscale import chunk_table, find_chunk, load_pointer, upload

BLOCK = 1024


def adamw_step_reference_(groups, grad_scale=None, found_inf=None, sq_norm=None, max_norm=None):
    """Plain torch, one rounding per operation; computes in float32 (float64 for float64 parameters)."""
    if found_inf is not None and found_inf.item() != 0:
        return
    factor = gradient_factor(grad_scale, sq_norm, max_norm)
    for group in groups:
        beta1, beta2 = group.betas
        for param, grad, exp_avg, exp_avg_sq, step, copy in group.rows():
            step += 1
            t = step.item()
            wide = torch.promote_types(param.dtype, torch.float32)
            g = grad.to(wide) * (-factor if group.maximize else factor)
            p = param.to(wide) * (1 - group.lr * group.weight_decay)
            m = exp_avg.to(wide)
            m = m + (g - m) * (1 - beta1)
            v = exp_avg_sq.to(wide) * beta2 + (g * g) * (1 - beta2)
            denominator = rounded_sqrt(v) / math.sqrt(1 - beta2**t) + group.eps
            p = p + (m * (-group.lr / (1 - beta1**t))) / denominator
            param.copy_(p)
            exp_avg.copy_(m)
            exp_avg_sq.copy_(v)
            if copy is not None:
                copy.copy_(p)


def gradient_factor(grad_scale, sq_norm, max_norm) -> float:
    """c: what every gradient is multiplied by to take the loss scale off and clip the norm."""
    scale = 1.0 if grad_scale is None else grad_scale.item()
    if sq_norm is None:
        return 1.0 / scale
    return min(1.0, max_norm / (math.sqrt(sq_norm.item()) / scale + 1e-6)) / scale


def rounded_sqrt(x: torch.Tensor) -> torch.Tensor:
    """√x to the nearest float, as IEEE 754 has it: torch's on a CPU is MKL's, which on AMD is often one place off."""
    if x.device.type != "cpu":
        return x.sqrt()
    root = torch.empty_like(x)
    np.sqrt(x.numpy(), out=root.numpy())
    return root


@dataclass
class ParamGroup:
    """The tensors and hyperparameters of one parameter group; all lists have one entry per parameter.

    Attributes:
        params, grads, exp_avgs, exp_avg_sqs: tensors of one shape each; m and v have the dtype of p.
        steps: 0-dim float32, updates so far.
        copies: for each parameter a 16-bit tensor that receives its new value rounded, or None.
    """

    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    steps: list[torch.Tensor]
    copies: list[torch.Tensor | None]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool = False

    def rows(self):
        """(p, g, m, v, step, copy) of each parameter."""
        return zip(self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, self.copies, strict=True)


@triton.jit
def _prepare_kernel(
    tensors_ptr,  # (8, T) int64: addresses of p, g, m, v, step, copy; elements; group
    rates_ptr,  # (groups, 10) fp64, see _rates
    scalars_ptr,  # (T, 8) fp32: what the next kernel needs of each tensor
    grad_scale_ptr,  # () fp32 or None
    found_inf_ptr,  # () fp32 or None
    sq_norm_ptr,  # () fp32 or None
    T,
):
    tensor = tl.program_id(0).to(tl.int64)
    tensors_ptr += tensor
    scalars_ptr += tensor * 8
    rates_ptr += tl.load(tensors_ptr + 7 * T) * 10
    step_ptr = tl.load(tensors_ptr + 4 * T).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr) + 1.0
    if found_inf_ptr is None:
        tl.store(step_ptr, step)
    else:
        tl.store(step_ptr, step, mask=tl.load(found_inf_ptr) == 0)

    scale = 1.0
    if grad_scale_ptr is not None:
        scale = tl.load(grad_scale_ptr)
    factor = tl.load(rates_ptr + 8) / scale
    if sq_norm_ptr is not None:
        norm = tl.sqrt(tl.load(sq_norm_ptr).to(tl.float64)) / scale
        factor *= tl.minimum(1.0, tl.load(rates_ptr + 9) / (norm + 1e-6))

    t = step.to(tl.float64)
    step_size = -tl.load(rates_ptr + 5) / (1 - tl.exp(t * tl.load(rates_ptr + 6)))
    root_correction = tl.sqrt(1 - tl.exp(t * tl.load(rates_ptr + 7)))
    for i in tl.static_range(5):
        tl.store(scalars_ptr + i, tl.load(rates_ptr + i).to(tl.float32))
    tl.store(scalars_ptr + 5, factor.to(tl.float32))
    tl.store(scalars_ptr + 6, step_size.to(tl.float32))
    tl.store(scalars_ptr + 7, root_correction.to(tl.float32))


@triton.jit
def _step_chunk(
    p_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, scalars_ptr, offs, mask, P_DTYPE: tl.constexpr, COPY_DTYPE: tl.constexpr
):  # fmt: skip
    decay = tl.load(scalars_ptr + 0)
    one_minus_beta1 = tl.load(scalars_ptr + 1)
    beta2 = tl.load(scalars_ptr + 2)
    one_minus_beta2 = tl.load(scalars_ptr + 3)
    eps = tl.load(scalars_ptr + 4)
    factor = tl.load(scalars_ptr + 5)
    step_size = tl.load(scalars_ptr + 6)
    root_correction = tl.load(scalars_ptr + 7)

    g = tl.load(g_ptr + offs, mask=mask).to(tl.float32) * factor  # [BLOCK], as all below
    p = tl.load(p_ptr + offs, mask=mask).to(tl.float32) * decay
    m = tl.load(m_ptr + offs, mask=mask).to(tl.float32)
    v = tl.load(v_ptr + offs, mask=mask).to(tl.float32)
    m = m + (g - m) * one_minus_beta1
    v = v * beta2 + (g * g) * one_minus_beta2
    denominator = tl.div_rn(tl.sqrt_rn(v), root_correction) + eps
    p = p + tl.div_rn(m * step_size, denominator)
    tl.store(p_ptr + offs, p.to(P_DTYPE), mask=mask)
    tl.store(m_ptr + offs, m.to(P_DTYPE), mask=mask)
    tl.store(v_ptr + offs, v.to(P_DTYPE), mask=mask)
    if COPY_DTYPE is not None:
        tl.store(copy_ptr + offs, p.to(COPY_DTYPE), mask=mask)


@triton.jit
def _adamw_kernel(
    tensors_ptr,  # (8, T)
    chunks_ptr,  # (C, 2) int32: tensor, block of it
    scalars_ptr,  # (T, 8)
    found_inf_ptr,  # () or None
    T,
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    skip = False
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0
    if skip:
        return
    tensor, chunk = find_chunk(chunks_ptr)
    tensors_ptr += tensor
    scalars_ptr += tensor * 8
    p_ptr = load_pointer(tensors_ptr, P_DTYPE, ALIGNED)
    g_ptr = load_pointer(tensors_ptr + T, G_DTYPE, ALIGNED)
    m_ptr = load_pointer(tensors_ptr + 2 * T, P_DTYPE, ALIGNED)
    v_ptr = load_pointer(tensors_ptr + 3 * T, P_DTYPE, ALIGNED)
    copy_ptr = load_pointer(tensors_ptr + 5 * T, COPY_DTYPE, ALIGNED) if COPY_DTYPE is not None else p_ptr
    elements = tl.load(tensors_ptr + 6 * T)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    # A mask with an unknown bound forbids wide loads, so whole blocks go without one.
    if (chunk + 1) * BLOCK <= elements:
        _step_chunk(p_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, scalars_ptr, offs, None, P_DTYPE, COPY_DTYPE)
    else:
        _step_chunk(p_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, scalars_ptr, offs, offs < elements, P_DTYPE, COPY_DTYPE)


def _rates(group: ParamGroup, max_norm: float | None) -> list[float]:
    """A row of the fp64 table: all that is known of a group before its step counters are read."""
    beta1, beta2 = group.betas
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in group.betas]
    sign = -1.0 if group.maximize else 1.0
    decay = 1 - group.lr * group.weight_decay
    return [*map(float, (decay, 1 - beta1, beta2, 1 - beta2, group.eps, group.lr, *logs, sign, max_norm or 0.0))]


def same_layout(tensors, write_back):
    """p, g, m, v, … if they lie in memory alike and without holes, else contiguous stand-ins.

    Stand-ins of tensors that a step writes (all but g) are noted in `write_back`.
    """
    if all([t.is_contiguous() for t in tensors]):
        return tensors
    first = tensors[0]
    if torch.ops.aten.is_non_overlapping_and_dense(first) and all(t.stride() == first.stride() for t in tensors):
        return tensors
    dense = [t.contiguous() for t in tensors]
    write_back += [(t, d) for i, (t, d) in enumerate(zip(tensors, dense, strict=True)) if t is not d and i != 1]
    return dense


def _tables(groups, write_back, stand_ins):
    """[(table, chunks, number of tensors, aligned, dtypes)] for one launch each, None if a parameter is float64.

    `write_back` as in `same_layout`; its tensors and other stand-ins are noted in `stand_ins`.
    """
    if any(param.dtype == torch.float64 for group in groups for param in group.params):
        return None
    kinds: dict[tuple, list] = {}
    for i, group in enumerate(groups):
        for p, g, m, v, step, copy in group.rows():
            if not p.numel():
                continue
            for tensor in (p, g) if copy is None else (p, g, copy):
                if tensor.dtype not in TRITON_DTYPES:
                    raise TypeError(f"params, grads, copies must be float32, float16 or bfloat16, got {tensor.dtype}")
            tensors = [t for t in (p, g, m, v, copy) if t is not None]
            if any(t.numel() != p.numel() for t in tensors):
                sizes = ", ".join(str(tuple(t.shape)) for t in tensors)
                raise ValueError(f"a parameter, its gradient and its state must be of one size, got {sizes}")
            dense = same_layout(tensors, write_back)
            if dense is not tensors:
                stand_ins.append(dense)
            addresses = [t.data_ptr() for t in dense]
            aligned = all(address % 16 == 0 for address in addresses)
            dtypes = tuple(None if t is None else TRITON_DTYPES[t.dtype] for t in (p, g, copy))
            row = (*addresses[:4], step.data_ptr(), addresses[-1], p.numel(), i)
            kinds.setdefault((aligned, dtypes), []).append(row)
    tables = []
    for kind, rows in kinds.items():
        columns, device = [*zip(*rows, strict=True)], groups[0].params[0].device
        table = upload([*chain.from_iterable(columns)], device)
        tables.append((table, chunk_table(columns[6], BLOCK, device), len(rows), *kind))
    return tables


def memory_of(groups: Sequence[ParamGroup]) -> list | None:
    """What `_tables` is made from, to be compared; None if it cannot be told so (strides, counters that are numbers).

    A tensor in place of another has another address. But gradients come anew in every step, often where those before
    lay, so of them dtype and size are read too, and the strides of a tensor may change where it lies.
    """
    if not all(all(map(torch.Tensor.is_contiguous, chain(group.params, group.grads))) for group in groups):
        return None
    seen = []
    for group in groups:
        if set(map(type, group.steps)) != {torch.Tensor}:
            return None
        for tensors in (group.params, group.grads, group.exp_avgs, group.exp_avg_sqs, group.steps):
            seen.append([*map(torch.Tensor.data_ptr, tensors)])
        seen.append([None if c is None else (c.data_ptr(), c.dtype, c.shape, c.stride()) for c in group.copies])
        seen += [*map(torch.Tensor.numel, group.grads)], [*map(attrgetter("dtype"), group.grads)]
    return seen


@torch.no_grad()
def adamw_step_(
    groups: Sequence[ParamGroup], grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None,
    sq_norm: torch.Tensor | None = None, max_norm: float | None = None, tables: list | None = None,
) -> list | None:  # fmt: skip
    """One AdamW update of all parameters of all groups, in place.

    One launch for each combination of dtypes (parameter, gradient, copy), so one for an ordinary model. Once warmed up
    it can be captured in a CUDA graph, with the rates that it is captured with.
    float64 parameters take the reference, whose arithmetic is float64 then.

    Args:
        groups: tensors of one device; step counters too.
        grad_scale: 0-dim float32; gradients are divided by it.
        found_inf: 0-dim float32; anything but 0 makes the call change nothing, counters included.
        sq_norm: 0-dim float32, Σ g² of the gradients as they are (still scaled): clips their norm to `max_norm`.
        max_norm: bound of the norm of the unscaled gradients; needed with `sq_norm`.
        tables: what an earlier call returned, if `memory_of(groups)` was then as it is now.

    Returns:
        The tables of addresses, for later calls; None if they serve this call alone.

    Raises:
        TypeError: a parameter or gradient is not float32, float16, bfloat16 or float64.
        ValueError: a parameter, its gradient and its state differ in size.
    """
    groups = [group for group in groups if group.params]
    if not groups:
        return None
    first = groups[0].params[0]
    if backend(first) == "torch":
        return adamw_step_reference_(groups, grad_scale, found_inf, sq_norm, max_norm)
    write_back, stand_ins = [], []  # the latter live until the launch: the table holds addresses only
    # A graph has tables of its own, which are empty until it runs.
    captured = first.device.type != "cpu" and torch.cuda.is_current_stream_capturing()
    if tables is None or captured:
        tables = _tables(groups, write_back, stand_ins)
    if tables is None:
        return adamw_step_reference_(groups, grad_scale, found_inf, sq_norm, max_norm)
    rates = upload([rate for group in groups for rate in _rates(group, max_norm)], first.device)
    for table, chunks, T, aligned, (p_dtype, g_dtype, copy_dtype) in tables:
        scalars = torch.empty(T, 8, dtype=torch.float32, device=table.device)
        launch(_prepare_kernel, (T, 1, 1), table, rates, scalars, grad_scale, found_inf, sq_norm, T, num_warps=1)
        launch(
            _adamw_kernel, (len(chunks), 1, 1), table, chunks, scalars, found_inf, T, P_DTYPE=p_dtype, G_DTYPE=g_dtype,
            COPY_DTYPE=copy_dtype, ALIGNED=aligned, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    for tensor, dense in write_back:
        tensor.copy_(dense)
    return None if captured or stand_ins else tables
