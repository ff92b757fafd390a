"""`adapter_model.safetensors`: its tensors by their layers, and whether they fit a model.

A safetensors file cannot carry code, but its names and shapes may be anything. Everything is compared with the
config and the model before the model is changed.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .adapter_config import AdapterConfig, short
from .base_layer import features, stacked
from .experts_in_files import join_experts
from .lora import LoRALinear
from .multi import adapter_of, original
from .names import ending_in, outermost
from .parameters import file_prefixes, parameter_name, parameter_targets
from .targets import linear_layers, outer_modules, output_heads

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COUNTS = torch.int64  # of batches, say, in a module that is replaced whole
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
PARTS = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B",
         "lora_magnitude_vector": "lora_magnitude", "lora_magnitude_vector.weight": "lora_magnitude"}  # fmt: skip


class AdapterTensors(NamedTuple):
    """The tensors of one adapter file."""

    layers: dict[str, dict[str, torch.Tensor]]  # path of a layer → name of the part → tensor
    base: dict[str, torch.Tensor]  # copies of the model's own weights, which PEFT adds when the output head is adapted
    whole: dict[str, torch.Tensor]  # weights of modules that are replaced whole


def read_adapter_tensors(directory: str | Path) -> AdapterTensors:
    """Read and check `directory/adapter_model.safetensors`.

    ValueError: missing, a pickle, damaged, tensors that are not finite floats, or names that PEFT does not write.
    """
    path = Path(directory) / WEIGHTS_NAME
    result, tensors = AdapterTensors({}, {}, {}), _read_safetensors(path)
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
        if tensor.dtype not in DTYPES and (place is not result.whole or tensor.dtype != COUNTS):
            expected = ", ".join(map(str, DTYPES))
            raise ValueError(f"{path}: {short(key)} is of dtype {tensor.dtype}, expected one of {expected}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {short(key)} holds NaN or infinite values")
        if name in place:
            raise ValueError(f"{path}: {short(key)} says again what another tensor says")
        place[name] = tensor
    return result


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Name → tensor, on the CPU, in memory of its own."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        pickle = path.with_suffix(".bin")
        if pickle.exists():
            raise ValueError(f"{pickle} is a pickle and can run any code when it is read; only {path.name} is")
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, it is not a dict
    except SafetensorError as error:
        with open(path, "rb") as file:
            why = f"is damaged or not a safetensors file: {str(error)[:300]}"
            if file.read(4).startswith(PICKLES):
                why = "is a pickle under a false name; refused, for reading one can run any code"
        raise ValueError(f"{path} {why}") from None


def check_fit(model: nn.Module, config: AdapterConfig, tensors: AdapterTensors, name: str):
    """Compare an adapter with a model, as the adapter `name` of which it is to be loaded.

    Returns path → layer to adapt (adapted already or not), path → module to replace whole (likewise), path of each
    layer → (rank, alpha, scaling), path of each layer → its tensors by part.
    ValueError: the message names the layers that matched, are missing in the file and are unexpected there, or the
    layer whose parts or shapes are wrong.
    """
    linear, modules = linear_layers(model), _modules_to_save(model, config)
    selected, others = config.selects(linear, output_heads(model, linear)), parameter_targets(model)
    known = {parameter_name(path, module): path for path, module in (linear | others).items()}
    names = {known[name]: name for name in ending_in(known, config.target_parameters or ())}
    if config.target_parameters and not names:
        raise ValueError(f"target_parameters names {', '.join(config.target_parameters)}, which the model has not")
    unnamed = {path: module for path, module in others.items() if path not in names}
    others = {path: others[path] for path in names.keys() & others.keys()}
    if others and (config.use_dora or config.lora_dropout):
        raise ValueError("target_parameters: neither use_dora nor lora_dropout can act on what is not a linear layer")
    prefixes = {prefix: path for path, prefix in file_prefixes(model, others).items()}
    given = {prefixes.get(path, path): parts for path, parts in tensors.layers.items()}
    joined = join_experts(model, config, given, linear | others, unnamed)
    tensors = tensors._replace(layers=joined.layers)
    linear = linear | others | {path: unnamed[path] for path in joined.settings.keys() | joined.missing}
    selected = None if selected is None else selected | names.keys() | joined.settings.keys() | joined.missing
    held = {path: adapter_of(layer, name) for path, layer in linear.items() if isinstance(layer, LoRALinear)}
    held = {path: adapter for path, adapter in held.items() if adapter is not None}
    whole = _tensors_of(modules)
    _compare_names(linear, held.keys(), selected, whole, tensors)
    layers = {path: linear[path] for path in tensors.layers}
    values = config.settings([names.get(path, path) for path in layers])
    settings = {path: values[names.get(path, path)] for path in layers} | joined.settings
    for path, layer in layers.items():
        _check_layer(path, layer, settings[path][0], config.use_dora, tensors.layers[path], held.get(path), name)
    base = _tensors_of(layers) if tensors.base else {}
    for key, tensor in tensors.base.items():
        own = base.get(key)
        if own is None:
            raise ValueError(f"unexpected in the file: {key} of the base model")
        coarse = min(tensor.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
        if own.shape != tensor.shape or not torch.equal(own.to(coarse).cpu(), tensor.to(coarse)):
            raise ValueError(f"the file brings its own {key} of shape {tuple(tensor.shape)}, which is not the model's "
                             f"of shape {tuple(own.shape)}: another base model, or a resized vocabulary")  # fmt: skip
    for key, own in whole.items():
        given = tensors.whole[key]
        alike = given.dtype == own.dtype or (given.is_floating_point() and own.is_floating_point())
        if given.shape != own.shape or not alike:
            raise ValueError(f"{key} is {tuple(given.shape)} of {given.dtype} in the file and {tuple(own.shape)} of "
                             f"{own.dtype} in the model")  # fmt: skip
    return layers, modules, settings, tensors.layers


def _modules_to_save(model, config) -> dict[str, nn.Module]:
    """Path → module of what the config replaces whole.

    One name that is there is enough: PEFT writes both "classifier" and "score" for every classification
    model. Tensors in the file for a module that is not there are found to be unexpected.
    """
    endings = tuple(config.modules_to_save or ())
    outer = outer_modules(model)
    modules = {path: outer[path] for path in outermost(path for path in outer if path.endswith(endings))}
    if endings and not modules:
        raise ValueError(f"modules_to_save names {listed(endings)}, which the model does not have")
    for path, module in modules.items():
        inner = [f"{path}.{at}" for at, child in module.named_modules() if isinstance(child, LoRALinear)]
        if inner:
            raise ValueError(f"modules_to_save would replace {path!r}, which holds the adapted {inner[0]!r}")
    return modules


def _tensors_of(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {f"{path}.{key}": own for path, m in modules.items() for key, own in original(m).state_dict().items()}


def _compare_names(linear, held, selected, whole, tensors) -> None:
    """Layers in the file against those the model has, the config selects, an adapter of this name has already."""
    given = set(tensors.layers)
    matched = {id(linear[path]) for path in given & linear.keys()}  # a layer under two names needs one of them
    missing = {path for path in ((selected or set()) | held) - given if id(linear[path]) not in matched}
    unexpected = given - linear.keys()
    for allowed in (selected, held or None):
        unexpected |= set() if allowed is None else given - allowed
    missing |= whole.keys() - tensors.whole.keys()
    unexpected |= tensors.whole.keys() - whole.keys()
    if missing or unexpected:
        split = any(re.search(r"\bexperts\.\d+\.", path) for path in unexpected)
        hint = "; experts that target_modules does not select or transformers' table does not fuse" if split else ""
        raise ValueError(f"the adapter does not fit the model: matched: {len(given - unexpected)} layers; missing "
                         f"in the file: {listed(missing)}; unexpected in the file: {listed(unexpected)}"
                         + hint)  # fmt: skip


def _check_layer(path, layer, rank, use_dora, parts, held, name) -> None:
    weight = original(layer).weight
    if weight.is_meta or hasattr(weight, "full_tensor"):
        why = "on the meta device, where an adapter would lose its values"
        raise ValueError(f"{path} is {why if weight.is_meta else 'sharded; load the adapter before fully_shard'}")
    outputs, inputs = features(original(layer))
    stack = rank * stacked(original(layer))
    wanted = {"lora_A": (stack, inputs), "lora_B": (outputs, stack)}
    if use_dora:
        wanted["lora_magnitude"] = (outputs,)
    found = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    if found != wanted:
        raise ValueError(f"{path} is {found} in the file, but the model and the config want {wanted}")
    if held is not None and (held.rank != rank or tuple(wanted) != held.PARTS):
        raise ValueError(f"{path} has rank {rank} and {', '.join(wanted)}; the model's adapter {name!r} has rank "
                         f"{held.rank} and {', '.join(held.PARTS)}; load under another name")  # fmt: skip


def listed(names) -> str:
    """The first few of some names, for a message."""
    shown = ", ".join(short(name) for name in sorted(names)[:5])
    return (shown or "none") + (f" and {len(names) - 5} more" if len(names) > 5 else "")
