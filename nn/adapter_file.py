"""`adapter_model.safetensors`: its tensors by their layers, and whether they fit a model.

A safetensors file cannot carry code, but its names and shapes may be anything. Everything is compared with the
config and the model before the model is changed.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .adapter_config import AdapterConfig, short
from .base_layer import features
from .inject import output_heads
from .lora import LoRALinear
from .multi import adapter_of, linear_layers, original, outer_modules

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PARTS = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B",
         "lora_magnitude_vector": "lora_magnitude", "lora_magnitude_vector.weight": "lora_magnitude"}  # fmt: skip


@dataclass
class AdapterTensors:
    """The tensors of one adapter file.

    Attributes:
        layers: path of a layer → name of the part → tensor; `lora_magnitude` is DoRA's.
        base: by parameter name, weights of adapted layers themselves. PEFT adds these copies when the
            output head is adapted; they must equal the model's.
        whole: by parameter name, the weights of modules that are replaced whole.
    """

    layers: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    base: dict[str, torch.Tensor] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)


def read_adapter_tensors(directory: str | Path) -> AdapterTensors:
    """Read and check `directory/adapter_model.safetensors`.

    Raises:
        ValueError: missing, a pickle, damaged, tensors that are not finite floating-point numbers, or names that
            PEFT does not write.
    """
    path = Path(directory) / WEIGHTS_NAME
    result, tensors = AdapterTensors(), read_safetensors(path)
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{path}: {short(key)} does not begin with {PREFIX!r}, as all keys of a PEFT adapter do")
        name = key[len(PREFIX) :]
        ending = next((ending for ending in PARTS if name.endswith(f".{ending}")), None)
        if ending:
            place, name = result.layers.setdefault(name[: -len(ending) - 1], {}), PARTS[ending]
        else:
            place = result.base if ".base_layer." in name else result.whole
            name = name.replace(".base_layer.", ".")
        if name in place:
            raise ValueError(f"{path}: {short(key)} says again what another tensor says")
        place[name] = tensor
    return result


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Name → tensor, on the CPU, in memory of its own.

    Raises:
        ValueError: see `read_adapter_tensors`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        if path.with_suffix(".bin").exists():
            name = path.with_suffix(".bin")
            raise ValueError(f"{name} is a pickle and can run any code when it is read; only {path.name} is")
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        with open(path, "rb") as file:
            start = file.read(4)
        if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
            raise ValueError(
                f"{path} is a pickle under a false name; refused, for reading one can run any code"
            ) from None
        raise ValueError(f"{path} is damaged or not a safetensors file: {str(error)[:300]}") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            expected = ", ".join(map(str, DTYPES))
            raise ValueError(f"{path}: {short(name)} is of dtype {tensor.dtype}, expected one of {expected}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {short(name)} holds NaN or infinite values")
    return tensors


def check_fit(model: nn.Module, config: AdapterConfig, tensors: AdapterTensors, name: str, where: str):
    """Compare an adapter with a model, as the adapter `name` of which it is to be loaded.

    Returns:
        Path → layer to adapt (adapted already or not), path → module to replace whole (likewise), path of each
        layer → (rank, alpha, scaling).

    Raises:
        ValueError: the message begins with `where` and names the layers that matched, are missing in
            the file and are unexpected there, or the layer whose parts or shapes are wrong.
    """
    linear = linear_layers(model)
    modules = _modules_to_save(model, config, where)
    _compare_names(linear, modules, config, tensors, name, where, output_heads(model, linear))
    settings = config.settings(tensors.layers)
    for path, (rank, _, _) in settings.items():
        _check_layer(path, linear[path], rank, config, tensors.layers[path], name, where)
    own = {f"{p}.{key}": tensor for p in settings for key, tensor in original(linear[p]).state_dict().items()}
    for key, tensor in tensors.base.items():
        _check_base(key, tensor, own.get(key), where)
    for path, module in modules.items():
        for key, tensor in original(module).state_dict().items():
            given = tensors.whole[f"{path}.{key}"]
            if given.shape != tensor.shape or not tensor.is_floating_point():
                raise ValueError(
                    f"{where}: {path}.{key} is {tuple(given.shape)} in the file and {tuple(tensor.shape)} "
                    f"of {tensor.dtype} in the model"
                )
    return {path: linear[path] for path in settings}, modules, settings


def _modules_to_save(model, config, where) -> dict[str, nn.Module]:
    """Path → module of what the config replaces whole.

    One name that is there is enough: PEFT writes both "classifier" and "score" for every classification
    model. Tensors in the file for a module that is not there are found to be unexpected.
    """
    endings = tuple(config.modules_to_save or ())
    modules = {path: module for path, module in outer_modules(model).items() if path.endswith(endings)}
    if endings and not modules:
        raise ValueError(f"{where}: modules_to_save names {_listed(set(endings))}, which the model does not have")
    for path, module in modules.items():
        inner = [inside for inside in modules if inside.startswith(f"{path}.")]
        inner += [f"{path}.{at}" for at, child in module.named_modules() if isinstance(child, LoRALinear)]
        if inner:
            raise ValueError(f"{where}: modules_to_save would replace {path!r}, which holds the adapted {inner[0]!r}")
    return modules


def _compare_names(linear, modules, config, tensors, name, where, heads) -> None:
    given = set(tensors.layers)
    selected = config.selects(linear, heads)
    held = {path for path, layer in linear.items() if isinstance(layer, LoRALinear) and adapter_of(layer, name)}
    matched = {id(linear[path]) for path in given & linear.keys()}
    missing = {path for path in ((selected or set()) | held) - given if id(linear[path]) not in matched}
    unexpected = given - linear.keys()
    for allowed in (selected, held or None):
        unexpected |= set() if allowed is None else given - allowed
    keys = {f"{path}.{key}" for path, module in modules.items() for key in original(module).state_dict()}
    missing |= keys - tensors.whole.keys()
    unexpected |= tensors.whole.keys() - keys
    if missing or unexpected:
        raise ValueError(
            f"{where}: the adapter does not fit the model: matched: {len(given - unexpected)} layers; "
            f"missing in the file: {_listed(missing)}; unexpected in the file: {_listed(unexpected)}"
        )


def _check_base(key, tensor, own, where) -> None:
    if own is None:
        raise ValueError(f"{where}: unexpected in the file: {key} of the base model")
    coarse = own.dtype if own.dtype.itemsize < tensor.dtype.itemsize else tensor.dtype
    if own.shape != tensor.shape or not torch.equal(own.to(coarse).cpu(), tensor.to(coarse)):
        raise ValueError(
            f"{where}: the file brings its own {key} of shape {tuple(tensor.shape)}, which is not the model's of shape "
            f"{tuple(own.shape)}: another base model, or a resized vocabulary"
        )


def _check_layer(path, layer, rank, config, parts, name, where) -> None:
    if original(layer).weight.is_meta:
        raise ValueError(f"{path} is on the meta device, where an adapter would lose its values")
    outputs, inputs = features(layer)
    wanted = {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}
    if config.use_dora:
        wanted["lora_magnitude"] = (outputs,)
    found = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    if found != wanted:
        raise ValueError(f"{where}: {path} is {found} in the file, but the model and the config want {wanted}")
    held = adapter_of(layer, name) if isinstance(layer, LoRALinear) else None
    if held is None:
        return
    if hasattr(held, "start_A"):
        raise ValueError(f"the model's adapter {name!r} is in PiSSA training; load under another name")
    if held.rank != rank or hasattr(held, "lora_magnitude") != config.use_dora:
        raise ValueError(
            f"{where}: {path} has rank {rank}{', DoRA' * config.use_dora}; the model's adapter {name!r} has rank "
            f"{held.rank}{', DoRA' * hasattr(held, 'lora_magnitude')}; load under another name"
        )


def _listed(names) -> str:
    """The first few of some names, for a message."""
    shown = ", ".join(short(name) for name in sorted(names)[:5])
    return (shown or "none") + (f" and {len(names) - 5} more" if len(names) > 5 else "")
