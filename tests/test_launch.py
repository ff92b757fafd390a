"""A launch without Triton's dispatch: the kernel that Triton would have chosen for such tensors, and nothing is kept of
them."""

import pytest
import torch
from compiled import compiled, run_again
from handtuned.kernels import dropout, runtime

from handtuned.gpu import emulate

SEED, BLOCKS = torch.tensor([7]), {"ROUNDS": dropout.ROUNDS, "BLOCK_M": 16, "BLOCK_N": 256}


def test_this_file_without_the_interpreter(pytestconfig):
    run_again(__file__, pytestconfig)


@compiled
def test_tensors_of_each_kind_meet_a_kernel_of_their_own(kernel_backend):
    """By dtype, address and architecture, compiled once each; another tensor of a kind meets the same kernel."""
    run = runtime.Launch(dropout._mask_kernel, (1, 1, 1), (16, 256, 32768), **BLOCKS)
    expected = dropout.dropout_mask_reference(SEED, 16, 256, 32768)
    before = set(runtime._compiled)
    for arch in ("sm_90", "sm_80"):
        with emulate(arch):
            for dtype, start in 2 * [(torch.float16, 0), (torch.float32, 0), (torch.float16, 1), (torch.int8, 8)]:
                mask = torch.zeros(16 * 256 + start, dtype=dtype)[start:].view(16, 256)
                run(SEED, mask)
                assert torch.equal(mask.bool(), expected), (arch, dtype, start)
    assert len(set(runtime._compiled) - before) == 8


def test_only_numbers_are_kept(kernel_backend):
    mask = torch.zeros(16, 256)
    with pytest.raises(TypeError, match="_mask_kernel may keep numbers alone"):
        runtime.Launch(dropout._mask_kernel, (1, 1, 1), (mask, 16, 256, 32768), **BLOCKS)
