"""`adapter_config.json`: what PEFT writes there, what of it we can honour, and which layers it selects.

A field either changes what the adapter computes, and then it is honoured or refused by name, or it does not, and then
it is kept as information. Nothing is skipped: a config that asks for something we do not do would otherwise load "fine"
and answer wrongly.
"""

import json
import math
import re
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from .names import ending_in

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 16 * 2**20
REGEX_SECONDS = 10

# These describe how the adapter was made or is stored; none changes what the finished adapter computes.
# (`megatron_core` and `qalora_group_size` act only together with fields that are refused, `loftq_config` with a
# refused init; `eva_config` chose the initial A, which training has replaced.)
INFORMATION = {"auto_mapping", "ensure_weight_tying", "eva_config", "inference_mode", "loftq_config", "megatron_core",
               "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config"}  # fmt: skip

# PEFT's further fields. Each changes the computation when it is set.
REFUSED = {"alora_invocation_tokens", "arrow_config", "corda_config", "kasa_config", "layer_replication", "lora_bias",
           "lora_ga_config", "megatron_config", "monteclora_config", "trainable_token_indices", "use_bdlora",
           "use_qalora", "velora_config"}  # fmt: skip


def _fits(value, kind) -> bool:
    return kind.__metadata__[1](value)


# What a field may hold: the type here, words for a message, the check of a value from JSON.
Count = Annotated[int, "an integer of at least 1", lambda v: type(v) is int and v >= 1]
Number = Annotated[float, "a finite number", lambda v: type(v) in (int, float) and abs(v) < 1e30]  # 10**400 is none
Probability = Annotated[float, "a number in [0, 1)", lambda v: _fits(v, Number) and 0 <= v < 1]
Flag = Annotated[bool, "true or false", lambda v: isinstance(v, bool)]
Text = Annotated[str | None, "a string", lambda v: isinstance(v, str)]
Texts = Annotated[list[str] | None, "a list of strings",
                  lambda v: isinstance(v, list) and all(isinstance(item, str) and item for item in v)]  # fmt: skip
Targets = Annotated[list[str] | str | None, "strings or a regular expression",
                    lambda v: isinstance(v, str) or _fits(v, Texts)]  # fmt: skip
Counts = Annotated[dict[str, int], "an object of integers of at least 1",
                   lambda v: isinstance(v, dict) and all(_fits(item, Count) for item in v.values())]  # fmt: skip
Numbers = Annotated[dict[str, float], "an object of finite numbers",
                    lambda v: isinstance(v, dict) and all(_fits(item, Number) for item in v.values())]  # fmt: skip
Layers = Annotated[list[int] | int | None, "a layer number or a list of them",
                   lambda v: all(type(i) is int and i >= 0 for i in (v if isinstance(v, list) else [v]))]  # fmt: skip
NoBias = Annotated[str, "'none', for trained biases are not supported", lambda v: v == "none"]
Init = Annotated[bool | str, "true, false, 'gaussian', 'eva' or 'orthogonal'; any other method (PiSSA, OLoRA, LoftQ, "
                 "…) replaces the base weights, so the adapter does not fit the base model as it is on disk; save it "
                 "again with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
                 lambda v: v in (True, False, "gaussian", "eva", "orthogonal")]  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """A checked `adapter_config.json`, under PEFT's own field names and with PEFT's defaults. JSON's null stands for
    the default where that is None or an empty object."""

    r: Count = 8
    lora_alpha: Number = 8
    lora_dropout: Probability = 0.0
    target_modules: Targets = None
    target_parameters: Texts = None
    exclude_modules: Targets = None
    rank_pattern: Counts = field(default_factory=dict)
    alpha_pattern: Numbers = field(default_factory=dict)
    layers_to_transform: Layers = None
    layers_pattern: Targets = None
    modules_to_save: Texts = None
    use_rslora: Flag = False
    use_dora: Flag = False
    fan_in_fan_out: Flag = False
    init_lora_weights: Init = True
    bias: NoBias = "none"
    base_model_name_or_path: Text = None
    task_type: Text = None

    def settings(self, paths: Collection[str]) -> dict[str, tuple[int, float, float]]:
        """Path → (rank, alpha, scaling) of the layers at `paths`; the first pattern that matches wins, as in PEFT."""
        rank, alpha = dict.fromkeys(paths, self.r), dict.fromkeys(paths, self.lora_alpha)
        for chosen, patterns in ((rank, self.rank_pattern), (alpha, self.alpha_pattern)):
            matches = full_matches([rf"(?:.*\.)?(?:{key})" for key in patterns], paths)
            for matched, value in reversed(list(zip(matches, patterns.values(), strict=True))):
                chosen.update(dict.fromkeys(matched, value))
        divisor = math.sqrt if self.use_rslora else int
        return {path: (rank[path], alpha[path], alpha[path] / divisor(rank[path])) for path in paths}

    def selects(self, paths: Collection[str], output_heads: Collection[str] = ()) -> set[str] | None:
        """Which of the linear layers at `paths` the target modules are, by PEFT's rules; None: the config names none.

        "all-linear" leaves out the output heads.
        """
        if self.target_modules is None and self.target_parameters is None:
            return None
        if is_all_linear(self.target_modules):
            found = set(paths) - set(output_heads)
        else:
            found = matching(self.target_modules or [], paths)
            found = self.narrowed(found, self.target_modules)
        found -= matching(self.exclude_modules or [], paths)
        saved = {f".{name}." for name in self.modules_to_save or ()}
        return {path for path in found if not any(name in f".{path}." for name in saved)}

    def narrowed(self, paths: Collection[str], targets) -> set[str]:
        """Those in the layers to transform, or whose whole path is named."""
        if self.layers_to_transform in (None, []):
            return set(paths)
        whole = () if targets is None or isinstance(targets, str) else targets
        return {path for path in paths if path in whole or self._layer_index_fits(path)}

    def _layer_index_fits(self, path: str) -> bool:
        """The first number in the path (right after one of `layers_pattern`, if given) is in `layers_to_transform`."""
        wanted = self.layers_to_transform if isinstance(self.layers_to_transform, list) else [self.layers_to_transform]
        patterns = self.layers_pattern or []
        names = map(re.escape, [patterns] if isinstance(patterns, str) else patterns)
        before = [rf"(.*?\.)?{name}" for name in names] or [r"(.*?\.)[^.]*"]  # PEFT skips the first component
        found = next(filter(None, (re.match(rf"{start}\.(\d+)\.", path) for start in before)), None)
        return found is not None and int(found[2]) in wanted


def chosen_settings(**settings) -> AdapterConfig:
    """A config of arguments: None stands for a default. ValueError: a value that the field cannot hold."""
    settings = {name: v for name, v in settings.items() if v is not None}
    settings |= {name: list(v) for name, v in settings.items() if isinstance(v, (tuple, range, set))}
    for name, value in settings.items():
        kind = AdapterConfig.__dataclass_fields__[name].type
        if not _fits(value, kind):
            raise ValueError(f"{name} must be {kind.__metadata__[0]}, got {short(value)}")
    return AdapterConfig(**settings)


def is_all_linear(target_modules) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() == "all-linear"


def matching(targets: list[str] | str, paths: Collection[str]) -> set[str]:
    return full_matches([targets], paths)[0] if isinstance(targets, str) else ending_in(paths, targets)


def full_matches(patterns: list[str], names: Collection[str]) -> list[set[str]]:
    """For every regular expression the names that it matches in full.

    A stranger's expression can be built to run for years, and `re` cannot be interrupted; `regex` can.
    """
    if not patterns:
        return []
    import regex

    end = time.monotonic() + REGEX_SECONDS
    try:
        compiled = [regex.compile(pattern) for pattern in patterns]
        return [{n for n in names if p.fullmatch(n, timeout=max(0.0, end - time.monotonic()))} for p in compiled]
    except TimeoutError:
        raise ValueError(f"a regular expression takes more than {REGEX_SECONDS} seconds: {short(patterns)}") from None
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {short(patterns)}: {error}") from None


def read_adapter_config(directory: str | Path) -> dict:
    """Read and check `directory/adapter_config.json`; the fields of AdapterConfig as a dict, defaults filled in.

    The file is taken for untrusted: its size, its JSON and every type are checked, and nothing it names is opened.
    Unknown fields pass when empty (null, false, 0, "", [], {}): a newer PEFT may mean something by others.

    ValueError: the file is missing, damaged, not a LoRA config, holds a value of the wrong type, or asks by a field
    (named in the message) for something that is not supported.
    """
    path = Path(directory) / CONFIG_NAME
    fields = _read_json(path)

    def refuse(name, why):
        raise ValueError(f"{path}: field {name!r} is {short(fields[name])}: {why}")

    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be 'LORA', got {short(fields.get('peft_type'))}")
    known = {}
    for name, value in fields.items():
        if name in AdapterConfig.__dataclass_fields__:
            if value is None and getattr(AdapterConfig, name, None) is None:
                continue
            kind = AdapterConfig.__dataclass_fields__[name].type
            if not _fits(value, kind):
                refuse(name, f"expected {kind.__metadata__[0]}")
            known[name] = value
        elif name in REFUSED and value:
            refuse(name, "this is not supported, and ignoring it would change what the adapter computes")
        elif name not in INFORMATION and value:
            refuse(name, "unknown field; remove it if you are sure that it does not change what the adapter computes")
    config = AdapterConfig(**known)
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and name in known:
            refuse(name, "this cannot be combined with target_modules given as one string")
    if config.layers_pattern and config.layers_to_transform is None:
        refuse("layers_pattern", "this needs layers_to_transform")
    return asdict(config)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many for a config (at most {MAX_CONFIG_BYTES})")
    try:
        fields = json.loads(path.read_bytes().decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {str(error) or type(error).__name__}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def _unique(pairs) -> dict:
    """For json: an object whose keys are all different. Readers disagree about which of two equal keys counts."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object holds the same key twice")
    return result


def short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
