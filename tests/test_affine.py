"""The min/max scheme of the study documents, and where their example is wrong."""

import pytest
import torch
from handtuned.quant import dequantize_affine, quantize_affine


def test_example_of_the_documents():
    """003 prints [7, 2, 15, 4] for these weights; its own formula gives [7, 0, 15, 3]."""
    q = quantize_affine(torch.tensor([0.123, -0.456, 0.789, -0.234]), bits=4, group_size=4)
    assert q.codes.tolist() == [7, 0, 15, 3]
    assert q.scale.item() == pytest.approx(0.083)
    assert q.zero_point.item() == pytest.approx(-0.456)
    assert q.packed.tolist() == [0x70, 0xF3]
    assert q.dequantize().tolist() == pytest.approx([7 * 0.083 - 0.456, -0.456, 15 * 0.083 - 0.456, 3 * 0.083 - 0.456])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(0,), (1,), (63,), (5, 13), (1000,), ()], ids=str)
@pytest.mark.parametrize("group_size", [1, 3, 64])
def test_error_is_at_most_half_a_step(bits, shape, group_size):
    x = torch.randn(shape)
    q = quantize_affine(x, bits, group_size)
    back = dequantize_affine(q)
    assert back.shape == x.shape and q.codes.shape == x.shape and q.codes.dtype == torch.uint8
    steps = q.scale.repeat_interleave(group_size)[: x.numel()]
    assert torch.all((back - x).abs().flatten() <= steps / 2 + 1e-6)
    assert q.packed.numel() == -(-x.numel() // (8 // bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_extremes_and_constants(dtype):
    x = torch.randn(4, 64).to(dtype)
    x[1] = 0.5
    q = quantize_affine(x.t().contiguous().t())
    back = q.dequantize()
    assert back.dtype == dtype and torch.equal(back[1], x[1])
    assert torch.equal(back.amin(1), x.amin(1))
    torch.testing.assert_close(back.amax(1), x.amax(1))
    assert q.nbytes == 4 * 64 // 2 + 4 * 8
    assert q.dequantize(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_largest_numbers_decode_to_numbers(bits):
    largest = torch.finfo(torch.float32).max
    for x in (torch.tensor([0.0, largest]), torch.tensor([-largest, 0.0]), torch.full((3,), largest)):
        q = quantize_affine(x, bits)
        assert ((q.dequantize() - x).abs() <= q.scale / 2).all()


def test_values_are_decoded_to_floats_only():
    with pytest.raises(TypeError, match="dtype must be a floating-point"):
        quantize_affine(torch.randn(4)).dequantize(torch.int8)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((torch.arange(4),), TypeError, "x must be"),
        ((torch.randn(4), 0), ValueError, "bits"),
        ((torch.randn(4), 9), ValueError, "bits"),
        ((torch.randn(4), 4.0), ValueError, "bits"),
        ((torch.randn(4), 4, 0), ValueError, "group_size"),
        ((torch.tensor([1.0, float("nan"), float("inf")]),), ValueError, "got 2 values"),
        ((torch.tensor([3e38, -3e38]),), ValueError, "overflows"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        quantize_affine(*arguments)
