"""Decoding NF4 weights inside a kernel: from int32 words in registers to values.

Eight codes lie in an int32 word, the first in bits 4 to 7. A shift, a mask and one read from a table
of 16 fp32 values make a weight. The table lies in shared memory, its 16 entries in 16 different
banks, so any pattern of reads is free of conflicts. Scales belong to blocks of 64 values or more.
"""

from functools import lru_cache

import torch

from .nf4 import NF4_CODE
from .runtime import tl, triton


def tensors_of(weight) -> tuple:
    """packed, absmax, and what decodes 8-bit scales (None three times, and 1, without double quantization)."""
    return weight.packed, weight.absmax, *(weight.nested or (None, None, None, 1))


@lru_cache
def code_table(device: torch.device) -> torch.Tensor:
    return NF4_CODE.to(device)


def code_words(packed: torch.Tensor) -> torch.Tensor:
    """The codes as int32 words; copied where they do not start at a multiple of 4 bytes."""
    return (packed.clone() if packed.data_ptr() % 4 else packed).view(-1).view(torch.int32)


@triton.jit
def decode(words, table):
    """[ROWS, WORDS] int32, eight codes each → their values in order, [ROWS, 8 · WORDS] fp32."""
    ROWS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    # The last axis joined is the fastest: joins by bit 2, bit 1 and bit 0 of a code's place in the word.
    even = tl.join(tl.join(words >> 4, words >> 20), tl.join(words >> 12, words >> 28))
    odd = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    codes = tl.reshape(tl.join(even, odd) & 15, [ROWS * WORDS * 8])
    return tl.reshape(tl.gather(table, codes, 0), [ROWS, WORDS * 8])


@triton.jit
def load_scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, mask, nested_block):
    """fp32 scales of the given blocks."""
    scales = tl.load(absmax_ptr + blocks, mask=mask, other=0)
    if nested_code_ptr is not None:
        nested = tl.load(nested_absmax_ptr + blocks // nested_block, mask=mask, other=0.0)
        scales = tl.load(nested_code_ptr + scales.to(tl.int32)) * nested + tl.load(offset_ptr)
    return scales


@triton.jit
def dense_tile(
    words, table, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, rows, k, K, block_size, nested_block
):
    """W[rows, k : k + 8 · WORDS] as fp32, from its words [ROWS, WORDS]."""
    ROWS: tl.constexpr = words.shape[0]
    GROUPS: tl.constexpr = words.shape[1] // 8
    groups = k // 64 + tl.arange(0, GROUPS)
    blocks = (rows[:, None] * (K // 64) + groups[None, :]) // (block_size // 64)
    in_row = groups[None, :] < K // 64
    scales = load_scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, blocks, in_row, nested_block)
    values = tl.reshape(decode(words, table), [ROWS, GROUPS, 64]) * scales[:, :, None]
    return tl.reshape(values, [ROWS, GROUPS * 64])
