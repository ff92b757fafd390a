"""Load a checkpoint shard by shard, quantizing each weight as it arrives.

A model of 7 billion parameters is 14 GB in bf16 and 4 GB in NF4. Loading first and quantizing then needs
both at once. Here the model starts on the meta device, where tensors have shapes and no memory, and
every tensor of a shard goes straight to its place: a linear layer's weight as NF4, anything else as it is.
The most that is held is what is done so far, plus one shard (mapped from the file, so the system can
drop its pages), plus one weight.

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    load_quantized(model, directory)
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from .linear import NF4Linear
from .model import is_conv1d, linear_layers, quantize_model
from .nf4 import FACTS, NF4Tensor, quantize_nf4


def load_quantized(
    model: nn.Module,
    files: str | Path | Sequence[str | Path],
    skip: Sequence[str] = ("lm_head",),
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rename: Callable[[str], str] | None = None,
) -> nn.Module:
    """Fill a model on the meta device from safetensors files, its linear layers in NF4.

    Layers are chosen as `quantize_model` chooses them. A weight that the files hold in NF4 already (ours or
    bitsandbytes') is taken as it is. Tied weights stay tied. Buffers that no file holds and the model
    computes itself (rotary frequencies) are computed again by the model's own `_init_weights`.

    Args:
        model: built under `torch.device("meta")`; filled in place.
        files: safetensors files, or a directory of them, sharded or not.
        skip: as for `quantize_model`, like the next three.
        block_size: weights that share a scale.
        double_quant: store scales in 8 bits.
        compute_dtype: dtype of the products; None: that of their input.
        dtype: what the other floating-point tensors are cast to; None: as in the files.
        device: where to put everything.
        rename: gives the model's name for a name in the files, where they differ.

    Returns:
        `model`.

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
    keys = {path: _keys(path, rename) for path in paths}
    everything = {name for names in keys.values() for name in names}
    for path in paths:
        with safe_open(str(path), framework="pt") as shard:
            for name, key in keys[path].items():
                tensor = shard.get_tensor(key)
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


def _keys(path: Path, rename: Callable[[str], str] | None) -> dict[str, str]:
    """The model's names for a file's tensors, and the file's own."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as shard:
        return {(key if rename is None else rename(key)): key for key in shard.keys()}  # noqa: SIM118  (no mapping)


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
                module._buffers[name] = torch.full_like(buffer, _poison(buffer.dtype), device=self.device)
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True  # transformers' own mark: do not initialize again
            if hasattr(self.model, "_init_weights"):
                self.model._init_weights(module)
            unset = [name for name in buffers if _is_poisoned(module._buffers[name])]
            if unset:
                raise ValueError(
                    f"the model does not recompute its buffers {[f'{path}.{name}' for name in unset]}, which no file "
                    "holds; build it with its buffers off the meta device"
                )


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


def _is_poisoned(buffer: torch.Tensor) -> bool:
    mark = buffer.isnan() if buffer.is_floating_point() or buffer.is_complex() else buffer == _poison(buffer.dtype)
    return bool(mark.all()) and buffer.numel() > 0
