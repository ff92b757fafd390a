"""Counting the bytes of live tensors, exactly, on a device without an allocator that counts.

PyTorch's CUDA allocator keeps its own books (`torch.cuda.max_memory_allocated`); its CPU
allocator does not, and the resident size of the process also holds the interpreter and
whatever malloc has not given back. Here every operation is watched by a
`TorchDispatchMode`: a storage that appears in a result is added when it is first seen
and taken off when it dies. Views share a storage and count once.

Not seen: buffers that a kernel allocates inside of itself and frees before it returns.
"""

import gc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within this context, counts the bytes of live tensor storage on one kind of device.

    Attributes:
        before: bytes that were alive when the context was entered.
        current: bytes alive now (after the context: at its end).
        peak: the largest `current` so far; `reset_peak()` starts again from now.
        elements: numbers written by all operations so far, a measure of memory traffic.
        history: `current` after every change, if asked for with `keep_history`.

    A storage first met as an operand must have been there before (the graph of an earlier
    forward pass has no Python name): it is added to `before`, `current` and `peak` alike.
    """

    def __init__(self, device_type: str = "cpu", keep_history: bool = False):
        super().__init__()
        self.device_type = device_type
        self.before = self.current = self.peak = self.elements = 0
        self.history: list[int] | None = [] if keep_history else None
        self._sizes: dict[int, tuple[int, weakref.ref]] = {}  # id of a storage → bytes counted for it

    def __enter__(self):
        # What died in a reference cycle is still alive until the collector has seen it.
        gc.collect()
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):  # isinstance would wake up proxies
                self._meet(thing, new=False)
                if thing.is_leaf and thing.grad is not None:
                    self._meet(thing.grad, new=False)
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._meet(leaf, new=False)
        results = func(*args, **kwargs)
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor):
                self.elements += leaf.numel()
                self._meet(leaf, new=True)
        return results

    def reset_peak(self) -> None:
        self.peak = self.current

    def _meet(self, tensor: torch.Tensor, new: bool) -> None:
        if tensor.device.type != self.device_type or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self._sizes:
            self._sizes[key] = 0, weakref.ref(storage, lambda _: self._forget(key))
            if not new:
                self._sizes[key] = size, self._sizes[key][1]
                self._add_from_the_start(size)
        known, reference = self._sizes[key]
        if size != known:
            self._sizes[key] = size, reference
            self._change(size - known)

    def _add_from_the_start(self, size: int) -> None:
        self.before += size
        self.current += size
        self.peak += size
        if self.history is not None:
            self.history = [bytes_alive + size for bytes_alive in self.history]

    def _forget(self, key: int) -> None:
        self._change(-self._sizes.pop(key)[0])

    def _change(self, difference: int) -> None:
        self.current += difference
        self.peak = max(self.peak, self.current)
        if self.history is not None:
            self.history.append(self.current)
