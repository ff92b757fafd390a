"""What the tensors of a checkpoint become in a transformers model: renamed, and fused, expert by expert.

Most checkpoints hold the experts of a layer as E separate weights under names of their own. transformers renames and
fuses as it loads, by a table for each architecture (its conversion_mapping.py). The same table is used here, but where
a fused weight is quantized anyway its parts are converted for one expert at a time, as soon as they have been read.

Weights in FP8, and those in NF4 that a model has fused since, are decoded first: a code with the scale of its block.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn

from .nf4 import FACTS, NF4Tensor

FP8_SCALES, FP8_BLOCK = "_scale_inv", (128, 128)  # behind the weight's name; where a config does not say otherwise


class Conversion:
    """From names in files to names in the model.

    Args:
        model: on the meta device, nothing replaced yet.
        keys: every name in the files.
        experts: names of the fused weights that are wanted one expert at a time.
        rename: gives the model's name for a name in the files; None: as transformers does it, if the model is its own.
        decode: decode every weight in NF4, in place of handing its parts on.

    Attributes:
        names: key → name in the model, or None for what the model's class says it has no use for.
    """

    def __init__(
        self, model: nn.Module, keys: Iterable[str], experts: set[str], rename: Callable[[str], str] | None = None,
        decode: bool = False,
    ):  # fmt: skip
        transformers, keys = sys.modules.get("transformers"), set(keys)
        in_fp8 = {key: key.removesuffix(FP8_SCALES) for key in keys if key.endswith(FP8_SCALES)}
        idle = {f"{stem.rpartition('.')[0]}.activation_scale" for stem in in_fp8.values()}
        self.names: dict[str, str | None] = {key: key if rename is None else rename(key)
                                             for key in keys - in_fp8.keys() - idle}  # fmt: skip
        self.names |= dict.fromkeys(idle & keys)
        self.groups: dict[str, _Group] = {}  # by key
        if rename is None and transformers is not None and isinstance(model, transformers.PreTrainedModel):
            self._by_transformers(model, experts)
        config = getattr(getattr(model, "config", None), "quantization_config", None)
        self.block = (config.get("weight_block_size") if isinstance(config, dict) else None) or FP8_BLOCK
        self.packed = in_fp8 | {stem: stem for stem in in_fp8.values()}  # key → the weight that it is a part of
        parts = {key: found[1] for key in keys if (found := re.fullmatch(r"(.+\.weight)(\..+)?", key))}
        in_nf4 = {stem for stem in parts.values() if f"{stem}.{FACTS}" in keys and (decode or stem in self.groups)}
        self.packed |= {key: stem for key, stem in parts.items() if stem in in_nf4}
        self.counts, self.arrived = Counter(self.packed.values()), {}

    def _by_transformers(self, model, experts: set[str]) -> None:
        from transformers import conversion_mapping
        from transformers import core_model_loading as core

        known, groups, mapping = model.state_dict(), {}, conversion_mapping.get_model_conversion_mapping(model)
        converters = [entry for entry in mapping if isinstance(entry, core.WeightConverter)]
        renamings = [entry for entry in mapping if not isinstance(entry, core.WeightConverter)]
        converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        # The last two transformers leaves out of any model.
        ignored = (*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"\bposition_ids$")
        facts = {"model": SimpleNamespace(get_parameter=known.__getitem__), "config": model.config}
        for key in sorted((key for key, name in self.names.items() if name), key=core.dot_natural_key):
            name, pattern = core.rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            if name not in known and key in known:
                name, pattern = key, None
            unwanted = name not in known and any(re.search(each, name) for each in ignored)
            self.names[key] = None if unwanted else name
            if pattern is not None and not unwanted:
                converter, expert = converter_of[pattern], None
                first = converter.operations[0]
                if name in experts and isinstance(first, core.MergeModulelist) and first.dim == 0:
                    expert = int([part for part in key.split(".") if part.isdigit()][-1])
                group = groups.setdefault((name, expert), _Group(name, expert, converter, facts))
                group.patterns[key] = pattern
                self.groups[key] = group

    def take(self, key: str, tensor: torch.Tensor) -> list[tuple[str, int | None, torch.Tensor]]:
        """The tensors of the model that are complete with this one: name, which expert of it (None: whole), value."""
        if key in self.packed:
            part, key = key, self.packed[key]
            parts = self.arrived.setdefault(key, {})
            parts[part] = tensor.clone()
            if len(parts) < self.counts[key]:
                return []
            tensor = self._decoded(key, self.arrived.pop(key))
        if key not in self.groups:
            return [] if self.names[key] is None else [(self.names[key], None, tensor)]
        group = self.groups[key]
        group.tensors[key] = tensor.clone()  # not a view that would keep the whole shard
        return group.convert() if len(group.tensors) == len(group.patterns) else []

    def _decoded(self, key: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        if key + FP8_SCALES in parts:
            return decode_fp8(parts[key], parts[key + FP8_SCALES], self.block)
        return NF4Tensor.from_state_dict(parts, key.removesuffix("weight")).dequantize()


def decode_fp8(weight: torch.Tensor, scales: torch.Tensor, block: Sequence[int] = FP8_BLOCK) -> torch.Tensor:
    """weight (…, N, K) in FP8, with a scale for each block of (rows, columns), those at the edges may be cut short, or
    one for all → (…, N, K) fp32.

    ValueError: the weight is not in FP8, or its scales are not so many or no floating-point numbers.
    """
    if weight.dtype.itemsize != 1 or not (weight.is_floating_point() and scales.is_floating_point()):
        raise ValueError(f"FP8 with floating-point scales is read, got {weight.dtype} with {scales.dtype}")
    wide = scales.float()
    if scales.numel() > 1:
        sizes = *weight.shape[:-2], *(-(-size // each) for size, each in zip(weight.shape[-2:], block, strict=True))
        if scales.shape != sizes:
            raise ValueError(f"{tuple(weight.shape)} in FP8 must have scales {sizes}, got {tuple(scales.shape)}")
        rows, columns = (torch.arange(size, device=wide.device) // each
                         for size, each in zip(weight.shape[-2:], block, strict=True))  # fmt: skip
        wide = wide[..., rows[:, None], columns]
    return weight.float() * wide


@dataclass
class _Group:
    """The tensors of the files that one conversion takes together."""

    name: str
    expert: int | None
    converter: object
    facts: dict
    patterns: dict[str, str] = field(default_factory=dict)  # key → the converter's pattern for it, by layer and expert
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def convert(self) -> list[tuple[str, int | None, torch.Tensor]]:
        converter = deepcopy(self.converter)
        for key, pattern in self.patterns.items():
            converter.add_tensor(self.name, key, pattern, self.tensors.pop(key))
        made = converter.convert(self.name, **self.facts)
        made = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return [(name, self.expert, value if self.expert is None else value[0]) for name, value in made.items()]
