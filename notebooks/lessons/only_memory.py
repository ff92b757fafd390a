"""What torch may do around a kernel: allocate, view and copy, and nothing else."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .exercise import WrongAnswer
from .places import own_line

# What is not a view and computes nothing.
_HARMLESS = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros",
    "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "scalar_tensor", "arange", "zero_", "fill_",
    "clone", "copy_", "_to_copy", "contiguous", "set_", "lift_fresh", "_local_scalar_dense", "resize_",
    "is_same_size", "constant_pad_nd", "cat", "stack",
}  # fmt: skip
_MOVES = {"clone", "copy_", "_to_copy", "contiguous", "cat", "stack"}


class OnlyMemory(TorchDispatchMode):
    """Refuses arithmetic of torch, but for what is `also` allowed."""

    def __init__(self, watch, also, moves):
        super().__init__()
        self.watch, self.also, self.moves = watch, also, moves

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.partition("::")[2], kwargs or {}
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not (self.watch.inside or view or name in _HARMLESS or name in self.also):
            raise WrongAnswer(
                f"torch itself computes here ({name}{own_line()}). Let the kernel do it: around it torch may "
                "allocate, view and copy, and nothing else."
            )
        made = func(*args, **kwargs)
        if not self.watch.inside and not view and isinstance(made, torch.Tensor):
            sources = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t is not made]
            if not self.moves and name in _MOVES and self.watch.has(sources):
                raise WrongAnswer(
                    f"torch itself moves the elements here ({name}{own_line()}), and moving them is what the kernel is "
                    "asked to do: it takes x as it is, and writes out."
                )
            self.watch.copied(sources, made)
        return made
