"""`adapter_config.json`: what PEFT writes there, what of it we can honour, and which layers it selects.

A field either changes what the adapter computes, and then it is honoured or refused by name, or it
does not, and then it is kept as information. Nothing is skipped: a config that asks for something
we do not do would otherwise load "fine" and answer wrongly.
"""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 16 * 2**20
REGEX_SECONDS = 10

# These describe how the adapter was made or is stored; none changes what the finished adapter computes.
# (`megatron_core` and `qalora_group_size` act only together with fields that are refused.)
INFORMATION = {
    "auto_mapping", "ensure_weight_tying", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config",
}  # fmt: skip

# PEFT's further fields. Each changes the computation when it is set.
REFUSED = {
    "alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication",
    "lora_bias", "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
HARMLESS_IN_REFUSED = {"eva_config"}  # it chose the initial A, which training has replaced

# The other methods (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA …) replace the base weight by a residual.
INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


def _is(*kinds):
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _is_count(value):
    return _is(int)(value) and value >= 1


def _is_number(value):
    return _is(int, float)(value) and -1e30 < value < 1e30  # neither NaN nor infinity nor 10**400


def _is_strings(value):
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_targets(value):
    return isinstance(value, str) or _is_strings(value)


def _is_dict_of(check):
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_layers(value):
    return all(_is(int)(index) and index >= 0 for index in (value if isinstance(value, list) else [value]))


# ruff: noqa: RUF009 - each of these calls makes one dataclass field
def _field(default, check, expected: str, optional: bool = False):
    """A field with what its value must be; an optional one may be null, which stands for the default."""
    metadata = {"check": check, "expected": expected, "optional": optional}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class AdapterConfig:
    """A checked `adapter_config.json`, under PEFT's own field names and with PEFT's defaults."""

    r: int = _field(8, _is_count, "an integer of at least 1")
    lora_alpha: float = _field(8, _is_number, "a finite number")
    lora_dropout: float = _field(0.0, lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)")
    target_modules: list[str] | str | None = _field(None, _is_targets, "strings or a regular expression", True)
    exclude_modules: list[str] | str | None = _field(None, _is_targets, "strings or a regular expression", True)
    rank_pattern: dict[str, int] = _field({}, _is_dict_of(_is_count), "an object of integers of at least 1", True)
    alpha_pattern: dict[str, float] = _field({}, _is_dict_of(_is_number), "an object of finite numbers", True)
    layers_to_transform: list[int] | int | None = _field(None, _is_layers, "a layer number or a list of them", True)
    layers_pattern: list[str] | str | None = _field(None, _is_targets, "a string or a list of strings", True)
    modules_to_save: list[str] | None = _field(None, _is_strings, "a list of strings", True)
    use_rslora: bool = _field(False, _is(bool), "true or false")
    use_dora: bool = _field(False, _is(bool), "true or false")
    fan_in_fan_out: bool = _field(False, _is(bool), "true or false")
    init_lora_weights: bool | str = _field(True, _is(bool, str), "true, false or a string")
    bias: str = _field("none", _is(str), "a string")
    base_model_name_or_path: str | None = _field(None, _is(str), "a string", True)
    task_type: str | None = _field(None, _is(str), "a string", True)

    def settings(self, paths: Iterable[str]) -> dict[str, tuple[int, float, float]]:
        """Path → (rank, alpha, scaling) of the layers at `paths`; the first pattern that matches wins, as in PEFT."""
        paths = list(paths)
        rank, alpha = dict.fromkeys(paths, self.r), dict.fromkeys(paths, self.lora_alpha)
        for chosen, patterns in ((rank, self.rank_pattern), (alpha, self.alpha_pattern)):
            matches = full_matches([rf"(?:.*\.)?(?:{key})" for key in patterns], paths)
            for matched, value in reversed(list(zip(matches, patterns.values(), strict=True))):
                chosen.update(dict.fromkeys(matched, value))
        divisor = math.sqrt if self.use_rslora else int
        return {path: (rank[path], alpha[path], alpha[path] / divisor(rank[path])) for path in paths}

    def selects(self, paths: Iterable[str], output_heads: Iterable[str] = ()) -> set[str] | None:
        """The module paths that the config adapts, by PEFT's rules; None when it names no target modules.

        Args:
            paths: the paths of the model's linear layers.
            output_heads: those of them that "all-linear" leaves out.
        """
        paths = list(paths)
        if self.target_modules is None:
            return None
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            found = set(paths) - set(output_heads)
        else:
            found = _matching(self.target_modules, paths)
        if isinstance(self.target_modules, list) and self.layers_to_transform not in (None, []):
            found = {path for path in found if path in self.target_modules or self._layer_index_fits(path)}
        found -= _matching(self.exclude_modules or [], paths)
        saved = {f".{name}." for name in self.modules_to_save or ()}
        return {path for path in found if not any(name in f".{path}." for name in saved)}

    def _layer_index_fits(self, path: str) -> bool:
        """The first number in the path (right after one of `layers_pattern`, if given) is in `layers_to_transform`."""
        wanted = self.layers_to_transform if isinstance(self.layers_to_transform, list) else [self.layers_to_transform]
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        parts = path.split(".")
        for pattern in patterns or [None]:
            for place in range(1 if pattern else 2, len(parts) - 1):  # without a pattern PEFT skips the first component
                if parts[place].isdigit() and (not pattern or _ends_in(".".join(parts[:place]), [pattern])):
                    return int(parts[place]) in wanted
        return False


def _matching(targets: list[str] | str, paths: list[str]) -> set[str]:
    if isinstance(targets, str):
        return full_matches([targets], paths)[0]
    return {path for path in paths if _ends_in(path, targets)}


def _ends_in(path: str, names: Iterable[str]) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in names)


def full_matches(patterns: list[str], names: list[str]) -> list[set[str]]:
    """For every regular expression the names that it matches in full.

    A stranger's expression can be built to run for years, and `re` cannot be interrupted; `regex` can.

    Raises:
        ValueError: not a regular expression, or not done within REGEX_SECONDS.
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

    Raises:
        ValueError: see `load_config`.
    """
    return asdict(load_config(directory))


def load_config(directory: str | Path) -> AdapterConfig:
    """Read and check `directory/adapter_config.json`.

    The file is taken for untrusted: its size, its JSON and every type are checked, and nothing it
    names is opened. Unknown fields are let pass when empty (null, false, 0, "", [], {}) and refused
    otherwise, for a newer PEFT may mean by them something that changes the result.

    Raises:
        ValueError: the file is missing, damaged, not a LoRA config, holds a value of the wrong type,
            or asks by a field (named in the message) for something that is not supported.
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
            rule = AdapterConfig.__dataclass_fields__[name].metadata
            if value is None and rule["optional"]:
                continue
            if not rule["check"](value):
                refuse(name, f"expected {rule['expected']}")
            known[name] = value
        elif name in REFUSED and value and name not in HARMLESS_IN_REFUSED:
            refuse(name, "this is not supported, and ignoring it would change what the adapter computes")
        elif name == "loftq_config" and value and fields.get("init_lora_weights") == "loftq":
            refuse(name, "the adapter belongs to a base that LoftQ has replaced")
        elif name not in INFORMATION | REFUSED | {"peft_type", "loftq_config"} and value:
            refuse(name, "unknown field; remove it if you are sure that it does not change what the adapter computes")
    config = AdapterConfig(**known)
    if config.bias != "none":
        refuse("bias", "trained biases are not supported, only 'none'")
    if config.init_lora_weights not in INITS_THAT_KEEP_THE_BASE:
        refuse(
            "init_lora_weights",
            "this method replaces the base weights, so the adapter does not fit the base model as it is on disk; "
            "save it again with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and name in known:
            refuse(name, "this cannot be combined with target_modules given as one string")
    if config.layers_pattern and config.layers_to_transform is None:
        refuse("layers_pattern", "this needs layers_to_transform")
    return config


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
