"""NF4 dequantize: four-bit codes back to floating point, in one pass over memory.

    y[i] = NF4_CODE[code[i]] * scale[i // block_size]        fp32 product, rounded once to y's dtype

Two codes share a byte, the first of a pair in the high nibble; blocks run over the flattened
tensor and the last may be short. With double quantization (Dettmers et al. 2023, "QLoRA",
section 3) the scales are 8-bit codes themselves, decoded here and never written out:

    scale[j] = map[c[j]] * absmax2[j // 256] + offset        rounded after each step

The fp32 product makes the result bit-equal with bitsandbytes for every output dtype; a multiply
and an add fused into one rounding would not be, so the kernel is compiled without fusion.

Bytes: 0.5 + 1/64 (+ 4/16384) in, 2 (fp16, bf16) out: 2.516 per value, and no FLOPs worth counting.
The floor is the memory's speed, so what counts is instructions per value, and passes over shared memory. For sm_90
(`handtuned xray nf4_dequantize --arch sm_90`; nothing here was timed on a GPU):

- The 16 levels lie in 16 banks of shared memory, so that 32 threads look 32 codes up in one pass: shift, mask,
  load. 5.8 instructions per value in all, for fp16 with double quantization. A table of 256 pairs takes fewer (5.05),
  but random bytes meet in the same banks: 5.8 passes per look-up of 64 values, together 2.9 times as many as here.
- A thread decodes the codes of one 16-byte store (a word for eight 16-bit values) and nothing changes threads.
- Offsets inside a program are 32-bit, only the program's base is 64-bit. Tensors of whole programs need no masks.
- Scales are looked up for each 64 values whatever the block size, and handed out through shared memory.

There is no gradient: weights in four bits are frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .nf4_cpu import nf4_dequantize_native, runs_native
from .runtime import TRITON_DTYPES, backend, cdiv, launch, scratch, tl, traced, triton

NF4_CODE = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=torch.float32,
    device="cpu",
)  # fmt: skip


def nf4_dequantize_reference(weight: "NF4Weight", dtype: torch.dtype) -> torch.Tensor:
    """Unpack, look each code up, multiply by the scale of its block, round to `dtype`."""
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=-1).view(-1)
    scales = decode_scales(weight.absmax, weight.nested).repeat_interleave(weight.block_size)
    values = NF4_CODE.to(codes.device)[codes.int()] * scales[: codes.numel()]
    return values[: weight.shape.numel()].view(weight.shape).to(dtype)


def decode_scales(absmax: torch.Tensor, nested: "NestedScales | None") -> torch.Tensor:
    """One fp32 scale per block, whether they are stored as fp32 or as 8-bit codes."""
    if nested is None:
        return absmax
    constants = nested.absmax.repeat_interleave(nested.block_size)[: absmax.numel()]
    return nested.code.index_select(0, absmax.int()) * constants + nested.offset


DTYPES = tuple(TRITON_DTYPES)
BLOCK = 8192  # values per program
TILE = 1 << 19  # values per step of `nf4_dequantize_tiled`


class NestedScales(NamedTuple):
    """What decodes 8-bit scale codes c: `code[c[j]] * absmax[j // block_size] + offset`.

    Attributes:
        absmax: (⌈scales / block_size⌉,) fp32.
        code: (256,) fp32, the dynamic 8-bit map.
        offset: () fp32, the mean of the scales.
        block_size: scales that share one `absmax`.
    """

    absmax: torch.Tensor
    code: torch.Tensor
    offset: torch.Tensor
    block_size: int = 256


@dataclass(eq=False)
class NF4Weight:
    """What a kernel needs of a tensor in NF4; `quant.NF4Tensor` is one.

    Attributes:
        packed: (⌈n / 2⌉,) uint8, two codes per byte, the first in the high nibble.
        absmax: (⌈n / block_size⌉,) one scale per block: fp32, or uint8 codes where `nested` is set.
        shape: of the tensor that was quantized.
        dtype: of the tensor that was quantized: float32, float16 or bfloat16.
        block_size: values that share a scale, running over the flattened tensor: a power of two, 32 to 4096.
        nested: what decodes 8-bit scales (double quantization), or None.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    nested: NestedScales | None = None


def nf4_dequantize_tiled(weight: NF4Weight, out: torch.Tensor) -> torch.Tensor:
    """The reference's bits, fast on a CPU: each byte picks its two values, as one int64, from a table of 256.

    A tile of whole blocks at a time, so that everything stays in cache. `out` is contiguous and of the weight's shape.
    """
    packed, flat, block_size = weight.packed.view(-1), out.view(-1), weight.block_size
    scales = decode_scales(weight.absmax, weight.nested)
    table = pair_table(packed.device).expand(8, 256)  # rows that threads share
    memory = scratch((2, min(TILE, len(scales) * block_size) // 2), torch.int64, packed.device)  # of every tile
    for start in range(0, flat.numel(), TILE):
        tile, codes = flat[start : start + TILE], packed[start // 2 : (start + TILE) // 2]
        codes = F.pad(codes, (0, -codes.numel() % (block_size // 2)))  # the last block may be short
        index, pairs = (row[: codes.numel()].view(8, -1) for row in memory)
        torch.gather(table, 1, index.copy_(codes.view(8, -1)), out=pairs)
        values = pairs.view(-1).view(torch.float32).view(-1, block_size)
        values *= scales[start // block_size :][: len(values), None]
        tile.copy_(values.view(-1)[: tile.numel()])
    return out


@lru_cache
def code_table(device: torch.device) -> torch.Tensor:
    return NF4_CODE.to(device)


@lru_cache
def pair_table(device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(256,) of int64, or int32 for 16-bit values: the two values in a byte, the first in the low half."""
    byte = torch.arange(256, device="cpu")
    pairs = NF4_CODE[torch.stack([byte >> 4, byte & 15], dim=1)].to(dtype)
    return pairs.view(torch.int64 if dtype == torch.float32 else torch.int32).view(256).to(device)


@triton.jit
def levels_of(halves, table):
    """Sixteen bits [...], four codes each → their values in order, [..., 2, 2] of the table's type."""
    codes = tl.join(tl.join(halves >> 4, halves >> 12), tl.join(halves, halves >> 8)) & 15
    return tl.reshape(tl.gather(table, tl.reshape(codes, [codes.numel]), 0), codes.shape)


@triton.jit
def scale_of(code, block, mask, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED_BLOCK: tl.constexpr):
    """fp32 scales of blocks, from what `absmax` holds of them."""
    if nested_code_ptr is not None:
        nested = tl.load(nested_absmax_ptr + block // NESTED_BLOCK, mask=mask, other=None if mask is None else 0.0)
        code = tl.load(nested_code_ptr + code.to(tl.int32)) * nested + tl.load(offset_ptr)
    return code


@triton.jit
def _nf4_dequantize(
    runs_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, table_ptr, out_ptr,
    N, N_RUNS, N_BLOCKS,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    RUNS: tl.constexpr = BLOCK // RUN
    GROUP: tl.constexpr = 32 if BLOCK_SIZE == 32 else 64  # values that look up their scale together
    GROUPS: tl.constexpr = BLOCK // GROUP

    offs_r = tl.max_contiguous(tl.arange(0, RUNS), 1)  # so that neighbours in a warp take neighbouring runs
    offs = tl.arange(0, RUNS)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    block = (pid * GROUPS + tl.arange(0, GROUPS)) // (BLOCK_SIZE // GROUP)  # [GROUPS]
    in_runs = None if EVEN else pid * RUNS + offs_r < N_RUNS
    in_blocks = None if EVEN else block < N_BLOCKS
    halves = tl.load(runs_ptr + pid * RUNS + offs_r, mask=in_runs, other=None if EVEN else 0).to(tl.int32)  # [RUNS]
    code = tl.load(absmax_ptr + block, mask=in_blocks, other=None if EVEN else 0)
    scale = scale_of(code, block, in_blocks, nested_absmax_ptr, nested_code_ptr, offset_ptr, NESTED_BLOCK)
    if RUN == 8:
        halves = tl.join(halves, halves >> 16)
    y = tl.reshape(levels_of(halves, tl.load(table_ptr + tl.arange(0, 16))), (GROUPS, GROUP // RUN, RUN))
    y = tl.reshape(y * scale[:, None, None], (RUNS, RUN)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pid * BLOCK + offs, y, mask=None if EVEN else pid * BLOCK + offs < N)


def words_of(packed: torch.Tensor) -> torch.Tensor:
    """The codes as int32, eight each. They are copied if they do not begin or end at a word."""
    packed = packed.view(-1)
    if packed.data_ptr() % 4 or packed.numel() % 4:
        packed = F.pad(packed.clone(), (0, -packed.numel() % 4))
    return packed.view(torch.int32)


def nf4_pointers(weight: NF4Weight) -> tuple:
    """The five tensors of a kernel that hold the weight, and its two block sizes."""
    *nested, nested_block = weight.nested or (None, None, None, 1)
    blocks = {"BLOCK_SIZE": weight.block_size, "NESTED_BLOCK": nested_block}
    return (words_of(weight.packed), weight.absmax, *nested), blocks


def _launch(weight: NF4Weight, out: torch.Tensor) -> torch.Tensor:
    (words, *scales), blocks = nf4_pointers(weight)
    run, size = 16 // out.element_size(), out.numel()
    runs = words if run == 8 else words.view(torch.int16)
    launch(
        _nf4_dequantize, (cdiv(size, BLOCK), 1, 1),
        runs, *scales, code_table(out.device), out, size, runs.numel(), weight.absmax.numel(), **blocks,
        EVEN=size % BLOCK == 0, BLOCK=BLOCK, RUN=run, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def check_float(dtype: torch.dtype) -> None:
    """Raise TypeError unless it can hold decoded values."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")


def check_layout(weight: NF4Weight, name: str = "weight") -> None:
    """Raise ValueError unless the tensors are what a kernel will read, by address, for the weight's shape."""
    shape, block_size, nested = weight.shape, weight.block_size, weight.nested
    scales = -(-shape.numel() // block_size)
    wanted = {"codes": (weight.packed, (shape.numel() + 1) // 2, torch.uint8)}
    wanted["absmax"] = (weight.absmax, scales, torch.float32 if nested is None else torch.uint8)
    if nested is not None:
        wanted["nested absmax"] = (nested.absmax, -(-scales // nested.block_size), torch.float32)
        wanted["nested map"] = (nested.code, 256, torch.float32)
        wanted["nested offset"] = (nested.offset, 1, torch.float32)
    for what, (tensor, count, dtype) in wanted.items():
        if tensor.numel() != count or tensor.dtype != dtype or not tensor.is_contiguous():
            layout = "" if tensor.is_contiguous() else " not contiguous"
            raise ValueError(
                f"{name} of shape {tuple(shape)} in blocks of {block_size} needs {count} contiguous {dtype} as its "
                f"{what}, got{layout} {tensor.numel()} {tensor.dtype}"
            )


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """Values from NF4 codes: `NF4_CODE[code] * scale` in fp32, rounded once to `dtype`.

    Args:
        weight: codes and scales, contiguous.
        dtype: torch.float32, float16 or bfloat16; others (float64) are rounded from fp32.
        out: contiguous tensor of the weight's shape and `dtype` to write into; a fresh one if None.

    Returns:
        `out`.

    Raises:
        TypeError: `dtype` is not a floating-point dtype.
        ValueError: `out` has another shape or dtype, or is not contiguous; or codes and scales are not as described.
    """
    check_float(dtype)
    fresh, shape = out is None, torch.Size(weight.shape)
    if fresh:
        out = torch.empty(shape, dtype=dtype, device=weight.packed.device)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        layout = "" if out.is_contiguous() else " not contiguous"
        raise ValueError(f"out must be a contiguous {dtype} {tuple(shape)}, got{layout} {out.dtype} {tuple(out.shape)}")
    check_layout(weight)
    compiling = torch.compiler.is_compiling()
    if out.numel() == 0 or out.is_meta or (traced(weight.packed) and not compiling):  # no memory
        return out
    where = backend(weight.packed)
    if where == "torch" and compiling:
        return out.copy_(nf4_dequantize_reference(weight, dtype))
    if where == "torch":
        if dtype in (torch.float32, torch.bfloat16) and runs_native(weight):
            return nf4_dequantize_native(weight, NF4_CODE, out, fresh)
        return nf4_dequantize_tiled(weight, out)
    if dtype not in DTYPES or (where == "interpreter" and dtype == torch.bfloat16):
        # The kernel writes no other dtype, and Triton's interpreter cuts fp32 down to bf16 instead of rounding.
        return out.copy_(_launch(weight, torch.empty(shape, dtype=torch.float32, device=out.device)))
    return _launch(weight, out)


def flatten(weight: torch.Tensor | NF4Weight) -> tuple[list[torch.Tensor], list[int]]:
    """A weight as what a custom operation of torch may take: tensors and whole numbers."""
    if isinstance(weight, torch.Tensor):
        return [weight], []
    nested = weight.nested or ()
    return [weight.packed, weight.absmax, *nested[:3]], [weight.block_size, *weight.shape, *nested[3:]]


def unflatten(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor | NF4Weight:
    """The weight again. The original dtype of one in NF4 is lost: it says nothing about its values."""
    if not sizes:
        return tensors[0]
    (packed, absmax, *decoding), (block_size, *shape) = tensors, sizes
    nested = NestedScales(*decoding, shape.pop()) if decoding else None
    return NF4Weight(packed.view(-1), absmax, torch.Size(shape), torch.float32, block_size, nested)
