"""Adapter files from before transformers 5 fused the experts of a layer: a tensor per expert, routers linear layers.

transformers' own table for checkpoints says what the old names have become. Where n weights of an expert are fused, as
gate and up, A = [A_1; …; A_n] and B = blockdiag(B_1, …, B_n) of n times the rank, scaled as before, do what the n
adapters did. PEFT (0.21) joins them alike, for fewer architectures, and scales what was trained with rsLoRA otherwise.
"""

import re
from itertools import product
from typing import NamedTuple

import torch
from torch import nn

from .adapter_config import AdapterConfig, short
from .base_layer import stacked
from .multi import original
from .peft_rules import conversions


class Joined(NamedTuple):
    """Layers of a file by the names that the model has for them."""

    layers: dict[str, dict[str, torch.Tensor]]  # path → name of the part → tensor
    settings: dict[str, tuple[int, float, float]]  # path → (rank, alpha, scaling) of what was put together
    missing: set[str]  # paths that the config selects, by their old names, and the file has not


def join_experts(model: nn.Module, config: AdapterConfig, layers: dict, linear: dict, parameters: dict) -> Joined:
    """Put together what a file holds of single experts and of routers, and rename what is called otherwise now.

    Args:
        layers: path in the file → name of the part → tensor.
        linear: path → module of what needs nothing of this.
        parameters: path → module of what is adapted as a parameter and not named as one by the config.

    ValueError: experts or projections are missing, or differ in rank, scaling or shape. What the table does not know,
    or the config does not select, stays as it is.
    """
    unknown = sorted(layers.keys() - linear.keys())
    today, selected = _names_today(model) if unknown else None, config.selects(unknown)
    joined, groups, sizes, siblings = {path: layers[path] for path in layers if path in linear}, {}, {}, {}
    for path in unknown:
        name, place, count = today(path)
        wanted = name in parameters and (selected is None or path in selected)
        if wanted and groups.setdefault(name, {}).setdefault(place, path) == path:
            sizes[name] = count, stacked(original(parameters[name]))
        else:
            joined[name if name in linear and name not in joined else path] = layers[path]
    settings = {}
    for name, group in groups.items():
        settings[name] = _common_settings(name, group, sizes[name], layers, config)
        joined[name] = _joined(layers, group, *sizes[name])
        for other in parameters.keys() - groups.keys():
            if re.sub(r"\d+", "", other) == re.sub(r"\d+", "", name):
                numbers = iter(re.findall(r"\b\d+\b", other))
                siblings[re.sub(r"\b\d+\b", lambda old, n=numbers: next(n, old[0]), min(group.values()))] = other
    return Joined(joined, settings, {siblings[path] for path in config.selects(siblings) or ()})


def _common_settings(name, group: dict[tuple[int, int], str], size, layers, config) -> tuple[int, float, float]:
    count, E = size
    if group.keys() != set(product(range(count), range(E))):
        raise ValueError(f"{name} needs adapters of {count} projections of {E} experts; the file has {len(group)} of "
                         f"{count * E}, such as {short(min(group.values()))}")  # fmt: skip
    values = set(config.settings(list(group.values())).values())
    shapes = {tuple(sorted((part, tuple(t.shape)) for part, t in layers[path].items())) for path in group.values()}
    rank, alpha, scaling = min(values)
    plain = [(part, len(shape)) for part, shape in min(shapes)] == [("lora_A", 2), ("lora_B", 2)]
    if len(values) > 1 or len(shapes) > 1 or not plain:
        raise ValueError(f"{name} needs plain LoRA of one rank, scaling and shape for all {count} projections of "
                         f"{E} experts, such as {short(min(group.values()))}")  # fmt: skip
    return rank * count, alpha * count, scaling


def _joined(layers: dict, group: dict[tuple[int, int], str], count: int, E: int) -> dict[str, torch.Tensor]:
    """A (count r E, in) and B (count out, count r E), as `nn.parameters` has them."""
    experts = [[layers[group[place, expert]] for place in range(count)] for expert in range(E)]
    A = torch.stack([torch.cat([parts["lora_A"] for parts in expert]) for expert in experts])
    B = torch.stack([torch.block_diag(*(parts["lora_B"] for parts in expert)) for expert in experts])
    return {"lora_A": A.flatten(0, 1), "lora_B": B.permute(1, 2, 0).flatten(1)}


def _names_today(model: nn.Module):
    """A function: old path → path, (which of the weights fused there it is, of which expert), how many are fused."""
    entries, core = conversions(model)
    if core is None:
        return lambda path: (path, (0, 0), 1)
    fusing = [e for e in entries if isinstance(e, core.WeightConverter) and len(e.target_patterns) == 1]
    fusing = [e for e in fusing if isinstance(e.operations[0], core.MergeModulelist)]
    renamings = [e for e in entries if not isinstance(e, core.WeightConverter)]
    places = {pattern: (i, len(e.source_patterns)) for e in fusing for i, pattern in enumerate(e.source_patterns)}

    def today(path):
        name, pattern = core.rename_source_key(f"{path}.weight", renamings, fusing)
        place, count = places.get(pattern, (0, 1))
        expert = re.search(r"\.(\d+)\.\w+$", path) if pattern else None
        return name.removesuffix(".weight"), (place, int(expert[1]) if expert else 0), count

    return today
