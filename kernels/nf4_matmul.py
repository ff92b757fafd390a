"""LoRA on a 4-bit weight: the product with W in NF4, chosen by the number of rows M of x.

    M ≤ 16        stream: the kernel reads packed codes, decodes them in registers and multiplies
    larger M      a dense W is made for this product alone, and thrown away after it

Decoding tokens is limited by reading W: 0.516 bytes a weight against 2 in fp16, so streaming the codes
may be four times as fast as any dense product. With many rows it is the other way round. Every
tile of W would be decoded once for each tile of rows, by the units that should multiply; making W
dense once costs 2.5 bytes a weight (6 % of a product with 4096 rows) and the product then runs at
full speed. In backward W is made a second time, which is cheaper than keeping it: kept dense
weights are what 4 bits are there to avoid.

A dense W is made anyway, so with many rows the adapter is added to it on the way:

    W' = round(dequantized W + s B A)      y = x W'ᵀ + b      dx = dy W'

"merged" costs no (M, N) traffic for LoRA at all and leaves the product to the vendor's library. It
rounds W + ΔW once, as it would round W; where ΔW is far below W's rounding step its effect on y
is rounded off, as it would be in y itself, while dA and dB never see W' and stay exact. With
dropout there is no W' (each row of x has its own ΔW), so then, and for middle M, W alone is made
dense and `lora_product` starts its accumulator at S Bᵀ: the exact path.

A CPU with AVX-512 has one way for fp32 and any M, "native": a product in C that decodes W as it goes
(`nf4_cpu.py`). Elsewhere, and in other dtypes, torch takes the exact path.
"""

import threading
from typing import Protocol

import torch
import torch.nn.functional as F

from .lora_product import lora_product
from .nf4 import NF4_CODE, NestedScales, nf4_dequantize
from .nf4_cpu import nf4_product_native, runs_native_product
from .nf4_decode import tensors_of
from .nf4_merge import nf4_merge
from .nf4_stream import nf4_stream
from .tiles import runs_kernel


class QuantizedWeight(Protocol):
    """What is needed of an NF4 weight; `quant.NF4Tensor` is one."""

    packed: torch.Tensor  # (N K / 2,) uint8
    absmax: torch.Tensor  # (N K / block_size,) fp32, or uint8 with `nested`
    shape: torch.Size  # (N, K)
    block_size: int
    nested: NestedScales | None

    def dequantize(self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor: ...


def plan(x: torch.Tensor, weight: QuantizedWeight, dropout: bool) -> str:
    """Which way a product of x (M, ·) with a quantized weight goes: "native", "stream", "merged" or "exact".

    In torch there is no merge: the adapter's part costs one in-place product on y, and a merge would
    cost one on W, which is the larger array for all but very long batches.
    """
    M, K = x.shape[0], weight.shape[1]
    if not runs_kernel(x) and runs_native_product(x, weight):
        return "native"
    if not runs_kernel(x) or K % 64 or weight.block_size % 64:
        return "exact"
    if M <= 16:
        return "stream"
    return "merged" if M >= 1024 and not dropout else "exact"


def quantized_product(way, x, weight, bias, S, lora_A, lora_B, scale):
    """y = x Wᵀ + b + scale · S Bᵀ (M, N) with a quantized W (N, K), by the `plan`; S = x̂ Aᵀ.

    Otherwise as `lora_product`.
    """
    if way == "native":
        bias = None if bias is None else bias.to(x.dtype)
        return nf4_product_native(x, weight, NF4_CODE, True, bias, S, lora_B.to(x.dtype), scale)
    if way == "stream":
        return nf4_stream(x, weight, bias, S, lora_B, scale)
    if way == "merged":
        merged = nf4_merge(weight, lora_A, lora_B, scale, x.dtype)
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype))
    return lora_product(x, dense_weight(weight, x), bias, S, lora_B, scale)


def quantized_product_dx(way, dy, weight, dS, lora_A, lora_B, scale, mask=None, threshold=0):
    """dx = dy W + keep ⊙ (dS A) (M, K) with a quantized W (N, K), by forward's plan; dS = scale · dy B."""
    if way == "native" and mask is None:
        return nf4_product_native(dy, weight, NF4_CODE, False, None, dS, lora_A.to(dy.dtype))
    if way == "native":
        return nf4_product_native(dy, weight, NF4_CODE, False).addcmul_(dS @ lora_A.to(dy.dtype), mask)
    if way == "merged":
        return dy @ nf4_merge(weight, lora_A, lora_B, scale, dy.dtype)
    return lora_product(dy, dense_weight(weight, dy).t(), None, dS, lora_A.t(), 1.0, mask, threshold)


_local = threading.local()


def _scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer for a dense weight, valid until this thread's next call.

    On a CPU it is one reused block: fresh memory of this size costs a page fault for every 4 KiB.
    CUDA's caching allocator reuses blocks by itself, and knows about streams.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    blocks = _local.__dict__.setdefault("blocks", {})
    if dtype not in blocks or blocks[dtype].numel() < shape.numel():
        with torch.inference_mode(False):  # made within that mode, it could not be written to outside
            blocks[dtype] = torch.empty(shape.numel(), dtype=dtype, device="cpu")
    return blocks[dtype][: shape.numel()].view(shape)


def dense_weight(weight: torch.Tensor | QuantizedWeight, x: torch.Tensor) -> torch.Tensor:
    """The weight (N, K) in x's dtype. A quantized one lies in the scratch: use it before the next call."""
    if isinstance(weight, torch.Tensor):
        return weight.to(x.dtype)
    if torch.compiler.is_compiling():
        return dense_op(*tensors_of(weight), *weight.shape, weight.block_size, x.dtype)
    return weight.dequantize(x.dtype, out=_scratch(torch.Size(weight.shape), x.dtype, x.device))


@torch.library.custom_op("handtuned::nf4_dense", mutates_args=())
def dense_op(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    nested_block: int,
    N: int,
    K: int,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One operation for `torch.compile`, which would otherwise unroll the reference's loop over tiles."""
    nested = None
    if nested_absmax is not None:
        nested = NestedScales(nested_absmax, nested_code, nested_offset, nested_block)
    return nf4_dequantize(packed, absmax, (N, K), dtype, block_size, nested)


@dense_op.register_fake
def _(packed, absmax, nested_absmax, nested_code, nested_offset, nested_block, N, K, block_size, dtype):
    return packed.new_empty((N, K), dtype=dtype)
