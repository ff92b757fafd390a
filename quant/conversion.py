"""What the tensors of a checkpoint become in a transformers model: renamed, and fused, expert by expert.

Most checkpoints hold the experts of a layer as E separate weights under names of their own. transformers renames and
fuses as it loads, by a table for each architecture (its conversion_mapping.py). The same table is used here, but where
a fused weight is quantized anyway its parts are converted for one expert at a time, as soon as they have been read.
"""

import re
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn


class Conversion:
    """From names in files to names in the model.

    Args:
        model: on the meta device, nothing replaced yet.
        keys: every name in the files.
        experts: names of the fused weights that are wanted one expert at a time.
        rename: gives the model's name for a name in the files; None: as transformers does it, if the model is its own.

    Attributes:
        names: key → name in the model, or None for what the model's class says it has no use for.
    """

    def __init__(
        self, model: nn.Module, keys: Iterable[str], experts: set[str], rename: Callable[[str], str] | None = None
    ):
        transformers = sys.modules.get("transformers")
        self.names: dict[str, str | None] = {key: key if rename is None else rename(key) for key in keys}
        self.groups: dict[str, _Group] = {}  # by key
        if rename is None and transformers is not None and isinstance(model, transformers.PreTrainedModel):
            self._by_transformers(model, experts)

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
        for key in sorted(self.names, key=core.dot_natural_key):
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
        if key not in self.groups:
            return [] if self.names[key] is None else [(self.names[key], None, tensor)]
        group = self.groups[key]
        group.tensors[key] = tensor.clone()  # not a view that would keep the whole shard
        return group.convert() if len(group.tensors) == len(group.patterns) else []


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
