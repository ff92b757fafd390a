"""A linear layer whose frozen weight lives in NF4."""

import threading

import torch
from torch import nn

from ..kernels.nf4 import NestedScales, nf4_dequantize
from .nf4 import NF4Tensor, quantize_nf4

_LOCAL = threading.local()


def _weight(packed, absmax, nested, shape, block_size, dtype):
    """Dequantize into memory that this thread reuses on a CPU, where fresh pages cost more than the work."""
    if packed.is_cuda:
        return nf4_dequantize(packed, absmax, shape, dtype, block_size, nested)
    size = shape[0] * shape[1]
    scratch = getattr(_LOCAL, "scratch", None)
    if scratch is None or scratch.numel() < size:
        scratch = _LOCAL.scratch = torch.empty(size)
    out = scratch[:size].view(shape)
    nf4_dequantize(packed, absmax, shape, torch.float32, block_size, nested, out)
    if dtype != torch.float32:
        out.copy_(out.to(dtype))
    return out


@torch.library.custom_op("handtuned::nf4_matmul", mutates_args=())
def nf4_matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    nested_block_size: int,
    out_features: int,
    in_features: int,
    block_size: int,
    transposed: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x @ Wᵀ + bias if `transposed`, else x @ W; W is dequantized for the length of this call only."""
    nested = None
    if nested_absmax is not None:
        nested = NestedScales(nested_absmax, nested_code, nested_offset, nested_block_size)
    with torch.autocast(x.device.type, enabled=False):
        weight = _weight(packed, absmax, nested, (out_features, in_features), block_size, x.dtype)
        weight = weight.t() if transposed else weight
        rows = x.reshape(-1, x.shape[-1])
        if weight.dtype == x.dtype:
            y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        else:
            y = rows.float() @ weight
            y = (y if bias is None else y.add_(bias)).to(x.dtype)
    return y.view(*x.shape[:-1], weight.shape[1])


@nf4_matmul.register_fake
def _(x, packed, absmax, na, nc, no, nb, out_features, in_features, block_size, transposed, bias):
    return x.new_empty(*x.shape[:-1], out_features if transposed else in_features)


def _setup_context(ctx, inputs, output):
    _x, *weight, transposed, bias = inputs
    ctx.save_for_backward(*weight[:5])
    ctx.facts = weight[5:]
    ctx.transposed = transposed
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = nf4_matmul(dy, *ctx.saved_tensors, *ctx.facts, not ctx.transposed, None)
    if ctx.needs_input_grad[11]:
        db = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
    return dx, *[None] * 10, db


nf4_matmul.register_autograd(_backward, setup_context=_setup_context)


class NF4Linear(nn.Module):
    """y = x Wᵀ + b with W frozen in NF4."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device=None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.compute_dtype, self.weight_dtype = block_size, compute_dtype, dtype
        size = in_features * out_features
        blocks = -(-size // block_size)
        new = {"device": device}
        self.weight = nn.Parameter(torch.zeros((size + 1) // 2, 1, dtype=torch.uint8, **new), requires_grad=False)
        absmax = torch.zeros(blocks, dtype=torch.uint8 if double_quant else torch.float32, **new)
        self.register_buffer("absmax", absmax, persistent=False)
        self.nested_block_size = 256
        for name, shape in (("absmax", (-(-blocks // 256),)), ("code", (256,)), ("offset", ())):
            buffer = torch.zeros(shape, **new) if double_quant else None
            self.register_buffer(f"nested_{name}", buffer, persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, **new)) if bias else None

    @property
    def quantized(self) -> NF4Tensor:
        """The weight as an NF4Tensor that shares this layer's memory."""
        nested = None
        if self.nested_absmax is not None:
            nested = NestedScales(self.nested_absmax, self.nested_code, self.nested_offset, self.nested_block_size)
        shape = torch.Size((self.out_features, self.in_features))
        return NF4Tensor(self.weight.view(-1), self.absmax, shape, self.weight_dtype, self.block_size, nested)

    @quantized.setter
    def quantized(self, q: NF4Tensor):
        self.weight = nn.Parameter(q.packed.view(-1, 1), requires_grad=False)
        self.absmax = q.absmax
        self.block_size, self.weight_dtype = q.block_size, q.dtype
        self.nested_absmax = self.nested_code = self.nested_offset = None
        if q.nested is not None:
            self.nested_absmax, self.nested_code, self.nested_offset, self.nested_block_size = q.nested

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int = 64, double_quant: bool = True, compute_dtype=None):
        q = quantize_nf4(linear.weight, block_size, double_quant, name="linear.weight")
        layer = cls(
            linear.in_features, linear.out_features, False, block_size, double_quant, compute_dtype, "meta",
            linear.weight.dtype,
        )
        layer.quantized = q
        layer.bias = linear.bias
        return layer.train(linear.training)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.quantized.dequantize(dtype), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        compute = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(compute)
        y = nf4_matmul(
            x.to(compute), self.weight, self.absmax, self.nested_absmax, self.nested_code, self.nested_offset,
            self.nested_block_size, self.out_features, self.in_features, self.block_size, True, bias,
        )
        return y.to(x.dtype)

    def _apply(self, fn, recurse=True):
        before = {"weight": self.weight.data} | dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                kept = old.to(new.device)
                if name == "weight":
                    self.weight = nn.Parameter(kept, requires_grad=False)
                else:
                    self._buffers[name] = kept
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.quantized.state_dict(prefix))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        if prefix + "weight" in state_dict:
            self.quantized = NF4Tensor.from_state_dict(state_dict, prefix).to(self.weight.device)
        own = prefix + "weight."
        rest = {key: value for key, value in state_dict.items() if not key.startswith(own)}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
