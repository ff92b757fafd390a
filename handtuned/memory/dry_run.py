"""A training step on tensors that have no memory (`fake.py`), and where every byte of it would lie, and when."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..nn.checkpoint import checkpoint
from ..nn.checkpoint_layers import checkpoint_layers, repeated_layers
from ..nn.checkpoint_plan import split_evenly
from ..nn.live_memory import LiveMemory
from ..training.evaluation import base_of
from .fake import FakeLM, aten
from .tracker import loss_of

KINDS = {"norm|ln": "norms", "attn|attention|mixer|mamba|conv": "attention", "": "MLP"}  # name of a layer's part → kind
PREFIX = "activations: "


def _lora_flops(x, weight, sizes, bias, A, B, *rest, out_val):
    return 2 * x.shape[0] * (B.shape[0] * A.shape[1] + A.shape[0] * (A.shape[1] + B.shape[0]))


def _lora_backward_flops(dy, x, S, weight, sizes, A, B, *rest, out_val):
    return 2 * dy.shape[0] * (B.shape[0] * A.shape[1] + 2 * A.shape[0] * (A.shape[1] + B.shape[0]))


FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_efficient_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_efficient_attention_backward],
    torch.ops.handtuned.lora_linear: _lora_flops,
    torch.ops.handtuned.lora_linear_backward: _lora_backward_flops,
    torch.ops.handtuned.nf4_linear: lambda x, *rest, out_val: 2 * x.numel() * out_val.shape[-1],
}  # fmt: skip


class Part(NamedTuple):
    """A part of a step: its name, the layer that it belongs to, its FLOPs, and component → changes of its bytes."""

    name: str
    layer: str | None
    flops: int
    changes: dict[str, np.ndarray]


class Trace(LiveMemory):
    """What happens to memory in one forward and backward pass of a model, event by event.

    `checkpointed`: whether the layers are; `stands_for`: path of a layer → those of the layers that it stands for,
    where not for itself alone.
    """

    def __init__(self, vocabulary: int, seq: int, checkpointed: bool, stands_for: dict[str, list[str]]):
        super().__init__(scan=False)
        self.vocabulary, self.seq, self.checkpointed, self.stands_for = vocabulary, seq, checkpointed, stands_for
        self.events: list[tuple[int, int]] = []  # number of the storage, bytes it grew or, below 0, shrank by
        self.flops = 0
        # Of each part of the pass, in order: index of the first event, FLOPs so far, name, layer.
        self.marks: list[tuple[int, int, str, str | None]] = [(0, 0, "forward", None)]
        self.calls: list[list] = [["residual stream", None]]  # kind, index of the event where the call ended
        self.call = 0
        self.made: dict[int, tuple] = {}  # number → index of its first event, call, whether it holds scores, or logits
        self.labels: dict[int, str] = {}  # number → component, of what is known by name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if count := FLOPS.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        if func.overloadpacket is torch.ops.handtuned.lora_linear:
            self.labels[self.number(result[1])] = PREFIX + "adapters"
        return result

    def _change(self, difference, number, tensor=None):
        super()._change(difference, number, tensor)
        self.events.append((number, difference))
        if tensor is not None and number not in self.made:
            scores = tensor.shape[-2:] == (self.seq, self.seq)
            logits = self.call == 0 and tensor.shape[-1:] == (self.vocabulary,)
            self.made[number] = len(self.events) - 1, self.call, scores, logits

    def number(self, tensor: torch.Tensor) -> int:
        return self._storages[id(tensor.untyped_storage())][2]

    def mark(self, name: str, layer: str | None = None) -> None:
        self.marks.append((len(self.events), self.flops, name, layer))

    @contextmanager
    def inside(self, kind: str) -> Iterator[None]:
        outer, self.call = self.call, len(self.calls)
        self.calls.append([kind, None])
        try:
            yield
        finally:
            self.calls[self.call][1] = len(self.events)
            self.call = outer

    def follow(self, model: nn.Module) -> None:
        """Note the comings and goings of a model's repeated layers, of the parts of each, and of the body they form."""
        base = base_of(model) or model
        body = base.forward

        def run(*args, **kwargs):
            result = body(*args, **kwargs)
            self.mark("loss")
            return result

        base.forward = run
        for path, layer in repeated_layers(model).items():
            for name, part in layer.named_children():
                kind = next(kind for pattern, kind in KINDS.items() if re.search(pattern, name))
                part.forward = self.inside(kind)(part.forward)
            layer.forward = self._layer(path, layer.forward)

    def _layer(self, path: str, forward):
        def run(*args, **kwargs):
            again = torch._C._current_graph_task_id() != -1  # recomputed
            first = len(self.marks) == 1
            if not again:
                self.mark("forward of", path)
            with self.inside("checkpoints" if self.checkpointed and not again else "residual stream"):
                result = forward(*args, **kwargs)
            if not again:
                _note_gradient(result, lambda: self.mark("backward of", path))
                if first:
                    _note_gradient((args, kwargs), lambda: self.mark("backward of the embedding"))
            return result

        return run

    def parts(self) -> list[Part]:
        """The parts of the pass in order, those of the layers that another one stands for included."""
        died = {number: index for index, (number, difference) in enumerate(self.events) if difference < 0}
        loss = next(index for index, _, name, _ in self.marks if name == "loss")
        for number, (born, call, scores, logits) in self.made.items():
            kind, end = self.calls[call]
            end = loss if end is None else end
            if logits:
                kind = "logits"
            elif not born < end <= died.get(number, len(self.events)):
                kind = "buffers"
            else:
                kind = PREFIX + ("attention scores" if scores and kind == "attention" else kind)
            self.labels.setdefault(number, kind)
        names = {*self.labels.values(), "gradients", "buffers"}
        changes, given = ({name: np.zeros(len(self.events), dtype=np.int64) for name in names} for _ in range(2))
        _, (begun, _, _, first), *others = self.marks
        for index, (number, difference) in enumerate(self.events):
            if number in self.labels:  # else it was there before
                # The embeddings go when the body returns, unless the plan of the first layer keeps them.
                early = number in self.made and self.made[number][0] < begun and others[0][0] <= index < loss
                (given if early else changes)[self.labels[number]][index] = difference
        ends = [*self.marks[1:], (len(self.events), self.flops, "", None)]
        parts = []
        for (start, flops, what, layer), (stop, after, _, _) in zip(self.marks, ends, strict=True):
            rows = {component: row[start:stop] for component, row in changes.items()}
            layers = self.stands_for.get(layer, [layer])
            if what == "loss":
                parts.append(Part(what, first, 0, given))
            for each in reversed(layers) if what == "backward of" else layers:
                parts.append(Part(f"{what} {each}" if each else what, each, after - flops, rows))
        return parts


def _note_gradient(value, action) -> None:
    """Call `action` when backward has the gradient of the first tensor in `value` that gets one."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            leaf.register_hook(lambda gradient: action())
            return


def dry_step(model: nn.Module, batch: dict[str, torch.Tensor], dtype: torch.dtype, checkpointed: bool | int = False,
             held: bool = False, logits: str = "chunked") -> Trace:  # fmt: skip
    """Trace one forward and backward pass of a fake model, within `SizesOnly`. The model is changed: use it once.

    Args:
        batch: "input_ids" and "labels", (rows, length), real.
        dtype: of the computation, by autocast.
        checkpointed: whether each layer is recomputed; or a number of segments, of which the last is kept.
        held: gradients of an earlier pass are there already.
        logits: "chunked", or "full": transformers' own loss.
    """
    stands_for = _shorten(model) if isinstance(checkpointed, bool) else {}
    lm = FakeLM(model.train(), torch.zeros((1, 8), dtype=torch.long))
    sizes = model.config.get_text_config().vocab_size, batch["input_ids"].shape[1]
    trace = Trace(*sizes, checkpointed is True, stands_for)
    trace.follow(model)
    if not isinstance(checkpointed, bool):
        _checkpoint_segments(list(repeated_layers(model).values()), checkpointed)
    elif checkpointed:
        checkpoint_layers(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if held else None
    with trace:
        loss = loss_of(lm, batch, dtype, logits)
        trace.mark("backward of the head")
        loss.backward()
    del loss
    for parameter in trained:
        if not held and parameter.grad is not None:
            trace.labels[trace.number(parameter.grad)] = "gradients"
    return trace


def _shorten(model: nn.Module) -> dict[str, list[str]]:
    """Of more than three equal layers leave the first, the second and the last: path of the second → of all within. A
    model whose layers are not all equal is left whole."""
    layers = repeated_layers(model)
    parents = {path.rpartition(".")[0] for path in layers}
    if len(layers) <= 3 or len(parents) != 1 or len({_description(layer) for layer in layers.values()}) != 1:
        return {}
    _, second, *more, _ = layers
    for path in more:
        model.get_submodule(*parents)._modules.pop(path.rpartition(".")[2])
    return {second: [second, *more]}


def _description(layer: nn.Module) -> str:
    """All that decides what a layer does: classes, parameters, plain settings, but not its number."""
    settings = [(name, type(module).__name__, {key: value for key, value in vars(module).items()
                                               if isinstance(value, (int, float, str, bool)) and "idx" not in key})
                for name, module in layer.named_modules()]  # fmt: skip
    return f"{settings} {[(n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters()]}"


def _checkpoint_segments(layers: list[nn.Module], count: int) -> None:
    """One checkpoint around the layers of each segment, run where its first layer stands."""
    for segment in split_evenly(len(layers), count):
        if segment.recompute:
            parts = [layer.forward for layer in layers[segment.start : segment.stop]]

            def chain(x, *args, parts=parts, **kwargs):
                for part in parts:
                    x = part(x, *args, **kwargs)
                return x

            for layer in layers[segment.start : segment.stop]:
                layer.forward = lambda x, *args, **kwargs: x
            layers[segment.start].forward = partial(checkpoint, chain)
