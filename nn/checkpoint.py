"""Gradient checkpointing: forget activations in the forward pass, compute them again in the backward pass.

Autograd keeps, for every operation, the tensors that its backward formula needs. For a stack of n layers that is
n·inside bytes. A checkpointed function keeps its inputs only (the boundary) and runs once more when backward first asks
for a tensor from inside it:

    memory   n·inside  →  n·boundary + inside        (every layer checkpointed)
    FLOPs    forward 1 + backward 2 = 3  →  at most 4: + 1/3, whatever the number of layers

`manual_checkpoint_forward` is the whole idea in one `torch.autograd.Function`, with the limits that its
docstring lists. `checkpoint` has none of them: it puts no node of its own into the graph. The function runs
with gradients on, and autograd's saved-tensor hooks swap every tensor that would be saved for an empty slot.
When backward opens a slot, the function runs again, up to the last tensor that is needed, and the slots fill up.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (2016), section 4.
"""

import contextlib
import weakref
from collections.abc import Callable, Collection

import torch
import torch.utils.checkpoint
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import noop_context_fn
from torch.utils.weak import WeakTensorKeyDictionary


class _RecomputeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, func, *inputs):
        ctx.func = func
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return func(*inputs)

    @staticmethod
    def backward(ctx, *grad_outputs):
        inputs = [x.detach().requires_grad_(True) for x in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.func(*inputs)
        torch.autograd.backward(outputs, grad_outputs)
        return None, *(x.grad for x in inputs)


def manual_checkpoint_forward(func: Callable, *args: torch.Tensor):
    """Run `func(*args)` without saving anything from inside it; recompute in backward.

    The smallest form of the idea, exact for functions of floating-point tensors without randomness, such as an MLP. Its
    limits, each of which `checkpoint` lifts:

    - dropout draws another mask in backward, and the gradients are wrong without a word;
    - autocast is not on again in backward;
    - every argument must be a floating-point tensor, passed by position;
    - every result must be one too, with a gradient;
    - if no argument requires a gradient, parameters inside `func` get none;
    - parameters get theirs through `.grad` only: `torch.autograd.grad` does not see them;
    - no double backward: second derivatives lack what the function adds to them, without a word.
    """
    return _RecomputeFunction.apply(func, *args)


def checkpoint(func: Callable, *args, preserve_rng_state: bool = True, use_reentrant: bool = False, context_fn=None,
               determinism_check: str = "default", debug: bool = False, early_stop: bool = True, **kwargs):  # fmt: skip
    """Run `func(*args, **kwargs)`, keep its arguments only, and run it again when backward needs its inside.

    Gradients are bit-equal to those of a plain call, if `func` does the same when it runs again. Anything autograd can
    do with a plain call works: dropout, autocast, arguments and results of any kind and nesting, arguments without
    gradient, parameters in closures, checkpoints inside checkpoints, `torch.autograd.grad`, `retain_graph`, double
    backward, backward inside `func`. What was recomputed is released as backward uses it up, at the latest at its end.

    Not repeated: generators other than torch's global ones, side effects on buffers (a BatchNorm updates its running
    statistics twice). Not supported: `torch.func` transforms and forward-mode differentiation.

    Args:
        func: any callable; it is called once now and at least once in each backward.
        preserve_rng_state: draw the same random numbers again (CPU, and every CUDA device once
            CUDA is initialized). False saves the time of noting the generators' states.
        determinism_check: "none" takes what was recomputed as it is, whatever its shape.
        early_stop: False recomputes to the function's end, not only to the last tensor that backward needs.
        use_reentrant, context_fn, debug: torch's; anything but their defaults, which is done here, is a ValueError.

    CheckpointError: in backward, naming the tensor: the number, shape, dtype or device of the saved tensors differs
    from the forward pass, one was modified in place after it had been saved, or one is another parameter (of an adapter
    that was activated in between, say).
    """
    if not callable(func):
        raise TypeError(f"func must be callable, got {type(func).__name__}")
    for name, value in (("use_reentrant", use_reentrant), ("debug", debug), ("context_fn", context_fn)):
        if value not in (None, False, noop_context_fn):
            raise ValueError(f"{name} must be torch's default, got {value!r}")
    if determinism_check not in ("default", "none"):
        raise ValueError(f"determinism_check must be 'default' or 'none', got {determinism_check!r}")
    if not torch.is_grad_enabled():
        return func(*args, **kwargs)
    if torch.compiler.is_compiling():  # the compiler knows torch's own, which computes the same
        options = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
        return torch.utils.checkpoint.checkpoint(func, *args, **options, **kwargs)
    return _Region(func, preserve_rng_state, determinism_check == "default", early_stop).run(args, kwargs)


class CheckpointError(torch.utils.checkpoint.CheckpointError):
    """A recomputation did not repeat its forward pass, or could not be trusted to. It is a RuntimeError."""


class _Enough(BaseException):
    """Ends a recomputation early. Not an Exception, so that `except Exception` inside the function lets it pass."""


class _SaveInputs(torch.autograd.Function):
    """A node that is never run: autograd keeps the arguments in it, guarded against in-place changes, and inside
    another checkpoint they are forgotten and recomputed like everything else."""

    @staticmethod
    def forward(ctx, anchor, *tensors):
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)


class _Surroundings:
    """What a function reads beside its arguments: random generators, torch's autocast, torch function modes (such as
    `with torch.device(…)` and our own `amp.autocast`); backward runs outside of them."""

    def __init__(self, preserve_rng_state: bool):
        self.preserve_rng_state = preserve_rng_state
        if preserve_rng_state:
            self.cpu_state = torch.get_rng_state()
            self.cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.autocast = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in ("cpu", "cuda")]
        self.autocast_cache = torch.is_autocast_cache_enabled()
        self.modes = _get_current_function_mode_stack()

    @contextlib.contextmanager
    def restored(self):
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled, self.autocast_cache))
            active = set(map(id, _get_current_function_mode_stack()))
            for mode in self.modes:
                if id(mode) not in active:
                    stack.enter_context(mode)
            if self.preserve_rng_state:
                stack.enter_context(torch.random.fork_rng(devices=range(len(self.cuda_states))))
                torch.set_rng_state(self.cpu_state)
                if self.cuda_states:
                    torch.cuda.set_rng_state_all(self.cuda_states)
            yield


class _Slot:
    """Stands in the graph for one saved tensor. When its node is freed, the slot dies and is not filled again."""

    def __init__(self, index: int):
        self.index = index


def _traits(tensor: torch.Tensor) -> str:
    shape = "nested" if tensor.is_nested else f"shape {tuple(tensor.shape)}"  # nested sizes need not be numbers
    layout = "" if tensor.layout is torch.strided else f"{tensor.layout}, "
    return f"{shape}, {tensor.dtype}, {layout}on {tensor.device}"


def _source(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._base if tensor._is_view() else tensor


class _Region:
    """One checkpointed call: how to run it again, and the slots that backward may open."""

    def __init__(self, func: Callable, preserve_rng_state: bool, checked: bool, early_stop: bool):
        self.func, self.checked, self.early_stop = func, checked, early_stop
        self.surroundings = _Surroundings(preserve_rng_state)
        self.expected: list[tuple[str, str]] = []  # of each tensor that forward would have saved: traits, origin
        self.slots: weakref.WeakValueDictionary[int, _Slot] = weakref.WeakValueDictionary()  # those that still wait
        self.parameters = WeakTensorKeyDictionary()  # leaves that need a gradient → version
        self.read: dict[int, nn.Parameter] = {}  # slot index → the Parameter that was saved there
        self.saved_keywords: list[tuple[torch.Tensor, int]] = []  # and their versions
        # Graph task → slot index → tensor, and its version when the function saved it.
        self.recomputed: dict[int, dict[int, tuple[torch.Tensor, int]]] = {}

    @property
    def name(self) -> str:
        return getattr(self.func, "__qualname__", type(self.func).__name__)

    def run(self, args: tuple, kwargs: dict):
        had_cuda = torch.cuda.is_initialized()
        leaves, self.structure = tree_flatten((args, kwargs))
        self.keywords = {id(x): x._version for x in tree_leaves(kwargs) if isinstance(x, torch.Tensor)}
        self.keep(leaves)
        with saved_tensors_hooks(self.pack, self.unpack):
            outputs = self.func(*args, **kwargs)
        # Keywords that the function itself updates (running statistics), unless autograd had saved them before that.
        updated = {id(x) for x in leaves if self.keywords.get(id(x)) not in (None, getattr(x, "_version", None))}
        updated -= {id(x) for x, version in self.saved_keywords if x._version != version}
        if updated:
            self.keep(leaves, updated)
        self.saved_keywords.clear()
        if self.surroundings.preserve_rng_state and torch.cuda.is_initialized() and not had_cuda:
            raise CheckpointError(f"checkpoint: {self.name} used CUDA for the first time in this process, too late to "
                                  "note the state of its random generators; call torch.cuda.init() earlier, or pass "
                                  "preserve_rng_state=False")  # fmt: skip
        self.note_versions()
        return outputs

    def keep(self, leaves: list, unguarded: Collection[int] = ()) -> None:
        """Hold on to the arguments; tensors are guarded against changes in place, but for those with these ids."""
        tensors = {i: x for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and id(x) not in unguarded}
        self.tensor_places = list(tensors)
        self.constants = [None if i in tensors else leaf for i, leaf in enumerate(leaves)]
        # The result is kept, not its node alone: up to torch 2.11 what a node saved goes with its result.
        self.inputs = _SaveInputs.apply(torch.empty(0, requires_grad=True), *tensors.values())

    def arguments(self):
        leaves = list(self.constants)
        for place, tensor in zip(self.tensor_places, self.inputs.grad_fn.saved_tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.structure)

    def pack(self, tensor: torch.Tensor) -> _Slot:
        self.slots[len(self.expected)] = slot = _Slot(len(self.expected))
        origin = tensor.grad_fn.name() if tensor.grad_fn is not None else "an input, parameter or constant"
        self.expected.append((_traits(tensor), origin))
        source = _source(tensor)
        if source.is_leaf and source.requires_grad:
            self.parameters[source] = source._version
        if isinstance(source, nn.Parameter):
            self.read[slot.index] = source
        if id(source) in self.keywords:
            self.saved_keywords.append((source, source._version))
        return slot

    def unpack(self, slot: _Slot) -> torch.Tensor:
        task = torch._C._current_graph_task_id()  # -1 outside of backward: someone reads grad_fn's attributes
        tensor, version = self.recomputed.get(task, {}).pop(slot.index, (None, None))
        if tensor is None:
            tensors = self.recompute()
            tensor, version = tensors.pop(slot.index)
            if task != -1:
                if task not in self.recomputed:
                    # A backward that needs a part of the graph only would leave the other tensors behind. A weak
                    # reference: a region and its inputs go with their part of the graph.
                    region = weakref.ref(self)
                    queue = torch.autograd.Variable._execution_engine.queue_callback
                    queue(lambda: region() and region().recomputed.pop(task, None))
                self.recomputed[task] = tensors
        if tensor._version != version:  # what plain autograd refuses, too
            what = f"saved tensor #{slot.index} of {self.name} ({', from '.join(self.expected[slot.index])})"
            raise CheckpointError(f"checkpoint: {what} was modified by an inplace operation after it had been saved "
                                  f"(version {tensor._version}, not {version})")  # fmt: skip
        return tensor

    def recompute(self) -> dict[int, tuple[torch.Tensor, int]]:
        """Run the function again, up to the last tensor that a live slot waits for."""
        for source, version in self.parameters.items():  # what plain autograd refuses: one that was stepped meanwhile
            if source._version != version:
                raise CheckpointError(
                    f"checkpoint: a tensor of shape {tuple(source.shape)} that {self.name} needs for its gradient was "
                    f"modified in place after the forward pass (version {source._version}, expected {version}); "
                    "recomputing with it would give wrong gradients"
                )
        last = max(self.slots)
        tensors: dict[int, tuple[torch.Tensor, int]] = {}
        count, stopped, unfilled = 0, False, None
        args, kwargs = self.arguments()
        known = set(map(id, tree_leaves((args, kwargs))))

        def stop():
            nonlocal stopped
            if self.early_stop and not stopped:  # once: the function may have caught _Enough
                stopped = True
                raise _Enough

        def pack(tensor):
            nonlocal count, unfilled
            index, count = count, count + 1
            source, operation = _source(tensor), torch.autograd._get_sequence_nr()
            tensor = tensor.detach()  # returned with its grad_fn, an operation's own output would keep itself alive
            if index > last:
                stop()
                return tensor
            if source.grad_fn is None and not isinstance(source, nn.Parameter) and id(source) not in known:
                unfilled = operation  # it may fill the tensor only after saving it, as rrelu does with its noise
            traits, origin = self.expected[index]
            if self.checked and _traits(tensor) != traits:
                raise CheckpointError(f"checkpoint: saved tensor #{index} of {self.name} ({traits}, from {origin}) was "
                                      f"recomputed with {_traits(tensor)}. It must do the same every time.")
            before = self.read.get(index, source)
            if self.checked and before is not source and not torch.equal(before, source):
                raise CheckpointError(f"checkpoint: saved tensor #{index} of {self.name} ({traits}) was another "
                                      "parameter in the forward pass. Activate adapters, and exchange weights, before "
                                      "it or after the backward pass.")  # fmt: skip
            if index in self.slots:
                tensors[index] = tensor, tensor._version
            if index == last and unfilled != operation:
                stop()
            return tensor

        with (contextlib.suppress(_Enough), self.surroundings.restored(), torch.enable_grad(),
              saved_tensors_hooks(pack, lambda tensor: tensor)):  # fmt: skip
            self.func(*args, **kwargs)
        if count > last:
            self.note_versions()
            return tensors
        raise CheckpointError(f"checkpoint: {self.name} saved {len(self.expected)} tensors in the forward pass, but "
                              f"only {count} when it was recomputed; missing is #{count}: "
                              f"{', from '.join(self.expected[count])}. It must do the same every time.")  # fmt: skip

    def note_versions(self) -> None:
        for source in list(self.parameters):
            self.parameters[source] = source._version
