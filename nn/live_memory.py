"""Counting the bytes of live tensors, exactly, on a device without an allocator that counts; what a layer costs.

PyTorch's CPU allocator does not count, and the resident size of the process also holds the interpreter and whatever
malloc has not given back. Here every operation is watched by a `TorchDispatchMode`: a storage that appears in a
result is added when it is first seen and taken off when it dies. Views share a storage and count once.

Not seen: buffers that a kernel allocates inside of itself and frees before it returns.
"""

import contextlib
import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode


class LiveMemory(TorchDispatchMode):
    """Within this context, counts the bytes of live tensor storage on one kind of device ("cpu", "cuda", …).

    Args:
        scan: look among all Python objects for the tensors that are there already. Without it `before` holds only
            those that an operation reads, and the death of the others goes unnoticed.
        keep_history: note `added` after every change, in `history`.

    Attributes:
        before: bytes that were alive when the context was entered; what is first met as an operand was there before.
        added: bytes alive now above `before`; negative if more was freed than made.
        peak_added: the largest `added` so far; `reset_peak()` starts again from now.
        elements: numbers written by all operations so far, a measure of memory traffic.
    """

    def __init__(self, device_type: str = "cpu", scan: bool = True, keep_history: bool = False):
        super().__init__()
        self.device_type, self.scan = device_type, scan
        self.before = self.added = self.peak_added = self.elements = 0
        self.history: list[int] | None = [] if keep_history else None
        self._storages: dict[int, tuple[int, weakref.ref]] = {}  # id → bytes counted, what notices its death

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
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, new=False)
        results = func(*args, **kwargs)
        for tensor in _tensors(results):
            self.elements += tensor.numel()
            self._meet(tensor, new=True)
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
            reference = weakref.ref(storage, lambda _: self._change(-self._storages.pop(key)[0]))
            known = 0 if new else size
            self.before += known
        self._storages[key] = size, reference
        if size != known:  # new, or resized
            self._change(size - known)

    def _change(self, difference: int) -> None:
        self.added += difference
        self.peak_added = max(self.peak_added, self.added)
        if self.history is not None:
            self.history.append(self.added)


def _tensors(value) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs, measured: in bytes, work in FLOPs plus one for each number that an operation writes."""

    kept: int  # alive after its forward pass: saved tensors and output
    forward_peak: int  # most alive during its forward pass, saved tensors included
    backward_peak: int  # most that its backward pass adds to `kept` and the gradient of the output
    # The same where a checkpoint hands out the saved tensors: it lets go of each while the operation that asked for it
    # still runs, autograd only afterwards.
    recomputed_backward_peak: int
    output: int
    new_gradients: int  # of parameters, left behind by its backward pass
    work: int  # of its forward pass
    stopped_work: int  # up to the last tensor that it saves: a recomputation that ends with this layer stops there
    in_place: bool = False  # it overwrites its input, so no recomputation can start with it


def measure_layers(functions: Sequence[Callable], x) -> list[LayerCost]:
    """Count each layer's bytes and FLOPs, forward and backward, alone; gradients, buffers and generators stay."""
    device = next((t.device for t in _tensors(x)), torch.device("cpu"))
    costs = []
    rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with LiveMemory(device.type, scan=False) as memory, rng, torch.enable_grad():
        for function in functions:
            with _buffers_restored(function):
                cost, x = _measure_layer(function, x, memory)
            costs.append(cost)
    return costs


def _measure_layer(function: Callable, x, memory: LiveMemory):
    handed_out: dict[int, torch.Tensor] = {}

    def hand_in(tensor):
        handed_out[len(handed_out)] = tensor.detach()
        return len(handed_out) - 1

    with saved_tensors_hooks(hand_in, handed_out.pop):
        recomputed = _measure_pass(function, x, memory)[1]  # and its output is let go
    # FlopCounterMode holds on to tensors that have a gradient, so work is counted in a pass of its own.
    stopped_work = 0

    def work_so_far():
        return flops.get_total_flops() + memory.elements - elements

    def note_work(tensor):
        nonlocal stopped_work
        stopped_work = work_so_far()
        return tensor.detach()

    argument = tree_map(_copied if recomputed["in_place"] else _detached, x)
    elements = memory.elements
    with saved_tensors_hooks(note_work, lambda tensor: tensor), FlopCounterMode(display=False) as flops:
        function(argument)
    work = work_so_far()
    del argument
    y, kept = _measure_pass(function, x, memory)
    peak = recomputed["backward_peak"]
    return LayerCost(recomputed_backward_peak=peak, work=work, stopped_work=stopped_work, **kept), y


def _measure_pass(function: Callable, x, memory: LiveMemory):
    def forward(x):
        start = memory.added
        memory.reset_peak()
        y = function(x)
        return y, memory.added - start, memory.peak_added - start

    x = tree_map(_detached, x)
    versions = [t._version for t in _tensors(x)]
    try:
        y, kept, forward_peak = forward(x)
        in_place = [t._version for t in _tensors(x)] != versions
    except RuntimeError:  # a layer may not work in place on a leaf
        in_place, x = True, tree_map(_copied, x)
        y, kept, forward_peak = forward(x)
    parameters = [p for p in function.parameters() if p.requires_grad] if isinstance(function, nn.Module) else []
    outputs = [t for t in _tensors(y) if t.requires_grad]
    gradients = [torch.ones_like(t) for t in outputs]
    begin = memory.added
    memory.reset_peak()
    wanted = [t for t in (*_tensors(x), *parameters) if t.requires_grad]
    if outputs and wanted:
        torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
    output, new_gradients = sum(t.nbytes for t in _tensors(y)), sum(p.nbytes for p in parameters if p.grad is None)
    return y, dict(kept=kept, forward_peak=forward_peak, backward_peak=memory.peak_added - begin, output=output,
                   new_gradients=new_gradients, in_place=in_place)  # fmt: skip


def _detached(value):
    """Cut from the layers before, so that they can be freed. Where no gradient forbids changes in place, a copy."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_() if value.requires_grad else value.clone()


def _copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def _buffers_restored(function: Callable):
    buffers = list(function.buffers()) if isinstance(function, nn.Module) else []
    before = [b.clone() for b in buffers]
    yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
