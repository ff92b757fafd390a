"""Counting the bytes of live tensors, exactly, on a device without an allocator that counts; what a layer costs.

PyTorch's CPU allocator does not count, and the resident size of the process also holds the interpreter and whatever
malloc has not given back. Here every operation is watched by a `TorchDispatchMode`: a storage that appears in a
result is added when it is first seen and taken off when it dies. Views share a storage and count once.

Not seen: buffers that a kernel allocates inside of itself and frees before it returns.
"""

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry


class LiveMemory(TorchDispatchMode):
    """Within this context, counts the bytes of live tensor storage on one kind of device ("cpu", "cuda", …).

    Args:
        scan: look among all Python objects for the tensors that are there already. Without it `before` holds only
            those that an operation reads, and the death of the others goes unnoticed; likewise for tensors that
            gc.freeze() has set aside.
        keep_history: note `added` after every change, in `history`.

    Attributes:
        before: bytes that were alive when the context was entered; what is first met as an operand was there before.
        added: bytes alive now above `before`; negative if more was freed than made.
        peak_added: the largest `added` so far; `reset_peak()` starts again from now.
        work: FLOPs of the operations so far, plus one for each number that they have written.
    """

    def __init__(self, device_type: str = "cpu", scan: bool = True, keep_history: bool = False):
        super().__init__()
        self.device_type, self.scan = device_type, scan
        self.before = self.added = self.peak_added = self.work = 0
        self.history: list[int] | None = [] if keep_history else None
        self._met = 0
        # id → bytes counted, what notices its death, its number
        self._storages: dict[int, tuple[int, weakref.ref, int]] = {}

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
        if count := flop_registry.get(func.overloadpacket):
            self.work += count(*args, **kwargs, out_val=results)
        for tensor in _tensors(results):
            self.work += tensor.numel()
            self._meet(tensor, new=True)
        return results

    def reset_peak(self) -> None:
        self.peak_added = self.added

    def _meet(self, tensor: torch.Tensor, new: bool) -> None:
        if tensor.device.type != self.device_type or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        known, reference, number = self._storages.get(key, (None, None, self._met))
        if known is None:
            self._met += 1
            reference = weakref.ref(storage, lambda _: self._change(-self._storages.pop(key)[0], number))
            known = 0 if new else size
            self.before += known
        self._storages[key] = size, reference, number
        if size != known:  # new, or resized
            self._change(size - known, number, tensor)

    def _change(self, difference: int, number: int, tensor: torch.Tensor | None = None) -> None:
        """A storage, the `number`th that was met, has grown; without a `tensor` it has died."""
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
            buffers = list(function.buffers()) if isinstance(function, nn.Module) else []
            before = [buffer.clone() for buffer in buffers]
            cost, x = _measure_layer(function, x, memory)
            costs.append(cost)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.detach().copy_(value)
    return costs


def _measure_layer(function: Callable, x, memory: LiveMemory):
    handed_out: dict[int, torch.Tensor] = {}
    stopped_work = 0

    def hand_in(tensor):
        nonlocal stopped_work
        stopped_work = memory.work
        handed_out[len(handed_out)] = tensor.detach()
        return len(handed_out) - 1

    with saved_tensors_hooks(hand_in, handed_out.pop):
        recomputed = _measure_pass(function, x, memory)[1]  # and its output is let go
    y, kept = _measure_pass(function, x, memory)
    again = dict(recomputed_backward_peak=recomputed["backward_peak"], work=recomputed["work"])
    return LayerCost(**kept | again, stopped_work=stopped_work), y


def _measure_pass(function: Callable, x, memory: LiveMemory):
    def forward(x):
        start, memory.work = memory.added, 0
        memory.reset_peak()
        y = function(x)
        return y, memory.added - start, memory.peak_added - start, memory.work

    x = tree_map_only(torch.Tensor, _detached, x)
    versions = [t._version for t in _tensors(x)]
    try:
        y, kept, forward_peak, work = forward(x)
        in_place = [t._version for t in _tensors(x)] != versions
    except RuntimeError:  # a layer may not work in place on a leaf
        in_place, x = True, tree_map_only(torch.Tensor, torch.clone, x)
        y, kept, forward_peak, work = forward(x)
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
                   new_gradients=new_gradients, in_place=in_place, work=work)  # fmt: skip


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """Cut from the layers before, so that they can be freed. Where no gradient forbids changes in place, a copy."""
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor.clone()
