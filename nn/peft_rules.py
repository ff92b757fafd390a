"""Where PEFT does something else with an adapter that we save, by the rules in its source (0.21), and what helps.

PEFT keeps transformers' new fused experts compatible with adapters of old checkpoints by their names: what is called
`gate_proj` in a mixture of experts becomes an adapter on all experts, also where it is a dense layer or a shared expert
beside them. As a parameter, `….gate_proj.weight`, it stays what it is.
"""

import sys
from collections.abc import Collection, Iterable
from types import ModuleType

from torch import nn

from ..quant.readers import listed, weights_read

OF_EXPERTS = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
EXPERTS = ("gate.weight", "gate_up_proj", "down_proj")  # what they have become
WITHOUT_OUT_PROJ = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def redirected(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """The layers that PEFT takes for the fused experts."""
    names = _of_experts(model)
    return {path for path in paths if path.rpartition(".")[2] in names}


def all_linear_parameters(model: nn.Module) -> tuple[str, ...]:
    """The parameters that "all-linear" also adapts: routers and experts that were linear layers once."""
    return EXPERTS if _of_experts(model) else ()


def _of_experts(model: nn.Module) -> tuple[str, ...]:
    patterns = _table("transformers.conversion_mapping", "_MODEL_TO_CONVERSION_PATTERN") | {"mixtral": "mixtral"}
    return OF_EXPERTS.get(patterns.get(_model_type(model)), ())


def unloadable(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """In words, the layers on which no way of writing the adapter makes PEFT do what we do."""
    refused = {path for path in paths if path.rpartition(".")[2] in ("out_proj", "conv1d")}
    if refused and _model_type(model) in WITHOUT_OUT_PROJ:
        return [f"PEFT refuses an adapter on {listed(refused)} of {_model_type(model)}"]
    return _said({
        "PEFT's adapter on {} does not act where the model's code reads the weight": weights_read(model, set(paths)),
        "PEFT looks for {} under names that no layer has": {p for p, old in old_names(model, paths).items() if not old},
    })  # fmt: skip


def old_names(model: nn.Module, prefixes: Iterable[str]) -> dict[str, str | None]:
    """How keys must begin in a file for PEFT to find them, where it is not as they do: it applies transformers' table
    for old checkpoints to ours too, which may change a name of today again. None: nothing becomes this name."""
    entries, core = conversions(model)
    if core is None:
        return {}
    entries = [entry for entry in entries if isinstance(entry, core.WeightRenaming)]
    back = [entry.reverse_transform() for entry in reversed(entries)]

    def renamed(prefix, entries):
        return core.rename_source_key(f"{prefix}.lora_A.weight", entries, [])[0].removesuffix(".lora_A.weight")

    old = {prefix: renamed(prefix, back) for prefix in prefixes if renamed(prefix, entries) != prefix}
    return {prefix: name if renamed(name, entries) == prefix else None for prefix, name in old.items()}


def conversions(model: nn.Module) -> tuple[list, ModuleType | None]:
    """What transformers' table for old checkpoints has for the model, and the module that applies it; None where there
    is no such table."""
    table, core = (sys.modules.get(f"transformers.{name}") for name in ("conversion_mapping", "core_model_loading"))
    if table is None or core is None or not hasattr(model, "base_model_prefix"):
        return [], None
    return table.get_model_conversion_mapping(model), core


def differences(model: nn.Module, paths: Iterable[str], redirected: Iterable[str], save_for: str) -> list[str]:
    """In words, where PEFT will not do what we do with an adapter of these layers."""
    words, mendable = unloadable(model, paths), {
        "PEFT takes {} for the fused experts and drops what was trained": redirected,
        "PEFT looks for {} under names that no layer has": {p for p, old in old_names(model, paths).items() if old},
    }  # fmt: skip
    if save_for != "peft":
        words += [f"{said}; written with --save-for peft (save_for='peft') it applies them" for said in _said(mendable)]
    if causal := another_class(model):
        words.append(f"PEFT finds the layers in {type(model).__name__} (AutoModelForImageTextToText, AutoPeftModel); "
                     f"in {causal}, which AutoModelForCausalLM makes of this base, they have other names")  # fmt: skip
    return words


def _said(faults: dict[str, Collection[str]]) -> list[str]:
    return [words.format(listed(paths)) for words, paths in faults.items() if paths]


def another_class(model: nn.Module) -> str | None:
    """The class that AutoModelForCausalLM makes of the model's checkpoint, if its layers go by other names there."""
    causal, whole = (_table("transformers.models.auto.modeling_auto", f"MODEL_FOR_{kind}_MAPPING_NAMES")
                     .get(_model_type(model)) for kind in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"))  # fmt: skip
    return causal if whole == type(model).__name__ != causal else None


def _table(module: str, name: str) -> dict:
    """A table of transformers; empty before its version 5, and where it is not in use."""
    return getattr(sys.modules.get(module), name, {})


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)
