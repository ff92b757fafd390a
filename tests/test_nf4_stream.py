"""A few rows on an NF4 weight: the kernel that reads codes, with tensor cores and without."""

import pytest
import torch
from handtuned.kernels.nf4_stream import nf4_stream, nf4_stream_reference
from helpers import assert_computes
from lora_layers import each_dtype, layer, quantized


@each_dtype
@pytest.mark.parametrize(
    ("M", "N", "K", "r", "block_size", "double_quant"),
    [(1, 9, 64, 1, 64, True), (1, 21, 1088, 5, 128, False), (2, 33, 192, 3, 64, False), (16, 70, 320, 17, 64, True)],
    ids=["M1", "M1-long", "M2", "M16"],
)
def test_streaming_a_few_rows(kernel_backend, device, M, N, K, r, block_size, double_quant, dtype):
    q = quantized(N, K, block_size, double_quant, device)
    x, S, b = (torch.randn(size, device=device).to(dtype) for size in ((M, K), (M, r), (N,)))
    B = torch.randn(N, r, device=device)
    inputs = (x, q.dequantize(torch.float32), S, B)
    assert_computes(nf4_stream(x, q, b, S, B, 0.5), layer, (*inputs, b), K + r + 1, "y")
    assert_computes(nf4_stream(x, q, None, S, B, 0.5), layer, inputs, K + r, "y without bias")


def test_streaming_gives_the_same_bits_each_time(kernel_backend, device):
    """Whoever comes last adds the parts in their order, and leaves its counter as it was."""
    q, x = quantized(70, 1088, device=device), torch.randn(3, 1088, device=device).half()
    S, B = torch.randn(3, 8, device=device).half(), torch.randn(70, 8, device=device)
    first, second = (nf4_stream(x, q, None, S, B, 0.5) for _ in range(2))
    assert torch.equal(first, second)


def test_streaming_rows_that_lie_far_apart(kernel_backend, device):
    """Rows and columns of x, S and B with strides of their own; nothing between them is read."""
    q = quantized(33, 128, device=device)
    inputs = [torch.randn(4 * n, 3 * m, device=device).half()[::4, ::3] for n, m in ((2, 128), (2, 5), (33, 5))]
    x, S, B = inputs
    W = q.dequantize(torch.float32)
    assert_computes(nf4_stream(x, q, None, S, B, 0.5), layer, (x, W, S, B), 128 + 5, "y")


def test_the_reference_is_the_layer():
    q, x, S, B, b = quantized(9, 64), *(torch.randn(size) for size in ((3, 64), (3, 2), (9, 2), (9,)))
    y = nf4_stream_reference(x, q, b, S, B, 0.5)
    assert_computes(y, layer, (x, q.dequantize(torch.float32), S, B, b), 64 + 2 + 1, "y")
