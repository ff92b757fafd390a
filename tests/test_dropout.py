"""The dropout of the low-rank path: masks from a seed, the same in every kernel, and nothing else kept of them."""

import pytest
import torch
from handtuned.kernels import dropout
from handtuned.kernels.lora import lora_linear
from handtuned.kernels.lora_gemms import lora_down, lora_down_grad
from handtuned.kernels.matmul import lora_product
from lora_layers import exact, operands


def test_a_dropout_mask_is_a_seed_and_no_array():
    x, W, b, A, B, _ = operands((64, 48, 32, 4), torch.float32)
    A.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, W, b, A, B, 1.0, 0.5)
    masks = [t for t in saved if t.dtype in (torch.bool, torch.uint8, torch.int64)]
    assert [t.numel() for t in masks] == [1]


@pytest.mark.parametrize("columns", [1, 8, 63, 130])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_drop_what_they_should(p, columns):
    threshold, seed = dropout.threshold_of(p), torch.tensor([12345])
    rows = 20000 // columns
    spread = 6 * (p * (1 - p) / (rows * columns)) ** 0.5  # six standard deviations
    for draw in (dropout.dropout_mask, dropout.dropout_mask_reference):
        keep = draw(seed, rows, columns, threshold)
        assert keep.shape == (rows, columns) and keep.dtype == torch.bool
        assert abs(keep.double().mean().item() - (1 - threshold / 65536)) < spread
        assert torch.equal(keep, draw(seed, rows, columns, threshold))
        assert not torch.equal(keep, draw(seed + 1, rows, columns, threshold))


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        (0x00000000, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (0xFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
    ids=["zeros", "ones"],
)
def test_philox_gives_the_published_answers(word, answer):
    """Philox4x32-7, as its authors' library tests it: counter and key of nothing but this word."""
    assert tuple(int(w) for w in dropout.philox(*[torch.tensor([word])] * 6)) == answer


def test_the_kernels_mask_is_the_specified_one(kernel_backend, device):
    """S of ones with an identity A is the mask itself, over several tiles."""
    seed, threshold = torch.tensor([2**40 + 7], device=device), 30000
    x = torch.ones(67, 130, device=device)
    drop = dropout.Dropout(seed, threshold)
    S = lora_down(x, torch.eye(130, device=device), drop)
    keep = dropout.dropout_mask_reference(seed, 67, 130, threshold)
    assert torch.equal(S.bool(), keep)
    dA = lora_down_grad(torch.eye(67, device=device), x, x.dtype, drop)
    assert torch.equal(dA.bool(), keep)
    zeros, up = torch.zeros(130, 67, device=device), torch.ones(130, 1, device=device)
    y = lora_product(torch.zeros(67, 67, device=device), zeros, None, x[:, :1], up, 1.0, drop)
    assert torch.equal(y.bool(), keep)


def test_dropout_follows_torchs_generator():
    x, W, b, A, B, _ = operands((8, 6, 40, 3), torch.float32)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = lora_linear(x, W, b, A, B, 1.0, 0.5)
    second = lora_linear(x, W, b, A, B, 1.0, 0.5)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(lora_linear(x, W, b, A, B, 1.0, 0.5), first)


def test_dropout_keeps_the_mean():
    x, W, b, A, B, _ = operands((4, 3, 64, 2), torch.float32)
    plain = lora_linear(x, W, b, A, B, 1.0)
    mean = torch.stack([lora_linear(x, W, b, A, B, 1.0, 0.3) for _ in range(4000)]).mean(0)
    x64, A64, B64 = exact(x, A, B)
    variance = 0.3 / 0.7 * torch.einsum("mk,nk->mn", x64**2, (B64 @ A64) ** 2)
    assert ((mean - plain).abs() < 6 * (variance / 4000).sqrt() + 1e-5).all()
