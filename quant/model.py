"""Quantize the linear layers of a model, and say what became of it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .linear import NF4Linear
from .nf4 import check_block_size

BAR_FROM = 250_000_000  # parameters from which a progress bar is shown


def quantize_model(
    model: nn.Module,
    skip: Sequence[str] = ("lm_head",),
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Replace every `nn.Linear` that is not skipped by an NF4Linear, in place, one after the other.

    Left alone besides `skip`: an output layer (what a Hugging Face model calls its output embeddings, and
    any layer that shares its weight with an `nn.Embedding`), layers that a Hugging Face class wants in fp32,
    and subclasses of nn.Linear (but Falcon's), whose owners reach for their weights. GPT-2's `Conv1D` is a linear
    layer with its weight transposed and is quantized too. Layers that are NF4 already stay as they are, so
    calling again changes nothing. A model on the meta device stays there, ready for `load_quantized`.

    Args:
        model: any module that has linear layers inside it.
        skip: layers to leave, by path or by consecutive parts of one: "lm_head", "mlp.down_proj" (in every
            block), "vision_tower" (everything below). Whole parts only: "proj" does not skip "q_proj".
        block_size: weights that share a scale.
        double_quant: store scales in 8 bits.
        compute_dtype: dtype of the products; None: that of their input.

    Returns:
        `model`.

    Raises:
        TypeError: `skip` is no sequence, or a single string.
        ValueError: nothing to quantize; an entry of `skip` that names no module; a weight that is not finite
            (the layer is named, and those before it are quantized already).
    """
    check_block_size(block_size)
    targets = linear_layers(model, skip)
    if not targets and not any(isinstance(module, NF4Linear) for module in model.modules()):
        hint = "; for a single layer use NF4Linear.from_linear" if is_linear(model) else ""
        raise ValueError(f"model ({type(model).__name__}) must hold an nn.Linear that is not skipped{hint}")
    made: dict[int, NF4Linear] = {}
    for path, linear in _progress(targets, sum(p.numel() for p in model.parameters())):
        if id(linear) not in made:
            options = (block_size, double_quant, compute_dtype)
            made[id(linear)] = NF4Linear.from_linear(as_linear(linear), *options, name=path)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(linear)])
    return model


def linear_layers(model: nn.Module, skip: Sequence[str] = ("lm_head",)) -> list[tuple[str, nn.Module]]:
    """The paths and layers that `quantize_model` replaces; a layer reached by several paths comes with each."""
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        what = "the string " if isinstance(skip, str) else ""
        raise TypeError(f"skip must be a sequence of names, got {what}{skip!r}")
    paths = dict(model.named_modules(remove_duplicate=False))
    for name in skip:
        if name != "lm_head" and not any(path and _within(path, name) for path in paths):
            raise ValueError(f"skip names {name!r}, which is no part of any module's path in {type(model).__name__}")
    keep = {id(module.weight) for module in paths.values() if isinstance(module, nn.Embedding)}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    keep |= {id(output), id(getattr(output, "weight", None))}
    skip = [*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    return [
        (path, module)
        for path, module in paths.items()
        if path and is_linear(module) and not keep & {id(module), id(module.weight)}
        if not any(_within(path, name) for name in skip)
    ]


def _within(path: str, name: str) -> bool:
    return f".{name}." in f".{path}."


def is_linear(module: nn.Module) -> bool:
    """Whether it is exactly nn.Linear, Falcon's own name for it, or the transposed Conv1D of GPT-2."""
    kind = type(module)
    return kind is nn.Linear or is_conv1d(module) or (kind.__name__ == "FalconLinear" and issubclass(kind, nn.Linear))


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight lies as (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def as_linear(module: nn.Module) -> nn.Linear:
    """The layer as an nn.Linear: itself, or a Conv1D's weight (in, out) transposed."""
    if not is_conv1d(module):
        return module
    linear = nn.Linear(module.nx, module.nf, bias=False, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().t(), requires_grad=False)
    linear.bias = module.bias
    return linear.train(module.training)


def _progress(targets: list, parameters: int) -> Iterator:
    if parameters >= BAR_FROM:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return iter(targets)
        return iter(tqdm(targets, desc="quantizing", unit="layer"))
    return iter(targets)


@dataclass(frozen=True)
class SummaryRow:
    """One kind of module: how many, their parameters, and bytes unquantized and now."""

    kind: str
    modules: int
    parameters: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationSummary:
    """What `quantize_model` made of a model; `print` shows a table.

    Attributes:
        rows: by kind of module, those of NF4 first.
    """

    rows: tuple[SummaryRow, ...]

    @property
    def total(self) -> SummaryRow:
        """All rows added up."""
        columns = zip(*((r.modules, r.parameters, r.bytes_before, r.bytes_after) for r in self.rows), strict=True)
        return SummaryRow("total", *map(sum, columns))

    def __str__(self) -> str:
        lines = [f"{'':24}{'modules':>8}{'parameters':>16}{'MB before':>12}{'MB now':>12}{'bytes each':>12}"]
        for r in (*self.rows, self.total):
            each = r.bytes_after / r.parameters if r.parameters else 0.0
            megabytes = f"{r.bytes_before / 1e6:12.1f}{r.bytes_after / 1e6:12.1f}"
            lines.append(f"{r.kind:24}{r.modules:8}{r.parameters:16,}{megabytes}{each:12.3f}")
        return "\n".join(lines)


def quantization_summary(model: nn.Module) -> QuantizationSummary:
    """Count modules, parameters and bytes by kind. Weights that several modules share count once, where first met.

    "Before" takes NF4 weights at the dtype they had; buffers other than scales are left out on both sides.
    """
    counts: dict[str, list[int]] = {}
    seen: set[int] = set()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        sizes = [(p.numel(), p.numel() * p.element_size(), p.numel() * p.element_size()) for p in own]
        if isinstance(module, NF4Linear):
            q = module.quantized
            weight = (q.shape.numel(), q.shape.numel() * q.dtype.itemsize, q.nbytes)
            sizes = [weight if p is module.weight else size for p, size in zip(own, sizes, strict=True)]
        if sizes:
            row = counts.setdefault(type(module).__name__, [0, 0, 0, 0])
            for i, n in enumerate((1, *map(sum, zip(*sizes, strict=True)))):
                row[i] += n
    rows = [SummaryRow(kind, *row) for kind, row in counts.items()]
    return QuantizationSummary(tuple(sorted(rows, key=lambda r: (r.kind != "NF4Linear", -r.parameters))))
