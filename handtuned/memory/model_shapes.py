"""The config of a model, from a directory, a model, a well-known name; or a bare number of parameters."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..training.loading import one_line
from ..training.sources import resolve

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family: RMSNorm, rotary, grouped heads, SwiGLU."""

    name: str
    layers: int = 0  # 0: nothing is known but the number of parameters
    hidden: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    intermediate: int = 0
    vocab: int = 0
    tied: bool = False  # the output head is the embedding table
    qkv_bias: bool = False  # q, k and v have biases (Qwen2)
    rounded: int | None = None  # count this many parameters instead of the true number ("7B" as in 7 · 10⁹)

    def config(self):
        """The transformers config of a model of this shape."""
        from transformers import LlamaConfig, Qwen2Config

        kind = Qwen2Config if self.qkv_bias else LlamaConfig
        return kind(vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.intermediate,
                    head_dim=self.head_dim, num_hidden_layers=self.layers, num_attention_heads=self.heads,
                    num_key_value_heads=self.kv_heads, tie_word_embeddings=self.tied)  # fmt: skip

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Projection → (outputs, inputs), of one layer."""
        h, inner = self.hidden, self.intermediate
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = ((q, h), (kv, h), (kv, h), (h, q), (inner, h), (inner, h), (h, inner))
        return dict(zip(PROJECTIONS, sizes, strict=True)) if self.layers else {}

    @property
    def table_parameters(self) -> int:
        """The embedding table, which is also the size of an untied head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        if self.rounded is not None:
            return self.rounded
        biases = sum(out for out, _ in [*self.linears.values()][:3]) * self.qkv_bias
        layer = sum(out * into for out, into in self.linears.values()) + biases + 2 * self.hidden
        return self.layers * layer + (1 if self.tied else 2) * self.table_parameters + self.hidden


_KNOWN = (Shape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, tied=True),
          Shape("smollm2-360m", 32, 960, 15, 5, 64, 2560, 49152, tied=True),
          Shape("smollm2-1.7b", 24, 2048, 32, 32, 64, 8192, 49152, tied=True),
          Shape("tinyllama-1.1b", 22, 2048, 32, 4, 64, 5632, 32000),
          Shape("qwen2.5-0.5b", 24, 896, 14, 2, 64, 4864, 151936, tied=True, qkv_bias=True),
          Shape("qwen2.5-1.5b", 28, 1536, 12, 2, 128, 8960, 151936, tied=True, qkv_bias=True),
          Shape("qwen2.5-3b", 36, 2048, 16, 2, 128, 11008, 151936, tied=True, qkv_bias=True),
          Shape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064, qkv_bias=True),
          Shape("qwen1.5-7b", 32, 4096, 32, 32, 128, 11008, 151936, qkv_bias=True),
          Shape("qwen2.5-14b", 48, 5120, 40, 8, 128, 13824, 152064, qkv_bias=True),
          Shape("qwen2.5-32b", 64, 5120, 40, 8, 128, 27648, 152064, qkv_bias=True),
          Shape("qwen2.5-72b", 80, 8192, 64, 8, 128, 29568, 152064, qkv_bias=True),
          Shape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, tied=True),
          Shape("llama-3.2-3b", 28, 3072, 24, 8, 128, 8192, 128256, tied=True),
          Shape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
          Shape("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256),
          Shape("llama-7b", 32, 4096, 32, 32, 128, 11008, 32000),
          Shape("llama-13b", 40, 5120, 40, 40, 128, 13824, 32000),
          Shape("llama-33b", 60, 6656, 52, 52, 128, 17920, 32000),
          Shape("llama-65b", 80, 8192, 64, 64, 128, 22016, 32000),
          Shape("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000),
          Shape("mistral-7b", 32, 4096, 32, 8, 128, 14336, 32000))  # fmt: skip

PRESETS = {shape.name: shape for shape in _KNOWN}
PRESETS["smollm2"] = PRESETS["smollm2-135m"]
# Round numbers, as people (and the study documents) say them, with the layers of the nearest Llama.
for _name, _like in (("7b", "llama-7b"), ("13b", "llama-13b"), ("65b", "llama-65b"), ("70b", "llama-2-70b")):
    PRESETS[_name] = replace(PRESETS[_like], name=_name, rounded=int(_name[:-1]) * 10**9)


def shape_of(model) -> Shape | None:
    """The `Shape` of a preset's name or a number of parameters; None of what has a config of its own.

    ValueError: a name that is unknown and no directory with a config.json, or a number out of range.
    """
    if isinstance(model, Shape):
        return model
    if isinstance(model, (int, float)) and not isinstance(model, bool):
        if not 0 < model < float("inf"):
            raise ValueError(f"model as a number of parameters must be positive and finite, got {model}")
        return Shape(f"{model / 1e9:g}B parameters", rounded=int(model))
    if isinstance(model, str):
        place = Path(os.path.expanduser(model))
        local = place.is_file() or (place / "config.json").is_file()
        if local and model != "smollm2":  # as `finetune` takes it, whatever the preset of that name
            return None
        if model.lower() in PRESETS:
            return PRESETS[model.lower()]
        if match := re.fullmatch(r"([\d.]+)\s*([mb])", model.lower()):
            return shape_of(float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]])
        if "/" not in model:
            raise ValueError(f"no model directory and no preset is called {model!r}; presets: {', '.join(PRESETS)}")
    return None


def config_of(model, trust_remote_code: bool = False):
    """(name, transformers config) of a `Shape`, a directory with a config.json, a GGUF file, a hub name, a config (as
    an object or a dict), or a module with such a `config`. ValueError: a config that transformers does not know;
    TypeError: anything else."""
    from transformers import AutoConfig

    if isinstance(model, Shape):
        return model.name, model.config()
    if isinstance(model, str):
        place, told = Path(resolve(model)), {"trust_remote_code": trust_remote_code}
        if place.suffix == ".gguf":
            place, told["gguf_file"] = place.parent, place.name
        with one_line(f"--model {model}"):
            return model, AutoConfig.from_pretrained(str(place), **told)
    if isinstance(model, Mapping):
        rest = {key: value for key, value in model.items() if key != "model_type"}
        return model.get("model_type"), AutoConfig.for_model(model.get("model_type"), **rest)
    config = getattr(model, "config", model)
    if not hasattr(config, "model_type"):
        raise TypeError("model must be a model, a config, a name or a number of parameters, got "
                        f"{type(model).__name__}")  # fmt: skip
    return getattr(config, "_name_or_path", "") or config.model_type, config
