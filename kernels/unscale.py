"""Unscale all gradients, look for inf and NaN, and sum the squares: one launch for a whole model.

After `(S · loss).backward()` every gradient carries the loss scale S. Three things must
happen before the optimizer may step, each of which reads every gradient once:

    g ← g / S        any(|g| = ∞ or g is NaN)        Σ g²   (for clipping by the norm)

Element by element they are nothing (about 3 FLOPs), so the floor is memory traffic: 8 bytes
an FP32 gradient when it is written back, 4 when it is only looked at. What costs in practice is
the *number* of launches, since a LoRA model has hundreds of small tensors. So the kernel gets a
table of addresses instead of a tensor: program i looks up which piece of which tensor is its own.

    tensors  (3, T) int64: address, number of elements, dtype and alignment
    chunks   (C, 2) int32: which tensor, which block of it        C = Σ ceil(elements / BLOCK)

The overflow flag stays on the device; every program that sees a non-finite value writes the
same 1.0 to it, so no atomics are needed. Sums are kept one a program and added afterwards
in a fixed order, so the norm is the same in every run. There is no backward.
"""

from array import array
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from .runtime import TRITON_DTYPES, backend, cdiv, launch, tl, triton

BLOCK = 4096


def unscale_reference_(grads, inv_scale, found_inf):
    """Flag a gradient that is not finite, then multiply it by `inv_scale` in place (None: only look)."""
    for grad in grads:
        found_inf.masked_fill_(~torch.isfinite(grad).all(), 1.0)
        if inv_scale is not None:
            grad.mul_(inv_scale)


def unscale_foreach_(grads, inv_scale, found_inf):
    """The same in few calls for all tensors: what costs with hundreds of small ones is the number of calls."""
    # Finite norms prove finite gradients; norms that are not may have overflowed themselves.
    if not torch.isfinite(torch.stack(torch._foreach_norm(grads))).all():
        for grad in grads:
            found_inf.masked_fill_(~torch.isfinite(grad).all(), 1.0)
    if inv_scale is not None:
        torch._foreach_mul_(grads, inv_scale)


def squared_norm_reference(grads):
    """Plain torch: the sum of all squares, in FP32 within a tensor and in FP64 between tensors."""
    wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    return torch.stack(torch._foreach_norm(grads, 2, wide)).double().square().sum().float()


@triton.jit
def find_chunk(chunks_ptr):
    """Which tensor this program works on, and which block of it."""
    pid = tl.program_id(0)
    return tl.load(chunks_ptr + 2 * pid).to(tl.int64), tl.load(chunks_ptr + 2 * pid + 1).to(tl.int64)


@triton.jit
def load_pointer(address_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address from the table as a pointer; without the promise of alignment loads are one element wide."""
    ptr = tl.load(address_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _unscale_tile(grad_ptr, offs, mask, inv_scale_ptr, DTYPE: tl.constexpr):
    grad = tl.load(grad_ptr + offs, mask=mask).to(tl.float32)  # [BLOCK]
    if inv_scale_ptr is not None:
        tl.store(grad_ptr + offs, (grad * tl.load(inv_scale_ptr)).to(DTYPE), mask=mask)
    return grad


@triton.jit
def _unscale_chunk(
    tensor_ptr, T, chunk, inv_scale_ptr, found_inf_ptr, sums_ptr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    grad_ptr = load_pointer(tensor_ptr, DTYPE, ALIGNED)
    elements = tl.load(tensor_ptr + T)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    # A mask with an unknown bound forbids wide loads, so whole blocks go without one.
    if (chunk + 1) * BLOCK <= elements:
        grad = _unscale_tile(grad_ptr, offs, None, inv_scale_ptr, DTYPE)
    else:
        grad = _unscale_tile(grad_ptr, offs, offs < elements, inv_scale_ptr, DTYPE)
        grad = tl.where(offs < elements, grad, 0.0)
    if found_inf_ptr is not None:
        finite = tl.abs(grad) < float("inf")  # false for NaN too
        bad = tl.max(tl.where(finite, 0, 1), axis=0)
        tl.store(found_inf_ptr, 1.0, mask=bad != 0)
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0), tl.sum(grad * grad, axis=0))


@triton.jit
def _unscale_kernel(
    tensors_ptr,  # (3, T)
    chunks_ptr,  # (C, 2)
    inv_scale_ptr,  # () or None: gradients are not written
    found_inf_ptr,  # () or None
    sums_ptr,  # (C,) or None
    T,
    DTYPES: tl.constexpr,  # that occur, aligned and not; the table holds an index into them
    ALIGNED: tl.constexpr,  # for each of them
    BLOCK: tl.constexpr,
):
    tensor, chunk = find_chunk(chunks_ptr)
    tensor_ptr = tensors_ptr + tensor
    kind = tl.load(tensor_ptr + 2 * T)
    for i in tl.static_range(len(DTYPES)):
        if kind == i:
            _unscale_chunk(tensor_ptr, T, chunk, inv_scale_ptr, found_inf_ptr, sums_ptr, DTYPES[i], ALIGNED[i], BLOCK)


_captured_tables: set[torch.Tensor] = set()  # what graphs read whenever they run


def chunk_table(elements: tuple[int, ...], block: int, device: torch.device) -> torch.Tensor:
    """(C, 2) int32: tensor and block number of each program, for tensors of these sizes."""
    table = _chunk_table(elements, block, device)
    if device.type != "cpu" and torch.cuda.is_current_stream_capturing():
        _captured_tables.add(table)
    return table


@lru_cache
def _chunk_table(elements, block, device):
    counts = torch.tensor([cdiv(n, block) for n in elements], dtype=torch.int64, device="cpu")
    tensor = torch.repeat_interleave(torch.arange(len(elements), device="cpu"), counts)
    first = torch.cumsum(counts, 0) - counts
    chunk = torch.arange(len(tensor), device="cpu") - first[tensor]
    return torch.stack([tensor, chunk], dim=1).to(device, torch.int32)


# Pinned memory that no copy reads, for as many graphs' copies as a step makes: under capture none can be allocated.
_spare: dict[tuple, list[torch.Tensor]] = {}
SPARE = 16
_captured: list[torch.Tensor] = []  # what graphs copy from whenever they run


def upload(numbers: Sequence[int] | Sequence[float], device: torch.device) -> torch.Tensor:
    """int64 or float64 numbers on the device. The copy does not wait for the GPU.

    The same numbers are sent once, except under CUDA-graph capture, where every graph has a copy of its own.

    Raises:
        RuntimeError: under capture, without as many calls for as many numbers before it.
    """
    if device.type == "cpu":
        return _values(numbers)
    spare = _spare.setdefault((len(numbers), isinstance(numbers[0], float)), [])
    if torch.cuda.is_current_stream_capturing():
        if not spare:
            raise RuntimeError("run one step, as a warm-up, before each capture of a CUDA graph")
        _captured.append(spare.pop())
        return _captured[-1].copy_(_values(numbers)).to(device, non_blocking=True)
    if len(spare) < SPARE:
        spare.append(torch.empty_like(_values(numbers), pin_memory=True))
    return _uploaded(tuple(numbers), device)


@lru_cache(maxsize=16)
def _uploaded(numbers, device):
    return _values(numbers).pin_memory().to(device, non_blocking=True)


def _values(numbers):
    return torch.from_numpy(np.array(array("d" if isinstance(numbers[0], float) else "q", numbers)))


def _split(grads):
    """Gradients for the kernel, and those for the reference: float64 ones, or all of them."""
    for grad in grads:
        if grad.dtype not in (*TRITON_DTYPES, torch.float64):
            raise TypeError(f"grads must be float32, float16, bfloat16 or float64, got {grad.dtype}")
    if backend(grads[0]) == "torch":
        return [], grads
    grads = [grad for grad in grads if grad.numel()]
    wide = [grad for grad in grads if grad.dtype == torch.float64]
    return [grad for grad in grads if grad.dtype != torch.float64], wide


def _launch(grads, inv_scale, found_inf, want_sums):
    device, is_dense = grads[0].device, torch.ops.aten.is_non_overlapping_and_dense
    dense = [g if g.is_contiguous() or is_dense(g) else g.contiguous() for g in grads]
    addresses, elements = ([*map(of, dense)] for of in (torch.Tensor.data_ptr, torch.Tensor.numel))
    kinds = [(g.dtype, address % 16 == 0) for g, address in zip(dense, addresses, strict=True)]
    occur = sorted(set(kinds), key=str)
    index = {kind: i for i, kind in enumerate(occur)}
    chunks = chunk_table(tuple(elements), BLOCK, device)
    sums = torch.empty(len(chunks), dtype=torch.float32, device=device) if want_sums else None
    launch(
        _unscale_kernel, (len(chunks), 1, 1),
        upload([*addresses, *elements, *map(index.get, kinds)], device), chunks, inv_scale, found_inf, sums, len(dense),
        DTYPES=tuple(TRITON_DTYPES[dtype] for dtype, _ in occur), ALIGNED=tuple(aligned for _, aligned in occur),
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    if inv_scale is not None:
        for grad, copy in zip(grads, dense, strict=True):
            if grad is not copy:
                grad.copy_(copy)
    return sums


@torch.no_grad()
def unscale_(grads: list[torch.Tensor], inv_scale: torch.Tensor | None, found_inf: torch.Tensor) -> None:
    """Multiply all gradients by `inv_scale` in place and set `found_inf` to 1 if any held inf or NaN before.

    One launch for all of them, whatever mixture of dtypes; float64 ones take the reference.

    Args:
        grads: dense float tensors of any shapes on one device.
        inv_scale: 0-dim float32 on that device; None leaves the gradients as they are.
        found_inf: 0-dim float32 on that device; never set back to 0.

    Raises:
        TypeError: a gradient is not float32, float16, bfloat16 or float64.
    """
    if not grads:
        return
    narrow, wide = _split(grads)
    if narrow:
        _launch(narrow, inv_scale, found_inf, want_sums=False)
    if wide:
        unscale_foreach_(wide, inv_scale, found_inf)


@torch.no_grad()
def squared_norm(grads: list[torch.Tensor]) -> torch.Tensor:
    """Σ g² over all gradients, as a 0-dim float32 on their device (inf or NaN if any gradient is; 0 if there is none).

    Raises:
        TypeError: a gradient is not float32, float16, bfloat16 or float64.
    """
    if not grads:
        return torch.zeros((), dtype=torch.float32)
    narrow, wide = _split(grads)
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    if narrow:
        total += _launch(narrow, None, None, want_sums=True).sum(dtype=torch.float64)
    if wide:
        total += squared_norm_reference(wide)
    return total.float()
