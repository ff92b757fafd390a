"""Adapters on disk, in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

Loading is strict. Every tensor in the file must find its layer, and every layer that the config selects its tensors;
otherwise nothing is changed. Files are taken for untrusted, see `adapter_file` and `adapter_config`.
"""

import copy
import math
import re
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ..quant.model import is_conv1d
from . import multi, peft_rules
from .adapter_config import CONFIG_NAME, AdapterConfig, read_adapter_config
from .adapter_file import PREFIX, WEIGHTS_NAME, check_fit, read_adapter_tensors
from .base_layer import adapter_like, stacked
from .files import write_json, write_safetensors
from .multi import set_adapter
from .names import ending_in, train_only, unwrapped
from .parameters import LoRAWeight, file_prefixes, kind_for, parameter_name, place
from .targets import outer_modules
from .variants import DoRALinear

__all__ = ["LoadReport", "load_adapter", "read_adapter_config", "save_adapter", "set_adapter"]


def save_adapter(model: nn.Module, directory: str | Path, base_model: str | Path | None = None, name: str | None = None,
                 save_for: str = "any") -> None:  # fmt: skip
    """Write an adapter as PEFT does, so that PEFT, transformers and vLLM load it.

    A PiSSA adapter is written as the plain LoRA of twice the rank that it is on the untouched base. `directory` gets
    `adapter_model.safetensors` and `adapter_config.json`, each whole or not at all; `base_model` is written there as
    `base_model_name_or_path`; `name` is the adapter to write (default: the active one).

    A warning names layers that PEFT would treat otherwise. Those that it takes for fused experts, `save_for="peft"`
    writes as `target_parameters`, and those whose names it changes again under their old ones: as only PEFT and
    `load_adapter` read them.

    ValueError: no LoRA layers, no such adapter, values that are not finite, or modules trained whole that PEFT could
    not tell from others. Nothing is written then.
    """
    model = unwrapped(model)
    adapted = multi.modules_with_adapters(model)
    if not adapted:
        raise ValueError("the model has no adapter; call apply_lora_to_model first")
    name = multi.active_adapter(model) if name is None else name
    layers, whole = {}, {}
    for path, module in adapted.items():
        adapter = multi.adapter_of(module, name)
        if adapter is not None:
            (whole if isinstance(module, multi.ModuleToSave) else layers)[path] = adapter
    if not layers:
        raise ValueError(f"the model has no adapter {name!r}, only: {', '.join(multi.adapter_names(model)) or 'none'}")
    tensors = {}
    prefixes = file_prefixes(model, {path: adapted[path] for path in layers})
    if save_for == "peft":
        old = peft_rules.old_names(model, prefixes.values())
        prefixes = {path: old.get(prefix) or prefix for path, prefix in prefixes.items()}
    for path, adapter in layers.items():
        prefix = prefixes[path]
        tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = adapter.factors()
        if hasattr(adapter, "lora_magnitude"):
            tensors[f"{prefix}.lora_magnitude_vector"] = adapter.lora_magnitude
    for path, module in whole.items():
        tensors.update({f"{path}.{key}": tensor for key, tensor in module.state_dict().items()})
    # Under fully_shard every rank must call this.
    tensors = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in tensors.items()}
    for path in layers:
        shape = tensors[f"{prefixes[path]}.lora_A.weight"].shape
        if shape[1:] != (adapted[path].in_features,):
            raise ValueError(f"{path} holds a shard of its lora_A, of shape {tuple(shape)}: call save_adapter under "
                             "FullyShardedDataParallel.summon_full_params(model)")  # fmt: skip
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"adapter {name!r}: {key} holds NaN or infinite values; it was not saved")
    ambiguous = [path for path in outer_modules(model) if path.endswith(tuple(whole)) and path not in whole]
    if ambiguous:
        raise ValueError(f"modules are chosen by the ends of their paths in PEFT's files: {', '.join(whole)} would "
                         f"select {ambiguous[0]!r} too, which this adapter does not replace")  # fmt: skip
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parameters = {path for path in layers if isinstance(adapted[path], LoRAWeight)}
    redirected = peft_rules.redirected(model, layers.keys() - parameters)
    for words in peft_rules.differences(model, layers, redirected, save_for):
        warnings.warn(words, stacklevel=2)
    parameters |= redirected if save_for == "peft" else set()
    names = {path: parameter_name(path, adapted[path]) for path in parameters}
    bases = {path: adapted[path].base_layer for path in layers}
    config = _config_of(model, layers, bases, sorted(whole), base_model, names)
    write_safetensors(directory / WEIGHTS_NAME, {PREFIX + key: tensor.clone() for key, tensor in tensors.items()})
    write_json(directory / CONFIG_NAME, config)


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


def load_adapter(model: nn.Module, directory: str | Path, name: str = "default", trainable: bool = False) -> LoadReport:
    """Put the adapter that lies in `directory` into the model, in place, and make it the active one.

    If the model has an adapter of this name already, that must have the same layers and ranks; its parameters take the
    file's values. `trainable`: whether the parameters of a new adapter require gradients; with True the base model is
    frozen, as by `apply_lora_to_model`. What adapters there are keep their `requires_grad`.

    Returns a LoadReport; `print` it.
    ValueError: a damaged or unsupported file; or one that does not fit the model, naming what matched, what the model
    needs and the file lacks (missing), and what the model has no place for (unexpected). The model is unchanged then.
    """
    model = unwrapped(model)
    multi.check_name(name)
    config = AdapterConfig(**read_adapter_config(directory))
    tensors = read_adapter_tensors(directory)
    multi.check_unmerged(model)
    try:
        layers, modules, settings, parts_of = check_fit(model, config, tensors, name)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None

    # Everything that can fail lies before the first change to the model.
    new: dict[nn.Module, nn.Module] = {}
    for path, layer in layers.items():
        kind = DoRALinear if config.use_dora else kind_for(multi.original(layer))
        like = adapter_like(multi.original(layer))
        parts = {part: nn.Parameter(t.to(**like), trainable) for part, t in parts_of[path].items()}
        values = dict(zip(multi.SETTINGS, (*settings[path], config.lora_dropout), strict=True))
        new[layer] = multi.RestingAdapter(kind, parts | values)
    for path, module in modules.items():
        new[module] = copy.deepcopy(multi.original(module)).requires_grad_(trainable)
        new[module].load_state_dict({key: tensors.whole[f"{path}.{key}"] for key in new[module].state_dict()})

    place(model, layers)
    kept = [p for p in multi.adapter_parameters(model) if p.requires_grad]
    multi.put_in(model, name, new)
    if trainable:
        train_only(model, [*kept, *(p for adapter in new.values() for p in adapter.parameters())])
    return LoadReport(name, sorted(layers), sorted(modules), config)


def _config_of(model, layers: dict, bases: dict, modules: list[str], base_model: str | None, parameters: dict) -> dict:
    """The config that makes PEFT build exactly these layers, adapters around `bases`, with exactly these scalings.

    `parameters`: path → name of what is a parameter to PEFT.
    """
    ranks = {path: len(adapter.factors()[0]) // stacked(bases[path]) for path, adapter in layers.items()}
    scalings = [(a.scaling, a.lora_alpha / math.sqrt(a.rank), a.lora_alpha / a.rank) for a in layers.values()]
    use_rslora = all(s == root for s, root, _ in scalings) and any(s != plain for s, _, plain in scalings)
    divisor = math.sqrt if use_rslora else int
    alphas = {}
    for path, adapter in layers.items():
        alpha = adapter.lora_alpha * (ranks[path] // adapter.rank)  # twice the rank for PiSSA
        if alpha / divisor(ranks[path]) != adapter.scaling:
            alpha = adapter.scaling * divisor(ranks[path])
        alphas[path] = int(alpha) if alpha == int(alpha) else alpha
    rank, rank_pattern = _common({parameters.get(path, path): value for path, value in ranks.items()})
    alpha, alpha_pattern = _common({parameters.get(path, path): value for path, value in alphas.items()})
    config = AdapterConfig(
        r=rank,
        lora_alpha=alpha,
        # PEFT knows no dropout on parameters
        lora_dropout=0.0 if parameters else Counter(a.lora_dropout for a in layers.values()).most_common(1)[0][0],
        target_modules=_targets(model, layers.keys() - parameters),
        target_parameters=sorted(parameters.values()) or None,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        modules_to_save=modules or None,
        use_rslora=use_rslora,
        fan_in_fan_out=any(map(is_conv1d, bases.values())),
        use_dora=any(hasattr(adapter, "lora_magnitude") for adapter in layers.values()),
        base_model_name_or_path=str(base_model or getattr(model, "name_or_path", None) or "") or None,
        task_type="CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None,
    )
    further = {"auto_mapping": None, "inference_mode": True, "peft_type": "LORA", "revision": None}
    if peft_rules.another_class(model):  # AutoPeftModel then loads the class that the names are of
        further["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": "transformers"}
    return dict(sorted((asdict(config) | further).items()))


def _common(values: dict) -> tuple:
    """The most common value, and the exceptions as PEFT's patterns: by layer name, or by path anchored at its start."""
    common = Counter(values.values()).most_common(1)[0][0]
    by_name: dict[str, set] = {}
    for path, value in values.items():
        by_name.setdefault(_last(path), set()).add(value)
    paths = {f"^{re.escape(path)}": v for path, v in values.items() if v != common and len(by_name[_last(path)]) > 1}
    names = {name: found.pop() for name, found in by_name.items() if len(found) == 1 and common not in found}
    return common, paths | names


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _targets(model, paths: set[str]) -> list[str] | str:
    """The layers' last names if they select these layers and no others; else the whole paths, as an expression where
    one is the end of another's."""
    names, outer = {_last(path) for path in paths}, outer_modules(model)
    if {path for path in outer if _last(path) in names} == paths:
        return sorted(names)
    alone = ending_in(outer, paths) == paths
    return sorted(paths) if alone else "|".join(map(re.escape, sorted(paths)))
