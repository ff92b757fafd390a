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

    Args:
        device_type: "cpu", "cuda", …: storages elsewhere are not counted.
        scan: look for the tensors that are there already. Without it `before` holds only those that
            an operation reads, and the death of the others goes unnoticed; it saves a walk over all
            Python objects.
        keep_history: note `added` after every change, in `history`.

    Attributes:
        before: bytes that were alive when the context was entered. A storage first met as an operand
            was there before, though it may have had no Python name (the graph of an earlier forward).
        added: bytes alive now above `before`; negative if more was freed than made.
        peak_added: the largest `added` so far; `reset_peak()` starts again from now.
        elements: numbers written by all operations so far, a measure of memory traffic.
    """

    def __init__(self, device_type: str = "cpu", scan: bool = True, keep_history: bool = False):
        super().__init__()
        self.device_type = device_type
        self.scan = scan
        self.before = self.added = self.peak_added = self.elements = 0
        self.history: list[int] | None = [] if keep_history else None
        self._storages: dict[int, tuple[int, weakref.ref]] = {}  # id → bytes counted, what tells of its death

    def __enter__(self):
        if self.scan:
            gc.collect()  # what died in a reference cycle is alive until the collector has seen it
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
        self.peak_added = self.added

    def _meet(self, tensor: torch.Tensor, new: bool) -> None:
        if tensor.device.type != self.device_type or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        known, reference = self._storages.get(key, (None, None))
        if known is None:
            reference = weakref.ref(storage, lambda _: self._forget(key))
            known = 0 if new else size
            self.before += known
        self._storages[key] = size, reference
        if size != known:  # new, or resized
            self._change(size - known)

    def _forget(self, key: int) -> None:
        self._change(-self._storages.pop(key)[0])

    def _change(self, difference: int) -> None:
        self.added += difference
        self.peak_added = max(self.peak_added, self.added)
        if self.history is not None:
            self.history.append(self.added)
