"""A linear layer whose frozen weight lies in NF4.

    y = x Wᵀ + b        dx = dy W        no dW: the weight is frozen

W (out, in) is never saved dense: keeping it is what four bits are there to avoid. `kernels/nf4_matmul.py` decides
whether it is made dense for the length of one product, in forward and again in backward.
Memory: 0.516 bytes per weight, plus one dense weight while such a product runs.

Dtypes, in this order: `torch.autocast` casts x as it would for `nn.Linear`; the product is computed in
`compute_dtype`, or in x's dtype where that is None; the result has x's dtype.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.overrides import has_torch_function

from ..kernels.nf4 import DTYPES, NestedScales, check_layout, flatten, unflatten
from ..kernels.nf4_matmul import nf4_experts, nf4_matmul
from ..kernels.runtime import traced
from .nf4 import FACTS, PARTS, NF4Tensor, check_options, nf4_zeros, quantize_nf4


def _product(x, weight, bias, transposed, ends):
    """x @ Wᵀ + bias if `transposed`, else x @ W; with `ends` for x sorted by experts, and the weight of all of them."""
    if ends is not None:
        return nf4_experts(x, weight, transposed, ends)
    return nf4_matmul(x, weight, bias, transposed)


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that a linear layer would see: under autocast, autocast's (which leaves fp64 alone)."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _watched(x: torch.Tensor) -> bool:
    """Whether the product must be one operation: to `torch.compile`, autocast, and modes such as `amp.autocast`."""
    return x.is_meta or traced(x) or has_torch_function((x,)) or torch.is_autocast_enabled(x.device.type)


@torch.library.custom_op("handtuned::nf4_linear", mutates_args=())
def _nf4_linear_op(
    x: torch.Tensor, weight: Sequence[torch.Tensor], sizes: Sequence[int], bias: torch.Tensor | None, transposed: bool,
    ends: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """`_product` as one operation, the weight flattened."""
    with torch.autocast(x.device.type, enabled=False):
        return _product(x, unflatten(weight, sizes), bias, transposed, ends)


@_nf4_linear_op.register_fake
def _(x, weight, sizes, bias, transposed, ends):
    N, K = sizes[1:3] if ends is None else sizes[2:4]
    return x.new_empty(*x.shape[:-1], N if transposed else K)


class NF4Product(torch.autograd.Function):
    """Its gradient is itself with `transposed` flipped, so it can be differentiated any number of times."""

    @staticmethod
    def forward(ctx, x, weight, sizes, bias, transposed, ends=None):
        ctx.save_for_backward(ends, *weight)
        ctx.sizes, ctx.transposed = sizes, transposed
        if _watched(x):
            return _nf4_linear_op(x, weight, sizes, bias, transposed, ends)
        return _product(x, unflatten(weight, sizes), bias, transposed, ends)

    @staticmethod
    def backward(ctx, dy):
        (ends, *weight), needs_x, needs_bias = ctx.saved_tensors, ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        dx = NF4Product.apply(dy, weight, ctx.sizes, None, not ctx.transposed, ends) if needs_x else None
        dbias = dy.reshape(dy.shape[:-1].numel(), dy.shape[-1]).sum(0) if needs_bias else None
        return dx, None, None, dbias, None, None


def lies_transposed(kind: type) -> bool:
    """Whether linear layers of this class hold their weight as (in, out): GPT-2's Conv1D."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def dense_layer(kind: type, weight: torch.Tensor, bias: nn.Parameter | None, training: bool) -> nn.Module:
    """A linear layer of this class with a frozen weight, here (out, in)."""
    with torch.device("meta"):
        if lies_transposed(kind):
            layer, weight = kind(*weight.shape), weight.t().contiguous()
        else:
            layer = kind(*weight.shape[::-1], bias=False)
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), bias
    return layer.train(training)


class FrozenNF4(nn.Module):
    """What modules with a `weight` in 4 bits share: codes and scales keep their dtypes."""

    def _apply(self, fn, recurse=True):
        """Everything that moves or casts a module comes through here: codes and scales move, but are never cast."""
        frozen = {id(tensor) for tensor in (self.weight, *self._buffers.values())}

        def moved(tensor):
            result = fn(tensor)
            cast = id(tensor) in frozen and result.dtype != tensor.dtype
            return tensor.to(result.device) if cast else result

        return super()._apply(moved, recurse)


class NF4Linear(FrozenNF4):
    """y = x Wᵀ + b with W frozen in NF4.

    `state_dict` holds the keys and bytes of bitsandbytes' Linear4bit, and either loads the other's. Changing
    the module's dtype (`.half()`, `.to(torch.bfloat16)`) changes the bias; codes and scales keep theirs.

    Args:
        in_features: K.
        out_features: N.
        bias: with a bias (N,).
        block_size: weights that share a scale.
        double_quant: scales in 8 bits.
        compute_dtype: dtype of the product; None: that of x.
        device: "meta" for a layer to be filled by `load_state_dict(assign=True)` or `load_quantized`.
        dtype: of the bias, and what `dequantize` gives; float32, float16 or bfloat16.

    Attributes:
        weight: (⌈N K / 2⌉, 1) uint8, the codes.
        quantized: the weight as an NF4Tensor over the same memory; may be assigned.

    A new layer's weight is zero.

    Raises:
        TypeError, ValueError: a dtype or `block_size` is not one of those named.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, block_size: int = 64, double_quant: bool = True,
        compute_dtype: torch.dtype | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__()
        check_options(block_size, compute_dtype, dtype)
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, compute_dtype
        self.dense_class = nn.Linear  # what `dequantize` gives; GPT-2's Conv1D holds its weight transposed
        packed, absmax, nested = nf4_zeros(out_features * in_features, block_size, double_quant, device)
        for name in ("absmax", "nested_absmax", "nested_code", "nested_offset"):
            self.register_buffer(name, None, persistent=False)
        self.quantized = NF4Tensor(packed, absmax, torch.Size((out_features, in_features)), dtype, block_size, nested)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @property
    def quantized(self) -> NF4Tensor:
        held, nested = self._buffers, None  # read at once: every forward pass comes by here
        weight = self._parameters.get("weight")  # of a replica of nn.DataParallel a plain attribute
        if held["nested_absmax"] is not None:
            nested = NestedScales(held["nested_absmax"], held["nested_code"], held["nested_offset"], self.nested_block)
        packed = (self.weight if weight is None else weight).view(-1)
        shape = torch.Size((self.out_features, self.in_features))
        return NF4Tensor(packed, held["absmax"], shape, self.weight_dtype, self.block_size, nested)

    @quantized.setter
    def quantized(self, q: NF4Tensor) -> None:
        if q.shape != (self.out_features, self.in_features):
            raise ValueError(f"quantized must be {self.out_features} × {self.in_features}, got {tuple(q.shape)}")
        check_layout(q, "quantized")
        self.weight = nn.Parameter(q.packed.view(-1, 1), requires_grad=False)
        self.absmax, self.block_size, self.weight_dtype = q.absmax, q.block_size, q.dtype
        self.nested_absmax, self.nested_code, self.nested_offset, self.nested_block = q.nested or (None,) * 3 + (1,)

    def operand(self) -> NF4Tensor:
        """`quantized` for a product, which notes in `_seen` where it found the parts as they should be."""
        made = self.quantized
        made.seen = self.__dict__.setdefault("_seen", [])
        return made

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, block_size: int = 64, double_quant: bool = True,
        compute_dtype: torch.dtype | None = None, *, name: str = "linear",
    ) -> "NF4Linear":  # fmt: skip
        """Quantize an nn.Linear, which is not changed. A layer on the meta device gives one on meta.

        The bias is shared. Options are those of the class; error messages call the layer `name`.

        Raises:
            TypeError: not an nn.Linear, or not of a float dtype that NF4 knows.
            ValueError: the weight holds NaN or infinity.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} must be an nn.Linear, got {type(linear).__name__}")
        if linear.weight.dtype not in DTYPES:
            raise TypeError(f"{name}.weight must be float32, float16 or bfloat16, got {linear.weight.dtype}")
        N, K = linear.weight.shape
        meta = {"device": "meta", "dtype": linear.weight.dtype}
        layer = cls(K, N, False, block_size, double_quant, compute_dtype, **meta)
        if not (linear.weight.is_meta or traced(linear.weight)):
            layer.quantized = quantize_nf4(linear.weight, block_size, double_quant, name=f"{name}.weight")
        layer.bias = linear.bias
        return layer.train(linear.training)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The same values in `dtype` (None: the original one), frozen, with a bias of their own, in a dense layer of
        the class that `quantize_model` found there."""
        return dense_layer(self.dense_class, self.quantized.dequantize(dtype), copy.deepcopy(self.bias), self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in_features), floating point → (…, out_features), same dtype."""
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise ValueError(f"x must be floating point (…, {self.in_features}), got {x.dtype} {tuple(x.shape)}")
        x = autocast_input(x)
        compute = self.compute_dtype or x.dtype
        bias = self.bias
        if bias is not None:
            if bias.shape != (self.out_features,):
                raise ValueError(f"bias must be ({self.out_features},), got {tuple(bias.shape)}")
            bias = bias.to(compute)
        h = x if x.dtype == compute else x.to(compute)  # asked first: `.to` takes time even where it changes nothing
        if _watched(h) or (torch.is_grad_enabled() and (h.requires_grad or (bias is not None and bias.requires_grad))):
            y = NF4Product.apply(h, *flatten(self.operand()), bias, True)
        else:
            y = _product(h, self.operand(), bias, True, None)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for part, tensor in self.quantized.scale_state().items():
            destination[f"{prefix}weight.{part}"] = tensor

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        key = prefix + "weight"
        rest = dict(state_dict)
        if key in state_dict:
            for part in (*PARTS, FACTS):
                rest.pop(f"{key}.{part}", None)
            rest[key] = self.weight.data
            try:
                q = NF4Tensor.from_state_dict(state_dict, prefix)
                assign = local_metadata.get("assign_to_params_buffers", False)
                self.quantized = q if assign else q.to(self.weight.device, copy=True)
                rest[key] = q.packed.view(-1, 1)
            except ValueError as error:
                errors.append(f"{key}: {error}")
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        scales = f"block_size={self.block_size}, double_quant={self.nested_absmax is not None}"
        return f"{sizes}, {scales}, compute_dtype={self.compute_dtype}"
