"""Models whose tensors have sizes and no memory.

Under torch's `FakeTensorMode` an operation on fake tensors gives fake tensors of the right shape, dtype, views and
lifetime, and computes nothing. So the real model of any architecture, built from its config, runs its own forward and
backward pass, a 70B model on a laptop in seconds, and needs no formula.

Numbers that decide what is computed, positions, masks and the labels of the loss, are integers and booleans; they stay
real. Where they come out of fake numbers they are made up: a router of a mixture of experts sends equally many tokens
to each expert.
"""

import copy
import io
from collections.abc import Sequence
from contextlib import redirect_stderr

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..quant import quantize_model
from ..training.evaluation import CausalLM, base_of
from ..training.loading import auto_class, left_dense
from ..training.sources import quantization_of

aten = torch.ops.aten


class SizesOnly(FakeTensorMode):
    """Within it floating-point tensors, and the codes of NF4, are fake; other integers and booleans are real."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        fake = any(isinstance(tensor, FakeTensor) for tensor in given)
        if not fake and (given or _gives_integers(func, args, kwargs)):
            return func(*args, **kwargs)
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):  # a mask decides about the shape
            places = [i.nonzero().unbind(1) if i is not None and i.dtype == torch.bool else (i,) for i in args[1]]
            args = args[0], [place for part in places for place in part], *args[2:]
        args, kwargs = tree_map(self._fake, (args, kwargs))
        if func.overloadpacket is aten._grouped_mm and args[0].dtype != torch.bfloat16:  # its fake knows no other dtype
            low = [t.to(torch.bfloat16) if isinstance(t, FakeTensor) and t.is_floating_point() else t for t in args]
            return func(*low, **kwargs).to(args[0].dtype)
        made = super().__torch_dispatch__(func, types, args, kwargs)
        return tree_map(lambda result: _made_up(result, given), made)

    def _fake(self, value):
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        return FakeTensor(self, torch.empty_like(value, device="meta"), value.device)


def _is_number(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex or dtype == torch.uint8


def _gives_integers(func, args, kwargs) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not _is_number(dtype)
    by_value = func.overloadpacket in (aten.arange, aten.full, aten.scalar_tensor, aten.randint)
    return by_value and not any(isinstance(value, float) for value in tree_leaves(args))


def _made_up(result, given: list[torch.Tensor]):
    """Real numbers in the place of fake integers: 0, 1, … below the size of the dimension that they may index."""
    if not isinstance(result, FakeTensor) or _is_number(result.dtype):
        return result
    if result.dtype == torch.bool:
        return torch.zeros(result.shape, dtype=torch.bool)
    choices = max(1, given[0].shape[-1] if given[0].dim() else 1)
    return (torch.arange(result.numel()) % choices).view(result.shape).to(result.dtype)


def build(config, dtype: torch.dtype, quantized: bool = False, skip: Sequence[str] = (), flash: bool = True,
          trust_remote_code: bool = False) -> nn.Module:  # fmt: skip
    """The causal LM of a config, within `SizesOnly`, every parameter frozen; `quantized`: its linears in NF4, but for
    those to `skip` and those that the files keep in 16 bits on purpose."""
    import transformers

    stored, config = quantization_of(config.to_dict()), copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    told = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    told |= {} if flash else {"attn_implementation": "eager"}
    model = getattr(transformers, auto_class(config)).from_config(config, **told)
    if quantized:
        with redirect_stderr(io.StringIO()):  # no bar
            quantize_model(model, ("lm_head", *skip, *left_dense(model, stored)))
    for module in model.modules():  # what is new in NF4 is on the meta device
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    there = torch.empty_like(tensor, device="cpu")
                    held[name] = nn.Parameter(there, False) if isinstance(tensor, nn.Parameter) else there
    return model.requires_grad_(False)


class FakeLM(CausalLM):
    """A `CausalLM` that cannot compare logits: it looks at the operations that follow the body."""

    def _only_applies(self, head, sample):
        operations = _Operations()
        handles = [base_of(self.model).register_forward_hook(lambda *call: operations.names.clear()),
                   head.register_forward_hook(lambda *call: operations.names.append("head"))]  # fmt: skip
        with torch.no_grad(), operations:
            self.model(input_ids=sample, use_cache=False)
        for handle in handles:
            handle.remove()
        return operations.names[-1] == "head" and len(operations.names) <= 3  # the product, as one operation or two


class _Operations(TorchDispatchMode):
    """Which operations ran, in order, but for views."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and isinstance(func, torch._ops.OpOverload) and func.namespace == "aten":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
