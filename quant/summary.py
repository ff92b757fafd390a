"""What became of a model's parameters: how many of each kind of module, in how many bytes, and what stayed dense."""

from dataclasses import dataclass

from torch import nn

from .experts import dense_experts
from .linear import FrozenNF4


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
    """What `quantize_model` made of a model; `print` shows a table."""

    rows: tuple[SummaryRow, ...]  # by kind of module, those of NF4 first
    dense_experts: tuple[tuple[str, int], ...] = ()  # kinds of modules with expert weights left dense, and how many

    @property
    def total(self) -> SummaryRow:
        """All rows added up."""
        columns = "modules", "parameters", "bytes_before", "bytes_after"
        return SummaryRow("total", *(sum(getattr(row, column) for row in self.rows) for column in columns))

    def __str__(self) -> str:
        lines = [f"{'':24}{'modules':>8}{'parameters':>16}{'MB before':>12}{'MB now':>12}{'bytes each':>12}"]
        for r in (*self.rows, self.total):
            each = r.bytes_after / r.parameters if r.parameters else 0.0
            megabytes = f"{r.bytes_before / 1e6:12.1f}{r.bytes_after / 1e6:12.1f}"
            lines.append(f"{r.kind:24}{r.modules:8}{r.parameters:16,}{megabytes}{each:12.3f}")
        for kind, count in self.dense_experts:
            lines.append(f"left dense: expert weights of {kind}, {count / self.total.parameters:.1%} of the parameters")
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
        if isinstance(module, FrozenNF4):
            q = module.quantized
            weight = (q.shape.numel(), q.shape.numel() * q.dtype.itemsize, q.nbytes)
            sizes = [weight if p is module.weight else size for p, size in zip(own, sizes, strict=True)]
        if sizes:
            row = counts.setdefault(type(module).__name__, [0, 0, 0, 0])
            for i, n in enumerate((1, *map(sum, zip(*sizes, strict=True)))):
                row[i] += n
    rows = [SummaryRow(kind, *row) for kind, row in counts.items()]
    dense: dict[str, int] = {}
    for kind, count in dense_experts(model).values():
        dense[kind] = dense.get(kind, 0) + count
    rows.sort(key=lambda r: (not r.kind.startswith("NF4"), -r.parameters))
    return QuantizationSummary(tuple(rows), tuple(dense.items()))
