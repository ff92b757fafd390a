"""Adapters on disk, in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

Loading is strict. Every tensor in the file must find its layer, and every layer that the config
selects must find its tensors; otherwise nothing is changed and the error names what is missing and
what is left over. Files are taken for untrusted, see `adapter_file` and `adapter_config`.
"""

import copy
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..quant.model import is_conv1d
from .adapter_config import CONFIG_NAME, AdapterConfig, load_config, read_adapter_config
from .adapter_file import PREFIX, WEIGHTS_NAME, AdapterTensors, read_adapter_tensors
from .adapter_fit import Fit, check_fit, original
from .adapter_math import factors
from .files import write_json, write_safetensors
from .lora import LoRALinear, adapter_like
from .multi import (
    SETTINGS,
    ModuleToSave,
    RestingAdapter,
    active_adapter,
    adapter_names,
    carriers,
    check_name,
    check_unmerged,
    linear_layers,
    outer_modules,
    set_adapter,
    share_of,
    without_adapter,
)

__all__ = ["LoadReport", "load_adapter", "read_adapter_config", "save_adapter", "set_adapter"]


@dataclass(frozen=True)
class LoadReport:
    """What `load_adapter` did: the adapter's name, the layers and the whole modules that it touches."""

    name: str
    layers: list[str]
    modules: list[str]
    config: AdapterConfig

    def __str__(self):
        whole = f" and {len(self.modules)} whole modules" if self.modules else ""
        return f"adapter {self.name!r}: all {len(self.layers)} layers{whole} of the file matched"


def save_adapter(
    model: nn.Module, directory: str | Path, base_model: str | Path | None = None, name: str | None = None
) -> None:
    """Write an adapter as PEFT does, so that PEFT, transformers and vLLM load it.

    Args:
        model: holds LoRALinear layers, merged or not.
        directory: gets `adapter_model.safetensors` and `adapter_config.json`; made if it is not there.
            Files of these names are replaced, each whole or not at all.
        base_model: the directory or hub name of the base model (`base_model_name_or_path`).
        name: the adapter to write (default: the active one).

    A PiSSA adapter is written as the plain LoRA of twice the rank that it is relative to the
    untouched base, so whoever loads it needs no base of its own.

    Raises:
        ValueError: no LoRA layers, no such adapter, values that are not finite, or modules trained whole that
            PEFT could not tell from others. Nothing is written then.
    """
    model = _unwrapped(model)
    if not carriers(model):
        raise ValueError("the model has no adapter; call apply_lora_to_model first")
    name = active_adapter(model) if name is None else name
    layers, whole = {}, {}
    for path, carrier in carriers(model).items():
        share = share_of(carrier, name)
        if share is not None:
            (whole if isinstance(carrier, ModuleToSave) else layers)[path] = share
    if not layers:
        raise ValueError(f"the model has no adapter {name!r}, only: {', '.join(adapter_names(model)) or 'none'}")
    tensors = {}
    for path, share in layers.items():
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = factors(share)
        if share.lora_magnitude is not None:
            tensors[f"{path}.lora_magnitude_vector"] = share.lora_magnitude
    for path, module in whole.items():
        tensors.update({f"{path}.{key}": tensor for key, tensor in module.state_dict().items()})
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"adapter {name!r}: {key} holds NaN or infinite values; it was not saved")
    ambiguous = [path for path in outer_modules(model) if path.endswith(tuple(whole)) and path not in whole]
    if ambiguous:
        raise ValueError(
            f"modules are chosen by the ends of their paths in PEFT's files: {', '.join(whole)} would select "
            f"{ambiguous[0]!r} too, which this adapter does not replace"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = _config_of(model, layers, sorted(whole), base_model)
    write_safetensors(directory / WEIGHTS_NAME, {PREFIX + key: tensor.clone() for key, tensor in tensors.items()})
    write_json(directory / CONFIG_NAME, config)


def load_adapter(model: nn.Module, directory: str | Path, name: str = "default", trainable: bool = False) -> LoadReport:
    """Put the adapter that lies in `directory` into the model, in place, and make it the active one.

    Args:
        model: a plain or NF4 model, with or without adapters. LoRALinear layers appear exactly where
            the file has tensors. If the model has an adapter of this name already, it must have
            the same layers and ranks; its parameters then take the file's values and keep
            their `requires_grad`.
        directory: as written by `save_adapter` or by PEFT.
        name: what to call it in this model.
        trainable: whether the parameters of a new adapter require gradients. Nothing
            else in the model changes its `requires_grad`, but for the layers that get their first
            adapter, whose own weights are frozen.

    Returns:
        A LoadReport; `print` it.

    Raises:
        ValueError: a damaged or unsupported file; or one that does not fit the model, naming what matched, what the
            model needs and the file lacks (missing), and what the model has no place for (unexpected). The model
            is unchanged then.
    """
    model = _unwrapped(model)
    check_name(name)
    config = load_config(directory)
    tensors = read_adapter_tensors(directory)
    check_unmerged(model)
    fit = check_fit(model, config, tensors, name, str(directory))

    # Everything that can fail lies before the first change to the model.
    shares = {path: _new_share(fit, path, config, tensors, trainable) for path in fit.layers}
    copies = {path: _new_copy(module, path, tensors, trainable) for path, module in fit.modules.items()}
    for path, share in shares.items():
        layer = fit.layers[path]
        if not isinstance(layer, LoRALinear):
            layer = without_adapter(layer)
            for place in fit.places[path]:
                model.set_submodule(place, layer)
        _put(layer, name, share, layer.resting)
    for path, module in copies.items():
        wrapper = fit.modules[path]
        if not isinstance(wrapper, ModuleToSave):
            wrapper = ModuleToSave(wrapper)
            model.set_submodule(path, wrapper)
        _put(wrapper, name, module, wrapper.copies)
    set_adapter(model, name)
    return LoadReport(name, sorted(shares), sorted(copies), config)


def _new_share(fit: Fit, path: str, config: AdapterConfig, tensors: AdapterTensors, trainable: bool) -> RestingAdapter:
    like = adapter_like(original(fit.layers[path]))

    def parameter(tensor):
        return None if tensor is None else nn.Parameter(tensor.to(**like), requires_grad=trainable)

    rank, alpha, scaling = fit.settings[path]
    return RestingAdapter(
        parameter(tensors.lora_A[path]), parameter(tensors.lora_B[path]), rank, alpha, scaling, config.lora_dropout,
        parameter(tensors.magnitude.get(path)),
    )  # fmt: skip


def _new_copy(module: nn.Module, path: str, tensors: AdapterTensors, trainable: bool) -> nn.Module:
    fresh = copy.deepcopy(original(module)).requires_grad_(trainable)
    fresh.load_state_dict({key: tensors.whole[f"{path}.{key}"] for key in fresh.state_dict()})
    return fresh


@torch.no_grad()
def _put(carrier: LoRALinear | ModuleToSave, name: str, new: nn.Module, others: nn.ModuleDict) -> None:
    """Hand `new` to the carrier, or only its values where the carrier has an adapter of this name already."""
    held = share_of(carrier, name)
    if held is None:
        others[name] = new
        return
    if isinstance(carrier, ModuleToSave):
        held.load_state_dict(new.state_dict())
        return
    for part in ("lora_A", "lora_B", "lora_magnitude"):
        if getattr(new, part) is not None:
            getattr(held, part).copy_(getattr(new, part))
    for setting in SETTINGS:
        setattr(held, setting, getattr(new, setting))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and DistributedDataParallel's wrappers: the file has its paths."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod
    return model


def _config_of(model, layers: dict, modules: list[str], base_model: str | None) -> dict:
    """The config that makes PEFT build exactly these layers with exactly these scalings."""
    ranks = {path: factors(share)[0].shape[0] for path, share in layers.items()}
    rslora = all(share.scaling == share.lora_alpha / math.sqrt(share.rank) for share in layers.values()) and any(
        share.scaling != share.lora_alpha / share.rank for share in layers.values()
    )
    divisor = math.sqrt if rslora else int
    alphas = {}
    for path, share in layers.items():
        alpha = share.lora_alpha * (ranks[path] // share.rank)  # twice the rank for PiSSA
        alphas[path] = alpha if alpha / divisor(ranks[path]) == share.scaling else share.scaling * divisor(ranks[path])
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common({path: int(a) if a == int(a) else a for path, a in alphas.items()})
    name = type(model).__name__
    return {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": str(base_model or getattr(model, "name_or_path", None) or "") or None,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": any(is_conv1d(original(m)) for path, m in linear_layers(model).items() if path in layers),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": Counter(share.lora_dropout for share in layers.values()).most_common(1)[0][0],
        "modules_to_save": modules or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": _targets(model, set(layers)),
        "task_type": "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "use_dora": any(share.lora_magnitude is not None for share in layers.values()),
        "use_rslora": rslora,
    }


def _common(values: dict) -> tuple:
    """The most common value, and the exceptions as PEFT's patterns: by layer name, or by path anchored at its start."""
    common = Counter(values.values()).most_common(1)[0][0]
    by_name: dict[str, set] = {}
    for path, value in values.items():
        by_name.setdefault(path.rpartition(".")[2], set()).add(value)
    paths = {f"^{re.escape(path)}": v for path, v in values.items() if v != common and len(by_name[_last(path)]) > 1}
    names = {name: found.pop() for name, found in by_name.items() if len(found) == 1 and common not in found}
    return common, paths | names


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _targets(model, paths: set[str]) -> list[str]:
    """The layers' last names if they select these layers and no others; else the whole paths."""
    names = {_last(path) for path in paths}
    chosen = {path for path in outer_modules(model) if _last(path) in names}
    return sorted(names if chosen == paths else paths)
