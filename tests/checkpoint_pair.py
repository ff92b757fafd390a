"""For the tests of checkpoint: torch's own beside ours, a plain call, and how gradients are compared."""

import torch
import torch.utils.checkpoint
from torch import nn


def torchs(func, *args, **kwargs):
    return torch.utils.checkpoint.checkpoint(func, *args, use_reentrant=False, **kwargs)


def plain(func, *args, preserve_rng_state=True, **kwargs):
    return func(*args, **kwargs)


def mlp(dropout=0.0):
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))


def count_calls(func):
    def counted(*args, **kwargs):
        counted.calls += 1
        return func(*args, **kwargs)

    counted.calls = 0
    return counted


def gradients(run, wrt):
    """Gradients of run() with respect to `wrt`, from a fixed seed, and the generator's state afterwards."""
    torch.manual_seed(7)
    grads = torch.autograd.grad(run(), wrt, allow_unused=True)
    return [*grads, torch.get_rng_state()]


def assert_bit_equal(ours, plain):
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
