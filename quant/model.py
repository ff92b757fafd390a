"""Quantize the linear layers of a model, or load a checkpoint with them quantized, and say what became of it.

A model of 7 billion parameters is 14 GB in bf16 and 4 GB in NF4. Loading first and quantizing then needs both at
once. `load_quantized` starts with the model on the meta device, and every tensor of a shard goes straight to its place:
a linear layer's weight as NF4, anything else as it is. The most that is held is what is done so far, plus one shard
(mapped from the file, so the system can drop its pages), plus one weight.

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    load_quantized(model, directory)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .linear import NF4Linear
from .nf4 import FACTS, NF4Tensor, check_block_size, quantize_nf4

BAR_FROM = 250_000_000  # parameters from which a progress bar is shown


def quantize_model(
    model: nn.Module, skip: Sequence[str] = ("lm_head",), block_size: int = 64, double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:  # fmt: skip
    """Replace every `nn.Linear` that is not skipped by an NF4Linear, in place, one after the other.

    Left alone besides `skip`: an output layer (what a Hugging Face model calls its output embeddings, and
    any layer that shares its weight with an `nn.Embedding`), layers that a Hugging Face class wants in fp32,
    and subclasses of nn.Linear (but Falcon's), whose owners reach for their weights. GPT-2's `Conv1D` is a linear
    layer with its weight transposed and is quantized too. Layers that are NF4 already stay as they are, so
    calling again changes nothing. A model on the meta device stays there, ready for `load_quantized`.

    Args:
        skip: layers to leave, by path or by consecutive parts of one: "lm_head", "mlp.down_proj" (in every
            block), "vision_tower" (everything below). Whole parts only: "proj" does not skip "q_proj".
        block_size: weights that share a scale.
        double_quant: store scales in 8 bits.
        compute_dtype: dtype of the products; None: that of their input.

    Returns `model`.

    Raises:
        TypeError: `skip` is not a sequence, or a single string.
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
    if parameters < BAR_FROM:
        return iter(targets)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return iter(targets)
    return iter(tqdm(targets, desc="quantizing", unit="layer"))


def load_quantized(
    model: nn.Module, files: str | Path | Sequence[str | Path], skip: Sequence[str] = ("lm_head",),
    block_size: int = 64, double_quant: bool = True, compute_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None, device: torch.device | str = "cpu", rename: Callable[[str], str] | None = None,
) -> nn.Module:  # fmt: skip
    """Fill a model on the meta device from safetensors files, its linear layers in NF4.

    Layers are chosen as `quantize_model` chooses them. A weight that the files hold in NF4 already (ours or
    bitsandbytes') is taken as it is. Tied weights stay tied. Buffers that no file holds and the model
    computes itself (rotary frequencies) are computed again by the model's own `_init_weights`.

    Args:
        model: built under `torch.device("meta")`; filled in place.
        files: safetensors files, or a directory of them, sharded or not.
        skip, block_size, double_quant, compute_dtype: as for `quantize_model`.
        dtype: what the other floating-point tensors are cast to; None: as in the files.
        rename: gives the model's name for a name in the files, where they differ.

    Returns `model`.

    Raises:
        FileNotFoundError: no safetensors file.
        ValueError: a tensor that the model needs and no file holds, one that the files hold and the model
            does not know, a wrong shape, or a weight that is not finite; all of a kind are named together.
    """
    from safetensors import safe_open

    if not all(parameter.is_meta for parameter in model.parameters()):
        raise ValueError('model must have its parameters on the meta device: build it under torch.device("meta")')
    paths = _shards(files)
    transposed = {path for path, layer in linear_layers(model, skip) if is_conv1d(layer)}
    quantize_model(model, skip, block_size, double_quant, compute_dtype)
    target = _Target(model, torch.device(device), dtype)
    in_nf4: dict[str, dict[str, torch.Tensor]] = {}  # layer → what the files hold of it in NF4
    shards = [safe_open(str(path), framework="pt") for path in paths]
    renamed = rename or (lambda key: key)
    everything = {renamed(key) for shard in shards for key in shard.keys()}  # noqa: SIM118  (no mapping)
    while shards:
        shard = shards.pop(0)  # and drop it when it is done: what it maps counts as memory held
        for key in shard.keys():  # noqa: SIM118
            name, tensor = renamed(key), shard.get_tensor(key)
            layer, found, part = name.partition(".weight")
            if not found or layer not in target.layers:
                target.put(name, tensor)
            elif part or f"{name}.{FACTS}" in everything:
                in_nf4.setdefault(layer, {})[name] = tensor.clone()
            else:
                target.quantize(layer, tensor.t() if layer in transposed else tensor, double_quant)
    for layer, state in in_nf4.items():
        target.layers[layer].quantized = NF4Tensor.from_state_dict(state, layer + ".").to(target.device)
    target.finish()
    return model


def _shards(files) -> list[Path]:
    if isinstance(files, (str, Path)):
        files = sorted(Path(files).glob("*.safetensors")) if Path(files).is_dir() else [files]
    paths = [Path(path) for path in files]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"files must name safetensors files, got {', '.join(missing) or 'none'}")
    return paths


class _Target:
    """The places of a meta model, by the names that its state dict would have."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None):
        self.model, self.device, self.dtype = model, device, dtype
        self.layers: dict[str, NF4Linear] = {}
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}  # every place of a tied parameter
        self.unknown: list[str] = []
        by_identity: dict[int, list[tuple[nn.Module, str]]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, NF4Linear):
                self.layers[path] = module
            temporary = module._non_persistent_buffers_set
            own = module._parameters | {k: v for k, v in module._buffers.items() if k not in temporary}
            for name, tensor in own.items():
                if tensor is not None:
                    places = by_identity.setdefault(id(tensor), [])
                    places.append((module, name))
                    self.places[f"{path}.{name}" if path else name] = places

    def quantize(self, path: str, weight: torch.Tensor, double_quant: bool) -> None:
        layer, name = self.layers[path], f"{path}.weight"
        if weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(f"{name} must be {layer.out_features} × {layer.in_features}, got {tuple(weight.shape)}")
        layer.quantized = quantize_nf4(weight.to(self.device), layer.block_size, double_quant, name=name)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self.places:
            self.unknown.append(name)
            return
        for module, attribute in self.places[name]:
            old = getattr(module, attribute)
            if old.shape != tensor.shape:
                raise ValueError(f"{name} must be {tuple(old.shape)}, got {tuple(tensor.shape)}")
        is_parameter = isinstance(old, nn.Parameter)
        dtype = self.dtype if self.dtype and is_parameter and tensor.is_floating_point() else tensor.dtype
        tensor = tensor.to(self.device, dtype, copy=True)  # not a view that would keep the whole shard
        if is_parameter:
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        for module, attribute in self.places[name]:
            setattr(module, attribute, tensor)

    def finish(self) -> None:
        """Compute the buffers that are in no file, and raise if anything is left over or missing."""
        missing = [n for n, places in self.places.items() if getattr(*places[0]).is_meta]
        if missing or self.unknown:
            raise ValueError(
                f"files must hold the model's tensors, and no others: {len(missing)} missing {missing[:5]}, "
                f"{len(self.unknown)} unknown {self.unknown[:5]}"
            )
        for path, module in self.model.named_modules():
            buffers = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
            if not buffers:
                continue
            for name, buffer in buffers.items():
                module._buffers[name] = torch.full_like(buffer, _unset(buffer.dtype), device=self.device)
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True  # transformers' own mark: do not initialize again
            if hasattr(self.model, "_init_weights"):
                self.model._init_weights(module)
            unset = [f"{path}.{name}" for name in buffers if _is_unset(module._buffers[name])]
            if unset:
                raise ValueError(
                    f"the model does not recompute its buffers {unset}, which no file holds; build it with its buffers "
                    "off the meta device"
                )


def _unset(dtype: torch.dtype) -> float | int:
    """What marks a buffer that nothing has computed yet."""
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


def _is_unset(buffer: torch.Tensor) -> bool:
    mark = buffer == _unset(buffer.dtype)
    return buffer.numel() > 0 and bool((mark | (buffer != buffer)).all())


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
