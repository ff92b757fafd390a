"""What `handtuned xray` looks at: each operation of the library that launches kernels, called at a stated size.

One table for the X-ray, for `make check-kernels`, and for predictions beside the times of `handtuned bench`, whose
records name an operation of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from ..kernels.adamw import ParamGroup, adamw_step_
from ..kernels.dropout import Dropout, threshold_of
from ..kernels.lora_gemms import lora_down, lora_down_grad, lora_up_grads
from ..kernels.matmul import lora_product, scaled_matmul
from ..kernels.nf4 import NestedScales, NF4Weight, nf4_dequantize
from ..kernels.nf4_experts import nf4_fused
from ..kernels.nf4_matmul import nf4_experts_grouped, nf4_merge
from ..kernels.nf4_quantize import nf4_quantize
from ..kernels.nf4_stream import nf4_stream
from ..kernels.unscale import unscale_
from ..quant.nf4 import nf4_bytes

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Size:
    """A problem: rows of x, output and input features, rank; parameters for what works on all tensors of a model."""

    M: int = 4096
    N: int = 4096
    K: int = 4096
    rank: int = 16
    parameters: int = 40_000_000

    def __str__(self) -> str:
        return f"M {self.M}, N {self.N}, K {self.K}, r {self.rank}, {self.parameters / 1e6:g} M parameters"

    def but(self, found: dict) -> "Size":
        """The same with what a benchmark's record says of its own."""
        known = {field.name for field in fields(self)}
        return Size(**{**vars(self), **{name: n for name, n in found.items() if name in known}})


@dataclass(frozen=True)
class Operation:
    """One call of the library."""

    name: str  # "nf4_dequantize[fp16, nested]"
    prepare: Callable[[Size], Callable]  # → a function without arguments that makes the call, with what that needs
    unit: str  # what instructions are counted for
    units: Callable[[Size], int]  # how many there are
    bytes: Callable[[Size], int]  # that any implementation must move: each array once
    flops: Callable[[Size], int] = lambda s: 0  # 0: nothing for tensor cores
    tuned: bool = False  # the first launch of its kernel chooses among several tiles


def _weight(s: Size, nested: bool, experts: tuple[int, ...] = ()) -> NF4Weight:
    """Random codes: which bank of shared memory a look-up meets depends on them."""
    blocks = s.N * s.K // 64
    packed = torch.randint(0, 256, (*experts, s.N * s.K // 2), dtype=torch.uint8)
    shape, dtype = torch.Size((*experts, s.N, s.K)), torch.float16
    if not nested:
        return NF4Weight(packed, torch.rand(blocks) + 0.1, shape, dtype, 64)
    scales = NestedScales(torch.rand(*experts, -(-blocks // 256)), torch.linspace(-1, 1, 256), torch.ones(experts))
    return NF4Weight(packed, torch.randint(0, 256, (*experts, blocks), dtype=torch.uint8), shape, dtype, 64, scales)


def _array(rows: int, columns: int, dtype) -> torch.Tensor:
    """Zeros cost nothing until they are read, and no count depends on these values."""
    return torch.zeros(rows, columns, dtype=dtype)


def _dropout() -> Dropout:
    return Dropout(torch.tensor([12345]), threshold_of(0.05))


def _dequantize(low, nested):
    def prepare(s):
        weight = _weight(s, nested)
        return lambda: nf4_dequantize(weight, DTYPES[low])

    size = DTYPES[low].itemsize
    return Operation(f"nf4_dequantize[{low}{', nested' if nested else ''}]", prepare, "value", lambda s: s.N * s.K,
                     lambda s: sum(nf4_bytes(s.N * s.K, double_quant=nested)) + size * s.N * s.K)  # fmt: skip


def _quantize(low):
    def prepare(s):
        x = torch.randn(s.N * s.K).to(DTYPES[low])
        return lambda: nf4_quantize(x, 64)

    return Operation(f"nf4_quantize[{low}]", prepare, "value", lambda s: s.N * s.K, lambda s: (
        DTYPES[low].itemsize * s.N * s.K + sum(nf4_bytes(s.N * s.K, double_quant=False))))  # fmt: skip


def _few_rows(name, most, low, what=""):
    """y = x Wᵀ + s S Bᵀ of so many rows at most, streamed; or (what: "y", "dx") fused, this and dx = dy W + dS A."""
    rows = lambda s: min(s.M, most)  # noqa: E731

    def prepare(s):
        weight, dtype, dx = _weight(s, True), DTYPES[low], what == "dx"
        x, S = _array(rows(s), s.N if dx else s.K, dtype), _array(rows(s), s.rank, dtype)
        up = _array(s.rank, s.K, torch.float32).t() if dx else _array(s.N, s.rank, torch.float32)
        call, way = (nf4_fused, (not dx,)) if what else (nf4_stream, ())
        return lambda: call(x, weight, None, S, up, 2.0, *way)

    return Operation(f"{name}[{low}{what and f', {what}'}]", prepare, "weight", lambda s: s.N * s.K,
                     lambda s: sum(nf4_bytes(s.N * s.K)) + 2 * rows(s) * (s.N + s.K) + 4 * s.N * s.rank,
                     lambda s: 2 * rows(s) * s.N * (s.K + s.rank))  # fmt: skip


def _experts(low, what):
    """y = x Wᵀ, or (what: "dx") dx = dy W, of 8 experts with the same number of rows."""
    rows = lambda s: min(s.M, 512)  # noqa: E731

    def prepare(s):
        weight, dx = _weight(s, True, (8,)), what == "dx"
        x, ends = _array(rows(s), s.N if dx else s.K, DTYPES[low]), torch.arange(1, 9).int() * (rows(s) // 8)
        return lambda: nf4_experts_grouped(x, weight, not dx, ends)

    return Operation(f"nf4_experts[{low}, {what}]", prepare, "weight", lambda s: 8 * s.N * s.K,
                     lambda s: 8 * sum(nf4_bytes(s.N * s.K)) + 2 * rows(s) * (s.N + s.K),
                     lambda s: 2 * rows(s) * s.N * s.K)  # fmt: skip


def _merge(low):
    def prepare(s):
        weight, A, B = _weight(s, True), _array(s.rank, s.K, torch.float32), _array(s.N, s.rank, torch.float32)
        return lambda: nf4_merge(weight, A, B, 2.0, DTYPES[low])

    return Operation(f"nf4_merge[{low}]", prepare, "weight", lambda s: s.N * s.K,
                     lambda s: sum(nf4_bytes(s.N * s.K)) + 2 * s.N * s.K + 4 * s.rank * (s.N + s.K),
                     lambda s: 2 * s.N * s.K * s.rank)  # fmt: skip


def _skinny(name, low, dropped=False):
    """A product of x (M, K) with `rank` vectors: S = x̂ Aᵀ, or ("lora_down_grad") dA = dSᵀ x̂."""

    def prepare(s):
        x, drop = _array(s.M, s.K, DTYPES[low]), _dropout() if dropped else None
        A, dS = _array(s.rank, s.K, torch.float32), _array(s.M, s.rank, DTYPES[low])
        if name == "lora_down":
            return lambda: lora_down(x, A, drop)
        return lambda: lora_down_grad(dS, x, torch.float32, drop)

    return Operation(f"{name}[{low}{', dropout' if dropped else ''}]", prepare, "element of x", lambda s: s.M * s.K,
                     lambda s: 2 * s.M * (s.K + s.rank) + 4 * s.rank * s.K,
                     lambda s: 2 * s.M * s.K * s.rank)  # fmt: skip


def _up_grads(low):
    def prepare(s):
        dy, S, B = _array(s.M, s.N, DTYPES[low]), _array(s.M, s.rank, DTYPES[low]), _array(s.N, s.rank, torch.float32)
        return lambda: lora_up_grads(dy, S, B, 2.0)

    return Operation(f"lora_up_grads[{low}]", prepare, "element of dy", lambda s: s.M * s.N,
                     lambda s: 2 * s.M * (s.N + 2 * s.rank) + 8 * s.N * s.rank,
                     lambda s: 4 * s.M * s.N * s.rank)  # fmt: skip


def _mask(low):
    return Operation(f"dropout_mask[{low}]", lambda s: lambda: _dropout().mask(s.M, s.K, DTYPES[low]), "element",
                     lambda s: s.M * s.K, lambda s: DTYPES[low].itemsize * s.M * s.K)  # fmt: skip


def _product(low, what, dropped=False):
    """y = x Wᵀ + s S Bᵀ, or (what: "dx") the same on W as it lies, for backward."""

    def prepare(s):
        dtype, drop = DTYPES[low], _dropout() if dropped else None
        x, W, S = _array(s.M, s.K, dtype), _array(s.N, s.K, dtype), _array(s.M, s.rank, dtype)
        up = _array(s.N, s.rank, torch.float32)
        if what == "dx":
            W, up = _array(s.K, s.N, dtype).t(), _array(s.rank, s.N, torch.float32).t()
        return lambda: lora_product(x, W, None, S, up, 2.0, drop)

    return Operation(f"lora_product[{low}, {what}{', dropout' if dropped else ''}]", prepare, "output",
                     lambda s: s.M * s.N,
                     lambda s: 2 * (s.M * s.K + s.N * s.K + s.M * s.N + s.M * s.rank) + 4 * s.N * s.rank,
                     lambda s: 2 * s.M * s.N * (s.K + s.rank), tuned=True)  # fmt: skip


def _scaled(low, layout, ragged=False):
    """layout: n, rows of a (of b) lie in memory as they are; t, transposed. ragged: sizes that fill no tile."""

    def prepare(s):
        M, N = (s.M - 7, s.N - 8) if ragged else (s.M, s.N)
        a = _array(M, s.K, DTYPES[low]) if layout[0] == "n" else _array(s.K, M, DTYPES[low]).t()
        b = _array(s.K, N, DTYPES[low]) if layout[1] == "n" else _array(N, s.K, DTYPES[low]).t()
        return lambda: scaled_matmul(a, b, 0.125)

    return Operation(f"scaled_matmul[{low}, {layout}{', ragged' if ragged else ''}]", prepare, "output",
                     lambda s: s.M * s.N, lambda s: 2 * (s.M * s.K + s.N * s.K + s.M * s.N),
                     lambda s: 2 * s.M * s.N * s.K, tuned=True)  # fmt: skip


def _adamw(copy):
    def prepare(s):
        p, g, m, v = (torch.zeros(s.parameters) for _ in range(4))
        narrow = p.half() if copy else None
        group = ParamGroup([p], [g.half() if copy else g], [m], [v], [torch.tensor(0.0)], [narrow], 1e-3, (0.9, 0.999),
                           1e-8, 0.01)  # fmt: skip
        return lambda: adamw_step_([group])

    # p, g, m, v in and p, m, v out; with a copy, g and the copy in two bytes
    name = "adamw[fp32, fp16 copy]" if copy else "adamw[fp32]"
    return Operation(name, prepare, "parameter", lambda s: s.parameters, lambda s: 28 * s.parameters)


def _unscale(*lows):
    def prepare(s):
        grads = [torch.zeros(s.parameters // len(lows), dtype=DTYPES[low]) for low in lows]
        return lambda: unscale_(grads, torch.tensor(0.5), torch.zeros(()))

    sizes = [DTYPES[low].itemsize for low in lows]
    return Operation(f"unscale[{', '.join(lows)}]", prepare, "gradient", lambda s: s.parameters,
                     lambda s: 2 * s.parameters * sum(sizes) // len(sizes))  # fmt: skip


_ALL = (
    _dequantize("fp16", True), _dequantize("fp16", False), _dequantize("bf16", True), _dequantize("bf16", False),
    _dequantize("fp32", True), _dequantize("fp32", False),
    _quantize("fp16"), _quantize("bf16"), _quantize("fp32"),
    _few_rows("nf4_one_row", 1, "fp16"), _few_rows("nf4_few_rows", 16, "fp16"), _few_rows("nf4_few_rows", 16, "bf16"),
    _few_rows("nf4_fused", 256, "fp16", "y"), _few_rows("nf4_fused", 256, "fp16", "dx"),
    _experts("fp16", "y"), _experts("fp16", "dx"), _merge("fp16"), _merge("bf16"),
    _skinny("lora_down", "fp16"), _skinny("lora_down", "fp16", True), _up_grads("fp16"),
    _skinny("lora_down_grad", "fp16"), _skinny("lora_down_grad", "fp16", True),
    _mask("fp16"), _product("fp16", "y"), _product("bf16", "y"), _product("fp16", "dx"), _product("fp16", "dx", True),
    _scaled("fp16", "nn"), _scaled("fp16", "nt"), _scaled("fp16", "tn"), _scaled("fp16", "nn", True),
    _adamw(False), _adamw(True), _unscale("fp32"), _unscale("fp16"), _unscale("bf16", "fp32"),
)  # fmt: skip
OPERATIONS = {operation.name: operation for operation in _ALL}
