"""Does an adapter file fit a model? Names, ranks and shapes are compared before anything is changed."""

from dataclasses import dataclass

import torch
from torch import nn

from .adapter_config import AdapterConfig
from .adapter_file import AdapterTensors, listed
from .inject import output_heads
from .lora import LoRALinear, features
from .multi import ModuleToSave, linear_layers, outer_modules, share_of


@dataclass(frozen=True)
class Fit:
    """The places in a model where a fitting adapter goes.

    Attributes:
        layers: path → layer to adapt (adapted already or not).
        places: path → all paths of this layer: more than one if the model uses it more than once.
        modules: path → module to replace whole (replaced already or not).
        settings: path of each layer → (rank, alpha, scaling).
    """

    layers: dict[str, nn.Module]
    places: dict[str, list[str]]
    modules: dict[str, nn.Module]
    settings: dict[str, tuple[int, float, float]]


def check_fit(model: nn.Module, config: AdapterConfig, tensors: AdapterTensors, name: str, where: str) -> Fit:
    """Compare an adapter with a model, as the adapter `name` of which it is to be loaded.

    Raises:
        ValueError: the message begins with `where` and names the layers that matched, are missing in
            the file and are unexpected there, or the layer whose rank or shape is wrong.
    """
    linear = linear_layers(model)
    modules = _modules_to_save(model, config, where)
    _compare_names(linear, modules, config, tensors, name, where, output_heads(model, linear))
    settings = config.settings(tensors.lora_A)
    for path, (rank, _, _) in settings.items():
        _check_layer(path, linear[path], rank, config, tensors, name, where)
    for key, tensor in tensors.base.items():
        _check_base(key, tensor, {path: linear[path] for path in settings}, where)
    for path, module in modules.items():
        for key, tensor in original(module).state_dict().items():
            given = tensors.whole[f"{path}.{key}"]
            if given.shape != tensor.shape or not tensor.is_floating_point():
                raise ValueError(
                    f"{where}: {path}.{key} is {tuple(given.shape)} in the file and {tuple(tensor.shape)} "
                    f"of {tensor.dtype} in the model"
                )
    places = {path: [other for other in linear if linear[other] is linear[path]] for path in settings}
    return Fit({path: linear[path] for path in settings}, places, modules, settings)


def original(module: nn.Module) -> nn.Module:
    """The model's own module, without the adapters around it."""
    return module.base_layer if isinstance(module, (LoRALinear, ModuleToSave)) else module


def _modules_to_save(model, config, where) -> dict[str, nn.Module]:
    """Path → module of what the config replaces whole.

    One name that is there is enough: PEFT writes both "classifier" and "score" for every classification
    model. Tensors in the file for a module that is not there are found to be unexpected.
    """
    endings = tuple(config.modules_to_save or ())
    modules = {path: module for path, module in outer_modules(model).items() if path.endswith(endings)}
    if endings and not modules:
        raise ValueError(f"{where}: modules_to_save names {listed(set(endings))}, which the model does not have")
    for path, module in modules.items():
        inner = [inside for inside in modules if inside.startswith(f"{path}.")]
        inner += [f"{path}.{at}" for at, child in module.named_modules() if isinstance(child, LoRALinear)]
        if inner:
            raise ValueError(f"{where}: modules_to_save would replace {path!r}, which holds the adapted {inner[0]!r}")
    return modules


def _compare_names(linear, modules, config, tensors, name, where, heads) -> None:
    given = set(tensors.lora_A)
    place = given & linear.keys()
    selected = config.selects(linear, heads)
    held = {path for path, layer in linear.items() if isinstance(layer, LoRALinear) and share_of(layer, name)}
    wanted = (selected or set()) | held
    matched = {id(linear[path]) for path in place}
    missing = {path for path in wanted - given if id(linear[path]) not in matched}
    unexpected = given - place
    if selected is not None:
        unexpected |= given - selected
    if held:
        unexpected |= given - held
    keys = {f"{path}.{key}" for path, module in modules.items() for key in original(module).state_dict()}
    missing |= keys - tensors.whole.keys()
    unexpected |= tensors.whole.keys() - keys
    if missing or unexpected:
        raise ValueError(
            f"{where}: the adapter does not fit the model: matched: {len(given - unexpected)} layers; "
            f"missing in the file: {listed(missing)}; unexpected in the file: {listed(unexpected)}"
        )


def _check_base(key, tensor, layers, where) -> None:
    path, _, leaf = key.rpartition(".")
    own = original(layers[path]).state_dict().get(leaf) if path in layers else None
    if own is None:
        raise ValueError(f"{where}: unexpected in the file: {key} of the base model")
    coarse = own.dtype if own.dtype.itemsize < tensor.dtype.itemsize else tensor.dtype
    if own.shape != tensor.shape or not torch.equal(own.to(coarse).cpu(), tensor.to(coarse)):
        raise ValueError(
            f"{where}: the file brings its own {key} of shape {tuple(tensor.shape)}, which is not the model's of shape "
            f"{tuple(own.shape)}: another base model, or a resized vocabulary"
        )


def _check_layer(path, layer, rank, config, tensors, name, where) -> None:
    A, B, magnitude = tensors.lora_A[path], tensors.lora_B[path], tensors.magnitude.get(path)
    outputs, inputs = features(layer)
    if original(layer).weight.is_meta:
        raise ValueError(f"{path} is on the meta device, where an adapter would lose its values")
    if A.shape[0] != rank:
        raise ValueError(f"{where}: {path} has rank {A.shape[0]}, but the config gives it rank {rank}")
    if (B.shape[0], A.shape[1]) != (outputs, inputs):
        raise ValueError(
            f"{where}: {path} maps {A.shape[1]} to {B.shape[0]} features, the model's layer {inputs} to {outputs}"
        )
    if config.use_dora != (magnitude is not None):
        found = "no" if magnitude is None else "a"
        raise ValueError(f"{where}: {path} has {found} lora_magnitude_vector, but use_dora is {config.use_dora}")
    if magnitude is not None and magnitude.shape != (outputs,):
        raise ValueError(f"{where}: {path}: lora_magnitude_vector must be ({outputs},), got {tuple(magnitude.shape)}")
    held = share_of(layer, name) if isinstance(layer, LoRALinear) else None
    if held is None:
        return
    if held.start_A is not None:
        raise ValueError(f"the model's adapter {name!r} is in PiSSA training; load under another name")
    if held.rank != rank or (held.lora_magnitude is None) != (magnitude is None):
        raise ValueError(
            f"{where}: {path} has rank {rank}{', DoRA' * config.use_dora}; the model's adapter {name!r} has rank "
            f"{held.rank}{', DoRA' * (held.lora_magnitude is not None)}; load under another name"
        )
