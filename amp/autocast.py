"""Autocast by hand: look at every torch call, and cast its tensors by what the operation needs.

Three lists, those of torch's autocast on CUDA, are the whole idea:

    LOW      products: tensor cores want 16-bit operands and add up in float32 inside
    HIGH     exponentials, powers, sums, norms, losses: 16 bits overflow or round away
             (fp16 exp(11.1) is infinite; a sum stops growing where the spacing exceeds the addend)
    WIDEST   ops that insist on one dtype: the widest among the inputs

Any other operation (add, relu, reshape, …) takes what it gets. The casts are ordinary differentiable ops, so an FP32
weight gets an FP32 gradient.

A `TorchFunctionMode` is asked before each call of torch's Python interface. It does not see what such a function calls
inside, nor a forward pass that `torch.utils.checkpoint` repeats. `torch.autocast`, below all that, is for real use.
"""

import threading
from contextlib import ContextDecorator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only


def autocast_reference(function, *tensors, dtype=torch.float16):
    """What `autocast(dtype)` makes of the call `function(*tensors)`."""
    target = cast_dtype(function.__name__, [x.dtype for x in tensors], dtype)
    return function(*(x.to(target or x.dtype) for x in tensors))


def cast_dtype(name: str, dtypes: list[torch.dtype], low: torch.dtype) -> torch.dtype | None:
    """The dtype that the operation `name` wants for its tensors, which have `dtypes`; None: as they are."""
    if name in LOW:
        return low
    if name in HIGH or (name in WIDEST and torch.float32 in dtypes):
        return torch.float32
    return None


LOW = {
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "linear", "addmm", "addmv", "addbmm", "baddbmm", "addr",
    "einsum", "chain_matmul", "linalg_matmul", "linalg_multi_dot", "linalg_vecdot", "matrix_power",
    "linalg_matrix_power", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "prelu", "scaled_dot_product_attention", "multi_head_attention_forward", "lora_linear", "lstm_cell", "gru_cell",
    "rnn_tanh_cell", "rnn_relu_cell", "lstm", "gru", "rnn_tanh", "rnn_relu",
}  # fmt: skip
HIGH = {
    "exp", "expm1", "special_expm1", "log", "log2", "log10", "log1p", "special_log1p", "pow", "square", "__pow__",
    "__rpow__", "reciprocal", "__rdiv__", "__rtruediv__", "rsqrt", "acos", "arccos", "asin", "arcsin", "cosh", "sinh",
    "tan", "erfinv", "special_erfinv", "softplus", "sum", "prod", "cumsum", "cumprod", "norm", "linalg_norm",
    "linalg_vector_norm", "linalg_matrix_norm", "dist", "cdist", "pdist", "pairwise_distance", "renorm", "logsumexp",
    "special_logsumexp", "cosine_similarity", "normalize", "softmax", "special_softmax", "softmin", "gumbel_softmax",
    "log_softmax", "special_log_softmax", "layer_norm", "group_norm", "rms_norm", "cross_entropy", "nll_loss",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss",
    "huber_loss", "poisson_nll_loss", "gaussian_nll_loss", "hinge_embedding_loss", "cosine_embedding_loss",
    "margin_ranking_loss", "soft_margin_loss", "multi_margin_loss", "multilabel_margin_loss",
    "multilabel_soft_margin_loss", "triplet_margin_loss", "triplet_margin_with_distance_loss", "interpolate",
}  # fmt: skip
WIDEST = {
    "addcdiv", "addcmul", "atan2", "bilinear", "cat", "cross", "grid_sample", "dot", "inner", "stack", "tensordot",
    "vdot", "index_put", "scatter_add",
}  # fmt: skip

_thread = threading.local()


def _scopes() -> list["autocast"]:
    """The autocast blocks that this thread is in, outermost first."""
    return _thread.__dict__.setdefault("scopes", [])


def _castable(x) -> bool:
    """float64 is left alone: who uses it wants it."""
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _widen_recurrent_input(module: torch.nn.Module, args: tuple) -> tuple | None:
    """torch's LSTM, GRU and RNN refuse, before any operation, an input that is not of their weights' dtype."""
    if not isinstance(module, torch.nn.RNNBase) or not args or not _scopes() or not _scopes()[-1].enabled:
        return None
    x, weight = args[0], next(module.parameters())
    packed = isinstance(x, torch.nn.utils.rnn.PackedSequence)
    return (x.to(weight.dtype), *args[1:]) if _castable(x.data if packed else x) and _castable(weight) else None


class autocast(ContextDecorator, TorchFunctionMode):
    """Run the block's operations in `dtype` where that is safe and in float32 where it is not.

        with autocast(torch.float16):
            loss = F.cross_entropy(model(x), y)     # products in fp16, softmax and loss in fp32
        scaler.scale(loss).backward()               # outside of the block

    Blocks nest, and the innermost decides: `autocast(enabled=False)` switches casting off within. A weight is cast
    once for the whole outermost block, not once for every use. ValueError: another dtype than float16 and bfloat16.
    """

    def __init__(self, dtype: torch.dtype = torch.float16, enabled: bool = True):
        super().__init__()
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype}")
        self.dtype, self.enabled = dtype, enabled
        self.cache: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self.hooks: list = []  # one for each time that the block is entered

    def __enter__(self):
        _scopes().append(self)
        self.hooks.append(torch.nn.modules.module.register_module_forward_pre_hook(_widen_recurrent_input))
        return super().__enter__()

    def __exit__(self, *error):
        self.hooks.pop().remove()
        _scopes().pop()
        if not _scopes():
            self.cache.clear()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, scopes = kwargs or {}, _scopes()
        # Outer blocks are asked too, after inner ones; a result dtype or place that was asked for is kept.
        asked = kwargs.get("dtype") is not None or kwargs.get("out") is not None
        if self.enabled and scopes and scopes[-1] is self and not asked:
            dtypes = [x.dtype for x in tree_iter((args, kwargs)) if _castable(x)]
            target = cast_dtype(getattr(func, "__name__", ""), dtypes, self.dtype)
            if target is not None:
                # Of `lora_linear` x alone, as under torch.autocast: the adapter stays FP32 inside.
                count = 1 if func.__name__ == "lora_linear" else len(args)
                cast, kwargs = tree_map_only(torch.Tensor, lambda x: self._cast(x, target), (args[:count], kwargs))
                args = (*cast, *args[count:])
        return func(*args, **kwargs)

    def _cast(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not _castable(x) or x.dtype == dtype:
            return x
        if not (x.is_leaf and x.requires_grad and torch.is_grad_enabled()):
            return x.to(dtype)
        # A weight. Its version is part of the key: after an optimizer step in the block it is cast anew.
        cache = _scopes()[0].cache
        key = (id(x), x._version, dtype)
        if key not in cache:
            cache[key] = (x, x.to(dtype))
        return cache[key][1]
